"""Disks that fill up or turn read-only while extraction runs, and workers that die midway."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from picture_folder import write_images
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.job import plan_job, read_request
from sam3cache.extract.state import StoreState

LEVELS = ("image_1008",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("faults") / "pictures", num_images=40)


@pytest.fixture(scope="module")
def undisturbed(folder):
    with one_process():
        return extract(config(folder, folder.parent / "undisturbed.zarr")).store


def config(folder: Path, store: Path) -> ExtractConfig:
    return ExtractConfig(folder, store, levels=LEVELS, backbone="sam3-mini")


def files_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def finished(store: Path) -> dict[str, int]:
    """Times of change of the shards that single receipts name."""
    return {
        key: (store / key).stat().st_mtime_ns
        for path in (store / "receipts").glob("*/*.json")
        for key, *_ in json.loads(path.read_bytes())["shards"]
    }


@contextmanager
def once(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Act from another thread as soon as something has happened."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if condition():
                act()
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def mount(*options: str) -> str:
    """Return why it was refused, or nothing."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        return "only Linux mounts disks in memory"
    return subprocess.run(["mount", *options], capture_output=True, text=True).stderr.strip()


@pytest.fixture
def disk(tmp_path):
    """A small disk in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    refused = mount("-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder))
    if refused:
        pytest.skip(f"no small disk can be mounted here: {refused}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def complaint(result) -> str:
    """The one line that says what went wrong; a forecast may stand before it."""
    *before, last = result.stderr.splitlines()
    assert result.exit_code == 1
    assert not any("error" in line or "Traceback" in line for line in before), before
    return last


def test_a_disk_that_fills_up_costs_nothing_finished(folder, undisturbed, disk, invoke):
    store, ballast = disk / "x.zarr", disk / "ballast"
    arguments = ("extract", folder, "-o", store, "--levels", "image_1008")
    arguments += ("--backbone", "sam3-mini", "--devices", "cpu")
    paths = undisturbed.glob("levels/image_1008/c/*/0/0/0")
    shards = [path.stat().st_size for path in paths]
    assert len(shards) == 3

    def fill() -> None:
        # Room for one block, and half of another; nothing has been written but the description.
        room_bytes = int(1.5 * max(shards))
        with ballast.open("wb") as file:
            free_bytes = psutil.disk_usage(str(disk)).free
            os.posix_fallocate(file.fileno(), 0, free_bytes - room_bytes)

    with once((store / "zarr.json").exists, fill):
        line = complaint(invoke(*arguments))
    assert line.startswith(f"sam3cache: error: {store}{os.sep}")
    assert line.endswith(": No space left on device; free some space, or write to another disk")
    done = finished(store)
    assert any(key.startswith("levels/image_1008/") for key in done)
    assert not list(store.rglob("*.partial"))

    ballast.unlink()
    with one_process():
        again = invoke(*arguments)
    assert again.exit_code == 0, again.stderr
    assert files_of(store) == files_of(undisturbed)
    assert {key: (store / key).stat().st_mtime_ns for key in done} == done


def test_a_folder_that_turns_read_only_costs_nothing_finished(
    folder, undisturbed, disk, invoke, tmp_path
):
    store = disk / "x.zarr"
    arguments = ("extract", folder, "-o", store, "--levels", "image_1008")
    arguments += ("--backbone", "sam3-mini", "--devices", "cpu")
    # The lock of a run is open all the time, on a disk that no mount would turn read-only so.
    store.mkdir()
    (tmp_path / "claims").mkdir()
    (store / "claims").symlink_to(tmp_path / "claims")

    def turn_read_only() -> None:
        while mount("-o", "remount,ro", str(disk)):
            time.sleep(0.001)  # Refused as long as a file is open for writing.

    with once(lambda: bool(finished(store)), turn_read_only):
        line = complaint(invoke(*arguments))
    assert line.startswith(f"sam3cache: error: {store}{os.sep}")
    assert line.endswith(": Read-only file system; write to a path that is not mounted read-only")
    done = finished(store)
    assert done

    mount("-o", "remount,rw", str(disk))
    with one_process():
        again = invoke(*arguments)
    assert again.exit_code == 0, again.stderr
    assert files_of(store) == files_of(undisturbed)
    assert {key: (store / key).stat().st_mtime_ns for key in done} == done


def test_a_folder_without_permission_is_told_in_one_line(folder, undisturbed, tmp_path, invoke):
    store = tmp_path / "x.zarr"
    shutil.copytree(undisturbed, store)
    shard = next(store.glob("levels/image_1008/c/*/0/0/0"))
    shard.unlink()
    shard.parent.chmod(0o555)
    if os.access(shard.parent, os.W_OK):
        pytest.skip("permissions of folders bind neither root nor Windows")
    arguments = ("extract", folder, "-o", store, "--levels", "image_1008")
    arguments += ("--backbone", "sam3-mini", "--devices", "cpu")
    line = complaint(invoke(*arguments))
    assert line == (
        f"sam3cache: error: {shard}: Permission denied; check the permissions of the path, or "
        "choose another"
    )
    shard.parent.chmod(0o755)
    assert invoke(*arguments).exit_code == 0
    assert files_of(store) == files_of(undisturbed)


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it may just be ending
            if any("spawn_main" in part for part in child.cmdline()):
                found.append(child)
    return found


def test_workers_may_die_within_a_block_and_when_nothing_is_left_to_do(
    folder, undisturbed, tmp_path
):
    store = tmp_path / "x.zarr"
    receipts = store / "receipts"
    early: dict[str, int] = {}
    killed: list[int] = []

    def is_within_a_block() -> bool:
        """A block's picture level is done and its facts, which come last, are not."""
        begun = {path.name for path in (receipts / "levels.image_1008").glob("*.json")}
        return bool(begun - {path.name for path in (receipts / "samples").glob("*.json")})

    def is_caught() -> bool:
        if not is_within_a_block():
            return False
        for worker in workers():
            worker.suspend()
        if is_within_a_block():
            return True
        for worker in workers():
            worker.resume()
        return False

    def kill() -> None:
        early.update(early or finished(store))
        for worker in workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()
                killed.append(worker.pid)

    def report(progress) -> None:
        # The last block is reported: the worker has been told to end, and is about to.
        if progress.stage == "extracting" and progress.num_done >= 40:
            kill()

    with once(is_caught, kill):
        result = extract(config(folder, store), report)
    assert killed
    assert result.sealed
    # What the first had finished of its block is not written again.
    assert any("levels" in key for key in early)
    assert {key: (store / key).stat().st_mtime_ns for key in early} == early
    assert files_of(store) == files_of(undisturbed)


def test_a_store_that_another_launch_begins_meanwhile_is_no_foreign_folder(
    folder, undisturbed, tmp_path
):
    store = tmp_path / "x.zarr"
    before = StoreState.read(store, "mask")
    request = read_request(config(folder, store), before, lambda progress: None)
    shutil.copytree(undisturbed, store)
    # All is still to be done as far as that look can tell; under the lock it is taken again.
    assert len(plan_job(request, before).tasks) == 3
    assert not before.is_current
    assert not plan_job(request, StoreState.read(store, "mask")).tasks
