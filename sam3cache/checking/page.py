"""A check as one page to look at: check.html, which needs no other file and no network.

Shape legend: C channels, H height, W width.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam3cache import pages
from sam3cache.checking.check import CheckResult
from sam3cache.checking.findings import Case, Finding, count_by_severity
from sam3cache.checking.look import marked
from sam3cache.checking.shift import Shift
from sam3cache.errors import ImageError
from sam3cache.images import ClassTable, read_image, read_labels
from sam3cache.records import SPLITS, Sample
from sam3cache.runtime import write_atomic
from sam3cache.views import format_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_FILE = "check.html"
TEMPLATE_FILE = "check.html.jinja"

MAX_CASES = 6
"""Cases of a finding that the page shows; the JSON has all."""

MAX_PICTURES_OF_A_CASE = 2
NUM_THUMBNAILS = 18
CASE_PX, THUMBNAIL_PX = 420, 220
"""Longest sides of pictures."""

_MAX_ROWS = 40
_SPLIT_COLOURS = {"train": pages.ACCENT, "val": "#e0a100", "test": "#b3261e"}


def write_page(
    result: CheckResult, table: ClassTable, folder: Path, date: datetime.date | None = None
) -> Path:
    """Write the page into a folder, which is made if it is not there; return its path.

    What is shown is decoded again: a few pictures of each finding, and some of all.

    Args:
        result: what was found.
        table: what the masks are of.
        folder: to write into.
        date: of the check; None: today.
    """
    by_id = {sample.id: sample for sample in result.samples}
    html = pages.fill_in(
        __package__,
        TEMPLATE_FILE,
        result=result,
        date=(date or datetime.date.today()).isoformat(),
        num_findings=count_by_severity(result.findings),
        colours={"mask": pages.TRUE_COLOUR, "moved": pages.PREDICTED_COLOUR},
        splits=SPLITS,
        split_colours=_SPLIT_COLOURS,
        findings=[_shown(finding, by_id, result.shifts, table) for finding in result.findings],
        sizes=list(result.sizes.items())[:_MAX_ROWS],
        classes=list(result.classes.items())[:_MAX_ROWS],
        num_rows_left_out=max(0, len(result.sizes) - _MAX_ROWS)
        + max(0, len(result.classes) - _MAX_ROWS),
        view_map=_view_map(result.samples),
        thumbnails=[
            _drawn(sample, table, None, THUMBNAIL_PX) for sample in _spread(result.samples)
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / PAGE_FILE, html.encode())
    return folder / PAGE_FILE


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Return some samples, evenly spread over all."""
    number = min(NUM_THUMBNAILS, len(samples))
    return [samples[place * len(samples) // number] for place in range(number)]


def _shown(
    finding: Finding,
    by_id: Mapping[str, Sample],
    shifts: Mapping[str, Shift],
    table: ClassTable,
) -> dict[str, Any]:
    def pictures(case: Case) -> list[dict[str, Any]]:
        there = [by_id[name] for name in case.samples if name in by_id]
        moved = shifts if finding.kind == "shifted-mask" else {}
        drawn = (
            _drawn(sample, table, moved.get(sample.id), CASE_PX)
            for sample in there[:MAX_PICTURES_OF_A_CASE]
        )
        # The case itself says what cannot be read.
        return [shown for shown in drawn if shown["uri"]]

    cases = [
        {"samples": case.names, "value": case.value, "pictures": pictures(case)}
        for case in finding.cases[:MAX_CASES]
    ]
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "title": finding.title,
        "expected": finding.expected,
        "advice": finding.advice,
        "is_shift": finding.kind == "shifted-mask",
        "num_cases": len(finding.cases),
        "num_left_out": max(0, len(finding.cases) - MAX_CASES),
        "is_side_by_side": [len(case["pictures"]) for case in cases] == [1] * len(cases),
        "cases": cases,
    }


def _drawn(
    sample: Sample, table: ClassTable, shift: Shift | None, longest_px: int
) -> dict[str, Any]:
    """Draw a picture with its mask's outline, and that of the mask moved by a shift."""
    view = (sample.primary_angle_deg, sample.secondary_angle_deg)
    shown: dict[str, Any] = {
        "id": sample.id,
        "split": sample.split,
        "view": "" if view[0] is None or view[1] is None else format_view(view[0], view[1]),
        "uri": None,
    }
    try:
        picture_HWC = read_image(sample)
    except ImageError:
        return shown  # Its finding says why.
    height_px, width_px = picture_HWC.shape[:2]
    scale = longest_px / max(height_px, width_px)
    size_px = (max(1, round(height_px * scale)), max(1, round(width_px * scale)))
    try:
        labels_MHW = read_labels(sample.each_mask(), table, (height_px, width_px))
    except ImageError:
        labels_MHW = None
    mask_HW = np.zeros(size_px, bool) if labels_MHW is None else marked(labels_MHW)
    moved_HW = np.zeros_like(mask_HW)
    if shift is not None:
        moved_HW = _moved(
            mask_HW,
            round(shift.down_px * mask_HW.shape[0] / height_px),
            round(shift.right_px * mask_HW.shape[1] / width_px),
        )
    drawn_HW3 = pages.draw_contours(
        pages.resized(picture_HWC, size_px), size_px, mask_HW[None].astype(np.uint8), moved_HW[None]
    )
    return shown | {
        "uri": pages.jpeg_uri(drawn_HW3),
        "width": size_px[1],
        "height": size_px[0],
    }


def _moved(mask_HW: NDArray[np.bool_], down_px: int, right_px: int) -> NDArray[np.bool_]:
    """Move a mask; what leaves the picture is gone."""
    moved_HW = np.zeros_like(mask_HW)
    rows, columns = (
        (
            slice(max(0, -by_px), side_px - max(0, by_px)),
            slice(max(0, by_px), side_px + min(0, by_px)),
        )
        for side_px, by_px in zip(mask_HW.shape, (down_px, right_px), strict=True)
    )
    moved_HW[rows[1], columns[1]] = mask_HW[rows[0], columns[0]]
    return moved_HW


def _view_map(samples: Sequence[Sample]) -> list[str] | None:
    """Plot a dot a sample at its view, by split; None where no view is known."""
    views: dict[str, list[tuple[float, float]]] = {split: [] for split in SPLITS}
    for sample in samples:
        primary, secondary = sample.primary_angle_deg, sample.secondary_angle_deg
        if primary is not None and secondary is not None:
            views[sample.split].append((primary, secondary))
    if not any(views.values()):
        return None
    return [_views_svg(views, width_px) for width_px in (pages.WIDE_PX, pages.NARROW_PX)]


def _views_svg(views: Mapping[str, Sequence[tuple[float, float]]], width_px: int) -> str:
    height_px = 420 if width_px == pages.WIDE_PX else 360
    num_views = sum(map(len, views.values()))

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            pages.frame(width_px, height_px, left=52, right=14, bottom=46, top=12)
        )
        angles_N2 = np.concatenate([np.reshape(own, (-1, 2)) for own in views.values()])
        pages.lay_out_views(axes, angles_N2, 1.15)
        for split, own in views.items():
            if own:
                primary_N, secondary_N = np.transpose(own)
                axes.scatter(
                    primary_N,
                    secondary_N,
                    # Of many, each is small, so that they do not become one patch.
                    s=max(9.0, 52.0 / math.sqrt(max(1.0, num_views / 50))),
                    color=_SPLIT_COLOURS[split],
                    alpha=0.6,
                    linewidths=0,
                    rasterized=num_views > pages.MANY_DOTS,
                )

    return pages.svg(f"views-{width_px}", (width_px, height_px), draw)
