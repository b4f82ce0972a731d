import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image

from sam3cache.extract.rows import (
    AnnotationChanges,
    StoredRows,
    compare_annotations,
    hash_changed,
    plan_rows,
    probe_all,
)
from sam3cache.images import pixel_hash, read_image, read_manifest


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "pictures", num_images=5)


def wanted_of(folder, rows=(), masks=None):
    manifest = read_manifest(folder)
    stored = StoredRows(rows, masks or {})
    return probe_all(manifest.samples, manifest.set_aside, lambda done, total: None, stored)


def plan_of(folder, rows=()):
    """The plan for a folder as it is now, in the order of an extraction."""
    stored, wanted = StoredRows(rows), wanted_of(folder)
    hashes = hash_changed(stored, wanted, lambda done, total: None)
    return plan_rows(stored, wanted, hashes)


def extracted(plan):
    """The table as it stands once every pending row has been computed."""
    rows = []
    for row in plan.rows:
        if row.status == "pending":
            pixels = read_image(plan.owners[row.row].sample)
            row = replace(row, status="ok", pixel_sha256=pixel_hash(pixels))
        rows.append(row)
    return rows


def statuses(plan):
    return [(row.row, row.id, row.status) for row in plan.rows]


def drop_line(folder, start):
    path = folder / "manifest.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text(
        "\n".join(line for line in lines if not line.startswith(start)) + "\n", encoding="utf-8"
    )


def test_a_new_store_takes_the_manifests_order(folder):
    plan = plan_of(folder)
    assert statuses(plan) == [(i, f"s0{i}", "pending") for i in range(5)]
    assert plan.masks[2].source == "masks/02.png"
    assert plan.masks[2].row == 2
    assert [note.split for note in plan.annotations] == ["train", "train", "val", "test", "train"]


def test_an_unchanged_manifest_changes_nothing(folder):
    rows = extracted(plan_of(folder))
    plan = plan_of(folder, rows)
    assert list(plan.rows) == rows
    assert plan.num_removed == 0


def test_a_touched_file_with_the_same_pixels_keeps_its_row(folder):
    rows = extracted(plan_of(folder))
    os.utime(folder / "images/01.png", ns=(1, 1))
    plan = plan_of(folder, rows)
    assert statuses(plan) == [(i, f"s0{i}", "ok") for i in range(5)]
    assert plan.rows[1].mtime_ns == 1


def test_a_changed_picture_gets_a_new_row_in_the_next_block(folder):
    rows = extracted(plan_of(folder))
    Image.fromarray(np.full((96, 96), 9, np.uint8)).save(folder / "images/01.png")
    (folder / "masks/01.png").unlink()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(folder / "masks/01.png")
    plan = plan_of(folder, rows)
    assert statuses(plan)[1] == (1, "s01", "removed")
    assert statuses(plan)[5:] == [(16, "s01", "pending")]
    assert plan.num_removed == 1
    assert 1 not in plan.owners
    assert plan.owners[16].sample.id == "s01"


def test_removed_samples_come_back_to_life(folder):
    rows = extracted(plan_of(folder))
    manifest = folder / "manifest.csv"
    whole = manifest.read_text(encoding="utf-8")
    drop_line(folder, "s03")
    without = plan_of(folder, rows)
    assert statuses(without)[3] == (3, "s03", "removed")
    assert 3 not in {note.row for note in without.annotations}
    manifest.write_text(whole, encoding="utf-8")
    back = plan_of(folder, without.rows)
    assert statuses(back)[3] == (3, "s03", "ok")
    assert len(back.rows) == 5


def test_one_picture_may_serve_several_samples(folder):
    manifest = folder / "manifest.csv"
    with manifest.open("a", encoding="utf-8") as file:
        file.write("again,images/00.png,masks/00.png,1,2,train,p0\n")
    rows = extracted(plan_of(folder))
    assert [row.source for row in rows].count("images/00.png") == 2
    assert list(plan_of(folder, rows).rows) == rows


def test_what_cannot_be_read_is_set_aside_and_mended_later(folder):
    good = folder / "good.png"
    shutil.copy(folder / "images/02.png", good)
    (folder / "images/02.png").write_bytes(b"not a picture")
    first = plan_of(folder)
    assert statuses(first)[2] == (2, "s02", "aside")
    assert "02.png" in first.rows[2].reason
    rows = extracted(first)
    assert list(plan_of(folder, rows).rows) == rows
    shutil.copy(good, folder / "images/02.png")
    mended = plan_of(folder, rows)
    assert statuses(mended)[2] == (2, "s02", "removed")
    assert statuses(mended)[5] == (16, "s02", "pending")


def test_what_was_never_good_does_not_come_back_to_life(folder):
    """A bad mask, given up and mended: its tombstone would bring back the old complaint."""
    np.save(folder / "masks/02.npy", np.full((56, 56), -1.0))
    manifest = folder / "manifest.csv"
    text = manifest.read_text(encoding="utf-8").replace("masks/02.png", "masks/02.npy")
    manifest.write_text(text, encoding="utf-8")
    rows = [
        replace(row, status="aside", reason="mask") if row.id == "s02" else row
        for row in extracted(plan_of(folder))
    ]
    unchanged = plan_of(folder, rows)
    assert list(unchanged.rows) == rows
    np.save(folder / "masks/02.npy", np.ones((56, 56)))
    mended = plan_of(folder, rows)
    assert statuses(mended)[5:] == [(16, "s02", "pending")]
    again = plan_of(folder, mended.rows)
    assert statuses(again) == statuses(mended)


