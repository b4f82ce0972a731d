"""Line integrals, against closed forms and against walking along the rays."""

import numpy as np
import pytest

from sam3cache.images.phantom.anatomy import grow_patient
from sam3cache.images.phantom.attenuation import (
    MASK_PATH_MM,
    background,
    contrast,
    ellipsoid_path,
    tube_path,
)
from sam3cache.images.phantom.projection import Array, View

SIDE_ON = View(0.0, 0.0, 765.0, 1100.0, 0.34, 512)
OBLIQUE = View(-30.0, 25.0, 740.0, 1050.0, 2.4, 64)


def tube_along(
    direction: tuple[float, float, float],
    radius_mm: float,
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Array:
    points_N3 = np.array(centre) + np.outer(np.arange(-20.0, 20.5), direction)
    return tube_path(SIDE_ON, points_N3, np.full(len(points_N3), radius_mm))


@pytest.mark.parametrize("radius_mm", [0.5, 1.9, 5.0])
def test_a_tube_across_the_ray_is_as_deep_as_it_is_wide(radius_mm: float):
    path_HW = tube_along((1, 0, 0), radius_mm)
    assert path_HW[256, 256] == pytest.approx(2 * radius_mm, rel=1e-3)
    rho_mm = 2 * 0.34 * 765 / 1100
    expected_mm = 2 * np.sqrt(max(radius_mm**2 - rho_mm**2, 0))
    assert path_HW[254, 256] == pytest.approx(expected_mm, rel=1e-3)
    width_px = np.count_nonzero(path_HW[:, 256])
    assert width_px == pytest.approx(2 * radius_mm * 1100 / 765 / 0.34, abs=1.01)


@pytest.mark.parametrize(("angle_deg", "sine"), [(90, 1.0), (45, 0.7071), (30, 0.5), (5, 0.3)])
def test_a_tube_at_an_angle_to_the_ray_is_deeper_up_to_a_limit(angle_deg: float, sine: float):
    angle = np.deg2rad(angle_deg)
    path_HW = tube_along((np.sin(angle), np.cos(angle), 0.0), 2.0)
    assert path_HW[256, 256] == pytest.approx(2 * 2.0 / sine, rel=0.02)


def test_a_tube_outside_the_picture_leaves_no_trace():
    assert not tube_along((1, 0, 0), 2.0, centre=(150, 0, 0)).any()


def test_a_tube_is_cut_at_the_edge_of_the_picture_not_wrapped():
    path_HW = tube_along((1, 0, 0), 2.0, centre=(60, 0, 0))
    assert path_HW[256, 511] == pytest.approx(4.0, rel=0.01)
    assert not path_HW[:, :256].any()


def walk_along_rays(view: View, is_inside, num_steps: int = 12000) -> Array:
    """Path (H, W) in whatever ``is_inside`` accepts, by sampling the rays: slow and plain."""
    right, up, towards = view.axes()
    x_1W, y_H1 = view.detector_mm()
    rays = towards * view.sid_mm + x_1W[..., None] * right + y_H1[..., None] * up
    length_mm = np.linalg.norm(rays, axis=-1)
    num_inside = np.zeros(length_mm.shape)
    for share in (np.arange(num_steps) + 0.5) / num_steps:
        num_inside += is_inside(view.source() + share * rays)
    return num_inside * length_mm / num_steps


def test_an_ellipsoid_is_as_deep_as_a_walk_along_the_rays_says():
    view = View(-30.0, 25.0, 740.0, 1050.0, 12.0, 16)
    centre, semi_axes_mm = np.array([10.0, -20.0, 5.0]), np.array([40.0, 25.0, 60.0])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    walked_HW = walk_along_rays(
        view, lambda p: np.sum(((p - centre) @ turn.T / semi_axes_mm) ** 2, axis=-1) <= 1
    )
    path_HW = ellipsoid_path(view, centre, semi_axes_mm, turn)
    assert walked_HW.max() > 50
    np.testing.assert_allclose(path_HW, walked_HW, atol=0.3)


def test_a_soft_ellipsoid_fades_to_its_border():
    hard_HW = ellipsoid_path(SIDE_ON, np.zeros(3), np.full(3, 40.0))
    soft_HW = ellipsoid_path(SIDE_ON, np.zeros(3), np.full(3, 40.0), soft=True)
    assert soft_HW[256, 256] == pytest.approx(80.0)
    assert np.all(soft_HW <= hard_HW + 1e-9)
    near_border = (hard_HW > 0) & (hard_HW < 20)
    assert np.all(soft_HW[near_border] < 0.1 * hard_HW[near_border])


def test_the_spine_darkens_the_side_it_lies_on():
    patient = grow_patient(np.random.default_rng(0))
    lao_HW = background(patient, View(45.0, 0.0, 765.0, 1100.0, 4.0, 64))
    rao_HW = background(patient, View(-45.0, 0.0, 765.0, 1100.0, 4.0, 64))
    spine_px = 32 + round(105.9 / 4.0)
    assert lao_HW[:, spine_px].mean() > lao_HW[:, 64 - spine_px].mean() + 0.2
    assert rao_HW[:, 64 - spine_px].mean() > rao_HW[:, spine_px].mean() + 0.2


def test_labels_are_where_a_ray_crosses_enough_contrast():
    for seed in range(3):
        patient = grow_patient(np.random.default_rng(seed))
        for tree in patient.trees.values():
            path_HW, label_HW = contrast(tree, View(-30.0, 25.0, 765.0, 1100.0, 0.68, 256))
            np.testing.assert_array_equal(label_HW > 0, path_HW > MASK_PATH_MM)
            assert set(np.unique(label_HW)) <= {0} | {branch.label for branch in tree}


def test_vessels_that_cross_add_up_and_a_trunk_counts_once():
    patient = grow_patient(np.random.default_rng(1))
    tree = patient.trees["left"]
    paths = {b.name: tube_path(OBLIQUE, b.points_N3, b.radius_N) for b in tree}
    total_HW, _ = contrast(tree, OBLIQUE)
    main_HW, lad_HW = paths["LM"], paths["LAD"]
    alone_HW = np.ones_like(main_HW, dtype=bool)
    for name, path_HW in paths.items():
        if name not in ("LM", "LAD"):
            alone_HW &= path_HW == 0
    np.testing.assert_allclose(total_HW[alone_HW], np.maximum(main_HW, lad_HW)[alone_HW])
    assert total_HW.max() > max(path_HW.max() for path_HW in paths.values())
