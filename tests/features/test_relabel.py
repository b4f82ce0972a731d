"""Changing labels and annotations of a store: what a kill leaves, and what is never touched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from store_builder import build_store

from sam3cache.errors import (
    ConfigError,
    CorruptStoreError,
    MissingSampleError,
    StoreError,
    UnsealedStoreError,
)
from sam3cache.features import (
    LabelRow,
    LabelSetSpec,
    is_sealed,
    make_overlay,
    open_store,
    open_to_change,
    put_label_set,
    record_data,
    remove_label_set,
    replace_annotations,
    require_label_set_name,
    seal_store,
    staging_of,
    store_lock,
    summarise_label_sets,
    write_label_block,
)
from sam3cache.features import relabel as relabel_module
from sam3cache.features.receipts import CHANGE_FILE
from sam3cache.features.store import open_overlay

NUM_SAMPLES = 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relabel") / "x.zarr"
    return build_store(root, num_samples=NUM_SAMPLES, level_shapes={"fpn_72": (4, 9, 9)})


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "x.zarr"))


def levels_of(root: Path) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in (root / "levels").rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def mask_of(row: int, version: int) -> np.ndarray:
    return np.full((1, 8 + row, 12), (row + version) % 2, dtype=np.uint8)


def stage(root: Path, name: str, version: int, rows: range = range(NUM_SAMPLES)) -> None:
    spec = LabelSetSpec(name, ("vessel",), 1, 1)
    for block in range(2):
        members = [row for row in rows if row // 16 == block]
        masks = {row: mask_of(row, version) for row in members}
        sources = {row: LabelRow(row, source=f"{row}.png") for row in members}
        write_label_block(staging_of(root, name), spec, block, masks, sources)


def put(root: Path, name: str, version: int) -> None:
    stage(root, name, version)
    put_label_set(root, name, ("vessel",))


def version_of(root: Path, name: str) -> int | None:
    """Which version a sealed store holds of a set, all rows alike; None for none."""
    opened = open_store(root)
    if name not in opened.label_sets:
        return None
    found = {
        version
        for row in range(NUM_SAMPLES)
        for version in (0, 1)
        if np.array_equal(opened.read_mask(row, name), mask_of(row, version))
    }
    (version,) = found
    return version


def test_a_second_set_stands_beside_the_first_and_touches_no_feature(store: Path) -> None:
    levels, first = levels_of(store), [open_store(store).read_mask(row) for row in range(19)]
    put(store, "reader2", 0)
    opened = open_store(store)
    assert sorted(opened.label_sets) == ["mask", "reader2"]
    assert version_of(store, "reader2") == 0
    assert all(np.array_equal(opened.read_mask(row), first[row]) for row in range(19))
    assert levels_of(store) == levels
    assert not staging_of(store, "reader2").exists()
    array = zarr.open_group(store, mode="r")["labels/reader2/masks"]
    assert array.shape == (32, 1, 27, 12)
    assert np.array_equal(array[3, :, :11], mask_of(3, 0))


def test_a_set_is_replaced_as_a_whole(store: Path) -> None:
    put(store, "reader2", 0)
    stage(store, "reader2", 1, rows=range(10))
    put_label_set(store, "reader2", ("vessel",))
    opened = open_store(store)
    assert np.array_equal(opened.read_mask(9, "reader2"), mask_of(9, 1))
    assert opened.read_mask(18, "reader2") is None
    assert not (store / "labels/reader2/masks/c/1").exists()


def test_a_removed_set_is_gone_and_the_others_stay(store: Path) -> None:
    levels = levels_of(store)
    put(store, "reader2", 0)
    remove_label_set(store, "reader2")
    opened = open_store(store)
    assert list(opened.label_sets) == ["mask"]
    assert not (store / "labels/reader2").exists()
    assert {item for item, _ in opened.receipts} == {"samples", "levels.fpn_72", "labels.mask"}
    assert levels_of(store) == levels
    with pytest.raises(MissingSampleError, match="no label set reader2; it has mask"):
        remove_label_set(store, "reader2")


class Killed(BaseException):
    """Stands for a process that ends at once, wherever it is."""


WRITES = ("write_atomic", "fold_receipts", "break_seal", "seal_store")


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """End the change at its so-and-so-many-th write to the store, before that is done."""
    done: list[str] = []

    def killing(name: str):
        real = getattr(relabel_module, name)

        def call(*args, **kwargs):
            if len(done) == number:
                raise Killed
            done.append(name)
            return real(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(relabel_module, name, killing(name))
    return done


@pytest.mark.parametrize("number", range(10))
def test_a_change_killed_at_any_write_leaves_one_version_or_names_itself(
    store: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put(store, "reader2", 0)
    stage(store, "reader2", 1)
    with monkeypatch.context() as patch:
        done = kill_at(patch, number)
        try:
            put_label_set(store, "reader2", ("vessel",))
            finished = True
        except Killed:
            finished = False
    assert len(done) == min(number, 9), "a write more or less: give the test another range"
    if finished:
        assert version_of(store, "reader2") == 1
        return
    if is_sealed(store):
        assert version_of(store, "reader2") == 0
    else:
        with pytest.raises(UnsealedStoreError, match="reader2` was interrupted; run the same"):
            open_store(store)
        # What a reader of unsealed stores sees is of one version, too, or nothing.
        opened = open_store(store, allow_unsealed=True)
        if "reader2" in opened.label_sets:
            versions = {
                version
                for row in range(NUM_SAMPLES)
                for version in (0, 1)
                if np.array_equal(opened.read_mask(row, "reader2"), mask_of(row, version))
            }
            assert len(versions) == 1
    # Whoever seals the store in between seals no mixture.
    sealed = Path(shutil.copytree(store, store.with_name("sealed.zarr")))
    with store_lock(sealed):
        seal_store(sealed)
    assert version_of(sealed, "reader2") in (None, 0, 1)
    # And the same change again completes it, with what had to be decoded again.
    stage(store, "reader2", 1)
    put_label_set(store, "reader2", ("vessel",))
    assert version_of(store, "reader2") == 1
    assert not (store / CHANGE_FILE).exists()


def test_a_row_that_came_after_a_set_has_no_mask_in_it(store: Path) -> None:
    stage(store, "reader2", 0, rows=range(16))
    put_label_set(store, "reader2", ("vessel",))
    opened = open_store(store)
    assert opened.read_mask(17, "reader2") is None
    assert not opened.has_mask(17, "reader2")
    with pytest.raises(MissingSampleError, match="no sample in row 20"):
        opened.read_mask(20, "reader2")
    summaries = {summary.name: summary for summary in summarise_label_sets(opened)}
    assert summaries["reader2"].num_with_mask == 16
    assert summaries["reader2"].num_without_mask == 4
    assert summaries["mask"].num_without_mask == 1


def test_annotations_are_replaced_without_touching_anything_else(store: Path) -> None:
    levels, before = levels_of(store), open_store(store)
    notes = [replace(note, split="test") for note in before.annotations.values()]
    replace_annotations(store, notes)
    after = open_store(store)
    assert {sample.split for sample in after.samples} == {"test"}
    assert levels_of(store) == levels
    assert after.sample_rows == before.sample_rows


def test_annotations_killed_before_the_seal_are_completed_by_the_same_change(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = [replace(n, split="val") for n in open_store(store).annotations.values()]
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            replace_annotations(store, notes)
    with pytest.raises(UnsealedStoreError, match="a change of its annotations was interrupted"):
        open_store(store)
    replace_annotations(store, notes)
    assert {sample.split for sample in open_store(store).samples} == {"val"}


def test_a_store_whose_extraction_has_not_finished_is_not_changed(tmp_path: Path) -> None:
    root = build_store(
        tmp_path / "x.zarr", num_samples=4, level_shapes={"fpn_72": (4, 9, 9)}, seal=False
    )
    with pytest.raises(UnsealedStoreError, match="run the same `sam3cache extract` again first"):
        open_to_change(root)
    (root / CHANGE_FILE).write_text('{"change": "an earlier one"}', encoding="utf-8")
    shutil.rmtree(root / "receipts/levels.fpn_72")
    with pytest.raises(UnsealedStoreError, match="run the same `sam3cache extract` again first"):
        open_to_change(root)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        require_label_set_name(name)


def test_an_overlay_goes_before_the_store_and_leaves_it_alone(store: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    overlay = tmp_path / "mine"
    make_overlay(overlay, open_store(store))
    bare = open_store(store, overlay=overlay)
    # As text, in which a NaN equals another.
    assert str(bare.samples) == str(open_store(store).samples)
    assert list(bare.label_sets) == ["mask"]
    put(overlay, "mask", 1)
    put(overlay, "reader2", 0)
    replace_annotations(overlay, [replace(note, group="one") for note in bare.annotations.values()])
    opened = open_store(store, overlay=overlay)
    assert sorted(opened.label_sets) == ["mask", "reader2"]
    assert np.array_equal(opened.read_mask(3), mask_of(3, 1))
    assert np.array_equal(opened.read_mask(3, "reader2"), mask_of(3, 0))
    assert {sample.group for sample in opened.samples} == {"one"}
    assert np.array_equal(opened.read("fpn_72", 3), open_store(store).read("fpn_72", 3))
    with pytest.raises(MissingSampleError, match="no sample in row 20"):
        opened.read_mask(20)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_an_overlay_is_refused_for_other_pictures(store: Path, tmp_path: Path) -> None:
    make_overlay(tmp_path / "mine", open_store(store))
    other = build_store(
        tmp_path / "other.zarr", num_samples=20, level_shapes={"fpn_72": (4, 9, 9)}, seed=1
    )
    with pytest.raises(StoreError, match=r"mine is not of .*other.zarr: row 0 was s0"):
        open_store(other, overlay=tmp_path / "mine")
    # A store that has only been corrected since is still the one.
    put(store, "reader2", 0)
    assert "reader2" in open_store(store, overlay=tmp_path / "mine").label_sets


def test_an_overlay_is_no_store_and_a_store_no_overlay(store: Path, tmp_path: Path) -> None:
    make_overlay(tmp_path / "mine", open_store(store))
    with pytest.raises(StoreError, match="is an overlay, labels and annotations without features"):
        open_store(tmp_path / "mine")
    with pytest.raises(StoreError, match="a feature store of its own, not an overlay"):
        open_store(store, overlay=store)
    with pytest.raises(StoreError, match="a feature store of its own, not an overlay"):
        make_overlay(store, open_store(store))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match="is there and no overlay"):
        make_overlay(tmp_path / "full", open_store(store))


def test_a_damaged_overlay_is_refused(store: Path, tmp_path: Path) -> None:
    make_overlay(tmp_path / "mine", open_store(store))
    put(tmp_path / "mine", "reader2", 0)
    table = tmp_path / "mine/labels/reader2/rows.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(CorruptStoreError, match=r"rows\.parquet is not what the store was sealed"):
        open_store(store, overlay=tmp_path / "mine")


def test_what_was_used_is_told_apart_by_its_content_alone(store: Path, tmp_path: Path) -> None:
    put(store, "a", 0)
    first = record_data(open_store(store), "a")
    put(store, "a", 0)
    again = record_data(open_store(store), "a")
    assert replace(again, seal=first.seal) == first
    put(store, "a", 1)
    changed = record_data(open_store(store), "a")
    assert changed.labels_sha256 != first.labels_sha256
    assert changed.annotations_sha256 == first.annotations_sha256
    notes = list(open_store(store).annotations.values())
    replace_annotations(store, [replace(notes[0], primary_angle_deg=1.0), *notes[1:]])
    angles = record_data(open_store(store), "a")
    different = {
        name
        for name, digest in angles.annotations_sha256.items()
        if digest != changed.annotations_sha256[name]
    }
    assert different == {"angles"}
    # The same masks in an overlay are the same labels.
    make_overlay(tmp_path / "mine", open_store(store))
    put(tmp_path / "mine", "a", 1)
    beside = record_data(open_store(store, overlay=tmp_path / "mine"), "a")
    assert beside.labels_sha256 == angles.labels_sha256
    assert beside.overlay_seal == open_overlay(tmp_path / "mine").seal != ""


def test_an_old_seal_is_broken_by_name(store: Path) -> None:
    """The file that names an interrupted change is of no weight on a sealed store."""
    (store / "receipts").mkdir(exist_ok=True)
    (store / CHANGE_FILE).write_text(json.dumps({"change": "x"}), encoding="utf-8")
    put(store, "reader2", 1)
    assert version_of(store, "reader2") == 1
    assert not (store / CHANGE_FILE).exists()
