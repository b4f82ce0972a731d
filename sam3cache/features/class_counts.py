"""How often each class of a label set is there: what to weigh, and what cannot be learned.

Shape legend: M planes, H height, W width of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import MissingSampleError
from sam3cache.features.levels import LabelSetSpec
from sam3cache.features.store import FeatureStore
from sam3cache.records import IGNORE_LABEL, SPLITS

_NUM_THREADS = 8


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How often a class is there, by split ("train", "val", "test").

    Attributes:
        name: of the class.
        num_samples: samples with a pixel of it.
        num_pixels: pixels of it, on the masks' own grids.
        num_counted: pixels that are of it or are not; all but those that are to be ignored.
    """

    name: str
    num_samples: Mapping[str, int]
    num_pixels: Mapping[str, int]
    num_counted: Mapping[str, int]


def count_classes(
    store: FeatureStore,
    label_set: str,
    report: Callable[[int, int], None] = lambda num_done, num_total: None,
    *,
    only: Container[int] | None = None,
) -> tuple[ClassCount, ...]:
    """Read the masks of a label set, and count.

    Args:
        store: opened, with its overlay if it has one.
        label_set: which masks.
        report: called with masks done and masks in all.
        only: rows to count; None: all.

    Raises:
        MissingSampleError: when the store has no such label set.
        CorruptStoreError: when the bytes on disk are not those that were written.
    """
    samples = [
        sample
        for sample in store.samples
        if store.has_mask(sample.row, label_set) and (only is None or sample.row in only)
    ]
    spec = store.label_sets[label_set]
    splits = list(dict.fromkeys([*SPLITS, *(sample.split for sample in samples)]))
    # Of each class: samples, pixels, and pixels that count.
    totals = {split: np.zeros((3, len(spec.classes)), np.int64) for split in splits}

    def counts_of(row: int) -> NDArray[np.int64]:
        mask_MHW = store.read_mask(row, label_set)
        assert mask_MHW is not None
        return _count(mask_MHW, spec)

    with ThreadPoolExecutor(_NUM_THREADS, "sam3cache-counts") as pool:
        rows = [sample.row for sample in samples]
        for i, counts in enumerate(pool.map(counts_of, rows)):
            totals[samples[i].split] += counts
            report(i + 1, len(samples))
    return tuple(
        ClassCount(
            name, *({split: int(totals[split][what, k]) for split in splits} for what in range(3))
        )
        for k, name in enumerate(spec.classes)
    )


def classes_of_samples(store: FeatureStore, label_set: str) -> dict[int, tuple[str, ...]]:
    """Read the masks of a label set, and return by row the classes that each shows.

    Args:
        store: opened, with its overlay if it has one.
        label_set: which masks; a sample without one shows none.

    Raises:
        MissingSampleError: when the store has no such label set.
        CorruptStoreError: when the bytes on disk are not those that were written.
    """
    rows = [sample.row for sample in store.samples]
    spec = store.label_sets.get(label_set)
    if spec is None:
        raise MissingSampleError(
            f"{store.path} has no label set {label_set}; it has "
            f"{', '.join(store.label_sets) or 'none'}"
        )

    def classes_of(row: int) -> tuple[str, ...]:
        mask_MHW = store.read_mask(row, label_set) if store.has_mask(row, label_set) else None
        if mask_MHW is None:
            return ()
        is_there = _count(mask_MHW, spec)[0]
        return tuple(name for name, there in zip(spec.classes, is_there, strict=True) if there)

    with ThreadPoolExecutor(_NUM_THREADS, "sam3cache-classes") as pool:
        return dict(zip(rows, pool.map(classes_of, rows), strict=True))


def _count(mask_MHW: NDArray[np.uint8], spec: LabelSetSpec) -> NDArray[np.int64]:
    """Return, of each class, 1 or 0 for the sample, its pixels, and those that count."""
    numbers = [np.bincount(plane_HW.reshape(-1), minlength=256) for plane_HW in mask_MHW]
    num_counted = [
        plane_HW.size - number[IGNORE_LABEL]
        for plane_HW, number in zip(mask_MHW, numbers, strict=True)
    ]
    if spec.task == "multiclass":
        num_pixels = numbers[0][1 : len(spec.classes) + 1]
        num_counted *= len(spec.classes)
    else:
        num_pixels = np.array([number[1] for number in numbers])
    return np.stack([num_pixels > 0, num_pixels, np.array(num_counted)]).astype(np.int64)
