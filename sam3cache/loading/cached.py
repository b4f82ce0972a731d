"""Samples of a store, held as near to the device as memory allows, and handed out in batches.

Shape legend: N samples, B batch, H height, W width, K mask planes, T side of the target grid, R
words of a record.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import MissingSampleError
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.geometry import Letterbox, ResizeMode
from sam3cache.loading.buffers import BatchBuffers, pin
from sam3cache.loading.records import WORD_BYTES, LevelRecord, Record, TargetRecord
from sam3cache.loading.residency import Placement, Residency, choose_residency, room_on_gpu
from sam3cache.loading.shared import SharedSegment, shared_folder
from sam3cache.records import Batch
from sam3cache.runtime import device_memory, installed_version, num_cpu_cores

NUM_READERS = min(8, max(4, num_cpu_cores()))
"""Threads that read the store, without the interpreter's lock: disks like several to wait."""

READ_AHEAD_BYTES = 128_000_000
"""What a stream reads before it is asked for: whole batches, of which at least one."""

MAX_READ_AHEAD = 8
"""And how many batches of small samples."""

_RESIZE_MODE_FIELD = "preprocessing.resize_mode"

_Sink = Callable[[int, Callable[[NDArray[np.int64]], None]], None]
"""Takes a sample's index, and what reads its record into given memory."""


