"""What an evaluation found, and the two files of figures that keep it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sam3cache.errors import ConfigError
from sam3cache.evaluation.angle_use import AngleUse
from sam3cache.evaluation.feature_use import FeatureUse
from sam3cache.evaluation.scores import ImageScore
from sam3cache.evaluation.statistics import BOOTSTRAP, Summary
from sam3cache.evaluation.strata import Stratum
from sam3cache.evaluation.threshold import ThresholdChoice
from sam3cache.features import DataRecord, Place, place_of
from sam3cache.runtime import write_atomic
from sam3cache.tasks import Task

IMAGES_FILE = "per_image.csv"
SUMMARY_FILE = "summary.json"
CONFUSION_FILE = "confusion.csv"

BY_PREFIX = "by_"
"""Begins the columns of per_image.csv that hold annotations of the user's."""

NONE_NAME = "(none)"
"""What pixels of no class are called in the confusion of classes."""


@dataclass(frozen=True)
class EvalResult:
    """A head's quality on one split.

    Attributes:
        store: absolute path of the feature store, or its address.
        store_from_here: the same from ``output``, which holds where a project was moved or copied;
            empty where there is no such path.
        sealed: whether its extraction had finished.
        checkpoint: path of the checkpoint's folder.
        weights_sha256: of the head, as its checkpoint records them.
        head: name of the head.
        epoch: epochs it was trained, from 1.
        levels: by level that the head reads, the digest of its fingerprint.
        data_sha256: of the evaluated images' ids and pixels.
        data: which samples, labels and annotations were used, by their hashes; see
            ``features.DataRecord``.
        split: "train", "val", "test" or "all".
        label_set: the masks compared with.
        task: what the head was asked; see ``sam3cache.tasks``.
        threshold: probability from which a pixel counts as mask; None in the task "multiclass".
        threshold_choice: where the threshold is from.
        seed: of the bootstrap and the shuffles.
        num_images: images of the split.
        num_groups: groups they belong to.
        num_without_mask: images that have no mask, and so no scores.
        num_empty_against_empty: empty predictions of empty masks; they have no Dice.
        num_one_empty: of prediction and mask just one is empty; they have no distances.
        num_with_spacing: images with a mask whose pixels' size is known, so that their distances
            are in millimetres, too.
        num_seen_in_training: images whose pixels the head was trained on; None if its checkpoint
            does not tell.
        num_in_training_groups: images of groups that have the name of one it was trained on; None
            likewise. On another store a name may be another's.
        overall: by metric, the summary over images, of each its mean over the classes.
        classes: by class, by metric, the summary over images.
        strata: by view region and by the annotations asked for: by column, by value.
        confusion: pixels of each true class (rows) by the class predicted for them (columns), the
            first of both no class; also in confusion.csv. None but for the task "multiclass".
        angle_use: what the head makes of the view angle; None when that was not asked.
        feature_use: what it makes of the features; None when that was not asked.
        num_synthetic: pictures that were drawn, and are of nobody.
        origin: what limits all figures because of where they come from, in whole sentences.
        notices: what a reader has to know before the figures, in whole sentences, those included.
        images: the scores, image by image and class by class; in per_image.csv.
        page: the evaluation as a page to look at; None when that was not asked.
        output: folder that the results were written to.
        environment: versions installed.
        elapsed_s: of the whole evaluation.
    """

    store: str
    store_from_here: str
    sealed: bool
    checkpoint: str
    weights_sha256: str
    head: str
    epoch: int
    levels: Mapping[str, str]
    data_sha256: str
    data: Mapping[str, Any]
    split: str
    label_set: str
    task: Task
    threshold: float | None
    threshold_choice: ThresholdChoice
    seed: int
    num_images: int
    num_groups: int
    num_without_mask: int
    num_empty_against_empty: int
    num_one_empty: int
    num_with_spacing: int
    num_seen_in_training: int | None
    num_in_training_groups: int | None
    overall: Mapping[str, Summary]
    classes: Mapping[str, Mapping[str, Summary]]
    strata: Mapping[str, Mapping[str, Stratum]]
    confusion: tuple[tuple[int, ...], ...] | None
    angle_use: AngleUse | None
    feature_use: FeatureUse | None
    num_synthetic: int
    origin: tuple[str, ...]
    notices: tuple[str, ...]
    images: tuple[ImageScore, ...]
    page: Path | None
    output: Path
    environment: Mapping[str, str]
    elapsed_s: float

    @property
    def unit(self) -> Literal["mm", "px"]:
        """Of distances in tables that show one: millimetres if all images with a mask have them."""
        num_masks = self.num_images - self.num_without_mask
        return "mm" if self.num_with_spacing == num_masks > 0 else "px"

    def num_images_with(self, class_name: str) -> int:
        """Count the images whose mask has a class."""
        return sum(bool(i.true_px) for i in self.images if i.class_name == class_name)

    def record(self) -> dict[str, Any]:
        """Return everything but the single images, as plain JSON values."""
        record = dataclasses.asdict(dataclasses.replace(self, images=()))
        del record["images"]
        record["output"] = self.output.as_posix()
        record["page"] = None if self.page is None else self.page.as_posix()
        record["bootstrap"] = BOOTSTRAP
        return record


