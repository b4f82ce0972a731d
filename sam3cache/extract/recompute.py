"""Do the images, computed again, give the features that are stored? A few random samples tell.

Features are *equal* bit by bit only on the same device model with the same batches and threads.
Else they differ by rounding, of which this much is taken as nothing, as relative L2 error:

- on the fp32 path 2⁻¹¹, half a unit in the last of float16's 11 significant bits: two devices sum
  in another order, whose error (some 1e-5) shows only where float16 then rounds the other way;
- on the bf16 path 2⁻⁵: every layer rounds to 8 significant bits, a unit of 2⁻⁷ of the value, and
  where another batch or device rounds the other way, the layers after it carry that on;
- for a level in fewer bits than float16, what storing the new features in them costs besides.

Other weights, preprocessing or layers give an error near 1. Pictures have to be equal.

Shape legend: C channels, H height, W width.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache import runtime
from sam3cache.backbone import NumericPath, Tower, find_numeric_path, load_tower
from sam3cache.errors import ConfigError, ImageError
from sam3cache.extract.config import IMAGE_LEVEL, ExtractConfig
from sam3cache.extract.levels import is_of_tower, plan_levels
from sam3cache.features import (
    FeatureStore,
    Fingerprint,
    Place,
    StoredSample,
    decode,
    encode,
    open_store,
)
from sam3cache.images import letterbox_image, pixel_hash, read_image, read_manifest
from sam3cache.records import Sample

TOLERANCE: Mapping[str, float] = {
    "fp32": 2.0**-11,
    "bf16": 2.0**-5,
    "bf16+compile": 2.0**-5,
}
"""By numeric path, the relative L2 error that is taken as rounding."""

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class RecomputeConfig:
    """What is to be computed again, and with what.

    Attributes:
        store: its folder.
        manifest: a CSV, or a folder, whose images the store was made from.
        num_samples: how many to compute; all, if the store has fewer.
        columns: TOML file that maps the CSV's columns to fields, or None.
        seed: of the choice of samples.
        backbone: None: the one that the store was made with.
        weights: as for extraction; None: those that the store names.
        device: where to run the tower.
    """

    store: Place
    manifest: Path
    num_samples: int
    columns: Path | None = None
    seed: int = 0
    backbone: str | None = None
    weights: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if self.num_samples < 1:
            raise ConfigError(
                f"{self.num_samples} samples to compute again: expected at least 1, such as 5"
            )


@dataclass(frozen=True, slots=True)
class LevelComparison:
    """One level of one sample, stored and computed again.

    Attributes:
        level: its name.
        equal: whether the two are the same, bit by bit, as they are stored.
        relative_error: L2 norm of the difference over that of what is stored.
        cosine: of the angle between the two.
        tolerance: relative error that rounding explains.
    """

    level: str
    equal: bool
    relative_error: float
    cosine: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference, if there is one."""
        return self.equal or self.relative_error <= self.tolerance


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """One sample computed again.

    Attributes:
        id: from the manifest.
        row: of the store.
        source: of the image.
        image: "same"; "changed", its pixels are others than those extracted; or "unreadable".
        reason: what is the matter with the image; empty when it is the same.
        levels: compared; none unless the image is the same.
    """

    id: str
    row: int
    source: str
    image: Literal["same", "changed", "unreadable"]
    reason: str = ""
    levels: tuple[LevelComparison, ...] = ()


@dataclass(frozen=True)
class RecomputeResult:
    """What computing samples again has told.

    Attributes:
        samples: those chosen.
        fingerprint_changes: by level, field by field what would be made otherwise now.
        environment_changes: versions of libraries and devices that are others now; no drift.
        elapsed_s: of the call.
    """

    samples: tuple[SampleComparison, ...]
    fingerprint_changes: Mapping[str, tuple[str, ...]]
    environment_changes: tuple[str, ...]
    elapsed_s: float

    @property
    def changed_images(self) -> tuple[SampleComparison, ...]:
        """Samples whose image is not the one that was extracted."""
        return tuple(sample for sample in self.samples if sample.image != "same")

    @property
    def has_drift(self) -> bool:
        """Whether a level would be made otherwise now, or comes out otherwise."""
        return bool(self.fingerprint_changes) or not all(
            level.holds for sample in self.samples for level in sample.levels
        )


