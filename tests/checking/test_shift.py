"""Where a mask fits its picture best, whatever the picture is like."""

import numpy as np
import pytest

from sam3cache.checking import Shift, best_shift, common_shift

HEIGHT_PX, WIDTH_PX = 300, 400


def vessel(down_px=0, right_px=0):
    """A winding line and a branch of it, as a mask."""
    rows, columns = np.mgrid[:HEIGHT_PX, :WIDTH_PX].astype(np.float64)
    rows, columns = rows - down_px, columns - right_px
    trunk = np.abs(rows - 150 - 60 * np.sin(columns / 60)) < 4
    branch = (np.abs(columns - 220 - 0.4 * (rows - 150)) < 3) & (rows > 150) & (rows < 270)
    return trunk & (columns > 40) & (columns < 360) | branch


def picture(contrast=-50.0, noise=12.0, channels=1):
    rng = np.random.default_rng(0)
    ground = 90 + np.linspace(0, 80, WIDTH_PX) + rng.normal(0, noise, (HEIGHT_PX, WIDTH_PX))
    grey = (ground + contrast * vessel()).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], channels, axis=-1)


@pytest.mark.parametrize(("down_px", "right_px"), [(0, 0), (8, 0), (-6, 9), (16, -16)])
@pytest.mark.parametrize("options", [{}, {"contrast": 50.0, "channels": 3}])
def test_the_way_back_is_found_whether_vessels_are_dark_or_bright(down_px, right_px, options):
    shift = best_shift(picture(**options), vessel(down_px, right_px))
    assert shift.grid_px == WIDTH_PX / 256
    # To a pixel of the working grid.
    assert shift.down_px == pytest.approx(-down_px, abs=shift.grid_px)
    assert shift.right_px == pytest.approx(-right_px, abs=shift.grid_px)
    assert 0.5 < shift.correlation <= 1
    assert shift.correlation >= shift.correlation_here
    assert shift.is_clear == bool(down_px or right_px)


def test_a_mask_on_a_smaller_grid_fits_as_well():
    shift = best_shift(picture(), vessel(8, 0)[::2, ::2])
    assert shift.is_clear
    assert shift.down_px == pytest.approx(-8, abs=shift.grid_px)


@pytest.mark.parametrize(
    ("pixels", "mask"),
    [
        (np.full((64, 64, 1), 9, np.uint8), np.eye(64) > 0),  # a picture of nothing
        (
            np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8),
            np.zeros((64, 64), bool),
        ),
        (np.random.default_rng(0).integers(0, 256, (64, 64, 1), np.uint8), np.ones((64, 64), bool)),
        (np.full((1, 1, 3), 9, np.uint8), np.ones((1, 1), bool)),
    ],
)
def test_nothing_is_told_where_there_is_nothing_to_tell(pixels, mask):
    assert best_shift(pixels, mask) is None


def test_chance_is_not_told():
    rng = np.random.default_rng(1)
    for _ in range(10):
        noise = rng.integers(0, 256, (128, 128, 1), np.uint8)
        shift = best_shift(noise, vessel()[100:228, 100:228])
        assert not shift.is_clear


def shifts(*ways_px, correlation=0.6):
    return [Shift(down, right, correlation, 0.3, 2.0, 900) for down, right in ways_px]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (shifts(*[(0, 2)] * 6, *[(0, 0)] * 5), (0, 2, 11)),  # most of them
        (shifts(*[(0, 2)] * 5, *[(0, 0)] * 6), None),  # fewer than most
        (shifts(*[(0, 2)] * 9), None),  # too few
        (shifts(*[(0, 2)] * 9) + shifts((0, 2), correlation=0.29), None),  # one is uncertain
        ([*shifts(*[(-4, 2)] * 10), None], (-4, 2, 10)),
    ],
)
def test_a_shift_that_most_masks_share_is_told(found, expected):
    common = common_shift(found)
    if expected is None:
        assert common is None
    else:
        assert (common.down_px, common.right_px, common.num_masks) == expected