def path_from(store: Place, folder: Path) -> str:
    """Return the way from a folder to a store; empty to an address, and to another drive."""
    if not isinstance(store, Path):
        return ""
    try:
        return Path(os.path.relpath(store.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return ""


def stores_told(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return where the store of an evaluation may be: as seen from its folder, and as it was."""
    told = [Path(str(summary.get("store", "")))]
    if summary.get("store_from_here"):
        told.insert(0, folder.resolve() / summary["store_from_here"])
    paths = dict.fromkeys(path.resolve() for path in told)
    return [path for path in paths if (path / "zarr.json").is_file()]


def prepare_output(folder: Path, store: Place, data: DataRecord, data_sha256: str) -> Path:
    """Make the folder of the results, before anything is computed for it.

    Args:
        folder: where the results go.
        store: path of the store that is evaluated.
        data: what the store has.
        data_sha256: of the images that are evaluated, as in ``EvalResult``.

    Raises:
        ConfigError: the folder cannot be written, or holds the results of another store.
    """
    summary = folder / SUMMARY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        content = summary.read_bytes() if summary.exists() else b""
    except OSError as error:
        raise ConfigError(
            f"results cannot be written to {folder} ({error.strerror}); name another folder by -o"
        ) from None
    earlier = _parse_summary(content)
    if earlier is None and not (folder / IMAGES_FILE).exists():
        raise ConfigError(
            f"{summary} is of something else than an evaluation; name another folder by -o"
        )
    earlier = earlier or {}  # What is damaged is replaced.
    before = earlier.get("data") or {}
    has_same_images = before.get("samples_sha256") == data.samples_sha256
    known = stores_told(earlier, folder)
    is_here = isinstance(store, Path) and store.resolve() in known
    is_same = (
        not earlier
        or place_of(earlier.get("store", store)).resolve() == store.resolve()
        # The project was moved, or copied: then the other one's store is there as well.
        or (is_here and (len(known) == 1 or has_same_images))
        or (
            earlier.get("data_sha256") == data_sha256
            and before.get("labels_sha256") == data.labels_sha256
        )
    )
    if not is_same:
        raise ConfigError(
            f"{folder} holds the results on another store, {earlier['store']}; name another folder "
            "by -o, or remove it"
        )
    return folder


@contextmanager
def not_left_empty(folder: Path) -> Iterator[None]:
    """Take a folder away that is made for results, if there are none after all."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()
        raise


def _parse_summary(content: bytes) -> dict[str, Any] | None:
    """Return an evaluation's summary, {} of nothing; None of what is something else or damaged."""
    try:
        summary = json.loads(content or b"{}")
    except ValueError:
        return None
    is_ours = isinstance(summary, dict) and (not summary or "overall" in summary)
    return summary if is_ours else None


def write_result(result: EvalResult) -> None:
    """Write per_image.csv, a line an image and class, confusion.csv, and last summary.json."""
    # Whatever ends this before its end leaves no summary beside the images of another evaluation.
    (result.output / SUMMARY_FILE).unlink(missing_ok=True)
    lines = []
    for image in result.images:
        line = {name: getattr(image, name) for name in _COLUMNS}
        lines.append(line | {f"{BY_PREFIX}{k}": v for k, v in image.annotations.items()})
    _write_csv(result.output / IMAGES_FILE, list(lines[0]), lines)
    # Whatever else is in the folder, no matrix of earlier figures stands beside these.
    (result.output / CONFUSION_FILE).unlink(missing_ok=True)
    if result.confusion is not None:
        names = [NONE_NAME, *result.classes]
        rows = [
            {"true": true} | {f"predicted {name}": n for name, n in zip(names, row, strict=True)}
            for true, row in zip(names, result.confusion, strict=True)
        ]
        _write_csv(result.output / CONFUSION_FILE, list(rows[0]), rows)
    text = json.dumps(result.record(), indent=2, allow_nan=False) + "\n"
    write_atomic(result.output / SUMMARY_FILE, text.encode())


_COLUMNS = [f.name for f in dataclasses.fields(ImageScore) if f.name != "annotations"]


def _write_csv(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, table.getvalue().encode())


def known_or_none(angle_deg: float) -> float | None:
    """Return an angle, None for the NaN that stands for an unknown one."""
    return None if math.isnan(angle_deg) else angle_deg
