"""Samples held in memory or streamed from disk come out the same, in the same order."""

import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from store_builder import build_store

from sam3cache.errors import ConfigError, CorruptStoreError, MissingSampleError
from sam3cache.features import FeatureStore, open_store
from sam3cache.loading import CachedSamples, Residency
from sam3cache.loading.cached import choose_residency
from sam3cache.records import Batch

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
    assert samples.resident_bytes == 18 * (2 * 4 * 9 * 9 + 21 * 21 + 18 * 18)
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
    assert choose_residency(wanted, 700, free_bytes) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("device", r"residency device: the samples take 0.7 GB, more than 70% of the 0.9 GB free"),
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


@pytest.mark.parametrize("residency", ["ram", "stream"])
def test_damaged_features_stop_loading(
    store: FeatureStore, tmp_path: Path, residency: Residency
) -> None:
    root = tmp_path / "damaged.zarr"
    shutil.copytree(store.path, root)
    shard = root / "levels" / "fpn_72" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    damaged = open_store(root)

    def go_through() -> None:
        list(CachedSamples(damaged, range(4), ["fpn_72"], residency=residency).iterate(2))

    with pytest.raises(CorruptStoreError, match="does not match its checksum"):
        go_through()


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


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches_from_everywhere(store: FeatureStore) -> None:
    reference = epoch_of(CachedSamples(store, all_rows(store), LEVELS, target_size_px=18), epoch=1)
    for residency in ("device", "ram", "stream"):
        samples = CachedSamples(
            store, all_rows(store), LEVELS, device="cuda", residency=residency, target_size_px=18
        )
        assert samples.residency == residency
        for expected, batch in zip(reference, epoch_of(samples, epoch=1), strict=True):
            assert batch.levels["fpn_72"].is_cuda
            assert torch.equal(batch.levels["fpn_72"].cpu(), expected.levels["fpn_72"])
            assert batch.rows == expected.rows
