"""An evaluation as one page to look at: report.html, which needs no other file and no network.

Everything that names something of the user's goes through the template, which escapes it; plots
hold no text but numbers and our own words.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache import pages
from sam3cache.evaluation import figures
from sam3cache.evaluation import page_parts as parts
from sam3cache.evaluation.angle_use import AngleUse
from sam3cache.evaluation.cases import Case, shown_size_px, stored_picture
from sam3cache.evaluation.notices import OWN_WEIGHTS
from sam3cache.evaluation.predicting import IMAGE_LEVEL_PREFIX
from sam3cache.evaluation.report import EvalResult
from sam3cache.evaluation.scores import MEAN_OVER_CLASSES, METRICS, by_image, class_mean
from sam3cache.evaluation.statistics import (
    LEVEL,
    METHOD,
    Summary,
    gain_text,
    interval_text,
    number_text,
    over_text,
)
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.geometry import Letterbox
from sam3cache.heads import CheckpointInfo
from sam3cache.heads.checkpoint import CHECKPOINTS, METRICS_FILE
from sam3cache.records import IGNORE_LABEL
from sam3cache.runtime import installed_version
from sam3cache.tasks import default_loss
from sam3cache.views import format_view

PAGE_FILE = "report.html"
TEMPLATE_FILE = "report.html.jinja"

PREFERRED_LEVEL = "fpn_72"
"""Shown in colours where there are several levels: SAM 3's own stride, and small."""

# Of the training's settings, what the page tells elsewhere.
_TOLD_ELSEWHERE = frozenset({"head"})

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Curves:
    """What a run's metrics.jsonl tells, epoch by epoch.

    Attributes:
        epochs: ascending.
        train_loss: mean over the training images; None where the line does not tell.
        val_dice: mean over the validation images; None likewise.
        num_unreadable: lines that are left out.
    """

    epochs: tuple[int, ...]
    train_loss: tuple[float | None, ...]
    val_dice: tuple[float | None, ...]
    num_unreadable: int


def page_html(
    result: EvalResult,
    store: FeatureStore,
    info: CheckpointInfo,
    parameters: Mapping[str, int],
    cases: Sequence[Case],
    given: tuple[StoredSample, Letterbox],
    date: datetime.date,
) -> str:
    """Fill the page in.

    Args:
        result: what was found.
        store: that was measured on.
        info: of the checkpoint.
        parameters: of the head by part, and their ``total``.
        cases: images to show with their masks, the best first.
        given: image whose features are shown, and how it lies on the square.
        date: of the evaluation; all else on the page depends on the evaluation alone.
    """
    return pages.fill_in(
        __package__,
        TEMPLATE_FILE,
        style=parts.style(),
        head=result.head,
        epoch=result.epoch,
        store=store.path.resolve().name,
        split="all splits" if result.split == "all" else f"split {result.split}",
        date=date.isoformat(),
        notices=result.notices,
        colours={"true": pages.TRUE_COLOUR, "predicted": pages.PREDICTED_COLOUR},
        **_numbers(result),
        **_cases(result, store, cases),
        class_table=parts.class_table(result, f"{LEVEL:.0%}"),
        strata=parts.strata_tables(result, f"{LEVEL:.0%}"),
        view_map=parts.view_map(result),
        confusion=parts.confusion_table(result),
        angle_use=_angle_use(result.angle_use),
        feature_use=parts.feature_use(result.feature_use),
        curves=_curves(Path(result.checkpoint), result.epoch),
        given=_given(store, info, *given),
        **_settings(result, store, info, parameters),
    )


def read_curves(run: Path) -> Curves | None:
    """Read a run's metrics; None where there is no file, or no line in it can be read.

    Args:
        run: the run's folder.
    """
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    by_epoch: dict[int, dict[str, Any]] = {}
    num_unreadable = 0
    for line in lines:
        try:
            fields = json.loads(line)
            by_epoch[int(fields["epoch"])] = fields
        except (ValueError, KeyError, TypeError, OverflowError):
            num_unreadable += 1
    epochs = tuple(sorted(by_epoch))
    train_loss, val_dice = (
        tuple(_finite(by_epoch[epoch].get(name)) for epoch in epochs)
        for name in ("train_loss", "val_dice")
    )
    if all(value is None for value in (*train_loss, *val_dice)):
        return None
    return Curves(epochs, train_loss, val_dice, num_unreadable)


def _finite(value: object) -> float | None:
    """Return a number that can be drawn; None for anything else that JSON can hold."""
    # False for NaN, too, and without an overflow for a whole number of any length.
    if isinstance(value, int | float) and abs(value) < 1e300:
        return float(value)
    return None


