"""One extraction worker: a process with a device, that turns blocks into committed features.

It is sent blocks over a pipe, and holds at most two: while one is in the tower, the next is being
decoded. It ends when it is told to, or when its parent is gone.

Shape legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache import runtime
from sam3cache.errors import ConfigError, FingerprintError, ImageError, Sam3CacheError
from sam3cache.extract.config import IMAGE_LEVEL, WorkerStatus
from sam3cache.features import (
    BlockClaims,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
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

    from sam3cache.backbone import Tower

NUM_BLOCKS_HELD = 2
_NUM_DECODE_THREADS = 4


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
        numeric_path: "fp32" or "bf16".
        batch_size: images a forward pass.
        resize_mode: "letterbox" or "squash".
        levels: every level of the store, with its fingerprint.
        label_set: the label set to write, or None.
    """

    root: Path
    name: str
    device: str
    num_threads: int
    backbone: str
    weights: str | None
    weights_sha256: str
    numeric_path: Literal["fp32", "bf16"]
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
        rows: its pending and finished rows, in order.
        samples: by row.
        masks: by row, the file that each mask comes from.
    """

    block: int
    items: frozenset[str]
    rows: tuple[SampleRow, ...]
    samples: Mapping[int, Sample]
    masks: Mapping[int, LabelRow]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """Sent when a worker lets go of a block.

    Attributes:
        block: its number.
        outcome: "written"; "held" by another process; or "found" finished by one.
        status: of the worker.
    """

    block: int
    outcome: Literal["written", "held", "found"]
    status: WorkerStatus


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A sample ready for the tower: (C, 1008, 1008) uint8, and its mask on the mask's own grid."""

    row: SampleRow
    pixels_CHW: NDArray[np.uint8] | None
    mask_KHW: NDArray[np.uint8] | None


def _require_same_pixels(row: SampleRow, digest: str) -> None:
    """Refuse a picture that is not the one whose other levels are stored already."""
    if row.status == "ok" and digest != row.pixel_sha256:
        raise ImageError(
            f"{row.source} has other pixels than those whose features are stored, though its size "
            "and time of change are the same; save it again, and extract again"
        )


def run_worker(setup: WorkerSetup, pipe: Connection) -> None:
    """Serve blocks until None comes; the entry point of the spawned process.

    Sends a :class:`WorkerStatus` after every batch, a :class:`BlockReport` for every block, and an
    exception when the run must stop.
    """
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    _spare_semaphore()
    try:
        _Worker(setup, pipe).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # The parent is gone, or wants no more: there is nobody left to tell.
    except (Sam3CacheError, OSError) as error:
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(error)


def _spare_semaphore() -> None:
    """Give numcodecs a lock of this process alone, in place of its named semaphore.

    A worker that is ended or killed could not give the semaphore back, which Python tells the user
    of in two lines at the end of the program.
    """
    from numcodecs import blosc

    blosc._MUTEX, blosc._MUTEX_IS_INIT = threading.Lock(), True


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "workers are spawned"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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


