"""A variant does one thing, the same to picture, mask and angles, whatever the mask's grid."""

import math

import numpy as np
import pytest

from sam3cache.errors import ConfigError
from sam3cache.variants import Variant, parse_variants, split_variant_id, variant_id

GEOMETRIC = ("hflip", "vflip", "rot10", "rot-10", "rot90", "rot180", "zoom1.3", "zoom0.8")


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    """255 within a radius of a point, all as shares of the height, on any grid of that shape."""
    rows = (np.arange(height)[:, None] + 0.5) / height
    columns = (np.arange(width)[None] + 0.5) / height
    return np.where((rows - y) ** 2 + (columns - x) ** 2 < radius**2, 255, 0).astype(np.uint8)


def centre(mask_HW: np.ndarray) -> tuple[float, float]:
    """Where a disc is, in shares of the height."""
    ys, xs = np.nonzero(mask_HW)
    return float(ys.mean() + 0.5) / len(mask_HW), float(xs.mean() + 0.5) / len(mask_HW)


@pytest.mark.parametrize("name", [*GEOMETRIC, "gamma0.7"])
def test_a_mask_goes_where_its_picture_goes_on_a_grid_of_its_own(name: str) -> None:
    variant = Variant.parse(name)
    picture = variant.picture(disc(200, 240, 0.4, 0.8, 0.1)[..., None])
    mask = variant.mask(disc(90, 108, 0.4, 0.8, 0.1)[None] // 255, 200, 240)
    assert picture.shape == (200, 240, 1)
    assert (picture.dtype, mask.dtype) == (np.uint8, np.uint8)
    assert set(np.unique(mask)) <= {0, 1, 255}
    assert centre(mask[0] == 1) == pytest.approx(centre(picture[..., 0] > 127), abs=0.006)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("hflip", (0.4, 1.2 - 0.8)),
        ("vflip", (0.6, 0.8)),
        # Counter-clockwise as seen: what was at the right, 0.2 above the middle, is at the top.
        ("rot90", (0.5 - 0.2, 0.6 - 0.1)),
        ("rot180", (0.6, 0.4)),
        ("zoom1.3", (0.5 - 0.13, 0.6 + 0.26)),
        ("zoom0.8", (0.5 - 0.08, 0.6 + 0.16)),
    ],
)
def test_a_point_goes_where_the_name_says(name: str, where: tuple[float, float]) -> None:
    picture = Variant.parse(name).picture(disc(200, 240, 0.4, 0.8, 0.05)[..., None])
    assert centre(picture[..., 0] > 127) == pytest.approx(where, abs=0.004)


def test_a_small_rotation_turns_counter_clockwise() -> None:
    y, x = centre(Variant.parse("rot10").picture(disc(200, 200, 0.5, 0.8, 0.05)[..., None])[..., 0])
    angle = math.radians(10)
    assert (y, x) == pytest.approx(
        (0.5 - 0.3 * math.sin(angle), 0.5 + 0.3 * math.cos(angle)), abs=0.004
    )


def test_flips_and_half_turns_are_exact_and_undo_themselves() -> None:
    rng = np.random.default_rng(0)
    pixels_HWC = rng.integers(0, 256, (31, 44, 3), dtype=np.uint8)
    mask_KHW = rng.integers(0, 6, (2, 13, 18), dtype=np.uint8)
    expected = {
        "hflip": (pixels_HWC[:, ::-1], mask_KHW[:, :, ::-1]),
        "vflip": (pixels_HWC[::-1], mask_KHW[:, ::-1]),
        "rot180": (pixels_HWC[::-1, ::-1], mask_KHW[:, ::-1, ::-1]),
    }
    for name, (picture, mask) in expected.items():
        variant = Variant.parse(name)
        assert np.array_equal(variant.picture(pixels_HWC), picture)
        assert np.array_equal(variant.mask(mask_KHW, 31, 44), mask)
        assert np.array_equal(variant.picture(variant.picture(pixels_HWC)), pixels_HWC)


def test_what_comes_in_from_outside_is_black_in_the_picture_and_ignored_in_the_mask() -> None:
    white, mask = np.full((60, 60, 1), 255, np.uint8), np.ones((1, 30, 30), np.uint8)
    for name in ("rot10", "zoom0.8"):
        variant = Variant.parse(name)
        picture, turned = variant.picture(white)[..., 0], variant.mask(mask, 60, 60)[0]
        assert picture[0, 0] == 0
        assert turned[0, 0] == 255
        assert set(np.unique(turned)) == {1, 255}
        assert (picture[30, 30], turned[15, 15]) == (255, 1)
    grown = Variant.parse("zoom1.3")
    assert (grown.picture(white) == 255).all()
    assert (grown.mask(mask, 60, 60) == 1).all()


def test_class_numbers_and_ignored_pixels_stay_what_they_are() -> None:
    mask = np.full((1, 40, 40), 7, np.uint8)
    mask[:, :20] = 255
    turned = Variant.parse("rot10").mask(mask, 80, 80)
    assert set(np.unique(turned)) == {7, 255}


def test_gamma_is_a_table_and_leaves_the_mask_alone() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    changed = Variant.parse("gamma0.5").picture(values)
    assert changed.ravel()[[0, 64, 255]].tolist() == [0, 128, 255]
    assert Variant.parse("gamma") == Variant.parse("gamma1.5")
    mask = np.ones((1, 4, 4), np.uint8)
    assert np.array_equal(Variant.parse("gamma").mask(mask, 16, 16), mask)


@pytest.mark.parametrize(
    ("name", "angles"),
    [("hflip", (-30.0, 20.0)), ("vflip", (30.0, -20.0)), ("rot10", (30.0, 20.0))],
)
def test_only_a_flip_changes_the_view_angles(name: str, angles: tuple[float, float]) -> None:
    assert Variant.parse(name).angles(30.0, 20.0) == angles
    assert math.isnan(Variant.parse(name).angles(math.nan, 20.0)[0])


def test_a_variant_has_one_name_and_its_id_tells_it() -> None:
    names = parse_variants(["hflip", "rot10.0", "rot-5", "gamma", "zoom1.20"])
    assert names == ("hflip", "rot10", "rot-5", "gamma1.5", "zoom1.2")
    assert [split_variant_id(variant_id("a~b", name)) for name in names] == [
        ("a~b", name) for name in names
    ]
    for other in ("hflip", "~hflip", "a~b", "a~rot10.0", "a~gamma", "a"):
        assert split_variant_id(other) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["flip"], r"'flip' is unknown; expected some of hflip, vflip, rotN"),
        (["hflip2"], r"'hflip2' is unknown"),
        (["rot"], r"'rot' is unknown"),
        (["rot1e3"], r"'rot1e3' is unknown"),
        ([""], r"'' is unknown"),
        (["rot0"], r"'rot0': expected -180 to 180 behind rot, and not 0, which changes nothing"),
        (["rot270"], r"'rot270': expected -180 to 180"),
        (["gamma1.0"], r"expected 0.2 to 5 behind gamma, and not 1"),
        (["gamma0"], r"expected 0.2 to 5"),
        (["zoom3"], r"expected 0.5 to 2"),
        (["gamma", "hflip", "gamma1.5"], r"gamma,hflip,gamma1.5: gamma1.5 is named twice"),
    ],
)
def test_a_name_that_is_none_is_refused(names: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_variants(names)
