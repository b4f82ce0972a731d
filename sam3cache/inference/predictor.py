"""A trained head on new images: through the tower, or from a store that has the same pixels.

Shape legend: B batch, C channels of an image or classes of masks, H height, W width, K planes of
logits, S side of a square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.backbone import BACKBONES, Tower, load_tower
from sam3cache.errors import CheckpointError, ConfigError, FingerprintError, ImageError
from sam3cache.evaluation import checkpoint_folder, fingerprints_of
from sam3cache.features import FeatureStore, StoredSample, open_store
from sam3cache.features.precision import Precision, decode, encode, from_words, split_name
from sam3cache.geometry import Letterbox, ResizeMode
from sam3cache.heads import CheckpointInfo, Head, check_fingerprints, load_checkpoint
from sam3cache.images import letterbox_image, pixel_hash, preprocessing_fields, read_image
from sam3cache.images.manifest import MAX_ANGLE_DEG
from sam3cache.records import Batch, Sample
from sam3cache.tasks import Task, class_probabilities, decide

IMAGE_LEVEL = "image_1008"

Image = str | Path | NDArray[np.uint8]
"""A file, or pixels uint8 (H, W), (H, W, 1) or (H, W, 3)."""

Origin = Literal["tower", "store", "picture"]
"""Where the features of an image come from; "picture" where the head reads nothing but that."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that is ready for the tower, or found in the store.

    Attributes:
        letterbox: where it lies on the square.
        square_CSS: uint8, C 1 or 3; None where nothing reads it.
        stored: the store's sample of the same pixels; None where the tower has to make features.
    """

    letterbox: Letterbox
    square_CSS: Tensor | None
    stored: StoredSample | None


class Predictor:
    """A head, and the tower that made its features or a store of them; ``load`` makes one.

    Attributes:
        head: in evaluation mode.
        info: what its checkpoint records.
        folder: of the checkpoint.
        task: "multilabel", each class decided by itself, so that one class is a binary mask; or
            "multiclass", where each pixel is of one class or of none.
        classes: names of what is predicted, in order.
        threshold: probability from which a pixel counts; "multiclass" has no use for it. It may
            be set to another.
        store: where features are taken from if it has them, or None.
        resize_mode: how images are laid on the square.
        device: where head and tower run.
    """

    def __init__(
        self,
        head: Head,
        info: CheckpointInfo,
        folder: Path,
        make_tower: Callable[[], Tower] | None,
        resize_mode: ResizeMode,
        device: str,
        store: FeatureStore | None = None,
    ) -> None:
        self.head = head
        self.info = info
        self.folder = folder
        self.task: Task = info.task
        self.classes = class_names(info)
        self.threshold = info.threshold
        self.store = store
        self.resize_mode = resize_mode
        self.device = device
        self._make_tower = make_tower
        self._tower: Tower | None = None
        self._stored: dict[str, StoredSample] = {}
        if store is not None:
            # Of those with the same pixels the first, of those whose angles are known.
            for sample in sorted(store.samples, key=_num_angles, reverse=True):
                self._stored.setdefault(sample.pixel_sha256, sample)

    @property
    def tower(self) -> Tower | None:
        """The tower, loaded when it is first asked for; None where the head needs none."""
        if self._tower is None and self._make_tower is not None:
            self._tower = self._make_tower()
        return self._tower

    def predict(
        self,
        image: Image,
        primary_angle_deg: float = math.nan,
        secondary_angle_deg: float = math.nan,
    ) -> NDArray[np.float32]:
        """Predict the probabilities of one image.

        Args:
            image: a file, or pixels uint8 (H, W), (H, W, 1) or (H, W, 3).
            primary_angle_deg: LAO positive, in [-180, 180]; NaN when unknown.
            secondary_angle_deg: cranial positive, in [-90, 90]; NaN when unknown.

        Returns:
            float32 (C, H, W) in [0, 1] on the image's own grid, a plane a class. Of "multilabel"
            ``threshold`` is where a mask begins; of "multiclass" they and "none" sum to 1.

        Raises:
            ImageError: the file cannot be read, or the array is no such image.
            ConfigError: an angle is out of range.
            WeightsError, FingerprintError: of the tower, if this is the first time it is needed.
        """
        return next(self.predict_many([image], [(primary_angle_deg, secondary_angle_deg)]))

    def predict_many(
        self,
        images: Sequence[Image],
        angles_deg: Sequence[tuple[float, float]] | None = None,
        *,
        batch_size: int = 8,
    ) -> Iterator[NDArray[np.float32]]:
        """Predict the probabilities of several images, of any sizes, a batch at a time.

        Args:
            images: as for ``predict``.
            angles_deg: primary and secondary angle of each; None when all are unknown.
            batch_size: B, images a forward pass.

        Yields:
            What ``predict`` returns, in the order of ``images``.

        Raises:
            ImageError, ConfigError, WeightsError, FingerprintError: as for ``predict``.
        """
        for logits_KHW in self._logits_many(images, angles_deg, batch_size):
            probability_CHW: NDArray[np.float32] = (
                class_probabilities(logits_KHW, self.task).cpu().numpy()
            )
            yield probability_CHW

    def segment(
        self,
        image: Image,
        primary_angle_deg: float = math.nan,
        secondary_angle_deg: float = math.nan,
    ) -> NDArray[np.bool_]:
        """Decide which pixels of one image are of each class.

        Args:
            image: as for ``predict``.
            primary_angle_deg: as for ``predict``.
            secondary_angle_deg: as for ``predict``.

        Returns:
            bool (C, H, W) on the image's own grid. Of "multilabel", where the probability reaches
            ``threshold``; of "multiclass", where the class is the likeliest, "none" among them.

        Raises:
            ImageError, ConfigError, WeightsError, FingerprintError: as for ``predict``.
        """
        angles_deg = [(primary_angle_deg, secondary_angle_deg)]
        (logits_KHW,) = self._logits_many([image], angles_deg, 1)
        mask_CHW: NDArray[np.bool_] = decide(logits_KHW, self.task, self.threshold).cpu().numpy()
        return mask_CHW

    def prepare(self, pixels_HWC: NDArray[np.uint8]) -> PreparedImage:
        """Lay an image on the square, or find it in the store; several threads may do so at once.

        Args:
            pixels_HWC: uint8 (H, W, 1) or (H, W, 3).

        Raises:
            ImageError: the head reads grey pictures, and this one has colours.
        """
        stored = self._stored.get(pixel_hash(pixels_HWC)) if self._stored else None
        if stored is not None and IMAGE_LEVEL not in self.info.levels:
            height_px, width_px = pixels_HWC.shape[:2]
            letterbox = Letterbox.fit(height_px, width_px, self.resize_mode)
            return PreparedImage(letterbox, None, stored)
        square_CSS, letterbox = letterbox_image(pixels_HWC, self.resize_mode)
        if IMAGE_LEVEL in self.info.levels:
            num_channels = self.info.levels[IMAGE_LEVEL]["shape"][0]
            if num_channels == 1 and not _is_grey(pixels_HWC):
                raise ImageError(
                    "a picture in colour: the head was trained on grey ones; convert it to grey"
                )
            if num_channels == 1:
                square_CSS = square_CSS[:1]
        return PreparedImage(letterbox, square_CSS, stored)

    def origin(self, image: PreparedImage) -> Origin:
        """Return where the features of an image come from."""
        if self._make_tower is None:
            return "picture"
        return "tower" if image.stored is None else "store"

    def batch(
        self, images: Sequence[PreparedImage], angles_deg: Sequence[tuple[float, float]]
    ) -> Batch:
        """Compute, or read from the store, what the head reads of some images.

        Args:
            images: as ``prepare`` makes them.
            angles_deg: primary and secondary angle of each; NaN when unknown.

        Returns:
            A batch on the device. Features of the tower are as it gives them (float32, or bfloat16
            on that path, without the rounding to float16 of a store), or what a store keeps of them
            if the head was trained on fewer bits; features of the store are as it keeps them.
        """
        boxes = [image.letterbox for image in images]
        content = [[box.content_height_px, box.content_width_px] for box in boxes]
        return Batch(
            levels=self._levels(images),
            angles_B2=torch.tensor(angles_deg, dtype=torch.float32, device=self.device),
            content_B2=torch.tensor(content, device=self.device),
        )

    def logits(
        self, images: Sequence[PreparedImage], angles_deg: Sequence[tuple[float, float]]
    ) -> list[Tensor]:
        """Run the head on some images.

        Args:
            images: as ``prepare`` makes them.
            angles_deg: primary and secondary angle of each; NaN when unknown.

        Returns:
            By image, float32 (K, H, W) on its own grid, on the device.
        """
        with torch.inference_mode():
            logits_BKSS = self.head(self.batch(images, angles_deg)).float()
            return [
                image.letterbox.logits_to_grid(
                    logits_KSS, image.letterbox.source_height_px, image.letterbox.source_width_px
                )
                for image, logits_KSS in zip(images, logits_BKSS, strict=True)
            ]

    def reads_angles(self) -> bool:
        """Return whether the head's logits depend on view angles, by a trial on noise."""
        known = trial_batch(self.info, 1, self.device)
        unknown = replace(known, angles_B2=torch.full_like(known.angles_B2, math.nan))
        with torch.inference_mode():
            return not torch.allclose(self.head(known), self.head(unknown))

    def _logits_many(
        self,
        images: Sequence[Image],
        angles_deg: Sequence[tuple[float, float]] | None,
        batch_size: int,
    ) -> Iterator[Tensor]:
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: expected at least 1")
        if angles_deg is None:
            angles_deg = [(math.nan, math.nan)] * len(images)
        if len(angles_deg) != len(images):
            raise ConfigError(
                f"{len(angles_deg)} pairs of angles for {len(images)} images: expected one for "
                "each, NaN where an angle is unknown"
            )
        for pair in angles_deg:
            check_angles(*pair)
        for first in range(0, len(images), batch_size):
            chunk = slice(first, first + batch_size)
            prepared = [self.prepare(_pixels(image)) for image in images[chunk]]
            yield from self.logits(prepared, angles_deg[chunk])

    def _levels(self, images: Sequence[PreparedImage]) -> dict[str, Tensor]:
        """Return by level what the head reads, (B, C, S, S) each."""
        made = self._made_by_tower([image for image in images if image.stored is None])
        levels: dict[str, Tensor] = {}
        for level, entry in self.info.levels.items():
            if level == IMAGE_LEVEL:
                levels[level] = _stack([image.square_CSS for image in images]).to(self.device)
                levels[level] = levels[level].expand(-1, entry["shape"][0], -1, -1)
                continue
            fresh = iter(made.get(level, ()))
            parts = [
                next(fresh) if image.stored is None else self._read(level, image.stored.row)
                for image in images
            ]
            # The tower's float32 or bfloat16 beside a store's float16.
            dtype = reduce(torch.promote_types, (part.dtype for part in parts))
            levels[level] = torch.stack([part.to(dtype) for part in parts])
        return levels

    def _made_by_tower(self, images: Sequence[PreparedImage]) -> dict[str, Tensor]:
        if not images or self.tower is None:
            return {}
        made = self.tower(_stack([image.square_CSS for image in images]))
        return {
            level: _as_kept(precision_of(entry), made[split_name(level)[0]])
            for level, entry in self.info.levels.items()
            if level != IMAGE_LEVEL
        }

    def _read(self, level: str, row: int) -> Tensor:
        assert self.store is not None
        return torch.from_numpy(self.store.read(level, row)).to(self.device)