def _numbers(result: EvalResult) -> dict[str, Any]:
    """Return the headline, the table of each class, and the spread of its Dice."""
    images = by_image(result.images, len(result.classes))
    overall = result.overall["dice"]
    several = len(result.classes) > 1
    tables: list[dict[str, Any]] = [{"name": "", "rows": _summary_rows(result.overall)}]
    parts_of = [("over its classes", [class_mean(scores) for scores in images], overall)]
    if several:
        tables += [{"name": name, "rows": _summary_rows(s)} for name, s in result.classes.items()]
        parts_of += [
            (name, [scores[k].dice for scores in images], summaries["dice"])
            for k, (name, summaries) in enumerate(result.classes.items())
        ]
    spreads = [
        {
            "name": name,
            "num_images": len(known),
            "svgs": [
                figures.strip_svg(f"dice-{k}-{width}", known, summary, width)
                for width in (pages.WIDE_PX, pages.NARROW_PX)
            ],
            "has_interval": summary.interval is not None,
        }
        for k, (name, dice, summary) in enumerate(parts_of)
        if (known := [value for value in dice if value is not None])
    ]
    return {
        "dice": number_text(overall.mean),
        "dice_interval": interval_text(overall.interval),
        "num_images": result.num_images,
        "num_groups": result.num_groups,
        "num_scored": overall.num_values,
        "threshold": result.threshold_choice.sentence,
        "several_classes": several,
        "mean_over_classes": MEAN_OVER_CLASSES,
        "in_mm": result.num_with_spacing > 0,
        "tables": tables,
        "spreads": spreads,
        "level_percent": f"{LEVEL:.0%}",
    }


def _summary_rows(summaries: Mapping[str, Summary]) -> list[dict[str, str]]:
    """Return the measures of a class; millimetres only where any are known."""
    return [
        _summary_row(metric, summary)
        for metric, summary in summaries.items()
        if summary.num_values or not metric.endswith("_mm")
    ]


def _summary_row(metric: str, summary: Summary) -> dict[str, str]:
    return {
        "metric": METRICS[metric],
        "images": str(summary.num_values),
        "mean": number_text(summary.mean),
        "interval": interval_text(summary.interval),
        "std": number_text(summary.std),
        "median": number_text(summary.median),
        "min": number_text(summary.minimum),
        "max": number_text(summary.maximum),
    }


def _cases(result: EvalResult, store: FeatureStore, cases: Sequence[Case]) -> dict[str, Any]:
    shown = []
    for case in cases:
        size_px = shown_size_px(case.letterbox)
        picture = _picture(store, case.sample, case.letterbox)
        if picture is not None:
            size_px = (picture.shape[0], picture.shape[1])
        drawn = pages.draw_contours(picture, size_px, case.mask_CHW, case.predicted_CHW)
        shown.append(
            {
                "title": case.title,
                "id": case.sample.id,
                "view": _view(case.sample),
                # By default the file's own path, which has no business on a page that travels.
                "group": "" if case.sample.group == case.sample.source else case.sample.group,
                "dice": number_text(case.dice),
                "planes": [(score.class_name, number_text(score.dice)) for score in case.scores],
                "picture": None if picture is None else pages.jpeg_uri(picture),
                # Lines on an even ground: exact, and smaller than JPEG would be.
                "contours": pages.png_uri(drawn) if picture is None else pages.jpeg_uri(drawn),
                "width": size_px[1],
                "height": size_px[0],
                "is_empty": not (case.mask_CHW == 1).any(),
            }
        )
    return {
        "cases": shown,
        "cases_title": {0: "Cases", 1: "The one case", 2: "Best and worst case"}.get(
            len(cases), "Best, median and worst case"
        ),
        "class_names": list(result.classes),
        "has_pictures": all(case["picture"] is not None for case in shown),
        "has_ignored": any((case.mask_CHW == IGNORE_LABEL).all(axis=0).any() for case in cases),
    }


def _picture(
    store: FeatureStore, sample: StoredSample, letterbox: Letterbox
) -> NDArray[np.uint8] | None:
    """Return a picture in its own aspect ratio, at the resolution that the store keeps."""
    picture = stored_picture(store, sample.row, letterbox)
    if picture is None or letterbox.mode == "letterbox":
        return picture
    return pages.resized(picture, shown_size_px(letterbox, max(picture.shape[:2])))


def _angle_use(use: AngleUse | None) -> dict[str, Any] | None:
    if use is None:
        return None
    shown: dict[str, Any] = {"sentence": use.sentence, "rows": []}
    if use.true_minus_shuffled is None or use.true_minus_constant is None:
        return shown
    assert use.constant_angles_deg is not None
    shown["rows"].append(("The images' own", number_text(use.dice_true, 4), "", ""))
    for name, dice, gain in (
        (
            f"Those of other views, shuffled {use.num_shuffles} times",
            use.dice_shuffled,
            use.true_minus_shuffled,
        ),
        (
            f"One view for all, the mean of these images: {format_view(*use.constant_angles_deg)}",
            use.dice_constant,
            use.true_minus_constant,
        ),
    ):
        shown["rows"].append(
            (name, number_text(dice, 4), gain_text(gain.mean, 4), interval_text(gain.interval, 4))
        )
    shown["over"] = over_text(use.num_images, use.num_groups)
    shown["max_change"] = f"{use.max_probability_change:.2g}"
    return shown


