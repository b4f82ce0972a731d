"""What a store holds, in numbers: for people who look at it, and for scripts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sam3cache.features.places import Place
from sam3cache.features.receipts import SEAL_COPY, SEAL_FILE, Receipt
from sam3cache.features.repacking import dead_space
from sam3cache.features.store import (
    FeatureStore,
    StoredSample,
    interrupted_change,
    open_store,
    read_description,
)
from sam3cache.features.tables import (
    ANNOTATIONS_FILE,
    LABEL_ROWS_FILE,
    SAMPLES_FILE,
    AnnotationRow,
    num_replaced,
)
from sam3cache.records import SPLITS


def summarise(root: Place, *, overlay: Place | None = None) -> dict[str, Any]:
    """Say what a store holds, as JSON values; one that is not sealed is said to be so.

    Nothing but tables and receipts is read: bytes are those that the receipts state.

    Args:
        root: the store's folder.
        overlay: labels and annotations kept beside it, which go before its own.

    Raises:
        NotAStoreError: when there is no store.
        CorruptStoreError: when metadata or tables are not what the store was sealed with.
        StoreError: when the format is newer, or the overlay is of other pictures.
    """
    store = open_store(root, allow_unsealed=True, overlay=overlay)
    description = read_description(store.folder)
    samples = store.samples
    dead = dead_space(store)
    return {
        "store": root.as_posix(),
        "overlay": None if overlay is None else overlay.as_posix(),
        "format_version": description["format_version"],
        "sealed": store.sealed,
        "interrupted_change": "" if store.sealed else interrupted_change(root),
        "seal": store.seal,
        "num_rows": description["num_blocks"] * description["block_rows"],
        "num_samples": _by_status(store),
        "variants": _variants(store),
        "splits": _splits(samples),
        "num_groups": len({sample.group for sample in samples}),
        "groups_in_several_splits": groups_in_several_splits(samples),
        "num_with_both_angles": sum(
            not math.isnan(s.primary_angle_deg + s.secondary_angle_deg) for s in samples
        ),
        "extra_columns": sorted({name for sample in samples for name in sample.extra}),
        "levels": {name: _level(store, name) for name in store.levels},
        "label_sets": {name: _label_set(store, name) for name in store.label_sets},
        "size_bytes": _shard_bytes(store.receipts.values()) + _other_bytes(store),
        "dead": {"num_samples": dead.num_samples, "size_bytes": dead.size_bytes},
        "settings": store.settings,
        "set_aside": [
            {"id": aside.id, "source": aside.source, "reason": aside.reason}
            for aside in store.set_aside
        ],
    }


def _by_status(store: FeatureStore) -> dict[str, int]:
    found: Counter[str] = Counter()
    removed = []
    for row in store.sample_rows:
        if row.variant is None:
            found[row.status] += 1
            if row.status == "removed":
                removed.append(row)
    living = (
        (row.id, row.source)
        for row in store.sample_rows
        if row.variant is None and row.status != "removed"
    )
    return {
        **{status: found[status] for status in ("ok", "pending", "aside", "removed")},
        "replaced": num_replaced(removed, living) if removed else 0,
    }


def _variants(store: FeatureStore) -> dict[str, int]:
    """Count, by name, the changed views that training may draw from."""
    return dict(Counter(variant.variant for variant in store.variants))


def _splits(samples: Iterable[StoredSample]) -> dict[str, dict[str, int]]:
    members: dict[str, list[StoredSample]] = defaultdict(list)
    for sample in samples:
        members[sample.split].append(sample)
    names = [*SPLITS, *(name for name in members if name not in SPLITS)]
    return {
        name: {
            "num_samples": len(members[name]),
            "num_groups": len({sample.group for sample in members[name]}),
        }
        for name in names
    }


def groups_in_several_splits(samples: Iterable[StoredSample | AnnotationRow]) -> list[str]:
    """Return the groups that are in more than one split, sorted."""
    splits: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group:
            splits[sample.group].add(sample.split)
    return sorted(group for group, found in splits.items() if len(found) > 1)


def _level(store: FeatureStore, name: str) -> dict[str, Any]:
    spec, fingerprint = store.levels[name], store.fingerprint(name)
    receipts = _receipts_of(store, spec.item)
    return {
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "precision": spec.precision,
        "num_rows": sum(len(receipt.rows) for receipt in receipts),
        "num_files": sum(len(receipt.shards) for receipt in receipts),
        "size_bytes": _shard_bytes(receipts),
        "digest": fingerprint.digest,
        "fingerprint": dict(fingerprint.fields),
    }


def _label_set(store: FeatureStore, name: str) -> dict[str, Any]:
    spec = store.label_sets[name]
    holder = store
    if store.overlay is not None and name in store.overlay.label_sets:
        holder = store.overlay
    receipts = _receipts_of(holder, spec.item)
    return {
        "classes": list(spec.classes),
        "task": spec.task,
        "num_masks": sum(store.has_mask(sample.row, name) for sample in store.samples),
        "height_px": spec.height_px,
        "width_px": spec.width_px,
        "num_files": sum(len(receipt.shards) for receipt in receipts),
        "size_bytes": _shard_bytes(receipts),
        "in_overlay": holder is not store,
    }


def _receipts_of(store: FeatureStore, item: str) -> list[Receipt]:
    return [receipt for (name, _), receipt in store.receipts.items() if name == item]


def _shard_bytes(receipts: Iterable[Receipt]) -> int:
    return sum(shard.size_bytes for receipt in receipts for shard in receipt.shards)


def _other_bytes(store: FeatureStore) -> int:
    """Return the bytes of seal, tables and metadata; an unsealed store lacks some of them."""
    names = ["zarr.json", SEAL_FILE, SEAL_COPY, SAMPLES_FILE, ANNOTATIONS_FILE]
    names += [f"{grid.folder}/zarr.json" for s in store.levels.values() for grid in s.grids]
    names += [f"labels/{name}/{LABEL_ROWS_FILE}" for name in store.label_sets]
    size_bytes = 0
    for name in names:
        with suppress(FileNotFoundError):
            size_bytes += (store.path / name).stat().st_size
    return size_bytes