def load(
    checkpoint: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    head: str | None = None,
    device: str = "cpu",
    store: str | Path | FeatureStore | None = None,
) -> Predictor:
    """Load a trained head, and the tower as its features were made with it.

    Args:
        checkpoint: a run's folder, whose best checkpoint is taken, or that of one checkpoint.
        backbone: a name in ``BACKBONES``; None: the first of the recorded architecture.
        weights: as for ``backbone.load_tower``.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        device: where to run.
        store: a feature store; where it has an image of the same pixels, its features are taken,
            and the tower is loaded only when an image comes that it lacks.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit.
        WeightsError: there are no such weights, or they are not of this backbone.
        FingerprintError: with these weights, or with this version's way of preparing images, the
            features would not be those that the head was trained on; or the store's are not.
        StoreError: the store is none, is unfinished or damaged.
    """
    predictor = load_without_tower(
        checkpoint, backbone=backbone, weights=weights, head=head, device=device, store=store
    )
    if store is None:
        # At once: who waits for a first prediction should not learn then that it cannot be.
        _ = predictor.tower
    return predictor


def load_without_tower(
    checkpoint: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    head: str | None = None,
    device: str = "cpu",
    store: str | Path | FeatureStore | None = None,
) -> Predictor:
    """Load as :func:`load` does, but the tower only when it is first needed."""
    folder = checkpoint_folder(Path(checkpoint))
    trained, info = load_checkpoint(folder, head=head, device=device)
    fields: dict[str, Any] = {}
    for entry in info.levels.values():
        fields |= entry["fields"]
    resize_mode = cast(ResizeMode, fields.get("preprocessing.resize_mode", "letterbox"))
    preparing = {f"preprocessing.{k}": v for k, v in preprocessing_fields(resize_mode).items()}
    _require_as_trained(folder, fields, preparing)
    of_tower = tuple(
        dict.fromkeys(split_name(level)[0] for level in info.levels if level != IMAGE_LEVEL)
    )

    def make_tower() -> Tower:
        tower = load_tower(
            backbone or _backbone_of(folder, fields),
            weights=weights,
            levels=of_tower,
            device=device,
            numeric_path=fields.get("numeric_path", "fp32"),
        )
        here = {f"architecture.{k}": v for k, v in tower.spec.architecture_fields().items()}
        _require_as_trained(folder, fields, {"weights_sha256": tower.weights_sha256, **here})
        return tower

    return Predictor(
        trained,
        info,
        folder,
        make_tower if of_tower else None,
        resize_mode,
        device,
        None if store is None else _serving(store, info),
    )


