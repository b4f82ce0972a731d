import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sam3cache.images import letterbox_image, pixel_hash, preprocessing_fields

RNG = np.random.default_rng(0)


def smooth(height, width, num_channels):
    """A picture with both edges and gradients, as an angiogram has."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c)) * np.cos(y / 9) * 60 + 120 for c in range(num_channels)]
    return (np.stack(waves, axis=-1) + RNG.integers(0, 40, (height, width, 1))).astype(np.uint8)


SIZES = [
    ((1016, 1016, 1), (1008, 1008)),
    ((800, 600, 3), (1008, 756)),
    ((512, 768, 1), (672, 1008)),
    ((64, 64, 3), (1008, 1008)),  # upscaled
    ((1500, 40, 1), (1008, 27)),
    ((1, 1, 1), (1008, 1008)),
    ((1, 3000, 1), (1, 1008)),
]


@pytest.mark.parametrize("mode", ["letterbox", "squash"])
@pytest.mark.parametrize(("shape", "content"), SIZES)
def test_the_content_equals_the_official_processors_resize(shape, content, mode):
    pixels = smooth(*shape)
    content = (1008, 1008) if mode == "squash" else content
    square, letterbox = letterbox_image(pixels, mode)
    official = v2.Resize(content, antialias=True)(torch.from_numpy(pixels).permute(2, 0, 1))

    assert square.dtype == torch.uint8
    assert square.shape == (shape[2], 1008, 1008)
    assert (letterbox.content_height_px, letterbox.content_width_px) == content
    assert torch.equal(square[:, : content[0], : content[1]], official)


@pytest.mark.parametrize(("shape", "content"), SIZES)
def test_the_content_is_within_one_step_of_the_exact_average_and_of_pillows(shape, content):
    pixels = smooth(*shape)
    square, _ = letterbox_image(pixels)
    ours = square[:, : content[0], : content[1]].double()
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(),
        size=content,
        mode="bilinear",
        antialias=True,
    )[0]
    assert (ours - exact).abs().max() <= 1 + 1e-6

    for channel in range(shape[2]):
        image = Image.fromarray(pixels[..., channel])
        pillow = np.asarray(image.resize(content[::-1], Image.Resampling.BILINEAR))
        steps = np.abs(ours[channel].numpy() - pillow)
        # Both round twice, once an axis, so that one pixel in 100,000 may be two steps apart.
        assert (steps > 1).mean() < 1e-4
        assert steps.max() <= 2


def test_padding_is_zero_at_the_bottom_and_at_the_right():
    wide, _ = letterbox_image(np.full((50, 100, 1), 200, np.uint8))
    assert (wide[:, :504] == 200).all()
    assert (wide[:, 504:] == 0).all()
    tall, _ = letterbox_image(np.full((100, 50, 3), 200, np.uint8))
    assert (tall[:, :, :504] == 200).all()
    assert (tall[:, :, 504:] == 0).all()


def test_a_picture_of_the_input_size_is_untouched():
    pixels = RNG.integers(0, 256, (1008, 1008, 3), dtype=np.uint8)
    square, _ = letterbox_image(pixels)
    assert np.array_equal(square.permute(1, 2, 0).numpy(), pixels)


def test_flipped_views_of_an_array_are_taken_as_they_look():
    pixels = RNG.integers(0, 256, (1008, 1008, 1), dtype=np.uint8)
    square, _ = letterbox_image(pixels[::-1])
    assert np.array_equal(square[0].numpy(), pixels[::-1, :, 0])


def test_a_fingerprint_tells_the_modes_apart():
    letterbox, squash = preprocessing_fields("letterbox"), preprocessing_fields("squash")
    assert {name for name in letterbox if letterbox[name] != squash[name]} == {"resize_mode"}
    assert all(isinstance(value, str | int | float) for value in letterbox.values())


def test_the_hash_is_of_shape_type_and_values():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    expected = hashlib.sha256(b"(3, 4, 1) |u1\n" + bytes(range(12))).hexdigest()
    assert pixel_hash(pixels) == expected
    assert pixel_hash(np.asfortranarray(pixels)) == expected
    others = [pixels.reshape(4, 3, 1), pixels.view(np.int8), pixels[::-1]]
    assert len({expected, *map(pixel_hash, others)}) == 4
