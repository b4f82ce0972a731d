"""Where a pixel of a picture lies on the tower's square input, and back.

One affine map an axis, with pixel centres at half integers: a picture's edges map to the edges of
its content, so a point x of the picture lies at ``(x + 0.5) * content / source - 0.5`` of the
input. The same map, taken between cells of any stride and pixels of any mask's grid, carries
logits to masks and masks to targets.

Shape legend: N points, B batch, K classes or planes, H height, W width, M planes of a stored
mask, S side of a square of logits, T side of the square target grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sam3cache.errors import ConfigError, InputSizeError
from sam3cache.records import IGNORE_LABEL

INPUT_SIZE_PX = 1008
"""Side of the square that SAM 3 sees."""

PATCH_PX = 14
"""Side of one of its tokens: 72 x 72 of them."""

ResizeMode = Literal["letterbox", "squash"]
"""``letterbox`` keeps the aspect ratio and pads bottom and right; ``squash`` does neither."""


@dataclass(frozen=True, slots=True)
class Letterbox:
    """How one picture was laid on the square input; the content is at its top left.

    Attributes:
        source_height_px: height of the picture.
        source_width_px: width of the picture.
        content_height_px: height that the picture takes on the square.
        content_width_px: width that the picture takes on the square.
        size_px: side of the square.
        mode: "letterbox" or "squash".
    """

    source_height_px: int
    source_width_px: int
    content_height_px: int
    content_width_px: int
    size_px: int = INPUT_SIZE_PX
    mode: ResizeMode = "letterbox"

    @classmethod
    def fit(
        cls,
        height_px: int,
        width_px: int,
        mode: ResizeMode = "letterbox",
        size_px: int = INPUT_SIZE_PX,
    ) -> Self:
        """Lay a picture on the square: its longest side fills it, the other side is rounded.

        Args:
            height_px: height of the picture, at least 1.
            width_px: width of the picture, at least 1.
            mode: "letterbox", or "squash" to fill the square whatever the aspect ratio.
            size_px: side of the square.

        Raises:
            InputSizeError: a picture without pixels.
            ConfigError: an unknown mode.
        """
        if height_px < 1 or width_px < 1:
            raise InputSizeError(
                f"a picture of {height_px} x {width_px} pixels: expected at least 1 x 1; "
                "remove it from the manifest"
            )
        if mode not in get_args(ResizeMode):
            raise ConfigError(f"resize mode {mode!r}: expected one of {get_args(ResizeMode)}")
        content_height_px = content_width_px = size_px
        if mode == "letterbox":
            longest_px = max(height_px, width_px)
            content_height_px = max(1, round(height_px * size_px / longest_px))
            content_width_px = max(1, round(width_px * size_px / longest_px))
        return cls(height_px, width_px, content_height_px, content_width_px, size_px, mode)

    def points_to_input(self, points_N2: NDArray[Any]) -> NDArray[np.float64]:
        """Carry points (x, y) of the picture, in pixels, to pixels of the square input."""
        return (np.asarray(points_N2, dtype=np.float64) + 0.5) * self._scale_xy() - 0.5

    def points_to_source(self, points_N2: NDArray[Any]) -> NDArray[np.float64]:
        """Carry points (x, y) of the square input, in pixels, to pixels of the picture."""
        return (np.asarray(points_N2, dtype=np.float64) + 0.5) / self._scale_xy() - 0.5

    def logits_to_grid(
        self, logits_BKSS: torch.Tensor, height_px: int, width_px: int
    ) -> torch.Tensor:
        """Interpolate logits of the padded square onto a grid that covers the picture.

        Bilinear, in the convention of ``align_corners=False``. Cells whose centre is padding are
        never read: the last cell of the picture is repeated beyond its centre, as at any border.
        Differentiable.

        Args:
            logits_BKSS: (..., S, S) at any stride; usually (K, S, S) or (B, K, S, S).
            height_px: height of the grid, for example that of the picture or of its mask.
            width_px: width of the grid.

        Returns:
            (..., height_px, width_px) in the same dtype, float32 when that is a half type.

        Raises:
            InputSizeError: logits that are not on a square.
        """
        side = logits_BKSS.shape[-1]
        if logits_BKSS.ndim < 2 or logits_BKSS.shape[-2] != side or side == 0:
            raise InputSizeError(
                f"logits of shape {tuple(logits_BKSS.shape)}: expected (..., S, S) on the padded "
                "square; return them from the head before any crop"
            )
        if logits_BKSS.dtype in (torch.float16, torch.bfloat16):
            logits_BKSS = logits_BKSS.float()
        grid = _interpolate(logits_BKSS, -2, self._cells(self.content_height_px, side), height_px)
        return _interpolate(grid, -1, self._cells(self.content_width_px, side), width_px)

    def mask_to_target(self, mask_KHW: torch.Tensor, target_size_px: int) -> torch.Tensor:
        """Resample a mask from its own grid to a square grid over the padded input.

        A target cell takes the label that covers most of it, and of equals the highest. For a
        binary mask that is "area average of at least 0.5" where the target is coarser than the
        mask, and in effect the nearest pixel where it is finer. Padding becomes 255 (ignore).

        Args:
            mask_KHW: uint8 (K, H, W), on any grid that covers the picture; 255 = ignore.
            target_size_px: side T of the target.

        Returns:
            uint8 (K, T, T).
        """
        height_edges = self._cell_edges(self.content_height_px, target_size_px, mask_KHW.shape[-2])
        width_edges = self._cell_edges(self.content_width_px, target_size_px, mask_KHW.shape[-1])
        target_KTT = mask_KHW.new_full(
            (mask_KHW.shape[0], target_size_px, target_size_px), IGNORE_LABEL
        )
        found = _majority(mask_KHW.numpy(), _Taps.of(height_edges), _Taps.of(width_edges))
        target_KTT[:, : found.shape[1], : found.shape[2]] = torch.from_numpy(found)
        return target_KTT

    def numbers_to_target(self, mask_MHW: torch.Tensor, target_size_px: int) -> torch.Tensor:
        """Resample class numbers from their own grid to a square grid over the padded input.

        A target cell takes the number at its centre: never one between two, and, unlike
        :meth:`mask_to_target`, at a cost that does not grow with the classes. Padding becomes 255.

        Args:
            mask_MHW: uint8 (M, H, W), on any grid that covers the picture; 255 = ignore.
            target_size_px: side T of the target.

        Returns:
            uint8 (M, T, T).
        """
        height_edges = self._cell_edges(self.content_height_px, target_size_px, mask_MHW.shape[-2])
        width_edges = self._cell_edges(self.content_width_px, target_size_px, mask_MHW.shape[-1])
        # A centre is inside its cell, so that it is below the number of pixels.
        y, x = (
            edges.mean(dim=1).long().to(mask_MHW.device) for edges in (height_edges, width_edges)
        )
        target_MTT = mask_MHW.new_full(
            (mask_MHW.shape[0], target_size_px, target_size_px), IGNORE_LABEL
        )
        found = mask_MHW.index_select(1, y).index_select(2, x)
        target_MTT[:, : len(y), : len(x)] = found
        return target_MTT

    def _scale_xy(self) -> NDArray[np.float64]:
        """Input pixels a picture's pixel, along x and y."""
        return np.array(
            [
                self.content_width_px / self.source_width_px,
                self.content_height_px / self.source_height_px,
            ]
        )

    def _cells(self, content_px: int, num_cells: int) -> float:
        """Return the (fractional) number of cells that the content takes along one axis."""
        return content_px * num_cells / self.size_px

    def _cell_edges(self, content_px: int, num_cells: int, num_pixels: int) -> torch.Tensor:
        """Return float64 (cells with content, 2): each one's extent in pixels of a mask's grid."""
        extent = self._cells(content_px, num_cells)
        edges = torch.arange(_num_inside(extent) + 1, dtype=torch.float64)
        # Multiplied first, so that whole factors stay whole; the last cell may reach into padding.
        edges = (edges * num_pixels / extent).clamp(max=num_pixels)
        return torch.stack((edges[:-1], edges[1:]), dim=1)


