"""Does a head use the view angle? Dice with true, shuffled and constant angles, and a verdict.

Dice of an image is that of the evaluation: the mean over its classes that are there or predicted.

Shape legend: B batch, N images, S shuffles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sam3cache.evaluation.predicting import Prediction, Rule, logits_of, predict
from sam3cache.evaluation.shuffling import (
    NEGLIGIBLE_DICE,
    Difference,
    Verdict,
    Wording,
    derangement,
    difference,
    verdict,
)
from sam3cache.features import StoredSample
from sam3cache.heads import Head
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch
from sam3cache.views import format_view

NUM_SHUFFLES = 5

_WORDING = Wording("the view angle", "angles", "views")


@dataclass(frozen=True, slots=True)
class AngleUse:
    """What a head makes of the view angles.

    Attributes:
        verdict: see ``shuffling.Verdict``.
        sentence: the verdict and its reason in plain words.
        num_images: images compared: both angles known, and a mask that is not empty.
        num_groups: groups that these belong to.
        num_shuffles: shuffles that the shuffled Dice is averaged over.
        constant_angles_deg: (primary, secondary), given to every image: the mean on the circle of
            the angles of the images here that have a mask.
        dice_true: mean Dice with the images' own angles.
        dice_shuffled: mean Dice with the angles of other views.
        dice_constant: mean Dice with the constant angles.
        true_minus_shuffled: paired difference of Dice.
        true_minus_constant: paired difference of Dice.
        max_probability_change: largest change of any probability under shuffling.
    """

    verdict: Verdict
    sentence: str
    num_images: int = 0
    num_groups: int = 0
    num_shuffles: int = NUM_SHUFFLES
    constant_angles_deg: tuple[float, float] | None = None
    dice_true: float | None = None
    dice_shuffled: float | None = None
    dice_constant: float | None = None
    true_minus_shuffled: Difference | None = None
    true_minus_constant: Difference | None = None
    max_probability_change: float | None = None


@dataclass(frozen=True, slots=True)
class AngleTrial:
    """The angles to predict with beside the true ones.

    Attributes:
        shuffled_SN2: degrees; row i of a shuffle has the angles of another view than image i's
            own, or NaN where the shuffle leaves image i out.
        constant_2: degrees, (primary, secondary).
    """

    shuffled_SN2: NDArray[np.float64]
    constant_2: NDArray[np.float64]


def plan_trial(angles_N2: NDArray[np.float64], seed: int) -> AngleTrial | AngleUse:
    """Choose shuffled and constant angles, or say why the question cannot be answered.

    Args:
        angles_N2: degrees, (primary, secondary), of images that have a mask; NaN where unknown.
        seed: of the shuffles.
    """
    known_N = np.isfinite(angles_N2).all(axis=1)
    known_M2 = angles_N2[known_N]
    if len(known_M2) == 0:
        return AngleUse(
            "undecided",
            "Whether the head uses the view angle cannot be told: no image here has both a mask "
            "and known angles.",
        )
    views, view_M = np.unique(known_M2, axis=0, return_inverse=True)
    if len(views) == 1:
        return AngleUse(
            "undecided",
            "Whether the head uses the view angle cannot be told: all images here have the same "
            f"one, {format_view(*views[0])}.",
        )
    rng = np.random.default_rng(seed)
    shuffled_SN2 = np.full((NUM_SHUFFLES, *angles_N2.shape), np.nan)
    for shuffled_N2 in shuffled_SN2:
        donor_M = derangement(view_M.reshape(-1), rng)
        shuffled_N2[known_N] = np.where((donor_M >= 0)[:, None], known_M2[donor_M], np.nan)
    return AngleTrial(shuffled_SN2, mean_angles_deg(known_M2))


def mean_angles_deg(angles_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each angle on the circle, on which -180° and 180° are one."""
    radians_N2 = np.deg2rad(angles_N2)
    mean_2 = np.arctan2(np.sin(radians_N2).mean(axis=0), np.cos(radians_N2).mean(axis=0))
    return np.asarray(np.rad2deg(mean_2), dtype=np.float64)


