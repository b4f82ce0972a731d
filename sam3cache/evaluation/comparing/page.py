"""A comparison as one page to look at, which needs no other file and no network.

Shape legend: C classes, H height, W width.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam3cache import pages
from sam3cache.evaluation import figures
from sam3cache.evaluation.cases import shown_size_px, stored_picture
from sam3cache.evaluation.comparing.cases import ComparedCase
from sam3cache.evaluation.comparing.runs import OVER_CLASSES
from sam3cache.evaluation.comparing.statistics import Differences, PairedDifference
from sam3cache.evaluation.comparing.verdict import SMALL_DICE
from sam3cache.evaluation.page_parts import style
from sam3cache.evaluation.scores import DISTANCES, MEAN_OVER_CLASSES, METRICS
from sam3cache.evaluation.statistics import (
    LEVEL,
    METHOD,
    gain_text,
    interval_text,
    number_text,
    over_text,
)
from sam3cache.views import format_view

if TYPE_CHECKING:
    from sam3cache.evaluation.comparing.compare import Compared, Comparison

TEMPLATE_FILE = "compare.html.jinja"

PICTURE_PX = 640
"""Longest side of a picture: several stand beside each other."""


def comparison_html(
    result: Comparison,
    differences: Sequence[Differences],
    cases: Sequence[ComparedCase],
    sentences: Sequence[str],
    date: datetime.date,
) -> str:
    """Fill the page in.

    Args:
        result: what was found.
        differences: what is plotted.
        cases: images to show.
        sentences: what of them cannot be shown.
        date: of the comparison; all else on the page depends on the comparison alone.
    """
    return pages.fill_in(
        __package__,
        TEMPLATE_FILE,
        style=style(),
        baseline=result.baseline,
        others=[pair.name for pair in result.comparisons],
        split="all splits" if result.split == "all" else f"split {result.split}",
        date=date.isoformat(),
        over=over_text(result.num_images, result.num_groups),
        notices=result.notices,
        sentences=[(pair.verdict, pair.sentence) for pair in result.comparisons],
        runs=[_run(one) for one in result.experiments],
        plots=[
            figures.differences_svg(f"differences-{width_px}", differences, width_px)
            for width_px in (pages.WIDE_PX, pages.NARROW_PX)
        ],
        tables=[
            {
                "title": f"{pair.name} against {result.baseline}",
                "rows": measure_rows(pair.measures),
            }
            for pair in result.comparisons
        ],
        several_classes=OVER_CLASSES in result.comparisons[0].measures,
        mean_over_classes=MEAN_OVER_CLASSES,
        presence=result.presence,
        cases=[_case(case) for case in cases],
        case_sentences=sentences,
        colours={"true": pages.TRUE_COLOUR, "predicted": pages.PREDICTED_COLOUR},
        level_percent=f"{LEVEL:.0%}",
        intervals=METHOD,
        small_dice=SMALL_DICE,
        num_comparisons=len(result.comparisons),
    )


def measure_rows(
    measures: Mapping[str, Mapping[str, PairedDifference]],
) -> Iterable[tuple[str, ...]]:
    """Yield a row a class and measure: both means, the difference, its interval, the counts.

    Measures that no image has in both are left out, but for Dice.
    """
    for class_name, of_class in measures.items():
        for metric, d in of_class.items():
            if d.mean is None and metric != "dice":
                continue
            digits = 2 if metric in DISTANCES else 3
            yield (
                class_name,
                METRICS.get(metric, metric) + (" ↓" if metric in DISTANCES else ""),
                str(d.num_images),
                number_text(d.baseline, digits),
                number_text(d.other, digits),
                "–" if d.mean is None else gain_text(d.mean, digits),
                interval_text(d.interval, digits),
                str(d.num_better),
                str(d.num_worse),
            )


def _run(one: Compared) -> dict[str, Any]:
    known = [dice for dice in one.dice_of_seeds if dice is not None]
    return {
        "name": one.name,
        "head": one.head,
        "runs": ", ".join(one.runs) if len(one.runs) > 1 else "",
        "num_runs": len(one.runs),
        "dice": number_text(one.dice),
        "interval": interval_text(one.dice_interval),
        "of_seeds": ", ".join(number_text(dice) for dice in known) or "–",
        "measured": [(title, ", ".join(values)) for title, values in one.measured.items()],
    }


def _case(case: ComparedCase) -> dict[str, Any]:
    assert case.mask_CHW is not None
    size_px = shown_size_px(case.letterbox, PICTURE_PX)
    picture = stored_picture(case.store, case.sample.row, case.letterbox)
    if picture is not None:
        picture = pages.resized(picture, size_px)
    shown = []
    for name, dice in case.dice.items():
        predicted_CHW = case.predicted_CHW.get(name)
        uri = None
        if predicted_CHW is not None:
            drawn = pages.draw_contours(picture, size_px, case.mask_CHW, predicted_CHW)
            # Lines on an even ground: exact, and smaller than JPEG would be.
            uri = pages.png_uri(drawn) if picture is None else pages.jpeg_uri(drawn)
        shown.append({"name": name, "dice": number_text(dice), "contours": uri})
    sample = case.sample
    angles_deg = (sample.primary_angle_deg, sample.secondary_angle_deg)
    return {
        "title": case.title,
        "id": sample.id,
        "view": "view unknown" if any(map(math.isnan, angles_deg)) else format_view(*angles_deg),
        # By default the file's own path, which has no business on a page that travels.
        "group": "" if sample.group == sample.source else sample.group,
        "difference": gain_text(case.difference),
        "runs": shown,
        "width": size_px[1],
        "height": size_px[0],
        "has_picture": picture is not None,
    }