def _num_inside(extent: float) -> int:
    """Count the cells whose centre lies inside an extent given in cells; at least one."""
    return max(1, math.ceil(extent - 0.5))


def _interpolate(x: torch.Tensor, dim: int, extent: float, num_pixels: int) -> torch.Tensor:
    """Spread the first ``extent`` cells of one axis over ``num_pixels`` pixels, linearly."""
    centre = (torch.arange(num_pixels, dtype=torch.float64) + 0.5) * (extent / num_pixels) - 0.5
    centre = centre.clamp(0.0, _num_inside(extent) - 1.0)
    lower = centre.floor().long()
    upper = (lower + 1).clamp(max=_num_inside(extent) - 1)
    shape = [1] * x.ndim
    shape[dim] = num_pixels
    weight = (centre - lower).to(x).view(shape)
    return torch.lerp(
        x.index_select(dim, lower.to(x.device)), x.index_select(dim, upper.to(x.device)), weight
    )


_MAX_PARTS = 1_000_000
"""Parts of cells that are weighed at once; each takes some 40 bytes meanwhile."""


@dataclass(frozen=True, slots=True)
class _Taps:
    """What cells along one axis are made of.

    Attributes:
        index_NP: int64 (cells, taps), the pixels.
        share_NP: float64 (cells, taps), the part of a cell that each takes; 0 for repetitions.
    """

    index_NP: NDArray[np.int64]
    share_NP: NDArray[np.float64]

    @classmethod
    def of(cls, edges: torch.Tensor) -> Self:
        """Find the pixels of cells with fractional edges (N, 2)."""
        start_N1, end_N1 = np.split(edges.numpy(), 2, axis=1)
        first_N1 = np.floor(start_N1).astype(np.int64)
        num_taps = int(np.max(np.ceil(end_N1) - first_N1))
        index_NP = first_N1 + np.arange(num_taps)
        covered_NP = np.minimum(end_N1, index_NP + 1) - np.maximum(start_N1, index_NP)
        return cls(
            np.where(covered_NP > 0, index_NP, first_N1),
            np.maximum(covered_NP, 0) / (end_N1 - start_N1),
        )


