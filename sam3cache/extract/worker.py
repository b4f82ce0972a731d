"""One extraction worker: a process with a device, that turns blocks into committed features.

It is sent blocks over a pipe, and holds at most three. While one is in the tower, the pictures of
the next are decoded by threads of their own, and the one before it is encoded, checksummed and
written by another. It ends when it is told to, or when its parent is gone.

What it holds is bounded: the pictures of three blocks, the features of two, and of the one that is
being written what they are stored as, where that differs, and a shard.

Shape legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.process import parent_process
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache import runtime
from sam3cache.errors import FingerprintError, ImageError, Sam3CacheError, StoreBusyError
from sam3cache.extract.config import IMAGE_LEVEL, WorkerStatus
from sam3cache.features import (
    BlockClaims,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    Place,
    SampleRow,
    missing_items,
    read_receipts_of_block,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.images import letterbox_image, pixel_hash, read_image, read_mask
from sam3cache.records import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from sam3cache.backbone import NumericPath
    from sam3cache.extract.device import TowerRunner

NUM_BLOCKS_HELD = 3
"""Blocks that a worker has at once: one being decoded, one in the tower, one being written."""

_NUM_BLOCKS_UNWRITTEN = 2
_MIN_DECODE_THREADS, _MAX_DECODE_THREADS = 4, 16
# How soon a failure to write is noticed by a worker that waits for its next block.
_POLL_S = 0.1

# Ctrl-C, Windows' Ctrl-Break, and what a batch system sends before it kills: they reach all
# processes at once, and the parent decides what they mean.
_SIGNALS_FOR_THE_PARENT = ("SIGINT", "SIGBREAK", "SIGTERM", "SIGUSR1")


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know before its first block; travels to the spawned process.

    Attributes:
        root: the store's folder.
        name: for the screen, as "cuda:0" or "cpu #1".
        device: torch device name.
        num_threads: CPU threads that the tower may use.
        backbone: as in the configuration.
        weights: as in the configuration.
        weights_sha256: what the weights must turn out to be.
        numeric_path: "fp32", "bf16" or "bf16+compile".
        batch_size: images a forward pass.
        resize_mode: "letterbox" or "squash".
        levels: every level of the store, with its fingerprint.
        label_set: the label set to write, or None.
    """

    root: Place
    name: str
    device: str
    num_threads: int
    backbone: str
    weights: str | None
    weights_sha256: str
    numeric_path: NumericPath
    batch_size: int
    resize_mode: Literal["letterbox", "squash"]
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]]
    label_set: LabelSetSpec | None


@dataclass(frozen=True)
class BlockTask:
    """A block to be done, or what is missing of it.

    Attributes:
        block: its number.
        items: names, as in receipts, of what is to be written.
        rows: its pending and finished rows, in order; of a trial, some of them.
        samples: by row.
        masks: by row, the file that each mask comes from.
        aside: by row, why it is set aside without a look at its picture.
        is_trial: whether all is to be done but writing, to learn whether a row kills its worker.
    """

    block: int
    items: frozenset[str]
    rows: tuple[SampleRow, ...]
    samples: Mapping[int, Sample]
    masks: Mapping[int, LabelRow]
    aside: Mapping[int, str] = field(default_factory=dict)
    is_trial: bool = False


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """Sent once a worker has its tower, before it looks at the first picture."""


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Sent when a worker lets go of a block.

    Attributes:
        block: its number.
        outcome: "written"; "held" by another process; "found" finished by one; or "tried".
        status: of the worker.
    """

    block: int
    outcome: Literal["written", "held", "found", "tried"]
    status: WorkerStatus


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A sample ready for the tower: (C, 1008, 1008) uint8, and its mask on the mask's own grid."""

    row: SampleRow
    pixels_CHW: NDArray[np.uint8] | None
    mask_KHW: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class _Computed:
    """A block that is ready to be written, once its features have arrived.

    Attributes:
        task: what is to be written.
        decoded: its samples.
        values: by level and row, what is to be stored.
        await_values: waits until they are there.
    """

    task: BlockTask
    decoded: Sequence[_Decoded]
    values: Mapping[str, Mapping[int, NDArray[Any]]]
    await_values: Callable[[], None]


