"""Means over images, and how far they can be trusted.

Shape legend: N values, G groups, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

NUM_RESAMPLES = 2000
LEVEL = 0.95

MIN_GROUPS = 6
"""Fewest groups for a verdict: by chance alone all differences of five groups have one sign in 2 of
2⁵ = 32 cases, more than 5 %; of six groups in 2 of 64."""

MIN_EFFECTIVE_GROUPS = 10
"""Fewest groups to draw from, in equal ones (Kish 1965: (Σn)² / Σn² of groups of n images).

Of fewer, and of many of which one has most of the images, a bootstrap's intervals are too narrow.
"""

BOOTSTRAP = {
    "unit": "group",
    "num_resamples": NUM_RESAMPLES,
    "level": LEVEL,
    "method": "expanded percentile",
    "min_effective_groups": MIN_EFFECTIVE_GROUPS,
    "method_below": "Student's t",
}
"""How intervals come about, as results record it."""

METHOD = (
    f"by a bootstrap of {NUM_RESAMPLES} draws of whole groups (as a rule, patients), its "
    f"percentiles widened for there being few; of groups that count as fewer than "
    f"{MIN_EFFECTIVE_GROUPS}, being fewer or having most images in some, Student's"
)
"""The same for people."""

Range = tuple[float, float]
"""Lowest and highest value that a quantity can have."""

ANY: Range = (-math.inf, math.inf)

_TINY = float(np.finfo(float).tiny)


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
        interval: of the mean, see ``mean_interval``; None for fewer than two groups.
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


def summarise(
    values: Sequence[float | None], groups: Sequence[str], seed: int, within: Range = ANY
) -> Summary:
    """Summarise values, leaving out those that are None.

    Args:
        values: one an image.
        groups: by value, the group (patient) it belongs to.
        seed: of the bootstrap.
        within: where values can lie.
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
        interval=mean_interval(values_N, [group for _, group in kept], seed, within),
        minimum=float(values_N.min()),
        maximum=float(values_N.max()),
    )


def mean_interval(
    values_N: NDArray[np.float64], groups: Sequence[str], seed: int, within: Range = ANY
) -> Interval | None:
    """Return the interval of a mean at confidence ``LEVEL``, by a bootstrap of whole groups.

    Images of one patient resemble each other, so that drawing images singly would make the
    interval too narrow: groups are drawn with replacement, and all values of a drawn group count
    (the cluster bootstrap; Davison and Hinkley 1997, §3.8).

    The 2.5th and 97.5th percentiles of such means lie too near together where groups are few: the
    spread of G groups is sqrt((G - 1) / G) too small, and that it is estimated counts, too. Of 8
    groups they miss the true mean in 13 % of cases, not in 5. So percentiles further out are
    taken, those that make the normal law's interval Student's (Hesterberg 2015, "What Teachers
    Should Know About the Bootstrap", on expanded percentile intervals).

    No draw leaves the range of the groups' own means, which of 2 groups holds the true mean in half
    of all cases, and of many of which one has most of the images hardly more often. Where groups
    count as fewer than ``MIN_EFFECTIVE_GROUPS`` the interval is Student's: the mean and so many
    standard errors to either side, from the deviation of the groups' own means, each with its share
    of the images. It holds the true mean too often rather than too seldom where shares are unequal.
    ``benchmarks/intervals.py`` measures how often either is right.

    Args:
        values_N: finite values.
        groups: by value, its group.
        seed: of the draws, ``NUM_RESAMPLES`` in number.
        within: where values, and so their mean, can lie: what of the interval is beyond is cut off.

    Returns:
        The interval, or None for fewer than two groups, which say nothing of others.
    """
    sum_G, count_G = _sums(values_N, groups)
    num_groups = len(sum_G)
    if num_groups < 2:
        return None
    freedom = num_groups - 1
    quantile = special.stdtrit(freedom, (1 + LEVEL) / 2)
    if _are_few(count_G):
        mean, error = _mean_and_error(sum_G, count_G)
        low, high = mean - quantile * error, mean + quantile * error
    else:
        tail = special.ndtr(-math.sqrt(num_groups / freedom) * quantile)
        low, high = np.quantile(_draw_means(sum_G, count_G, seed), (tail, 1 - tail))
    return Interval(max(float(low), within[0]), min(float(high), within[1]))


