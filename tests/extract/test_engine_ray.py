"""Extraction by Ray: the same store as without it, also when nodes come and go."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from equal_stores import require_equal
from picture_folder import write_images

from sam3cache.errors import ConfigError
from sam3cache.extract import ExtractConfig
from sam3cache.extract.config import LABEL_SET
from sam3cache.extract.job import plan_job, read_request
from sam3cache.extract.ray_engine import (
    _BlockWriter,
    _pack,
    _Result,
    cluster_devices,
    usable_nodes,
)
from sam3cache.extract.state import StoreState
from sam3cache.extract.worker import BlockTask
from sam3cache.features import store_lock

TESTS = Path(__file__).parents[1]
NUM_IMAGES = 100  # Seven blocks.
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install -e '.[ray]'")


@pytest.mark.parametrize("devices", ["0,1", "cuda:0", "cuda"])
def test_ray_chooses_the_devices(devices: str) -> None:
    with pytest.raises(ConfigError, match="Ray chooses the devices; write all, cpu, or cpu:8"):
        cluster_devices(devices)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_one_line_says_what_to_install(tmp_path: Path, invoke) -> None:
    result = invoke("extract", tmp_path, "--engine", "ray")
    assert result.exit_code == 2
    assert result.stderr.startswith("sam3cache: error: --engine ray needs Ray, which is not inst")


def test_nodes_are_told_paths_that_hold_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").touch()
    wanted = ExtractConfig(Path("a"), Path("b.zarr"), weights="weights.pt", engine="ray")
    assert wanted.manifest == tmp_path / "a"
    assert wanted.output == tmp_path / "b.zarr"
    assert wanted.weights == str(tmp_path / "weights.pt")
    assert ExtractConfig(Path("a"), Path("b.zarr"), weights="random", engine="ray").weights == (
        "random"
    )


@pytest.mark.parametrize(("num_tasks", "num_workers"), [(1, 4), (7, 2), (100, 1), (1000, 8)])
def test_blocks_are_packed_so_that_all_workers_end_together(
    num_tasks: int, num_workers: int
) -> None:
    tasks = [BlockTask(block, frozenset(), (), {}, {}) for block in range(num_tasks)]
    rows = [pickle.loads(zlib.decompress(packed)) for packed in _pack(tasks, num_workers)]
    assert [task for row in rows for task in row] == tasks
    sizes = [len(row) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= max(1, min(32, num_tasks // (2 * num_workers)))
    assert sizes[-1] == 1


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("ray") / "pictures", NUM_IMAGES)


@pytest.fixture(scope="module")
def extract(folder: Path) -> Callable[..., tuple[Path, str]]:
    def extract(name: str, *options: str) -> tuple[Path, str]:
        store = folder.parent / name
        arguments = ["extract", str(folder), "-o", str(store), "--backbone", "sam3-mini"]
        done = run("-m", "sam3cache", *arguments, "--levels", LEVELS, *options)
        assert done.returncode == 0, done.stderr
        return store, done.stdout

    return extract


LEVELS = "image_1008,fpn_72"


@pytest.fixture(scope="module")
def reference(extract: Callable[..., tuple[Path, str]]) -> Path:
    """The store of the pool, of which each worker has one thread, as a worker of the nodes has."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return extract("pool.zarr", "--devices", f"cpu:{num_cores}")[0]


def require_folded_and_equal(store: Path, reference: Path) -> None:
    require_equal(store, reference)
    assert not (store / "receipts" / "samples").exists() or not list(
        (store / "receipts" / "samples").iterdir()
    )


@pytest.mark.long
def test_an_actor_outlives_its_worker_and_gives_errors_back_as_values(
    folder: Path, tmp_path: Path
) -> None:
    wanted = ExtractConfig(folder, tmp_path / "x.zarr", levels=("image_1008",))
    state = StoreState.read(wanted.output, LABEL_SET)
    with store_lock(wanted.output):
        job = plan_job(read_request(wanted, state, lambda progress: None), state).describe()
    actor = _BlockWriter(job.setups()[0])

    def result(block: int) -> _Result:
        (packed,) = _pack(job.tasks.only({block}), 1)
        given: _Result = pickle.loads(actor({"tasks": packed})["result"])
        return given

    try:
        assert result(0).outcomes == {0: "written"}
        assert result(0).outcomes == {0: "found"}
        actor._process.kill()
        assert result(1).outcomes == {1: "written"}
        after = result(2)
        assert (after.outcomes, after.error) == ({2: "written"}, None)
        assert after.status is not None
        assert after.status.num_images == 16
        # Nothing can be written any more.
        shutil.rmtree(wanted.output / "levels")
        (wanted.output / "levels").touch()
        failed = result(3)
        assert failed.outcomes == {}
        assert isinstance(failed.error, OSError)
    finally:
        actor._process.kill()
        actor._process.join()


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_lost_and_one_added_leave_an_equal_store(folder: Path, reference: Path) -> None:
    store = folder.parent / "nodes.zarr"
    done = run(TESTS / "ray_nodes.py", folder, store, LEVELS)
    assert done.returncode == 0, done.stderr
    assert "a node was lost with" in done.stdout
    assert f"{store}: {NUM_IMAGES} samples, sealed" in done.stdout
    require_folded_and_equal(store, reference)


def test_a_cluster_without_a_cpu_is_refused() -> None:
    dead = {"Alive": False, "Resources": {"CPU": 4.0}}
    head = {"Alive": True, "Resources": {"memory": 1e9}}
    able = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    with pytest.raises(ConfigError, match="none of the 1 nodes of the Ray cluster that are up has"):
        usable_nodes([dead, head])
    (node,) = usable_nodes([dead, head, able])
    assert (node.num_cpus, node.num_gpus) == (2, 1)


@needs_ray
def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    done = run(
        *("-m", "sam3cache", "extract", tmp_path, "--engine", "ray"), RAY_ADDRESS="127.0.0.1:9"
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sam3cache: error: no Ray cluster could be joined at RAY_ADDRESS=127.0.")
