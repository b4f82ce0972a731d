"""Does a head use the view angle? Dice with true, shuffled and constant angles, and a verdict.

A head can be given angles and learn to ignore them, and nothing in its losses or in its Dice
tells. So each image is predicted again with the angles of others: what changes is what the head
takes from the angles.

Shape legend: N images, K mask planes, S shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.statistics import Interval, bootstrap_interval

NUM_SHUFFLES = 5

SAME_OUTPUT = 1e-6
"""Change of a probability that is float32 rounding rather than a use of the angles."""

NEGLIGIBLE_DICE = 0.005
"""Change of mean Dice too small to matter; an interval within it shows that angles do not."""

MIN_GROUPS = 6
"""Fewest groups for a verdict from an interval: by chance alone all differences of five groups
have one sign in 2 of 2⁵ = 32 cases, more than 5 %; of six groups in 2 of 64."""

Verdict = Literal["used", "harmful", "negligible", "unused", "undecided"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences, image by image.

    Attributes:
        mean: of the differences.
        interval: see ``statistics.bootstrap_interval``; None for fewer than two groups.
    """

    mean: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class AngleUse:
    """What a head makes of the view angles.

    Attributes:
        verdict: "used"; "harmful": used, and Dice is lower for it; "negligible": used, but Dice is
            the same within ``NEGLIGIBLE_DICE``; "unused": no output changes; or "undecided".
        sentence: the verdict and its reason in plain words.
        num_images: images compared: both angles known, and a mask that is not empty.
        num_groups: groups that these belong to.
        num_shuffles: shuffles that the shuffled Dice is averaged over.
        constant_angles_deg: (primary, secondary) mean angles, given to every image in turn.
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


def derangement(view_N: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Exchange views at random so that no image keeps its own.

    The images stand in random order but view by view, and each takes from the one as many places
    on as the commonest view has images. Where that view has more than half of all images, not
    all of them can be given another one: the surplus, drawn at random, is left out.

    Args:
        view_N: number of each image's view, from 0; at least two views.
        rng: source of the order.

    Returns:
        By image, which one to take the angles from, each at most once; -1 where left out.
    """
    order = rng.permutation(len(view_N))
    commonest = int(np.bincount(view_N).argmax())
    is_commonest = view_N[order] == commonest
    others, same = order[~is_commonest], order[is_commonest]
    order = np.concatenate((others, same[: len(others)]))
    # Views in random order, too: else each shuffle would exchange the same pairs of views.
    rank = rng.permutation(view_N.max() + 1)
    order = order[np.argsort(rank[view_N[order]], kind="stable")]
    largest = int(np.bincount(view_N[order]).max())
    donor_N = np.full(len(view_N), -1, dtype=np.intp)
    donor_N[order] = np.roll(order, -largest)
    return donor_N


