"""Label sets of class numbers: their task goes wherever their masks go."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from store_builder import build_store

from sam3cache.errors import CorruptStoreError, StoreError
from sam3cache.features import (
    FeatureStore,
    LabelRow,
    LabelSetSpec,
    count_classes,
    describe_store,
    make_overlay,
    open_store,
    put_label_set,
    record_data,
    repair_store,
    seal_store,
    staging_of,
    store_lock,
    summarise_label_sets,
    verify_store,
    write_label_block,
)
from sam3cache.features.copying import merge, subset
from sam3cache.features.files import sha256_of_json
from sam3cache.features.hdf5 import export_hdf5, import_hdf5
from sam3cache.features.repacking import repack
from sam3cache.features.summary import summarise
from sam3cache.tasks import Task

NUM_SAMPLES = 20
CLASSES = ("lad", "lcx", "rca")
SHAPES = {"fpn_72": (2, 3, 3)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks") / "x.zarr"
    build_store(root, num_samples=NUM_SAMPLES, level_shapes=SHAPES)
    put_branches(root)
    return root


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "x.zarr"))


def mask_of(row: int) -> np.ndarray:
    """A row of pixels for a class that depends on the sample, and one that does not count."""
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, 0] = 1 + row % 2
    mask[0, 1, : row % 4] = 3
    mask[0, 7] = 255
    return mask


def put_branches(root: Path, task: Task = "multiclass", highest: int | None = None) -> None:
    """Set masks of class numbers; or others, to see what is made of them."""
    classes = CLASSES if task == "multiclass" else CLASSES[:1]
    spec = LabelSetSpec("branches", classes, 8, 8, task)
    for block in range(2):
        rows = range(block * 16, min(block * 16 + 16, NUM_SAMPLES))
        masks = {row: mask_of(row) for row in rows}
        if highest is not None:
            masks[rows[0]][0, 3, 3] = highest
        sources = {row: LabelRow(row) for row in rows}
        write_label_block(staging_of(root, "branches"), spec, block, masks, sources)
    put_label_set(root, "branches", classes, task=task)


def held(opened: FeatureStore) -> dict[str, np.ndarray | None]:
    return {sample.id: opened.read_mask(sample.row, "branches") for sample in opened.samples}


def assert_holds_branches(root: Path, num_samples: int = NUM_SAMPLES) -> None:
    opened = open_store(root)
    spec = opened.label_sets["branches"]
    assert (spec.task, spec.classes, spec.num_planes) == ("multiclass", CLASSES, 1)
    masks = held(opened)
    assert len(masks) == num_samples
    for name, mask in masks.items():
        assert mask is not None
        assert np.array_equal(mask, mask_of(int(name.removeprefix("s"))))
    assert verify_store(root).findings == ()


def test_any_reader_of_zarr_sees_the_task(store: Path) -> None:
    assert_holds_branches(store)
    group = zarr.open_group(store, mode="r")["labels/branches"]
    assert group.attrs["sam3cache"] == {"classes": list(CLASSES), "task": "multiclass"}
    assert group["masks"].shape == (32, 1, 8, 8)
    other = zarr.open_group(store, mode="r")["labels/mask"]
    assert other.attrs["sam3cache"] == {"classes": ["vessel"]}


def test_copies_keep_the_task(store: Path, tmp_path: Path) -> None:
    subset(store, tmp_path / "part.zarr", splits=("train",))
    assert_holds_branches(tmp_path / "part.zarr", 7)
    export_hdf5(open_store(store), tmp_path / "x.h5")
    import_hdf5(tmp_path / "x.h5", tmp_path / "again.zarr")
    assert_holds_branches(tmp_path / "again.zarr")
    other = build_store(tmp_path / "other.zarr", level_shapes=SHAPES, seed=1, num_samples=20)
    put_branches(other)
    merge([store, other], tmp_path / "both.zarr", prefix=True)
    spec = open_store(tmp_path / "both.zarr").label_sets["branches"]
    assert (spec.task, spec.classes) == ("multiclass", CLASSES)
    assert verify_store(tmp_path / "both.zarr").findings == ()


def test_repacking_and_repair_keep_the_task(store: Path) -> None:
    opened = open_store(store)
    rows = [replace(r, status="removed") if r.row == 3 else r for r in opened.sample_rows]
    with store_lock(store):
        describe_store(
            store,
            settings=opened.settings,
            levels={name: (spec, opened.fingerprint(name)) for name, spec in opened.levels.items()},
            label_sets=opened.label_sets,
            samples=rows,
            annotations=[note for row, note in opened.annotations.items() if row != 3],
        )
        seal_store(store)
    assert repack(store).num_moved == 15
    assert_holds_branches(store, NUM_SAMPLES - 1)
    (store / "labels/branches/zarr.json").unlink()
    repair_store(store)
    assert_holds_branches(store, NUM_SAMPLES - 1)


def test_stores_of_different_tasks_are_not_merged(store: Path, tmp_path: Path) -> None:
    other = build_store(tmp_path / "other.zarr", level_shapes=SHAPES, seed=1, num_samples=20)
    put_branches(other, task="multilabel")
    with pytest.raises(StoreError, match=r"branches is multiclass in .*x.zarr and multilabel in"):
        merge([store, other], tmp_path / "both.zarr", prefix=True)


def test_an_overlay_may_hold_class_numbers(built: Path, tmp_path: Path) -> None:
    store = build_store(tmp_path / "a.zarr", num_samples=NUM_SAMPLES, level_shapes=SHAPES)
    make_overlay(tmp_path / "mine", open_store(store))
    put_branches(tmp_path / "mine")
    opened = open_store(store, overlay=tmp_path / "mine")
    assert opened.label_sets["branches"].task == "multiclass"
    assert held(opened).keys() == held(open_store(built)).keys()


@pytest.mark.parametrize(
    ("task", "highest", "problem"),
    [
        ("multiclass", 4, "row 0 has values other than 0 to 3 and 255"),
        ("multiclass", 3, None),
        # One plane of a store of before there were tasks.
        ("multilabel", 4, None),
    ],
)
def test_verify_finds_numbers_that_no_class_has(
    tmp_path: Path, task: Task, highest: int, problem: str | None
) -> None:
    root = build_store(tmp_path / "x.zarr", num_samples=NUM_SAMPLES, level_shapes=SHAPES)
    put_branches(root, task, highest)
    found = verify_store(root).findings
    assert [f.message for f in found if f.rows == (0,)] == ([problem] if problem else [])


def test_a_task_that_nobody_knows_is_no_label_set(store: Path) -> None:
    path = store / "labels/branches/zarr.json"
    path.write_text(path.read_text("utf-8").replace("multiclass", "panoptic"), encoding="utf-8")
    with pytest.raises(CorruptStoreError):
        open_store(store)
    assert any("labels/branches" in finding.path for finding in verify_store(store).damage)


def test_a_file_of_an_unknown_task_is_refused(store: Path, tmp_path: Path) -> None:
    export_hdf5(open_store(store), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file["labels/branches"].attrs["task"] = np.bytes_("panoptic")
    with pytest.raises(StoreError, match="its task is 'panoptic', not multilabel or multiclass"):
        import_hdf5(tmp_path / "x.h5", tmp_path / "y.zarr")


def test_a_record_of_the_data_tells_tasks_apart_and_knows_older_ones(store: Path) -> None:
    opened = open_store(store)
    # As hashes were made before there were tasks.
    lines = [[r.row, r.height_px, r.width_px] for r in opened.label_rows("mask").values()][:-1]
    shards = sorted(
        [shard.key.removeprefix("labels/mask/masks"), shard.size_bytes, shard.crc32c]
        for (item, _), receipt in opened.receipts.items()
        if item == "labels.mask"
        for shard in receipt.shards
    )
    expected = sha256_of_json([["vessel"], lines, shards])
    assert record_data(opened, "mask").labels_sha256 == expected
    before = record_data(opened, "branches").labels_sha256
    spec = opened.label_sets["branches"]
    opened.label_sets["branches"] = replace(spec, task="multilabel")
    assert record_data(opened, "branches").labels_sha256 != before


def test_summaries_name_the_task(store: Path) -> None:
    assert summarise(store)["label_sets"]["branches"]["task"] == "multiclass"
    tasks = {s.name: s.task for s in summarise_label_sets(open_store(store))}
    assert tasks == {"branches": "multiclass", "mask": "multilabel"}
    assert json.loads((store / "complete.json").read_bytes())["format_version"] == 2


def test_samples_and_pixels_of_each_class_are_counted(store: Path) -> None:
    reports = []
    counts = count_classes(open_store(store), "branches", lambda *n: reports.append(n))
    assert reports[-1] == (NUM_SAMPLES, NUM_SAMPLES)
    opened = open_store(store)
    for number, count in enumerate(counts, 1):
        assert count.name == CLASSES[number - 1]
        for split in ("train", "val", "test"):
            masks = [mask_of(s.row) for s in opened.samples if s.split == split]
            assert count.num_pixels[split] == sum(int((m == number).sum()) for m in masks)
            assert count.num_samples[split] == sum(bool((m == number).any()) for m in masks)
            assert count.num_counted[split] == 56 * len(masks)
    (vessel,) = count_classes(opened, "mask")
    masks = [opened.read_mask(s.row) for s in opened.samples if s.split == "val"]
    assert vessel.num_pixels["val"] == sum(int(m.sum()) for m in masks if m is not None)
