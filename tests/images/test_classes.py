"""Classes as users name them, and masks read as class numbers or as planes."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from sam3cache.errors import ConfigError, ImageError, ManifestError
from sam3cache.images import FOREGROUND, ClassTable, parse_classes, read_labels, read_manifest
from sam3cache.records import Sample

SIZE = (40, 30)


def numbers(*values: int) -> NDArray[np.uint8]:
    """A mask with a row of pixels for each number, below it background."""
    mask = np.zeros(SIZE, np.uint8)
    for y, value in enumerate(values):
        mask[y] = value
    return mask


@pytest.mark.parametrize(
    ("text", "names", "task", "becomes"),
    [
        ("foreground", ("foreground",), "multilabel", None),
        ("lad, lcx,rca", ("lad", "lcx", "rca"), "multilabel", None),
        ("lad=1,lcx=2", ("lad", "lcx"), "multiclass", {0: 0, 1: 1, 2: 2, 255: 255}),
        ("rca=16,lad=6,lad=7", ("rca", "lad"), "multiclass", {0: 0, 16: 1, 6: 2, 7: 2, 255: 255}),
        ("lad=5", ("lad",), "multilabel", {0: 0, 5: 1, 255: 255}),
        ("vessel=255", ("vessel",), "multilabel", {0: 0, 255: 1}),
        ("a=1,b=2,Background=9,ignore=-1", ("a", "b"), "multiclass",
         {0: 0, 1: 1, 2: 2, 9: 0, -1: 255, 255: 255}),
        ("background=1,a=2,b=3,ignore=0", ("a", "b"), "multiclass",
         {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}),
    ],
)  # fmt: skip
def test_classes_are_named_on_the_command_line(
    text: str, names: tuple[str, ...], task: str, becomes: dict[int, int] | None
) -> None:
    table = parse_classes(text)
    assert (table.names, table.task, table.numbers, table.other) == (names, task, becomes, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", '{"0": "background", "2": "lad", "16": "rca", "*": "background"}'),
        ("c.json", '{"lad": 2, "rca": [16], "background": "*"}'),
        ("c.toml", 'lad = 2\nrca = 16\nbackground = "*"\n'),
        ("c.toml", '0 = "background"\n2 = "lad"\n16 = "rca"\n"*" = "background"\n'),
    ],
)
def test_a_table_of_classes_may_be_a_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert parse_classes(str(tmp_path / name)) == parse_classes("lad=2,rca=16,background=*")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"classes \(none\): expected 1 to 254 names"),
        ("a,,b", "classes a,,b: expected 1 to 254 names"),
        ("a,a", "one is named twice"),
        ("a=1,b", "'b' has no number, others have; give all of them one, as b=3"),
        ("a=1,=2", "2 has the name ''"),
        ("a=1,b=1", "number 1 is named twice"),
        ("a=1,b=01", "number 01 is named twice"),
        ("a=*,b=*", r"number \* is named twice"),
        ("a=x", "a=x: expected a whole number"),
        ("a=1.5", "a=1.5: expected a whole number"),
        ("a=0,b=1", "number 0 is 'a'; expected background"),
        ("background=1", r"classes \(none\): expected"),
        ("no.json", "no.json: No such file or directory; check its path"),
        ("list.json", r"list.json: expected numbers with their names, \{\"1\": \"lad\""),
        ("broken.json", "broken.json: not JSON"),
        ("broken.toml", "broken.toml: not TOML"),
        ("nested.json", r"nested.json: 1 has the name \['lad'\]; expected a text"),
        (",".join(f"c{i}={i}" for i in range(1, 300)), "expected 1 to 254 names"),
    ],
)
def test_classes_that_cannot_be_meant_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('["lad"]', encoding="utf-8")
    Path("broken.json").write_text("{1: lad}", encoding="utf-8")
    Path("broken.toml").write_text("1 = lad", encoding="utf-8")
    Path("nested.json").write_text('{"1": ["lad"]}', encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        parse_classes(text)


def write(path: Path, array: NDArray[np.generic]) -> None:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        Image.fromarray(array).save(path)


def read(
    folder: Path, table: ClassTable, *names: str | None, frame: int | None = None
) -> NDArray[np.uint8] | None:
    files = [None if n is None else Sample("a", "a.png", folder, frame, mask=n) for n in names]
    return read_labels(files, table, SIZE)


def write_palette(path: Path, mask: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(mask, mode="P")
    # Colours that have nothing to do with the numbers.
    picture.putpalette([value for i in range(256) for value in (255 - i, 7 * i % 256, 90)])
    picture.save(path)


WRITERS = {
    "grey.png": write,
    "palette.png": write_palette,
    "grey.bmp": write,
    "grey.tif": write,
    "bytes.npy": write,
    "ints.npy": lambda path, mask: write(path, mask.astype(np.int64)),
    "floats.npy": lambda path, mask: write(path, mask.astype(np.float32)),
    "deep.png": lambda path, mask: write(path, mask.astype(np.uint16)),
    "colour.png": lambda path, mask: write(path, np.repeat(mask[..., None], 3, 2)),
    "cine.npy": lambda path, mask: write(path, np.stack([mask * 0, mask, mask * 0])),
}


@pytest.mark.parametrize("name", WRITERS)
def test_numbers_are_read_from_every_kind_of_file_and_made_1_to_c(
    tmp_path: Path, name: str
) -> None:
    WRITERS[name](tmp_path / name, numbers(2, 16, 255, 7))
    table = parse_classes("rca=2,lad=16,background=7")
    mask = read(tmp_path, table, name, frame=1 if name == "cine.npy" else None)
    assert mask is not None
    assert mask.dtype == np.uint8
    assert mask.shape == (1, *SIZE)
    assert mask[0, :5, 3].tolist() == [1, 2, 255, 0, 0]


@pytest.mark.parametrize("num_bits", [1, 2, 4])
def test_grey_of_few_bits_is_read_as_it_was_numbered(tmp_path: Path, num_bits: int) -> None:
    mask = numbers(1, 1 if num_bits == 1 else 3)
    write_png_of_few_bits(tmp_path / "m.png", mask, num_bits)
    table = parse_classes("a=1,b=3")
    labels = read(tmp_path, table, "m.png")
    assert labels is not None
    assert labels[0, :3, 0].tolist() == [1, 1 if num_bits == 1 else 2, 0]


def write_png_of_few_bits(path: Path, mask: NDArray[np.uint8], num_bits: int) -> None:
    """Write a grey PNG by hand: Pillow writes such depths for palettes alone."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height_px, width_px = mask.shape
    bits = np.unpackbits(mask[..., None], axis=-1)[..., -num_bits:].reshape(height_px, -1)
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in bits)
    header = struct.pack(">IIBBBBB", width_px, height_px, num_bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_every_other_number_may_be_of_a_class_too(tmp_path: Path) -> None:
    write(tmp_path / "m.png", numbers(2, 9, 77, 255))
    mask = read(tmp_path, parse_classes("rca=2,side=*"), "m.png")
    assert mask is not None
    assert mask[0, :5, 0].tolist() == [1, 2, 2, 255, 0]


RNG = np.random.default_rng(0)
BAD_NUMBERS = {
    "unknown.png": (numbers(2, 9, 9), r"class number 9 \(60 pixels\), which no class has; known "
                    r"are 0, 1, 2, 255; add it to the classes, as NAME=9, or "
                    r"background=9 if it is none \(background=\* takes all numbers"),
    "negative.npy": (numbers(1).astype(np.int16) - 1, r"class number -1 \(1170 pixels\)"),
    "lossy.jpg": (numbers(1), "JPEG blurs class numbers; save them as PNG or .npy"),
    "colours.png": (RNG.integers(0, 255, (*SIZE, 3), dtype=np.uint8), "colours; expected class"),
    "fractions.npy": (np.full(SIZE, 0.5), "fractions; expected class numbers"),
    "nan.npy": (np.full(SIZE, np.nan), "fractions; expected class numbers"),
    "other_shape.png": (np.zeros((40, 90), np.uint8), "mask of 40 x 90 for an image of"),
    "missing.png": (None, "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_what_holds_no_class_numbers_is_refused(tmp_path: Path, name: str) -> None:
    array, message = BAD_NUMBERS[name]
    if array is not None:
        write(tmp_path / name, array)
    with pytest.raises(ImageError, match=f"^{name}: {message}"):
        read(tmp_path, parse_classes("a=1,b=2"), name)


def test_planes_come_from_a_file_a_class_and_one_that_is_lacking_does_not_count(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.png", numbers(255, 0, 3))
    write(tmp_path / "c.npy", numbers(0, 1) > 0)
    table = parse_classes("a,b,c")
    mask = read(tmp_path, table, "a.png", None, "c.npy")
    assert mask is not None
    assert mask[:, :3, 0].tolist() == [[1, 0, 1], [255] * 3, [0, 1, 0]]
    assert read(tmp_path, table, None, None, None) is None
    only = read(tmp_path, FOREGROUND, "a.png")
    assert only is not None
    assert only[0, :3, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_planes_come_from_one_file_of_as_many_planes(tmp_path: Path, suffix: str) -> None:
    # Three planes look like three channels, and shall not be taken for them.
    write(tmp_path / f"m{suffix}", np.stack([numbers(1), numbers(0, 9), numbers(7, 7, 7)]))
    mask = read(tmp_path, parse_classes("a,b,c"), f"m{suffix}", frame=5)
    assert mask is not None
    assert mask[:, :4, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]


def test_planes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", numbers(1))
    write(tmp_path / "b.png", np.zeros((80, 60), np.uint8))
    write(tmp_path / "m.npy", np.zeros((2, *SIZE), np.uint8))
    write(tmp_path / "flat.npy", np.zeros(SIZE, np.uint8))
    with pytest.raises(ImageError, match=r"a.png, b.png: masks of .*40 x 30.*; expected one size"):
        read(tmp_path, parse_classes("a,b"), "a.png", "b.png")
    with pytest.raises(ImageError, match=r"flat.npy: 1 planes .*holds class numbers, .*, as a=1,b"):
        read(tmp_path, parse_classes("a,b"), "flat.npy")
    with pytest.raises(ImageError, match=r"m.npy: 2 planes of 40 x 30; expected 3 \(a, b, c\)"):
        read(tmp_path, parse_classes("a,b,c"), "m.npy")
    with pytest.raises(ImageError, match=r"flat.npy: 1 planes of 40 x 30; expected 2"):
        read(tmp_path, parse_classes("a,b"), "flat.npy")


def test_columns_of_masks_are_resolved_as_masks_are(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere/b.png"
    (tmp_path / "set").mkdir()
    lines = ["image,mask,one,two", f"a.png,m\\a.png,o\\a.png,{outside}", "b.png,,,"]
    (tmp_path / "set/m.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = read_manifest(tmp_path / "set/m.csv", mask_columns=("two", "one"))
    first, second = manifest.samples
    two, one = first.each_mask()
    assert two is not None
    assert one is not None
    assert two.mask_path == outside
    assert str(two.mask).startswith("b-")
    assert (one.mask, one.mask_path) == ("o/a.png", tmp_path / "set/o/a.png")
    assert first.mask == "m/a.png"
    assert second.each_mask() == (None, None)
    with pytest.raises(ManifestError, match="no column 'three' with masks; it has image, mask"):
        read_manifest(tmp_path / "set/m.csv", mask_columns=("three",))


def test_folders_of_masks_beside_the_images_do_for_columns(tmp_path: Path) -> None:
    for folder in ("images/p1", "lad/p1", "rca"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("images/p1/a.png", "images/b.png", "lad/p1/a.png", "rca/b.png"):
        write(tmp_path / name, numbers(1))
    manifest = read_manifest(tmp_path, mask_columns=("lad", "rca"))
    found = {s.id: [file and file.mask for file in s.each_mask()] for s in manifest.samples}
    assert found == {"p1/a": ["lad/p1/a.png", None], "b": [None, "rca/b.png"]}
    with pytest.raises(ManifestError, match="no folder 'lcx' with masks beside images"):
        read_manifest(tmp_path, mask_columns=("lcx",))
    write(tmp_path / "rca/b.npy", numbers(1))
    with pytest.raises(ManifestError, match=r"rca/b.npy and rca/b.png are both masks of .*b.png"):
        read_manifest(tmp_path, mask_columns=("rca",))
