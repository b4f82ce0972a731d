"""A trained head measured on the images of one split.

Shape legend: B batch, C classes, N images, S shuffles, H height, W width of a mask's own grid.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import CheckpointError, ConfigError
from sam3cache.evaluation.angle_use import AngleCheck
from sam3cache.evaluation.cases import Case, choose_cases
from sam3cache.evaluation.feature_use import FeatureCheck
from sam3cache.evaluation.notices import notices_of, num_synthetic, origin_of
from sam3cache.evaluation.page import PAGE_FILE, page_html
from sam3cache.evaluation.predicting import (
    Prediction,
    Rule,
    confusion_of,
    logits_of,
    planes,
    predict,
)
from sam3cache.evaluation.report import (
    EvalResult,
    known_or_none,
    not_left_empty,
    path_from,
    prepare_output,
    write_result,
)
from sam3cache.evaluation.scores import ImageScore, by_image, class_mean
from sam3cache.evaluation.spacing import spacing_of, spacing_of_mask
from sam3cache.evaluation.strata import (
    annotations_of,
    check_columns,
    columns_of,
    strata,
    summaries,
)
from sam3cache.evaluation.threshold import (
    AUTO_SPLIT,
    THRESHOLDS,
    DiceByThreshold,
    ThresholdChoice,
)
from sam3cache.features import FeatureStore, Place, StoredSample, open_store, record_data
from sam3cache.geometry import Letterbox
from sam3cache.heads import (
    CheckpointInfo,
    Head,
    check_fingerprints,
    count_parameters,
    load_checkpoint,
)
from sam3cache.heads.checkpoint import BEST, MODEL_FILE, short_hash
from sam3cache.loading import CachedSamples
from sam3cache.loading.folds import fold_of_groups
from sam3cache.metrics import MaskScores, ShapeScores, shape_scores
from sam3cache.records import SPLITS
from sam3cache.runtime import environment_fields, write_atomic
from sam3cache.tasks import num_outputs
from sam3cache.views import view_region

Report = Callable[[int, int], None]
"""Called with images done and images in all."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of one evaluation.

    Attributes:
        store: the feature store.
        checkpoint: a run's folder, whose best checkpoint is taken, or a checkpoint's own.
        split: "train", "val", "test" or "all"; "val" of a fold is what was held out of it.
        threshold: probability from which a pixel counts as mask; "auto": that of the highest mean
            Dice on the store's validation split; None: the checkpoint's own.
        batch_size: images a forward pass.
        device: torch device name.
        seed: of the bootstrap and of the shuffles.
        label_set: masks to compare with; None: those the head was trained on.
        output: folder of the results; None: eval-SPLIT in the checkpoint's folder.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        allow_unsealed: evaluate on what an unfinished extraction has written so far.
        check_angles: also predict with shuffled and constant angles.
        check_features: also predict with the features of other images.
        by: annotations to give results by, beside the view region.
        page: also write report.html, the evaluation as a page to look at.
        overlay: folder of labels and annotations beside the store, or None.
    """

    store: Place
    checkpoint: Path
    split: Literal["train", "val", "test", "all"] = "test"
    threshold: float | Literal["auto"] | None = None
    batch_size: int = 16
    device: str = "cpu"
    seed: int = 0
    label_set: str | None = None
    output: Path | None = None
    head: str | None = None
    allow_unsealed: bool = False
    check_angles: bool = True
    check_features: bool = True
    by: tuple[str, ...] = ()
    page: bool = True
    overlay: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or self.checkpoint / f"eval-{self.split}"

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if self.split not in (*SPLITS, "all"):
            raise ConfigError(f"split {self.split!r}: expected one of {', '.join(SPLITS)}, all")
        if isinstance(self.threshold, str) and self.threshold != "auto":
            raise ConfigError(f"threshold {self.threshold!r}: expected a probability, or auto")
        if isinstance(self.threshold, float | int) and not 0 < self.threshold < 1:
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
        ConfigError: the split has no images, a mask holds what is no class, results are asked by
            what is no annotation, a threshold cannot be chosen, or the output cannot be written.
    """
    with not_left_empty(config.folder):
        return _evaluate(config, report)