def _require_same_pixels(row: SampleRow, digest: str) -> None:
    """Refuse a picture that is not the one whose other levels are stored already."""
    if row.status == "ok" and digest != row.pixel_sha256:
        raise ImageError(
            f"{row.source} has other pixels than those whose features are stored, though its size "
            "and time of change are the same; save it again, and extract again"
        )


def run_worker(setup: WorkerSetup, pipe: Connection) -> None:
    """Serve blocks until None comes; the entry point of the spawned process.

    Sends a :class:`WorkerReady` before its first picture, a :class:`WorkerStatus` after every
    batch, a :class:`BlockReport` for every block, and an exception when the run must stop.
    """
    begin_process()
    _spare_semaphore()
    try:
        _Worker(setup, pipe).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # The parent is gone, or wants no more: there is nobody left to tell.
    except (Sam3CacheError, OSError) as error:
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(error)


def spawn(
    target: Callable[[WorkerSetup, Connection], None], setup: WorkerSetup
) -> tuple[SpawnProcess, Connection]:
    """Start a process, which ends with this one, and return it with the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(setup, theirs), daemon=True)
    with _signals_held_back():
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keep a process that is started meanwhile from signals until :func:`begin_process`.

    It inherits that they are held back, and so says nothing of a Ctrl-C while it imports. Those
    that come here meanwhile come a moment later. On Windows nothing is inherited.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _for_the_parent())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _for_the_parent() -> set[signal.Signals]:
    names = _SIGNALS_FOR_THE_PARENT
    return {getattr(signal, name) for name in names if hasattr(signal, name)}


def begin_process() -> None:
    """Leave signals to the parent, and end when it does; for a process that has been spawned."""
    for number in _for_the_parent():
        signal.signal(number, signal.SIG_IGN)
    # As warnings of the first process look, whatever the libraries here make of logging.
    log, handler = logging.getLogger("sam3cache"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    if hasattr(signal, "pthread_sigmask"):
        # What it starts itself ignores them from the beginning.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _for_the_parent())
    parent = parent_process()
    assert parent is not None, "workers are spawned"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _spare_semaphore() -> None:
    """Give numcodecs a lock of this process alone, in place of its named semaphore.

    A worker that is ended or killed could not give the semaphore back, which Python tells the user
    of in two lines at the end of the program.
    """
    from numcodecs import blosc

    blosc._MUTEX, blosc._MUTEX_IS_INIT = threading.Lock(), True


def load_runner(setup: WorkerSetup) -> TowerRunner:
    """Return the tower that a setup asks for, on its device, in what puts batches through it.

    Raises:
        ConfigError: when it cannot be built.
        WeightsError: when the weights are absent or not the backbone's.
        FingerprintError: when they are others than they were.
    """
    import torch

    from sam3cache.backbone import load_tower
    from sam3cache.extract.device import make_runner

    specs = [spec for spec, _ in setup.levels.values() if spec.base != IMAGE_LEVEL]
    # Whoever keeps a level in bf16 needs more than float16's range; the others do not.
    wide = {spec.base for spec in specs if spec.precision == "bf16"}
    bases = sorted({spec.base for spec in specs})
    tower = load_tower(
        setup.backbone,
        weights=setup.weights,
        levels=bases,
        device=setup.device,
        numeric_path=setup.numeric_path,
    )
    if tower.weights_sha256 != setup.weights_sha256:
        raise FingerprintError(
            f"the weights changed while extraction was starting: {setup.weights_sha256} → "
            f"{tower.weights_sha256}; run the command again"
        )
    dtypes = {base: torch.float32 if base in wide else torch.float16 for base in bases}
    return make_runner(tower, setup.name, dtypes, setup.batch_size, setup.device)


def _is_as_planned(task: BlockTask) -> bool:
    """Return whether no picture has been replaced since the block was planned."""
    for row in task.rows:
        try:
            stat = task.samples[row.row].image_path.stat()
        except OSError:
            return False
        if (stat.st_size, stat.st_mtime_ns) != (row.size_bytes, row.mtime_ns):
            return False
    return True


class _Inbox:
    """Takes what the parent sends as soon as it comes: Windows' pipes make a sender wait for that.

    Args:
        pipe: whose other end the parent has.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._come: SimpleQueue[BlockTask | BaseException | None] = SimpleQueue()
        self._next: list[BlockTask | BaseException | None] = []
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while not self._is_stopped.is_set():
                if self._pipe.poll(_POLL_S):
                    task = self._pipe.recv()
                    self._come.put(task)
                    if task is None:
                        return
        except (EOFError, OSError) as error:
            self._come.put(error)

    def stop(self) -> None:
        """Leave the pipe alone."""
        self._is_stopped.set()
        self._thread.join()

    def poll(self, timeout_s: float) -> bool:
        """Return whether something has come, after so long at the most."""
        if not self._next:
            with suppress(Empty):
                self._next.append(self._come.get(timeout_s > 0, timeout_s or None))
        return bool(self._next)

    def take(self) -> BlockTask | None:
        """Return what has come, None for the end; after :meth:`poll`.

        Raises:
            EOFError: when the parent is gone; or what else the system says of that.
        """
        found = self._next.pop()
        if isinstance(found, BaseException):
            raise found
        return found


