"""How well one predicted mask agrees with the true one: in area, along centre lines, at borders.

docs/evaluation.md defines each measure, with its source.

Shape legend: H height, W width of the mask's own grid; N points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.records import IGNORE_LABEL


@dataclass(frozen=True, slots=True)
class MaskScores:
    """Agreement of one prediction with one mask, each in [0, 1]; None where it is 0 / 0.

    Attributes:
        dice: 2 TP / (2 TP + FP + FN); None for an empty prediction of an empty mask.
        iou: TP / (TP + FP + FN); None likewise.
        precision: TP / (TP + FP); None for an empty prediction.
        recall: TP / (TP + FN); None for an empty mask.
    """

    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None


def dice_iou_precision_recall(prediction_HW: Tensor, mask_HW: Tensor) -> MaskScores:
    """Score one predicted mask over the pixels that count.

    Args:
        prediction_HW: bool.
        mask_HW: uint8, 1 = mask, 0 = not, 255 = does not count; on the same device.
    """
    counted_HW = mask_HW != IGNORE_LABEL
    predicted_HW, true_HW = prediction_HW & counted_HW, mask_HW == 1
    hits = int((predicted_HW & true_HW).sum())
    num_predicted, num_true = int(predicted_HW.sum()), int(true_HW.sum())

    def ratio(numerator: int, denominator: int) -> float | None:
        return numerator / denominator if denominator else None

    return MaskScores(
        dice=ratio(2 * hits, num_predicted + num_true),
        iou=ratio(hits, num_predicted + num_true - hits),
        precision=ratio(hits, num_predicted),
        recall=ratio(hits, num_true),
    )


@dataclass(frozen=True, slots=True)
class ShapeScores:
    """Agreement of one prediction with one mask along centre lines and at borders.

    Attributes:
        cldice: centre-line Dice, in [0, 1]; None for an empty prediction of an empty mask, 0 where
            just one of the two is empty.
        hd95_px: 95th percentile of the Hausdorff distance, in pixels of the mask's grid; None
            unless both have a border.
        assd_px: average symmetric surface distance, likewise.
        hd95_mm: the same in millimetres; None where the spacing is not known, too.
        assd_mm: likewise.
    """

    cldice: float | None = None
    hd95_px: float | None = None
    assd_px: float | None = None
    hd95_mm: float | None = None
    assd_mm: float | None = None


def shape_scores(
    prediction_HW: NDArray[np.bool_],
    mask_HW: NDArray[np.uint8],
    spacing_mm: tuple[float, float] | None = None,
) -> ShapeScores:
    """Score one predicted mask by its centre line and its border.

    Pixels that do not count are taken out of both masks first; where only that cuts a mask off,
    there is no border.

    Args:
        prediction_HW: bool.
        mask_HW: uint8, 1 = mask, 0 = not, 255 = does not count.
        spacing_mm: height and width of a pixel of this grid; None where they are not known.
    """
    ignored_HW = mask_HW == IGNORE_LABEL
    predicted_HW, true_HW = prediction_HW & ~ignored_HW, mask_HW == 1
    window = _window(predicted_HW | true_HW)
    if window is None:
        return ShapeScores()
    predicted_HW, true_HW, ignored_HW = (
        mask_HW[window] for mask_HW in (predicted_HW, true_HW, ignored_HW)
    )
    cldice = _centre_line_dice(predicted_HW, true_HW)
    predicted_N2, true_N2 = _border(predicted_HW, ignored_HW), _border(true_HW, ignored_HW)
    if not len(predicted_N2) or not len(true_N2):
        return ShapeScores(cldice)
    hd95_px, assd_px = _border_distances(predicted_N2, true_N2)
    if spacing_mm is None:
        return ShapeScores(cldice, hd95_px, assd_px)
    height_mm, width_mm = spacing_mm
    if height_mm == width_mm:
        hd95_mm, assd_mm = hd95_px * height_mm, assd_px * height_mm
    else:
        # Which point is the nearest may be another.
        hd95_mm, assd_mm = _border_distances(predicted_N2 * spacing_mm, true_N2 * spacing_mm)
    return ShapeScores(cldice, hd95_px, assd_px, hd95_mm, assd_mm)


def _window(mask_HW: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Return the part of the grid that holds a mask; None where there is none of it.

    With a pixel around it, but not beyond the grid: what is ignored beside the mask still counts.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return None
    top, left = max(0, int(rows[0]) - 1), max(0, int(columns[0]) - 1)
    return slice(top, int(rows[-1]) + 2), slice(left, int(columns[-1]) + 2)


def _centre_line_dice(predicted_HW: NDArray[np.bool_], true_HW: NDArray[np.bool_]) -> float:
    """Return the harmonic mean of the shares of each centre line that lie in the other mask.

    Shit et al. 2021, "clDice", equations 1 and 2, with the skeletons of its authors' own code.
    """
    if not predicted_HW.any() or not true_HW.any():
        return 0.0
    from skimage.morphology import skeletonize

    predicted_line_HW, true_line_HW = skeletonize(predicted_HW), skeletonize(true_HW)
    precision = (predicted_line_HW & true_HW).sum() / predicted_line_HW.sum()
    sensitivity = (true_line_HW & predicted_HW).sum() / true_line_HW.sum()
    if precision + sensitivity == 0:
        return 0.0
    return float(2 * precision * sensitivity / (precision + sensitivity))


def _border(mask_HW: NDArray[np.bool_], ignored_HW: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return a mask's border (N, 2): its pixels with one of four neighbours that is not of it.

    Beyond the grid nothing is of it; what is ignored may be, and makes no border.
    """
    inside_HW = np.pad(mask_HW | ignored_HW, 1)
    within_HW = (
        inside_HW[:-2, 1:-1] & inside_HW[2:, 1:-1] & inside_HW[1:-1, :-2] & inside_HW[1:-1, 2:]
    )
    return np.argwhere(mask_HW & ~within_HW)


def _border_distances(first_N2: NDArray[Any], second_N2: NDArray[Any]) -> tuple[float, float]:
    """Return the 95th percentile of the Hausdorff distance, and the average surface distance.

    Of the two directed percentiles the larger one; the average is over the points of both.
    """
    from scipy.spatial import KDTree

    to_second_N, _ = KDTree(second_N2).query(first_N2)
    to_first_N, _ = KDTree(first_N2).query(second_N2)
    hd95 = max(np.percentile(to_second_N, 95), np.percentile(to_first_N, 95))
    return float(hd95), float(np.concatenate((to_second_N, to_first_N)).mean())
