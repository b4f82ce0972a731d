import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import zarr
from store_builder import build_store

from sam3cache.errors import (
    CorruptStoreError,
    FingerprintError,
    MissingSampleError,
    NotAStoreError,
    NumericError,
    StoreBusyError,
    StoreError,
    UnsealedStoreError,
)
from sam3cache.features import (
    BlockClaims,
    Fingerprint,
    LabelRow,
    LevelSpec,
    open_store,
    store_lock,
    write_label_block,
    write_level_block,
)
from sam3cache.features.receipts import break_seal

SHAPES = {"fpn_72": (4, 12, 12), "image_1008": (1, 48, 48)}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("store") / "x.zarr", num_samples=20, level_shapes=SHAPES
    )


@pytest.fixture
def own_store_path(tmp_path):
    return build_store(tmp_path / "x.zarr", num_samples=20, level_shapes=SHAPES)


def test_samples_come_back_with_what_is_known_of_them(store_path):
    store = open_store(store_path)
    assert [sample.row for sample in store.samples] == list(range(20))
    sample = store.samples[1]
    assert (sample.id, sample.split, sample.group) == ("s1", "val", "g0")
    assert sample.primary_angle_deg == -43.0
    assert sample.extra == {"vessel": "LAD"}
    assert np.isnan(store.samples[19].primary_angle_deg)


def test_every_level_reads_equal_through_zarr_itself(store_path):
    store = open_store(store_path)
    group = zarr.open_group(store_path, mode="r")
    for level in SHAPES:
        for row in (0, 7, 16, 19):
            assert np.array_equal(store.read(level, row), group[f"levels/{level}"][row])
    mask = store.read_mask(3)
    assert np.array_equal(mask, group["labels/mask/masks"][3])
    assert mask.any()


def test_a_sample_without_a_mask_is_not_one_with_an_empty_mask(store_path):
    store = open_store(store_path)
    assert store.read_mask(19) is None
    assert not store.has_mask(19)
    assert store.has_mask(18)


def test_masks_larger_than_a_tile_come_back_whole(tmp_path):
    path = build_store(
        tmp_path / "x.zarr",
        num_samples=3,
        level_shapes={"fpn_72": (2, 12, 12)},
        height_px=1300,
        width_px=2100,
        mask_height_px=1300,
        mask_width_px=2100,
    )
    store = open_store(path)
    whole = zarr.open_group(path, mode="r")["labels/mask/masks"]
    for row in range(3):
        mask = store.read_mask(row)
        assert mask.shape == (1, 1300, 2100)
        assert mask.sum() == 433 * 700
        assert np.array_equal(mask, whole[row])


def test_a_row_or_level_that_is_not_there_raises(store_path):
    store = open_store(store_path)
    with pytest.raises(MissingSampleError, match="row 25"):
        store.read("fpn_72", 25)
    with pytest.raises(MissingSampleError, match="no level fpn_288; it has fpn_72, image_1008"):
        store.read("fpn_288", 0)
    with pytest.raises(MissingSampleError, match="no label set other"):
        store.read_mask(0, "other")


def test_what_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(NotAStoreError, match="does not exist"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(NotAStoreError, match=r"no zarr\.json"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "plain.zarr")
    with pytest.raises(NotAStoreError, match="does not describe one"):
        open_store(tmp_path / "plain.zarr")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(NotAStoreError):
        open_store(tmp_path / "file")


def test_a_newer_format_is_refused(own_store_path):
    path = own_store_path / "zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["sam3cache"]["format_version"] = 3
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StoreError, match="format version 3"):
        open_store(own_store_path)


def test_an_unsealed_store_is_refused_unless_asked_for(tmp_path):
    path = build_store(tmp_path / "x.zarr", level_shapes=SHAPES, seal=False)
    with pytest.raises(UnsealedStoreError, match="not sealed"):
        open_store(path)
    store = open_store(path, allow_unsealed=True)
    assert len(store.samples) == 6
    assert store.read_mask(0).any()