@dataclass(slots=True)
class _Wait:
    """Time spent waiting for one thing."""

    total_s: float = 0.0


class _Worker:
    def __init__(self, setup: WorkerSetup, pipe: Connection) -> None:
        self._setup = setup
        self._pipe = pipe
        self._inbox = _Inbox(pipe)
        self._sending = threading.Lock()
        self._claims = BlockClaims(setup.root)
        self._of_tower = [
            (name, spec) for name, (spec, _) in setup.levels.items() if name != IMAGE_LEVEL
        ]
        self._held: deque[tuple[BlockTask, list[Future[_Decoded]]]] = deque()
        self._writes: deque[Future[None]] = deque()
        # As many as the worker has cores: JPEG 2000 takes longer than the tower on a fast device.
        num_decoders = min(max(setup.num_threads, _MIN_DECODE_THREADS), _MAX_DECODE_THREADS)
        self._decoders = ThreadPoolExecutor(num_decoders, "decode")
        self._writer = ThreadPoolExecutor(1, "write")
        self._runner: TowerRunner | None = None
        # Features of a block lie in one while those of the block before are written from the other.
        self._buffers: deque[dict[str, Tensor]] = deque()
        self._num_pictures = self._num_written = 0
        self._for_images, self._for_writes = _Wait(), _Wait()
        self._start_s = time.monotonic()

    def serve(self) -> None:
        from sam3cache.backbone import ignore_warnings_of_sam3

        runtime.set_num_threads(self._setup.num_threads)
        # Decoding threads set aside warnings, and put them back, while the tower is loaded.
        ignore_warnings_of_sam3()
        more, is_ready = True, False
        try:
            while more or self._held:
                more = more and self._take_tasks(is_ready)
                is_ready = True
                if self._held:
                    self._do_block(*self._held.popleft())
            self._await_writes(0)
        finally:
            self._inbox.stop()
            self._decoders.shutdown(cancel_futures=True)
            # A block that is computed is written, whatever has happened to the others.
            self._writer.shutdown()

    def _take_tasks(self, is_ready: bool) -> bool:
        """Take the tasks that have come, waiting for one only if there is none in hand.

        Returns:
            Whether more may come.
        """
        while len(self._held) < NUM_BLOCKS_HELD:
            while not self._inbox.poll(0 if self._held else _POLL_S):
                if self._held:
                    return True
                self._await_writes(NUM_BLOCKS_HELD)
            task = self._inbox.take()
            if task is None:
                return False
            if not is_ready:
                # Whatever ends it until here is no picture's fault.
                if self._wants_tower(task):
                    self._tower()
                self._send(WorkerReady())
                is_ready = True
                self._start_s = time.monotonic()
            self._held.append((task, self._decode_ahead(task)))
        return True

    def _wants_tower(self, task: BlockTask) -> bool:
        is_wanted = any(spec.item in task.items for _, spec in self._of_tower)
        return is_wanted and len(task.aside) < len(task.rows)

    def _tower(self) -> TowerRunner:
        if self._runner is None:
            self._runner = load_runner(self._setup)
            self._buffers.extend(self._runner.make_buffers() for _ in range(_NUM_BLOCKS_UNWRITTEN))
        return self._runner

    def _decode_ahead(self, task: BlockTask) -> list[Future[_Decoded]]:
        with_mask = any(item.startswith("labels.") for item in task.items)
        with_pixels = any(not item.startswith("labels.") for item in task.items)
        return [
            self._decoders.submit(self._decode, task, row, with_pixels, with_mask)
            for row in task.rows
        ]

    def _decode(
        self, task: BlockTask, row: SampleRow, with_pixels: bool, with_mask: bool
    ) -> _Decoded:
        if row.row in task.aside:
            return _Decoded(replace(row, status="aside", reason=task.aside[row.row]), None, None)
        sample = task.samples[row.row]
        try:
            pixels_CHW = None
            if with_pixels:
                pixels_HWC = read_image(sample)
                digest = pixel_hash(pixels_HWC)
                _require_same_pixels(row, digest)
                row = replace(
                    row,
                    height_px=pixels_HWC.shape[0],
                    width_px=pixels_HWC.shape[1],
                    num_channels=pixels_HWC.shape[2],
                    pixel_sha256=digest,
                    status="ok",
                )
                pixels_CHW = letterbox_image(pixels_HWC, self._setup.resize_mode)[0].numpy()
            mask_KHW = read_mask(sample) if with_mask else None
            return _Decoded(row, pixels_CHW, mask_KHW)
        except ImageError as error:
            return _Decoded(replace(row, status="aside", reason=str(error)), None, None)

    def _do_block(self, task: BlockTask, futures: Sequence[Future[_Decoded]]) -> None:
        # One of the two buffers is free then.
        self._await_writes(_NUM_BLOCKS_UNWRITTEN - 1)
        with ExitStack() as claim:
            if task.is_trial:
                self._compute(task, self._await_images(futures)).await_values()
                self._report(task, "tried")
                return
            if not claim.enter_context(self._claims.claim(task.block)):
                self._leave(task, futures, "held")
                return
            # Another worker may have died on the block with some of it done.
            missing, is_as_planned = self._missing(task), _is_as_planned(task)
            items = task.items & missing if is_as_planned else task.items
            if not (items and missing):
                self._leave(task, futures, "found")
                return
            task = replace(task, items=items)
            computed = self._compute(task, self._await_images(futures))
            if not self._held and self._runner is not None:
                # Nothing is kept waiting by it, and what is reported next counts them all.
                self._runner.drain()
            self._writes.append(self._writer.submit(self._write, computed, claim.pop_all()))

    def _leave(
        self,
        task: BlockTask,
        futures: Sequence[Future[_Decoded]],
        outcome: Literal["held", "found"],
    ) -> None:
        for future in futures:
            future.cancel()
        self._report(task, outcome)

    def _missing(self, task: BlockTask) -> frozenset[str]:
        """Return what the block still lacks: others may have been at it meanwhile."""
        setup = self._setup
        items = ["samples", *(spec.item for spec, _ in setup.levels.values())]
        if setup.label_set is not None:
            items.append(setup.label_set.item)
        label_sources = {} if setup.label_set is None else {setup.label_set.name: task.masks}
        receipts = read_receipts_of_block(setup.root, task.block, items)
        missing = missing_items(
            task.rows, receipts, setup.root, levels=setup.levels, label_sources=label_sources
        )
        return missing.get(task.block, frozenset())

    def _await_images(self, futures: Sequence[Future[_Decoded]]) -> list[_Decoded]:
        with self._waiting(self._for_images, all(future.done() for future in futures)):
            return [future.result() for future in futures]

    def _await_writes(self, num_left: int) -> None:
        """Wait until at most so many blocks are still to be written.

        Raises:
            Sam3CacheError: what was wrong with one that was written meanwhile.
            OSError: likewise, such as a full disk.
        """
        num_waited = len(self._writes) - num_left
        ready = all(future.done() for future in list(self._writes)[: max(0, num_waited)])
        with self._waiting(self._for_writes, ready):
            while self._writes and (len(self._writes) > num_left or self._writes[0].done()):
                self._writes.popleft().result()

    @contextmanager
    def _waiting(self, wait: _Wait, is_ready: bool) -> Iterator[None]:
        """Count the time of the ``with``, as far as nothing is left for the tower to do."""
        if not is_ready and self._runner is not None:
            self._runner.drain()
        begun_s = time.monotonic()
        yield
        wait.total_s += time.monotonic() - begun_s

    def _compute(self, task: BlockTask, decoded: Sequence[_Decoded]) -> _Computed:
        good = [item for item in decoded if item.row.status == "ok"]
        values: dict[str, dict[int, NDArray[Any]]] = {}
        for name, (spec, _) in self._setup.levels.items():
            if spec.item in task.items:
                values[name] = {}
        if IMAGE_LEVEL in values:
            shape = self._setup.levels[IMAGE_LEVEL][0].shape
            for item in good:
                assert item.pixels_CHW is not None
                values[IMAGE_LEVEL][item.row.row] = np.broadcast_to(item.pixels_CHW, shape)
        if not good or not self._wants_tower(task):
            self._num_pictures += len(good)
            return _Computed(task, decoded, values, lambda: None)
        runner = self._tower()
        self._buffers.rotate()
        wanted = [(name, spec.base) for name, spec in self._of_tower if name in values]
        buffers = {base: self._buffers[0][base] for _, base in wanted}
        start = 0
        while start < len(good):
            batch = good[start : start + runner.batch_size]
            pictures = [item.pixels_CHW for item in batch if item.pixels_CHW is not None]
            out = {base: buffer[start : start + len(batch)] for base, buffer in buffers.items()}
            if runner.put_through(pictures, out):
                start += len(batch)
                self._send(self._status())
        for name, base in wanted:
            features_BCHW = buffers[base].numpy()
            values[name] = {item.row.row: features_BCHW[i] for i, item in enumerate(good)}
        return _Computed(task, decoded, values, runner.arrival())

    def _write(self, computed: _Computed, claim: ExitStack) -> None:
        """Write a block, let go of it, and report it; in the writer's thread."""
        task = computed.task
        good = [item for item in computed.decoded if item.row.status == "ok"]
        try:
            with claim:
                self._write_items(computed, good)
        except StoreBusyError:
            # The claim ended while a server was away, and another process has the block now.
            self._report(task, "held")
            return
        self._num_written += len(good)
        self._report(task, "written")

    def _write_items(self, computed: _Computed, good: Sequence[_Decoded]) -> None:
        setup, task = self._setup, computed.task
        computed.await_values()
        for name, (spec, fingerprint) in setup.levels.items():
            if spec.item in task.items:
                values = computed.values[name]
                write_level_block(setup.root, spec, fingerprint.digest, task.block, values)
        if setup.label_set is not None and setup.label_set.item in task.items:
            masks = {item.row.row: item.mask_KHW for item in good}
            write_label_block(setup.root, setup.label_set, task.block, masks, task.masks)
        # Last: the facts say "ok" of rows whose features are already there.
        write_sample_facts(setup.root, task.block, [item.row for item in computed.decoded])

    def _report(
        self, task: BlockTask, outcome: Literal["written", "held", "found", "tried"]
    ) -> None:
        self._send(BlockReport(task.block, outcome, self._status()))

    def _send(self, message: WorkerReady | WorkerStatus | BlockReport) -> None:
        with self._sending:
            self._pipe.send(message)

    def _status(self) -> WorkerStatus:
        runner = self._runner
        return WorkerStatus(
            name=self._setup.name,
            num_images=self._num_pictures + (0 if runner is None else runner.num_images),
            num_written=self._num_written,
            memory_bytes=runtime.used_memory_bytes(self._setup.device),
            batch_size=self._setup.batch_size if runner is None else runner.batch_size,
            elapsed_s=time.monotonic() - self._start_s,
            images_s=self._for_images.total_s,
            tower_s=0.0 if runner is None else runner.tower_s,
            writing_s=self._for_writes.total_s,
        )
