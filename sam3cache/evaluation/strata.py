"""Results by view region and by annotations: the same summaries, of a part of the images each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sam3cache.errors import ConfigError
from sam3cache.evaluation.scores import METRICS, ImageScore, by_image, class_mean, range_of
from sam3cache.evaluation.statistics import Summary, summarise
from sam3cache.features import StoredSample

VIEW = "view"
"""Stands for the view region; results by it are always given where an angle is known.

A column of the manifest that has the same name is what ``--by view`` means, and is then told beside
it, under ``VIEW_COLUMN``.
"""

VIEW_COLUMN = "view (column)"

_OWN = ("split", "group")
"""Fields of every sample that results can be asked by, beside the manifest's other columns."""

UNKNOWN = ""
"""The value of an image that has none."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """The images that have one value of an annotation.

    Attributes:
        num_images: in all; of those without a mask no summary tells.
        num_groups: groups they belong to.
        overall: by metric, the summary over images, of each its mean over the classes.
        classes: by class, by metric, the summary over images.
    """

    num_images: int
    num_groups: int
    overall: Mapping[str, Summary]
    classes: Mapping[str, Mapping[str, Summary]]


def check_columns(samples: Sequence[StoredSample], columns: Sequence[str]) -> None:
    """Refuse what results cannot be asked by.

    Raises:
        ConfigError: a column that no sample has, or one twice.
    """
    known = sorted({VIEW, *_OWN, *(name for sample in samples for name in sample.extra)})
    for column in columns:
        if column not in known:
            raise ConfigError(
                f"--by {column}: no image has such an annotation; expected one of "
                f"{', '.join(known)}"
            )
        if columns.count(column) > 1:
            raise ConfigError(f"--by {column} is given twice; give it once")


def columns_of(samples: Sequence[StoredSample], asked: Sequence[str]) -> tuple[str, ...]:
    """Return those of the columns asked for that the manifest had; angles tell the view."""
    has_view = any(VIEW in sample.extra for sample in samples)
    return tuple(name for name in asked if name != VIEW or has_view)


def annotations_of(sample: StoredSample, columns: Sequence[str]) -> dict[str, str]:
    """Return a sample's values of some columns of the manifest."""
    return {
        name: str(getattr(sample, name)) if name in _OWN else sample.extra.get(name, UNKNOWN)
        for name in columns
    }


def summaries(
    images: Sequence[ImageScore], classes: Sequence[str], seed: int
) -> tuple[dict[str, Summary], dict[str, dict[str, Summary]]]:
    """Summarise images' scores over all classes and class by class.

    Args:
        images: image by image, and class by class within.
        classes: in that order.
        seed: of the bootstrap.
    """
    cases = by_image(images, len(classes))
    groups = [scores[0].group for scores in cases]
    overall = {
        metric: summarise(
            [class_mean(scores, metric) for scores in cases], groups, seed, range_of(metric)
        )
        for metric in METRICS
    }
    if len(classes) == 1:
        return overall, {classes[0]: overall}
    return overall, {
        name: {
            metric: summarise(
                [getattr(scores[k], metric) for scores in cases], groups, seed, range_of(metric)
            )
            for metric in METRICS
        }
        for k, name in enumerate(classes)
    }


def strata(
    images: Sequence[ImageScore], classes: Sequence[str], columns: Sequence[str], seed: int
) -> dict[str, dict[str, Stratum]]:
    """Summarise images by view region, where one is known, and by other columns.

    Returns:
        By column, by value in order, those without a value last.
    """
    cases = by_image(images, len(classes))
    found: dict[str, dict[str, Stratum]] = {}
    own = cases[0][0].annotations
    # None stands for the view region, which a column may share its name with.
    titled = {VIEW: None} | {VIEW_COLUMN if name == VIEW else name: name for name in own}
    for title, column in titled.items():
        parts: dict[str, list[ImageScore]] = {}
        for scores in cases:
            value = scores[0].view if column is None else scores[0].annotations[column]
            parts.setdefault(value, []).extend(scores)
        is_asked = column is not None or (VIEW in columns and VIEW not in own)
        if not is_asked and set(parts) == {UNKNOWN}:
            continue
        found[title] = {
            value: _stratum(parts[value], classes, seed)
            for value in sorted(parts, key=lambda value: (value == UNKNOWN, value))
        }
    return found


def _stratum(images: Sequence[ImageScore], classes: Sequence[str], seed: int) -> Stratum:
    overall, by_class = summaries(images, classes, seed)
    ids = {image.id for image in images}
    return Stratum(len(ids), len({image.group for image in images}), overall, by_class)
