"""Samples held in memory or streamed from disk come out the same, in the same order."""

import gc
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from store_builder import build_store

from sam3cache.errors import ConfigError, CorruptStoreError, MissingSampleError
from sam3cache.features import FeatureStore, open_store
from sam3cache.loading import CachedSamples, Residency, choose_residency
from sam3cache.loading.cached import MAX_READ_AHEAD
from sam3cache.loading.residency import room_on_gpu
from sam3cache.records import Batch
from sam3cache.runtime import DeviceMemory

LEVELS = ("fpn_72", "image_1008")
NUM_SAMPLES = 19


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Nineteen samples of 96 × 64 pixels, the last without mask and angles."""
    root = build_store(
        tmp_path_factory.mktemp("loading") / "x.zarr",
        num_samples=NUM_SAMPLES,
        level_shapes={"fpn_72": (4, 9, 9), "image_1008": (1, 21, 21)},
        width_px=64,
        mask_width_px=32,
    )
    return open_store(root)


def all_rows(store: FeatureStore) -> list[int]:
    return [sample.row for sample in store.samples]


def epoch_of(samples: CachedSamples, *, epoch: int, seed: int = 3) -> list[Batch]:
    return list(samples.iterate(4, seed=seed, epoch=epoch, shuffle=True))


def same(one: Batch, other: Batch) -> bool:
    assert one.target_BKTT is not None
    assert other.target_BKTT is not None
    return (
        one.rows == other.rows
        and all(torch.equal(one.levels[level], other.levels[level]) for level in LEVELS)
        and torch.equal(one.angles_B2.nan_to_num(-1e9), other.angles_B2.nan_to_num(-1e9))
        and torch.equal(one.content_B2, other.content_B2)
        and torch.equal(one.target_BKTT, other.target_BKTT)
    )


def test_every_residency_gives_the_same_batches_in_the_same_order(store: FeatureStore) -> None:
    held = {
        residency: CachedSamples(
            store, all_rows(store), LEVELS, residency=residency, target_size_px=18
        )
        for residency in ("auto", "device", "ram", "stream")
    }
    assert [samples.residency for samples in held.values()] == ["ram", "ram", "ram", "stream"]
    for epoch in range(2):
        reference = epoch_of(held["ram"], epoch=epoch)
        assert [len(batch.rows) for batch in reference] == [4, 4, 4, 4, 2]
        for samples in held.values():
            batches = epoch_of(samples, epoch=epoch)
            assert all(same(*pair) for pair in zip(reference, batches, strict=True))


def test_the_order_depends_on_seed_and_epoch_and_visits_every_sample(store: FeatureStore) -> None:
    samples = CachedSamples(store, all_rows(store), LEVELS)
    orders = {
        (seed, epoch): tuple(
            row for b in epoch_of(samples, seed=seed, epoch=epoch) for row in b.rows
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(NUM_SAMPLES)) for order in orders.values())
    unshuffled = [row for batch in samples.iterate(5) for row in batch.rows]
    assert unshuffled == list(range(NUM_SAMPLES))


def test_a_batch_holds_what_the_store_holds(store: FeatureStore) -> None:
    samples = CachedSamples(store, [5, 2], LEVELS, target_size_px=18)
    batch = samples.batch([1, 0])
    assert batch.rows == (2, 5)
    for position, row in enumerate(batch.rows):
        for level in LEVELS:
            expected = torch.from_numpy(store.read(level, row))
            assert torch.equal(batch.levels[level][position], expected)
        box = samples.letterbox(1 - position)
        mask_KHW = samples.mask(1 - position)
        assert mask_KHW is not None
        assert batch.target_BKTT is not None
        assert torch.equal(batch.target_BKTT[position], box.mask_to_target(mask_KHW, 18))
        assert (batch.target_BKTT[position, :, :, 12:] == 255).all()
        assert batch.content_B2[position].tolist() == [1008, 672]
        stored = store.samples[row]
        angles = [stored.primary_angle_deg, stored.secondary_angle_deg]
        assert batch.angles_B2[position].tolist() == pytest.approx(angles)


def test_a_sample_without_a_mask_is_left_out_of_training_and_counted(store: FeatureStore) -> None:
    training = CachedSamples(store, all_rows(store), LEVELS, target_size_px=18)
    assert training.num_without_mask == 1
    assert NUM_SAMPLES - 1 not in training.rows
    everything = CachedSamples(store, all_rows(store), LEVELS)
    assert everything.num_without_mask == 0
    last = everything.batch([NUM_SAMPLES - 1])
    assert last.target_BKTT is None
    assert all(math.isnan(angle) for angle in last.angles_B2[0].tolist())


def test_loading_reports_its_progress_its_size_and_its_time(store: FeatureStore) -> None:
    seen: list[tuple[int, int]] = []
    samples = CachedSamples(
        store, all_rows(store), LEVELS, target_size_px=18, report=lambda *n: seen.append(n)
    )
    assert seen == [(n, 18) for n in range(1, 19)]
    # Each in whole words of 8 bytes: 2 · 4 · 9 · 9, 21 · 21 + 7 and 18 · 18 + 4.
    assert samples.resident_bytes == samples.loaded_bytes == 18 * (648 + 448 + 328)
    assert samples.load_s > 0


@pytest.mark.parametrize(
    ("wanted", "free_bytes", "expected"),
    [
        ("auto", {"device": 1000, "ram": 1000}, "device"),
        ("auto", {"device": 999, "ram": 1000}, "ram"),
        ("auto", {"device": 999, "ram": 999}, "stream"),
        ("auto", {"ram": 1000}, "ram"),
        ("auto", {"ram": 0}, "stream"),
        ("ram", {"device": 1000, "ram": 1000}, "ram"),
        ("device", {"device": 1000, "ram": 0}, "device"),
        ("device", {"ram": 1000}, "ram"),
        ("stream", {"device": 1000, "ram": 1000}, "stream"),
    ],
)
def test_samples_lie_as_near_as_they_fit_with_a_margin(
    wanted: Residency, free_bytes: dict[Residency, int], expected: Residency
) -> None:
    assert choose_residency(wanted, 700, free_bytes).residency == expected


def test_what_other_processes_hold_in_ram_needs_no_room() -> None:
    free_bytes: dict[Residency, int] = {"device": 100, "ram": 100}
    assert choose_residency("auto", 700, free_bytes, 700).residency == "ram"
    assert choose_residency("auto", 700, free_bytes, 629).residency == "stream"
    assert choose_residency("ram", 700, free_bytes, 630).residency == "ram"


@pytest.mark.parametrize(
    ("wanted", "free_gb", "expected"),
    [
        ("auto", 20, "ram, 12.3 GB fit in 70% of the 20.0 GB free"),
        ("auto", 10, "stream, as 12.3 GB do not fit in 70% of the 10.0 GB free"),
        ("ram", 20, "ram, as asked"),
        ("stream", 20, "stream, as asked"),
    ],
)
def test_a_choice_says_why(wanted: Residency, free_gb: int, expected: str) -> None:
    assert str(choose_residency(wanted, 12_300_000_000, {"ram": free_gb * 10**9})) == expected


@pytest.mark.parametrize(("total_gb", "free_gb"), [(8, 7.5), (8, 5), (24, 23), (80, 79)])
def test_samples_leave_a_gpu_what_training_needs_there(total_gb: float, free_gb: float) -> None:
    free_bytes = left_bytes = int(free_gb * 1e9)
    for _ in ("train", "val"):  # as much of each as may lie there
        memory = DeviceMemory("a GPU", int(total_gb * 1e9), left_bytes)
        left_bytes -= int(0.7 * room_on_gpu(memory))
    micro_batch_bytes = 0.2 * total_gb * 1e9
    assert left_bytes >= 2 * micro_batch_bytes + 1e9
    assert left_bytes < free_bytes
    assert room_on_gpu(DeviceMemory("a full GPU", 8 * 10**9, 10**9)) == 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (
            "device",
            r"residency device: the samples take 700 MB, more than 70% of the 900 MB free beside",
        ),
        ("ram", r"residency ram: the samples take .* take auto or stream"),
        ("disk", r"residency 'disk' is unknown; take one of auto, device, ram, stream"),
    ],
)
def test_a_residency_that_cannot_be_is_refused(wanted: Residency, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        choose_residency(wanted, 700_000_000, {"device": 900_000_000, "ram": 900_000_000})


@pytest.mark.parametrize(
    ("rows", "levels", "expected"),
    [
        pytest.param([0, 99], ["fpn_72"], r"no usable sample in row 99", id="row"),
        pytest.param([0], ["fpn_288"], r"has no level fpn_288", id="level"),
    ],
)
def test_what_the_store_lacks_is_refused(
    store: FeatureStore, rows: list[int], levels: list[str], expected: str
) -> None:
    with pytest.raises(MissingSampleError, match=expected):
        CachedSamples(store, rows, levels)


def damaged(store: FeatureStore, root: Path, spoil: Callable[[Path], None]) -> FeatureStore:
    """A copy of the store whose second shard of fpn_72 is spoilt."""
    shutil.copytree(store.path, root)
    spoil(root / "levels" / "fpn_72" / "c" / "1" / "0" / "0" / "0")
    return open_store(root)


def flip_a_byte(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("residency", ["ram", "stream"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (flip_a_byte, r"fpn_72.c.1.0.0.0 is damaged .* does not match its checksum"),
        (Path.unlink, r"fpn_72.c.1.0.0.0 is missing"),
    ],
)
def test_damaged_features_stop_loading_and_are_named(
    store: FeatureStore,
    tmp_path: Path,
    residency: Residency,
    spoil: Callable[[Path], None],
    expected: str,
) -> None:
    opened = damaged(store, tmp_path / "damaged.zarr", spoil)
    seen = []

    def go_through() -> None:
        samples = CachedSamples(
            opened, all_rows(opened), ["fpn_72"], residency=residency, share_in=tmp_path / "shared"
        )
        seen.extend(batch.rows[0] for batch in samples.iterate(1))

    with pytest.raises(CorruptStoreError, match=expected):
        go_through()
    # Batches before the damage come, none after it; and nothing stays behind.
    assert seen == ([] if residency == "ram" else list(range(16)))
    assert not [t for t in threading.enumerate() if t.name.startswith("sam3cache-loading")]
    gc.collect()
    assert not list((tmp_path / "shared").glob("*.*"))


def test_a_stream_reads_only_so_far_ahead(store: FeatureStore, tmp_path: Path) -> None:
    opened = damaged(store, tmp_path / "x.zarr", lambda shard: None)
    samples = CachedSamples(opened, all_rows(opened), ["fpn_72"], residency="stream")
    batches = samples.iterate(1)
    next(batches)
    time.sleep(0.2)
    # Had a reader been there already, it would know this shard's index.
    (opened.path / "levels" / "fpn_72" / "c" / "1" / "0" / "0" / "0").unlink()
    assert [next(batches).rows for _ in range(7)] == [(row,) for row in range(1, 8)]
    with pytest.raises(CorruptStoreError, match="is missing"):
        list(batches)


def test_no_samples_give_no_batches(store: FeatureStore) -> None:
    for residency in ("ram", "stream"):
        samples = CachedSamples(store, [], LEVELS, residency=residency, target_size_px=18)
        assert list(samples.iterate(4, shuffle=True)) == []


def test_a_stream_that_is_left_early_ends_its_threads(store: FeatureStore) -> None:
    samples = CachedSamples(store, all_rows(store), LEVELS, residency="stream")
    for _ in samples.iterate(1):
        break
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sam3cache-loading") for name in names)


def test_memory_of_a_batch_is_used_again_only_once_nobody_sees_it(store: FeatureStore) -> None:
    samples = CachedSamples(store, all_rows(store), ["fpn_72"], residency="stream")
    expected = [torch.from_numpy(store.read("fpn_72", row)) for row in samples.rows]

    # Of each batch only a part of a tensor is kept, on which the memory hangs nevertheless.
    kept = [batch.levels["fpn_72"][0, 1:3] for _ in range(3) for batch in samples.iterate(1)]
    assert all(torch.equal(part, expected[i % NUM_SAMPLES][1:3]) for i, part in enumerate(kept))
    assert len({part.data_ptr() for part in kept}) == len(kept)

    places = [batch.levels["fpn_72"].data_ptr() for _ in range(3) for batch in samples.iterate(1)]
    assert len(set(places)) <= MAX_READ_AHEAD + 2


PRECISIONS = ("fpn_72", "fpn_72.int8", "fpn_72.bf16", "fpn_72.r7")


@pytest.fixture(scope="module")
def precise_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Levels of every kind; 63 values a channel, so that records need padding."""
    return build_store(
        tmp_path_factory.mktemp("precise") / "x.zarr",
        level_shapes=dict.fromkeys(PRECISIONS, (3, 9, 7)),
    )


