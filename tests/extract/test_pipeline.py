"""What a user is told and left with: pictures that kill, signals, small memory, lost seals."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from picture_folder import write_images
from PIL import Image
from torch import nn
from worker_thread import one_process

from sam3cache.backbone import Tower
from sam3cache.commands.interrupts import signals_interrupt, stopped_by
from sam3cache.errors import ConfigError, WorkerError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.agenda import MAX_DEATHS_IN_A_ROW
from sam3cache.extract.config import FATAL_REASON
from sam3cache.features import is_sealed, open_store

PICTURES = ("image_1008",)


def config(folder: Path, levels: tuple[str, ...] = PICTURES, **options: Any) -> ExtractConfig:
    store = folder.parent / "x.zarr"
    return ExtractConfig(folder, store, levels=levels, backbone="sam3-mini", **options)


@contextmanager
def killed_by(*pictures: Path) -> Iterator[list[int]]:
    """Kill, as a crash of its decoder would, every worker that has one of some pictures open."""
    killed: list[int] = []
    over = threading.Event()

    def is_open_in(process: psutil.Process) -> bool:
        links = Path(f"/proc/{process.pid}/fd").iterdir()
        return any(link.readlink() in pictures for link in links)

    def watch() -> None:
        while not over.is_set():
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess, OSError):
                    if is_open_in(child):
                        child.kill()
                        killed.append(child.pid)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def fatal_picture(folder: Path, number: int) -> Path:
    """Replace a picture by one that takes long to decode, so that it is seen to be open."""
    path = folder / f"images/{number:02}.png"
    Image.fromarray(np.zeros((8000, 10_500), np.uint8)).save(path)
    Image.fromarray(np.zeros((80, 105), np.uint8)).save(folder / "masks" / path.name)
    return path


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks at what processes have open in /proc")
def test_a_picture_that_kills_its_workers_is_set_aside_and_the_rest_is_stored(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=2)
    fatal = fatal_picture(folder, 1)
    with killed_by(fatal.resolve()) as killed:
        result = extract(config(folder))
    # Once with its block, once with its block alone, once by itself.
    assert len(set(killed)) == 3
    assert (result.sealed, result.num_samples) == (True, 1)
    (aside,) = result.set_aside
    assert (aside.id, aside.source) == ("s01", "images/01.png")
    assert aside.reason == (
        "images/01.png ends the process that reads it (killed by SIGKILL): it crashes its decoder, "
        "or takes more memory than there is; save it anew, or take it out of the manifest"
    )
    assert [sample.id for sample in open_store(result.store).samples] == ["s00"]
    # It is not looked at again: that would end this process.
    begun_s = time.monotonic()
    again = extract(config(folder))
    assert (again.num_computed, again.num_removed) == (0, 0)
    assert again.set_aside == result.set_aside
    assert time.monotonic() - begun_s < 30
    # Saved anew, it is.
    Image.fromarray(np.zeros((80, 105), np.uint8)).save(fatal)
    with one_process():
        mended = extract(config(folder))
    assert (mended.num_computed, mended.num_samples, mended.set_aside) == (1, 2, ())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="looks at what processes have open in /proc")
def test_a_block_with_pictures_that_kill_in_three_of_its_quarters_ends_nothing(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=18)
    fatal = [fatal_picture(folder, number) for number in (0, 4, 8)]
    with killed_by(*(picture.resolve() for picture in fatal)) as killed:
        result = extract(config(folder))
    assert len(set(killed)) > MAX_DEATHS_IN_A_ROW
    assert (result.sealed, result.num_samples) == (True, 15)
    assert {aside.id for aside in result.set_aside} == {"s00", "s04", "s08"}
    assert all(FATAL_REASON in aside.reason for aside in result.set_aside)


@pytest.mark.skipif(sys.platform == "win32", reason="its programs have other ways to end")
def test_workers_that_never_begin_are_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    false = shutil.which("false")
    assert false is not None
    resource_tracker.ensure_running()
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(false))
    folder = write_images(tmp_path / "pictures", num_images=2)
    with pytest.raises(WorkerError, match=r"3 workers in a row .* for cpu \(exit code 1\)"):
        extract(config(folder))
    assert not is_sealed(tmp_path / "x.zarr")


SCRIPT = """
from pathlib import Path
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.agenda import MAX_DEATHS_IN_A_ROW
from sam3cache.extract.config import FATAL_REASON

