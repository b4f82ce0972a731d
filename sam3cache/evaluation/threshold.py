"""From which probability on a pixel counts as mask: as given, the checkpoint's, or the best of val.

Shape legend: N images, T thresholds, C classes, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import ConfigError
from sam3cache.evaluation.predicting import Prediction
from sam3cache.records import IGNORE_LABEL

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""That "auto" chooses from: finer ones differ by less than a split of hundred images can tell."""

AUTO_SPLIT = "val"
"""The split that "auto" chooses on."""


@dataclass(frozen=True, slots=True)
class ThresholdChoice:
    """Where the threshold of an evaluation is from.

    Attributes:
        source: "given", "checkpoint", "auto", or "none" in the task "multiclass".
        sentence: the same in plain words.
        split: that "auto" chose on; None otherwise.
        num_images: images that it chose on.
        mean_dice: the Dice that it reached on them, mean over images.
        on_evaluated: whether it chose on images that are evaluated as well.
        num_seen: images that it chose on, and that the head was trained on.
    """

    source: Literal["given", "checkpoint", "auto", "none"]
    sentence: str
    split: str | None = None
    num_images: int = 0
    mean_dice: float | None = None
    on_evaluated: bool = False
    num_seen: int = 0


class DiceByThreshold:
    """The mean Dice at each of ``THRESHOLDS``, image by image as the evaluation takes it."""

    def __init__(self) -> None:
        self._dice_NT: list[NDArray[np.float64]] = []
        self._are_all_empty = True

    def __len__(self) -> int:
        return len(self._dice_NT)

    def add(self, prediction: Prediction) -> None:
        """Take in an image that has a mask."""
        assert prediction.mask_CHW is not None
        dice_CT = np.stack(
            [
                _dice(probability_HW, mask_HW)
                for probability_HW, mask_HW in zip(
                    prediction.probability_CHW, prediction.mask_CHW, strict=True
                )
            ]
        )
        self._dice_NT.append(_mean(dice_CT))
        self._are_all_empty &= not bool((prediction.mask_CHW == 1).any())

    def best(self) -> tuple[float, float]:
        """Return the threshold of the highest mean Dice, of equals the nearest to 0.5, and it.

        Raises:
            ConfigError: no image has a mask that is not empty.
        """
        if self._are_all_empty:
            raise ConfigError(
                f"--threshold auto: no image of split {AUTO_SPLIT} has a mask that is not empty; "
                "give a number, or leave --threshold out for the checkpoint's own"
            )
        dice_T = _mean(np.stack(self._dice_NT))
        highest = float(np.nanmax(dice_T))
        best = [t for t, dice in zip(THRESHOLDS, dice_T, strict=True) if dice >= highest - 1e-12]
        return min(best, key=lambda threshold: abs(threshold - 0.5)), highest


def _dice(probability_HW: Tensor, mask_HW: Tensor) -> NDArray[np.float64]:
    """Return the Dice at each threshold, (T,); NaN for nothing predicted of an empty mask."""
    counted_HW = mask_HW != IGNORE_LABEL
    thresholds = probability_HW.new_tensor(THRESHOLDS)
    # Of each pixel, how many thresholds it reaches.
    reached_N = torch.bucketize(probability_HW[counted_HW], thresholds, right=True)
    true_N = mask_HW[counted_HW] == 1
    num_bins = len(THRESHOLDS) + 1
    predicted_T, hits_T = (
        torch.bincount(reached, minlength=num_bins).flip(0).cumsum(0).flip(0)[1:].cpu().numpy()
        for reached in (reached_N, reached_N[true_N])
    )
    area_T = predicted_T + int(true_N.sum())
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * hits_T / area_T, dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the first axis of what is there; NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0))
