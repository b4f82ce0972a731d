"""How well one predicted mask agrees with the true one.

Shape legend: H height, W width of the mask's own grid.
"""

from __future__ import annotations

from dataclasses import dataclass

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
