"""Samples in RAM lie there once for all processes, and go with the last of them."""

import gc
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from store_builder import build_store

from sam3cache.features import open_store
from sam3cache.loading import CachedSamples, records
from sam3cache.loading.shared import SharedSegment, shared_folder

SHAPES = {"fpn_72": (4, 9, 9), "image_1008": (1, 21, 21)}
NUM_SAMPLES = 19
# Two levels and the targets of the samples that have a mask, in words of 8 bytes.
NUM_BYTES = (NUM_SAMPLES - 1) * (648 + 448 + 328)

# Loads a store's samples, says what came of it, and waits to be ended or killed.
USER = """
import json, sys
from pathlib import Path
import psutil, torch
from sam3cache.features import open_store
from sam3cache.loading import CachedSamples

path, folder, dies_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def report(num_done, num_total):
    if num_done == dies_at:
        psutil.Process().kill()

store = open_store(path)
samples = CachedSamples(
    store, [s.row for s in store.samples], ("fpn_72", "image_1008"),
    residency="ram", target_size_px=18, share_in=folder, report=report,
)
total = 0
for batch in samples.iterate(4):
    tensors = [*batch.levels.values(), batch.target_BKTT]
    total += sum(int(t.view(torch.uint8).long().sum()) for t in tensors)
print(json.dumps([samples.placement, samples.loaded_bytes, samples.resident_bytes, total]))
sys.stdout.flush()
sys.stdin.readline()
"""


