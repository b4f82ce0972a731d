"""An extraction at work in another process: what must wait for it, and what it leaves when killed.

The other process is a real one, between the description of its work and its first block.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_builder import build_store

from sam3cache.errors import StoreBusyError
from sam3cache.features import (
    BlockClaims,
    is_sealed,
    open_store,
    remove_label_set,
    replace_annotations,
    store_lock,
)
from sam3cache.features.locks import require_idle
from sam3cache.features.repacking import repack
from sam3cache.features.repair import repair_store

AT_WORK = """
import sys
from pathlib import Path
from sam3cache.features.locks import BlockClaims
claims = BlockClaims(Path(sys.argv[1]))
with claims.claim(int(sys.argv[2])) if len(sys.argv) > 2 else claims.at_work():
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("locks") / "x.zarr"
    return build_store(root, num_samples=20, level_shapes={"fpn_72": (1, 2, 2)})


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "x.zarr"))


@contextmanager
def another_at_work(store: Path, *block: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that says it is at work, or holds a block, until the ``with`` ends."""
    command = [sys.executable, "-c", AT_WORK, str(store), *block]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process
    finally:
        process.communicate()


def run_files(store: Path) -> list[Path]:
    return list((store / "claims").glob("run-*.lock"))


def sealed_files(store: Path) -> dict[Path, tuple[bytes, int]]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in store.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name not in (".lock", ".holder.json")
    }


def annotate(root: Path) -> None:
    replace_annotations(root, list(open_store(root, allow_unsealed=True).annotations.values()))


CHANGES: dict[str, Callable[[Path], object]] = {
    "repack": repack,
    "repair": repair_store,
    "annotations": annotate,
    "labels": lambda root: remove_label_set(root, "mask"),
}


def test_nothing_changes_a_store_that_an_extraction_is_at_work_on(store: Path) -> None:
    (store / "levels/fpn_72/c/1/0/0/0").unlink()  # So that a repair has something to do.
    before = sealed_files(store)
    with another_at_work(store) as other:
        for change in CHANGES.values():
            with pytest.raises(StoreBusyError, match=rf"at work on .* \(process {other.pid}\);"):
                change(store)
        assert sealed_files(store) == before
        # Beside an extraction there may be another.
        with BlockClaims(store).at_work(), BlockClaims(store).claim(0) as ours:
            assert ours
            assert len(run_files(store)) == 2
    assert run_files(store) == []
    assert repair_store(store).dropped == (("levels.fpn_72", 1),)


def test_a_block_that_is_held_is_named(store: Path) -> None:
    with another_at_work(store, "1"), store_lock(store):
        assert BlockClaims(store).free([0, 1]) == [0]
        with pytest.raises(StoreBusyError, match=r"at work on .* \(block 00000001\); wait for it"):
            require_idle(store)
    require_idle(store)


def test_the_killed_hold_nothing_and_what_they_leave_is_swept_by_the_next(store: Path) -> None:
    for _ in range(3):
        with another_at_work(store) as other:
            other.kill()
    assert len(run_files(store)) == 3
    annotate(store)
    assert is_sealed(store)
    assert list((store / "claims").glob("*.lock")) == []


def test_what_another_holds_is_not_swept(store: Path) -> None:
    with another_at_work(store):
        with store_lock(store):
            BlockClaims(store).sweep()
        assert len(run_files(store)) == 1
        with pytest.raises(StoreBusyError, match="an extraction is at work"):
            repack(store)
