"""A trained head measured on the images of one split.

Shape legend: B batch, K mask planes, N images, S shuffles, H height, W width of a mask's own grid.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import CheckpointError, ConfigError
from sam3cache.evaluation.angle_use import NUM_SHUFFLES, AngleUse, judge, plan_trial
from sam3cache.evaluation.cases import Case, by_image, choose_cases, mean_dice
from sam3cache.evaluation.notices import notices_of
from sam3cache.evaluation.page import PAGE_FILE, page_html
from sam3cache.evaluation.report import (
    METRICS,
    EvalResult,
    ImageScore,
    known_or_none,
    prepare_output,
    write_result,
)
from sam3cache.evaluation.statistics import Summary, summarise
from sam3cache.features import FeatureStore, StoredSample, open_store, record_data
from sam3cache.geometry import Letterbox
from sam3cache.heads import (
    CheckpointInfo,
    Head,
    check_fingerprints,
    count_parameters,
    load_checkpoint,
)
from sam3cache.heads.checkpoint import MODEL_FILE, short_hash
from sam3cache.loading import CachedSamples
from sam3cache.metrics import MaskScores, dice_iou_precision_recall
from sam3cache.records import IGNORE_LABEL, SPLITS, Batch
from sam3cache.runtime import environment_fields, write_atomic

Report = Callable[[int, int], None]
"""Called with images done and images in all."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of one evaluation.

    Attributes:
        store: the feature store.
        checkpoint: a run's folder, whose best checkpoint is taken, or a checkpoint's own.
        split: "train", "val", "test" or "all".
        threshold: probability from which a pixel counts as mask; None: the checkpoint's own.
        batch_size: images a forward pass.
        device: torch device name.
        seed: of the bootstrap and of the shuffled angles.
        label_set: masks to compare with; None: those the head was trained on.
        output: folder of the results; None: eval-SPLIT in the checkpoint's folder.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        allow_unsealed: evaluate on what an unfinished extraction has written so far.
        check_angles: also predict with shuffled and constant angles.
        page: also write report.html, the evaluation as a page to look at.
        overlay: folder of labels and annotations beside the store, or None.
    """

    store: Path
    checkpoint: Path
    split: Literal["train", "val", "test", "all"] = "test"
    threshold: float | None = None
    batch_size: int = 16
    device: str = "cpu"
    seed: int = 0
    label_set: str | None = None
    output: Path | None = None
    head: str | None = None
    allow_unsealed: bool = False
    check_angles: bool = True
    page: bool = True
    overlay: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if self.split not in (*SPLITS, "all"):
            raise ConfigError(f"split {self.split!r}: expected one of {', '.join(SPLITS)}, all")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ConfigError(
                f"threshold {self.threshold}: expected a probability above 0, below 1"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected 0 or more")


def evaluate(config: EvalConfig, report: Report = lambda num_done, num_total: None) -> EvalResult:
    """Measure a head on each image, on the mask's own grid, and write what was found.

    Args:
        config: what to measure on what.
        report: told of progress.

    Raises:
        StoreError: the store is none, is unfinished or damaged, or lacks the label set.
        FingerprintError: its features were made differently from those the head was trained on.
        CheckpointError: there is no such checkpoint, or it does not fit.
        ConfigError: the split has no images, a mask holds class numbers, or the output cannot be
            written.
    """
    start_s = time.monotonic()
    store = open_store(config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    folder = checkpoint_folder(config.checkpoint)
    head, info = load_checkpoint(folder, head=config.head, device=config.device)
    serve_as_trained(store, info)
    samples = _select(store, config.split)
    label_set = config.label_set or info.label_set
    has_mask = [store.has_mask(sample.row, label_set) for sample in samples]
    classes = store.label_sets[label_set].classes
    if len(classes) != info.num_classes:
        raise CheckpointError(
            f"the head of {folder} predicts {info.num_classes} planes, label set {label_set} of "
            f"{store.path} has {len(classes)} ({', '.join(classes)}); name another by --label-set"
        )
    output = prepare_output(config.output or config.checkpoint / f"eval-{config.split}", store.path)

    threshold = info.threshold if config.threshold is None else config.threshold
    cached = CachedSamples(
        store,
        [sample.row for sample in samples],
        tuple(info.levels),
        device=config.device,
        residency="stream",
        label_set=label_set,
    )
    check = _AngleCheck(samples, has_mask, len(classes), config.seed)
    images: list[ImageScore] = []
    report(0, len(samples))
    for batch in cached.iterate(config.batch_size):
        first = len(images) // len(classes)
        true: dict[int, _Prediction] = {}
        for i, logits_KSS in enumerate(_logits(head, batch), start=first):
            true[i] = _predict(logits_KSS, cached.letterbox(i), _mask(cached, i), threshold)
            images += _image_scores(samples[i], classes, true[i])
        if config.check_angles:
            check.compare(head, batch, true, cached, threshold)
        report(first + len(true), len(samples))

    groups = [sample.group for sample in samples]
    result = EvalResult(
        store=store.path.as_posix(),
        sealed=store.sealed,
        checkpoint=folder.as_posix(),
        weights_sha256=info.weights_sha256,
        head=info.head,
        epoch=info.epoch,
        levels={level: store.fingerprint(level).digest for level in info.levels},
        data_sha256=_data_sha256(samples),
        data=dataclasses.asdict(record_data(store, label_set)),
        split=config.split,
        label_set=label_set,
        threshold=threshold,
        seed=config.seed,
        num_images=len(samples),
        num_groups=len(set(groups)),
        num_without_mask=has_mask.count(False),
        num_empty_against_empty=sum(i.true_px is not None and i.dice is None for i in images),
        num_seen_in_training=_num_known(info, "images", [s.pixel_sha256 for s in samples]),
        num_in_training_groups=_num_known(info, "groups", groups),
        classes={name: _summaries(images, name, config.seed) for name in classes},
        angle_use=check.result(groups, config.seed) if config.check_angles else None,
        notices=(),
        images=tuple(images),
        page=output / PAGE_FILE if config.page else None,
        output=output,
        environment=environment_fields(),
        elapsed_s=time.monotonic() - start_s,
    )
    result = replace(result, notices=notices_of(result, store, samples, info))
    write_result(result)
    # Whatever else is in the folder, no page of earlier figures stands beside these.
    (output / PAGE_FILE).unlink(missing_ok=True)
    if result.page is not None:
        cases = _cases(head, cached, by_image(images, len(classes)), threshold)
        html = page_html(
            result,
            store,
            info,
            count_parameters(head),
            cases,
            _most_typical(cases, cached),
            datetime.datetime.now().astimezone().date(),
        )
        write_atomic(result.page, html.encode())
    return result


def checkpoint_folder(path: Path) -> Path:
    """Return the folder of one checkpoint: a run's best, or the folder itself."""
    best = path / "best"
    return best if (best / MODEL_FILE).is_file() else path


