"""The folder of phantoms: what it holds, that it is reproducible, and how it refuses."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3cache.errors import ConfigError
from sam3cache.images.phantom import make_phantoms
from sam3cache.images.phantom.anatomy import Patient, Side, grow_patient
from sam3cache.images.phantom.attenuation import MASK_PATH_MM, catheter, contrast
from sam3cache.images.phantom.dataset import COLUMNS, Phantom, render, split_of
from sam3cache.images.phantom.detector import expose
from sam3cache.images.phantom.projection import View

SIZE_PX = 96


def read_rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small phantoms of four patients."""
    out = tmp_path_factory.mktemp("phantoms") / "eight"
    return make_phantoms(out, 8, 3, size_px=SIZE_PX, views_per_patient=2)


def test_the_manifest_names_files_that_are_there(eight: Path):
    rows = read_rows(eight)
    assert tuple(rows[0]) == COLUMNS
    assert len({row["id"] for row in rows}) == 8
    for row in rows:
        for column in ("image", "mask", "branches"):
            assert "\\" not in row[column]
            with Image.open(eight.parent / row[column]) as picture:
                assert (picture.mode, picture.size) == ("L", (SIZE_PX, SIZE_PX))


def test_masks_are_0_and_255_just_where_a_branch_is(eight: Path):
    classes = json.loads((eight.parent / "classes.json").read_text(encoding="utf-8"))
    for row in read_rows(eight):
        mask = np.asarray(Image.open(eight.parent / row["mask"]))
        branches = np.asarray(Image.open(eight.parent / row["branches"]))
        assert set(np.unique(mask)) == {0, 255}
        np.testing.assert_array_equal(mask == 255, branches > 0)
        names = {classes[str(label)] for label in np.unique(branches)}
        trunk = "LAD" if row["side"] == "left" else "RCA"
        assert {"background", trunk} <= names


def test_both_sides_and_several_views_of_a_patient_are_shown(eight: Path):
    by_group: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(eight):
        by_group.setdefault(row["group"], []).append(row)
    assert len(by_group) == 4
    for rows in by_group.values():
        assert {row["side"] for row in rows} == {"left", "right"}
        assert len({(row["primary_angle"], row["secondary_angle"]) for row in rows}) == 2
        assert len({row["split"] for row in rows}) == 1


def test_the_geometry_stays_within_an_angiography_suite(eight: Path):
    for row in read_rows(eight):
        assert abs(float(row["primary_angle"])) < 75
        assert abs(float(row["secondary_angle"])) < 60
        assert 720 <= float(row["sod_mm"]) <= 810
        assert 950 <= float(row["sid_mm"]) <= 1200
        assert 0.30 <= float(row["pixel_mm"]) * SIZE_PX / 512 <= 0.381


def test_the_same_seed_gives_the_same_bytes(eight: Path, tmp_path: Path):
    again = make_phantoms(tmp_path / "again", 8, 3, size_px=SIZE_PX, views_per_patient=2)
    assert contents(again.parent) == contents(eight.parent)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(eight: Path, tmp_path: Path):
    few = make_phantoms(tmp_path / "few", 4, 3, size_px=SIZE_PX, views_per_patient=2)
    assert read_rows(few) == read_rows(eight)[:4]
    few_files, all_files = contents(few.parent), contents(eight.parent)
    few_files.pop("manifest.csv")
    assert len(few_files) == 3 * 4 + 1
    assert all(all_files[name] == data for name, data in few_files.items())


def test_another_seed_gives_other_pictures(eight: Path, tmp_path: Path):
    other = make_phantoms(tmp_path / "other", 1, 4, size_px=SIZE_PX, views_per_patient=2)
    first = read_rows(eight)[0]["image"]
    assert contents(other.parent)[first] != contents(eight.parent)[first]


@pytest.mark.parametrize("seed", range(5))
def test_three_patients_or_more_fill_every_split(seed: int):
    splits = [split_of(patient, seed) for patient in range(700)]
    for num_patients in (3, 4, 7, 10, 700):
        assert set(splits[:num_patients]) == {"train", "val", "test"}
    assert splits.count("train") == 500
    assert splits[7:14] != splits[14:21] or splits[14:21] != splits[21:28]