def judge(
    trial: AngleTrial,
    true_N: NDArray[np.float64],
    shuffled_SN: NDArray[np.float64],
    constant_N: NDArray[np.float64],
    groups: Sequence[str],
    max_probability_change: float,
    seed: int,
) -> AngleUse:
    """Compare Dice under the three kinds of angles.

    Args:
        trial: the angles that were used.
        true_N: Dice with the true angles; NaN where there is nothing to compare.
        shuffled_SN: Dice with shuffled angles; NaN where there is nothing to compare.
        constant_N: Dice with the constant angles; NaN where there is nothing to compare.
        groups: by image, its group.
        max_probability_change: largest change of any probability under shuffling.
        seed: of the bootstrap.
    """
    was_shuffled_N = np.isfinite(shuffled_SN).any(axis=0)
    images = np.flatnonzero(np.isfinite(true_N) & np.isfinite(constant_N) & was_shuffled_N)
    if not len(images):
        return AngleUse(
            "undecided",
            "Whether the head uses the view angle cannot be told: no image here has both known "
            "angles and a mask that is not empty.",
        )
    true, constant = true_N[images], constant_N[images]
    shuffled = np.nanmean(shuffled_SN[:, images], axis=0)
    groups_here = [groups[i] for i in images]
    against_shuffled = difference(true - shuffled, groups_here, seed)
    num_groups = len(set(groups_here))
    judged, sentence = verdict(
        _WORDING,
        against_shuffled,
        num_groups,
        max_probability_change,
        finds_nothing=max(true.mean(), shuffled.mean()) <= NEGLIGIBLE_DICE,
    )
    return AngleUse(
        judged,
        sentence,
        num_images=len(groups_here),
        num_groups=num_groups,
        constant_angles_deg=(float(trial.constant_2[0]), float(trial.constant_2[1])),
        dice_true=float(true.mean()),
        dice_shuffled=float(shuffled.mean()),
        dice_constant=float(constant.mean()),
        true_minus_shuffled=against_shuffled,
        true_minus_constant=difference(true - constant, groups_here, seed),
        max_probability_change=max_probability_change,
    )


class AngleCheck:
    """Dice of every image with its own angles, with those of others, and with constant ones.

    An image takes part if both its angles are known and its mask is there and not empty.

    Args:
        samples: the images.
        has_mask: by image.
        seed: of the shuffles.
    """

    def __init__(
        self, samples: Sequence[StoredSample], has_mask: Sequence[bool], seed: int
    ) -> None:
        angles_N2 = np.array([(s.primary_angle_deg, s.secondary_angle_deg) for s in samples])
        angles_N2[~np.array(has_mask)] = np.nan
        self._takes_part_N = np.isfinite(angles_N2).all(axis=1)
        self._trial = plan_trial(angles_N2, seed)
        self._true_N = np.full(len(samples), np.nan)
        self._constant_N = self._true_N.copy()
        self._shuffled_SN = np.stack([self._true_N] * NUM_SHUFFLES)
        self._max_change = 0.0

    def compare(
        self,
        head: Head,
        batch: Batch,
        true: Mapping[int, Prediction],
        cached: CachedSamples,
        rule: Rule,
    ) -> None:
        """Predict a batch again with other angles.

        Args:
            head: the head.
            batch: with the true angles.
            true: by index of the image, what the head made of it, in the batch's order.
            cached: where the images' geometry is known.
            rule: how logits become masks.
        """
        here = [i for i in true if self._takes_part_N[i]]
        if isinstance(self._trial, AngleUse) or not here:
            return

        def with_angles(angles_N2: NDArray[np.float64]) -> dict[int, Prediction]:
            angles_B2 = torch.from_numpy(angles_N2[list(true)]).to(batch.angles_B2)
            logits_BKSS = logits_of(head, replace(batch, angles_B2=angles_B2))
            return {
                i: predict(logits_KSS, cached.letterbox(i), true[i].mask_CHW, rule)
                for i, logits_KSS in zip(true, logits_BKSS, strict=True)
                if i in here and np.isfinite(angles_N2[i]).all()
            }

        for i in here:
            self._true_N[i] = true[i].dice()
        constant_N2 = np.broadcast_to(self._trial.constant_2, (len(self._true_N), 2))
        for i, prediction in with_angles(constant_N2).items():
            self._constant_N[i] = prediction.dice()
        for shuffled_N2, dice_N in zip(self._trial.shuffled_SN2, self._shuffled_SN, strict=True):
            for i, prediction in with_angles(shuffled_N2).items():
                dice_N[i] = prediction.dice()
                change = (prediction.probability_CHW - true[i].probability_CHW).abs().max()
                self._max_change = max(self._max_change, float(change))

    def result(self, groups: Sequence[str], seed: int) -> AngleUse:
        """Judge, once all batches have been compared."""
        if isinstance(self._trial, AngleUse):
            return self._trial
        return judge(
            self._trial,
            self._true_N,
            self._shuffled_SN,
            self._constant_N,
            groups,
            self._max_change,
            seed,
        )
