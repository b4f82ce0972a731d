"""Which samples of a store a training learns from, and which it is judged by."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam3cache.errors import ConfigError
from sam3cache.features import FeatureStore, StoredSample, block_of
from sam3cache.features.receipts import masks_in
from sam3cache.heads.checkpoint import short_hash
from sam3cache.loading.folds import fold_of_groups
from sam3cache.training.config import TrainConfig
from sam3cache.variants import parse_variants

MAX_RECORDED_SAMPLES = 100_000
"""Most training samples that a checkpoint lists, in 17 bytes each for image and group."""

_MAX_NAMED = 5


@dataclass(frozen=True)
class Division:
    """Which rows of a store a run is about; all have a mask.

    Attributes:
        train: learned from, variants included.
        val: validated on.
        held_out: variants of what is validated on: neither learned from nor validated on, but
            other folds learn from them.
        groups: by image that is learned from, its row and those of its variants.
        variants: names of the variants that are drawn from, by this or another fold, sorted.
        num_without_mask: images left out for want of a mask.
    """

    train: list[int]
    val: list[int]
    held_out: list[int]
    groups: list[list[int]]
    variants: list[str]
    num_without_mask: int

    @property
    def num_variants(self) -> int:
        """Variants of the images that are learned from."""
        return len(self.train) - len(self.groups)

    @property
    def all(self) -> list[int]:
        """All rows that the run is about."""
        return [*self.train, *self.val, *self.held_out]

    @property
    def pool(self) -> list[int]:
        """All rows that the folds of one division draw from, the same for each of them."""
        return sorted(self.all)


def divide(store: FeatureStore, config: TrainConfig) -> Division:
    """Divide a store's samples into what is learned from and what is validated on.

    Raises:
        ConfigError: a split, or of a cross-validation any fold, has no image with a mask, folds
            cannot be made, or a variant is not there.
    """
    samples = store.samples  # without variants
    if config.folds:
        pool = [sample for sample in samples if sample.split in ("train", "val")]
        fold_of = fold_of_groups(pool, config.folds, config.fold_seed, config.stratify)
        _require_masks_in_folds(store, config, pool, fold_of)
        val = [sample for sample in pool if fold_of[sample.group] == config.fold]
        train = [sample for sample in pool if fold_of[sample.group] != config.fold]
    else:
        train = [sample for sample in samples if sample.split == "train"]
        val = [sample for sample in samples if sample.split == "val"]
    train_rows = _with_mask(store, config, "train", train)
    val_rows = _with_mask(store, config, "val", val)
    groups = {row: [row] for row in train_rows}
    validated, held_out, names = set(val_rows), [], set()
    for variant in _variants(store, config):
        if variant.base_row in groups:
            groups[variant.base_row].append(variant.row)
        elif variant.base_row in validated:
            held_out.append(variant.row)
        else:  # of an image without a mask
            continue
        names.add(str(variant.variant))
    return Division(
        train=sorted(row for group in groups.values() for row in group),
        val=val_rows,
        held_out=held_out,
        groups=list(groups.values()),
        variants=sorted(names),
        num_without_mask=len(train) + len(val) - len(train_rows) - len(val_rows),
    )


def _variants(store: FeatureStore, config: TrainConfig) -> list[StoredSample]:
    """Return the variants that a run draws from.

    Raises:
        ConfigError: one was named of which the store has none.
    """
    if config.variants in ("all", "none"):
        return list(store.variants) if config.variants == "all" else []
    wanted = parse_variants(config.variants.split(","))
    there = {variant.variant for variant in store.variants}
    if missing := [name for name in wanted if name not in there]:
        raise ConfigError(
            f"{config.store} has no variant {missing[0]!r} (it has "
            f"{', '.join(sorted(there)) or 'none'}); name others with --variants, or extract it"
        )
    return [variant for variant in store.variants if variant.variant in wanted]


def _with_mask(
    store: FeatureStore, config: TrainConfig, split: str, samples: Sequence[StoredSample]
) -> list[int]:
    """Return the rows of a split that have a mask, of which there has to be one."""
    rows = [sample.row for sample in samples if store.has_mask(sample.row, config.label_set)]
    if not rows:
        counts = Counter(sample.split for sample in store.samples)
        there = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
        missing, remedy = "", f"divide them by `sam3cache store annotations split {config.store}`"
        if samples:
            missing = "with a mask "
            remedy = (
                f"add masks to label set {config.label_set} by `sam3cache store labels set`, or "
                "name another by --label-set"
            )
        raise ConfigError(
            f"{config.store} has no sample {missing}in split {split!r} (samples: {there}); "
            f"training needs both train and val: {remedy}"
        )
    return rows


def _require_masks_in_folds(
    store: FeatureStore,
    config: TrainConfig,
    pool: Sequence[StoredSample],
    fold_of: Mapping[str, int],
) -> None:
    """Refuse folds of which one has nothing to be judged by, whichever is trained now."""
    labelled = {s.group for s in pool if store.has_mask(s.row, config.label_set)}
    bare = sorted({*range(config.folds)} - {fold_of[group] for group in labelled})
    if bare:
        more = ", …" if len(bare) > _MAX_NAMED else ""
        raise ConfigError(
            f"{len(bare)} of {config.folds} folds ({', '.join(map(str, bare[:_MAX_NAMED]))}{more}) "
            f"have no image with a mask in label set {config.label_set}: of the "
            f"{len({*fold_of})} groups of train and val {len(labelled)} have one; take fewer "
            "folds, another division (fold_seed), or label images of more groups"
        )


def masks_sha256(store: FeatureStore, rows: Sequence[int], label_set: str) -> str:
    """Return a hash of what the masks of some rows say: their classes, and their pixels.

    Of the pixels the checksums in receipts, so that no mask has to be read.
    """
    spec, receipts = store.label_sets[label_set], store.holder_of(label_set).receipts
    # A variant has the mask of its image.
    base_row = {v.row: v.base_row for v in store.variants if v.base_row is not None}
    mask_rows = [base_row.get(row, row) for row in rows]
    of_row: dict[int, tuple[int, ...]] = {}
    for block in sorted({block_of(row) for row in mask_rows}):
        of_row |= masks_in(receipts.get((spec.item, block)))
    digest = hashlib.sha256(f"{(spec.task, *spec.classes)!r}\n".encode())
    for row in mask_rows:
        digest.update(f"{of_row.get(row)!r}\n".encode())
    return digest.hexdigest()


def data_settings(store: FeatureStore, rows: Division, label_set: str) -> dict[str, Any]:
    """Return what a run records of its data among its settings."""
    return {
        "num_train": len(rows.groups),
        "num_val": len(rows.val),
        "variants_used": rows.variants,
        "data_sha256": data_sha256(store, rows.all, label_set),
    }


def data_sha256(store: FeatureStore, rows: list[int], label_set: str) -> str:
    """Return a hash of what a run learns from and is judged by, in the order of its rows.

    Of a mask its origin, size and time of change stand for its pixels: no mask has to be read.
    """
    by_row = {sample.row: sample for sample in (*store.samples, *store.variants)}
    masks, digest = store.label_rows(label_set), hashlib.sha256()
    for row in rows:
        sample = by_row[row]
        angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
        # A variant has the mask of its image.
        mask_row = row if sample.base_row is None else sample.base_row
        mask = dataclasses.astuple(masks[mask_row])[1:]  # all but the row
        line = (sample.id, sample.pixel_sha256, sample.split, *angles, *mask)
        digest.update(f"{line!r}\n".encode())
    return digest.hexdigest()


def trained_on(samples: Sequence[StoredSample]) -> dict[str, str]:
    """Return what lets an evaluation tell images that a head knows; see ``CheckpointInfo``."""
    if len(samples) > MAX_RECORDED_SAMPLES:
        return {}
    return {
        "images": " ".join(sorted({short_hash(sample.pixel_sha256) for sample in samples})),
        "groups": " ".join(sorted({short_hash(sample.group) for sample in samples})),
    }
