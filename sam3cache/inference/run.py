"""Many images through a trained head into files: what ``sam3cache predict`` does.

Shape legend: C classes, H height, W width.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sam3cache.backbone import ignore_warnings_of_sam3
from sam3cache.errors import ConfigError, ImageError
from sam3cache.features import StoredSample
from sam3cache.images import read_image
from sam3cache.inference.coco import CocoImage, annotations_of, coco_json
from sam3cache.inference.inputs import Inputs, find_images
from sam3cache.inference.names import output_names
from sam3cache.inference.outputs import (
    OutputFiles,
    OutputLayout,
    ProbabilityFormat,
    legend_svg,
)
from sam3cache.inference.predictor import (
    Origin,
    Predictor,
    PreparedImage,
    check_angles,
    check_threshold,
    decision_words,
    load_without_tower,
    threshold_of,
)
from sam3cache.records import Sample, SetAside
from sam3cache.runtime import environment_fields, is_out_of_memory, write_atomic
from sam3cache.tasks import class_probabilities, decide

Report = Callable[[int, int], None]
"""Called with images done and images in all."""

AnglesOrigin = Literal["given", "store", "unknown"]
"""Where the view angles of an image come from: the user, or the store's sample of its pixels."""

TABLE_FILE, SUMMARY_FILE = "predictions.csv", "summary.json"
_NUM_THREADS = 4


