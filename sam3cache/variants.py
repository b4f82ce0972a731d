"""Variants: changed views of a picture, by names such as ``hflip``, ``rot10`` or ``gamma1.5``.

A name is all that a store keeps of one, so what it does to pixels, masks and view angles must never
change. Positions are in pixels with edges at whole numbers, as in :mod:`sam3cache.geometry`.

Shape legend: H height, W width, C channels, K planes of a mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError
from sam3cache.records import IGNORE_LABEL

KINDS = "hflip, vflip, rotN (degrees, as rot10 or rot-10), gammaX (as gamma0.7), zoomX (as zoom1.2)"

SEPARATOR = "~"
"""Between a sample's id and the variant's name in the id of a variant."""

_DEFAULT_GAMMA = 1.5
_NAME = re.compile(r"(hflip|vflip|rot|gamma|zoom)(-?\d+(?:\.\d+)?)?")

# By kind, the smallest and the largest amount, and the one that changes nothing.
_AMOUNTS = {"rot": (-180.0, 180.0, 0.0), "gamma": (0.2, 5.0, 1.0), "zoom": (0.5, 2.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Variant:
    """One changed view, of the picture's own size.

    Attributes:
        kind: "hflip" (left and right change places), "vflip", "rot", "gamma" or "zoom".
        amount: degrees, counter-clockwise as seen; the exponent; the factor. 0 for flips.
    """

    kind: str
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Return the variant of a name; ``gamma`` alone is ``gamma1.5``.

        Raises:
            ConfigError: when there is no such variant.
        """
        match = _NAME.fullmatch(text)
        kind, number = match.groups() if match else ("", None)
        takes_number = kind in _AMOUNTS
        is_whole = (number is not None) == takes_number or text == "gamma"
        if not match or not is_whole:
            raise ConfigError(f"variant {text!r} is unknown; expected some of {KINDS}")
        if not takes_number:
            return cls(kind)
        amount = _DEFAULT_GAMMA if number is None else float(number)
        low, high, nothing = _AMOUNTS[kind]
        if not low <= amount <= high or amount == nothing:
            raise ConfigError(
                f"variant {text!r}: expected {low:g} to {high:g} behind {kind}, and not "
                f"{nothing:g}, which changes nothing"
            )
        return cls(kind, amount)

    @property
    def name(self) -> str:
        """The one name of it: ``rot10`` for ``rot10.0``."""
        return f"{self.kind}{self.amount:g}" if self.kind in _AMOUNTS else self.kind

    def picture(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a picture, uint8 (H, W, C), as this variant shows it.

        Flips are exact, gamma is ``255 * (x / 255) ** amount``, the others are bilinear; what comes
        in from outside the picture is 0, as padding is.
        """
        if self.kind in ("hflip", "vflip"):
            return self._flipped(pixels_HWC, axis=1 if self.kind == "hflip" else 0)
        if self.kind == "gamma":
            table = np.rint(255 * (np.arange(256) / 255) ** self.amount).astype(np.uint8)
            return table[pixels_HWC]
        height, width, _ = pixels_HWC.shape
        y_HW, x_HW = self._origins(height, width, height, width)
        return _bilinear(pixels_HWC, y_HW - 0.5, x_HW - 0.5)

    def mask(self, mask_KHW: NDArray[np.uint8], height_px: int, width_px: int) -> NDArray[np.uint8]:
        """Return a mask as this variant shows it, by the same map as its picture.

        Args:
            mask_KHW: uint8 (K, H, W) on its own grid, which covers the picture.
            height_px: of the picture.
            width_px: of the picture.

        Returns:
            uint8 (K, H, W): of a flip exact, else each pixel the nearest of the mask; 255 (ignore)
            where nothing of the picture is.
        """
        if self.kind in ("hflip", "vflip"):
            return self._flipped(mask_KHW, axis=2 if self.kind == "hflip" else 1)
        if self.kind == "gamma":
            return mask_KHW
        height, width = mask_KHW.shape[1:]
        y_HW, x_HW = self._origins(height_px, width_px, height, width)
        row_HW = np.floor(y_HW * (height / height_px)).astype(np.intp)
        column_HW = np.floor(x_HW * (width / width_px)).astype(np.intp)
        inside_HW = (row_HW >= 0) & (row_HW < height) & (column_HW >= 0) & (column_HW < width)
        found_KHW = mask_KHW[:, row_HW.clip(0, height - 1), column_HW.clip(0, width - 1)]
        return np.where(inside_HW, found_KHW, np.uint8(IGNORE_LABEL))

    def angles(self, primary_deg: float, secondary_deg: float) -> tuple[float, float]:
        """Return the view angles of the mirrored patient; only flips change them.

        A picture with left and right exchanged is that of a patient mirrored so, seen from as far
        on the other side: LAO becomes RAO. Upside down, cranial becomes caudal.
        """
        if self.kind == "hflip":
            return -primary_deg, secondary_deg
        if self.kind == "vflip":
            return primary_deg, -secondary_deg
        return primary_deg, secondary_deg

    @staticmethod
    def _flipped(values: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(np.flip(values, axis))

    def _origins(
        self, height_px: int, width_px: int, num_rows: int, num_columns: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where in the picture the centre of each cell of a grid over it comes from.

        Args:
            height_px: of the picture.
            width_px: of the picture.
            num_rows: H of the grid.
            num_columns: W of the grid.

        Returns:
            y and x, (H, W) each, in pixels from the picture's top left edge.
        """
        angle, scale = 0.0, 1.0
        if self.kind == "rot":
            angle = math.radians(self.amount)
        else:
            scale = self.amount
        # Rounded, so that no two systems' sines lead to different pixels.
        along, across = (round(f(angle) / scale, 12) for f in (math.cos, math.sin))
        y_H1 = ((np.arange(num_rows) + 0.5) * height_px / num_rows - height_px / 2)[:, None]
        x_1W = ((np.arange(num_columns) + 0.5) * width_px / num_columns - width_px / 2)[None]
        return (
            across * x_1W + along * y_H1 + height_px / 2,
            along * x_1W - across * y_H1 + width_px / 2,
        )


def parse_variants(names: Sequence[str]) -> tuple[str, ...]:
    """Return the one name of each variant, in the order given.

    Raises:
        ConfigError: when there is no such variant, or one is named twice.
    """
    parsed = [Variant.parse(name).name for name in names]
    for name in parsed:
        if parsed.count(name) > 1:
            raise ConfigError(f"variants {','.join(names)}: {name} is named twice; name it once")
    return tuple(parsed)


def variant_id(base_id: str, name: str) -> str:
    """Return the id of a sample's variant."""
    return f"{base_id}{SEPARATOR}{name}"


def split_variant_id(identity: str) -> tuple[str, str] | None:
    """Return a variant's base id and name, or None for the id of any other sample."""
    base_id, separator, name = identity.rpartition(SEPARATOR)
    if not separator or not base_id:
        return None
    try:
        return (base_id, name) if Variant.parse(name).name == name else None
    except ConfigError:
        return None


def _bilinear(
    pixels_HWC: NDArray[np.uint8], y_HW: NDArray[np.float64], x_HW: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Return values between pixels, whose centres are at whole numbers; 0 beyond the picture."""
    height, width, _ = pixels_HWC.shape
    # One row and column of nothing before the picture, two behind it.
    padded = np.pad(pixels_HWC, ((1, 2), (1, 2), (0, 0)))
    y_HW, x_HW = y_HW.clip(-1, height) + 1, x_HW.clip(-1, width) + 1
    top_HW, left_HW = y_HW.astype(np.intp), x_HW.astype(np.intp)
    down_HW1, right_HW1 = (y_HW - top_HW)[..., None], (x_HW - left_HW)[..., None]
    upper = padded[top_HW, left_HW] * (1 - right_HW1) + padded[top_HW, left_HW + 1] * right_HW1
    lower = (
        padded[top_HW + 1, left_HW] * (1 - right_HW1) + padded[top_HW + 1, left_HW + 1] * right_HW1
    )
    result: NDArray[np.uint8] = np.rint(upper * (1 - down_HW1) + lower * down_HW1).astype(np.uint8)
    return result