def check_angles(primary_angle_deg: float, secondary_angle_deg: float) -> None:
    """Refuse angles that no view has; NaN is an unknown one.

    Raises:
        ConfigError: naming the angle.
    """
    for which, angle_deg in (("primary", primary_angle_deg), ("secondary", secondary_angle_deg)):
        limit = MAX_ANGLE_DEG[which]
        if abs(angle_deg) > limit:
            raise ConfigError(
                f"{which} angle {angle_deg:g}: expected degrees in [-{limit}, {limit}], or nothing "
                "when it is unknown"
            )


def check_threshold(threshold: float) -> None:
    """Refuse what is no probability, or would make a mask of all pixels or of none.

    Raises:
        ConfigError: naming it.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold {threshold}: expected a probability above 0, below 1")


def threshold_of(info: CheckpointInfo, given: float | None) -> float:
    """Return the probability from which a pixel counts: as given, else the checkpoint's own.

    Raises:
        ConfigError: it is no probability, or the head's task has no use for one.
    """
    if given is None:
        return info.threshold
    check_threshold(given)
    if info.task == "multiclass":
        raise ConfigError(
            f"threshold {given}: a head of task multiclass gives each pixel the class with the "
            "highest logit, or none; leave --threshold out"
        )
    return given


def class_names(info: CheckpointInfo) -> tuple[str, ...]:
    """Return what a head predicts, in order; numbered where its checkpoint does not say."""
    if info.classes:
        return info.classes
    num_classes = info.num_classes - (info.task == "multiclass")
    if num_classes == 1:
        return (info.label_set,)
    return tuple(f"class {number}" for number in range(1, num_classes + 1))


def decision_words(info: CheckpointInfo) -> str:
    """Return how logits become a mask, for people: what a task is called is for programs."""
    if info.task == "multiclass":
        return "the plane with the highest logit; the first is none of the classes"
    if info.num_classes == 1:
        return "binary: sigmoid(logit) >= threshold"
    return "sigmoid(logit) >= threshold, each class by itself"


def trial_batch(info: CheckpointInfo, num_images: int, device: str) -> Batch:
    """Return noise that a head can read; angles known, unknown and known by half, in turn.

    Args:
        info: of the head's checkpoint.
        num_images: B, from 1 to 3.
        device: where it shall be.
    """
    random = torch.Generator().manual_seed(0)
    levels = {}
    for level, entry in info.levels.items():
        shape = (num_images, *entry["shape"])
        if level == IMAGE_LEVEL:
            value = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        else:
            value = torch.randn(shape, generator=random)
        levels[level] = value.to(device)
    angles_B2 = torch.tensor([[30.0, -20.0], [math.nan, math.nan], [-90.0, math.nan]])
    content_B2 = torch.tensor([[1008, 1008], [1008, 756], [504, 1008]])
    return Batch(levels, angles_B2[:num_images].to(device), content_B2[:num_images].to(device))


def precision_of(entry: Mapping[str, Any]) -> Precision:
    """Return the precision of a level that a checkpoint records."""
    return from_words(str(entry["fields"].get("precision")))


def _serving(store: str | Path | FeatureStore, info: CheckpointInfo) -> FeatureStore:
    """Open a store, and have it serve what the head reads of the tower as it was trained on it."""
    if not isinstance(store, FeatureStore):
        store = open_store(store)
    # The picture is at hand anyway: a store that lacks it will do.
    of_tower = {level: entry for level, entry in info.levels.items() if level != IMAGE_LEVEL}
    store.serve_digests({level: entry["digest"] for level, entry in of_tower.items()})
    try:
        check_fingerprints(of_tower, fingerprints_of(store))
    except FingerprintError as error:
        raise FingerprintError(
            f"{store.path}: {error}; or predict without it, by the tower alone"
        ) from error
    return store


def _require_as_trained(folder: Path, trained: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differences = [
        f"{name} {trained.get(name, 'absent')} → {value}"
        for name, value in here.items()
        if trained.get(name) != value
    ]
    if differences:
        raise FingerprintError(
            f"features made here would not be those that the head of {folder} was trained on: "
            f"{'; '.join(differences)}; give the backbone and weights that the store was extracted "
            "with, or extract and train again"
        )


def _stack(squares: Sequence[Tensor | None]) -> Tensor:
    """Return squares as one uint8 (B, C, S, S); beside one in colour, grey ones become so."""
    present = [square_CSS for square_CSS in squares if square_CSS is not None]
    assert len(present) == len(squares)
    num_channels = max(len(square_CSS) for square_CSS in present)
    return torch.stack([square_CSS.expand(num_channels, -1, -1) for square_CSS in present])


def _as_kept(precision: Precision, feature_BCHW: Tensor) -> Tensor:
    """Return features as a store gives them that keeps them in fewer bits than float16."""
    if precision in ("float16", "bf16"):
        return feature_BCHW
    kept = [
        decode(precision, encode(precision, feature_CHW.float().cpu().numpy()))
        for feature_CHW in feature_BCHW
    ]
    return torch.from_numpy(np.stack(kept)).to(feature_BCHW)


def _backbone_of(folder: Path, fields: Mapping[str, Any]) -> str:
    recorded = {
        name.removeprefix("architecture."): value
        for name, value in fields.items()
        if name.startswith("architecture.")
    }
    for name, spec in BACKBONES.items():
        if spec.architecture_fields() == recorded:
            return name
    raise CheckpointError(
        f"the features of {folder} were made by a tower that is none of {', '.join(BACKBONES)}; "
        "evaluate on a store instead, by `sam3cache eval`, or predict from one that has the images"
    )


def _num_angles(sample: StoredSample) -> int:
    """Count the view angles that are known."""
    angles_deg = (sample.primary_angle_deg, sample.secondary_angle_deg)
    return sum(not math.isnan(angle_deg) for angle_deg in angles_deg)


def _is_grey(pixels_HWC: NDArray[np.uint8]) -> bool:
    return bool((pixels_HWC[..., :1] == pixels_HWC).all())


def _pixels(image: Image) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        path = Path(image)
        return read_image(Sample(id=path.stem, source=path.name, root=path.parent))
    pixels_HWC = image[..., None] if image.ndim == 2 else image
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3):
        raise ImageError(
            f"an array of {image.dtype} {image.shape}: expected uint8 (H, W), (H, W, 1) or "
            "(H, W, 3); scale other intensities to 8 bits first, or give the file"
        )
    return pixels_HWC
