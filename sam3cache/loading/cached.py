"""Samples of a store, held as near to the device as memory allows, and handed out in batches.

Shape legend: N samples, B batch, C channels, H height, W width, K mask planes, T side of the
target grid.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sam3cache.errors import ConfigError, MissingSampleError
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.geometry import Letterbox, ResizeMode
from sam3cache.records import IGNORE_LABEL, Batch
from sam3cache.runtime import device_memory

Residency = Literal["auto", "device", "ram", "stream"]
"""Where samples lie: the device's memory, main memory, or the store on disk."""

USABLE_SHARE = 0.7
"""Share of the free memory that samples may take; the rest is for the head and everybody else."""

NUM_READERS = 4
"""Threads that read the store: reading waits on the disk and checksums, without Python's lock."""

_RESIZE_MODE_FIELD = "preprocessing.resize_mode"


class CachedSamples:
    """Samples of a store in batches, with their angles and, for training, their targets.

    The order of batches depends on the seed and the epoch alone: not on the device, nor on where
    the samples lie.

    Args:
        store: an open store.
        rows: rows of the samples, in the order of indices.
        levels: levels to hand out.
        device: where batches are made.
        residency: "device", "ram" (on the CPU the two are one), "stream" to read batches from the
            store ahead of their use, or "auto" for the first of these that fits.
        target_size_px: T, side of the targets; None for batches without targets. With targets,
            samples without a mask are left out.
        label_set: label set of the targets.
        report: called with (samples loaded, samples in all) while they are loaded.

    Attributes:
        rows: rows handed out, in index order.
        samples: their records, in index order.
        num_without_mask: rows left out for want of a mask.
        residency: what was chosen.
        resident_bytes: memory that the samples take there.
        load_s: time that loading took, in seconds.

    Raises:
        ConfigError: samples do not fit where they are told to lie, or the label set holds class
            numbers instead of binary planes.
        MissingSampleError: the store lacks a level, row or label set.
        CorruptStoreError: bytes in the store are damaged.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: Sequence[int],
        levels: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        residency: Residency = "auto",
        target_size_px: int | None = None,
        label_set: str = "mask",
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        started_s = time.monotonic()
        self._store = store
        self._level_names = tuple(levels)
        self._device = torch.device(device)
        self._target_size_px = target_size_px
        self._label_set = label_set
        by_row = {sample.row: sample for sample in store.samples}
        if unknown := [row for row in rows if row not in by_row]:
            raise MissingSampleError(
                f"{store.path} has no usable sample in row {unknown[0]}; take rows from its samples"
            )
        kept = [r for r in rows if target_size_px is None or store.has_mask(r, label_set)]
        self.rows = tuple(kept)
        self.samples: tuple[StoredSample, ...] = tuple(by_row[row] for row in kept)
        self.num_without_mask = len(rows) - len(kept)
        self._angles_N2 = torch.tensor(
            [[s.primary_angle_deg, s.secondary_angle_deg] for s in self.samples]
        ).reshape(-1, 2)
        boxes = [self.letterbox(index) for index in range(len(self))]
        self._content_N2 = torch.tensor(
            [[box.content_height_px, box.content_width_px] for box in boxes], dtype=torch.int64
        ).reshape(-1, 2)
        self.residency: Residency = choose_residency(
            residency, len(self) * self._sample_bytes(), self._free_bytes()
        )
        self._place = self._device if self.residency == "device" else torch.device("cpu")
        self._levels: dict[str, Tensor] = {}
        self._target_NKTT: Tensor | None = None
        if self.residency != "stream":
            self._load(report or (lambda num_done, num_total: None))
        held = [*self._levels.values(), *([] if self._target_NKTT is None else [self._target_NKTT])]
        self.resident_bytes = sum(tensor.nbytes for tensor in held)
        self.load_s = time.monotonic() - started_s

    def __len__(self) -> int:
        return len(self.rows)

    def letterbox(self, index: int) -> Letterbox:
        """Return how a sample's picture lies on the padded square."""
        sample = self.samples[index]
        return Letterbox.fit(sample.height_px, sample.width_px, self._resize_mode)

    def mask(self, index: int) -> Tensor | None:
        """Return a sample's mask, uint8 (K, H, W) on its own grid; None when it has none."""
        mask_KHW = self._store.read_mask(self.rows[index], self._label_set)
        return None if mask_KHW is None else torch.from_numpy(mask_KHW)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples of some indices, in that order, on the device."""
        parts = self._gather(indices)
        target_BKTT = parts.pop("target", None)
        return Batch(
            levels={level: parts[level].to(self._device) for level in self._level_names},
            angles_B2=self._angles_N2[indices].to(self._device),
            content_B2=self._content_N2[indices].to(self._device),
            target_BKTT=None if target_BKTT is None else target_BKTT.to(self._device),
            rows=tuple(self.rows[index] for index in indices),
        )

    def iterate(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = False
    ) -> Iterator[Batch]:
        """Go through all samples once; the last batch may be smaller.

        Args:
            batch_size: B.
            seed: of the order.
            epoch: which pass this is; each has an order of its own.
            shuffle: whether to go in random order rather than in that of the indices.
        """
        order = list(range(len(self)))
        if shuffle:
            mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(mixed >> 1)
            order = torch.randperm(len(self), generator=generator).tolist()
        chunks = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        if self.residency != "stream" and self._place == self._device:
            yield from map(self.batch, chunks)
        else:
            yield from self._ahead(chunks)

    def _ahead(self, chunks: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Make batches in threads while the device works on those before."""
        with ThreadPoolExecutor(NUM_READERS, "sam3cache-loading") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(self.batch, chunk))
                    if len(waiting) > NUM_READERS:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _gather(self, indices: Sequence[int]) -> dict[str, Tensor]:
        if self.residency != "stream":
            at = torch.tensor(indices, dtype=torch.int64, device=self._place)
            parts = {level: held[at] for level, held in self._levels.items()}
            return parts if self._target_NKTT is None else parts | {"target": self._target_NKTT[at]}
        parts = {level: self._empty(level, len(indices)) for level in self._level_names}
        for position, index in enumerate(indices):
            for level, part in parts.items():
                self._store.read_into(level, self.rows[index], part[position].numpy())
        if self._target_size_px is not None:
            parts["target"] = torch.stack([self._target(index) for index in indices])
        return parts

    def _load(self, report: Callable[[int, int], None]) -> None:
        """Read every sample into memory, several at a time."""
        self._levels = {
            level: self._empty(level, len(self), self._place) for level in self._level_names
        }
        if self._target_size_px is not None:
            side_px = self._target_size_px
            num_planes = self._store.label_sets[self._label_set].num_planes
            shape = (len(self), num_planes, side_px, side_px)
            self._target_NKTT = torch.empty(shape, dtype=torch.uint8, device=self._place)

        def load(index: int) -> None:
            for level, held in self._levels.items():
                if held.device.type == "cpu":
                    self._store.read_into(level, self.rows[index], held[index].numpy())
                else:
                    held[index] = torch.from_numpy(self._store.read(level, self.rows[index]))
            if self._target_NKTT is not None:
                self._target_NKTT[index] = self._target(index)

        with ThreadPoolExecutor(NUM_READERS, "sam3cache-loading") as pool:
            try:
                futures = [pool.submit(load, index) for index in range(len(self))]
                for num_done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    report(num_done, len(self))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _target(self, index: int) -> Tensor:
        """Return a sample's target, uint8 (K, T, T)."""
        mask_KHW = self.mask(index)
        assert mask_KHW is not None
        assert self._target_size_px is not None
        if ((mask_KHW > 1) & (mask_KHW != IGNORE_LABEL)).any():
            raise ConfigError(
                f"label set {self._label_set} holds class numbers (up to "
                f"{int(mask_KHW[mask_KHW != IGNORE_LABEL].max())}, sample "
                f"{self.samples[index].id}); heads learn planes of 0 and 1: store a plane a class"
            )
        return self.letterbox(index).mask_to_target(mask_KHW, self._target_size_px)

    def _empty(self, level: str, num_samples: int, place: torch.device | str = "cpu") -> Tensor:
        spec = self._store.levels[level]
        return torch.empty(
            (num_samples, *spec.shape), dtype=getattr(torch, spec.dtype), device=place
        )

    @property
    def _resize_mode(self) -> ResizeMode:
        for level in self._level_names:
            mode = self._store.fingerprint(level).fields.get(_RESIZE_MODE_FIELD)
            if mode in get_args(ResizeMode):
                return mode  # type: ignore[return-value]
        return "letterbox"

    def _free_bytes(self) -> dict[Residency, int]:
        """Return the free memory of every place, the nearest first."""
        free: dict[Residency, int] = {}
        if self._device.type != "cpu":
            free["device"] = device_memory(str(self._device)).free_bytes
        free["ram"] = device_memory("cpu").free_bytes
        return free

    def _sample_bytes(self) -> int:
        """Return what one sample takes in memory, its target included."""
        num_bytes = sum(self._store.levels[level].sample_bytes for level in self._level_names)
        if self._target_size_px is not None:
            num_planes = self._store.label_sets[self._label_set].num_planes
            num_bytes += num_planes * self._target_size_px**2
        return num_bytes


def choose_residency(
    wanted: Residency, num_bytes: int, free_bytes: Mapping[Residency, int]
) -> Residency:
    """Return where samples go.

    Args:
        wanted: a place, or "auto".
        num_bytes: what the samples take.
        free_bytes: free memory by place, the nearest place first; without "device" on the CPU,
            where "ram" is the device's memory.

    Raises:
        ConfigError: an unknown place, or one with too little memory.
    """
    if wanted not in get_args(Residency):
        raise ConfigError(
            f"residency {wanted!r} is unknown; take one of {', '.join(get_args(Residency))}"
        )
    if wanted == "stream":
        return wanted
    if wanted == "device" and "device" not in free_bytes:
        wanted = "ram"
    fits = [place for place, free in free_bytes.items() if num_bytes <= USABLE_SHARE * free]
    if wanted == "auto":
        return fits[0] if fits else "stream"
    if wanted not in fits:
        raise ConfigError(
            f"residency {wanted}: the samples take {num_bytes / 1e9:.1f} GB, more than "
            f"{USABLE_SHARE:.0%} of the {free_bytes[wanted] / 1e9:.1f} GB free; take auto or "
            "stream, or smaller targets"
        )
    return wanted