def recompute(
    config: RecomputeConfig, report: Report = lambda num_done, num_total: None
) -> RecomputeResult:
    """Compute the features of random samples again and compare them with what is stored.

    Args:
        config: what to do.
        report: called with samples done and in all.

    Raises:
        NotAStoreError: when there is no store.
        CorruptStoreError: when its bytes are not those that were written.
        ConfigError: when backbone or numeric path is unknown, or there is nothing to compute.
        ManifestError: when the manifest is unusable.
        WeightsError: when the weights are absent or not the backbone's.
    """
    start_s = time.monotonic()
    store = open_store(config.store, allow_unsealed=True)
    if not store.samples or not store.levels:
        raise ConfigError(f"{config.store} holds no features that could be computed again")
    stored_samples = (*store.samples, *store.variants)
    chosen = random.Random(config.seed).sample(
        stored_samples, min(config.num_samples, len(stored_samples))
    )
    manifest = read_manifest(config.manifest, config.columns, seed=0)
    images = {(sample.source, sample.frame): sample for sample in manifest.samples}
    tower = _load_tower(config, store)
    comparisons = []
    for num_done, stored in enumerate(sorted(chosen, key=lambda sample: sample.row), 1):
        image = images.get((stored.source, stored.frame))
        if image is not None and stored.variant:
            image = replace(image, variant=stored.variant)
        comparisons.append(_compare_sample(store, stored, image, tower, config, manifest.name))
        report(num_done, len(chosen))
    return RecomputeResult(
        samples=tuple(comparisons),
        fingerprint_changes=_fingerprint_changes(config, store, tower),
        environment_changes=_environment_changes(config, store),
        elapsed_s=time.monotonic() - start_s,
    )


def _load_tower(config: RecomputeConfig, store: FeatureStore) -> Tower | None:
    """Load the tower that the store's levels come from; None where they are pictures alone."""
    of_tower = [name for name in store.levels if is_of_tower(name)]
    if not of_tower:
        return None
    weights = config.weights
    if weights is None and store.settings.get("weights", "default") != "default":
        # A file is named without its folder: found again only from where it lies.
        weights = str(store.settings["weights"])
    return load_tower(
        _backbone(config, store),
        weights=weights,
        levels=tuple(dict.fromkeys(store.levels[name].base for name in of_tower)),
        device=config.device,
        numeric_path=_numeric_path(store, of_tower[0]),
    )


def _backbone(config: RecomputeConfig, store: FeatureStore) -> str:
    return config.backbone or str(store.settings.get("backbone", "sam3"))


def _numeric_path(store: FeatureStore, level: str) -> NumericPath:
    return find_numeric_path(store.fingerprint(level).fields.get("numeric_path", "fp32"))


def _compare_sample(
    store: FeatureStore,
    stored: StoredSample,
    image: Sample | None,
    tower: Tower | None,
    config: RecomputeConfig,
    manifest_name: str,
) -> SampleComparison:
    about = (stored.id, stored.row, stored.source)
    if image is None:
        reason = f"{manifest_name} does not name it"
        return SampleComparison(*about, "unreadable", reason)
    try:
        pixels_HWC = read_image(image)
    except ImageError as error:
        return SampleComparison(*about, "unreadable", str(error))
    if pixel_hash(pixels_HWC) != stored.pixel_sha256:
        reason = "its pixels are not those that were extracted"
        return SampleComparison(*about, "changed", reason)
    # One way for all levels of a store: the way is part of their fingerprints.
    fields = store.fingerprint(next(iter(store.levels))).fields
    squash = fields.get("preprocessing.resize_mode") == "squash"
    pixels_CHW = letterbox_image(pixels_HWC, "squash" if squash else "letterbox")[0].numpy()
    features = {} if tower is None else _features(tower, pixels_CHW)
    levels = tuple(
        _compare_level(store, name, stored.row, pixels_CHW, features) for name in store.levels
    )
    return SampleComparison(*about, "same", levels=levels)


