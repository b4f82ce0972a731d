"""Hashes of what a store says of its samples: which labels and annotations somebody used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sam3cache.features.files import sha256_of_json, sha256_of_list
from sam3cache.features.store import FeatureStore, StoredSample

ANNOTATIONS: dict[str, Callable[[StoredSample], Any]] = {
    "splits": lambda sample: sample.split,
    "groups": lambda sample: sample.group,
    # As text, in which a NaN equals another.
    "angles": lambda sample: [str(sample.primary_angle_deg), str(sample.secondary_angle_deg)],
}
"""By name, what is hashed of each sample."""


@dataclass(frozen=True)
class DataRecord:
    """Which samples, labels and annotations were used, as hashes (SHA-256, hexadecimal).

    Attributes:
        seal: of the store; empty if it was not sealed.
        overlay_seal: of the overlay; empty without one.
        samples_sha256: of the samples' rows, ids and pixels.
        labels_sha256: of a label set's masks: their rows, sizes and checksums.
        annotations_sha256: by "splits", "groups" and "angles".
    """

    seal: str
    overlay_seal: str
    samples_sha256: str
    labels_sha256: str
    annotations_sha256: dict[str, str]


def record_data(store: FeatureStore, label_set: str) -> DataRecord:
    """Hash what a store says of its samples; nothing large is read.

    Args:
        store: opened, with its overlay if it has one.
        label_set: the labels that are used.

    Raises:
        MissingSampleError: when the store has no such label set.
    """
    return DataRecord(
        seal=store.seal,
        overlay_seal="" if store.overlay is None else store.overlay.seal,
        samples_sha256=sha256_of_list([s.row, s.id, s.pixel_sha256] for s in store.samples),
        labels_sha256=_labels_sha256(store, label_set),
        annotations_sha256={
            name: sha256_of_list([s.row, value(s)] for s in store.samples)
            for name, value in ANNOTATIONS.items()
        },
    )


def _labels_sha256(store: FeatureStore, label_set: str) -> str:
    """Hash a label set by its masks alone: where they came from, and when, does not count."""
    usable = {sample.row for sample in store.samples}
    spec = store.label_sets[label_set]
    lines = [
        [line.row, line.height_px, line.width_px]
        for line in store.label_rows(label_set).values()
        if line.present and line.row in usable
    ]
    shards = sorted(
        [shard.key.removeprefix(spec.grid.folder), shard.size_bytes, shard.crc32c]
        for (item, _), receipt in store.holder_of(label_set).receipts.items()
        if item == spec.item
        for shard in receipt.shards
    )
    # Left out where it is the rule, as in hashes of before there were tasks.
    task = [] if spec.task == "multilabel" else [spec.task]
    return sha256_of_json([list(spec.classes), lines, shards, *task])