@dataclass(frozen=True)
class PredictConfig:
    """Settings of one prediction.

    Attributes:
        checkpoint: a run's folder, whose best checkpoint is taken, or a checkpoint's own.
        images: paths and patterns; see ``inputs.find_images``.
        output: folder of the results.
        columns: TOML file that says which column of the manifests is what, or None.
        primary_angle_deg: of images whose manifest has none; None: as the store has it, or unknown.
        secondary_angle_deg: likewise.
        store: a feature store, whose features of the same pixels are used, and its view angles
            where none are given; or None.
        coco: COCO JSON file to write, or None.
        overlay: also draw contours on the pictures.
        probabilities: also write them, as "npy" (float32) or "png" (16 bits); or None.
        threshold: probability from which a pixel counts; None: the checkpoint's own.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        backbone: a name in ``BACKBONES``; None: the first of the recorded architecture.
        weights: of the tower; None: the backbone's own.
        device: torch device name.
        batch_size: images a forward pass; None: 8 on CUDA, 1 on a CPU.
        overwrite: replace files of an earlier run.
    """

    checkpoint: Path
    images: tuple[str | Path, ...]
    output: Path
    columns: Path | None = None
    primary_angle_deg: float | None = None
    secondary_angle_deg: float | None = None
    store: Path | None = None
    coco: Path | None = None
    overlay: bool = False
    probabilities: ProbabilityFormat | None = None
    threshold: float | None = None
    head: str | None = None
    backbone: str | None = None
    weights: str | None = None
    device: str = "cpu"
    batch_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if not self.images:
            raise ConfigError("no images are named; give files, folders, patterns or a manifest")
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size}: expected at least 1")
        check_angles(*_or_nan(self.primary_angle_deg, self.secondary_angle_deg))


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one image.

    Attributes:
        sample: which it is, with the view angles that were used.
        files: what was written.
        origin: where its features came from; None if it was set aside.
        angles_origin: where its view angles came from; None if it was set aside.
        height_px: of the image; 0 if it was set aside.
        width_px: likewise.
        num_pixels: by class, how many are of it.
        reason: why it was set aside, else empty.
    """

    sample: Sample
    files: OutputFiles
    origin: Origin | None = None
    angles_origin: AnglesOrigin | None = None
    height_px: int = 0
    width_px: int = 0
    num_pixels: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class PredictResult:
    """What a prediction did.

    Attributes:
        output: folder of the results.
        checkpoint: folder of the checkpoint.
        weights_sha256: of the head.
        head: its name.
        task: "multilabel" or "multiclass".
        classes: names of what was predicted, in order.
        threshold: probability from which a pixel counted; None of the task "multiclass".
        decide: how logits became masks, in words.
        store: where features were taken from, or None.
        num_images: predicted.
        num_from_store: of them, with features from the store.
        num_from_tower: of them, with features that the tower made.
        num_angles_from_store: of them, with view angles from the store, as none were given.
        num_lacking_angles: of them, with an unknown angle; 0 if the head reads no angles.
        set_aside: images that could not be used, each with its reason.
        notes: what is to be told of the images, a sentence each.
        coco: the file written, or None.
        elapsed_s: time taken, loading included.
        environment: versions that matter.
        images: one by one.
    """

    output: Path
    checkpoint: Path
    weights_sha256: str
    head: str
    task: str
    classes: tuple[str, ...]
    threshold: float | None
    decide: str
    store: Path | None
    num_images: int
    num_from_store: int
    num_from_tower: int
    num_angles_from_store: int
    num_lacking_angles: int
    set_aside: tuple[SetAside, ...]
    notes: tuple[str, ...]
    coco: Path | None
    elapsed_s: float
    environment: Mapping[str, str]
    images: tuple[ImageResult, ...]

    def record(self) -> dict[str, Any]:
        """Return all but the single images and the notes, as plain JSON values."""
        record = {
            name: value.as_posix() if isinstance(value, Path) else value
            for name, value in vars(self).items()
            # Notes are for who sits there: one says where their key is.
            if name not in ("images", "notes")
        }
        record["set_aside"] = [asdict(aside) for aside in self.set_aside]
        return record


def predict_images(
    config: PredictConfig, report: Report = lambda num_done, num_total: None
) -> PredictResult:
    """Predict images and write what was found; one that cannot be read is set aside.

    Args:
        config: what to predict, and how.
        report: told of progress.

    Raises:
        ConfigError: the images are not there, or files of an earlier run are in the way.
        ManifestError: a manifest as a whole cannot be used.
        CheckpointError: there is no such checkpoint, or it does not fit.
        WeightsError: the tower is needed, and its weights are not there.
        FingerprintError: tower, store and checkpoint do not belong together.
        StoreError: the store is none, is unfinished or damaged.
    """
    start_s = time.monotonic()
    inputs = find_images(
        config.images,
        columns=config.columns,
        primary_angle_deg=config.primary_angle_deg,
        secondary_angle_deg=config.secondary_angle_deg,
    )
    predictor = load_without_tower(
        config.checkpoint,
        backbone=config.backbone,
        weights=config.weights,
        head=config.head,
        device=config.device,
        store=config.store,
    )
    predictor.threshold = threshold_of(predictor.info, config.threshold)
    layout = OutputLayout(
        config.output, predictor.task, predictor.classes, config.overlay, config.probabilities
    )
    files = [layout.files(name) for name in output_names(inputs.samples)]
    _require_free(config, layout, inputs, files)
    _prepare(config.output)
    if config.store is None:
        _ = predictor.tower  # Before any image is read: it may not be there.

    results: list[ImageResult] = []
    coco: list[CocoImage] = []
    report(0, len(inputs.samples))
    for result, drawn in _predict(config, predictor, layout, inputs.samples, files):
        results.append(result)
        if config.coco is not None and not result.reason:
            image = CocoImage(result.sample, result.height_px, result.width_px, drawn)
            coco.append(image)
        report(len(results), len(inputs.samples))

    origins = Counter(result.origin for result in results)
    angles_origins = Counter(result.angles_origin for result in results)
    num_lacking_angles = sum(not r.reason and _lacks_angle(r.sample) for r in results)
    if num_lacking_angles and not predictor.reads_angles():
        num_lacking_angles = 0
    set_aside = [SetAside(r.sample.id, r.sample.source, r.reason) for r in results if r.reason]
    if layout.legend is not None:
        write_atomic(layout.legend, legend_svg(predictor.classes).encode())
    if config.coco is not None:
        write_atomic(config.coco, coco_json(coco, predictor.classes).encode())
    made = PredictResult(
        output=config.output,
        checkpoint=predictor.folder,
        weights_sha256=predictor.info.weights_sha256,
        head=predictor.info.head,
        task=predictor.task,
        classes=predictor.classes,
        threshold=None if predictor.task == "multiclass" else predictor.threshold,
        decide=decision_words(predictor.info),
        store=config.store,
        num_images=len(results) - len(set_aside),
        num_from_store=origins["store"],
        num_from_tower=origins["tower"],
        num_angles_from_store=angles_origins["store"],
        num_lacking_angles=num_lacking_angles,
        set_aside=(*inputs.set_aside, *set_aside),
        notes=inputs.notes,
        coco=config.coco,
        elapsed_s=time.monotonic() - start_s,
        environment=environment_fields(),
        images=tuple(results),
    )
    write_atomic(config.output / TABLE_FILE, _table(made, inputs.set_aside).encode())
    summary = json.dumps(made.record(), indent=2, allow_nan=False) + "\n"
    write_atomic(config.output / SUMMARY_FILE, summary.encode())
    return made


def _require_free(
    config: PredictConfig,
    layout: OutputLayout,
    inputs: Inputs,
    files: Sequence[OutputFiles],
) -> None:
    """Refuse, before anything is computed, to write over what is there."""
    own = [config.output / TABLE_FILE, config.output / SUMMARY_FILE]
    outputs = [*(path for one in files for path in one.all), *own]
    outputs += [path for path in (layout.legend, config.coco) if path is not None]
    given = {path.resolve() for path in inputs.files} | {
        path.resolve()
        for sample in inputs.samples
        for path in (sample.image_path, sample.mask_path)
        if path is not None
    }
    seen: set[Path] = set()
    for path in outputs:
        place = path.resolve()
        if place in given:
            raise ConfigError(
                f"{path} is one of the files that were given; name another folder by -o"
            )
        if place in seen:
            raise ConfigError(f"{path} would be written twice; name another file by --coco")
        seen.add(place)
    there = [path for path in outputs if path.exists()]
    if there and not config.overwrite:
        more = f" (and {len(there) - 1} more files)" if len(there) > 1 else ""
        raise ConfigError(
            f"{there[0]} is there already{more}; name another folder by -o, or replace what "
            "is there by --overwrite"
        )
    if folders := [path for path in there if path.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder; name another place by -o or --coco")


def _prepare(folder: Path) -> None:
    """Make the folder of the results, before anything is computed for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"results cannot be written to {folder} ({error.strerror}); name another folder by -o"
        ) from None