def _features(tower: Tower, pixels_CHW: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Return float32 (C, H, W) by what a level is of."""
    import torch

    output = tower(torch.from_numpy(np.ascontiguousarray(pixels_CHW))[None])
    return {base: feature_BCHW[0].float().cpu().numpy() for base, feature_BCHW in output.items()}


def _compare_level(
    store: FeatureStore,
    name: str,
    row: int,
    pixels_CHW: NDArray[np.uint8],
    features: Mapping[str, NDArray[np.float32]],
) -> LevelComparison:
    spec = store.levels[name]
    stored = store.read_stored(name, row)
    if name == IMAGE_LEVEL:
        expected = np.broadcast_to(pixels_CHW, spec.shape)
        return _comparison(name, stored.data_CHW, expected, tolerance=0.0)
    value_CHW = features[spec.base]
    with np.errstate(over="ignore"):
        kept_CHW = value_CHW if spec.precision == "bf16" else value_CHW.astype(np.float16)
    if value_CHW.shape != spec.shape or not np.isfinite(kept_CHW).all():
        return LevelComparison(name, False, float("inf"), 0.0, 0.0)
    again = encode(spec.precision, kept_CHW)
    again_CHW = decode(spec.precision, again)
    equal = np.array_equal(again.data_CHW, stored.data_CHW)
    if again.scale_C is not None and stored.scale_C is not None:
        equal = equal and np.array_equal(again.scale_C, stored.scale_C)
    # What storing costs: a value near the border of two steps may be taken to either.
    cost = _comparison(name, kept_CHW, again_CHW, 0.0).relative_error
    tolerance = TOLERANCE[_numeric_path(store, name)] + cost
    result = _comparison(name, decode(spec.precision, stored), again_CHW, tolerance)
    return LevelComparison(name, equal, result.relative_error, result.cosine, tolerance)


def _comparison(
    name: str, stored_CHW: NDArray[Any], again_CHW: NDArray[Any], tolerance: float
) -> LevelComparison:
    stored = stored_CHW.astype(np.float64).ravel()
    again = again_CHW.astype(np.float64).ravel()
    norm, norm_again = float(np.linalg.norm(stored)), float(np.linalg.norm(again))
    error = float(np.linalg.norm(stored - again))
    product = norm * norm_again
    return LevelComparison(
        name,
        bool(np.array_equal(stored, again)),
        error / norm if norm else (0.0 if error == 0 else float("inf")),
        float(stored @ again) / product if product else float(norm == norm_again),
        tolerance,
    )


def _fingerprint_changes(
    config: RecomputeConfig, store: FeatureStore, tower: Tower | None
) -> dict[str, tuple[str, ...]]:
    """Say, level by level, which fields of the fingerprints an extraction would write now."""
    changes: dict[str, tuple[str, ...]] = {}
    for name, spec in store.levels.items():
        fields = store.fingerprint(name).fields
        squash = fields.get("preprocessing.resize_mode") == "squash"
        wanted = ExtractConfig(
            manifest=config.manifest,
            output=config.store,
            levels=(name,),
            backbone=_backbone(config, store),
            resize_mode="squash" if squash else "letterbox",
        )
        now = plan_levels(
            wanted,
            None,
            {"numeric_path": _numeric_path(store, name)},
            "" if tower is None else tower.weights_sha256,
            spec.shape[0],
        )
        differing = Fingerprint(fields).differences(now[name][1])
        if differing:
            changes[name] = tuple(differing)
    return changes


def _environment_changes(config: RecomputeConfig, store: FeatureStore) -> tuple[str, ...]:
    then: Mapping[str, Any] = store.settings.get("environment", {})
    before = {**then, "device": store.settings.get("device", "unknown")}
    now: dict[str, Any] = {
        **runtime.environment_fields(),
        "device": runtime.device_memory(config.device).name,
    }
    return _differences(before, now)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    names: Sequence[str] = sorted({*before, *now})
    return tuple(
        f"{name}: {before.get(name, '(absent)')} → {now.get(name, '(absent)')}"
        for name in names
        if before.get(name) != now.get(name)
    )