def mean_angles_deg(angles_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each angle on the circle, on which -180° and 180° are one."""
    radians_N2 = np.deg2rad(angles_N2)
    mean_2 = np.arctan2(np.sin(radians_N2).mean(axis=0), np.cos(radians_N2).mean(axis=0))
    return np.asarray(np.rad2deg(mean_2), dtype=np.float64)


def judge(
    trial: AngleTrial,
    true_NK: NDArray[np.float64],
    shuffled_SNK: NDArray[np.float64],
    constant_NK: NDArray[np.float64],
    groups: Sequence[str],
    max_probability_change: float,
    seed: int,
) -> AngleUse:
    """Compare Dice under the three kinds of angles.

    Args:
        trial: the angles that were used.
        true_NK: Dice with the true angles; NaN where there is nothing to compare.
        shuffled_SNK: Dice with shuffled angles; NaN where there is nothing to compare.
        constant_NK: Dice with the constant angles; NaN where there is nothing to compare.
        groups: by image, its group.
        max_probability_change: largest change of any probability under shuffling.
        seed: of the bootstrap.
    """
    counted_SNK = np.isfinite(shuffled_SNK)
    num_NK = counted_SNK.sum(axis=0)
    compared_NK = np.isfinite(true_NK) & np.isfinite(constant_NK) & (num_NK > 0)
    if not compared_NK.any():
        return AngleUse(
            "undecided",
            "Whether the head uses the view angle cannot be told: no image here has both known "
            "angles and a mask that is not empty.",
        )
    sum_NK = np.where(counted_SNK, shuffled_SNK, 0.0).sum(axis=0)
    shuffled = sum_NK[compared_NK] / num_NK[compared_NK]
    true, constant = true_NK[compared_NK], constant_NK[compared_NK]
    image_indices = np.nonzero(compared_NK)[0]
    groups_here = [groups[i] for i in image_indices]
    against_shuffled = _difference(true - shuffled, groups_here, seed)
    num_groups = len(set(groups_here))
    verdict, sentence = _verdict(
        against_shuffled,
        num_groups,
        max_probability_change,
        finds_nothing=max(true.mean(), shuffled.mean()) <= NEGLIGIBLE_DICE,
    )
    return AngleUse(
        verdict,
        sentence,
        num_images=len(set(image_indices.tolist())),
        num_groups=num_groups,
        constant_angles_deg=(float(trial.constant_2[0]), float(trial.constant_2[1])),
        dice_true=float(true.mean()),
        dice_shuffled=float(shuffled.mean()),
        dice_constant=float(constant.mean()),
        true_minus_shuffled=against_shuffled,
        true_minus_constant=_difference(true - constant, groups_here, seed),
        max_probability_change=max_probability_change,
    )


def _difference(values: NDArray[np.float64], groups: Sequence[str], seed: int) -> Difference:
    return Difference(float(values.mean()), bootstrap_interval(values, groups, seed))


def _verdict(
    difference: Difference,
    num_groups: int,
    max_probability_change: float,
    *,
    finds_nothing: bool,
) -> tuple[Verdict, str]:
    mean, interval = difference.mean, difference.interval
    if max_probability_change <= SAME_OUTPUT:
        return "unused", (
            "The head does not use the view angle: with the angles of other views all its outputs "
            "stay the same."
        )
    changes = f"probabilities change by up to {max_probability_change:.2g}"
    if finds_nothing:
        return "undecided", (
            "Whether the head gains from the view angle cannot be told: it finds next to nothing "
            f"with any angles, although {changes}."
        )
    if interval is None or num_groups < MIN_GROUPS:
        return "undecided", (
            f"Whether the head gains from the view angle cannot be told from {num_groups} "
            f"{'group' if num_groups == 1 else 'groups'} of images, at least {MIN_GROUPS} are "
            f"needed: shuffling the angles changes Dice by {-mean:+.4f}, and {changes}."
        )
    bounds = f"95% interval {interval.low:.4f} to {interval.high:.4f}"
    if max(-interval.low, interval.high) <= NEGLIGIBLE_DICE:
        return "negligible", (
            f"The head hardly uses the view angle: true angles change Dice by {mean:+.4f} against "
            f"shuffled ones ({bounds}, within ±{NEGLIGIBLE_DICE}), although {changes}."
        )
    if interval.low > 0:
        return "used", (
            f"The head uses the view angle: true angles give {mean:.4f} higher Dice than shuffled "
            f"ones ({bounds})."
        )
    if interval.high < 0:
        return "harmful", (
            f"The head uses the view angle, to its harm: true angles give {-mean:.4f} lower Dice "
            f"than shuffled ones (95% interval {-interval.high:.4f} to {-interval.low:.4f})."
        )
    return "undecided", (
        f"Whether the head gains from the view angle cannot be told: true angles change Dice by "
        f"{mean:+.4f} against shuffled ones ({bounds}), and {changes}."
    )


def format_view(primary_angle_deg: float, secondary_angle_deg: float) -> str:
    """Write a view as cardiologists do: "LAO 30.0 CAU 25.0"."""
    primary = f"{'LAO' if primary_angle_deg >= 0 else 'RAO'} {abs(primary_angle_deg):.1f}"
    secondary = f"{'CRA' if secondary_angle_deg >= 0 else 'CAU'} {abs(secondary_angle_deg):.1f}"
    return f"{primary} {secondary}"
