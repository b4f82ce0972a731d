"""What a head takes from one of its inputs: Dice with the images' own and with those of others.

A head can be given an input and learn to ignore it, and nothing in its losses or in its Dice
tells. So each image is predicted again with the input of others: what changes is what the head
takes from it.

Shape legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.statistics import (
    MIN_GROUPS,
    Interval,
    count_text,
    gain_text,
    interval_text,
    mean_interval,
)

SAME_OUTPUT = 1e-6
"""Change of a probability that is float32 rounding rather than a use of the input."""

NEGLIGIBLE_DICE = 0.005
"""Change of mean Dice too small to matter; an interval within it shows that the input does not."""

Verdict = Literal["used", "harmful", "negligible", "unused", "undecided"]
"""Of an input: "used"; "harmful": used, and Dice is lower for it; "negligible": used, but Dice is
the same within ``NEGLIGIBLE_DICE``; "unused": no output changes; or "undecided"."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences, image by image.

    Attributes:
        mean: of the differences.
        interval: see ``statistics.mean_interval``; None for fewer than two groups.
    """

    mean: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Wording:
    """How an input is spoken of.

    Attributes:
        subject: "the view angle".
        shuffled: what is shuffled: "angles".
        others: whose they are then: "views".
    """

    subject: str
    shuffled: str
    others: str


def derangement(kind_N: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Exchange images at random so that none is given one of its own kind (view, patient).

    The images stand in random order but kind by kind, and each takes from the one as many places
    on as the commonest kind has images. Where that kind has more than half of all images, not
    all of them can be given another one: the surplus, drawn at random, is left out.

    Args:
        kind_N: number of each image's kind, from 0; at least two kinds.
        rng: source of the order.

    Returns:
        By image, which one to take from, each at most once; -1 where left out.
    """
    order = rng.permutation(len(kind_N))
    commonest = int(np.bincount(kind_N).argmax())
    is_commonest = kind_N[order] == commonest
    others, same = order[~is_commonest], order[is_commonest]
    order = np.concatenate((others, same[: len(others)]))
    # Kinds in random order, too: else each shuffle would exchange the same pairs of kinds.
    rank = rng.permutation(kind_N.max() + 1)
    order = order[np.argsort(rank[kind_N[order]], kind="stable")]
    largest = int(np.bincount(kind_N[order]).max())
    donor_N = np.full(len(kind_N), -1, dtype=np.intp)
    donor_N[order] = np.roll(order, -largest)
    return donor_N


def difference(values: NDArray[np.float64], groups: Sequence[str], seed: int) -> Difference:
    """Return the mean of paired differences of Dice with its interval."""
    return Difference(float(values.mean()), mean_interval(values, groups, seed, (-1.0, 1.0)))


def verdict(
    wording: Wording,
    true_minus_shuffled: Difference,
    num_groups: int,
    max_probability_change: float,
    *,
    finds_nothing: bool,
) -> tuple[Verdict, str]:
    """Judge what an input is worth to a head.

    Args:
        wording: how to speak of it.
        true_minus_shuffled: paired difference of Dice.
        num_groups: that it is of.
        max_probability_change: largest change of any probability under shuffling.
        finds_nothing: whether Dice is next to 0 either way.

    Returns:
        The verdict, and a sentence with its reason.
    """
    mean, interval = true_minus_shuffled.mean, true_minus_shuffled.interval
    subject, shuffled = wording.subject, wording.shuffled
    if max_probability_change <= SAME_OUTPUT:
        return "unused", (
            f"The head does not use {subject}: with the {shuffled} of other {wording.others} all "
            "its outputs stay the same."
        )
    changes = f"probabilities change by up to {max_probability_change:.2g}"
    if finds_nothing:
        return "undecided", (
            f"Whether the head gains from {subject} cannot be told: it finds next to nothing "
            f"with any {shuffled}, although {changes}."
        )
    if interval is None or num_groups < MIN_GROUPS:
        return "undecided", (
            f"Whether the head gains from {subject} cannot be told from "
            f"{count_text(num_groups, 'group')} of images, at least {MIN_GROUPS} are needed: true "
            f"{shuffled} change Dice by {gain_text(mean, 4)} against shuffled ones, and {changes}."
        )
    bounds = f"95% interval {interval_text(interval, 4)}"
    if max(-interval.low, interval.high) <= NEGLIGIBLE_DICE:
        return "negligible", (
            f"The head hardly uses {subject}: true {shuffled} change Dice by {gain_text(mean, 4)} "
            f"against shuffled ones ({bounds}, within ±{NEGLIGIBLE_DICE}), although {changes}."
        )
    if interval.low > 0:
        return "used", (
            f"The head uses {subject}: true {shuffled} give {mean:.4f} higher Dice than shuffled "
            f"ones ({bounds})."
        )
    if interval.high < 0:
        return "harmful", (
            f"The head uses {subject}, to its harm: true {shuffled} give {-mean:.4f} lower Dice "
            f"than shuffled ones (95% interval {-interval.high:.4f} to {-interval.low:.4f})."
        )
    return "undecided", (
        f"Whether the head gains from {subject} cannot be told: true {shuffled} change Dice by "
        f"{gain_text(mean, 4)} against shuffled ones ({bounds}), and {changes}."
    )