def test_what_is_said_otherwise_is_counted(folder):
    notes = list(plan_of(folder).annotations)
    assert compare_annotations(notes, plan_of(folder).annotations) == AnnotationChanges(0, 0, False)
    moved = [replace(note, split="train") if note.row in (2, 4) else note for note in notes]
    assert compare_annotations(moved, notes) == AnnotationChanges(1, 1, True)
    turned = [replace(note, primary_angle_deg=1.0, id=f"x{note.row}") for note in notes[:3]]
    assert compare_annotations(turned, notes) == AnnotationChanges(3, 0, True)
    assert compare_annotations(notes, notes[1:]) == AnnotationChanges(0, 0, True)
    assert compare_annotations(notes[:4], notes) == AnnotationChanges(0, 0, True)


def test_a_sample_of_an_impossible_angle_is_listed_with_its_reason(folder):
    with (folder / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("odd,images/00.png,,400,0,train,p0\n")
    plan = plan_of(folder)
    odd = next(row for row in plan.rows if row.id == "odd")
    assert odd.status == "aside"
    assert "400" in odd.reason


def rename_everything(folder):
    """Give every picture another name and every sample another id."""
    (folder / "images").rename(folder / "frames")
    path = folder / "manifest.csv"
    text = path.read_text(encoding="utf-8").replace("images/", "frames/").replace("\ns0", "\nt0")
    path.write_text(text, encoding="utf-8")


def swap_two(folder):
    one, two = folder / "images/00.png", folder / "images/03.png"
    one.rename(folder / "kept.png")
    two.rename(one)
    (folder / "kept.png").rename(two)


def encode_anew_elsewhere(folder):
    Image.open(folder / "images/01.png").save(folder / "images/new.bmp")
    path = folder / "manifest.csv"
    text = path.read_text(encoding="utf-8").replace("images/01.png", "images/new.bmp")
    path.write_text(text, encoding="utf-8")


def change_an_id(folder):
    path = folder / "manifest.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("\ns02,", "\nother,"), "utf-8")


@pytest.mark.parametrize(
    ("change", "ids", "num_renamed"),
    [
        (rename_everything, ["t00", "t01", "t02", "t03", "t04"], 5),
        (swap_two, ["s03", "s01", "s02", "s00", "s04"], 2),
        (encode_anew_elsewhere, ["s00", "s01", "s02", "s03", "s04"], 1),
        (change_an_id, ["s00", "s01", "other", "s03", "s04"], 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_same_pixels_keep_their_row_wherever_they_are(folder, change, ids, num_renamed):
    rows = extracted(plan_of(folder))
    change(folder)
    plan = plan_of(folder, rows)
    assert statuses(plan) == [(i, id_, "ok") for i, id_ in enumerate(ids)]
    assert [row.pixel_sha256 for row in plan.rows] == [row.pixel_sha256 for row in rows]
    assert (plan.num_renamed, plan.num_removed, plan.num_kept) == (num_renamed, 0, 5)
    assert [note.id for note in plan.annotations] == ids
    for row in plan.rows:
        owner = plan.owners[row.row].sample
        assert (row.source, row.id) == (owner.source, owner.id)
        assert row.mtime_ns == owner.image_path.stat().st_mtime_ns
    assert list(plan_of(folder, plan.rows).rows) == list(plan.rows)


def test_a_row_that_somebody_wants_is_not_given_to_a_copy_of_its_picture(folder):
    rows = extracted(plan_of(folder))
    shutil.copy(folder / "images/00.png", folder / "images/copy.png")
    with (folder / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("copy,images/copy.png,,0,0,train,p0\n")
    plan = plan_of(folder, rows)
    assert statuses(plan)[5:] == [(16, "copy", "pending")]
    assert plan.num_renamed == 0


def test_of_two_copies_the_one_of_the_rows_own_id_takes_it_over(folder):
    rows = extracted(plan_of(folder))
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "images/00.png", folder / "images" / name)
    path = folder / "manifest.csv"
    text = path.read_text(encoding="utf-8").replace(
        "s00,images/00.png,masks/00.png", "new,images/a.png,,0,0,train,p0\ns00,images/b.png,"
    )
    path.write_text(text, encoding="utf-8")
    plan = plan_of(folder, rows)
    assert statuses(plan)[0] == (0, "s00", "ok")
    assert plan.rows[0].source == "images/b.png"
    assert statuses(plan)[5:] == [(16, "new", "pending")]


def test_a_tombstone_comes_back_to_life_under_another_name(folder):
    rows = extracted(plan_of(folder))
    manifest = folder / "manifest.csv"
    whole = manifest.read_text(encoding="utf-8")
    drop_line(folder, "s03")
    without = plan_of(folder, rows)
    (folder / "images/03.png").rename(folder / "images/back.png")
    manifest.write_text(whole.replace("images/03.png", "images/back.png"), encoding="utf-8")
    back = plan_of(folder, without.rows)
    assert statuses(back)[3] == (3, "s03", "ok")
    assert back.num_renamed == 1


def test_files_whose_size_and_time_are_known_are_not_opened(folder):
    first = plan_of(folder)
    rows, masks = extracted(first), dict(first.masks)
    for path in (folder / "images/01.png", folder / "masks/02.png"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    wanted = wanted_of(folder, rows, masks)
    assert [item.reason for item in wanted] == [""] * 5
    assert list(plan_rows(StoredRows(rows, masks), wanted).rows) == rows
    # A mask of another time is looked at, and so is a picture.
    for name in ("images/01.png", "masks/02.png"):
        os.utime(folder / name, ns=(1, 1))
    wanted = wanted_of(folder, rows, masks)
    assert [item.sample.id for item in wanted if item.reason] == ["s01", "s02"]
