"""Labels and annotations set from manifests: matching, bad rows, kills, and extract afterwards."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image

from sam3cache.errors import ConfigError, ManifestError, StoreBusyError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.relabel import (
    AnnotationsConfig,
    LabelsConfig,
    remove_annotation,
    set_annotations,
    set_labels,
)
from sam3cache.features import open_store, staging_of, store_lock

NUM_IMAGES = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twenty pictures, and the store made from it."""
    folder = write_images(tmp_path_factory.mktemp("base") / "pictures", num_images=NUM_IMAGES)
    extract(config_of(folder))
    return folder.parent


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def config_of(folder: Path) -> ExtractConfig:
    return ExtractConfig(
        folder, folder.parent / "x.zarr", levels=("image_1008",), backbone="sam3-mini"
    )


def write_masks(place: Path, name: str = "reader2", level: int = 255) -> Path:
    """Write full masks of all pictures, and a CSV of ids and masks alone."""
    (place / name).mkdir()
    lines = ["id,mask"]
    for i in range(NUM_IMAGES):
        height_px, width_px = ((96, 128), (128, 96), (112, 112))[i % 3]
        mask = np.full((height_px, width_px), level, np.uint8)
        Image.fromarray(mask).save(place / name / f"{i:02}.png")
        lines.append(f"s{i:02},{name}/{i:02}.png")
    return write(place / f"{name}.csv", *lines)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def levels_of(store: Path) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in (store / "levels").rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_masks_are_set_by_id_and_no_feature_is_touched(place: Path) -> None:
    store = place / "x.zarr"
    levels, reports = levels_of(store), []
    result = set_labels(
        LabelsConfig(store, "reader2", write_masks(place)), lambda *counts: reports.append(counts)
    )
    assert (result.num_matched, result.num_with_mask, result.set_aside) == (20, 20, ())
    assert reports[0] == (0, 20)
    assert reports[-1] == (20, 20)
    opened = open_store(store)
    for sample in opened.samples:
        mask_1HW = opened.read_mask(sample.row, "reader2")
        assert mask_1HW is not None
        assert mask_1HW.shape == (1, sample.height_px, sample.width_px)
        assert mask_1HW.all()
    assert not opened.read_mask(0, "mask").all()
    assert levels_of(store) == levels


def test_masks_are_set_by_picture_where_ids_are_others(place: Path) -> None:
    (place / "masks2").mkdir()
    Image.fromarray(np.full((96, 128), 255, np.uint8)).save(place / "masks2/a.png")
    manifest = write(
        place / "pictures/other.csv",
        "id,image,mask",
        "mine,images/00.png,../masks2/a.png",
        "stranger,images/nowhere.png,../masks2/a.png",
    )
    result = set_labels(LabelsConfig(place / "x.zarr", "reader2", manifest))
    assert (result.num_matched, result.num_with_mask, result.num_unmatched_rows) == (1, 1, 1)
    opened = open_store(place / "x.zarr")
    assert opened.read_mask(0, "reader2").all()
    assert not any(opened.has_mask(row, "reader2") for row in range(1, NUM_IMAGES))


def test_two_samples_of_one_picture_are_told_apart_by_their_ids_alone(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", num_images=2)
    with (folder / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("again,images/00.png,masks/00.png,0,0,train,p0\n")
    extract(config_of(folder))
    rows = ["x,images/00.png,masks/00.png", "y,images/01.png,masks/01.png"]
    manifest = write(folder / "other.csv", "id,image,mask", *rows)
    result = set_labels(LabelsConfig(tmp_path / "x.zarr", "reader2", manifest))
    assert (result.num_matched, result.num_unmatched_rows) == (1, 1)
    assert open_store(tmp_path / "x.zarr").has_mask(1, "reader2")


def test_a_bad_mask_is_listed_and_its_sample_has_none(place: Path) -> None:
    manifest = write_masks(place)
    (place / "reader2/03.png").write_bytes(b"not a picture")
    (place / "reader2/17.png").unlink()
    Image.fromarray(np.zeros((10, 90), np.uint8)).save(place / "reader2/05.png")
    result = set_labels(LabelsConfig(place / "x.zarr", "reader2", manifest))
    assert [aside.id for aside in result.set_aside] == ["s03", "s05", "s17"]
    assert "expected the same aspect ratio" in result.set_aside[1].reason
    opened = open_store(place / "x.zarr")
    assert [r for r in range(20) if not opened.has_mask(r, "reader2")] == [3, 5, 17]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,mask", "a,reader2/00.png"], r"none of its 1 rows is of .*x\.zarr, neither by id \(a"),
        (["id,mask", "s00,", "s01,"], "none of the 2 rows that match a sample has a mask"),
        (["id,mask", "s00,nowhere.png"], "none of its masks can be used, the first because: now"),
        (["mask", "reader2/00.png"], "no column 'image' or 'id'; it has mask"),
        (["id,mask", ",reader2/00.png"], "no image and no id; fill the cell"),
        (["id,mask", "s00,a.png", "s00,b.png"], "both have the id 's00'"),
    ],
)
def test_a_manifest_without_a_use_changes_nothing(
    place: Path, lines: list[str], message: str
) -> None:
    manifest = write(place / "bad.csv", *lines)
    seal = (place / "x.zarr/complete.json").read_bytes()
    with pytest.raises(ManifestError, match=message):
        set_labels(LabelsConfig(place / "x.zarr", "reader2", manifest))
    assert (place / "x.zarr/complete.json").read_bytes() == seal


def test_several_classes_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="which is one class; set a label set a class instead"):
        LabelsConfig(Path("x"), "mask", Path("m.csv"), classes=("lad", "rca"))


