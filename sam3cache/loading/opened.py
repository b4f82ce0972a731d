"""A store in Python, for people with a loop of their own: arrays, a dataset, batches.

Shape legend: N samples, C channels, H height, W width, K mask planes, T side of the target grid.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sam3cache.errors import ConfigError, MissingSampleError
from sam3cache.features import FeatureStore, Place, StoredSample, open_store
from sam3cache.features.precision import decode, value_dtype
from sam3cache.loading.cached import CachedSamples
from sam3cache.loading.residency import Residency
from sam3cache.records import SPLITS, Batch
from sam3cache.tasks import Task

Rows = SupportsIndex | slice | Sequence[int] | NDArray[np.integer[Any]]
"""What an array of a store may be asked for."""


def open(
    path: str | Place, *, overlay: str | Place | None = None, allow_unsealed: bool = False
) -> OpenedStore:
    """Open a feature store for reading. Nothing is written or locked.

    Args:
        path: the store's folder, or its URL as ``s3://bucket/angio.zarr``.
        overlay: folder of labels and annotations kept beside the store, which go before its own.
        allow_unsealed: read what an unfinished extraction has stored so far.

    Raises:
        NotAStoreError: when ``path`` holds no feature store.
        UnsealedStoreError: when extraction has not finished, unless ``allow_unsealed``.
        CorruptStoreError: when the metadata or tables are not what the store was sealed with.
        StoreError: when the format is newer than this reader, or the overlay of other pictures.
    """
    return OpenedStore(open_store(path, overlay=overlay, allow_unsealed=allow_unsealed))


class OpenedStore:
    """A feature store, as ``sam3cache.open`` returns it.

    Attributes:
        path: its folder or URL.
        features: the open store below it, for what is not here.
        samples: the samples that can be used, in row order.
        variants: changed views of training samples; their rows are in no split, and for training
            alone.
        levels: by name, as arrays that read when they are indexed by row.
        labels: by name of the label set, likewise.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.path = store.path
        self.features = store
        self.samples: tuple[StoredSample, ...] = store.samples
        self.variants: tuple[StoredSample, ...] = store.variants
        num_rows = 1 + max((row.row for row in store.sample_rows), default=-1)
        self.levels: Mapping[str, Level] = {
            name: Level(store, name, num_rows) for name in store.served_levels
        }
        self.labels: Mapping[str, Labels] = {name: Labels(store, name) for name in store.label_sets}

    def __repr__(self) -> str:
        variants = f" and {len(self.variants)} variants" if self.variants else ""
        return (
            f"<sam3cache store {self.path}: {len(self.samples)} samples{variants}; levels "
            f"{', '.join(self.levels)}; labels {', '.join(self.labels) or 'none'}>"
        )

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, split: str | None = None) -> list[int]:
        """Return the rows of the samples of a split; of all, unless one is named.

        Raises:
            ConfigError: when the split is unknown, or has no samples.
        """
        if split is not None and split not in SPLITS:
            raise ConfigError(f"split {split!r}: expected one of {', '.join(SPLITS)}, or None")
        found = [sample.row for sample in self.samples if split in (None, sample.split)]
        if not found:
            raise ConfigError(
                f"{self.path} has no samples{f' in split {split}' if split else ''}; take another "
                "split, or set splits by `sam3cache store annotations set`"
            )
        return found

    def dataset(
        self,
        levels: Sequence[str] | None = None,
        split: str | None = None,
        *,
        target_size_px: int | None = None,
        label_set: str | None = None,
    ) -> StoreDataset:
        """Return samples as a map-style dataset for ``torch.utils.data.DataLoader``.

        Its workers may be processes, started in any way: each opens the store for itself. Where one
        machine's memory is enough, :meth:`batches` is faster.

        Args:
            levels: what to read; None: every level by its plain name.
            split: "train", "val" or "test"; None: all samples.
            target_size_px: T, side of square targets over the padded input; None for none. With
                targets, samples without a mask are left out.
            label_set: of the targets; None: "mask".

        Raises:
            ConfigError: when the split is unknown, or has no samples, or a label set is named and
                no side of targets.
            MissingSampleError: when the store has no such level or label set.
        """
        labels = _label_set(label_set, target_size_px)
        return StoreDataset(
            self.features, self.rows(split), self._names(levels), target_size_px, labels
        )

    def batches(
        self,
        split: str | None = "train",
        *,
        batch_size: int = 16,
        levels: Sequence[str] | None = None,
        target_size_px: int | None = None,
        label_set: str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        residency: Residency = "auto",
    ) -> Batches:
        """Return samples in batches on a device; each time that it is iterated is another epoch.

        Samples are loaded once, to the device if they fit there, else into main memory, else each
        batch is read ahead of its use.

        Args:
            split: "train", "val" or "test"; None: all samples.
            batch_size: samples a batch; the last may be smaller.
            levels: what to read; None: every level by its plain name.
            target_size_px: T, side of square targets over the padded input; None for none. With
                targets, samples without a mask are left out.
            label_set: of the targets; None: "mask".
            shuffle: whether each epoch has a random order of its own.
            seed: of the orders.
            device: where batches are made.
            residency: where samples lie: "auto", "device", "ram" or "stream".

        Raises:
            ConfigError: when the split is unknown or has no samples, the batch size is below 1, a
                label set is named and no side of targets, or samples do not fit where they are told
                to lie.
            MissingSampleError: when the store has no such level or label set.
            CorruptStoreError: when bytes in the store are damaged.
        """
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: expected at least 1")
        cached = CachedSamples(
            self.features,
            self.rows(split),
            self._names(levels),
            device=device,
            residency=residency,
            target_size_px=target_size_px,
            label_set=_label_set(label_set, target_size_px),
        )
        return Batches(cached, batch_size, shuffle=shuffle, seed=seed)

    def _names(self, levels: Sequence[str] | None) -> tuple[str, ...]:
        if levels is None:
            # By the name of what they are of, so that none comes in two precisions.
            bases = [spec.base for spec in self.features.levels.values()]
            return tuple(dict.fromkeys(bases))
        for level in levels:
            self.features.fingerprint(level)  # Says so where there is none of this name.
        return tuple(levels)


