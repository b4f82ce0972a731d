import os
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from sam3cache.errors import ImageError
from sam3cache.images import (
    ImageInfo,
    close_kept_files,
    probe,
    read_image,
    read_manifest,
    read_mask,
)
from sam3cache.records import Sample

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 30), dtype=np.uint8)


def save(path: Path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)


def sample(root, image, mask=None, *, frame=None, image_name="a.npy", mask_name="m.npy"):
    """Write an image, and a mask when there is one, and return their sample."""
    save(root / image_name, image)
    if mask is not None:
        save(root / mask_name, mask)
    return Sample("a", image_name, root, frame=frame, mask=None if mask is None else mask_name)


def exact_window(values):
    """The values at the ranks of the 0.5 and 99.5 percentiles, from the definition."""
    ordered = sorted(values.ravel().tolist())
    ranks = [-(-len(ordered) * p // 1000) for p in (5, 995)]
    return ordered[max(0, ranks[0] - 1)], ordered[ranks[1] - 1]


def windowed(values, low, high):
    return np.rint(((values.astype(np.float64) - low) / (high - low) * 255).clip(0, 255))


def test_8_bits_stay_as_they_are(tmp_path):
    assert np.array_equal(read_image(sample(tmp_path, GREY))[..., 0], GREY)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int8", "int32", "uint32", "uint64", ">u2"])
def test_other_integers_are_windowed_by_the_files_percentiles(tmp_path, dtype):
    info = np.iinfo(dtype)
    values = RNG.integers(max(info.min, -5000), min(info.max, 9000), (50, 61)).astype(dtype)
    expected = windowed(values, *exact_window(values))
    assert np.array_equal(read_image(sample(tmp_path, values))[..., 0], expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_windowed_by_the_files_percentiles(tmp_path, dtype):
    values = RNG.normal(size=(50, 61, 3)).astype(dtype)
    expected = windowed(values, *exact_window(values))
    assert np.array_equal(read_image(sample(tmp_path, values)), expected)


def test_true_16_bit_colours_reach_the_window(tmp_path):
    values = RNG.integers(0, 300, (40, 30, 3)).astype(np.uint16)  # all alike in their upper byte
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    pixels = read_image(Sample("a", "a.png", tmp_path))
    assert np.array_equal(pixels, windowed(values, *exact_window(values)))
    assert len(np.unique(pixels)) > 200


@pytest.mark.parametrize("name", ["cine.npy", "cine.tif"])
def test_the_frames_of_a_cine_share_the_window_of_the_file(tmp_path, name):
    cine = (
        RNG.integers(0, 1000, (6, 20, 30)).astype(np.uint16)
        * np.arange(1, 7, dtype=np.uint16)[:, None, None]
    )
    window = exact_window(cine)
    for frame in (0, 5):
        pixels = read_image(sample(tmp_path, cine, frame=frame, image_name=name))
        assert np.array_equal(pixels[..., 0], windowed(cine[frame], *window))


STACK = (
    RNG.integers(0, 1000, (4, 20, 30)).astype(np.float32)
    * np.array([1, 5, 0.2, 300], np.float32)[:, None, None]
)


def write_stack(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


def of_stack(root, name):
    """All pictures of a container, which is its own manifest."""
    samples = read_manifest(root / name).samples
    return [read_image(sample)[..., 0] for sample in samples]


@pytest.fixture
def files_are_closed():
    yield
    close_kept_files()


@pytest.mark.usefixtures("files_are_closed")
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_a_picture_of_a_stack_depends_on_no_other(tmp_path, suffix, dtype):
    stack = STACK.astype(dtype)
    write_stack(tmp_path / f"three{suffix}", images=stack[:3])
    write_stack(tmp_path / f"four{suffix}", images=stack)
    write_stack(tmp_path / f"groups{suffix}", **{f"p{t}/image": one for t, one in enumerate(stack)})
    expected = [windowed(one, *exact_window(one)) for one in stack]
    assert np.array_equal(of_stack(tmp_path, f"three{suffix}"), expected[:3])
    assert np.array_equal(of_stack(tmp_path, f"four{suffix}"), expected)
    assert np.array_equal(of_stack(tmp_path, f"groups{suffix}"), expected)


@pytest.mark.usefixtures("files_are_closed")
@pytest.mark.parametrize(
    ("name", "array", "source"),
    [
        ("a.h5", "p1/cine", "a.h5::p1/cine"),
        ("a.npz", "p1/cine", "a.npz::p1/cine"),
        ("a.npz", "cine", "a.npz"),
    ],
)
def test_a_cine_in_a_container_shares_one_window(tmp_path, name, array, source):
    write_stack(tmp_path / name, **{array: STACK})
    pixels = read_image(Sample("a", source, tmp_path, frame=1))[..., 0]
    assert np.array_equal(pixels, windowed(STACK[1], *exact_window(STACK)))


def test_a_changed_cine_gets_a_new_window(tmp_path):
    cine = RNG.integers(0, 1000, (3, 20, 30)).astype(np.uint16)
    before = read_image(sample(tmp_path, cine, frame=1))
    changed = np.concatenate([cine[:2], cine[2:] * 60])
    after = sample(tmp_path, changed, frame=1)
    os.utime(tmp_path / "a.npy", ns=(1, 1))  # of equal size, and quicker than the clock ticks
    assert read_image(after).mean() < before.mean() / 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((4, 4), 7, np.uint16), 0),
        (np.full((4, 4), 0.25), 0),
        (np.zeros((4, 4), bool), 0),
        (np.ones((4, 4), bool), 255),
    ],
)
def test_a_constant_picture_is_no_division_by_zero(tmp_path, values, expected):
    assert (read_image(sample(tmp_path, values)) == expected).all()


def test_rare_bright_pixels_on_a_constant_ground_stay_visible(tmp_path):
    values = np.zeros((100, 100), np.uint16)
    values[3, 5] = 900
    pixels = read_image(sample(tmp_path, values))[..., 0]
    assert pixels[3, 5] == 255
    assert pixels.sum() == 255


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("frame", [None, 0])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, frame):
    values = np.zeros((3, 8, 8), np.float32)
    values[2, 4, 4] = bad
    with pytest.raises(ImageError, match="not finite"):
        read_image(sample(tmp_path, values if frame == 0 else values[2], frame=frame))