class CachedSamples:
    """Samples of a store in batches, with their angles and, for training, their targets.

    The order of batches depends on the seed and the epoch alone: not on the device, nor on where
    the samples lie. In RAM they lie once for all processes of one user that hold the same rows of
    the same sealed store; where that cannot be, each has its own.

    Args:
        store: an open store.
        rows: rows of the samples, in the order of indices.
        levels: levels to hand out, as heads call them.
        device: where batches are made.
        residency: "device", "ram" (on the CPU the two are one), "stream" to read batches from the
            store ahead of their use, or "auto" for the first of these that fits.
        target_size_px: T, side of the targets; None for batches without targets. With targets,
            samples without a mask are left out.
        label_set: label set of the targets.
        report: called with (samples loaded, samples in all) while they are loaded.
        share_in: folder of the memory that processes share; None for the system's.

    Attributes:
        rows: rows handed out, in index order.
        samples: their records, in index order.
        num_without_mask: rows left out for want of a mask.
        residency: what was chosen: "device", "ram" or "stream".
        placement: the same with its reason, in words.
        resident_bytes: memory that the samples take there, shared memory included.
        loaded_bytes: what of it this process has loaded; other processes did the rest.
        load_s: time that loading took, in seconds.

    Raises:
        ConfigError: samples do not fit where they are told to lie.
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
        share_in: Path | None = None,
    ) -> None:
        started_s = time.monotonic()
        self._store = store
        self._level_names = tuple(levels)
        self._device = torch.device(device)
        if str(self._device) == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._label_set = label_set
        self._resize_mode = _resize_mode(store, self._level_names)
        self._report = report or _tell_nobody
        by_row = {sample.row: sample for sample in (*store.samples, *store.variants)}
        if unknown := [row for row in rows if row not in by_row]:
            raise MissingSampleError(
                f"{store.path} has no usable sample in row {unknown[0]}; take rows from its samples"
            )
        kept = [r for r in rows if target_size_px is None or store.has_mask(r, label_set)]
        self.rows = tuple(kept)
        self.samples: tuple[StoredSample, ...] = tuple(by_row[row] for row in kept)
        self.num_without_mask = len(rows) - len(kept)
        has_masks = label_set in store.label_sets
        store.fetch(self.rows, self._level_names, label_set if has_masks else None)
        del by_row
        # Filled in one by one: lists of all samples would take more than the samples.
        self._angles_N2 = torch.empty(len(self), 2)
        self._content_N2 = torch.empty(len(self), 2, dtype=torch.int64)
        angles_N2, content_N2 = self._angles_N2.numpy(), self._content_N2.numpy()
        for index, sample in enumerate(self.samples):
            angles_N2[index] = sample.primary_angle_deg, sample.secondary_angle_deg
            box = self.letterbox(index)
            content_N2[index] = box.content_height_px, box.content_width_px
        served = store.served_levels
        self._records: list[Record] = [
            LevelRecord(store, name, served[name]) for name in self._level_names
        ]
        if target_size_px is not None:
            num_planes = store.label_sets[label_set].num_planes
            self._records.append(
                TargetRecord(store, label_set, num_planes, target_size_px, self._resize_mode)
            )
        self._buffers = {record.name: BatchBuffers(MAX_READ_AHEAD) for record in self._records}
        self._held: dict[str, Tensor] = {}
        self._segments: dict[str, SharedSegment] = {}
        self._pins: list[object] = []
        self.loaded_bytes = 0
        placement = self._place(residency, share_in)
        # Who was told mostly holds these samples: in a circle, their memory would outlive both.
        self._report = _tell_nobody
        self.residency, self.placement = placement.residency, str(placement)
        self.resident_bytes = sum(held_NR.nbytes for held_NR in self._held.values())
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
        """Return the samples of some indices, in that order, on the device.

        Raises:
            CorruptStoreError: bytes in the store are damaged.
        """
        with ThreadPoolExecutor(NUM_READERS, "sam3cache-loading") as readers:
            return self._finish(indices, *self._begin(indices, readers, self._records))

    def iterate(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        indices: Sequence[int] | None = None,
        start: int = 0,
        piece_size: int | None = None,
        levels: Sequence[str] | None = None,
        with_target: bool = True,
    ) -> Generator[Batch]:
        """Go through all samples once; the last batch may be smaller.

        Args:
            batch_size: B.
            seed: of the order.
            epoch: which pass this is; each has an order of its own.
            shuffle: whether to go in random order rather than in that of the indices.
            indices: of the samples to go through; None for all. Others are left out of the order.
            start: how many of them to pass over, at the beginning of the order.
            piece_size: hand each batch out in pieces of so many samples at most; None for whole
                batches.
            levels: what is wanted of a sample, of the levels that are there; None for all.
            with_target: whether targets are wanted, where there are any.

        Raises:
            CorruptStoreError: bytes in the store are damaged.
        """
        order = epoch_order(len(self), seed, epoch, shuffle=shuffle, indices=indices)[start:]
        chunks = split_batches(order, batch_size, piece_size)
        records = self._wanted(levels, with_target=with_target)
        chunk_bytes = max(1, min(batch_size, piece_size or batch_size) * _record_bytes(records))
        num_ahead = 0
        if self.residency == "stream":
            num_ahead = min(MAX_READ_AHEAD, max(1, READ_AHEAD_BYTES // chunk_bytes))
        with ThreadPoolExecutor(NUM_READERS, "sam3cache-loading") as readers:
            waiting: deque[tuple[Sequence[int], dict[str, Tensor], list[Future[None]]]] = deque()
            try:
                for chunk in chunks:
                    waiting.append((chunk, *self._begin(chunk, readers, records)))
                    if len(waiting) > num_ahead:
                        yield self._finish(*waiting.popleft())
                while waiting:
                    yield self._finish(*waiting.popleft())
            finally:
                readers.shutdown(wait=True, cancel_futures=True)

    def _wanted(self, levels: Sequence[str] | None, *, with_target: bool) -> list[Record]:
        """Return the records that hold some levels and, if wanted, the target."""
        names = {*(self._level_names if levels is None else levels)}
        names |= {"target"} if with_target else set()
        return [record for record in self._records if record.name in names]

    def _begin(
        self, indices: Sequence[int], readers: ThreadPoolExecutor, records: Sequence[Record]
    ) -> tuple[dict[str, Tensor], list[Future[None]]]:
        """Take a batch's records from where they lie; from the store, by threads.

        Returns:
            The records (B, R) by name, and what has to be waited for before they are whole.
        """
        if self.residency != "stream":
            held = {record.name: self._held[record.name] for record in records}
            return {name: self._gather(held_NR, indices) for name, held_NR in held.items()}, []
        parts = {
            record.name: self._buffers[record.name].take(
                len(indices), record.num_words, pinned=self._device.type == "cuda"
            )
            for record in records
        }

        def read(positions: range) -> None:
            for position in positions:
                for record in records:
                    words_R = parts[record.name][position].numpy()
                    record.read_into(self.samples[indices[position]], words_R)

        shares = (range(i, len(indices), NUM_READERS) for i in range(NUM_READERS))
        return parts, [readers.submit(read, share) for share in shares if share]

    def _gather(self, held_NR: Tensor, indices: Sequence[int]) -> Tensor:
        """Copy a batch's records out of those held."""
        if held_NR.device == self._device:
            at_B = torch.tensor(indices, dtype=torch.int64, device=self._device)
            return held_NR[at_B]
        # The GPU fetches each record by itself; at once if the memory is pinned.
        out_BR = held_NR.new_empty((len(indices), held_NR.shape[1]), device=self._device)
        for out_R, index in zip(out_BR, indices, strict=True):
            out_R.copy_(held_NR[index], non_blocking=True)
        return out_BR

    def _finish(
        self, indices: Sequence[int], parts: dict[str, Tensor], reads: Sequence[Future[None]]
    ) -> Batch:
        """Wait until a batch's records are there, and make a batch of them on the device."""
        for read in reads:
            read.result()
        on_device = {
            name: part_BR.to(self._device, non_blocking=True) for name, part_BR in parts.items()
        }
        # A reader may hold on to its task for a moment more, which must not keep this memory.
        parts.clear()
        values = {
            record.name: record.values(on_device[record.name])
            for record in self._records
            if record.name in on_device
        }
        return Batch(
            levels={level: values[level] for level in self._level_names if level in values},
            angles_B2=self._angles_N2[indices].to(self._device),
            content_B2=self._content_N2[indices].to(self._device),
            target_BKTT=values.get("target"),
            rows=tuple(self.rows[index] for index in indices),
        )

    def _place(self, residency: Residency, share_in: Path | None) -> Placement:
        """Choose where the samples go, and bring them there."""
        num_bytes, free_bytes = len(self) * self._sample_bytes, self._free_bytes()
        if "device" in free_bytes and residency in ("auto", "device"):
            nearest: dict[Residency, int] = {"device": free_bytes["device"]}
            placement = choose_residency(residency, num_bytes, nearest)
            if placement.residency == "device":
                self._load_on_device()
                return placement
        private = self._join(share_in) if residency != "stream" else ""
        try:
            # What others hold in RAM takes no more of it.
            shared_bytes = sum(s.size_bytes for s in self._segments.values() if s.is_expected)
            placement = choose_residency(residency, num_bytes, free_bytes, shared_bytes)
            if placement.residency == "ram" and self._segments:
                self._load_shared()
        except OSError as error:
            private = f"private ({error.strerror or error})"
            self._leave()
            placement = choose_residency(residency, num_bytes, self._free_bytes())
        except BaseException:
            self._leave()
            raise
        if placement.residency != "ram":
            self._leave()
            return placement
        if not self._segments:
            self._load_private()
        whose = "shared with other processes" if self._segments else private
        if self._segments and not self.loaded_bytes:
            whose += ", which had loaded it"
        if self._pins and all(self._pins):
            whose += ", pinned"
        return Placement("ram", f"{whose}; {placement.reason}")

    def _join(self, share_in: Path | None) -> str:
        """Become a user of the memory that processes share; say why where that cannot be."""
        keys = {record.name: self._key(record) for record in self._records}
        if not all(keys.values()):
            return "private (the store is not sealed)"
        if not len(self):
            return "private"
        try:
            folder = share_in or shared_folder()
            for record in self._records:
                size_bytes = len(self) * record.num_words * WORD_BYTES
                segment = SharedSegment(folder, keys[record.name], size_bytes)
                self._segments[record.name] = segment
        except OSError as error:
            self._leave()
            return f"private ({error.strerror or error})"
        return ""

    def _key(self, record: Record) -> str:
        """Return a hash of all that a record's values depend on; empty if it is not fixed."""
        if not all(record.identity.values()):
            return ""
        content = {
            **record.identity,
            "rows": self.rows,
            "version": installed_version("sam3cache"),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def _leave(self) -> None:
        for segment in self._segments.values():
            segment.leave()
        self._segments.clear()
        self._held.clear()
        self._pins.clear()

    def _load_on_device(self) -> None:
        """Bring all samples into the device's memory."""
        sinks: dict[str, _Sink] = {}
        for record in self._records:
            shape = (len(self), record.num_words)
            held_NR = torch.empty(shape, dtype=torch.int64, device=self._device)

            def put(index: int, words_R: NDArray[np.int64], held_NR: Tensor = held_NR) -> None:
                held_NR[index] = torch.from_numpy(words_R)

            self._held[record.name] = held_NR
            sinks[record.name] = _through_scratch(record.num_words, put)
        self._load(sinks)

    def _load_private(self) -> None:
        """Bring all samples into memory of this process's own."""
        sinks: dict[str, _Sink] = {}
        for record in self._records:
            # Not torch.empty: numpy asks the system for large pages, which are faster to fill.
            array_NR = np.empty((len(self), record.num_words), dtype=np.int64)

            def read_into(
                index: int,
                read: Callable[[NDArray[np.int64]], None],
                array_NR: NDArray[np.int64] = array_NR,
            ) -> None:
                read(array_NR[index])

            sinks[record.name] = read_into
            self._hold(record.name, array_NR)
        self._load(sinks)

    def _load_shared(self) -> None:
        """Bring what no other process has loaded into shared memory, and map all of it.

        Raises:
            OSError: when there is no room for it, or it cannot be mapped.
        """

        def waiting(share: float) -> None:
            self._report(int(share * len(self)), len(self))

        # In one order for all, so that no two wait for each other.
        in_order = sorted(self._records, key=self._key)
        to_load = [r for r in in_order if self._segments[r.name].begin_loading(waiting)]
        sinks: dict[str, _Sink] = {}
        for record in to_load:
            segment, record_bytes = self._segments[record.name], record.num_words * WORD_BYTES

            def put(
                index: int,
                words_R: NDArray[np.int64],
                segment: SharedSegment = segment,
                record_bytes: int = record_bytes,
            ) -> None:
                segment.write(index * record_bytes, words_R)

            sinks[record.name] = _through_scratch(record.num_words, put)
        self._load(sinks)
        for record in to_load:
            self._segments[record.name].finish_loading()
        # Pinning needs a mapping that could be written to; nobody writes.
        writable = self._device.type == "cuda"
        for record in self._records:
            words = self._segments[record.name].map(writable=writable)
            self._hold(record.name, words.reshape(len(self), record.num_words))

    def _hold(self, name: str, array_NR: NDArray[np.int64]) -> None:
        with warnings.catch_warnings():
            # Of a mapping for reading alone: this tensor is never written to.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._held[name] = torch.from_numpy(array_NR)
        if self._device.type == "cuda":
            self._pins.append(pin(self._held[name]))

    def _load(self, sinks: Mapping[str, _Sink]) -> None:
        """Read every sample, several at a time, into the sinks of its records."""
        records = [record for record in self._records if record.name in sinks]
        if not records:
            self._report(len(self), len(self))
            return

        def load(index: int) -> None:
            for record in records:
                sinks[record.name](index, partial(record.read_into, self.samples[index]))

        with ThreadPoolExecutor(NUM_READERS, "sam3cache-loading") as readers:
            try:
                futures = [readers.submit(load, index) for index in range(len(self))]
                for num_done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    self._report(num_done, len(self))
            finally:
                readers.shutdown(wait=True, cancel_futures=True)
        self.loaded_bytes += len(self) * WORD_BYTES * sum(record.num_words for record in records)

    def _free_bytes(self) -> dict[Residency, int]:
        """Return the free memory of every place, the nearest first; of a GPU what is spare."""
        free: dict[Residency, int] = {}
        if self._device.type != "cpu":
            free["device"] = room_on_gpu(device_memory(str(self._device)))
        free["ram"] = device_memory("cpu").free_bytes
        return free

    @property
    def _sample_bytes(self) -> int:
        """What one sample takes in memory, its target included."""
        return _record_bytes(self._records)


def epoch_order(
    num_samples: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool,
    indices: Sequence[int] | None = None,
) -> list[int]:
    """Return the order in which a pass goes through samples.

    Args:
        num_samples: how many there are.
        seed: of a random order.
        epoch: which pass this is.
        shuffle: whether the order is random rather than that of the indices.
        indices: the samples to go through; None for all. What is left out does not change the
            order of the rest.
    """
    order = list(range(num_samples))
    if shuffle:
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(mixed >> 1)
        order = torch.randperm(num_samples, generator=generator).tolist()
    if indices is not None:
        wanted = set(indices)
        order = [index for index in order if index in wanted]
    return order


def split_batches(
    order: Sequence[int], batch_size: int, piece_size: int | None = None
) -> list[Sequence[int]]:
    """Split an order into batches, and each of these into pieces."""
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    piece = piece_size or batch_size
    return [batch[at : at + piece] for batch in batches for at in range(0, len(batch), piece)]


def _tell_nobody(num_done: int, num_total: int) -> None:
    """Take a report of how far something is."""


def _record_bytes(records: Sequence[Record]) -> int:
    return WORD_BYTES * sum(record.num_words for record in records)


def _resize_mode(store: FeatureStore, levels: Sequence[str]) -> ResizeMode:
    """Return how pictures were laid on the square, as the levels' fingerprints say."""
    found: ResizeMode = "letterbox"
    for level in reversed(levels):
        mode = store.fingerprint(level).fields.get(_RESIZE_MODE_FIELD)
        if mode in get_args(ResizeMode):
            found = mode  # type: ignore[assignment]
    return found


def _through_scratch(num_words: int, put: Callable[[int, NDArray[np.int64]], None]) -> _Sink:
    """Return a sink that reads records into a thread's own memory, and puts them where they go."""
    scratch = threading.local()

    def sink(index: int, read: Callable[[NDArray[np.int64]], None]) -> None:
        if not hasattr(scratch, "words_R"):
            scratch.words_R = np.zeros(num_words, dtype=np.int64)
        read(scratch.words_R)
        put(index, scratch.words_R)

    return sink
