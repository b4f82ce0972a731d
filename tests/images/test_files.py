"""Every format goes through real files, written by other libraries than those that read them
where there are two."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from sam3cache.errors import ImageError
from sam3cache.images.files import MAX_PIXELS, open_picture

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 30), dtype=np.uint8)
RGB = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (40, 30)).astype(np.uint16)
RGB16 = RNG.integers(0, 65536, (40, 30, 3)).astype(np.uint16)
RGBA = np.concatenate([RGB, GREY[..., None]], axis=-1)
RGBA16 = np.concatenate([RGB16, GREY16[..., None]], axis=-1)
COLOUR_PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def read(path, **kwargs):
    with open_picture(path, path.name, **kwargs) as picture:
        pixels = picture.read(0)
        assert pixels.shape == (picture.height_px, picture.width_px, picture.num_channels)
    return pixels


def pillow(pixels, mode=None, **options):
    def write(path):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(path, **options)

    return write


def palette(colours, **options):
    def write(path):
        image = Image.frombytes("P", (30, 40), GREY.tobytes())
        image.putpalette(colours.tobytes())
        image.save(path, **options)

    return write


def png16(pixels):
    return lambda path: path.write_bytes(imagecodecs.png_encode(pixels))


def tiff(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


def npy(pixels):
    return lambda path: np.save(path, pixels)


GREY_RAMP = np.repeat(np.arange(255, -1, -1, dtype=np.uint8)[:, None], 3, axis=1)
BITS = GREY > 127

EXACT = {
    "grey.png": (pillow(GREY), GREY),
    "rgb.png": (pillow(RGB), RGB),
    "rgba.png": (pillow(RGBA), RGB),
    "grey alpha.png": (pillow(np.stack([GREY, GREY], axis=-1)), GREY),
    "1 bit.png": (pillow(BITS), BITS * np.uint8(255)),
    "grey 16.png": (png16(GREY16), GREY16),
    "rgb 16.png": (png16(RGB16), RGB16),
    "rgba 16.png": (png16(RGBA16), RGB16),
    "palette.png": (palette(COLOUR_PALETTE), COLOUR_PALETTE[GREY]),
    "palette clear.png": (palette(COLOUR_PALETTE, transparency=b"\x00\x80"), COLOUR_PALETTE[GREY]),
    "grey palette.png": (palette(GREY_RAMP), 255 - GREY),
    "grey.bmp": (pillow(GREY), GREY),
    "rgb.bmp": (pillow(RGB), RGB),
    "palette.bmp": (palette(COLOUR_PALETTE), COLOUR_PALETTE[GREY]),
    "grey.tif": (tiff(GREY), GREY),
    "rgb.tif": (tiff(RGB, photometric="rgb"), RGB),
    "rgba.tif": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGB),
    "grey 16.tif": (tiff(GREY16), GREY16),
    "grey 16 big.tif": (tiff(GREY16, byteorder=">"), GREY16),
    "rgb 16.tif": (tiff(RGB16, photometric="rgb", compression="zlib"), RGB16),
    "rgb 16 planar.tif": (
        tiff(np.moveaxis(RGB16, -1, 0), photometric="rgb", planarconfig="separate"),
        RGB16,
    ),
    "rgba 16 tiled.tif": (
        tiff(RGBA16, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16)),
        RGB16,
    ),
    "lzw.tif": (pillow(RGB, compression="tiff_lzw"), RGB),
    "float.tif": (tiff(GREY.astype(np.float32) / 3), GREY.astype(np.float32) / 3),
    "white is zero.tif": (tiff(GREY, photometric="miniswhite"), 255 - GREY),
    "white is zero 16.tif": (tiff(GREY16, photometric="miniswhite"), 65535 - GREY16),
    "1 bit.tif": (pillow(BITS), BITS),
    "fax.tif": (pillow(BITS, compression="group4"), BITS),
    "palette.tif": (palette(COLOUR_PALETTE), COLOUR_PALETTE[GREY]),
    "bigtiff.tif": (tiff(GREY, bigtiff=True), GREY),
    "grey.npy": (npy(GREY), GREY),
    "one channel.npy": (npy(GREY[..., None]), GREY),
    "rgb.npy": (npy(RGB), RGB),
    "fortran.npy": (npy(np.asfortranarray(RGB16)), RGB16),
    "float.npy": (npy(GREY / 7), GREY / 7),
    "big endian.npy": (npy(GREY16.astype(">u2")), GREY16),
    "a png in disguise.jpg": (lambda path: pillow(GREY, format="png")(path), GREY),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_lossless_file_gives_its_exact_pixels(tmp_path, name):
    write, expected = EXACT[name]
    write(tmp_path / name)
    pixels = read(tmp_path / name)
    assert pixels.dtype.newbyteorder("=") == expected.dtype
    assert np.array_equal(pixels, expected if expected.ndim == 3 else expected[..., None])


@pytest.mark.parametrize(("pixels", "mode"), [(GREY, None), (RGB, None), (RGB, "CMYK")])
def test_a_jpeg_gives_what_pillow_decodes(tmp_path, pixels, mode):
    path = tmp_path / "a.jpg"
    pillow(pixels, mode, quality=90)(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L" if pixels.ndim == 2 else "RGB"))
    assert np.array_equal(read(path), expected.reshape(40, 30, -1))
    with open_picture(path, "a.jpg") as picture:
        assert picture.is_lossy


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_applies_it(tmp_path, orientation, suffix):
    ramp = np.linspace(0, 255, 40 * 30).reshape(40, 30).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    transposed = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = Image.fromarray(ramp)
    if orientation in transposed:
        upright = upright.transpose(transposed[orientation])
    if suffix == "tif":
        tifffile.imwrite(path, ramp, extratags=[(274, "H", 1, orientation, True)])
    else:
        Image.fromarray(ramp).save(path, exif=exif)
    pixels = read(path)[..., 0]
    assert pixels.shape == np.asarray(upright).shape
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() <= (8 if suffix == "jpg" else 0)


def test_16_bit_colour_png_with_orientation_keeps_its_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = imagecodecs.png_encode(RGB16)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    sized = (len(chunk) - 4).to_bytes(4, "big") + chunk
    crc = imagecodecs.zlib_crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data[:33] + sized + crc + data[33:])
    assert np.array_equal(read(tmp_path / "a.png"), np.rot90(RGB16, -1))


CINE = RNG.integers(0, 256, (5, 40, 30), dtype=np.uint8)
COLOUR_CINE = RNG.integers(0, 256, (5, 40, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "write", "cine"),
    [
        ("a.npy", npy(CINE), CINE[..., None]),
        ("a.npy", npy(COLOUR_CINE), COLOUR_CINE),
        ("a.npy", npy(CINE[..., None]), CINE[..., None]),
        ("a.npy", npy(CINE[:1]), CINE[:1, ..., None]),
        ("a.tif", tiff(CINE, photometric="minisblack"), CINE[..., None]),
        ("a.tif", tiff(CINE, imagej=True), CINE[..., None]),
        ("a.tif", tiff(COLOUR_CINE, photometric="rgb", compression="zlib"), COLOUR_CINE),
    ],
)
def test_a_cine_gives_each_frame(tmp_path, name, write, cine):
    write(tmp_path / name)
    with open_picture(tmp_path / name, name, frame=0) as picture:
        assert picture.num_frames == len(cine)
        for index in range(len(cine)):
            assert np.array_equal(picture.read(index), cine[index])


@pytest.mark.parametrize(
    ("shape", "frame", "is_mask", "num_frames"),
    [
        ((8, 6), None, False, None),
        ((8, 6), 0, False, None),
        ((8, 6, 3), None, False, None),
        ((8, 6, 3), 2, False, 8),  # a frame was asked for: a cine of 8 frames of 6 x 3
        ((8, 6, 4), None, False, 8),
        ((8, 6, 3), 2, True, None),  # a mask may be a still beside a cine
        ((1, 8, 6), 2, True, None),
        ((8, 6, 4), 2, True, 8),
    ],
)
def test_what_a_three_dimensional_array_is(tmp_path, shape, frame, is_mask, num_frames):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with open_picture(tmp_path / "a.npy", "a", frame=frame, is_mask=is_mask) as picture:
        assert picture.num_frames == num_frames


class Pickled:
    """What an object array would run when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the array was unpickled",))