def test_a_broken_seal_keeps_every_receipt(own_store_path):
    before = open_store(own_store_path).receipts
    break_seal(own_store_path)
    with pytest.raises(UnsealedStoreError):
        open_store(own_store_path)
    assert open_store(own_store_path, allow_unsealed=True).receipts == before


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "samples.parquet",
        "annotations.parquet",
        "complete.json",
        "levels/fpn_72/zarr.json",
        "levels/zarr.json",
        "labels/zarr.json",
        "labels/mask/zarr.json",
        "labels/mask/masks/zarr.json",
        "labels/mask/rows.parquet",
    ],
)
def test_no_flipped_byte_of_the_metadata_goes_unnoticed(own_store_path, name):
    path = own_store_path / name
    data = path.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(data), 25):
        damaged = bytearray(data)
        damaged[offset] ^= 4
        path.write_bytes(damaged)
        with pytest.raises((CorruptStoreError, NotAStoreError, StoreError)):
            open_store(own_store_path)
    path.unlink()
    with pytest.raises((CorruptStoreError, NotAStoreError, UnsealedStoreError)):
        open_store(own_store_path)


def test_a_lost_shard_raises_instead_of_reading_as_nothing(own_store_path):
    (own_store_path / "levels/fpn_72/c/1/0/0/0").unlink()
    store = open_store(own_store_path)
    store.read("fpn_72", 15)
    with pytest.raises(CorruptStoreError, match="missing"):
        store.read("fpn_72", 16)


def test_labels_written_anew_under_an_open_store_are_not_called_damage(own_store_path):
    store = open_store(own_store_path)
    store.read_mask(0)
    spec = store.label_sets["mask"]
    rng = np.random.default_rng(0)
    masks = {row: rng.integers(0, 2, (1, 48, 48), np.uint8) for row in range(16)}
    sources = {row: LabelRow(row) for row in range(16)}
    write_label_block(own_store_path, spec, 0, masks, sources)
    with pytest.raises(StoreError, match="written anew while the store was open"):
        store.read_mask(1)


def test_threads_read_one_store_at_once(store_path):
    store = open_store(store_path)
    expected = {row: store.read("fpn_72", row) for row in range(20)}
    fresh = open_store(store_path)
    wrong = []

    def check():
        for row in range(20):
            if not np.array_equal(fresh.read("fpn_72", row), expected[row]):
                wrong.append(row)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_never_written(tmp_path, value):
    spec = LevelSpec("fpn_72", (2, 4, 4))
    features = np.zeros(spec.shape, np.float16)
    features[1, 2, 3] = value
    with pytest.raises(NumericError, match="fpn_72 of row 3"):
        write_level_block(tmp_path, spec, "digest", 0, {3: features})
    assert list(tmp_path.rglob("*")) == []


def test_fingerprints_differ_field_by_field():
    old = Fingerprint({"level": "fpn_72", "size_px": 1008, "numeric_path": "fp32"})
    new = Fingerprint({"size_px": 1008, "numeric_path": "bf16", "level": "fpn_72", "more": 1})
    assert old.differences(new) == ["more: (absent) → 1", "numeric_path: fp32 → bf16"]
    assert Fingerprint(dict(reversed(old.fields.items()))).digest == old.digest
    with pytest.raises(FingerprintError, match=r"numeric_path: fp32 → bf16.*Do this"):
        old.require(new, level="fpn_72", remedy="Do this.")


HOLD = """
import sys, time
from pathlib import Path
from sam3cache.features import BlockClaims, store_lock
root = Path(sys.argv[1])
with store_lock(root), BlockClaims(root).claim(7) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_locks_name_their_holder_and_die_with_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "True"
        with (
            pytest.raises(StoreBusyError, match=f"process {holder.pid} on "),
            store_lock(tmp_path, timeout_s=0.1),
        ):
            pass
        with BlockClaims(tmp_path).claim(7) as ours:
            assert not ours
        with BlockClaims(tmp_path).claim(8) as ours:
            assert ours
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with store_lock(tmp_path, timeout_s=5), BlockClaims(tmp_path).claim(7) as ours:
        assert ours