def p_value_of_zero(
    values_N: NDArray[np.float64], groups: Sequence[str], seed: int
) -> float | None:
    """Return the two-sided p-value of a mean of 0, made as the interval is.

    It is 1 - the confidence at which ``mean_interval`` would end at 0, so that it is below
    0.05 just where the 95% interval leaves 0 out. Where no draw reaches 0, which would end p-values
    at what the number of draws can tell, Student's t of the draws' spread (stretched as in the
    interval) says how far off 0 is, if that is less.

    Args:
        values_N: finite values.
        groups: by value, its group.
        seed: of the draws.

    Returns:
        The p-value, or None for fewer than two groups.
    """
    sum_G, count_G = _sums(values_N, groups)
    num_groups = len(sum_G)
    if num_groups < 2:
        return None
    freedom = num_groups - 1
    if _are_few(count_G):
        mean, error = _mean_and_error(sum_G, count_G)
        return float(2 * special.stdtr(freedom, -abs(mean) / max(error, _TINY)))
    stretch = math.sqrt(num_groups / freedom)
    means_R = _draw_means(sum_G, count_G, seed)
    # One more than was drawn, on either side: no p-value is 0 for want of draws. Of those at 0
    # half count on each side, so that identical values are not called different.
    at_zero = float((means_R == 0).sum()) / 2
    below, above = (float(side.sum()) + at_zero for side in (means_R < 0, means_R > 0))
    share = min(0.5, (min(below, above) + 1) / (NUM_RESAMPLES + 2))
    p = 2 * special.stdtr(freedom, special.ndtri(share) / stretch)
    if min(below, above) == 0:
        # Differences that are all the same have no spread at all.
        t = abs(means_R.mean()) / max(stretch * means_R.std(), _TINY)
        p = min(p, 2 * special.stdtr(freedom, -t))
    return float(p)


def resampled_means(
    values_N: NDArray[np.float64], groups: Sequence[str], seed: int
) -> NDArray[np.float64]:
    """Return the means (R,) of draws of whole groups."""
    return _draw_means(*_sums(values_N, groups), seed)


def _sums(
    values_N: NDArray[np.float64], groups: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return each group's sum of values (G,), and how many they are."""
    names, group_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sum_G = np.bincount(group_N, weights=values_N, minlength=len(names)).astype(np.float64)
    return sum_G, np.bincount(group_N, minlength=len(names))


def _are_few(count_G: NDArray[np.intp]) -> bool:
    """Return whether groups of so many values count as fewer than ``MIN_EFFECTIVE_GROUPS``."""
    # Whole numbers, so that equal groups are as many as they are.
    return int(count_G.sum()) ** 2 < MIN_EFFECTIVE_GROUPS * int((count_G**2).sum())


def _mean_and_error(sum_G: NDArray[np.float64], count_G: NDArray[np.intp]) -> tuple[float, float]:
    """Return the mean over all values, and its standard error from the groups' own means."""
    share_G = count_G / count_G.sum()
    deviation = (sum_G / count_G).std(ddof=1)
    mean = sum_G.sum() / count_G.sum()
    return float(mean), float(deviation * math.sqrt((share_G**2).sum()))


def _draw_means(
    sum_G: NDArray[np.float64], count_G: NDArray[np.intp], seed: int
) -> NDArray[np.float64]:
    return np.concatenate(
        [
            # A part at a time: all of them as floats would be large where groups are many.
            (part @ sum_G) / (part @ count_G)
            for part in np.array_split(_draws(len(sum_G), seed), 20)
        ]
    )


# The cells of a table have mostly the same groups.
@lru_cache(maxsize=2)
def _draws(num_groups: int, seed: int) -> NDArray[np.uint16]:
    """Return how often each resample draws each group, (R, G)."""
    rng = np.random.default_rng(seed)
    times_RG = np.empty((NUM_RESAMPLES, num_groups), dtype=np.uint16)
    for times_G in times_RG:
        times_G[:] = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
    return times_RG


def number_text(value: float | None, num_digits: int = 3) -> str:
    """Write a number for people; a dash where there is none."""
    # What rounds to nothing has no sign: "-0.000" beside "0.000" would be read as another figure.
    return "–" if value is None else f"{value:z.{num_digits}f}"


def count_text(number: int, of: str) -> str:
    """Write a number of things for people: "1 group", "2 groups"."""
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def over_text(num_images: int, num_groups: int) -> str:
    """Write what figures are taken over."""
    return f"{count_text(num_images, 'image')} of {count_text(num_groups, 'group')}"


def interval_text(interval: Interval | None, num_digits: int = 3) -> str:
    """Write an interval for people; a dash where there is none."""
    if interval is None:
        return "–"
    return f"{number_text(interval.low, num_digits)} to {number_text(interval.high, num_digits)}"


def gain_text(value: float, num_digits: int = 3) -> str:
    """Write a difference for people, with its sign."""
    return f"{value:+z.{num_digits}f}"
