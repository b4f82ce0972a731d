"""Line integrals: how many millimetres of what a ray meets on its way to each pixel.

Solids are integrated exactly: a ray enters and leaves an ellipsoid or a cylinder where a quadratic
vanishes. Tubes are integrated segment by segment from their projection.

Shape legend: N points, H image height, W image width, S segments, K side of a segment's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.images.phantom.anatomy import Branch, Patient, Side, Thorax
from sam3cache.images.phantom.projection import Array, View

# Linear attenuation, 1/mm, as differences from what is displaced.
TORSO_PER_MM = 0.019
LUNG_PER_MM = -0.014
DOME_PER_MM = 0.017
HEART_PER_MM = 0.008
VERTEBRA_PER_MM = 0.014
RIB_PER_MM = 0.022
CATHETER_PER_MM = 0.25

MIN_SIN_TO_RAY = 0.3
"""A vessel seen end on would be as deep as it is long; its chord is held to 1 / 0.3 diameters."""

MASK_PATH_MM = 0.35
"""Contrast that a ray must cross for its pixel to count as vessel."""


def background(patient: Patient, view: View) -> Array:
    """Attenuation integral (H, W), unitless, of everything but contrast and catheter."""
    thorax, heart = patient.thorax, patient.heart
    total_HW = TORSO_PER_MM * ellipsoid_path(view, np.zeros(3), thorax.torso_mm)
    for side, level_mm in zip((-1.0, 1.0), thorax.dome_level_mm, strict=True):
        lung = np.array([side * 80.0, 8.0, 25.0])
        total_HW += LUNG_PER_MM * ellipsoid_path(view, lung, thorax.lung_mm, soft=True)
        dome = np.array([side * 62.0, 5.0, level_mm - thorax.dome_mm[2]])
        total_HW += DOME_PER_MM * ellipsoid_path(view, dome, thorax.dome_mm)
    axes = np.stack([heart.apex, heart.groove, heart.lateral])
    muscle_mm = np.array([heart.length_mm, heart.radius_mm, heart.radius_mm]) + 6.0
    total_HW += HEART_PER_MM * ellipsoid_path(view, heart.base_mm, muscle_mm, axes, soft=True)
    total_HW += VERTEBRA_PER_MM * _spine_path(thorax, view)
    for rib in thorax.ribs:
        radius_N = np.full(len(rib), thorax.rib_radius_mm)
        total_HW += RIB_PER_MM * tube_path(view, rib, radius_N)
    return total_HW


def catheter(patient: Patient, side: Side, view: View) -> Array:
    """Attenuation integral (H, W), unitless, of the catheter in one ostium."""
    points_N3 = patient.catheters[side]
    radius_N = np.full(len(points_N3), patient.catheter_radius_mm)
    return CATHETER_PER_MM * tube_path(view, points_N3, radius_N)


def contrast(tree: Sequence[Branch], view: View) -> tuple[Array, NDArray[np.uint8]]:
    """What a coronary tree full of contrast puts into each ray.

    Returns:
        Path through contrast (H, W), mm: the longest within a trunk, summed over trunks; and the
        label (H, W) of the branch that is deepest where that path exceeds ``MASK_PATH_MM``, else 0.
    """
    by_trunk: dict[str, Array] = {}
    deepest_HW = np.zeros((view.size_px, view.size_px))
    label_HW = np.zeros((view.size_px, view.size_px), np.uint8)
    for branch in tree:
        first = round(branch.buried_mm)
        path_HW = tube_path(view, branch.points_N3[first:], branch.radius_N[first:])
        label_HW[path_HW > deepest_HW] = branch.label
        np.maximum(deepest_HW, path_HW, out=deepest_HW)
        trunk_HW = by_trunk.setdefault(branch.trunk, path_HW)
        np.maximum(trunk_HW, path_HW, out=trunk_HW)
    total_HW = np.sum(list(by_trunk.values()), axis=0)
    label_HW[total_HW <= MASK_PATH_MM] = 0
    return total_HW, label_HW


def tube_path(view: View, points_N3: Array, radius_mm_N: Array) -> Array:
    """Path (H, W), mm, through a tube about a chain of points: the longest over its segments.

    A ray that passes a segment's axis at distance ρ, at an angle θ to it, crosses 2√(r² - ρ²)/sin θ
    of it. Distances are measured on the detector and brought back by the local magnification.
    """
    size_px = view.size_px
    path_HW = np.zeros((size_px, size_px))
    right_mm_N, up_mm_N, depth_N = view.project(points_N3)
    place_N2 = np.stack(view.to_pixels(right_mm_N, up_mm_N), axis=1)
    px_per_mm_N = view.sid_mm / (depth_N * view.pixel_mm)
    radius_px_N = radius_mm_N * px_per_mm_N

    along_S3 = np.diff(points_N3, axis=0)
    ray_S3 = (points_N3[1:] + points_N3[:-1]) / 2 - view.source()
    norms_S = np.linalg.norm(along_S3, axis=1) * np.linalg.norm(ray_S3, axis=1)
    sin_S = np.linalg.norm(np.cross(along_S3, ray_S3), axis=1) / norms_S

    start_S2, step_S2 = place_N2[:-1], np.diff(place_N2, axis=0)
    middle_S2 = np.rint(start_S2 + step_S2 / 2).astype(np.int64)
    half_px = int(np.ceil(radius_px_N.max() + np.abs(step_S2).max() / 2 + 1.0))
    seen_S = np.all((middle_S2 > -half_px) & (middle_S2 < size_px + half_px), axis=1)
    if not seen_S.any():
        return path_HW
    start_S2, step_S2, middle_S2 = start_S2[seen_S], step_S2[seen_S], middle_S2[seen_S]
    depth_factor_S = 2.0 / (np.maximum(sin_S, MIN_SIN_TO_RAY) * px_per_mm_N[:-1])[seen_S]
    radius_S, growth_S = radius_px_N[:-1][seen_S], np.diff(radius_px_N)[seen_S]

    window_K = np.arange(-half_px, half_px + 1)
    col_S1K = middle_S2[:, 0, None, None] + window_K[None, None, :]
    row_SK1 = middle_S2[:, 1, None, None] + window_K[None, :, None]
    x_S1K = col_S1K - start_S2[:, 0, None, None]
    y_SK1 = row_SK1 - start_S2[:, 1, None, None]
    step_x_S11, step_y_S11 = step_S2[:, 0, None, None], step_S2[:, 1, None, None]
    length2_S11 = np.maximum(step_x_S11**2 + step_y_S11**2, 1e-12)
    t_SKK = np.clip((x_S1K * step_x_S11 + y_SK1 * step_y_S11) / length2_S11, 0.0, 1.0)
    miss2_SKK = (x_S1K - t_SKK * step_x_S11) ** 2 + (y_SK1 - t_SKK * step_y_S11) ** 2
    radius_SKK = radius_S[:, None, None] + t_SKK * growth_S[:, None, None]
    chord2_SKK = radius_SKK**2 - miss2_SKK

    inside_SKK = (
        (chord2_SKK > 0)
        & (col_S1K >= 0)
        & (col_S1K < size_px)
        & (row_SK1 >= 0)
        & (row_SK1 < size_px)
    )
    flat_SKK = row_SK1 * size_px + col_S1K
    value_SKK = np.sqrt(np.maximum(chord2_SKK, 0.0)) * depth_factor_S[:, None, None]
    np.maximum.at(path_HW.reshape(-1), flat_SKK[inside_SKK], value_SKK[inside_SKK])
    return path_HW


def ellipsoid_path(
    view: View,
    centre: Array,
    semi_axes_mm: Array,
    axes: Array | None = None,
    *,
    soft: bool = False,
) -> Array:
    """Path (H, W), mm, through an ellipsoid that the source is outside of.

    Args:
        view: the C-arm.
        centre: (3,) mm.
        semi_axes_mm: (3,).
        axes: directions of the semi-axes, unit rows (3, 3); the patient's own when None.
        soft: weigh the path by how deep it goes, so that the border fades.
    """
    inverse = (np.eye(3) if axes is None else axes) / semi_axes_mm[:, None]
    crossings = _crossings(view, centre, inverse)
    return crossings.path_mm() * (crossings.depth_HW if soft else 1.0)


def _spine_path(thorax: Thorax, view: View) -> Array:
    """Path (H, W), mm, through twelve vertebrae: an upright cylinder, half of it cut into slabs.

    The slabs are the bodies; the other half stands for the arches that bridge the gaps.
    """
    inverse = np.diag([1.0 / thorax.vertebra_mm[0], 1.0 / thorax.vertebra_mm[1], 0.0])
    crossings = _crossings(view, np.array([0.0, 95.0, 0.0]), inverse)
    _, up_mm_H1 = view.detector_mm()
    _, up, towards = view.axes()
    rise_H1 = towards[2] * view.sid_mm + up[2] * up_mm_H1
    rise_H1 = np.where(np.abs(rise_H1) < 1e-6, 1e-6, rise_H1)
    share_HW = (crossings.leave_HW - crossings.enter_HW) / 2
    for i in range(12):
        bottom_mm = thorax.vertebra_level_mm + i * thorax.vertebra_pitch_mm
        top_mm = bottom_mm + 0.8 * thorax.vertebra_pitch_mm
        cuts_H1 = [(level_mm - view.source()[2]) / rise_H1 for level_mm in (bottom_mm, top_mm)]
        first_HW = np.maximum(crossings.enter_HW, np.minimum(*cuts_H1))
        last_HW = np.minimum(crossings.leave_HW, np.maximum(*cuts_H1))
        share_HW += np.maximum(last_HW - first_HW, 0.0) / 2
    # Bodies are waisted: their outline fades.
    path_HW: Array = share_HW * crossings.ray_mm_HW * np.sqrt(crossings.depth_HW)
    return path_HW


@dataclass(frozen=True, slots=True)
class _Crossings:
    """Where rays cross a quadric; arrays (H, W).

    Attributes:
        enter_HW: share of the ray, 0 at the source and 1 at the detector.
        leave_HW: likewise; equal to ``enter_HW`` where the ray misses.
        depth_HW: 1 through the centre, 0 at the border.
        ray_mm_HW: length of the ray.
    """

    enter_HW: Array
    leave_HW: Array
    depth_HW: Array
    ray_mm_HW: Array

    def path_mm(self) -> Array:
        return (self.leave_HW - self.enter_HW) * self.ray_mm_HW


def _crossings(view: View, centre: Array, inverse: Array) -> _Crossings:
    """Intersect every ray with |inverse · (p - centre)| = 1, ``inverse`` being (3, 3), 1/mm."""
    right, up, towards = view.axes()
    x_1W, y_H1 = view.detector_mm()
    o = inverse @ (view.source() - centre)
    d, u, v = (inverse @ axis for axis in (towards * view.sid_mm, right, up))
    a_HW = d @ d + x_1W**2 * (u @ u) + y_H1**2 * (v @ v)
    a_HW += 2 * (x_1W * (d @ u) + y_H1 * (d @ v) + (x_1W * y_H1) * (u @ v))
    b_HW = o @ d + x_1W * (o @ u) + y_H1 * (o @ v)
    square_HW = np.maximum(b_HW**2 - a_HW * (o @ o - 1.0), 0.0)
    root_HW = np.sqrt(square_HW)
    return _Crossings(
        enter_HW=(-b_HW - root_HW) / a_HW,
        leave_HW=(-b_HW + root_HW) / a_HW,
        depth_HW=square_HW / a_HW,
        ray_mm_HW=np.sqrt(view.sid_mm**2 + x_1W**2 + y_H1**2),
    )