def test_progress_is_reported_after_each_image(tmp_path: Path):
    reports: list[tuple[int, int]] = []
    make_phantoms(
        tmp_path / "out", 3, 0, size_px=64, report=lambda done, total: reports.append((done, total))
    )
    assert reports == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("num_images", "seed", "size_px", "views_per_patient", "message"),
    [
        (0, 0, 64, 4, "number of images is 0"),
        (1, -1, 64, 4, "seed is -1"),
        (1, 0, 63, 4, "size is 63"),
        (1, 0, 64, 0, "views per patient is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, num_images: int, seed: int, size_px: int, views_per_patient: int, message: str
):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        make_phantoms(out, num_images, seed, size_px=size_px, views_per_patient=views_per_patient)
    assert not out.exists()


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    return tmp_path


def a_file(tmp_path: Path) -> Path:
    return occupied(tmp_path) / "notes.txt"


def below_a_file(tmp_path: Path) -> Path:
    return occupied(tmp_path) / "notes.txt" / "out"


def read_only(tmp_path: Path) -> Path:
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("this user may write anywhere")
    tmp_path.chmod(0o500)
    return tmp_path / "out"


@pytest.mark.parametrize("place", [occupied, a_file, below_a_file, read_only])
def test_a_place_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, place: Callable[[Path], Path]
):
    out = place(tmp_path)
    with pytest.raises(ConfigError, match="name ") as caught:
        make_phantoms(out, 1, 0, size_px=64)
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "images").exists()


def test_an_empty_folder_is_used(tmp_path: Path):
    assert make_phantoms(tmp_path, 1, 0, size_px=64) == tmp_path / "manifest.csv"


def rendered(
    seed: int, side: Side, primary: float, secondary: float
) -> tuple[Patient, View, Phantom]:
    patient = grow_patient(np.random.default_rng(seed))
    view = View(primary, secondary, 765.0, 1080.0, 0.68, 256)
    return patient, view, render(patient, side, view, np.random.default_rng(seed + 100))


@pytest.mark.parametrize(
    ("side", "primary", "secondary"),
    [("left", -30.0, -25.0), ("left", 45.0, 25.0), ("right", 45.0, 0.0), ("right", -30.0, 0.0)],
)
def test_vessels_are_darker_than_what_surrounds_them(side: Side, primary: float, secondary: float):
    patient, view, phantom = rendered(5, side, primary, secondary)
    path_HW, _ = contrast(patient.trees[side], view)
    wire_HW = catheter(patient, side, view)
    core = (path_HW > 1.5) & phantom.is_open & (wire_HW == 0)
    near = np.zeros_like(core)
    for shift in (-6, 6):
        near |= np.roll(core, shift, axis=0) | np.roll(core, shift, axis=1)
    near &= (path_HW == 0) & phantom.is_open & (wire_HW == 0)
    assert core.sum() > 300
    assert phantom.image[core].mean() + 15 < phantom.image[near].mean()


def test_the_collimated_area_is_black_and_holds_no_vessel():
    _, _, phantom = rendered(5, "left", -30.0, -25.0)
    assert 0.7 < phantom.is_open.mean() < 1.0
    assert not phantom.image[~phantom.is_open].any()
    assert not phantom.branches[~phantom.is_open].any()
    assert phantom.image[phantom.is_open].mean() > 60


def test_the_catheter_is_in_the_picture_but_not_in_the_mask():
    patient, view, phantom = rendered(5, "left", -30.0, -25.0)
    path_HW, _ = contrast(patient.trees["left"], view)
    wire = (catheter(patient, "left", view) > 0.25) & (path_HW <= MASK_PATH_MM) & phantom.is_open
    beside = np.roll(wire, 6, axis=1) & (catheter(patient, "left", view) == 0) & (path_HW == 0)
    assert wire.sum() > 100
    assert not phantom.branches[wire].any()
    assert phantom.image[wire].mean() + 15 < phantom.image[beside & phantom.is_open].mean()


def test_a_field_that_hardly_a_photon_crosses_is_exposed_all_the_same():
    attenuation_HW = np.zeros((64, 64))
    attenuation_HW[:, 32:] = 30.0
    picture_HW = expose(attenuation_HW, np.ones((64, 64), bool), np.random.default_rng(0))
    assert picture_HW[:, :28].min() > picture_HW[:, 36:].max()