class Level:
    """One level as an array, read and checked when it is indexed.

    ``level[row]`` is one sample, ``level[rows]`` and ``level[first:last]`` are several. Rows are
    the store's (``OpenedStore.rows``), and not every row is in use: asking for another raises
    ``MissingSampleError``, never returns a fill value.

    Attributes:
        name: of the level.
        shape: (rows, C, H, W).
        dtype: of what is read: float16 for features, float32 for bf16 ones, uint8 for pictures.
    """

    # Not by __getitem__, which would stop at the first row that is not in use.
    __iter__: None = None

    def __init__(self, store: FeatureStore, name: str, num_rows: int) -> None:
        spec = store.served_levels[name]
        self._store = store
        # What it is served by now, whatever is served later.
        self._spec = spec
        self.name = name
        self.shape: tuple[int, int, int, int] = (num_rows, *spec.shape)
        self.dtype: np.dtype[Any] = np.dtype(value_dtype(spec.precision))

    def __repr__(self) -> str:
        return f"<level {self.name} {self.shape} {self.dtype}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> NDArray[Any]:
        """Read samples.

        Args:
            rows: one row, a slice of them, or a list or array of them in any order.

        Returns:
            (C, H, W) for one row, else (N, C, H, W), of ``dtype``.

        Raises:
            MissingSampleError: when the store holds no sample in one of the rows.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        if isinstance(rows, SupportsIndex) and not isinstance(rows, np.ndarray):
            return self._read(operator.index(rows))
        wanted = _as_list(rows, len(self))
        out_NCHW = np.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        for out_CHW, row in zip(out_NCHW, wanted, strict=True):
            out_CHW[...] = self._read(row)
        return out_NCHW

    def _read(self, row: int) -> NDArray[Any]:
        return decode(self._spec.precision, self._store.read_stored(self._spec.name, row))


def _label_set(name: str | None, target_size_px: int | None) -> str:
    """Return the label set of targets, unless it is named and there are to be none."""
    if name is not None and target_size_px is None:
        raise ConfigError(
            f"label set {name!r} without targets: give their side, such as target_size_px=1008"
        )
    return name or "mask"


class Labels:
    """One label set, read and checked when it is indexed by row.

    Attributes:
        name: of the label set.
        classes: names by plane, or of the class numbers from 1 on.
        task: "multilabel", planes of 0 and 1; or "multiclass", one plane of class numbers.
    """

    __iter__: None = None

    def __init__(self, store: FeatureStore, name: str) -> None:
        self._store = store
        self.name = name
        self.classes = store.label_sets[name].classes
        self.task: Task = store.label_sets[name].task

    def __repr__(self) -> str:
        return f"<label set {self.name}: {', '.join(self.classes)}>"

    def __getitem__(self, row: SupportsIndex) -> NDArray[np.uint8] | None:
        """Return a sample's mask, (K, H, W) uint8 on its own grid, or None when it has none.

        Raises:
            MissingSampleError: when the store holds no sample in the row.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        return self._store.read_mask(operator.index(row), self.name)

    def __contains__(self, row: object) -> bool:
        """Return whether the sample of a row has a mask; an empty mask is one."""
        return isinstance(row, int) and self._store.has_mask(row, self.name)


