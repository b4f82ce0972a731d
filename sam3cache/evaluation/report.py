"""What an evaluation found, and the two files of figures that keep it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3cache.errors import ConfigError
from sam3cache.evaluation.angle_use import AngleUse
from sam3cache.evaluation.statistics import LEVEL, NUM_RESAMPLES, Summary
from sam3cache.runtime import write_atomic

METRICS = ("dice", "iou", "precision", "recall")
IMAGES_FILE = "per_image.csv"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class ImageScore:
    """One image, one plane of its mask: a line of per_image.csv.

    Attributes:
        id: of the sample.
        group: samples of one group (a patient) are drawn together by the bootstrap.
        split: "train", "val" or "test".
        source: path of the image relative to the manifest's folder.
        frame: index into a cine, or None for a still.
        primary_angle_deg: LAO positive; None when unknown.
        secondary_angle_deg: cranial positive; None when unknown.
        class_name: of the plane.
        dice: see ``metrics.MaskScores``; None without a mask, too. So are the other three.
        iou: intersection over union.
        precision: share of the predicted pixels that are true.
        recall: share of the true pixels that are predicted.
        predicted_px: predicted pixels, on the mask's grid and not where it says ignore; without a
            mask, on the picture's own grid.
        true_px: the mask's pixels; None without a mask.
    """

    id: str
    group: str
    split: str
    source: str
    frame: int | None
    primary_angle_deg: float | None
    secondary_angle_deg: float | None
    class_name: str
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None
    predicted_px: int
    true_px: int | None


@dataclass(frozen=True)
class EvalResult:
    """A head's quality on one split.

    Attributes:
        store: path of the feature store.
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
        threshold: probability from which a pixel counts as mask.
        seed: of the bootstrap and the shuffles.
        num_images: images of the split.
        num_groups: groups they belong to.
        num_without_mask: images that have no mask, and so no scores.
        num_empty_against_empty: empty predictions of empty masks; they have no Dice.
        num_seen_in_training: images whose pixels the head was trained on; None if its checkpoint
            does not tell.
        num_in_training_groups: images of groups that have the name of one it was trained on; None
            likewise. On another store a name may be another's.
        classes: by class, by metric, the summary over images.
        angle_use: what the head makes of the view angle; None when that was not asked.
        notices: what a reader has to know before the figures, in whole sentences.
        images: the scores, image by image and class by class; in per_image.csv.
        page: the evaluation as a page to look at; None when that was not asked.
        output: folder that the results were written to.
        environment: versions installed.
        elapsed_s: of the whole evaluation.
    """

    store: str
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
    threshold: float
    seed: int
    num_images: int
    num_groups: int
    num_without_mask: int
    num_empty_against_empty: int
    num_seen_in_training: int | None
    num_in_training_groups: int | None
    classes: Mapping[str, Mapping[str, Summary]]
    angle_use: AngleUse | None
    notices: tuple[str, ...]
    images: tuple[ImageScore, ...]
    page: Path | None
    output: Path
    environment: Mapping[str, str]
    elapsed_s: float

    def record(self) -> dict[str, Any]:
        """Return everything but the single images, as plain JSON values."""
        record = dataclasses.asdict(dataclasses.replace(self, images=()))
        del record["images"]
        record["output"] = self.output.as_posix()
        record["page"] = None if self.page is None else self.page.as_posix()
        record["bootstrap"] = {
            "unit": "group",
            "num_resamples": NUM_RESAMPLES,
            "level": LEVEL,
            "method": "percentile",
        }
        return record


def prepare_output(folder: Path, store: Path) -> Path:
    """Make the folder of the results, before anything is computed for it.

    Args:
        folder: where the results go.
        store: path of the store that is evaluated.

    Raises:
        ConfigError: the folder cannot be written, or holds the results of another store.
    """
    summary = folder / SUMMARY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        earlier = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    except OSError as error:
        raise ConfigError(
            f"results cannot be written to {folder} ({error.strerror}); name another folder by "
            "--output"
        ) from None
    except ValueError:
        earlier = {}  # Not ours, or damaged: it will be replaced.
    if Path(earlier.get("store", store)).resolve() != store.resolve():
        raise ConfigError(
            f"{folder} holds the results on another store, {earlier['store']}; name another folder "
            "by --output, or remove it"
        )
    return folder


def write_result(result: EvalResult) -> None:
    """Write per_image.csv, a line an image and class, then summary.json."""
    names = [field.name for field in dataclasses.fields(ImageScore)]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(dataclasses.asdict(image) for image in result.images)
    write_atomic(result.output / IMAGES_FILE, table.getvalue().encode())
    text = json.dumps(result.record(), indent=2, allow_nan=False) + "\n"
    write_atomic(result.output / SUMMARY_FILE, text.encode())


def known_or_none(angle_deg: float) -> float | None:
    """Return an angle, None for the NaN that stands for an unknown one."""
    return None if math.isnan(angle_deg) else angle_deg