@pytest.mark.parametrize("residency", ["ram", "stream"])
def test_a_level_of_fewer_bits_lies_as_it_is_stored_and_is_handed_out_as_it_reads(
    precise_store: Path, residency: Residency
) -> None:
    opened = open_store(precise_store)
    samples = CachedSamples(opened, [4, 1, 3], PRECISIONS, residency=residency)
    (batch,) = samples.iterate(3)
    for level in PRECISIONS:
        expected = np.stack([opened.read(level, row) for row in batch.rows])
        assert torch.equal(batch.levels[level].float(), torch.from_numpy(expected).float())
    dtypes = [batch.levels[level].dtype for level in PRECISIONS]
    assert dtypes == [torch.float16, torch.float16, torch.bfloat16, torch.float16]
    if residency == "ram":
        # float16 and its like 378 bytes, int8 189 and three scales of 4, in words of 8.
        assert samples.resident_bytes == 3 * (384 + 208 + 384 + 384)


def test_a_head_gets_its_level_in_the_precision_that_the_store_serves(precise_store: Path) -> None:
    opened = open_store(precise_store)
    opened.serve("int8")
    samples = CachedSamples(opened, [2], ["fpn_72"])
    assert torch.equal(
        samples.batch([0]).levels["fpn_72"][0], torch.from_numpy(opened.read("fpn_72.int8", 2))
    )
    assert samples.resident_bytes == 208


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches_from_everywhere(store: FeatureStore) -> None:
    reference = epoch_of(CachedSamples(store, all_rows(store), LEVELS, target_size_px=18), epoch=1)
    for residency in ("device", "ram", "stream"):
        samples = CachedSamples(
            store, all_rows(store), LEVELS, device="cuda", residency=residency, target_size_px=18
        )
        assert samples.residency == residency
        # Memory that the GPU fetches from by itself.
        assert ("pinned" in samples.placement) == (residency == "ram")
        for expected, batch in zip(reference, epoch_of(samples, epoch=1), strict=True):
            assert batch.levels["fpn_72"].is_cuda
            assert torch.equal(batch.levels["fpn_72"].cpu(), expected.levels["fpn_72"])
            assert batch.rows == expected.rows
