"""Labels and annotations set from manifests: matching, bad rows, kills, and extract afterwards."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import ConfigError, ManifestError, StoreBusyError, UnsealedStoreError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.relabel import (
    AnnotationsConfig,
    LabelsConfig,
    remove_annotation,
    remove_labels,
    set_annotations,
    set_labels,
)
from sam3cache.features import open_store, staging_of, store_lock, verify_store
from sam3cache.features import relabel as relabel_module
from sam3cache.features.repacking import repack
from sam3cache.images import parse_classes

NUM_IMAGES = 20


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads() -> Iterator[None]:
    with one_process():
        yield


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


def write_branches(place: Path, names: tuple[str, ...] = ("branches",)) -> Path:
    """Write masks of numbers 2 and 16 that differ by sample and column, and their CSV."""
    lines = [",".join(("id", "mask", *names))]
    for i in range(NUM_IMAGES):
        height_px, width_px = ((96, 128), (128, 96), (112, 112))[i % 3]
        files = []
        for k, name in enumerate(names):
            (place / name).mkdir(exist_ok=True)
            mask = np.zeros((height_px // 2, width_px // 2), np.uint8)
            mask[i + k], mask[-1] = (2, 16)[i % 2], 255
            Image.fromarray(mask).save(place / name / f"{i:02}.png")
            files.append(f"{name}/{i:02}.png")
        lines.append(",".join((f"s{i:02}", f"{names[0]}/{i:02}.png", *files)))
    return write(place / "branches.csv", *lines)


def test_class_numbers_of_a_column_become_1_to_c(place: Path) -> None:
    store, manifest = place / "x.zarr", write_branches(place)
    classes = parse_classes("rca=16,lad=2")
    config = LabelsConfig(store, "branches", manifest, classes=classes, mask_columns=("branches",))
    result = set_labels(config)
    assert (result.num_with_mask, result.set_aside) == (NUM_IMAGES, ())
    opened = open_store(store)
    spec = opened.label_sets["branches"]
    assert (spec.task, spec.classes, spec.num_planes) == ("multiclass", ("rca", "lad"), 1)
    for row in range(NUM_IMAGES):
        mask = opened.read_mask(row, "branches")
        assert mask is not None
        assert (mask[0, row] == (2, 1)[row % 2]).all()
        assert (mask[0, -1] == 255).all()
        assert not mask[0, row + 1 : -1].any()
    assert verify_store(store).findings == ()


def test_one_class_of_many_is_a_binary_mask(place: Path) -> None:
    manifest = write_branches(place)
    classes = parse_classes("lad=2,background=*")
    set_labels(LabelsConfig(place / "x.zarr", "lad", manifest, classes=classes))
    opened = open_store(place / "x.zarr")
    assert opened.label_sets["lad"].task == "multilabel"
    first, second = opened.read_mask(0, "lad"), opened.read_mask(1, "lad")
    assert np.unique(first).tolist() == [0, 1, 255]
    assert np.unique(second).tolist() == [0, 255]


def test_an_unknown_number_sets_its_sample_aside_and_says_which(place: Path) -> None:
    manifest = write_branches(place)
    classes = parse_classes("lad=2,lcx=3")
    with Image.open(place / "branches/04.png") as picture:
        mask = np.array(picture)
    mask[0, :7] = 9
    Image.fromarray(mask).save(place / "branches/04.png")
    result = set_labels(LabelsConfig(place / "x.zarr", "branches", manifest, classes=classes))
    assert [aside.id for aside in result.set_aside] == [
        "s01", "s03", "s04", "s05", "s07", "s09", "s11", "s13", "s15", "s17", "s19",
    ]  # fmt: skip
    assert (
        "branches/04.png: class number 9 (7 pixels), which no class has; known are 0, 2, 3, "
        in (result.set_aside[2].reason)
    )
    assert open_store(place / "x.zarr").read_mask(4, "branches") is None


def test_planes_come_from_a_column_a_class(place: Path) -> None:
    store, manifest = place / "x.zarr", write_branches(place, ("lad", "rca", "lcx"))
    lines = manifest.read_text("utf-8").splitlines()
    lines[1], lines[2] = lines[1].replace("rca/00.png", ""), "s01,,,,"
    write(manifest, *lines)
    config = LabelsConfig(
        store,
        "vessels",
        manifest,
        classes=parse_classes("LAD,RCA"),
        mask_columns=("lad", "rca"),
    )
    result = set_labels(config)
    assert (result.num_with_mask, result.set_aside) == (NUM_IMAGES - 1, ())
    opened = open_store(store)
    spec = opened.label_sets["vessels"]
    assert (spec.task, spec.classes, spec.num_planes) == ("multilabel", ("LAD", "RCA"), 2)
    first, third = opened.read_mask(0, "vessels"), opened.read_mask(2, "vessels")
    assert not opened.has_mask(1, "vessels")
    assert first is not None
    assert third is not None
    assert first[0, 0].all()
    assert (first[1] == 255).all()
    assert [third[0, 2:4].max(1).tolist(), third[1, 2:4].max(1).tolist()] == [[1, 0], [0, 1]]
    # What was a mask of two planes may become one of class numbers, as a whole.
    classes = parse_classes("a=2,b=16")
    set_labels(replace(config, classes=classes, mask_columns=("lcx",)))
    assert open_store(store).label_sets["vessels"].task == "multiclass"
    assert verify_store(store).findings == ()


@pytest.mark.parametrize(
    ("name", "classes", "columns", "message"),
    [
        ("mask", "a,b", (), "label set mask is of foreground and background, .* another name"),
        ("mask", "a=1,b=2", (), "label set mask is of foreground and background"),
        ("x", "a,b", ("one", "two", "three"), "3 columns of masks for the classes a, b; expected"),
        ("x", "a=1,b=2", ("one", "two"), "2 columns of masks for the classes a, b; expected one"),
        ("x", "a,b", ("one", "one"), "columns of masks one,one: expected names, each once"),
    ],
)
def test_classes_that_do_not_fit_are_refused_before_anything_is_read(
    name: str, classes: str, columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(
            Path("x"), name, Path("m.csv"), classes=parse_classes(classes), mask_columns=columns
        )


@pytest.mark.parametrize("other", ["lad=16,rca=2", "lad=2,rca=16,background=7"])
def test_what_was_staged_for_other_classes_is_not_taken(place: Path, other: str) -> None:
    store, manifest = place / "x.zarr", write_branches(place)

    def stop(num_done: int, num_total: int) -> None:
        if num_done:
            raise InterruptedError

    first = LabelsConfig(store, "branches", manifest, classes=parse_classes("lad=2,rca=16"))
    with pytest.raises(InterruptedError):
        set_labels(first, stop)
    staged = staging_of(store, "branches") / "labels/branches/masks/c/0/0/0/0"
    before = staged.stat().st_mtime_ns
    set_labels(replace(first, classes=parse_classes(other)))
    final = store / "labels/branches/masks/c/0/0/0/0"
    assert final.stat().st_mtime_ns != before
    mask = open_store(store).read_mask(0, "branches")
    assert mask is not None
    assert (mask[0, 0] == parse_classes(other).numbers[2]).all()


def test_extract_leaves_class_numbers_as_they_are(place: Path) -> None:
    store, manifest = place / "x.zarr", write_branches(place)
    classes = parse_classes("rca=16,lad=2")
    set_labels(LabelsConfig(store, "branches", manifest, classes=classes))
    before = open_store(store).read_mask(0, "branches")
    with (place / "pictures/manifest.csv").open("a", encoding="utf-8") as file:
        file.write("again,images/00.png,,0,0,train,p9\n")
    assert extract(config_of(place / "pictures")).sealed
    opened = open_store(store)
    assert opened.label_sets["branches"].task == "multiclass"
    assert np.array_equal(opened.read_mask(0, "branches"), before)


def test_killed_while_masks_are_read_the_old_ones_serve_and_the_same_command_goes_on(
    place: Path, invoke: Callable[..., Result]
) -> None:
    store = place / "x.zarr"
    set_labels(LabelsConfig(store, "reader2", write_masks(place, "old", level=0)))
    manifest = write_masks(place)
    for i in range(16, NUM_IMAGES):
        # The second block is large and slow to decode, so that the kill comes in time.
        mask = place / f"reader2/{i:02}.png"
        with Image.open(mask) as small:
            small.resize((small.width * 40, small.height * 40)).save(mask)
    command = ["store", "labels", "set", str(store), "reader2", "--from", str(manifest)]
    first = subprocess.Popen(
        [sys.executable, "-m", "sam3cache", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
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

    again = invoke(*command)
    assert again.exit_code == 0, again.stderr
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


def test_a_store_changed_while_masks_are_read_is_not_labelled_for_what_it_was(place: Path) -> None:
    store, manifest = place / "x.zarr", write_masks(place)
    table = write(place / "a.csv", "id,split", "s00,test")

    def change(num_done: int, num_total: int) -> None:
        if num_done == num_total:
            set_annotations(AnnotationsConfig(store, table))

    config = LabelsConfig(store, "reader2", manifest)
    with pytest.raises(StoreBusyError, match="was changed by another process meanwhile; run the s"):
        set_labels(config, change)
    opened = open_store(store)
    assert list(opened.label_sets) == ["mask"]
    assert opened.samples[0].split == "test"
    assert set_labels(config).num_with_mask == NUM_IMAGES


def test_a_set_keeps_no_name_of_a_file_that_it_came_from(place: Path) -> None:
    store = place / "x.zarr"
    set_labels(LabelsConfig(store, "second", write_masks(place, "jane-doe")))
    opened = open_store(store)
    lines = opened.label_rows("second").values()
    assert {(line.present, line.source) for line in lines} == {(True, "")}
    assert all(line.mtime_ns for line in lines)
    assert {line.source for line in opened.label_rows("mask").values()} != {""}
    files = [path for path in store.rglob("*") if path.is_file()]
    assert not any("jane" in path.name or b"jane" in path.read_bytes() for path in files)


class Killed(BaseException):
    """Stands for a process that ends at once."""


def kill_with_the_old_set_gone(config: LabelsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set labels, and end when the store has forgotten the old set and has not got the new one."""

    def end(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(relabel_module, "fold_receipts", end)
        with pytest.raises(Killed):
            set_labels(config)


def test_an_interrupted_set_is_made_whole_by_its_own_command_and_by_no_other(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest = place / "x.zarr", write_masks(place)
    set_labels(LabelsConfig(store, "reader2", write_masks(place, "old", level=0)))
    config = LabelsConfig(store, "reader2", manifest)
    kill_with_the_old_set_gone(config, monkeypatch)
    table = write(place / "a.csv", "id,split", "s00,test")
    for change in (
        lambda: set_annotations(AnnotationsConfig(store, table)),
        lambda: set_labels(LabelsConfig(store, "third", manifest)),
        lambda: remove_labels(store, "mask"),
        lambda: repack(store),
    ):
        with pytest.raises(UnsealedStoreError, match="set reader2` was interrupted; run that com"):
            change()
    # An extraction finishes its own part, and leaves the seal to who knows the masks.
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(place / "pictures/images/new.png")
    with (place / "pictures/manifest.csv").open("a", encoding="utf-8") as file:
        file.write("new,images/new.png,,0,0,train,p9\n")
    message = "yet it is not sealed: `store labels set reader2` was interrupted; run that command a"
    with pytest.raises(UnsealedStoreError, match=message):
        extract(config_of(place / "pictures"))
    opened = open_store(store, allow_unsealed=True)
    new = next(sample for sample in opened.samples if sample.id == "new")
    assert (opened.read("image_1008", new.row)[0, :700] == 9).all()
    assert not opened.sealed

    assert set_labels(config).num_with_mask == NUM_IMAGES
    opened = open_store(store)
    assert sorted(opened.label_sets) == ["mask", "reader2"]
    assert all(opened.read_mask(row, "reader2").all() for row in range(NUM_IMAGES))
    assert not opened.has_mask(new.row, "reader2")
    assert verify_store(store).findings == ()


def test_extract_leaves_masks_alone_that_no_extraction_has_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", num_images=NUM_IMAGES)
    (folder / "masks").rename(tmp_path / "elsewhere")
    table = folder / "manifest.csv"
    lines = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    write(table, *(",".join(line[:2] + line[3:]) for line in lines))
    extract(config_of(folder))
    store = tmp_path / "x.zarr"
    set_labels(LabelsConfig(store, "mask", write_masks(tmp_path)))
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(folder / "images/new.png")
    with table.open("a", encoding="utf-8") as file:
        file.write("new,images/new.png,0,0,train,p9\n")
    result = extract(config_of(folder))
    assert (result.sealed, result.num_computed, result.num_relabelled) == (True, 1, 0)
    opened = open_store(store)
    assert all(opened.read_mask(row).all() for row in range(NUM_IMAGES))
    assert not opened.has_mask(opened.samples[-1].row, "mask")


def test_a_manifest_that_names_no_mask_leaves_all_masks_as_they_are(
    place: Path, invoke: Callable[..., Result]
) -> None:
    store, folder = place / "x.zarr", place / "pictures"
    masks = [open_store(store).read_mask(row) for row in range(NUM_IMAGES)]
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(folder / "images/new.png")
    options = ("-o", store, "--levels", "image_1008", "--devices", "cpu")
    done = invoke("extract", folder / "images", *options)
    assert done.exit_code == 0, done.output
    assert "without the mask" not in done.stdout
    told = f"{NUM_IMAGES} have a mask (as they had: the manifest names none), 0 both view angles."
    assert told in done.stdout
    opened = open_store(store)
    assert all(np.array_equal(opened.read_mask(row), mask) for row, mask in enumerate(masks))
    assert not opened.has_mask(opened.samples[-1].row)
    # Its block has a line of the set as well, which says so.
    assert verify_store(store).findings == ()


def test_masks_that_a_manifest_takes_away_are_counted_and_warned_of(place: Path) -> None:
    table = place / "pictures/manifest.csv"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("masks/03.png", "").replace("masks/04.png", ""), encoding="utf-8")
    said: list[str] = []
    result = extract(config_of(place / "pictures"), warn=said.append)
    assert (result.num_relabelled, result.num_unmasked, result.num_with_mask) == (0, 2, 18)
    (line,) = said
    assert line.startswith("2 samples have a mask in ")
    assert "theirs are taken away" in line
    assert not open_store(place / "x.zarr").has_mask(3)


def test_masks_of_the_same_pixels_in_copied_files_are_no_others(place: Path) -> None:
    for path in (place / "pictures/masks").iterdir():
        os.utime(path, ns=(1, 1))
    Image.fromarray(np.full((56, 56), 255, np.uint8)).save(place / "pictures/masks/02.png")
    result = extract(config_of(place / "pictures"))
    assert (result.num_relabelled, result.num_unmasked, result.sealed) == (1, 0, True)


def test_samples_added_later_leave_no_label_set_incomplete(place: Path) -> None:
    store = place / "x.zarr"
    set_labels(LabelsConfig(store, "reader2", write_masks(place)))
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(place / "pictures/images/new.png")
    with (place / "pictures/manifest.csv").open("a", encoding="utf-8") as file:
        file.write("new,images/new.png,,0,0,train,p9\n")
    extract(config_of(place / "pictures"))
    assert verify_store(store).findings == ()


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