class User:
    """A process that holds a store's samples."""

    def __init__(self, store: Path, folder: Path, *, dies_at: int = -1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(store), str(folder), str(dies_at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        names = ("placement", "loaded_bytes", "resident_bytes", "sum")
        return dict(zip(names, json.loads(self.process.stdout.readline()), strict=True))

    def end(self) -> None:
        self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stores of the same shape with other values."""
    root = tmp_path_factory.mktemp("stores")
    return [
        build_store(root / f"{seed}.zarr", num_samples=NUM_SAMPLES, level_shapes=SHAPES, seed=seed)
        for seed in (0, 1)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def hold(store: Path, folder: Path | None, **options: Any) -> CachedSamples:
    opened = open_store(store)
    options = {"residency": "ram", "target_size_px": 18} | options
    rows = [sample.row for sample in opened.samples]
    return CachedSamples(opened, rows, tuple(SHAPES), share_in=folder, **options)


def files(folder: Path, suffix: str = "data") -> list[str]:
    return sorted(path.name for path in folder.glob(f"*.{suffix}"))


def test_processes_share_one_copy_that_outlives_kills_and_goes_with_the_last(
    stores: list[Path], folder: Path
) -> None:
    at_once = [User(stores[0], folder) for _ in range(2)]
    first, second = (user.result() for user in at_once)
    # Whoever comes first to a level loads it; nobody does so again.
    assert first["loaded_bytes"] + second["loaded_bytes"] == NUM_BYTES
    assert first["resident_bytes"] == second["resident_bytes"] == NUM_BYTES
    assert first["sum"] == second["sum"]
    assert all(r["placement"].startswith("ram, shared with other") for r in (first, second))
    segments = files(folder)
    assert len(segments) == 3
    assert sum((folder / name).stat().st_size for name in segments) == NUM_BYTES

    at_once[0].kill()
    late = hold(stores[0], folder)
    assert late.loaded_bytes == 0
    assert "shared with other processes, which had loaded it; " in late.placement
    assert files(folder) == segments
    del late
    gc.collect()
    assert files(folder) == segments
    at_once[1].end()
    assert [path.name for path in folder.iterdir()] == ["door"]

    # Nobody is there to free what the last user leaves when it is killed, but the next to come.
    alone = User(stores[0], folder)
    assert alone.result()["loaded_bytes"] == NUM_BYTES
    alone.kill()
    assert files(folder) == segments
    other = hold(stores[1], folder)
    assert other.loaded_bytes == NUM_BYTES
    assert set(files(folder)).isdisjoint(segments)


def test_who_waits_for_a_loader_that_is_killed_loads_itself(
    stores: list[Path], folder: Path
) -> None:
    dying = User(stores[0], folder, dies_at=9)
    dying.process.communicate(timeout=60)
    assert dying.process.returncode != 0
    assert files(folder, "partial")
    assert files(folder) == []
    samples = hold(stores[0], folder)
    assert samples.loaded_bytes == NUM_BYTES
    assert files(folder, "partial") == []
    private = hold(stores[0], None, residency="stream")
    for ours, theirs in zip(samples.iterate(4), private.iterate(4), strict=True):
        assert all(torch.equal(ours.levels[level], theirs.levels[level]) for level in SHAPES)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_nobody_else_may_read_what_is_shared(stores: list[Path], folder: Path) -> None:
    samples = hold(stores[0], folder)
    assert len(list(folder.iterdir())) == 1 + 3 * 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert len(samples)


def test_only_the_same_rows_levels_targets_and_seal_are_shared(
    stores: list[Path], folder: Path
) -> None:
    first = hold(stores[0], folder)
    held = {
        "all": hold(stores[0], folder),
        "no targets": hold(stores[0], folder, target_size_px=None),
        "other targets": hold(stores[0], folder, target_size_px=9),
        "other store": hold(stores[1], folder),
    }
    loaded = {name: samples.loaded_bytes for name, samples in held.items()}
    assert loaded == {
        "all": 0,
        "no targets": NUM_SAMPLES * (648 + 448),  # the last sample has no mask
        "other targets": (NUM_SAMPLES - 1) * 88,
        "other store": NUM_BYTES,
    }
    assert first.loaded_bytes == NUM_BYTES


def test_targets_that_an_older_rule_has_made_are_not_shared(
    stores: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "TARGET_RULE", records.TARGET_RULE - 1)
    older = hold(stores[0], folder)
    monkeypatch.undo()
    assert older.loaded_bytes == NUM_BYTES
    assert hold(stores[0], folder).loaded_bytes == (NUM_SAMPLES - 1) * 328, "the targets alone"


def test_who_comes_knows_what_others_hold_already(stores: list[Path], folder: Path) -> None:
    first = hold(stores[0], folder)
    for name in files(folder):
        size_bytes = (folder / name).stat().st_size
        assert SharedSegment(folder, name.partition(".")[0], size_bytes).is_expected
    assert not SharedSegment(folder, "0" * 32, 8).is_expected
    assert first.residency == "ram"


def test_an_unfinished_store_is_loaded_into_memory_of_ones_own(
    tmp_path: Path, folder: Path
) -> None:
    root = build_store(tmp_path / "x.zarr", level_shapes=SHAPES, seal=False)
    opened = open_store(root, allow_unsealed=True)
    samples = CachedSamples(opened, [0, 1], ("fpn_72",), share_in=folder)
    assert samples.placement.startswith("ram, private (the store is not sealed); ")
    assert torch.equal(
        samples.batch([1]).levels["fpn_72"][0], torch.tensor(opened.read("fpn_72", 1))
    )
    assert not folder.exists()


def spoil_as_file(folder: Path) -> None:
    folder.write_bytes(b"")


def spoil_by_permissions(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def spoil_as_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_as_file, "File exists"),
        (spoil_by_permissions, "is not this user's alone"),
        (spoil_as_link, "is not this user's alone"),
    ],
)
def test_where_sharing_cannot_be_memory_is_private(
    stores: list[Path], folder: Path, spoil: Any, reason: str
) -> None:
    spoil(folder)
    samples = hold(stores[0], folder)
    assert samples.placement.startswith("ram, private (")
    assert reason in samples.placement
    assert samples.loaded_bytes == NUM_BYTES
    assert len(list(samples.iterate(4))) == 5


@pytest.fixture(params=["8k", "20k"])
def small_memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that is too small for one level; or for all of them together."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(mount)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system here")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_too_little_shared_memory_makes_it_private(stores: list[Path], small_memory: Path) -> None:
    samples = hold(stores[0], small_memory / "shared")
    assert samples.placement.startswith("ram, private (")
    assert "B free" in samples.placement or "No space left" in samples.placement
    assert files(small_memory / "shared") == files(small_memory / "shared", "partial") == []
    assert [len(batch.rows) for batch in samples.iterate(4)] == [4, 4, 4, 4, 2]


def test_the_systems_own_folder_is_the_users(stores: list[Path]) -> None:
    samples = hold(stores[0], None)
    assert samples.placement.startswith("ram, shared")
    folder = shared_folder()
    assert folder.name.startswith("sam3cache-")
    if sys.platform == "linux" and Path("/dev/shm").is_dir():
        assert folder.parent == Path("/dev/shm")
    assert len(files(folder)) >= 3
