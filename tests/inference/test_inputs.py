"""What a user may name to be predicted."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_dicom
from PIL import Image

from sam3cache.errors import ConfigError, ImageError, ManifestError
from sam3cache.images import read_image
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE
from sam3cache.inference.inputs import find_images


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures a/1.png, a/2.png, b/1.png, b/note.md; a table with angles and one without."""
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "b" / "note.md").write_text("", encoding="utf-8")
    table = "id,image,primary_angle,secondary_angle\nx,a/1.png,30,-10\ny,a/2.png,999,0\n"
    (tmp_path / "views.csv").write_text(table, encoding="utf-8")
    (tmp_path / "plain.csv").write_text("id,image\nx,b/1.png\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a/1.png"], ["1"]),
        (["a/2.png", "a/1.png"], ["2", "1"]),
        (["a/1.png", "b/1.png"], ["a/1", "b/1"]),
        (["a/1.png", "a/1.png", "./a/1.png"], ["1"]),
        (["a"], ["1", "2"]),
        (["*/*.png"], ["a/1", "a/2", "b/1"]),
        (["**/1.*"], ["a/1", "b/1"]),
        (["b/*"], ["1"]),
        (["views.csv"], ["x"]),
        (["*.csv"], ["x", "x"]),
        (["plain.csv", "a"], ["x", "1", "2"]),
    ],
)
def test_files_folders_patterns_and_manifests_are_found(
    here: Path, names: list[str], ids: list[str]
) -> None:
    found = find_images(names)
    assert [sample.id for sample in found.samples] == ids
    assert all(sample.image_path.is_file() for sample in found.samples)


def test_a_manifests_angles_are_taken_and_its_bad_rows_listed(here: Path) -> None:
    found = find_images(["views.csv"])
    (sample,) = found.samples
    assert (sample.primary_angle_deg, sample.secondary_angle_deg) == (30.0, -10.0)
    (aside,) = found.set_aside
    assert aside.id == "y"
    assert "999" in aside.reason


def test_angles_go_to_images_that_have_none(here: Path) -> None:
    found = find_images(["a/1.png", "plain.csv"], primary_angle_deg=30.0)
    assert [sample.primary_angle_deg for sample in found.samples] == [30.0, 30.0]
    assert [sample.secondary_angle_deg for sample in found.samples] == [None, None]


