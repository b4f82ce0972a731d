"""Parts of an evaluation's page: results by class, view and annotation, confusion, features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sam3cache import pages
from sam3cache.evaluation import figures
from sam3cache.evaluation.feature_use import FeatureUse, PartUse
from sam3cache.evaluation.predicting import IMAGE_LEVEL_PREFIX
from sam3cache.evaluation.report import NONE_NAME, EvalResult
from sam3cache.evaluation.scores import METRICS, by_image, class_mean
from sam3cache.evaluation.statistics import (
    Summary,
    gain_text,
    interval_text,
    number_text,
    over_text,
)
from sam3cache.evaluation.strata import UNKNOWN, VIEW

STYLE_FILE = "pages.css"

MAX_VALUES = 40
"""Most values of an annotation that the page tells; summary.json has all."""


def style() -> str:
    """Return what the pages of an evaluation and of a comparison have in common, as CSS."""
    return pages.text_of(__package__, STYLE_FILE)


@dataclass(frozen=True, slots=True)
class ShortTable:
    """A line a part of the images, with the measures that matter.

    Attributes:
        by: what the parts are.
        columns: titles, the first of them ``by``.
        rows: texts.
        num_left_out: parts that are not told.
    """

    by: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left_out: int = 0


def short_table(
    by: str,
    parts: Iterable[tuple[str, int, Mapping[str, Summary]]],
    level_percent: str,
    *,
    unit: Literal["mm", "px"],
    counted: str = "Groups",
    num_left_out: int = 0,
) -> ShortTable:
    """Tell Dice with its interval and median, and the means of three more.

    Args:
        by: what the parts are.
        parts: name, a count and summaries of each.
        level_percent: of the intervals.
        unit: that distances are told in.
        counted: title of the count.
        num_left_out: parts that are not told.
    """
    others = ("cldice", f"hd95_{unit}", f"assd_{unit}")
    rows = []
    for name, num_counted, summaries in parts:
        dice = summaries["dice"]
        rows.append(
            (
                name,
                str(dice.num_values),
                str(num_counted),
                number_text(dice.mean),
                interval_text(dice.interval),
                number_text(dice.median),
                *(number_text(summaries[metric].mean) for metric in others),
            )
        )
    columns = (
        *(by, "Images", counted, "Dice", f"{level_percent} interval"),
        *("Median", *(METRICS[metric] for metric in others)),
    )
    return ShortTable(by, columns, tuple(rows), num_left_out)


def class_table(result: EvalResult, level_percent: str) -> ShortTable | None:
    """Return the classes side by side; None where there is but one."""
    if len(result.classes) == 1:
        return None
    return short_table(
        "Class",
        [
            (name, result.num_images_with(name), summaries)
            for name, summaries in result.classes.items()
        ],
        level_percent,
        unit=result.unit,
        counted="Have it",
    )


def strata_tables(result: EvalResult, level_percent: str) -> list[ShortTable]:
    """Return a table by view region, if any is known, and by each annotation asked for."""
    tables = []
    for column, values in result.strata.items():
        order = sorted(values, key=lambda value: -values[value].num_images)[:MAX_VALUES]
        tables.append(
            short_table(
                "View" if column == VIEW else column,
                [
                    # In the order of their names, which is that of the values.
                    ("unknown" if value == UNKNOWN else value, stratum.num_groups, stratum.overall)
                    for value, stratum in values.items()
                    if value in set(order)
                ],
                level_percent,
                unit=result.unit,
                num_left_out=len(values) - len(order),
            )
        )
    return tables


def view_map(result: EvalResult) -> list[str]:
    """Return the map of Dice over the views for a screen and a phone; empty without any view."""
    dots = [
        ((scores[0].primary_angle_deg, scores[0].secondary_angle_deg), dice)
        for scores in by_image(result.images, len(result.classes))
        if scores[0].view != UNKNOWN and (dice := class_mean(scores)) is not None
    ]
    if not dots:
        return []
    regions = {
        region: f"{number_text(summary.mean)} ({summary.num_values})"
        for region, stratum in result.strata[VIEW].items()
        if region != UNKNOWN and (summary := stratum.overall["dice"]).num_values
    }
    angles_deg = [(p, s) for (p, s), _ in dots if p is not None and s is not None]
    return [
        figures.view_map_svg(
            f"views-{width}", angles_deg, [dice for _, dice in dots], regions, width
        )
        for width in (pages.WIDE_PX, pages.NARROW_PX)
    ]


def confusion_table(result: EvalResult) -> dict[str, Any] | None:
    """Return the confusion of classes: of each true class's pixels, the share of each answer."""
    if result.confusion is None:
        return None
    names = [NONE_NAME, *result.classes]
    rows = []
    for i, (name, counts) in enumerate(zip(names, result.confusion, strict=True)):
        total = sum(counts)
        shares = [count / total if total else None for count in counts]
        cells = [
            # Right answers in blue, confusions in orange.
            (
                share_text(share),
                "11 106 168" if i == j else "255 109 0",
                f"{0.6 * (share or 0):.3f}",
            )
            for j, share in enumerate(shares)
        ]
        rows.append({"name": name, "pixels": f"{total:,}", "cells": cells})
    return {"names": names, "rows": rows}


def share_text(share: float | None) -> str:
    """Write a share for people, "<0.1%" where rounding would make it nothing."""
    if share is None:
        return "–"
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def feature_use(use: FeatureUse | None) -> dict[str, Any] | None:
    """Return the sentence and the table on what the head makes of its levels."""
    if use is None:
        return None
    rows = [("The image's own", number_text(use.dice_true, 4), "", "")] if use.parts else []
    rows += [
        (
            f"{part_name(part)} of another image",
            number_text(part.dice_shuffled, 4),
            gain_text(part.true_minus_shuffled.mean, 4),
            interval_text(part.true_minus_shuffled.interval, 4),
        )
        for part in use.parts
        if part.true_minus_shuffled is not None
    ]
    return {
        "sentence": use.sentence,
        "rows": rows,
        "num_images": use.num_images,
        "over": over_text(use.num_images, use.num_groups),
        "num_shuffles": use.num_shuffles,
    }


def part_name(part: PartUse) -> str:
    """Return what was shuffled: "features (fpn_72)", "picture (image_1008)"."""
    is_picture = all(name.startswith(IMAGE_LEVEL_PREFIX) for name in part.levels)
    return f"{'picture' if is_picture else 'features'} ({', '.join(part.levels)})"