def _evaluate(config: EvalConfig, report: Report) -> EvalResult:
    start_s = time.monotonic()
    store = open_store(config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    folder = checkpoint_folder(config.checkpoint)
    head, info = load_checkpoint(folder, head=config.head, device=config.device)
    serve_as_trained(store, info)
    samples = _select(store, config.split, info)
    check_columns(samples, config.by)
    columns = columns_of(samples, config.by)
    label_set = config.label_set or info.label_set
    has_mask = [store.has_mask(sample.row, label_set) for sample in samples]
    try:
        classes = _classes(store, label_set, info, folder)
    except CheckpointError as error:
        if config.label_set is None:
            raise
        raise ConfigError(str(error)) from error
    data, images_sha256 = record_data(store, label_set), _data_sha256(samples)
    output = config.folder
    prepare_output(output, store.path, data, images_sha256)

    chosen = _choose_threshold(config, store, label_set, head, info, report, samples)
    rule, num_before = chosen.rule, chosen.num_images_read
    cached = _cached(store, samples, info, label_set, config.device)
    angles = AngleCheck(samples, has_mask, config.seed)
    features = None
    if config.check_features:
        features = FeatureCheck(
            *(store, cached, tuple(info.levels), has_mask),
            batch_size=config.batch_size,
            seed=config.seed,
            device=config.device,
        )
    images: list[ImageScore] = []
    confusion = np.zeros((len(classes) + 1,) * 2, dtype=np.int64)
    num_total = num_before + len(samples)
    report(num_before, num_total)
    for batch in cached.iterate(config.batch_size):
        first = len(images) // len(classes)
        true: dict[int, Prediction] = {}
        for i, logits_KSS in enumerate(logits_of(head, batch), start=first):
            mask_CHW = planes(cached, i, rule)
            true[i] = predict(logits_KSS, cached.letterbox(i), mask_CHW, rule)
            images += _image_scores(samples[i], classes, true[i], columns)
            if rule.task == "multiclass" and mask_CHW is not None:
                confusion += confusion_of(true[i])
        if config.check_angles:
            angles.compare(head, batch, true, cached, rule)
        if features is not None:
            features.compare(head, batch, true, rule)
        report(num_before + first + len(true), num_total)

    groups = [sample.group for sample in samples]
    overall, by_class = summaries(images, classes, config.seed)
    is_multiclass = rule.task == "multiclass"
    result = EvalResult(
        store=store.path.resolve().as_posix(),
        store_from_here=path_from(store.path, output),
        sealed=store.sealed,
        checkpoint=folder.as_posix(),
        weights_sha256=info.weights_sha256,
        head=info.head,
        epoch=info.epoch,
        levels={level: store.fingerprint(level).digest for level in info.levels},
        data_sha256=images_sha256,
        data=dataclasses.asdict(data),
        split=config.split,
        label_set=label_set,
        task=rule.task,
        threshold=None if is_multiclass else rule.threshold,
        threshold_choice=chosen.choice,
        seed=config.seed,
        num_images=len(samples),
        num_groups=len(set(groups)),
        num_without_mask=has_mask.count(False),
        num_empty_against_empty=sum(i.true_px is not None and i.dice is None for i in images),
        num_one_empty=sum(
            i.true_px is not None and (i.true_px > 0) != (i.predicted_px > 0) for i in images
        ),
        num_with_spacing=sum(
            there and spacing_of(sample) is not None
            for sample, there in zip(samples, has_mask, strict=True)
        ),
        num_seen_in_training=_num_known(info, "images", [s.pixel_sha256 for s in samples]),
        num_in_training_groups=_num_known(info, "groups", groups),
        overall=overall,
        classes=by_class,
        strata=strata(images, classes, config.by, config.seed),
        confusion=tuple(map(tuple, confusion.tolist())) if is_multiclass else None,
        angle_use=angles.result(groups, config.seed) if config.check_angles else None,
        feature_use=None if features is None else features.result(groups, config.seed),
        num_synthetic=num_synthetic(samples),
        origin=(),
        notices=(),
        images=tuple(images),
        page=output / PAGE_FILE if config.page else None,
        output=output,
        environment=environment_fields(),
        elapsed_s=time.monotonic() - start_s,
    )
    result = replace(result, origin=origin_of(result, store, info))
    result = replace(result, notices=notices_of(result, store, samples, info))
    write_result(result)
    # Whatever else is in the folder, no page of earlier figures stands beside these.
    (output / PAGE_FILE).unlink(missing_ok=True)
    if result.page is not None:
        cases = _cases(head, cached, by_image(images, len(classes)), rule)
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
    best = path / BEST
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


def _classes(
    store: FeatureStore, label_set: str, info: CheckpointInfo, folder: Path
) -> tuple[str, ...]:
    """Return the names of the classes, if the head answers what the masks ask.

    Raises:
        CheckpointError: it was asked something else.
    """
    spec = store.label_sets[label_set]
    if spec.task != info.task:
        raise CheckpointError(
            f"the head of {folder} was trained for task {info.task}, label set {label_set} of "
            f"{store.path} is {spec.task}; name another by --label-set"
        )
    if num_outputs(spec.task, len(spec.classes)) != info.num_classes:
        raise CheckpointError(
            f"the head of {folder} predicts {info.num_classes} planes, label set {label_set} of "
            f"{store.path} asks for {num_outputs(spec.task, len(spec.classes))} ({spec.task}: "
            f"{', '.join(spec.classes)}); name another by --label-set"
        )
    # A single plane is what it is, whatever it is called; several are told apart by their place.
    if len(spec.classes) > 1 and info.classes and tuple(info.classes) != tuple(spec.classes):
        raise CheckpointError(
            f"the head of {folder} was trained for classes {', '.join(info.classes)}, label set "
            f"{label_set} of {store.path} has {', '.join(spec.classes)}: they are matched by their "
            "place, so that figures would be of the wrong ones; set the labels in the head's order "
            "(`sam3cache store labels set --classes`), or name another set by --label-set"
        )
    return spec.classes


def _cached(
    store: FeatureStore,
    samples: Sequence[StoredSample],
    info: CheckpointInfo,
    label_set: str,
    device: str,
) -> CachedSamples:
    return CachedSamples(
        store,
        [sample.row for sample in samples],
        tuple(info.levels),
        device=device,
        residency="stream",
        label_set=label_set,
    )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """How logits become masks, where that is from, and how many images it took to find out."""

    rule: Rule
    choice: ThresholdChoice
    num_images_read: int = 0


def _choose_threshold(
    config: EvalConfig,
    store: FeatureStore,
    label_set: str,
    head: Head,
    info: CheckpointInfo,
    report: Report,
    evaluated: Sequence[StoredSample],
) -> _Chosen:
    """Settle the threshold; for "auto", by a pass over the validation split."""
    num_classes = len(store.label_sets[label_set].classes)
    if info.task == "multiclass":
        if config.threshold is not None:
            raise ConfigError(
                f"threshold {config.threshold}: a head of task multiclass gives each pixel the "
                "class with the highest logit, or none; leave --threshold out"
            )
        sentence = "No threshold: each pixel is of the class with the highest logit, or of none."
        return _Chosen(
            Rule(info.task, num_classes, info.threshold), ThresholdChoice("none", sentence)
        )
    if config.threshold is None:
        sentence = f"Threshold {info.threshold:g}: the checkpoint's own."
        choice = ThresholdChoice("checkpoint", sentence)
        return _Chosen(Rule(info.task, num_classes, info.threshold), choice)
    if config.threshold != "auto":
        sentence = f"Threshold {config.threshold:g}: as given."
        choice = ThresholdChoice("given", sentence)
        return _Chosen(Rule(info.task, num_classes, config.threshold), choice)

    rule = Rule(info.task, num_classes, info.threshold)
    remedy = "give --threshold a number, or leave it out for the checkpoint's own"
    samples = [
        sample
        for sample in _select(store, AUTO_SPLIT, info, remedy)
        if store.has_mask(sample.row, label_set)
    ]
    dice = DiceByThreshold()
    if samples:
        cached = _cached(store, samples, info, label_set, config.device)
        for batch in cached.iterate(config.batch_size):
            for i, logits_KSS in enumerate(logits_of(head, batch), start=len(dice)):
                mask_CHW = planes(cached, i, rule)
                dice.add(predict(logits_KSS, cached.letterbox(i), mask_CHW, rule))
            report(len(dice), len(samples) + len(evaluated))
    threshold, mean_dice = dice.best()
    # Not by the splits' names: of cross-validation the part held out is from two of them.
    num_evaluated = len({s.row for s in samples} & {s.row for s in evaluated})
    on_evaluated = num_evaluated > 0
    sentence = (
        f"Threshold {threshold:g}: of {len(THRESHOLDS)} from {THRESHOLDS[0]:g} to "
        f"{THRESHOLDS[-1]:g} that of the highest mean Dice, {mean_dice:.3f}, on the {len(samples)} "
        f"images with a mask of split {AUTO_SPLIT}"
    )
    verb = "are" if num_evaluated > 1 else "is"
    sentence += f"; {num_evaluated or 'none'} of them {verb} evaluated here."
    num_seen = _num_known(info, "images", [sample.pixel_sha256 for sample in samples]) or 0
    choice = ThresholdChoice(
        "auto", sentence, AUTO_SPLIT, len(samples), mean_dice, on_evaluated, num_seen
    )
    return _Chosen(replace(rule, threshold=threshold), choice, len(samples))


def _select(
    store: FeatureStore,
    split: str,
    info: CheckpointInfo,
    remedy: str = "name another by --split, or evaluate on all of them by --split all",
) -> list[StoredSample]:
    samples = [sample for sample in store.samples if split in ("all", sample.split)]
    num_folds, fold = info.settings.get("folds"), info.settings.get("fold")
    if split in ("train", "val") and num_folds:
        # Of cross-validation, which divides both splits anew: what was held out, or was not.
        pool = [sample for sample in store.samples if sample.split in ("train", "val")]
        if not _is_of_other_images(pool, info):
            fold_of = fold_of_groups(
                pool, num_folds, info.settings["fold_seed"], info.settings["stratify"]
            )
            held_out = [sample for sample in pool if fold_of[sample.group] == fold]
            _check_held_out(store, held_out, info)
            learned = [sample for sample in pool if fold_of[sample.group] != fold]
            samples = held_out if split == "val" else learned
    if not samples:
        present = Counter(sample.split for sample in store.samples)
        counts = ", ".join(f"{num} {name}" for name, num in present.items()) or "none"
        raise ConfigError(
            f"{store.path} has no images in split {split} (it has: {counts}); {remedy}"
        )
    return samples


def _is_of_other_images(pool: Sequence[StoredSample], info: CheckpointInfo) -> bool:
    """Return whether a head is known to have learned from none of these: its folds are not here."""
    return _num_known(info, "images", [sample.pixel_sha256 for sample in pool]) == 0


def _check_held_out(
    store: FeatureStore, held_out: Sequence[StoredSample], info: CheckpointInfo
) -> None:
    """Refuse folds that come out otherwise than those that a head was trained with.

    Images of split test may have come or gone since, which change no fold. What the checkpoint
    lists as learned from decides; without such a list, hashes over all images have to be the same.

    Raises:
        ConfigError: images were learned from that would count as held out, or may have been.
    """
    num_images = _num_known(info, "images", [sample.pixel_sha256 for sample in held_out])
    num_in_groups = _num_known(info, "groups", [sample.group for sample in held_out])
    if num_images is None or num_in_groups is None:
        if _has_same_images(store, info):
            return
        found = "the checkpoint does not list what it learned from, and images changed since"
    elif num_images or num_in_groups:
        found = (
            f"of {len(held_out)} images of fold {info.settings['fold']} it learned from "
            f"{num_images}, and from the groups of {num_in_groups}"
        )
    else:
        return
    raise ConfigError(
        f"{store.path} no longer has the folds that the head was trained with ({found}), so that "
        "no images are known to be held out; evaluate on split test with a threshold that is "
        "given, or train the folds again"
    )


def _has_same_images(store: FeatureStore, info: CheckpointInfo) -> bool:
    """Return whether the images, splits and groups are those that a head was trained among."""
    here = dataclasses.asdict(record_data(store, info.label_set))
    there = info.data
    return bool(there) and all(
        of_store == of_head
        for of_store, of_head in (
            (here["samples_sha256"], there["samples_sha256"]),
            *(
                (here["annotations_sha256"][name], there["annotations_sha256"].get(name))
                for name in ("splits", "groups")
            ),
        )
    )


def _cases(
    head: Head, cached: CachedSamples, images: Sequence[tuple[ImageScore, ...]], rule: Rule
) -> list[Case]:
    """Predict the images to show again: to keep what was predicted of all takes too much memory."""
    cases = []
    for title, i in choose_cases([class_mean(scores) for scores in images]):
        (logits_KSS,) = logits_of(head, cached.batch([i]))
        mask_CHW = planes(cached, i, rule)
        assert mask_CHW is not None
        prediction = predict(logits_KSS, cached.letterbox(i), mask_CHW, rule)
        cases.append(
            Case(
                title,
                cached.samples[i],
                cached.letterbox(i),
                images[i],
                mask_CHW.numpy(),
                prediction.predicted_CHW.cpu().numpy(),
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


def _image_scores(
    sample: StoredSample, classes: Sequence[str], prediction: Prediction, by: Sequence[str]
) -> list[ImageScore]:
    areas = prediction.scores or [MaskScores(None, None, None, None)] * len(classes)
    shapes = _shapes(sample, prediction)
    primary, secondary = map(known_or_none, (sample.primary_angle_deg, sample.secondary_angle_deg))
    return [
        ImageScore(
            id=sample.id,
            group=sample.group,
            split=sample.split,
            source=sample.source,
            frame=sample.frame,
            primary_angle_deg=primary,
            secondary_angle_deg=secondary,
            view=view_region(primary, secondary),
            class_name=name,
            **dataclasses.asdict(areas[k]),
            **dataclasses.asdict(shapes[k]),
            predicted_px=prediction.predicted_px[k],
            true_px=prediction.true_px[k] if prediction.true_px else None,
            pixels=short_hash(sample.pixel_sha256),
            annotations=annotations_of(sample, by),
        )
        for k, name in enumerate(classes)
    ]


def _shapes(sample: StoredSample, prediction: Prediction) -> list[ShapeScores]:
    if prediction.mask_CHW is None:
        return [ShapeScores()] * len(prediction.predicted_px)
    height_px, width_px = prediction.mask_CHW.shape[-2:]
    spacing_mm = spacing_of_mask(sample, (height_px, width_px))
    pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.uint8]]] = zip(
        prediction.predicted_CHW.cpu().numpy(), prediction.mask_CHW.cpu().numpy(), strict=True
    )
    return [shape_scores(predicted_HW, mask_HW, spacing_mm) for predicted_HW, mask_HW in pairs]


def _data_sha256(samples: Iterable[StoredSample]) -> str:
    digest = hashlib.sha256()
    for line in sorted(f"{sample.id}\t{sample.pixel_sha256}\n" for sample in samples):
        digest.update(line.encode())
    return digest.hexdigest()