def test_columns_may_be_called_anything(here: Path) -> None:
    (here / "odd.csv").write_text("Bild,Winkel\nb/1.png,-45\n", encoding="utf-8")
    columns = here / "columns.toml"
    columns.write_text('image = "Bild"\nprimary_angle = "Winkel"\n', encoding="utf-8")
    (sample,) = find_images(["odd.csv"], columns=columns).samples
    assert (sample.source, sample.primary_angle_deg) == ("b/1.png", -45.0)


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(here: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(here / "c[1].png")
    assert [sample.id for sample in find_images(["c[1].png"]).samples] == ["c[1]"]


def test_every_frame_of_a_cine_is_taken_where_no_manifest_says_which(here: Path) -> None:
    cine = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    np.save(here / "a" / "run.npy", cine)
    (here / "a" / "bad.npy").write_bytes(b"\x93NUMPY")
    (here / "cine.csv").write_text("image,frame\na/run.npy,2\n", encoding="utf-8")
    found = find_images(["a", "a/run.npy", "cine.csv"]).samples
    assert [s.id for s in found] == ["1", "2", "bad", "run#0", "run#1", "run#2", "a/run#2"]
    np.testing.assert_array_equal(read_image(found[4])[..., 0], cine[1])
    with pytest.raises(ImageError, match=r"bad\.npy"):
        read_image(found[2])


@pytest.fixture
def runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DICOM files of one name in two folders, with angles in their headers, and a CSV of them."""
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(here / "names.key"))
    for folder, angle in (("a", "30"), ("b", "-20")):
        pixels = np.full((4, 4), int(angle) + 20, np.uint8)
        tags = {"PatientID": "7", "PositionerPrimaryAngle": angle}
        write_dicom(here / folder / "IM001.dcm", pixels, **tags)
    (here / "runs.csv").write_text("image\na/IM001.dcm\nb/IM001.dcm\n", encoding="utf-8")
    return here


def test_dicom_files_of_one_name_in_several_folders_are_several(runs: Path) -> None:
    names = ["a/IM001.dcm", "b/IM001.dcm", str(runs / "a" / "IM001.dcm"), "a/1.png"]
    found = find_images(names)
    assert len({sample.id for sample in found.samples}) == 3
    assert [sample.primary_angle_deg for sample in found.samples] == [30.0, -20.0, None]
    assert [read_image(sample).max() for sample in found.samples] == [50, 0, 0]
    assert any(str(runs / "names.key") in note for note in found.notes)
    # The key is there now, so there is nothing to tell of it.
    assert not find_images(names).notes


@pytest.mark.parametrize("names", [["a/run.dcm"], ["a/run.dcm", "b/IM001.dcm"]])
def test_a_columns_file_speaks_for_dicom_files_that_are_named(runs: Path, names: list[str]) -> None:
    cine = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    write_dicom(runs / "a" / "run.dcm", cine, PatientID="8")
    columns = runs / "c.toml"
    columns.write_text('frame = { constant = "0" }\nhash_paths = false\n', encoding="utf-8")
    found = find_images(names, columns=columns).samples
    assert [sample.frame for sample in found] == [0] * len(names)
    assert [sample.image_path.name for sample in found] == [Path(name).name for name in names]
    assert found[0].source.endswith("run.dcm")
    np.testing.assert_array_equal(read_image(found[0])[..., 0], cine[0])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes among its files")
@pytest.mark.timeout(60)
def test_a_pipe_is_refused_and_no_pattern_matches_it(here: Path) -> None:
    for name in ("a/b", "a/c.dcm", "a/d.png"):
        os.mkfifo(here / name)
    with pytest.raises(ConfigError, match="a/b: is a pipe, device or socket"):
        find_images(["a/b"])
    assert [sample.id for sample in find_images(["a/*"]).samples] == ["1", "2"]


def test_of_headers_angles_those_that_are_given_go_before_in_a_table_too(runs: Path) -> None:
    found = find_images(["runs.csv"], primary_angle_deg=5.0).samples
    assert [sample.primary_angle_deg for sample in found] == [5.0, 5.0]
    with_angles = "image,primary_angle\na/IM001.dcm,1\n"
    (runs / "runs.csv").write_text(with_angles, encoding="utf-8")
    with pytest.raises(ConfigError, match="has primary angles of its own"):
        find_images(["runs.csv"], primary_angle_deg=5.0)


def test_a_dicom_file_that_cannot_be_read_is_told_by_its_place_not_its_name(runs: Path) -> None:
    bad = runs / "a" / "Quackenbush.dcm"
    bad.write_bytes((runs / "a" / "IM001.dcm").read_bytes()[:200])
    with pytest.raises(ManifestError, match=r"none of 1 files .*file 1: ") as caught:
        find_images([bad])
    assert "Quackenbush" not in str(caught.value)
    found = find_images(["b/1.png", "a/IM001.dcm", bad])
    assert len(found.samples) == 2
    (aside,) = found.set_aside
    assert aside.reason.startswith("file 3: ")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text but on Linux")
def test_a_file_whose_name_is_no_utf8_is_set_aside(here: Path) -> None:
    odd = Path(os.fsdecode(b"a/\xff.png"))
    odd.write_bytes((here / "a" / "1.png").read_bytes())
    found = find_images([odd, "a/1.png"])
    assert [sample.source for sample in found.samples] == ["1.png"]
    assert [(aside.id, aside.reason[:28]) for aside in found.set_aside] == [
        ("\\udcff.png", "the file's name is not UTF-8")
    ]


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (["c.png"], {}, ConfigError, "c.png: no such file"),
        (["a/*.tif"], {}, ConfigError, "matches no picture"),
        (["b/*.md"], {}, ConfigError, "matches no picture"),
        (["views.csv"], {"primary_angle_deg": 1.0}, ConfigError, "has primary angles of its own"),
        (["a/1.png"], {"columns": Path("c.toml")}, ConfigError, "no manifest is named"),
        (["."], {}, ManifestError, "no pictures"),
        (["a/1.png::x"], {}, ConfigError, "a part of a file cannot be named alone"),
    ],
)
def test_what_cannot_be_found_is_refused(
    here: Path,
    names: list[str],
    options: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        find_images(names, **options)  # type: ignore[arg-type]
