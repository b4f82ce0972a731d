"""Extraction by SLURM, on a node of its own: srun, and the array of jobs in examples/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from equal_stores import require_equal
from picture_folder import write_images
from slurm_node import slurm_node, why_not
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import is_sealed

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "extract.sbatch"
NUM_IMAGES = 100  # Seven blocks.
PATIENCE_S = 400.0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    with slurm_node(tmp_path_factory.mktemp("slurm")) as environment:
        # Where `sam3cache` is this one.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        yield {**environment, "PATH": path}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("slurm") / "pictures", NUM_IMAGES)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The store of one process."""
    with one_process():
        store = folder.parent / "alone.zarr"
        config = ExtractConfig(folder, store, levels=("image_1008",), backbone="sam3-mini")
        assert extract(config).sealed
    return store


@pytest.fixture
def run(
    slurm: Mapping[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, words)],
            cwd=tmp_path,
            env=slurm,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE_S,
        )

    return run


def what_to_extract(folder: Path, store: Path) -> list[str]:
    words = [str(folder), "-o", str(store), "--levels", "image_1008", "--backbone", "sam3-mini"]
    return [*words, "--devices", "cpu"]


def test_the_tasks_of_srun_share_a_store(folder: Path, alone: Path, run, tmp_path: Path) -> None:
    store = tmp_path / "srun.zarr"
    done = run("srun", "--ntasks", "2", "sam3cache", "extract", *what_to_extract(folder, store))
    assert done.returncode == 0, done.stderr
    assert f"{store}: {NUM_IMAGES} samples, sealed" in done.stdout
    assert done.stderr.count(f"{NUM_IMAGES} images to compute") == 1, "one of them talks"
    require_equal(store, alone)


def test_an_array_goes_on_after_the_warning(folder: Path, alone: Path, run, tmp_path: Path) -> None:
    store = tmp_path / "array.zarr"
    instead = ["--array=0-1", "--gpus-per-task=0", "--cpus-per-task=1", "--mem=0"]
    command = ["sbatch", "--parsable", *instead, SCRIPT, *what_to_extract(folder, store)]
    submitted = run(*command)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    receipts = store / "receipts" / "samples"

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            logs = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.log")]
            assert time.monotonic() < deadline_s, "\n".join(logs)
            time.sleep(0.1)

    wait_for(lambda: receipts.is_dir() and len(list(receipts.iterdir())) > 0)
    assert not is_sealed(store)
    # What SLURM itself sends two minutes before the end.
    assert run("scancel", "--signal=USR1", job).returncode == 0
    wait_for(lambda: not run("squeue", "--noheader", "--jobs", job).stdout.strip())
    logs = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.log"))]
    assert len(logs) == 2
    assert any("stopped by SIGUSR1; every finished block" in log for log in logs), logs
    assert any(f"{store}: {NUM_IMAGES} samples, sealed" in log for log in logs), logs
    require_equal(store, alone)