extract(ExtractConfig(Path("pictures"), Path("x.zarr"), levels=("image_1008",)))
"""


def test_a_script_that_extracts_while_it_is_imported_is_told_so(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", num_images=2)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == (
        "sam3cache.errors.ConfigError: this script extracts while it is being imported, and each "
        "worker imports it: put what it does into a function, and call that below a line "
        '`if __name__ == "__main__":`'
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_slurms_warning_ends_an_extraction_soon_and_loses_nothing_finished(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", num_images=100)
    store = tmp_path / "x.zarr"
    command = [
        *(sys.executable, "-m", "sam3cache", "extract", str(folder), "-o", str(store)),
        *("--levels", "image_1008", "--backbone", "sam3-mini", "--devices", "cpu:2"),
    ]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline_s = time.monotonic() + 150
        while not list(store.glob("receipts/samples/*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        family = psutil.Process(process.pid).children(recursive=True)
        begun_s = time.monotonic()
        # As SLURM does: to every process of the step.
        os.killpg(process.pid, signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - begun_s < 30
    assert process.returncode == 128 + signal.SIGUSR1
    lines = errors.decode().splitlines()
    assert lines[-1] == (
        f"sam3cache: error: stopped by SIGUSR1; every finished block of {store} is kept: run the "
        "same command again to go on"
    )
    assert not any("Traceback" in line for line in lines)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert list(store.rglob("*.partial")) == []
    assert not is_sealed(store)
    done = {
        key: (store / key).stat().st_mtime_ns
        for path in store.glob("receipts/levels.image_1008/*.json")
        for key, *_ in json.loads(path.read_bytes())["shards"]
    }
    assert done
    with one_process():
        result = extract(config(folder))
    assert (result.sealed, result.num_samples) == (True, 100)
    assert result.num_computed <= 100 - 16 * len(done)
    assert {key: (store / key).stat().st_mtime_ns for key in done} == done


@pytest.mark.parametrize(
    ("name", "exit_code", "words"),
    [
        ("SIGINT", 130, "interrupted; all is kept"),
        ("SIGTERM", 143, "stopped by SIGTERM; all is kept"),
        ("SIGUSR1", 138, "stopped by SIGUSR1; all is kept"),
        ("SIGBREAK", 130, "interrupted; all is kept"),
    ],
)
def test_a_signal_ends_the_program_with_the_exit_code_that_shells_give_it(
    name: str, exit_code: int, words: str
) -> None:
    if not hasattr(signal, name):
        pytest.skip("no such signal on this system")
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, signals_interrupt():
        signal.raise_signal(number)
    error = stopped_by(caught.value, "all is kept")
    assert (error.exit_code, str(error)) == (exit_code, words)
    assert signal.getsignal(number) == before


@contextmanager
def memory_for(max_images: int) -> Iterator[None]:
    """Let every tower run out of memory beyond so many images."""

    def check(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Tower) and len(arguments[0]) > max_images:
            raise torch.OutOfMemoryError("no memory")

    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def test_a_batch_size_that_does_not_fit_is_halved_said_once_and_corrected_in_the_store(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=3)
    said: list[str] = []
    with one_process(), memory_for(1):
        result = extract(config(folder, ("fpn_72",), batch_size=3), warn=said.append)
    assert said == ["cpu has not enough memory for batches of 3: going on with 1"]
    assert (result.sealed, result.num_samples, result.batch_size) == (True, 3, 1)
    assert open_store(result.store).settings["batch_size"] == 1
    assert result.time_shares is not None
    assert 0 < result.time_shares.tower <= 1
    # What is recorded is what the next run begins with.
    (folder / "images/02.png").write_bytes((folder / "images/01.png").read_bytes())
    Image.new("L", (128, 96), 7).save(folder / "images/01.png")
    with one_process(), memory_for(1):
        again = extract(config(folder, ("fpn_72",)), warn=said.append)
    assert (again.sealed, again.batch_size, len(said)) == (True, 1, 1)
    # The command that began it still goes on; any other size is refused, and changes nothing.
    with one_process(), memory_for(1):
        assert extract(config(folder, ("fpn_72",), batch_size=3), warn=said.append).sealed
    before = {path: path.read_bytes() for path in result.store.rglob("*.json")}
    with pytest.raises(ConfigError, match=r"--batch-size 2: .* was made with batches of 1, and"):
        extract(config(folder, ("fpn_72",), batch_size=2))
    assert {path: path.read_bytes() for path in result.store.rglob("*.json")} == before
    assert is_sealed(result.store)


def without(*columns: str) -> Callable[[Path], None]:
    """Return what empties columns of a manifest."""

    def rewrite(manifest: Path) -> None:
        header, *lines = manifest.read_text(encoding="utf-8").splitlines()
        names = header.split(",")
        rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
        rows = [row | dict.fromkeys(columns, "") for row in rows]
        lines = [",".join(row.values()) for row in rows]
        manifest.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")

    return rewrite


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ((), []),
        (("mask",), ["has a mask, without which no head can be trained; a manifest"]),
        (("primary_angle",), ["has both view angles, which heads then take as unknown; a man"]),
        (("mask", "primary_angle", "secondary_angle"), ["can be trained, and none both view angl"]),
    ],
)
def test_a_manifest_that_lacks_masks_or_angles_is_told_so_before_long_work(
    tmp_path: Path, invoke: Callable[..., Any], columns: tuple[str, ...], words: list[str]
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=2)
    without(*columns)(folder / "manifest.csv")
    options = ("--levels", "image_1008", "--backbone", "sam3-mini", "--devices", "cpu")
    with one_process():
        done = invoke("extract", folder, "-o", tmp_path / "x.zarr", *options)
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == len(words)
    for word, line in zip(words, warnings, strict=True):
        assert word in line
        # Before the tower runs.
        extracting = [i for i, other in enumerate(lines) if other.startswith("Extracting")]
        assert lines.index(line) < extracting[0]
    assert "Time of the workers: 0% in the tower, " in done.stdout
    # Nothing is to be computed: there is nothing to know before.
    again = invoke("extract", folder, "-o", tmp_path / "x.zarr", *options)
    assert "warning" not in again.stderr


def test_a_store_that_has_lost_both_its_seals_is_not_computed_anew_without_a_word(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=3)
    said: list[str] = []
    with one_process():
        store = extract(config(folder), warn=said.append).store
        assert said == []
        (store / "complete.json").unlink()
        (store / "receipts/sealed.json").unlink()
        result = extract(config(folder), warn=said.append)
    assert (result.sealed, result.num_computed) == (True, 3)
    (line,) = said
    assert line == (
        f"{store} was complete once, but complete.json and receipts/sealed.json are gone, without "
        "which nothing vouches for its features: all 3 images are computed anew; to keep what is "
        "there, stop and restore one of the two files"
    )
