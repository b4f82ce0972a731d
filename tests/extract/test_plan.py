import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image

from sam3cache.extract.plan import plan_rows, probe_all
from sam3cache.images import pixel_hash, read_image, read_manifest


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "pictures", num_images=5)


def wanted_of(folder):
    manifest = read_manifest(folder)
    return probe_all(manifest.samples, manifest.set_aside, lambda done, total: None)


def extracted(plan):
    """The table as it stands once every pending row has been computed."""
    rows = []
    for row in plan.rows:
        if row.status == "pending":
            pixels = read_image(plan.samples[row.row])
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
    plan = plan_rows([], wanted_of(folder))
    assert statuses(plan) == [(i, f"s0{i}", "pending") for i in range(5)]
    assert plan.masks[2].source == "masks/02.png"
    assert plan.masks[2].row == 2
    assert [note.split for note in plan.annotations] == ["train", "train", "val", "test", "train"]


def test_an_unchanged_manifest_changes_nothing(folder):
    rows = extracted(plan_rows([], wanted_of(folder)))
    plan = plan_rows(rows, wanted_of(folder))
    assert list(plan.rows) == rows
    assert plan.num_removed == 0


def test_a_touched_file_with_the_same_pixels_keeps_its_row(folder):
    rows = extracted(plan_rows([], wanted_of(folder)))
    os.utime(folder / "images/01.png", ns=(1, 1))
    plan = plan_rows(rows, wanted_of(folder))
    assert statuses(plan) == [(i, f"s0{i}", "ok") for i in range(5)]
    assert plan.rows[1].mtime_ns == 1


def test_a_changed_picture_gets_a_new_row_in_the_next_block(folder):
    rows = extracted(plan_rows([], wanted_of(folder)))
    Image.fromarray(np.full((96, 96), 9, np.uint8)).save(folder / "images/01.png")
    (folder / "masks/01.png").unlink()
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(folder / "masks/01.png")
    plan = plan_rows(rows, wanted_of(folder))
    assert statuses(plan)[1] == (1, "s01", "removed")
    assert statuses(plan)[5:] == [(16, "s01", "pending")]
    assert plan.num_removed == 1
    assert 1 not in plan.samples
    assert plan.samples[16].id == "s01"


def test_removed_samples_come_back_to_life(folder):
    rows = extracted(plan_rows([], wanted_of(folder)))
    manifest = folder / "manifest.csv"
    whole = manifest.read_text(encoding="utf-8")
    drop_line(folder, "s03")
    without = plan_rows(rows, wanted_of(folder))
    assert statuses(without)[3] == (3, "s03", "removed")
    assert 3 not in {note.row for note in without.annotations}
    manifest.write_text(whole, encoding="utf-8")
    back = plan_rows(without.rows, wanted_of(folder))
    assert statuses(back)[3] == (3, "s03", "ok")
    assert len(back.rows) == 5


def test_one_picture_may_serve_several_samples(folder):
    manifest = folder / "manifest.csv"
    with manifest.open("a", encoding="utf-8") as file:
        file.write("again,images/00.png,masks/00.png,1,2,train,p0\n")
    rows = extracted(plan_rows([], wanted_of(folder)))
    assert [row.source for row in rows].count("images/00.png") == 2
    assert list(plan_rows(rows, wanted_of(folder)).rows) == rows


def test_what_cannot_be_read_is_set_aside_and_mended_later(folder):
    good = folder / "good.png"
    shutil.copy(folder / "images/02.png", good)
    (folder / "images/02.png").write_bytes(b"not a picture")
    first = plan_rows([], wanted_of(folder))
    assert statuses(first)[2] == (2, "s02", "aside")
    assert "02.png" in first.rows[2].reason
    rows = extracted(first)
    assert list(plan_rows(rows, wanted_of(folder)).rows) == rows
    shutil.copy(good, folder / "images/02.png")
    mended = plan_rows(rows, wanted_of(folder))
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
        for row in extracted(plan_rows([], wanted_of(folder)))
    ]
    unchanged = plan_rows(rows, wanted_of(folder))
    assert list(unchanged.rows) == rows
    np.save(folder / "masks/02.npy", np.ones((56, 56)))
    mended = plan_rows(rows, wanted_of(folder))
    assert statuses(mended)[5:] == [(16, "s02", "pending")]
    again = plan_rows(mended.rows, wanted_of(folder))
    assert statuses(again) == statuses(mended)


def test_samples_that_leave_the_training_split_are_counted(folder):
    plan = plan_rows([], wanted_of(folder))
    splits = {note.row: note.split for note in plan.annotations}
    assert plan_rows(plan.rows, wanted_of(folder), old_splits=splits).num_moved == 0
    splits[2], splits[3] = "train", "val"
    assert plan_rows(plan.rows, wanted_of(folder), old_splits=splits).num_moved == 1


def test_a_sample_of_an_impossible_angle_is_listed_with_its_reason(folder):
    with (folder / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("odd,images/00.png,,400,0,train,p0\n")
    plan = plan_rows([], wanted_of(folder))
    odd = next(row for row in plan.rows if row.id == "odd")
    assert odd.status == "aside"
    assert "400" in odd.reason
