"""Bad and odd inputs, and what becomes of each: its pixels, or the line that says why not."""

import fnmatch
import os
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image
from pyarrow import parquet

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images import probe, read_image, read_manifest, read_mask

H, W = 12, 10
GREY = (np.arange(H * W, dtype=np.uint8) * 2).reshape(H, W)
CINE = np.stack([GREY, 255 - GREY, GREY // 2])
LEFT = np.zeros((H, W), np.uint8)
LEFT[:, :4] = 1

HEADER = "id,image,mask,frame,primary_angle,secondary_angle,split"


def _png(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, format="PNG")


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _bomb(path: Path) -> None:
    """Write a PNG of 30,000 x 30,000 pixels in a few bytes."""
    ihdr = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _write_files(root: Path) -> None:
    (root / "in" / "with space").mkdir(parents=True)
    _png(root / "in/g.png", GREY)
    _png(root / "in/with space/ä.png", GREY)
    _png(root / "in/rgb.png", np.stack([GREY] * 3, -1))
    _png(root / "in/rgba.png", np.stack([GREY] * 4, -1))
    _png(root / "in/one-bit.png", LEFT * 255, "1")
    _png(root / "in/palette.png", GREY, "P")
    _png(root / "in/la.png", GREY, "LA")
    Image.fromarray(GREY.astype(np.uint16) * 200).save(root / "in/deep.png")
    Image.fromarray(GREY).save(root / "in/g.jpg")
    Image.fromarray(GREY).save(root / "in/g.bmp")
    Image.fromarray(GREY).save(root / "in/g.gif")
    Image.fromarray(GREY).save(root / "in/g.webp")
    tifffile.imwrite(root / "in/cine.tif", CINE, photometric="minisblack")
    tifffile.imwrite(root / "in/white.tif", GREY, photometric="miniswhite")
    tifffile.imwrite(root / "in/float.tif", GREY.astype(np.float32))
    tifffile.imwrite(root / "in/channels.tif", np.zeros((H, W, 5), np.uint8), planarconfig="contig")
    for name, array in {
        "g": GREY,
        "cine": CINE,
        "chw": np.stack([GREY] * 3),
        "four": np.zeros((1, 2, H, W), np.uint8),
        "line": np.zeros(9, np.uint8),
        "none": np.zeros((0, W), np.uint8),
        "bool": LEFT.astype(bool),
        "float": GREY.astype(np.float32),
        "nan": np.where(LEFT, np.nan, GREY).astype(np.float32),
        "all-nan": np.full((H, W), np.nan),
        "inf": np.where(LEFT, np.inf, GREY),
        "complex": GREY.astype(np.complex64),
        "text": np.array([["a"] * W] * H),
        "constant": np.full((H, W), 700, np.uint16),
        "signed": GREY.astype(np.int16) - 100,
        "m01": LEFT,
        "m255": LEFT * 255,
        "m128": LEFT * 128,
        "mfloat": LEFT.astype(np.float32),
        "mhalf": LEFT * 0.5,
        "mempty": LEFT * 0,
        "mfull": LEFT * 0 + 1,
        "mnan": np.full((H, W), np.nan),
        "mneg": LEFT.astype(np.int16) * -1,
        "mhalfsize": LEFT[::2, ::2],
        "mwide": np.zeros((H, 3 * W), np.uint8),
        "mhw1": LEFT[..., None],
        "mcine": np.stack([LEFT] * 3),
        "mrgb": np.stack([LEFT * 255] * 3, -1),
    }.items():
        np.save(root / f"in/{name}.npy", array)
    np.save(root / "in/pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("g.png", "deep.png", "g.jpg", "cine.tif", "g.npy"):
        cut = root / f"in/cut-{name}"
        cut.write_bytes((root / "in" / name).read_bytes())
        _cut(cut, 0.6)
    (root / "in/empty.png").touch()
    (root / "in/text.png").write_text("not a picture", encoding="utf-8")
    (root / "in/magic.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "in/really-jpg.png").write_bytes((root / "in/g.jpg").read_bytes())
    (root / "in/no-suffix").write_bytes((root / "in/g.png").read_bytes())
    _bomb(root / "in/bomb.png")
    _png(root / "outside.png", GREY)
    with suppress(OSError):  # Windows grants links to few.
        (root / "in/link.png").symlink_to(root / "outside.png")
        (root / "in/dead-link.png").symlink_to(root / "nowhere.png")
    if hasattr(os, "mkfifo"):
        for name in ("pipe", "pipe.png", "pipe.npy", "pipe.json"):
            os.mkfifo(root / "in" / name)


def _outcome(root: Path, cells: str) -> str:
    """Return what a row gives: size, channels and range of its pixels; or what is wrong with it."""
    path = root / "in" / "manifest.csv"
    path.write_text(f"{HEADER}\nok,g.png,,,,,\n{cells}\n", encoding="utf-8")
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        return f"refused: {str(error).replace(str(path), 'manifest.csv')}"
    if manifest.set_aside:
        return manifest.set_aside[0].reason
    sample = manifest.samples[1]
    try:
        pixels = read_image(sample)
        mask = read_mask(sample)
    except ImageError as error:
        return str(error)
    height, width, channels = pixels.shape
    text = f"{height} x {width} x {channels}, {pixels.min()} to {pixels.max()}"
    if mask is not None:
        text += f"; mask {mask.shape[1]} x {mask.shape[2]}, {int(mask.sum())} marked"
    angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
    return text + ("" if angles == (None, None) else f"; angles {angles[0]}, {angles[1]}")


ROWS = {
    "s,g.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,with space/ä.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,./g.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,../in/g.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,../outside.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,link.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,dead-link.png,,,,,": "dead-link.png: no such file; mend its path or restore the file",
    "s,nowhere.png,,,,,": "nowhere.png: no such file; mend its path or restore the file",
    "s,.,,,,,": "the image '.' is no file's name; mend the cell",
    "s,,,,,,": "no image; fill the cell or remove the row",
    "s,with space,,,,,": "with space: is a folder; name a file",
    "s,with space\\ä.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,C:\\data\\g.png,,,,,": "g-606dd7b0.png: no such file; mend its path or restore the file",
    "s,file:///g.png,,,,,": "file:///g.png: no such file; mend its path or restore the file",
    "s,rgb.png,,,,,": "12 x 10 x 3, 0 to 238",
    "s,rgba.png,,,,,": "12 x 10 x 3, 0 to 238",
    "s,la.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,palette.png,,,,,": "12 x 10 x 1, 0 to 238",
    "s,one-bit.png,,,,,": "12 x 10 x 1, 0 to 255",
    "s,deep.png,,,,,": "12 x 10 x 1, 0 to 255",
    "s,g.jpg,,,,,": "12 x 10 x 1, 1 to 236",
    "s,g.bmp,,,,,": "12 x 10 x 1, 0 to 238",
    "s,g.gif,,,,,": "g.gif: not an image; expected *",
    "s,g.webp,,,,,": "g.webp: not an image; expected *",
    "s,really-jpg.png,,,,,": "12 x 10 x 1, 1 to 236",
    "s,no-suffix,,,,,": "12 x 10 x 1, 0 to 238",
    "s,cine.tif,,1,,,": "12 x 10 x 1, 17 to 255",
    "s,cine.tif,,3,,,": "cine.tif: no frame 3; it has 0 to 2; mend the manifest",
    "s,cine.tif,,-1,,,": (
        "frame '-1': expected a whole number from 0, 'contrast', or nothing for a still"
    ),
    "s,cine.tif,,1.5,,,": (
        "frame '1.5': expected a whole number from 0, 'contrast', or nothing for a still"
    ),
    "s,cine.tif,,,,,": "cine.tif: a cine of 3 frames; say which frame in the manifest: a number "
    "from 0, or contrast for the one with the most contrast agent",
    "s,g.png,,0,,,": "12 x 10 x 1, 0 to 238",
    "s,g.png,,2,,,": "g.png: frame 2 of a still; leave its frame empty",
    "s,g.png,,x,,,": (
        "frame 'x': expected a whole number from 0, 'contrast', or nothing for a still"
    ),
    "s,white.tif,,,,,": "12 x 10 x 1, 17 to 255",
    "s,float.tif,,,,,": "12 x 10 x 1, 0 to 255",
    "s,channels.tif,,,,,": "channels.tif: TIFF of 5 channels; expected 1 to 4",
    "s,cine.npy,,2,,,": "12 x 10 x 1, 0 to 119",
    "s,cine.npy,,9,,,": "cine.npy: no frame 9; it has 0 to 2; mend the manifest",
    "s,chw.npy,,,,,": "chw.npy: a cine of 3 frames; say which frame in the manifest: a number "
    "from 0, or contrast for the one with the most contrast agent",
    "s,four.npy,,,,,": (
        "four.npy: array of shape (1, 2, 12, 10); expected H x W (x 3) or T x H x W (x 3)"
    ),
    "s,line.npy,,,,,": "line.npy: array of shape (9,); expected H x W (x 3) or T x H x W (x 3)",
    "s,none.npy,,,,,": "none.npy: no pixels (1 frame(s) of 0 x 10); export it again",
    "s,bool.npy,,,,,": "12 x 10 x 1, 0 to 255",
    "s,float.npy,,,,,": "12 x 10 x 1, 0 to 255",
    "s,nan.npy,,,,,": "nan.npy: holds values that are not finite; export it again",
    "s,all-nan.npy,,,,,": "all-nan.npy: holds values that are not finite; export it again",
    "s,inf.npy,,,,,": "inf.npy: holds values that are not finite; export it again",
    "s,complex.npy,,,,,": (
        "complex.npy: pixels of type complex64; expected bool, integers or floats"
    ),
    "s,text.npy,,,,,": "text.npy: pixels of type <U1; expected bool, integers or floats",
    "s,pickle.npy,,,,,": "pickle.npy: damaged or truncated (*); restore the file",
    "s,constant.npy,,,,,": "12 x 10 x 1, 0 to 0",
    "s,signed.npy,,,,,": "12 x 10 x 1, 0 to 255",
    "s,cut-g.png,,,,,": "cut-g.png: damaged or truncated (*); restore the file",
    "s,cut-deep.png,,,,,": "cut-deep.png: damaged or truncated (*); restore the file",
    "s,cut-g.jpg,,,,,": "cut-g.jpg: damaged or truncated (*); restore the file",
    "s,cut-cine.tif,,0,,,": "12 x 10 x 1, 0 to 238",
    "s,cut-g.npy,,,,,": "cut-g.npy: damaged or truncated (*); restore the file",
    "s,empty.png,,,,,": "empty.png: empty file; restore it",
    "s,text.png,,,,,": "text.png: not an image; expected *",
    "s,magic.png,,,,,": "magic.png: not an image; expected *",
    "s,bomb.png,,,,,": "bomb.png: more than 178,956,970 pixels; expected *",
    "s,g.png,m01.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,m255.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,m128.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,mfloat.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,mhalf.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,mempty.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 0 marked",
    "s,g.png,mfull.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 120 marked",
    "s,g.png,mnan.npy,,,,": (
        "mnan.npy: float mask with values below 0 or not finite; expected probabilities in "
        "[0, 1]; apply the sigmoid or the threshold first"
    ),
    "s,g.png,mneg.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 0 marked",
    "s,g.png,mhalfsize.npy,,,,": "12 x 10 x 1, 0 to 238; mask 6 x 5, 12 marked",
    "s,g.png,mwide.npy,,,,": (
        "mwide.npy: mask of 12 x 30 for an image of 12 x 10 (height x width); expected the "
        "same aspect ratio; check that it belongs to this image"
    ),
    "s,g.png,mhw1.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,mcine.npy,,,,": (
        "mcine.npy: a cine of 3 frames; say which frame in the manifest: a number "
        "from 0, or contrast for the one with the most contrast agent"
    ),
    "s,g.png,mrgb.npy,,,,": "12 x 10 x 1, 0 to 238; mask 12 x 10, 48 marked",
    "s,g.png,nowhere.npy,,,,": "nowhere.npy: no such file; mend its path or restore the file",
    "s,g.png,text.png,,,,": "text.png: not an image; expected *",
    "s,pipe.png,,,,,": "pipe.png: is no file but a pipe, device or socket; name a file",
    "s,pipe,,,,,": "pipe: is no file but a pipe, device or socket; name a file",
    "s,g.png,pipe.npy,,,,": "pipe.npy: is no file but a pipe, device or socket; name a file",
    "s,g.png,pipe.json::1,,,,": (
        "pipe.json::1: is no file but a pipe, device or socket; name a file"
    ),
    "s,/dev/zero,,,,,": "zero-*: is no file but a pipe, device or socket; name a file",
    "s,g.png,,,30,-20,": "12 x 10 x 1, 0 to 238; angles 30.0, -20.0",
    "s,g.png,,,+30.5,-0,": "12 x 10 x 1, 0 to 238; angles 30.5, -0.0",
    "s,g.png,,,nan,20,": "12 x 10 x 1, 0 to 238; angles None, 20.0",
    "s,g.png,,,400,20,": (
        "primary angle 400 is outside [-180, 180] degrees; correct it, or empty the cell "
        "when it is unknown"
    ),
    "s,g.png,,,30,100,": (
        "secondary angle 100 is outside [-90, 90] degrees; correct it, or empty the cell "
        "when it is unknown"
    ),
    "s,g.png,,,LAO 30,20,": (
        "primary angle 'LAO 30' is not a number; expected degrees in [-180, 180], or "
        "nothing when it is unknown"
    ),
    "s,g.png,,,30,,": "12 x 10 x 1, 0 to 238; angles 30.0, None",
    's,g.png,,,"1,5",20,': (
        "primary angle '1,5' is not a number; expected degrees in [-180, 180], or nothing "
        "when it is unknown"
    ),
    "s,g.png,,,inf,20,": (
        "primary angle inf is outside [-180, 180] degrees; correct it, or empty the cell "
        "when it is unknown"
    ),
    "s,g.png,,,,,Test": (
        "refused: sample 'ok' has the split '' (column 'split'); expected train, val or "
        "test in every row; rename values in columns.toml: split = { column = …, values = "
        "{ … } }"
    ),
    "ok,g.png,,,,,": (
        "refused: manifest.csv: lines 2 and 3 both have the id 'ok'; make ids unique, or "
        "remove the row that is there twice"
    ),
    "s,g.png": "12 x 10 x 1, 0 to 238",
    '"s,g.png,,,,,': "no image; fill the cell or remove the row",
}
"""What becomes of each; * stands for words of a decoder's, or for the formats that are known."""

SPECIAL_FILES = ("pipe", "/dev/zero")
NEEDS_LINKS = ("s,link.png,,,,,", "s,dead-link.png,,,,,")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    _write_files(root)
    return root


@pytest.mark.parametrize("cells", ROWS)
def test_an_odd_input_gives_its_pixels_or_the_line_that_says_why_not(root, capfd, cells):
    if cells in NEEDS_LINKS and not (root / "in/link.png").exists():
        pytest.skip("this user may make no links here")
    if not hasattr(os, "mkfifo") and any(name in cells for name in SPECIAL_FILES):
        pytest.skip("no such files on this system")
    assert fnmatch.fnmatchcase(_outcome(root, cells), ROWS[cells].replace("[", "[[]"))
    assert capfd.readouterr() == ("", "")


def test_the_table_has_the_rows_that_are_promised():
    assert len(ROWS) >= 60


def test_a_manifest_in_latin_1_is_refused_in_one_line(root):
    path = root / "in" / "latin.csv"
    path.write_text(f"{HEADER}\ns,with space/ä.png,,,,,\n", encoding="latin-1")
    with pytest.raises(ManifestError, match=r"latin\.csv.*UTF-8") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among files here")
def test_a_pipe_in_a_folder_holds_nothing_up(tmp_path):
    (tmp_path / "annotations").mkdir()
    os.mkfifo(tmp_path / "annotations" / "a.json")
    os.mkfifo(tmp_path / "pipe.png")
    _png(tmp_path / "g.png", GREY)
    good, pipe = read_manifest(tmp_path).samples
    assert (good.id, pipe.id) == ("g", "pipe")
    with pytest.raises(ImageError, match="is no file but a pipe"):
        probe(pipe)


@pytest.mark.parametrize(
    "times", [pa.array([2**62], pa.timestamp("us")), pa.array([2**62], pa.duration("s"))]
)
def test_a_time_that_no_calendar_has_is_told_in_one_line(tmp_path, times):
    path = tmp_path / "m.parquet"
    parquet.write_table(pa.table({"image": ["g.png"], "taken": times}), path)
    with pytest.raises(ManifestError, match=r"m\.parquet: damaged Parquet \(") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
def test_a_file_whose_name_is_no_unicode_is_set_aside_by_a_name_that_prints(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(GREY).save(folder / "a.png")
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xe4.png"))
    Image.fromarray(GREY).save(folder / "b.png")
    manifest = read_manifest(tmp_path)
    assert [sample.id for sample in manifest.samples] == ["b"]
    (aside,) = manifest.set_aside
    assert aside.id == r"images/\udce4.png"
    assert aside.reason == "the file's name is not UTF-8; rename it"