@dataclass(frozen=True, slots=True)
class _Decoded:
    """An image as it was read; a reason in its place where it could not be."""

    sample: Sample
    angles_origin: AnglesOrigin | None = None
    pixels_HWC: NDArray[np.uint8] | None = None
    prepared: PreparedImage | None = None
    reason: str = ""


_Outcome = tuple[ImageResult, tuple[dict[str, Any], ...]]


def _predict(
    config: PredictConfig,
    predictor: Predictor,
    layout: OutputLayout,
    samples: Sequence[Sample],
    files: Sequence[OutputFiles],
) -> Iterator[_Outcome]:
    """Go through the images in order, a batch at a time; others are read and written meanwhile."""
    batch_size = config.batch_size or (1 if predictor.device == "cpu" else 8)
    # Decoding threads set aside warnings, and put them back, while the tower is loaded.
    ignore_warnings_of_sam3()

    def decode(sample: Sample) -> _Decoded:
        try:
            pixels_HWC = read_image(sample)
            prepared = predictor.prepare(pixels_HWC)
        except ImageError as error:
            return _Decoded(sample, reason=str(error))
        return _Decoded(*_with_angles(sample, prepared.stored), pixels_HWC, prepared)

    def write(
        at: OutputFiles,
        decoded: _Decoded,
        mask_CHW: NDArray[np.bool_],
        probability_CHW: NDArray[np.float32],
    ) -> _Outcome:
        assert decoded.pixels_HWC is not None
        assert decoded.prepared is not None
        layout.write(at, mask_CHW, probability_CHW, decoded.pixels_HWC)
        num_pixels = tuple(mask_CHW.sum(axis=(1, 2)).tolist())
        origin = predictor.origin(decoded.prepared)
        height_px, width_px = mask_CHW.shape[1:]
        result = ImageResult(
            decoded.sample, at, origin, decoded.angles_origin, height_px, width_px, num_pixels
        )
        annotations = annotations_of(mask_CHW, probability_CHW) if config.coco else ()
        return result, annotations

    def put_aside(sample: Sample, at: OutputFiles, reason: str) -> _Outcome:
        # What an earlier run made of it would pass for what this one has.
        for path in at.all:
            path.unlink(missing_ok=True)
        return ImageResult(sample, at, reason=reason), ()

    def begin(place: slice) -> tuple[slice, list[Future[_Decoded]]]:
        return place, [pool.submit(decode, sample) for sample in samples[place]]

    def infer(begun: tuple[slice, list[Future[_Decoded]]]) -> list[Future[_Outcome]]:
        place, reads = begun
        decoded = [read.result() for read in reads]
        good = [(one.sample, one.prepared) for one in decoded if one.prepared is not None]
        found = iter(_infer(predictor, good, batch_size))
        return [
            pool.submit(put_aside, one.sample, at, one.reason)
            if one.reason
            else pool.submit(write, at, one, *next(found))
            for at, one in zip(files[place], decoded, strict=True)
        ]

    places = [slice(at, at + batch_size) for at in range(0, len(samples), batch_size)]
    with ThreadPoolExecutor(_NUM_THREADS, "sam3cache-predict") as pool:
        try:
            # While one batch is in the tower, the next is read and the last is written.
            for writes in _one_ahead(infer, _one_ahead(begin, places)):
                yield from (write.result() for write in writes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_T = TypeVar("_T")
_U = TypeVar("_U")


def _one_ahead(begin: Callable[[_T], _U], items: Iterable[_T]) -> Iterator[_U]:
    """Begin each item before what was begun of the one before it is handed out."""
    waiting: deque[_U] = deque()
    for item in items:
        waiting.append(begin(item))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _infer(
    predictor: Predictor, images: Sequence[tuple[Sample, PreparedImage]], batch_size: int
) -> list[tuple[NDArray[np.bool_], NDArray[np.float32]]]:
    """Return, by image, which pixels are of each class and the probability, each (C, H, W)."""
    if not images:
        return []
    angles_deg = [
        _or_nan(sample.primary_angle_deg, sample.secondary_angle_deg) for sample, _ in images
    ]
    found = []
    try:
        for logits_KHW in predictor.logits([image for _, image in images], angles_deg):
            mask_CHW = decide(logits_KHW, predictor.task, predictor.threshold)
            probability_CHW = class_probabilities(logits_KHW, predictor.task)
            found.append((mask_CHW.cpu().numpy(), probability_CHW.cpu().numpy()))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"pass --batch-size {batch_size // 2}" if batch_size > 1 else "use --device cpu"
        raise ConfigError(
            f"{predictor.device} has not enough memory for batches of {batch_size}: {advice}"
        ) from None
    return found


def _with_angles(sample: Sample, stored: StoredSample | None) -> tuple[Sample, AnglesOrigin]:
    """Give a sample without angles those of the store's; with one, both might be of two views."""
    if sample.primary_angle_deg is not None or sample.secondary_angle_deg is not None:
        return sample, "given"
    if stored is None:
        return sample, "unknown"
    primary_angle_deg, secondary_angle_deg = (
        None if math.isnan(angle_deg) else angle_deg
        for angle_deg in (stored.primary_angle_deg, stored.secondary_angle_deg)
    )
    if primary_angle_deg is None and secondary_angle_deg is None:
        return sample, "unknown"
    filled = replace(
        sample, primary_angle_deg=primary_angle_deg, secondary_angle_deg=secondary_angle_deg
    )
    return filled, "store"


def _lacks_angle(sample: Sample) -> bool:
    return sample.primary_angle_deg is None or sample.secondary_angle_deg is None


def _or_nan(
    primary_angle_deg: float | None, secondary_angle_deg: float | None
) -> tuple[float, float]:
    return (
        math.nan if primary_angle_deg is None else primary_angle_deg,
        math.nan if secondary_angle_deg is None else secondary_angle_deg,
    )


def _table(result: PredictResult, set_aside: Sequence[SetAside]) -> str:
    """Return a line an image, those set aside too; files relative to the folder of the results."""
    table = io.StringIO(newline="")
    fixed = ("id", "source", "frame", "primary_angle_deg", "secondary_angle_deg")
    pixels = [f"{name}_px" for name in result.classes]
    writer = csv.writer(table)
    made_of = ("angles", "features", "height_px", "width_px")
    writer.writerow([*fixed, *made_of, *pixels, "mask", "reason"])
    for image in result.images:
        sample = image.sample
        known = [
            sample.id,
            sample.source,
            sample.frame,
            sample.primary_angle_deg,
            sample.secondary_angle_deg,
        ]
        if image.reason:
            made: list[object] = [""] * (len(made_of) + len(pixels) + 1)
        else:
            masks = [path.relative_to(result.output).as_posix() for path in image.files.masks]
            sizes = (image.height_px, image.width_px, *image.num_pixels)
            made = [image.angles_origin, image.origin, *sizes, ";".join(masks)]
        writer.writerow([*known, *made, image.reason])
    for aside in set_aside:
        writer.writerow([aside.id, aside.source, *[""] * (8 + len(pixels)), aside.reason])
    return table.getvalue()
