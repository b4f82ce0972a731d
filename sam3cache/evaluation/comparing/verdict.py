"""What a comparison comes to: a verdict, and one sentence in plain words."""

from __future__ import annotations

from typing import Literal

from sam3cache.evaluation.comparing.statistics import PairedDifference
from sam3cache.evaluation.statistics import (
    LEVEL,
    MIN_GROUPS,
    count_text,
    gain_text,
    interval_text,
    over_text,
)

SMALL_DICE = 0.01
"""Difference of mean Dice that hardly matters: an interval within it shows that two are alike."""

Verdict = Literal["better", "worse", "alike", "equal", "undecided"]


def judge(
    name: str,
    baseline: str,
    difference: PairedDifference,
    *,
    p_corrected: float | None = None,
    num_comparisons: int = 1,
    over_classes: bool = False,
) -> tuple[Verdict, str]:
    """Say whether one head is better than another, by the Dice of each image.

    Args:
        name: of the one.
        baseline: of the other.
        difference: of Dice.
        p_corrected: its p-value, corrected for there being several comparisons.
        num_comparisons: how many there are.
        over_classes: whether Dice is the mean over the classes of an image.

    Returns:
        "better" or "worse": the interval leaves 0 out, after the correction, too; "equal": the
        same Dice on every image; "alike": within ``SMALL_DICE`` of each other; or "undecided".
    """
    measure = "Dice over the classes of an image" if over_classes else "Dice"
    if difference.mean is None:
        return "undecided", f"{name} and {baseline} have no image in common that both have Dice of."
    over = over_text(difference.num_images, difference.num_groups)
    if difference.num_better == difference.num_worse == 0:
        return "equal", f"{name} and {baseline} are equal: the same {measure} on all {over}."
    digits = 3 if abs(difference.mean) >= 0.001 else 5
    found = f"{gain_text(difference.mean, digits)} {measure}"
    images = "image" if difference.num_better == 1 else "images"
    over = f"over {over}; {difference.num_better} {images} better, {difference.num_worse} worse"
    interval = difference.interval
    if interval is None or difference.num_groups < MIN_GROUPS:
        groups = count_text(difference.num_groups, "group")
        return "undecided", (
            f"Whether {name} is better than {baseline} cannot be told from {groups}, at least "
            f"{MIN_GROUPS} are needed: {found} {over}."
        )
    bounds = f"({LEVEL:.0%} interval {interval_text(interval, digits)})"
    corrected = ""
    if num_comparisons > 1 and p_corrected is not None:
        p = f"p = {p_corrected:.3f}" if p_corrected >= 0.001 else "p < 0.001"
        corrected = f"; {p} after Holm's correction for {num_comparisons} comparisons"
    facts = f"{found} {bounds} {over}{corrected}."
    is_small = max(-interval.low, interval.high) <= SMALL_DICE
    if interval.low > 0 or interval.high < 0:
        if num_comparisons > 1 and (p_corrected is None or p_corrected >= 1 - LEVEL):
            return "undecided", (
                f"Whether {name} is better than {baseline} cannot be told after the correction for "
                f"{num_comparisons} comparisons: {facts}"
            )
        verdict: Verdict = "better" if interval.low > 0 else "worse"
        little = f", by less than {SMALL_DICE}" if is_small else ""
        return verdict, f"{name} is {verdict} than {baseline}{little}: {facts}"
    if is_small:
        return "alike", f"{name} and {baseline} are alike, within {SMALL_DICE}: {facts}"
    return "undecided", f"Whether {name} is better than {baseline} cannot be told: {facts}"