class StoreDataset(Dataset[dict[str, Any]]):
    """Samples as dictionaries; ``OpenedStore.dataset`` makes one.

    Each has "levels" (name → (C, H, W)), "angles_deg" (float32 (2,): primary, secondary, NaN where
    unknown), "content_px" (int64 (2,): height and width of what is picture on the 1008 px square),
    "row", "id" and, if asked for, "target" (uint8 (K, T, T): 0, 1, 255 to be ignored).

    Attributes:
        samples: records of the samples, in index order.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: Sequence[int],
        levels: Sequence[str],
        target_size_px: int | None,
        label_set: str,
    ) -> None:
        self._where = (store.path, None if store.overlay is None else store.overlay.path)
        self._sealed = store.sealed
        self._seals = _seals(store)
        self._given = (tuple(rows), tuple(levels), target_size_px, label_set)
        self._digests = {name: store.fingerprint(name).digest for name in levels}
        self._process = os.getpid()
        self._cached: CachedSamples | None = self._read_from(store)
        self.samples = self._cached.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one sample.

        Raises:
            IndexError: when there is none of this index.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        index = range(len(self))[index]
        # A process that was forked from ours would move the places in our open files.
        if self._cached is None or self._process != os.getpid():
            self._process = os.getpid()
            self._cached = self._read_from(self._open_again())
        batch = self._cached.batch([index])
        item: dict[str, Any] = {
            "levels": {name: feature_BCHW[0] for name, feature_BCHW in batch.levels.items()},
            "angles_deg": batch.angles_B2[0],
            "content_px": batch.content_B2[0],
            "row": self.samples[index].row,
            "id": self.samples[index].id,
        }
        if batch.target_BKTT is not None:
            item["target"] = batch.target_BKTT[0]
        return item

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open store behind: a worker process opens its own."""
        return {**self.__dict__, "_cached": None}

    def _read_from(self, store: FeatureStore) -> CachedSamples:
        rows, levels, target_size_px, label_set = self._given
        return CachedSamples(
            store,
            rows,
            levels,
            residency="stream",
            target_size_px=target_size_px,
            label_set=label_set,
        )

    def _open_again(self) -> FeatureStore:
        path, overlay = self._where
        store = open_store(path, overlay=overlay, allow_unsealed=not self._sealed)
        if _seals(store) != self._seals:
            raise MissingSampleError(
                f"{path} has changed since this dataset was made of it; open it again and make a "
                "new dataset"
            )
        store.serve_digests(self._digests)
        return store


class Batches:
    """Samples in batches, an epoch each time that it is iterated; ``OpenedStore.batches`` makes it.

    Attributes:
        samples: records of the samples, in index order.
        cached: what holds them; says where they lie.
    """

    def __init__(self, cached: CachedSamples, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.cached = cached
        self.samples = cached.samples
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._next_epoch = 0

    def __len__(self) -> int:
        return -(-len(self.cached) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._next_epoch += 1
        return self.epoch(self._next_epoch - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Go through the samples in the order of one epoch, from 0: to repeat one, or to resume."""
        return self.cached.iterate(
            self._batch_size, seed=self._seed, epoch=number, shuffle=self._shuffle
        )


def _seals(store: FeatureStore) -> tuple[str, str]:
    return store.seal, "" if store.overlay is None else store.overlay.seal


def _as_list(rows: Any, num_rows: int) -> list[int]:
    if isinstance(rows, slice):
        return list(range(*rows.indices(num_rows)))
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise MissingSampleError(
            f"rows {rows!r}: expected a row, a slice, or a list of rows such as store.rows('train')"
        )
    return [int(row) for row in array]