@pytest.mark.parametrize(
    ("shape", "frame", "words"),
    [
        ((5, 8, 8), None, "cine of 5 frames"),
        ((5, 8, 8), 5, "0 to 4"),
        ((5, 8, 8, 3), 70, "no frame 70"),
        ((8, 8), 1, "still"),
        ((3, 8, 8), None, "cine of 3 frames"),
    ],
)
@pytest.mark.parametrize("function", [probe, read_image])
def test_a_frame_that_is_not_there_is_refused(tmp_path, function, shape, frame, words):
    with pytest.raises(ImageError, match=words):
        function(sample(tmp_path, np.zeros(shape, np.uint8), frame=frame))


BLOB = np.zeros((8, 6), bool)
BLOB[2:5, 1:4] = True


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("m.npy", BLOB),
        ("m.npy", BLOB.astype(np.uint8)),
        ("m.npy", BLOB.astype(np.uint8) * 255),
        ("m.npy", BLOB.astype(np.int64) * 14),
        ("m.npy", np.where(BLOB, 3, -1)),
        ("m.npy", BLOB * 0.5),
        ("m.npy", np.where(BLOB, 0.9, 0.49).astype(np.float32)),
        ("m.npy", BLOB * 255.0),
        ("m.npy", BLOB[..., None]),
        ("m.npy", BLOB[None]),
        ("m.npy", np.stack([BLOB * 0, BLOB, BLOB * 0], axis=-1).astype(np.uint8)),
        ("m.png", BLOB),
        ("m.png", BLOB.astype(np.uint8)),
        ("m.png", np.stack([BLOB * 200, BLOB * 0, BLOB * 0], axis=-1).astype(np.uint8)),
        ("m.png", BLOB.astype(np.uint16) * 300),
        ("m.tif", BLOB.astype(np.uint8) * 255),
        ("m.tif", BLOB.astype(np.float32)),
    ],
)
def test_what_is_foreground(tmp_path, name, values):
    mask = read_mask(sample(tmp_path, np.zeros((8, 6), np.uint8), values, mask_name=name))
    assert mask.dtype == np.uint8
    assert mask.shape == (1, 8, 6)
    assert np.array_equal(mask[0], BLOB)


def test_a_jpeg_mask_is_cut_in_the_middle(tmp_path):
    large = BLOB.repeat(21, 0).repeat(21, 1)  # edges inside JPEG's blocks, so that it rings
    values = large.astype(np.uint8) * 255
    Image.fromarray(values).save(tmp_path / "m.jpg", quality=60)
    with Image.open(tmp_path / "m.jpg") as decoded:
        assert (np.asarray(decoded)[~large] > 0).any()  # so "above 0" would be wrong
    save(tmp_path / "a.npy", values)
    mask = read_mask(Sample("a", "a.npy", tmp_path, mask="m.jpg"))
    assert np.array_equal(mask[0], large)


def test_a_palette_mask_is_read_by_its_colours(tmp_path):
    image = Image.frombytes("P", (6, 8), (1 - BLOB).astype(np.uint8).tobytes())
    image.putpalette(bytes([255, 255, 255, 0, 0, 0]))  # index 0 is white
    image.save(tmp_path / "m.png")
    save(tmp_path / "a.npy", np.zeros((8, 6), np.uint8))
    assert np.array_equal(read_mask(Sample("a", "a.npy", tmp_path, mask="m.png"))[0], BLOB)


@pytest.mark.parametrize("values", [BLOB - 0.5, np.where(BLOB, np.nan, 0.0)])
def test_a_float_mask_that_is_no_probability_is_refused(tmp_path, values):
    with pytest.raises(ImageError, match="probabilities"):
        read_mask(sample(tmp_path, np.zeros((8, 6), np.uint8), values))