def serve_as_trained(store: FeatureStore, info: CheckpointInfo) -> None:
    """Have a store serve its levels in the precisions that a head was trained on.

    Raises:
        FingerprintError: it has a level in none that was made as the head's.
    """
    store.serve_digests({level: entry["digest"] for level, entry in info.levels.items()})
    check_fingerprints(info.levels, fingerprints_of(store))


def fingerprints_of(store: FeatureStore) -> dict[str, dict[str, Any]]:
    """Return ``digest`` and ``fields`` of each level's fingerprint, as checkpoints record them."""
    return {
        level: {
            "digest": store.fingerprint(level).digest,
            "fields": dict(store.fingerprint(level).fields),
        }
        for level in store.served_levels
    }


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What a head says of one image, on the grid of its mask; without one, on the picture's.

    Attributes:
        probability_KHW: float32.
        mask_KHW: uint8, or None.
        predicted_px: by plane, pixels predicted where the mask does not say ignore.
        true_px: by plane, pixels of the mask; None without a mask.
        scores: by plane; None without a mask.
    """

    probability_KHW: Tensor
    mask_KHW: Tensor | None
    predicted_px: list[int]
    true_px: list[int] | None
    scores: list[MaskScores] | None

    def dice(self) -> list[float]:
        """Return the Dice of each plane; NaN where the mask is empty."""
        assert self.scores is not None
        assert self.true_px is not None
        return [
            s.dice if s.dice is not None and num_px else math.nan
            for s, num_px in zip(self.scores, self.true_px, strict=True)
        ]


def _logits(head: Head, batch: Batch) -> Tensor:
    """Return float32 (B, K, S, S) on the padded square."""
    with torch.inference_mode():
        logits_BKSS: Tensor = head(batch)
    return logits_BKSS.float()


def _predict(
    logits_KSS: Tensor, letterbox: Letterbox, mask_KHW: Tensor | None, threshold: float
) -> _Prediction:
    if mask_KHW is None:
        height_px, width_px = letterbox.source_height_px, letterbox.source_width_px
    else:
        mask_KHW = mask_KHW.to(logits_KSS.device)
        height_px, width_px = mask_KHW.shape[-2:]
    probability_KHW = letterbox.logits_to_grid(logits_KSS, height_px, width_px).sigmoid()
    predicted_KHW = probability_KHW >= threshold
    if mask_KHW is None:
        return _Prediction(probability_KHW, None, _counts(predicted_KHW), None, None)
    return _Prediction(
        probability_KHW,
        mask_KHW,
        _counts(predicted_KHW & (mask_KHW != IGNORE_LABEL)),
        _counts(mask_KHW == 1),
        [
            dice_iou_precision_recall(predicted_HW, mask_HW)
            for predicted_HW, mask_HW in zip(predicted_KHW, mask_KHW, strict=True)
        ],
    )


def _counts(planes_KHW: Tensor) -> list[int]:
    counts: list[int] = planes_KHW.sum(dim=(-2, -1)).tolist()
    return counts


class _AngleCheck:
    """Dice of every image with its own angles, with those of others, and with constant ones.

    An image takes part if both its angles are known and its mask is there and not empty.
    """

    def __init__(
        self, samples: Sequence[StoredSample], has_mask: Sequence[bool], num_planes: int, seed: int
    ) -> None:
        angles_N2 = np.array([(s.primary_angle_deg, s.secondary_angle_deg) for s in samples])
        angles_N2[~np.array(has_mask)] = np.nan
        self._takes_part_N = np.isfinite(angles_N2).all(axis=1)
        self._trial = plan_trial(angles_N2, seed)
        self._true_NK = np.full((len(samples), num_planes), np.nan)
        self._constant_NK = self._true_NK.copy()
        self._shuffled_SNK = np.stack([self._true_NK] * NUM_SHUFFLES)
        self._max_change = 0.0

    def compare(
        self,
        head: Head,
        batch: Batch,
        true: Mapping[int, _Prediction],
        cached: CachedSamples,
        threshold: float,
    ) -> None:
        """Predict a batch again with other angles.

        Args:
            head: the head.
            batch: with the true angles.
            true: by index of the image, what the head made of it, in the batch's order.
            cached: where the images' geometry is known.
            threshold: of the probability.
        """
        here = [i for i in true if self._takes_part_N[i]]
        if isinstance(self._trial, AngleUse) or not here:
            return

        def predict(angles_N2: NDArray[np.float64]) -> dict[int, _Prediction]:
            angles_B2 = torch.from_numpy(angles_N2[list(true)]).to(batch.angles_B2)
            logits_BKSS = _logits(head, replace(batch, angles_B2=angles_B2))
            return {
                i: _predict(logits_KSS, cached.letterbox(i), true[i].mask_KHW, threshold)
                for i, logits_KSS in zip(true, logits_BKSS, strict=True)
                if i in here and np.isfinite(angles_N2[i]).all()
            }

        for i in here:
            self._true_NK[i] = true[i].dice()
        constant_N2 = np.broadcast_to(self._trial.constant_2, (len(self._true_NK), 2))
        for i, prediction in predict(constant_N2).items():
            self._constant_NK[i] = prediction.dice()
        for shuffled_N2, dice_NK in zip(self._trial.shuffled_SN2, self._shuffled_SNK, strict=True):
            for i, prediction in predict(shuffled_N2).items():
                dice_NK[i] = prediction.dice()
                change_KHW = (prediction.probability_KHW - true[i].probability_KHW).abs()
                self._max_change = max(self._max_change, float(change_KHW.max()))

    def result(self, groups: Sequence[str], seed: int) -> AngleUse:
        """Judge, once all batches have been compared."""
        if isinstance(self._trial, AngleUse):
            return self._trial
        return judge(
            self._trial,
            self._true_NK,
            self._shuffled_SNK,
            self._constant_NK,
            groups,
            self._max_change,
            seed,
        )


def _select(store: FeatureStore, split: str) -> list[StoredSample]:
    samples = [sample for sample in store.samples if split in ("all", sample.split)]
    if not samples:
        present = Counter(sample.split for sample in store.samples)
        counts = ", ".join(f"{num} {name}" for name, num in present.items()) or "none"
        raise ConfigError(
            f"{store.path} has no images in split {split} (it has: {counts}); name another by "
            "--split, or evaluate on all of them by --split all"
        )
    return samples


def _cases(
    head: Head,
    cached: CachedSamples,
    images: Sequence[tuple[ImageScore, ...]],
    threshold: float,
) -> list[Case]:
    """Predict the images to show again: to keep what was predicted of all takes too much memory."""
    cases = []
    for title, i in choose_cases([mean_dice(scores) for scores in images]):
        (logits_KSS,) = _logits(head, cached.batch([i]))
        prediction = _predict(logits_KSS, cached.letterbox(i), _mask(cached, i), threshold)
        assert prediction.mask_KHW is not None
        cases.append(
            Case(
                title,
                cached.samples[i],
                cached.letterbox(i),
                images[i],
                prediction.mask_KHW.cpu().numpy(),
                (prediction.probability_KHW >= threshold).cpu().numpy(),
            )
        )
    return cases


def _most_typical(cases: Sequence[Case], cached: CachedSamples) -> tuple[StoredSample, Letterbox]:
    """Return the median case, or the one nearest to it; without any, the first image."""
    if not cases:
        return cached.samples[0], cached.letterbox(0)
    case = cases[len(cases) // 2]
    return case.sample, case.letterbox


def _num_known(info: CheckpointInfo, kind: str, names: Sequence[str]) -> int | None:
    """Count the names that a checkpoint lists as trained on; None if it lists none."""
    if kind not in info.trained_on:
        return None
    known = set(info.trained_on[kind].split())
    return sum(short_hash(name) in known for name in names)


def _mask(cached: CachedSamples, index: int) -> Tensor | None:
    mask_KHW = cached.mask(index)
    if mask_KHW is not None and ((mask_KHW > 1) & (mask_KHW != IGNORE_LABEL)).any():
        raise ConfigError(
            f"the mask of {cached.samples[index].id} holds class numbers; heads are measured on "
            "planes of 0 and 1: store a plane a class, or name another set by --label-set"
        )
    return mask_KHW


def _image_scores(
    sample: StoredSample, classes: Sequence[str], prediction: _Prediction
) -> list[ImageScore]:
    nothing = MaskScores(None, None, None, None)
    return [
        ImageScore(
            id=sample.id,
            group=sample.group,
            split=sample.split,
            source=sample.source,
            frame=sample.frame,
            primary_angle_deg=known_or_none(sample.primary_angle_deg),
            secondary_angle_deg=known_or_none(sample.secondary_angle_deg),
            class_name=name,
            **dataclasses.asdict(prediction.scores[k] if prediction.scores else nothing),
            predicted_px=prediction.predicted_px[k],
            true_px=prediction.true_px[k] if prediction.true_px else None,
        )
        for k, name in enumerate(classes)
    ]


def _summaries(images: Iterable[ImageScore], class_name: str, seed: int) -> dict[str, Summary]:
    of_class = [image for image in images if image.class_name == class_name]
    groups = [image.group for image in of_class]
    return {
        metric: summarise([getattr(image, metric) for image in of_class], groups, seed)
        for metric in METRICS
    }


def _data_sha256(samples: Iterable[StoredSample]) -> str:
    digest = hashlib.sha256()
    for line in sorted(f"{sample.id}\t{sample.pixel_sha256}\n" for sample in samples):
        digest.update(line.encode())
    return digest.hexdigest()
