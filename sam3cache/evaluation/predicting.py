"""What a head says of one image, on the grid of its mask.

Shape legend: B batch, K planes of logits, C classes, M planes of a stored mask, S side of a square
of logits, H height, W width of a mask's own grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import ConfigError
from sam3cache.evaluation.scores import class_mean
from sam3cache.geometry import Letterbox
from sam3cache.heads import Head
from sam3cache.loading import CachedSamples
from sam3cache.metrics import MaskScores, dice_iou_precision_recall
from sam3cache.records import IGNORE_LABEL, Batch
from sam3cache.tasks import Task, class_probabilities, decide, mask_planes

IMAGE_LEVEL_PREFIX = "image_"
"""Begins the names of levels that hold pictures; all others come from a backbone."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How logits become masks.

    Attributes:
        task: what the head was asked.
        num_classes: C.
        threshold: probability from which a pixel counts; without effect in "multiclass".
    """

    task: Task
    num_classes: int
    threshold: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a head says of one image, on the grid of its mask; without one, on the picture's.

    Attributes:
        probability_CHW: float32.
        predicted_CHW: bool.
        mask_CHW: uint8, 0, 1 and 255 for what does not count; None without a mask.
        predicted_px: by class, pixels predicted where the mask does not say ignore.
        true_px: by class, pixels of the mask, None where none of its plane counts; None without a
            mask.
        scores: by class; None without a mask.
    """

    probability_CHW: Tensor
    predicted_CHW: Tensor
    mask_CHW: Tensor | None
    predicted_px: list[int]
    true_px: list[int | None] | None
    scores: list[MaskScores] | None

    def dice(self) -> float:
        """Return the mean Dice over classes as ``scores.class_mean``; NaN of an empty mask."""
        assert self.scores is not None
        assert self.true_px is not None
        mean = class_mean(self.scores) if any(self.true_px) else None
        return math.nan if mean is None else mean


def logits_of(head: Head, batch: Batch) -> Tensor:
    """Return a head's logits, float32 (B, K, S, S), on the padded square."""
    with torch.inference_mode():
        logits_BKSS: Tensor = head(batch)
    return logits_BKSS.float()


def predict(
    logits_KSS: Tensor, letterbox: Letterbox, mask_CHW: Tensor | None, rule: Rule
) -> Prediction:
    """Bring one image's logits to the grid of its mask, decide, and score.

    Args:
        logits_KSS: on the padded square.
        letterbox: how the image lies there.
        mask_CHW: see ``planes``; None where the image has none.
        rule: how logits become masks.
    """
    if mask_CHW is None:
        height_px, width_px = letterbox.source_height_px, letterbox.source_width_px
    else:
        mask_CHW = mask_CHW.to(logits_KSS.device)
        height_px, width_px = mask_CHW.shape[-2:]
    logits_KHW = letterbox.logits_to_grid(logits_KSS, height_px, width_px)
    probability_CHW = class_probabilities(logits_KHW, rule.task)
    predicted_CHW = decide(logits_KHW, rule.task, rule.threshold)
    if mask_CHW is None:
        return Prediction(probability_CHW, predicted_CHW, None, _counts(predicted_CHW), None, None)
    counted_CHW = mask_CHW != IGNORE_LABEL
    return Prediction(
        probability_CHW,
        predicted_CHW,
        mask_CHW,
        _counts(predicted_CHW & counted_CHW),
        [
            true_px if num_counted else None
            for true_px, num_counted in zip(
                _counts(mask_CHW == 1), _counts(counted_CHW), strict=True
            )
        ],
        [
            dice_iou_precision_recall(predicted_HW, mask_HW)
            for predicted_HW, mask_HW in zip(predicted_CHW, mask_CHW, strict=True)
        ],
    )


def planes(cached: CachedSamples, index: int, rule: Rule) -> Tensor | None:
    """Return an image's mask as a plane a class, uint8 (C, H, W); None where it has none.

    Raises:
        ConfigError: the mask holds numbers that are of no class.
    """
    mask_MHW = cached.mask(index)
    if mask_MHW is None:
        return None
    highest = 1 if rule.task == "multilabel" else rule.num_classes
    known_MHW = (mask_MHW <= highest) | (mask_MHW == IGNORE_LABEL)
    if not known_MHW.all():
        name, number = cached.samples[index].id, int(mask_MHW[~known_MHW][0])
        if rule.task == "multilabel":
            raise ConfigError(
                f"the mask of {name} holds class numbers ({number}); heads of task multilabel are "
                "measured on planes of 0 and 1: store a plane a class, or name another set by "
                "--label-set"
            )
        raise ConfigError(
            f"the mask of {name} holds class number {number}; expected 0 to {highest}, or "
            f"{IGNORE_LABEL}: store the label set again with all of its classes"
        )
    return mask_planes(mask_MHW, rule.task, rule.num_classes)


def confusion_of(prediction: Prediction) -> NDArray[np.int64]:
    """Count the pixels of each true class (rows) by the class predicted for them (columns).

    Returns:
        (C + 1, C + 1), the first of both "none"; pixels that do not count are left out.
    """
    assert prediction.mask_CHW is not None
    counted_HW = prediction.mask_CHW[0] != IGNORE_LABEL
    num_classes = len(prediction.mask_CHW)
    true_N, predicted_N = (
        _class_numbers(planes_CHW)[counted_HW]
        for planes_CHW in (prediction.mask_CHW == 1, prediction.predicted_CHW)
    )
    side = num_classes + 1
    counts = torch.bincount(true_N * side + predicted_N, minlength=side**2)
    return counts.reshape(side, side).cpu().numpy()


def _class_numbers(planes_CHW: Tensor) -> Tensor:
    """Return int64 (H, W): 1 to C, 0 where no plane is set."""
    numbers = torch.arange(1, len(planes_CHW) + 1, device=planes_CHW.device)
    return (planes_CHW * numbers[:, None, None]).sum(dim=0)


def _counts(planes_CHW: Tensor) -> list[int]:
    counts: list[int] = planes_CHW.sum(dim=(-2, -1)).tolist()
    return counts
