"""Paired differences between two heads, image by image, and how far they can be trusted.

Shape legend: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.statistics import ANY, Interval, mean_interval, p_value_of_zero

SAME_VALUE = 1e-12
"""Difference of two values that is the rounding of a mean over seeds."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How a head differs from the baseline in one measure, over the images that both have it of.

    Attributes:
        num_images: images compared; where there are none, the rest is None or 0.
        num_groups: groups that they belong to.
        baseline: the baseline's mean over them.
        other: the other's mean over them.
        mean: of the differences, other minus baseline.
        median: of the differences.
        interval: of the mean, see ``mean_interval``; None for fewer than two groups.
        p_value: of no difference, see ``p_value_of_zero``; None likewise.
        num_better: images that the other is better on.
        num_worse: images that it is worse on; on all others both have the same value.
    """

    num_images: int
    num_groups: int = 0
    baseline: float | None = None
    other: float | None = None
    mean: float | None = None
    median: float | None = None
    interval: Interval | None = None
    p_value: float | None = None
    num_better: int = 0
    num_worse: int = 0


@dataclass(frozen=True)
class Differences:
    """What is plotted of one run.

    Attributes:
        name: of the run.
        values_N: difference of each image to the baseline; NaN where it has none.
        summary: of them.
    """

    name: str
    values_N: NDArray[np.float64]
    summary: PairedDifference


def paired_difference(
    baseline_N: NDArray[np.float64],
    other_N: NDArray[np.float64],
    groups: Sequence[str],
    seed: int,
    *,
    lower_is_better: bool = False,
) -> PairedDifference:
    """Compare two heads on the same images.

    Args:
        baseline_N: a value an image; NaN where it has none.
        other_N: of the same images.
        groups: by image, its group.
        seed: of the draws.
        lower_is_better: whether the measure is a distance.
    """
    both_N = np.isfinite(baseline_N) & np.isfinite(other_N)
    if not both_N.any():
        return PairedDifference(0)
    baseline, other = baseline_N[both_N], other_N[both_N]
    difference = other - baseline
    difference[np.abs(difference) <= SAME_VALUE] = 0.0
    within = ANY if lower_is_better else (-1.0, 1.0)
    groups_here = [groups[i] for i in np.flatnonzero(both_N)]
    gain = -difference if lower_is_better else difference
    return PairedDifference(
        num_images=len(difference),
        num_groups=len(set(groups_here)),
        baseline=float(baseline.mean()),
        other=float(other.mean()),
        mean=float(difference.mean()),
        median=float(np.median(difference)),
        interval=mean_interval(difference, groups_here, seed, within),
        p_value=p_value_of_zero(difference, groups_here, seed),
        num_better=int((gain > 0).sum()),
        num_worse=int((gain < 0).sum()),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for there being several (Holm 1979); None stays None and is not counted.

    The chance that any difference is claimed where there is none stays at the level of a single
    comparison.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected
