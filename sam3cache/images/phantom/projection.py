"""Where the C-arm stands, and where a point of the patient lands on the detector.

Patient frame (DICOM's LPS), mm: +x patient left, +y posterior, +z head; the origin is the
isocentre. Angles are DICOM's positioner angles (PS3.3 C.8.7.5.1.2), in degrees: primary is LAO
positive, RAO negative; secondary is cranial positive, caudal negative. Zero and zero put the
detector in front of the chest.

Shape legend: N points, H image height, W image width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class View:
    """One position of the C-arm, with a square detector centred on the central ray.

    Attributes:
        primary_angle_deg: LAO positive, RAO negative.
        secondary_angle_deg: cranial positive, caudal negative.
        sod_mm: from the source to the isocentre.
        sid_mm: from the source to the detector.
        pixel_mm: pixel spacing on the detector.
        size_px: rows and columns.
    """

    primary_angle_deg: float
    secondary_angle_deg: float
    sod_mm: float
    sid_mm: float
    pixel_mm: float
    size_px: int

    def axes(self) -> tuple[Array, Array, Array]:
        """Unit vectors (3,): image right u, image up v, and d = u × v towards the detector."""
        alpha, beta = np.deg2rad([self.primary_angle_deg, self.secondary_angle_deg])
        sin_a, cos_a, sin_b, cos_b = np.sin(alpha), np.cos(alpha), np.sin(beta), np.cos(beta)
        right = np.array([cos_a, sin_a, 0.0])
        up = np.array([-sin_a * sin_b, cos_a * sin_b, cos_b])
        towards = np.array([sin_a * cos_b, -cos_a * cos_b, sin_b])
        return right, up, towards

    def source(self) -> Array:
        """Position of the X-ray source, (3,) mm."""
        return -self.sod_mm * self.axes()[2]

    def project(self, points_N3: Array) -> tuple[Array, Array, Array]:
        """Perspective projection of points onto the detector.

        Args:
            points_N3: patient frame, mm.

        Returns:
            Right of the detector's centre (N,), above it (N,), both mm on the detector, and the
            distance from the source along the central ray (N,), mm.
        """
        right, up, towards = self.axes()
        depth_N = points_N3 @ towards + self.sod_mm
        scale_N = self.sid_mm / depth_N
        return scale_N * (points_N3 @ right), scale_N * (points_N3 @ up), depth_N

    def to_pixels(self, right_mm_N: Array, up_mm_N: Array) -> tuple[Array, Array]:
        """Column and row (N,) of positions on the detector; the centre is at size / 2."""
        centre_px = self.size_px / 2
        return centre_px + right_mm_N / self.pixel_mm, centre_px - up_mm_N / self.pixel_mm

    def detector_mm(self) -> tuple[Array, Array]:
        """Positions of the pixels, (1, W) rightwards and (H, 1) upwards, mm on the detector."""
        offset_px = np.arange(self.size_px, dtype=np.float64) - self.size_px / 2
        return offset_px[None, :] * self.pixel_mm, -offset_px[:, None] * self.pixel_mm