def _curves(checkpoint: Path, epoch: int) -> dict[str, Any]:
    checkpoint = checkpoint.resolve()
    if checkpoint.name not in CHECKPOINTS:
        return {"svgs": [], "reason": "the checkpoint does not lie in the folder of a run"}
    curves = read_curves(checkpoint.parent)
    if curves is None:
        return {
            "svgs": [],
            "reason": f"the run's {METRICS_FILE} is missing, or has no line that can be read",
        }
    return {
        "svgs": [
            figures.curves_svg(
                f"curves-{width}",
                curves.epochs,
                curves.train_loss,
                curves.val_dice,
                epoch,
                width,
            )
            for width in (pages.WIDE_PX, pages.NARROW_PX)
        ],
        "reason": "",
        "epoch": epoch,
        "is_marked": epoch in curves.epochs,
        "num_epochs": len(curves.epochs),
        "has_loss": any(value is not None for value in curves.train_loss),
        "has_val_dice": any(value is not None for value in curves.val_dice),
        "num_unreadable": curves.num_unreadable,
    }


def _given(
    store: FeatureStore, info: CheckpointInfo, sample: StoredSample, letterbox: Letterbox
) -> dict[str, Any] | None:
    """Show one image's features, of a level that the head reads; None without any such level."""
    read, stored = (
        [name for name in names if not name.startswith(IMAGE_LEVEL_PREFIX)]
        for names in (info.levels, store.levels)
    )
    candidates = read or stored
    if not candidates:
        return None
    level = PREFERRED_LEVEL if PREFERRED_LEVEL in candidates else candidates[0]
    feature_CSS = store.read(level, sample.row)
    picture = _picture(store, sample, letterbox)
    size_px = shown_size_px(letterbox) if picture is None else picture.shape[:2]
    colours, shares = figures.feature_colours(feature_CSS, letterbox, (size_px[0], size_px[1]))
    return {
        "id": sample.id,
        "level": level,
        "is_read": level in info.levels,
        "others": [name for name in info.levels if name != level],
        "num_channels": feature_CSS.shape[0],
        "side": feature_CSS.shape[-1],
        "picture": None if picture is None else pages.jpeg_uri(picture),
        "colours": pages.png_uri(colours),
        "width": size_px[1],
        "height": size_px[0],
        "shares": ", ".join(f"{share:.0%}" for share in shares),
        "share": f"{sum(shares):.0%}",
    }


def _settings(
    result: EvalResult, store: FeatureStore, info: CheckpointInfo, parameters: Mapping[str, int]
) -> dict[str, Any]:
    folder = Path(result.checkpoint).resolve()
    is_of_run = folder.name in CHECKPOINTS
    stored = dict(store.settings)
    if stored.get("weights") == OWN_WEIGHTS:
        stored["weights"] = "those that the backbone comes with"
    training = dict(info.settings)
    if "loss" in training and not training["loss"]:
        training["loss"] = f"{default_loss(info.task)} (the default)"
    return {
        "measured": [
            ("Checkpoint", f"{folder.parent.name}/{folder.name}" if is_of_run else folder.name),
            ("Weights of the head, SHA-256", result.weights_sha256),
            ("Store", store.path.resolve().name),
            ("Store sealed", "yes" if result.sealed else "no"),
            *(
                (title, _plain(stored[name]))
                for title, name in (("Backbone", "backbone"), ("Weights", "weights"))
                if stored.get(name)
            ),
            ("Images measured, SHA-256", result.data_sha256),
            ("Label set", f"{result.label_set} ({', '.join(result.classes)})"),
            ("Threshold", "–" if result.threshold is None else f"{result.threshold:g}"),
            ("Seed", str(result.seed)),
            ("Intervals", f"{LEVEL:.0%}, {METHOD}"),
        ],
        "parameters": [
            (name, f"{number:,}") for name, number in parameters.items() if name != "total"
        ],
        "total_parameters": f"{parameters['total']:,}",
        "training": list(_flat(training)),
        "levels": [
            {
                "name": level,
                "digest": digest,
                "fields": [("digest", digest), *_flat(store.fingerprint(level).fields)],
            }
            for level, digest in result.levels.items()
        ],
        "versions": [*result.environment.items(), *_versions_of_the_page()],
    }


def _versions_of_the_page() -> Iterable[Row]:
    for package in ("matplotlib", "pillow"):
        if version := installed_version(package):
            yield package, version


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[Row]:
    """Yield nested settings as rows, the inner names after the outer ones."""
    for name, value in settings.items():
        if prefix + name in _TOLD_ELSEWHERE:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _plain(value)


def _plain(value: Any) -> str:
    """Write a setting; of a path of this machine its last part alone, as a page travels."""
    if isinstance(value, str):
        if value.startswith((".", "~")):
            return PureWindowsPath(value).name
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
        return value or "–"
    if value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _view(sample: StoredSample) -> str:
    angles_deg = (sample.primary_angle_deg, sample.secondary_angle_deg)
    return "view unknown" if any(map(math.isnan, angles_deg)) else format_view(*angles_deg)