class _Worker:
    def __init__(self, setup: WorkerSetup, pipe: Connection) -> None:
        self._setup = setup
        self._pipe = pipe
        self._claims = BlockClaims(setup.root)
        self._tower: Tower | None = None
        self._num_images = 0
        self._tower_s = 0.0
        self._start_s = time.monotonic()

    def serve(self) -> None:
        from sam3cache.backbone import ignore_warnings_of_sam3

        runtime.set_num_threads(self._setup.num_threads)
        # Decoding threads set aside warnings, and put them back, while the tower is loaded.
        ignore_warnings_of_sam3()
        held: deque[tuple[BlockTask, list[Future[_Decoded]]]] = deque()
        more = True
        with ThreadPoolExecutor(_NUM_DECODE_THREADS) as pool:
            while more or held:
                while more and len(held) < NUM_BLOCKS_HELD and (not held or self._pipe.poll()):
                    task: BlockTask | None = self._pipe.recv()
                    if task is None:
                        more = False
                    else:
                        held.append((task, self._decode_ahead(pool, task)))
                if held:
                    task, futures = held.popleft()
                    outcome = self._do_block(task, futures)
                    self._pipe.send(BlockReport(task.block, outcome, self._status()))

    def _decode_ahead(self, pool: ThreadPoolExecutor, task: BlockTask) -> list[Future[_Decoded]]:
        with_mask = any(item.startswith("labels.") for item in task.items)
        with_pixels = any(not item.startswith("labels.") for item in task.items)
        return [
            pool.submit(self._decode, row, task.samples[row.row], with_pixels, with_mask)
            for row in task.rows
        ]

    def _decode(
        self, row: SampleRow, sample: Sample, with_pixels: bool, with_mask: bool
    ) -> _Decoded:
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

    def _do_block(
        self, task: BlockTask, futures: list[Future[_Decoded]]
    ) -> Literal["written", "held", "found"]:
        root = self._setup.root
        with self._claims.claim(task.block) as ours:
            if not ours:
                return "held"
            missing = self._missing(task)
            if not missing:
                return "found"
            if _is_as_planned(task):
                # Another worker may have died on the block with some of it done.
                task = replace(task, items=task.items & missing)
            decoded = [future.result() for future in futures]
            good = [item for item in decoded if item.row.status == "ok"]
            self._write_levels(task, good)
            label_set = self._setup.label_set
            if label_set is not None and label_set.item in task.items:
                masks = {item.row.row: item.mask_KHW for item in good}
                write_label_block(root, label_set, task.block, masks, task.masks)
            # Last: the facts say "ok" of rows whose features are already there.
            write_sample_facts(root, task.block, [item.row for item in decoded])
        return "written"

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

    def _write_levels(self, task: BlockTask, good: Sequence[_Decoded]) -> None:
        wanted = {
            name: (spec, fingerprint)
            for name, (spec, fingerprint) in self._setup.levels.items()
            if spec.item in task.items
        }
        values: dict[str, dict[int, NDArray[Any]]] = {name: {} for name in wanted}
        of_tower = [name for name in wanted if name != IMAGE_LEVEL]
        if IMAGE_LEVEL in wanted:
            shape = wanted[IMAGE_LEVEL][0].shape
            for item in good:
                assert item.pixels_CHW is not None
                values[IMAGE_LEVEL][item.row.row] = np.broadcast_to(item.pixels_CHW, shape)
        for start in range(0, len(good) if of_tower else 0, self._setup.batch_size):
            batch = good[start : start + self._setup.batch_size]
            features = self._features(batch)
            for name in of_tower:
                features_BCHW = features[wanted[name][0].base].numpy()
                for item, features_CHW in zip(batch, features_BCHW, strict=True):
                    values[name][item.row.row] = features_CHW
            self._num_images += len(batch)
            self._pipe.send(self._status())
        if not of_tower:
            self._num_images += len(good)
        for name, (spec, fingerprint) in wanted.items():
            write_level_block(self._setup.root, spec, fingerprint.digest, task.block, values[name])

    def _features(self, batch: Sequence[_Decoded]) -> dict[str, Tensor]:
        """Return, on the CPU and by what a level is of, float16 or float32 (B, C, H, W)."""
        import torch

        if self._tower is None:
            self._tower = self._load_tower()
            self._start_s = time.monotonic()
        arrays = [item.pixels_CHW for item in batch if item.pixels_CHW is not None]
        num_channels = max(array.shape[0] for array in arrays)
        image_BCHW = np.stack([np.broadcast_to(a, (num_channels, *a.shape[1:])) for a in arrays])
        start_s = time.monotonic()
        try:
            features = self._tower(torch.from_numpy(image_BCHW))
            # Whoever keeps a level in bf16 needs more than float16's range; the others do not.
            wide = {s.base for s, _ in self._setup.levels.values() if s.precision == "bf16"}
            held = {
                base: feature_BCHW.to(torch.float32 if base in wide else torch.float16).cpu()
                for base, feature_BCHW in features.items()
            }
        except torch.OutOfMemoryError:
            size = self._setup.batch_size
            advice = f"pass --batch-size {size // 2}" if size > 1 else "use a larger device, or cpu"
            raise ConfigError(
                f"{self._setup.name} has not enough memory for batches of {size}: {advice}"
            ) from None
        self._tower_s += time.monotonic() - start_s
        return held

    def _load_tower(self) -> Tower:
        from sam3cache.backbone import load_tower

        setup = self._setup
        tower = load_tower(
            setup.backbone,
            weights=setup.weights,
            levels=sorted({s.base for s, _ in setup.levels.values()} - {IMAGE_LEVEL}),
            device=setup.device,
            numeric_path=setup.numeric_path,
        )
        if tower.weights_sha256 != setup.weights_sha256:
            raise FingerprintError(
                f"the weights changed while extraction was starting: {setup.weights_sha256} → "
                f"{tower.weights_sha256}; run the command again"
            )
        return tower

    def _status(self) -> WorkerStatus:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        return WorkerStatus(
            self._setup.name,
            self._num_images,
            runtime.used_memory_bytes(self._setup.device),
            min(1.0, self._tower_s / elapsed_s),
            self._tower_s,
        )
