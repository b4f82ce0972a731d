"""What happens to a store, or a picture, while an extraction is at work on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process, run_in_this_process

from sam3cache.errors import StoreBusyError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract import run as run_module
from sam3cache.extract.config import LABEL_SET
from sam3cache.extract.job import plan_job, read_request
from sam3cache.extract.state import StoreState
from sam3cache.features import (
    BlockClaims,
    is_sealed,
    open_store,
    seal_store,
    store_lock,
    verify_store,
)
from sam3cache.features.repacking import repack

NUM_IMAGES = 18  # Two blocks, the last of two images.


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and the store made from it."""
    folder = write_images(tmp_path_factory.mktemp("base") / "pictures", NUM_IMAGES)
    extract(config(folder.parent))
    return folder.parent


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def config(place: Path, *levels: str) -> ExtractConfig:
    return ExtractConfig(
        place / "pictures",
        place / "x.zarr",
        levels=levels or ("image_1008",),
        backbone="sam3-mini",
    )


def save_like(path: Path, shade: int) -> None:
    """Replace a picture by another of the same size in bytes and time of change."""
    stat = path.stat()
    with Image.open(path) as old:
        size_px = old.size
    Image.new("L", size_px, shade).save(path)
    room_bytes = stat.st_size - path.stat().st_size
    assert room_bytes >= 0
    # Behind its end a PNG may have anything.
    path.write_bytes(path.read_bytes() + bytes(room_bytes))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_picture_replaced_behind_its_size_and_time_gets_no_level_of_another(place: Path) -> None:
    store = place / "x.zarr"
    save_like(place / "pictures/images/03.png", 200)
    # To all appearance nothing has changed; with a shard lost, its block is decoded again.
    assert extract(config(place)).num_computed == 0
    (store / "levels/image_1008/c/0/0/0/0").unlink()
    result = extract(config(place))
    (aside,) = result.set_aside
    assert aside.id == "s03"
    assert aside.reason == (
        "images/03.png has other pixels than those whose features are stored, though its size and "
        "time of change are the same; save it again, and extract again"
    )
    opened = open_store(store)
    assert "s03" not in {sample.id for sample in opened.samples}
    assert len(opened.samples) == NUM_IMAGES - 1
    # Saved again it has a time of its own.
    Image.new("L", (128, 96), 200).save(place / "pictures/images/03.png")
    assert extract(config(place)).set_aside == ()
    opened = open_store(store)
    (sample,) = [sample for sample in opened.samples if sample.id == "s03"]
    assert (opened.read("image_1008", sample.row)[0, :700] == 200).all()


def test_a_level_that_another_launch_has_added_is_not_sealed_away(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place / "x.zarr"
    (store / "levels/image_1008/c/1/0/0/0").unlink()
    before = StoreState.read(store, LABEL_SET)

    def run_pool(*arguments):
        elsewhere = run_in_this_process(*arguments)
        # Another launch begins, and is killed before its first block.
        other = config(place, "fpn_72")
        state = StoreState.read(store, LABEL_SET)
        with store_lock(store):
            plan_job(read_request(other, state, lambda progress: None), state).describe()
        return elsewhere

    monkeypatch.setattr(run_module, "run_pool", run_pool)
    result = extract(config(place))
    assert (result.sealed, result.num_computed) == (False, 2)
    assert not is_sealed(store)
    opened = open_store(store, allow_unsealed=True)
    assert sorted(opened.levels) == ["fpn_72", "image_1008"]
    assert {("levels.image_1008", block) for block in (0, 1)} <= set(opened.receipts)
    assert not any(item == "levels.fpn_72" for item, _ in opened.receipts)
    assert [row.row for row in opened.sample_rows] == [row.row for row in before.rows]


HOLDER = """
import sys, time
from pathlib import Path
from sam3cache.features import BlockClaims, is_sealed
store = Path(sys.argv[1])
with BlockClaims(store).claim(0) as is_held:
    print("held" if is_held else "lost", flush=True)
    while not sys.stdin.readline().strip():
        pass
    time.sleep(1.0)
    print("sealed" if is_sealed(store) else "open", flush=True)
"""


def test_a_store_is_not_sealed_while_another_process_writes_a_block(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place / "x.zarr"
    (store / "levels/image_1008/c/1/0/0/0").unlink()
    # As of an extraction from a manifest with other masks: block 0 lacks nothing of ours.
    command = [sys.executable, "-c", HOLDER, str(store)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        def run_pool(*arguments):
            elsewhere = run_in_this_process(*arguments)
            assert holder.stdin is not None
            holder.stdin.write("go on\n")
            holder.stdin.flush()
            return elsewhere

        monkeypatch.setattr(run_module, "run_pool", run_pool)
        result = extract(config(place))
        assert (result.sealed, result.num_computed) == (True, 2)
        assert holder.stdout.readline() == "open\n"
    assert is_sealed(store)


def test_what_another_launch_has_sealed_without_our_masks_is_unsealed_for_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place / "x.zarr"
    Image.new("L", (64, 48)).save(place / "pictures/masks/03.png")
    num_rounds = 0

    def run_pool(setups, tasks, report):
        nonlocal num_rounds
        num_rounds += 1
        if num_rounds > 1:
            assert not is_sealed(store)
            return run_in_this_process(setups, tasks, report)
        # Another launch has looked at the manifest before it changed, and finds nothing missing.
        state = StoreState.read(store, LABEL_SET)
        with store_lock(store):
            seal_store(store, state.receipts, state.rows)
        return frozenset(tasks.blocks)

    monkeypatch.setattr(run_module, "run_pool", run_pool)
    monkeypatch.setattr(BlockClaims, "pause_s", 0.01, raising=False)
    result = extract(config(place))
    assert (num_rounds, result.sealed, result.num_relabelled) == (2, True, 1)
    assert not open_store(store).read_mask(3).any()
    assert verify_store(store).findings == ()


def test_until_its_first_block_is_claimed_an_extraction_keeps_others_from_its_store(
    place: Path,
) -> None:
    store = place / "x.zarr"
    rows = [(store / f"levels/image_1008/c/{block}/0/0/0") for block in (0, 1)]
    whole = [path.read_bytes() for path in rows]
    for path in rows:
        path.unlink()
    command = [
        *(sys.executable, "-m", "sam3cache", "extract", str(place / "pictures"), "-o", str(store)),
        *("--backbone", "sam3-mini", "--levels", "image_1008", "--devices", "cpu"),
    ]
    other = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (list((store / "claims").glob("run-*.lock")) and not is_sealed(store)):
        assert time.monotonic() < deadline
        assert other.poll() is None
        time.sleep(0.005)
    process = psutil.Process(other.pid)
    process.suspend()
    family = process.children(recursive=True)
    for child in family:
        child.suspend()
    try:
        assert not list((store / "receipts").glob("levels.image_1008/*.json")), "caught too late"
        with pytest.raises(StoreBusyError, match=rf"is at work on .* \(process {other.pid}\)"):
            repack(store)
        # Another extraction may help, and even do all of it.
        result = extract(config(place))
        assert (result.sealed, result.num_computed) == (True, NUM_IMAGES)
        with pytest.raises(StoreBusyError, match="is at work on"):
            repack(store)
    finally:
        for victim in (process, *family):
            victim.kill()
        psutil.wait_procs([process, *family], timeout=20)
        other.wait()
    # Its lock has gone with it, and the next change sweeps the file.
    assert len(list((store / "claims").glob("run-*.lock"))) == 1
    repack(store)
    assert extract(config(place)).sealed
    assert list((store / "claims").glob("*.lock")) == []
    assert [path.read_bytes() for path in rows] == whole
