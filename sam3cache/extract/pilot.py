"""A short run of the real workers on a few of the images, to learn how fast they are.

Everything is as it will be: the same processes, devices and batches, decoding and writing to the
same disk. What is written goes into a folder of its own, of which nothing stays.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from sam3cache import runtime
from sam3cache.errors import ImageError
from sam3cache.extract.config import WorkerStatus
from sam3cache.extract.pool import run_pool
from sam3cache.extract.rows import Wanted
from sam3cache.extract.worker import BlockTask, WorkerSetup
from sam3cache.features import BLOCK_ROWS, LabelRow, LevelSpec, SampleRow, read_receipts
from sam3cache.geometry import ResizeMode
from sam3cache.images import letterbox_image, read_image

BUDGET_S = 15.0
"""Once workers are at work, the run ends after this time at the next report."""

MIN_STEADY_S = 2.0
_NUM_BLOCKS = 6
_STEADY_BLOCKS = 2
_CPU_BLOCK_ROWS = 8
_NUM_DECODED = 8
_DISK_BYTES, _DISK_LIMIT_S = 64 * 2**20, 1.0


@dataclass(frozen=True, slots=True)
class Pilot:
    """What a short run has measured.

    Attributes:
        start_s: until the workers are at work.
        images_per_s: of all workers together, decoding and writing included.
        tower_images_per_s: of the towers alone, all together.
        decode_images_per_s: of one thread, resizing included.
        write_bytes_per_s: what the disk takes, flushed.
        num_images: that went through the tower.
        batch_size: images a forward pass; the smallest, where memory was too small for more.
        bytes_an_image: by level, what one took on disk, where a block of it was written.
    """

    start_s: float
    images_per_s: float
    tower_images_per_s: float
    decode_images_per_s: float
    write_bytes_per_s: float
    num_images: int
    batch_size: int
    bytes_an_image: Mapping[str, float]


class _EnoughError(Exception):
    """The run has lasted long enough."""


@dataclass
class _Watch:
    """Notes when which worker had done how much, and ends the run when that will do."""

    num_workers: int
    begun_s: float
    budget_s: float
    first_s: float | None = None
    states: Mapping[int, WorkerStatus] = field(default_factory=dict)
    # By worker, what it had done at the end of each block.
    blocks: dict[int, list[WorkerStatus]] = field(default_factory=dict)

    def __call__(self, states: Mapping[int, WorkerStatus], num_images: int) -> None:
        now_s = time.monotonic()
        self.states = dict(states)
        if self.first_s is None:
            self.first_s = now_s
        for number, state in states.items():
            blocks = self.blocks.setdefault(number, [])
            if state.num_written > (blocks[-1].num_written if blocks else 0):
                blocks.append(state)
        is_steady = len(self.blocks) == self.num_workers and all(
            len(blocks) > _STEADY_BLOCKS
            and blocks[-1].elapsed_s - blocks[0].elapsed_s >= MIN_STEADY_S
            for blocks in self.blocks.values()
        )
        if is_steady or now_s - self.first_s >= self.budget_s:
            raise _EnoughError


def run_pilot(
    folder: Path,
    setups: Sequence[WorkerSetup],
    wanted: Sequence[Wanted],
    num_images: int,
    report: Callable[[int, int], None],
    *,
    budget_s: float = BUDGET_S,
) -> Pilot:
    """Run the workers on some images, no more than there are to extract.

    Args:
        folder: on the disk that will be written to; it exists.
        setups: a worker each; their store is not touched.
        wanted: images to take, over and over if they are fewer than are to be extracted.
        num_images: that are to be extracted.
        report: called with images done and to do.
        budget_s: how long to measure at most, once workers are at work.

    Raises:
        Sam3CacheError: what a worker found wrong.
        OSError: when the folder cannot be written to.
    """
    disk = runtime.measure_disk(folder, size_bytes=_DISK_BYTES, limit_s=_DISK_LIMIT_S)
    decode_s = _decode_s(wanted[:_NUM_DECODED], setups[0].resize_mode)
    is_on_cuda = all(setup.device.startswith("cuda") for setup in setups)
    block_rows = BLOCK_ROWS if is_on_cuda else _CPU_BLOCK_ROWS
    # As many as an extraction starts.
    setups = setups[: max(1, -(-num_images // BLOCK_ROWS))]
    num_blocks = _NUM_BLOCKS * len(setups)
    num_images = min(num_images, num_blocks * block_rows)
    # Of few images, smaller blocks: their ends are what is measured.
    block_rows = min(block_rows, max(setups[0].batch_size, -(-num_images // num_blocks)))
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".sam3cache-plan-", ignore_cleanup_errors=True
    ) as name:
        root = Path(name)
        setups = [replace(setup, root=root) for setup in setups]
        tasks = _tasks(setups[0], wanted, num_images, block_rows)
        watch = _Watch(len(setups), time.monotonic(), budget_s)

        def watched(states: Mapping[int, WorkerStatus], num_done: int) -> None:
            report(num_done, num_images)
            watch(states, num_done)

        with suppress(_EnoughError):
            run_pool(setups, tasks, watched)
        levels = [spec for spec, _ in setups[0].levels.values()]
        bytes_an_image = _bytes_an_image(root, levels)
    to_write = sum(bytes_an_image.get(spec.name, spec.sample_bytes) for spec in levels)
    return _evaluate(watch, decode_s, disk.write, to_write / disk.write, bytes_an_image)


def _decode_s(wanted: Sequence[Wanted], resize_mode: ResizeMode) -> float:
    """Return what decoding and resizing an image takes one thread."""
    num_decoded = 0
    begun_s = time.monotonic()
    for item in wanted:
        try:
            letterbox_image(read_image(item.sample), resize_mode)
        except ImageError:
            continue
        num_decoded += 1
    return max(time.monotonic() - begun_s, 1e-6) / max(1, num_decoded)


def _tasks(
    setup: WorkerSetup, wanted: Sequence[Wanted], num_images: int, block_rows: int
) -> list[BlockTask]:
    items = {"samples", *(spec.item for spec, _ in setup.levels.values())}
    if setup.label_set is not None:
        items.add(setup.label_set.item)
    tasks = []
    for block, first in enumerate(range(0, num_images, block_rows)):
        places = range(first, min(first + block_rows, num_images))
        chosen = {
            block * BLOCK_ROWS + i: wanted[place % len(wanted)] for i, place in enumerate(places)
        }
        rows = tuple(
            SampleRow(row, f"{row}", item.sample.source, item.sample.frame)
            for row, item in chosen.items()
        )
        samples = {row: item.sample for row, item in chosen.items()}
        masks = {row: item.mask or LabelRow(row) for row, item in chosen.items()}
        tasks.append(BlockTask(block, frozenset(items), rows, samples, masks))
    return tasks


def _bytes_an_image(root: Path, levels: Sequence[LevelSpec]) -> dict[str, float]:
    sizes: dict[str, list[tuple[int, int]]] = {}
    for (item, _), receipt in read_receipts(root).items():
        shard_bytes = sum(shard.size_bytes for shard in receipt.shards)
        sizes.setdefault(item, []).append((shard_bytes, len(receipt.rows)))
    return {
        spec.name: sum(size for size, _ in found) / max(1, sum(rows for _, rows in found))
        for spec in levels
        if (found := sizes.get(spec.item))
    }


def _evaluate(
    watch: _Watch,
    decode_s: float,
    write_rate: float,
    write_s: float,
    bytes_an_image: Mapping[str, float],
) -> Pilot:
    at_work = {number: state for number, state in watch.states.items() if state.num_images}
    rates = [
        _rates(watch.blocks[number], state, decode_s + write_s) for number, state in at_work.items()
    ] or [(1 / (decode_s + write_s), 0.0)]
    # One that is still at its first image is taken to be as fast as the others.
    images_per_s, tower_rate = (
        sum(each) * watch.num_workers / len(rates) for each in zip(*rates, strict=True)
    )
    first_s = watch.begun_s if watch.first_s is None else watch.first_s
    first = next(iter(at_work.values()), None)
    first_image_s = 0.0 if first is None else first.tower_s / first.num_images
    return Pilot(
        start_s=max(0.0, first_s - watch.begun_s - first_image_s),
        images_per_s=images_per_s,
        tower_images_per_s=tower_rate,
        decode_images_per_s=1 / decode_s,
        write_bytes_per_s=write_rate,
        num_images=sum(state.num_images for state in at_work.values()),
        batch_size=min(state.batch_size for state in watch.states.values()),
        bytes_an_image=bytes_an_image,
    )


def _rates(
    ends: Sequence[WorkerStatus], state: WorkerStatus, besides_s: float
) -> tuple[float, float]:
    """Return images a second of a worker, and of its tower alone: 0 without one.

    Both are of the same time, from the end of its first block to that of its last: a first batch
    takes longer than any other.

    Args:
        ends: what it reported at the end of each block.
        state: what it reported last.
        besides_s: what an image takes beside the tower.
    """
    if len(ends) > 1 and ends[-1].elapsed_s > ends[0].elapsed_s:
        begun, ended = ends[0], ends[-1]
        rate = (ended.num_written - begun.num_written) / (ended.elapsed_s - begun.elapsed_s)
        tower_s = ended.tower_s - begun.tower_s
        num_images = ended.num_images - begun.num_images
    else:
        # Too slow for two blocks: an image takes its share of the tower, and of the disk.
        tower_s, num_images = state.tower_s, state.num_images
        rate = num_images / (tower_s + num_images * besides_s)
    if not state.tower_s:
        return rate, 0.0
    # What was written in that time may have left the tower before: it is no slower than all.
    return rate, max(rate, num_images / tower_s if tower_s else 0.0)