def bomb_png(path):
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    data = bytearray(imagecodecs.png_encode(GREY))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = imagecodecs.zlib_crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)


def half(write):
    def damage(path):
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return damage


BAD = {
    "absent": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "folder"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "one byte": (lambda path: path.write_bytes(b"x"), "not an image"),
    "text": (lambda path: path.write_text("hello, this is no picture"), "not an image"),
    "half a png": (half(pillow(RGB, format="png")), "truncated"),
    "half a 16-bit png": (half(png16(RGB16)), "truncated"),
    "half a jpeg": (half(pillow(RGB, format="jpeg")), "truncated"),
    "half a bmp": (half(pillow(RGB, format="bmp")), "truncated"),
    "half a tiff": (half(tiff(RGB, photometric="rgb")), "truncated"),
    "half a compressed tiff": (
        half(tiff(RGB, photometric="rgb", compression="zlib", metadata=None)),
        "truncated",
    ),
    "half an npy": (half(lambda path: path.write_bytes(npy_bytes(RGB))), "truncated"),
    "the head of an npy": (lambda path: path.write_bytes(npy_bytes(RGB)[:40]), "truncated"),
    "a png's signature": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "not an image"),
    "a tiff's signature": (lambda path: path.write_bytes(b"II*\0"), "truncated"),
    "a bomb": (bomb_png, "pixels"),
    "objects": (
        lambda path: path.write_bytes(npy_bytes(np.array([[Pickled()]], dtype=object))),
        "damaged",
    ),
    "strings": (lambda path: path.write_bytes(npy_bytes(np.array([["a"]]))), "type"),
    "complex": (lambda path: path.write_bytes(npy_bytes(GREY * 1j)), "type complex"),
    "no rows": (lambda path: path.write_bytes(npy_bytes(np.zeros((0, 512)))), "no pixels"),
    "no frames": (lambda path: path.write_bytes(npy_bytes(np.zeros((0, 5, 5)))), "no pixels"),
    "one axis": (lambda path: path.write_bytes(npy_bytes(np.zeros(5))), "shape"),
    "five axes": (lambda path: path.write_bytes(npy_bytes(np.zeros((1,) * 5))), "shape"),
    "two channels": (lambda path: path.write_bytes(npy_bytes(np.zeros((2, 5, 5, 2)))), "shape"),
    "cmyk tiff": (
        tiff(RGBA, photometric="separated"),
        "SEPARATED",
    ),
    "five channels": (
        tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
        "5 channels",
    ),
}


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line_without_its_path(tmp_path, capfd, case):
    write, words = BAD[case]
    path = tmp_path / "file"
    write(path)
    with pytest.raises(ImageError) as caught, open_picture(path, "images/a.png") as picture:
        picture.read(0)
    message = str(caught.value)
    assert words in message
    assert message.startswith("images/a.png: ")
    assert "\n" not in message
    assert str(tmp_path) not in message
    assert len(message) < 250
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("file_name", ["DOE" * 200, "DOE\x07" * 200])
def test_a_name_that_the_system_refuses_is_not_repeated(tmp_path, file_name):
    with pytest.raises(ImageError) as caught, open_picture(tmp_path / file_name, "images/a.png"):
        pass
    assert "DOE" not in str(caught.value)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_read(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.uint8))
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (side, side)})
        file.truncate(file.tell() + side * side)  # sparse: takes no disk
    with pytest.raises(ImageError, match="shrink"):
        read(tmp_path / "a.npy")


DAMAGEABLE = [
    "rgb.png",
    "palette.png",
    "rgb 16.png",
    "rgb.bmp",
    "rgb.tif",
    "rgb 16.tif",
    "rgba 16 tiled.tif",
    "fax.tif",
    "palette.tif",
    "float.npy",
]


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_whatever_bytes_are_damaged_only_an_image_error_comes_out(tmp_path, capfd, name):
    EXACT[name][0](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(1)
    num_refused = 0
    for attempt in range(60):
        damaged = bytearray(data)
        if attempt % 3 == 0:
            del damaged[rng.integers(1, len(data)) :]
        else:
            for position in rng.integers(0, min(len(data), 300), size=4):
                damaged[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(damaged)
        try:
            read(tmp_path / name)
        except ImageError as error:
            num_refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert num_refused >= 18
    assert capfd.readouterr() == ("", "")
