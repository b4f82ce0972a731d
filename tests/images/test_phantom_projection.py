"""The C-arm: axes, signs and magnification, as an operator would check them."""

import numpy as np
import pytest

from sam3cache.images.phantom.projection import View


def view_at(primary_deg: float, secondary_deg: float, **changes: float) -> View:
    settings = {"sod_mm": 765.0, "sid_mm": 1100.0, "pixel_mm": 0.34} | changes
    return View(primary_deg, secondary_deg, size_px=512, **settings)


def land(view: View, x: float, y: float, z: float) -> tuple[float, float]:
    right_mm_N, up_mm_N, _ = view.project(np.array([[x, y, z]]))
    return float(right_mm_N[0]), float(up_mm_N[0])


@pytest.mark.parametrize("primary_deg", [-90.0, -30.0, 0.0, 45.0, 170.0])
@pytest.mark.parametrize("secondary_deg", [-60.0, 0.0, 35.0])
def test_the_axes_are_orthonormal_and_right_handed(primary_deg: float, secondary_deg: float):
    right, up, towards = view_at(primary_deg, secondary_deg).axes()
    axes = np.stack([right, up, towards])
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.cross(right, up), towards, atol=1e-12)


def test_at_zero_the_detector_is_in_front_of_the_chest():
    right, up, towards = view_at(0, 0).axes()
    np.testing.assert_allclose(towards, [0, -1, 0], atol=1e-12)  # anterior
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-12)  # the patient's left
    np.testing.assert_allclose(up, [0, 0, 1], atol=1e-12)  # the head


@pytest.mark.parametrize(
    ("primary_deg", "expected_mm"), [(45.0, 105.9), (0.0, 0.0), (-45.0, -105.9)]
)
def test_the_spine_lies_right_in_lao_and_left_in_rao(primary_deg: float, expected_mm: float):
    right_mm, up_mm = land(view_at(primary_deg, 0), 0, 95, 0)
    assert right_mm == pytest.approx(expected_mm, abs=0.05)
    assert up_mm == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("secondary_deg", "sign"), [(30.0, 1), (0.0, 0), (-30.0, -1)])
def test_the_spine_rises_in_cranial_views_and_sinks_in_caudal_ones(secondary_deg: float, sign: int):
    # From a detector tilted to the head, what lies behind the heart is seen higher up.
    _, up_mm = land(view_at(0, secondary_deg), 0, 95, 0)
    assert np.sign(np.round(up_mm, 6)) == sign


@pytest.mark.parametrize("angles", [(0.0, 0.0), (45.0, -30.0), (-30.0, 25.0)])
def test_the_isocentre_lands_in_the_centre_of_the_picture(angles: tuple[float, float]):
    view = view_at(*angles)
    right_mm_N, up_mm_N, depth_N = view.project(np.zeros((1, 3)))
    col_N, row_N = view.to_pixels(right_mm_N, up_mm_N)
    assert (col_N[0], row_N[0]) == pytest.approx((256, 256))
    assert depth_N[0] == pytest.approx(765)


@pytest.mark.parametrize(("sod_mm", "sid_mm"), [(720.0, 950.0), (765.0, 1100.0), (810.0, 1200.0)])
def test_the_isocentre_is_magnified_by_sid_over_sod(sod_mm: float, sid_mm: float):
    view = view_at(30, 20, sod_mm=sod_mm, sid_mm=sid_mm)
    right, up, _ = view.axes()
    right_mm, up_mm = land(view, *(2 * right + 3 * up))
    assert (right_mm, up_mm) == pytest.approx((2 * sid_mm / sod_mm, 3 * sid_mm / sod_mm))


def test_rows_grow_downwards_and_pixels_agree_with_positions():
    view = view_at(0, 0)
    x_1W, y_H1 = view.detector_mm()
    col_N, row_N = view.to_pixels(x_1W[0, [0, 100, 511]], y_H1[[0, 100, 511], 0])
    np.testing.assert_allclose(col_N, [0, 100, 511], atol=1e-9)
    np.testing.assert_allclose(row_N, [0, 100, 511], atol=1e-9)
    assert y_H1[0, 0] > y_H1[-1, 0]