COMMAND = (sys.executable, "-m", "sam3cache", "store", "labels", "set")


def test_killed_while_masks_are_read_the_old_ones_serve_and_the_same_command_goes_on(
    place: Path,
) -> None:
    store = place / "x.zarr"
    set_labels(LabelsConfig(store, "reader2", write_masks(place, "old", level=0)))
    manifest = write_masks(place)
    for i in range(16, NUM_IMAGES):
        # The second block is large and slow to decode, so that the kill comes in time.
        mask = place / f"reader2/{i:02}.png"
        with Image.open(mask) as small:
            small.resize((small.width * 40, small.height * 40)).save(mask)
    command = [*COMMAND, str(store), "reader2", "--from", str(manifest)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    receipt = staging_of(store, "reader2") / "receipts/labels.reader2/00000000.json"
    deadline = time.monotonic() + 60
    while not receipt.exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = receipt.stat().st_mtime_ns
    opened = open_store(store)  # Sealed, and with the masks of before.
    assert not any(opened.read_mask(row, "reader2").any() for row in range(NUM_IMAGES))
    shard = staging_of(store, "reader2") / "labels/reader2/masks/c/0/0/0/0"
    assert receipt.stat().st_mtime_ns == before
    staged = shard.stat().st_mtime_ns

    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    opened = open_store(store)
    assert all(opened.read_mask(row, "reader2").all() for row in range(NUM_IMAGES))
    assert (store / "labels/reader2/masks/c/0/0/0/0").stat().st_mtime_ns == staged


def test_what_was_staged_for_another_manifest_is_not_taken(place: Path) -> None:
    store, manifest = place / "x.zarr", write_masks(place)
    other = write_masks(place, "other", level=0)

    def stop(num_done: int, num_total: int) -> None:
        if num_done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        set_labels(LabelsConfig(store, "reader2", other), stop)
    assert staging_of(store, "reader2").exists()
    set_labels(LabelsConfig(store, "reader2", manifest))
    opened = open_store(store)
    assert all(opened.read_mask(row, "reader2").all() for row in range(NUM_IMAGES))


def test_two_at_once_are_not_let_in(place: Path) -> None:
    manifest = write_masks(place)
    with (
        store_lock(staging_of(place / "x.zarr", "reader2").parent),
        pytest.raises(StoreBusyError, match="is being changed by process"),
    ):
        set_labels(LabelsConfig(place / "x.zarr", "reader2", manifest))


def test_extract_keeps_other_label_sets_and_takes_back_its_own(place: Path) -> None:
    store, manifest = place / "x.zarr", write_masks(place)
    first = open_store(store).read_mask(0)
    set_labels(LabelsConfig(store, "reader2", manifest))
    set_labels(LabelsConfig(store, "mask", manifest))
    assert open_store(store).read_mask(0).all()
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(place / "pictures/images/new.png")
    with (place / "pictures/manifest.csv").open("a", encoding="utf-8") as file:
        file.write("new,images/new.png,,0,0,train,p9\n")
    result = extract(config_of(place / "pictures"))
    assert result.sealed
    assert result.num_relabelled == NUM_IMAGES
    opened = open_store(store)
    assert np.array_equal(opened.read_mask(0), first)
    assert opened.read_mask(0, "reader2").all()
    new = next(sample for sample in opened.samples if sample.id == "new")
    assert opened.read_mask(new.row, "reader2") is None


def test_only_given_columns_and_named_samples_are_corrected(place: Path) -> None:
    store = place / "x.zarr"
    levels, before = levels_of(store), open_store(store).samples
    table = write(
        place / "angio.csv",
        "id,split,primary_angle,phase",
        "s00,test,,diastole",
        "s01,training,12.5,systole",
        "stranger,val,3,systole",
    )
    result = set_annotations(AnnotationsConfig(store, table))
    assert (result.num_matched, result.num_moved, result.set_aside) == (2, 1, ())
    assert result.num_changed == {"split": 1, "primary_angle": 2, "phase": 2}
    assert result.leaks == ("p0",)
    after = open_store(store).samples
    assert (after[0].split, after[1].split) == ("test", "train")
    assert np.isnan(after[0].primary_angle_deg)
    assert after[1].primary_angle_deg == 12.5
    assert after[0].secondary_angle_deg == before[0].secondary_angle_deg
    assert after[0].group == before[0].group
    assert [s.extra.get("phase") for s in after[:3]] == ["diastole", "systole", None]
    assert after[2:] == before[2:]
    assert levels_of(store) == levels
    again = set_annotations(AnnotationsConfig(store, table))
    assert not any(again.num_changed.values())


def test_only_what_is_asked_for_is_set(place: Path) -> None:
    table = write(place / "a.csv", "id,split,group", "s00,test,p9")
    set_annotations(AnnotationsConfig(place / "x.zarr", table, only=("group",)))
    sample = open_store(place / "x.zarr").samples[0]
    assert (sample.split, sample.group) == ("train", "p9")


def test_a_row_with_an_impossible_angle_is_listed_and_its_sample_stays(place: Path) -> None:
    before = open_store(place / "x.zarr").samples
    table = write(place / "a.csv", "id,primary_angle", "s00,400", "s01,1")
    result = set_annotations(AnnotationsConfig(place / "x.zarr", table))
    assert [aside.id for aside in result.set_aside] == ["s00"]
    assert "outside [-180, 180]" in result.set_aside[0].reason
    after = open_store(place / "x.zarr").samples
    assert (after[0], after[1].primary_angle_deg) == (before[0], 1.0)


@pytest.mark.parametrize(
    ("lines", "only", "error", "message"),
    [
        (["id,split", "s00,trian"], (), ManifestError, "has the split 'trian'"),
        (["id,split", "s00,train", "s01,"], (), ManifestError, "expected train, val or test in"),
        (["id", "s00"], (), ManifestError, "has no annotations; expected a CSV with some of"),
        (["id,split", "s00,val"], ("group",), ConfigError, "has no 'group' to set; it has split"),
        (["id,split", "a,val"], (), ManifestError, "none of its 1 rows is of"),
    ],
)
def test_annotations_that_cannot_be_meant_change_nothing(
    place: Path, lines: list[str], only: tuple[str, ...], error: type[Exception], message: str
) -> None:
    table = write(place / "a.csv", *lines)
    seal = (place / "x.zarr/complete.json").read_bytes()
    with pytest.raises(error, match=message):
        set_annotations(AnnotationsConfig(place / "x.zarr", table, only=only))
    assert (place / "x.zarr/complete.json").read_bytes() == seal


def test_a_column_is_removed_and_those_of_every_store_are_not(place: Path) -> None:
    store = place / "x.zarr"
    set_annotations(AnnotationsConfig(store, write(place / "a.csv", "id,phase", "s00,systole")))
    assert remove_annotation(store, "phase") == 1
    assert not any(sample.extra for sample in open_store(store).samples)
    with pytest.raises(ConfigError, match="has no column 'phase'; it has none"):
        remove_annotation(store, "phase")
    with pytest.raises(ConfigError, match="split cannot be removed"):
        remove_annotation(store, "split")


def test_the_manifest_of_the_last_command_has_the_last_word(place: Path) -> None:
    store = place / "x.zarr"
    before = open_store(store).samples
    table = write(place / "a.csv", "id,split,phase", "s00,test,systole")
    set_annotations(AnnotationsConfig(store, table))
    result = extract(config_of(place / "pictures"))
    assert (result.num_reannotated, result.num_computed, result.sealed) == (1, 0, True)
    assert open_store(store).samples == before


def test_corrections_beside_a_store_outlive_extract(place: Path) -> None:
    store, overlay = place / "x.zarr", place / "mine"
    seal = (store / "complete.json").read_bytes()
    table = write(place / "a.csv", "id,split", "s00,test")
    set_annotations(AnnotationsConfig(store, table, overlay=overlay))
    set_labels(LabelsConfig(store, "mask", write_masks(place), overlay=overlay))
    assert open_store(store, overlay=overlay).samples[0].split == "test"
    assert (store / "complete.json").read_bytes() == seal
    extract(config_of(place / "pictures"))
    opened = open_store(store, overlay=overlay)
    assert opened.samples[0].split == "test"
    assert opened.read_mask(0).all()
