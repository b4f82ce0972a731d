"""Means over images, and how far they can be trusted.

Shape legend: N values, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds between which a mean is expected to lie, at confidence ``LEVEL``."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One number an image, over images.

    Attributes:
        num_values: values that the rest is taken over; where there are none, the rest is None.
        mean: arithmetic mean.
        std: sample standard deviation (divided by ``num_values - 1``); None for fewer than two.
        median: middle value.
        interval: of the mean, see ``bootstrap_interval``; None for fewer than two groups.
        minimum: lowest value.
        maximum: highest value.
    """

    num_values: int
    mean: float | None = None
    std: float | None = None
    median: float | None = None
    interval: Interval | None = None
    minimum: float | None = None
    maximum: float | None = None


def summarise(values: Sequence[float | None], groups: Sequence[str], seed: int) -> Summary:
    """Summarise values, leaving out those that are None.

    Args:
        values: one an image.
        groups: by value, the group (patient) it belongs to.
        seed: of the bootstrap.
    """
    kept = [
        (value, group) for value, group in zip(values, groups, strict=True) if value is not None
    ]
    if not kept:
        return Summary(0)
    values_N = np.array([value for value, _ in kept], dtype=np.float64)
    return Summary(
        num_values=len(kept),
        mean=float(values_N.mean()),
        std=float(values_N.std(ddof=1)) if len(kept) > 1 else None,
        median=float(np.median(values_N)),
        interval=bootstrap_interval(values_N, [group for _, group in kept], seed),
        minimum=float(values_N.min()),
        maximum=float(values_N.max()),
    )


def bootstrap_interval(
    values_N: NDArray[np.float64], groups: Sequence[str], seed: int
) -> Interval | None:
    """Return the percentile bootstrap interval of a mean, drawing whole groups.

    Images of one patient resemble each other, so that drawing images singly would make the
    interval too narrow: groups are drawn with replacement, and all values of a drawn group count
    (the cluster bootstrap; Efron and Tibshirani 1993, §13.3 for the percentiles, Davison and
    Hinkley 1997, §3.8 for the groups).

    Args:
        values_N: finite values.
        groups: by value, its group.
        seed: of the draws, ``NUM_RESAMPLES`` in number.

    Returns:
        The interval, or None for fewer than two groups, of which nothing can be drawn.
    """
    names, group_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    num_groups = len(names)
    if num_groups < 2:
        return None
    sum_G = np.bincount(group_N, weights=values_N, minlength=num_groups)
    count_G = np.bincount(group_N, minlength=num_groups)
    rng = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn_G = rng.integers(num_groups, size=num_groups)
        means[i] = sum_G[drawn_G].sum() / count_G[drawn_G].sum()
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(low), float(high))


def number_text(value: float | None, num_digits: int = 3) -> str:
    """Write a number for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{num_digits}f}"


def interval_text(interval: Interval | None, num_digits: int = 3) -> str:
    """Write an interval for people; a dash where there is none."""
    if interval is None:
        return "–"
    return f"{interval.low:.{num_digits}f} to {interval.high:.{num_digits}f}"