def _majority(mask_KHW: NDArray[np.uint8], y: _Taps, x: _Taps) -> NDArray[np.uint8]:
    """Return the label that covers most of each cell, (K, cells, cells).

    Nearly all cells lie inside one label or another, which 8-bit comparisons tell fast; areas are
    added up for the others alone.
    """
    lowest = highest = mask_KHW
    for taps in (y, x):
        # Rows, of the mask and then of its transpose: columns take several times as long.
        lowest, highest = (
            np.ascontiguousarray(
                reduce(combine, (side[:, index_N] for index_N in taps.index_NP.T)).swapaxes(1, 2)
            )
            for combine, side in ((np.minimum, lowest), (np.maximum, highest))
        )
    mixed_3M = np.stack(np.nonzero(lowest != highest))
    num_at_once = max(1, _MAX_PARTS // (y.index_NP.shape[1] * x.index_NP.shape[1]))
    for begin in range(0, mixed_3M.shape[1], num_at_once):
        plane_M, row_M, column_M = mixed_3M[:, begin : begin + num_at_once]
        label_MPP = mask_KHW[
            plane_M[:, None, None], y.index_NP[row_M][:, :, None], x.index_NP[column_M][:, None]
        ]
        share_MPP = y.share_NP[row_M][:, :, None] * x.share_NP[column_M][:, None]
        best_M, most_M = np.zeros(len(plane_M), np.uint8), np.zeros(len(plane_M))
        # Ascending, so that >= lets the highest label win a tie, which rounding must not decide.
        for label in np.flatnonzero(np.bincount(label_MPP.reshape(-1))):
            area_M = np.sum(share_MPP, axis=(1, 2), where=label_MPP == label).round(9)
            wins_M = area_M >= most_M
            best_M[wins_M], most_M[wins_M] = label, area_M[wins_M]
        lowest[plane_M, row_M, column_M] = best_M
    return lowest