def test_no_mask_is_none(tmp_path):
    assert read_mask(sample(tmp_path, GREY)) is None


def test_a_mask_cine_takes_the_same_frame(tmp_path):
    cine, masks = np.zeros((2, 3, 8, 6), np.uint8)
    masks[1] = BLOB
    found = [read_mask(sample(tmp_path, cine, masks, frame=t)).sum() for t in range(3)]
    assert found == [0, BLOB.sum(), 0]


def test_a_still_mask_serves_whichever_frame_it_is_given_for(tmp_path):
    cine = np.zeros((3, 8, 6), np.uint8)
    assert np.array_equal(read_mask(sample(tmp_path, cine, BLOB, frame=2))[0], BLOB)


def test_a_mask_cine_shorter_than_its_image_is_refused(tmp_path):
    cine = np.zeros((3, 8, 6), np.uint8)
    with pytest.raises(ImageError, match=r"m\.npy: no frame 2"):
        probe(sample(tmp_path, cine, cine[:2], frame=2))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ((1016, 1016), (512, 512)),
        ((800, 600), (400, 300)),
        ((101, 67), (50, 34)),
        ((1000, 333), (100, 33)),
        ((1, 1), (7, 7)),
    ],
)
def test_a_mask_may_have_a_grid_of_its_own(tmp_path, image, mask):
    found = probe(sample(tmp_path, np.zeros(image, np.uint8), np.zeros(mask, bool)))
    assert (found.height_px, found.width_px) == image
    assert (found.mask_height_px, found.mask_width_px) == mask


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ((800, 600), (600, 800)),
        ((1016, 1016), (512, 500)),
        ((1000, 1000), (1000, 985)),
        ((512, 512), (512, 3)),
    ],
)
@pytest.mark.parametrize("function", [probe, read_mask])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(tmp_path, function, image, mask):
    with pytest.raises(ImageError) as caught:
        function(sample(tmp_path, np.zeros(image, np.uint8), np.zeros(mask, bool)))
    assert f"{mask[0]} x {mask[1]}" in str(caught.value)
    assert f"{image[0]} x {image[1]}" in str(caught.value)


def save_turned(path, array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)


def test_the_probe_tells_what_was_turned_and_what_was_not(tmp_path):
    save_turned(tmp_path / "a.jpg", GREY, 6)
    save_turned(tmp_path / "turned.png", GREY, 6)
    save(tmp_path / "upright.png", np.rot90(GREY, -1))
    turned = probe(Sample("a", "a.jpg", tmp_path, mask="turned.png"))
    upright = probe(Sample("a", "a.jpg", tmp_path, mask="upright.png"))
    assert (turned.orientation, turned.mask_orientation) == (6, 6)
    assert (upright.orientation, upright.mask_orientation) == (6, 1)
    assert (upright.height_px, upright.width_px) == (30, 40)


def test_a_mask_as_its_turned_image_lies_in_the_file_is_refused_with_the_reason(tmp_path):
    save_turned(tmp_path / "a.jpg", GREY, 6)
    save(tmp_path / "stored.png", GREY)
    with pytest.raises(ImageError, match=r"40 x 30 for .* 30 x 40 .*orientation tag \(6\)"):
        probe(Sample("a", "a.jpg", tmp_path, mask="stored.png"))
    save(tmp_path / "other.png", GREY[:, :7])
    with pytest.raises(ImageError, match="same aspect ratio"):
        probe(Sample("a", "a.jpg", tmp_path, mask="other.png"))


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation):
    save_turned(tmp_path / "a.png", GREY, orientation)
    found = probe(Sample("a", "a.png", tmp_path))
    assert (found.orientation, found.height_px, found.width_px) == (1, *GREY.shape)


def test_a_missing_mask_is_found_by_the_probe(tmp_path):
    save(tmp_path / "a.npy", GREY)
    with pytest.raises(ImageError, match=r"m\.png: no such file"):
        probe(Sample("a", "a.npy", tmp_path, mask="m.png"))


def test_the_probe_says_what_the_headers_say(tmp_path):
    written = sample(tmp_path, RNG.integers(0, 9, (3, 20, 30, 3)).astype(np.uint16), frame=1)
    stat = (tmp_path / "a.npy").stat()
    assert probe(written) == ImageInfo(20, 30, 3, None, None, stat.st_size, stat.st_mtime_ns)


def test_the_probe_and_one_frame_leave_a_huge_cine_on_disk(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1, 1), np.uint8))
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (1_000, 1024, 1024)})
        file.truncate(file.tell() + 1_000 * 1024 * 1024)  # sparse: takes no disk
    last = Sample("a", "a.npy", tmp_path, frame=999)
    assert probe(last).size_bytes > 1_000 * 1024 * 1024
    assert read_image(last).shape == (1024, 1024, 1)
