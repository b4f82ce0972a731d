"""How far a mask lies beside the structure that it marks: a statistic of picture and mask.

The mask is moved over the picture by every small shift, and compared with it each time. If it fits
best, and clearly better, somewhere else than where it lies, it is likely to be of another frame,
cropped otherwise, or written with its axes or its origin mistaken.

It is compared by normalised cross-correlation (Lewis 1995, "Fast normalized cross-correlation";
over a region of any shape, Padfield 2012, "Masked object registration in the Fourier domain"): of
the mask and a margin around it with the picture less its local mean, divided by its local
deviation. So shading does not count, nor what lies far from the mask, nor whether what it marks is
darker or brighter than what surrounds it.

Shape legend: H height and W width of the working grid, P and Q the same with room for shifts, S
shifts in each direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

WORKING_PX = 256
"""Longest side of the grid that both are laid on: vessels are one or two pixels wide there."""

REACH_PX = 16
"""Largest shift that is looked for, on the working grid, in each direction."""

WINDOW_PX = 25
"""Side of the window of local means, on the working grid; wider than any vessel."""

MARGIN_PX = 8
"""How far around a mask the picture counts, on the working grid."""

MIN_SHIFT_PX = 2.0
"""Smallest shift that is told, on the working grid."""

MIN_CORRELATION = 0.3
"""What a mask must reach somewhere: below, it fits nowhere, and nothing can be told."""

MIN_GAIN = 1.3
"""How many times better than where it lies a mask must fit elsewhere."""

MIN_EVIDENCE = 10.0
"""What the correlation times the root of the mask's pixels, on the working grid, must reach: by
chance a small mask fits another vessel nearby as well as its own."""

MIN_MASKS = 10
"""Masks that must fit certainly somewhere for their median to say something of all."""

_LEAST_DEVIATION = 2.0  # Grey levels: what varies less is noise, and is not made more of.
_MOST_DEVIATIONS = 3.0  # A collimator's edge counts no more than a vessel's.


@dataclass(frozen=True, slots=True)
class Shift:
    """Where a mask fits its picture best.

    Attributes:
        down_px: by how many pixels of the picture the mask would have to go down.
        right_px: likewise to the right.
        correlation: absolute correlation there, at most 1.
        correlation_here: absolute correlation where the mask lies.
        grid_px: pixels of the picture that one of the working grid is wide.
        num_marked: pixels of the working grid that the mask covers.
    """

    down_px: float
    right_px: float
    correlation: float
    correlation_here: float
    grid_px: float
    num_marked: float

    @property
    def reach_px(self) -> float:
        """Largest shift that was looked for, in pixels of the picture."""
        return REACH_PX * self.grid_px

    @property
    def is_certain(self) -> bool:
        """Whether the mask fits too well there for chance."""
        evidence = self.correlation * math.sqrt(self.num_marked)
        return self.correlation >= MIN_CORRELATION and evidence >= MIN_EVIDENCE

    @property
    def is_clear(self) -> bool:
        """Whether the mask fits clearly better there than where it lies."""
        return (
            self.is_certain
            and math.hypot(self.down_px, self.right_px) >= MIN_SHIFT_PX * self.grid_px
            and self.correlation >= MIN_GAIN * self.correlation_here
        )


@dataclass(frozen=True, slots=True)
class CommonShift:
    """Where most masks of a set fit better.

    Attributes:
        down_px: median, over the masks, of the pixels that they would have to go down.
        right_px: likewise to the right.
        num_masks: that could be told of.
        reach_px: median of the largest shifts that were looked for.
    """

    down_px: float
    right_px: float
    num_masks: int
    reach_px: float


def common_shift(shifts: Iterable[Shift | None]) -> CommonShift | None:
    """Find a shift that most masks share, be it smaller than can be told of one.

    Args:
        shifts: of the masks of one set, each where it fits best.

    Returns:
        None where the medians are zero, and where fewer than ``MIN_MASKS`` fit certainly anywhere.
    """
    certain = [shift for shift in shifts if shift is not None and shift.is_certain]
    if len(certain) < MIN_MASKS:
        return None
    down_px = median(shift.down_px for shift in certain)
    right_px = median(shift.right_px for shift in certain)
    if not (down_px or right_px):
        return None
    return CommonShift(down_px, right_px, len(certain), median(shift.reach_px for shift in certain))


def best_shift(picture_HWC: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> Shift | None:
    """Find the shift at which a mask fits its picture best.

    Args:
        picture_HWC: uint8, of 1 or 3 channels, of any size.
        mask_HW: on any grid that covers the picture.

    Returns:
        None where nothing can be told: the mask, or the picture around it, is the same all over.
    """
    height_px, width_px = picture_HWC.shape[:2]
    grid_px = max(1.0, max(height_px, width_px) / WORKING_PX)
    size = (max(1, round(height_px / grid_px)), max(1, round(width_px / grid_px)))
    picture_HW = _on_grid(picture_HWC.mean(axis=-1, dtype=np.float32), size)
    mean_HW = _local_mean(picture_HW)
    deviation_HW = (_local_mean(picture_HW**2) - mean_HW**2).clamp_min(0).sqrt()
    contrast_HW = (picture_HW - mean_HW) / (deviation_HW + _LEAST_DEVIATION)
    contrast_HW = contrast_HW.clamp(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)

    marked_HW = _on_grid(mask_HW.astype(np.float32), size)
    side_px = 2 * MARGIN_PX + 1
    region_HW = (F.max_pool2d(marked_HW[None], (side_px, 1), 1, (MARGIN_PX, 0)) > 0).float()
    region_HW = F.max_pool2d(region_HW, (1, side_px), 1, (0, MARGIN_PX))[0]
    num_pixels = float(region_HW.sum())
    template_HW = (marked_HW - marked_HW.sum() / max(1.0, num_pixels)) * region_HW

    # Beyond the picture there is no contrast.
    padded = (size[0] + REACH_PX, size[1] + REACH_PX)

    def spectrum_of(values_HW: torch.Tensor) -> torch.Tensor:
        spectrum: torch.Tensor = torch.fft.rfft2(values_HW, padded)
        return spectrum

    def over_shifts(region_PQ: torch.Tensor, values_PQ: torch.Tensor) -> torch.Tensor:
        """Sum values over a region at each shift, (S, S), given the spectra of both."""
        sums_PQ: torch.Tensor = torch.fft.irfft2(values_PQ * region_PQ.conj(), padded)
        reach = 2 * REACH_PX + 1
        return sums_PQ.roll((REACH_PX, REACH_PX), (0, 1))[:reach, :reach]

    contrast_PQ, region_PQ = spectrum_of(contrast_HW), spectrum_of(region_HW)
    products_SS = over_shifts(spectrum_of(template_HW), contrast_PQ)
    sums_SS = over_shifts(region_PQ, contrast_PQ)
    squares_SS = over_shifts(region_PQ, spectrum_of(contrast_HW**2))
    variation_SS = squares_SS - sums_SS**2 / max(1.0, num_pixels)
    norms_SS = template_HW.norm() * variation_SS.clamp_min(0).sqrt()
    # A thousandth of a usual picture's: noise of the transform, not of the picture.
    if float(norms_SS[REACH_PX, REACH_PX]) < 1e-3 * max(1.0, num_pixels):
        return None
    by_shift_SS = products_SS.abs() / norms_SS.clamp_min(float(norms_SS.max()) / 4)
    down, right = divmod(int(by_shift_SS.argmax()), by_shift_SS.shape[1])
    return Shift(
        (down - REACH_PX) * grid_px,
        (right - REACH_PX) * grid_px,
        float(by_shift_SS[down, right]),
        float(by_shift_SS[REACH_PX, REACH_PX]),
        grid_px,
        float(marked_HW.sum()),
    )


def _on_grid(values_HW: NDArray[np.float32], size: tuple[int, int]) -> torch.Tensor:
    """Lay values on the working grid, each pixel the mean of what it covers."""
    resized: torch.Tensor = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(values_HW))[None, None], size, mode="area"
    )
    return resized[0, 0]


def _local_mean(values_HW: torch.Tensor) -> torch.Tensor:
    """Return the mean over a window around each pixel, of what lies within the picture."""
    half_px = WINDOW_PX // 2
    mean = F.avg_pool2d(values_HW[None], (WINDOW_PX, 1), 1, (half_px, 0), count_include_pad=False)
    mean = F.avg_pool2d(mean, (1, WINDOW_PX), 1, (0, half_px), count_include_pad=False)
    return mean[0]
