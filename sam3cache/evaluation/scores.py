"""One image's scores, and the measures there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sam3cache.metrics import MaskScores

METRICS = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "recall": "Recall",
    "cldice": "clDice",
    "hd95_px": "HD95, px",
    "assd_px": "ASSD, px",
    "hd95_mm": "HD95, mm",
    "assd_mm": "ASSD, mm",
}
"""The measures, and what people call them; docs/evaluation.md defines them."""

DISTANCES = frozenset({"hd95_px", "assd_px", "hd95_mm", "assd_mm"})
"""Those of which less is better; they have no upper bound."""


MEAN_OVER_CLASSES = (
    "Dice of an image: the mean over its classes that are there or marked, 0 for a class that is "
    "marked and not there."
)
"""What ``class_mean`` comes to, for whoever reads a figure of several classes."""


def range_of(metric: str) -> tuple[float, float]:
    """Return between which values a measure can lie."""
    return 0.0, math.inf if metric in DISTANCES else 1.0


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image, one class: a line of per_image.csv.

    Attributes:
        id: of the sample.
        group: samples of one group (a patient) are drawn together by the bootstrap.
        split: "train", "val" or "test".
        source: path of the image relative to the manifest's folder.
        frame: index into a cine, or None for a still.
        primary_angle_deg: LAO positive; None when unknown.
        secondary_angle_deg: cranial positive; None when unknown.
        view: see ``sam3cache.views.view_region``.
        class_name: of the mask.
        dice: see ``metrics.MaskScores``; None without a mask, too. So are the other measures.
        iou: intersection over union.
        precision: share of the predicted pixels that are true.
        recall: share of the true pixels that are predicted.
        cldice: centre-line Dice; see ``metrics.ShapeScores``.
        hd95_px: 95th percentile of the Hausdorff distance, in pixels of the mask's grid.
        assd_px: average symmetric surface distance, likewise.
        hd95_mm: the same in millimetres; None where the spacing is not known.
        assd_mm: likewise.
        predicted_px: predicted pixels, on the mask's grid and not where it says ignore; without a
            mask, on the picture's own grid.
        true_px: the mask's pixels; None without a mask, or where no pixel of the class's plane
            counts.
        pixels: short hash of the picture's pixels, by which a comparison tells other pictures.
        annotations: by column that results are asked by, the image's value.
    """

    id: str
    group: str
    split: str
    source: str
    frame: int | None
    primary_angle_deg: float | None
    secondary_angle_deg: float | None
    view: str
    class_name: str
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None
    cldice: float | None
    hd95_px: float | None
    assd_px: float | None
    hd95_mm: float | None
    assd_mm: float | None
    predicted_px: int
    true_px: int | None
    pixels: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)


def class_mean(
    scores: Sequence[ImageScore] | Sequence[MaskScores], metric: str = "dice"
) -> float | None:
    """Return the mean of one image's classes; None where none of them has a value."""
    values = [value for score in scores if (value := getattr(score, metric)) is not None]
    return math.fsum(values) / len(values) if values else None


def by_image(scores: Sequence[ImageScore], num_classes: int) -> list[tuple[ImageScore, ...]]:
    """Group scores, which come class by class, by image."""
    return [tuple(scores[at : at + num_classes]) for at in range(0, len(scores), num_classes)]
