"""What a user may name to be predicted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3cache.errors import ConfigError, ImageError, ManifestError
from sam3cache.images import read_image
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
