"""The extraction's pipeline against the tower alone, several workers against one, and its memory.

Pictures the size of an angiogram go through real workers: decoded, resized, put through the tower,
copied back, checksummed and written. Beside it, turn and turn about, the same tower runs on a
batch that lies on its device already, and keeps nothing. A rate counts from the first batch to the
last block on the disk, so that the last block's writing, which nothing hides, is in it. By levels:

- fpn_72 and image_1008, the default;
- trunk_72, four times as much to write;
- fpn_288, sixteen times as much.

Then, on a CPU, two workers of one thread each against one worker of one thread; on a GPU, two
workers on it against one. Last, stores of tiny pictures are extracted, without the tower, to see
the memory that the parent and a worker hold by the number of images.

With sam3-mini, whose tower takes a fifth of a second on two cores, decoding and writing compete
with it for the same cores. --full, which a GPU takes by itself, is SAM 3's own size with random
weights; on a CPU, where an image takes half a minute, it is FULL_BLOCKS blocks of
FULL_BLOCK_ROWS images each, at the default levels alone, in FULL_ROUNDS round.

Exits with 1 when a bound is missed (none is checked with --quick: too few images):

- two workers of one thread make MIN_SCALING times the images a second of one (median);
- with --full the pipeline reaches MIN_SHARE_CPU of the tower alone on a CPU at the default levels,
  on CUDA MIN_SHARE_CUDA of it, and MIN_SHARE_TRUNK with trunk_72;
- memory of the parent and of a worker grows by less than SLOPE_BYTES an image: while the largest
  of these stores is extracted, and from the smallest to it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from reporting import Bound, Machine, Report, measure_apart, significant

from sam3cache.backbone import load_tower
from sam3cache.extract import ExtractConfig, ExtractProgress, TimeShares, WorkerStatus, extract
from sam3cache.extract.batching import measure_batch_size
from sam3cache.extract.config import IMAGE_LEVEL, LABEL_SET
from sam3cache.extract.job import plan_job, read_request
from sam3cache.extract.pool import run_pool
from sam3cache.extract.state import StoreState
from sam3cache.features import BLOCK_ROWS, store_lock
from sam3cache.runtime import (
    num_cpu_cores,
    peak_memory_bytes,
    pick_device,
    set_num_threads,
    spare_memory,
    used_memory_bytes,
)

LEVELS = (("fpn_72", IMAGE_LEVEL), ("trunk_72", IMAGE_LEVEL), ("fpn_288", IMAGE_LEVEL))
ROUNDS, SCALING_ROUNDS = 3, 5
MIN_SCALING = 1.65
MIN_SHARE_CPU, MIN_SHARE_CUDA, MIN_SHARE_TRUNK = 0.95, 0.97, 0.85
SLOPE_BYTES = 1_000
NUMBERS = (200, 1_000, 4_000, 20_000)
NUM_MEMORY_RUNS = 3
FULL_BLOCKS, FULL_BLOCK_ROWS, FULL_ROUNDS = 3, 2, 1
PICTURE_PX, TINY_PX = 1016, 16
_NUM_DRAWN = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    if options.measure is not None:
        kind, given = options.measure
        print(json.dumps(MEASURES[kind](**json.loads(given))))
        return 0
    spare_memory()  # As the program does; of effect in the processes that are started from here.
    device = pick_device(options.device)
    machine = Machine(device)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as name:
        bench = Bench(Path(name), device, options)
        by_levels = measure_levels(bench)
        scaling = measure_scaling(bench)
        memory = {} if options.quick or bench.is_cut else measure_memory(Path(name))
    return report(options, machine, bench, by_levels, scaling, memory).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the default levels, in one round")
    parser.add_argument("--full", action="store_true", help="SAM 3's own size, random weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--images", type=int, help="through each pipeline [48; on CUDA 1024]")
    parser.add_argument("--workdir", type=Path, help="where pictures and stores lie meanwhile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # A GPU is fast enough for all of it.
    options.full |= pick_device(options.device) != "cpu" and not options.quick
    return options


@dataclass(frozen=True)
class Rate:
    """What a pipeline has done.

    Attributes:
        images_per_s: of all workers together, from their first batches to the last block.
        shares: what the workers spent their time on.
    """

    images_per_s: float
    shares: TimeShares


@dataclass
class Watch:
    """Takes the time from when every worker has put a first batch through to the last block."""

    num_workers: int
    begun_s: float = 0.0
    num_begun: int = 0
    ended_s: float = 0.0
    num_ended: int = 0
    states: dict[int, WorkerStatus] = field(default_factory=dict)

    def __call__(self, states: Mapping[int, WorkerStatus], num_images: int) -> None:
        """Take a report of the pool."""
        self.states = dict(states)
        now_s = time.perf_counter()
        if not self.num_begun and len(states) == self.num_workers:
            self.begun_s, self.num_begun = now_s, num_images
        self.ended_s, self.num_ended = now_s, num_images

    def rate(self) -> Rate:
        """Return what has been measured."""
        elapsed_s = self.ended_s - self.begun_s
        shares = TimeShares.of(self.states.values())
        return Rate((self.num_ended - self.num_begun) / elapsed_s, shares)


class Bench:
    """A device, pictures for it, and how its towers are called."""

    def __init__(self, folder: Path, device: str, options: argparse.Namespace) -> None:
        self._folder, self.device, self._options = folder, device, options
        self.on_cuda = device.startswith("cuda")
        self.backbone = "sam3" if options.full else "sam3-mini"
        self.num_images = options.images or self._default_images()
        # Of SAM 3's size an image takes a CPU half a minute: blocks are cut short there.
        self.is_cut = options.full and not self.on_cuda
        self.levels = LEVELS[:1] if options.quick or self.is_cut else LEVELS
        self.rounds = 1 if options.quick else FULL_ROUNDS if self.is_cut else ROUNDS
        self.scaling_rounds = 1 if options.quick else SCALING_ROUNDS
        self.block_rows = FULL_BLOCK_ROWS if self.is_cut else BLOCK_ROWS
        self._batch_size: int | None = None if self.on_cuda else 1
        self._num_stores = 0

    def _default_images(self) -> int:
        if self.on_cuda:
            return 128 if self._options.quick else 1024
        if self._options.full:
            return FULL_BLOCKS * BLOCK_ROWS
        return BLOCK_ROWS if self._options.quick else 3 * BLOCK_ROWS

    def config(self, levels: Sequence[str], num_images: int, num_workers: int) -> ExtractConfig:
        """Return an extraction of so many pictures into a new store."""
        self._num_stores += 1
        return ExtractConfig(
            write_pictures(self._folder / f"pictures-{num_images}", num_images, PICTURE_PX),
            self._folder / f"{self._num_stores}.zarr",
            levels=tuple(levels),
            backbone=self.backbone,
            weights="random" if self._options.full else None,
            devices=(self.device,) * num_workers,
            batch_size=self._batch_size,
        )

    def pipeline(
        self,
        levels: Sequence[str],
        *,
        num_images: int | None = None,
        num_workers: int = 1,
        num_threads: int | None = None,
    ) -> Rate:
        """Extract into a store that does not stay."""
        config = self.config(levels, num_images or self.num_images, num_workers)
        state = StoreState.read(config.output, LABEL_SET)
        job = plan_job(read_request(config, state, lambda progress: None), state)
        if self._batch_size is None:
            # The knee, which an extraction would begin with.
            self._batch_size = measure_batch_size(job.setups()[0])
            return self.pipeline(levels, num_images=num_images, num_workers=num_workers)
        with store_lock(config.output):
            job = job.describe()
        setups = job.setups()
        if num_threads is not None:
            setups = tuple(replace(setup, num_threads=num_threads) for setup in setups)
        watch = Watch(num_workers)
        tasks = [replace(task, rows=task.rows[: self.block_rows]) for task in job.tasks]
        run_pool(setups, tasks, watch)
        return watch.rate()

    def tower(self, levels: Sequence[str]) -> float:
        """Return images a second of the tower alone, as a worker of its own has it."""
        found = measured(
            "tower",
            backbone=self.backbone,
            weights="random" if self._options.full else None,
            levels=[level for level in levels if level != IMAGE_LEVEL],
            device=self.device,
            num_threads=num_cpu_cores(),
            batch_size=self._batch_size or 8,
            num_images=max(2, self.num_measured),
        )
        return float(found["images_per_s"])

    @property
    def num_measured(self) -> int:
        """Images that a pipeline puts through the tower, of those that its blocks could have."""
        num_whole, rest = divmod(self.num_images, BLOCK_ROWS)
        return num_whole * self.block_rows + min(rest, self.block_rows)

    @property
    def batch_size(self) -> int:
        """Images a forward pass."""
        return self._batch_size or 1


def write_pictures(folder: Path, num_images: int, side_px: int) -> Path:
    """Write grey pictures of some grain, a mask that serves them all, and a manifest."""
    if folder.exists():
        return folder
    (folder / "images").mkdir(parents=True)
    suffix = "png" if side_px > TINY_PX else "npy"
    contents = []
    noise = np.random.default_rng(0)
    for number in range(min(num_images, _NUM_DRAWN)):
        path = folder / f"{number}.{suffix}"
        pixels_HW = np.full((side_px, side_px), 100 + number, np.uint8)
        if suffix == "png":
            pixels_HW += noise.integers(0, 16, pixels_HW.shape, dtype=np.uint8)
            Image.fromarray(pixels_HW).save(path)
        else:
            np.save(path, pixels_HW)
        contents.append(path.read_bytes())
        path.unlink()
    np.save(folder / "mask.npy", np.eye(side_px, dtype=np.uint8))
    lines = ["id,image,mask,primary_angle,secondary_angle,split"]
    for i in range(num_images):
        name = f"images/{i:06}.{suffix}"
        (folder / name).write_bytes(contents[i % len(contents)])
        lines.append(f"s{i:06},{name},mask.npy,{i % 90},{i % 45},{'train' if i % 4 else 'val'}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measured(kind: str, **given: Any) -> dict[str, float]:
    """Measure in a process of its own."""
    return measure_apart(__file__, kind, json.dumps(given))


def measure_tower(
    backbone: str,
    weights: str | None,
    levels: Sequence[str],
    device: str,
    num_threads: int,
    batch_size: int,
    num_images: int,
) -> dict[str, float]:
    """Run the tower alone on pictures that are there."""
    set_num_threads(num_threads)
    on_cuda = device.startswith("cuda")
    tower = load_tower(
        backbone,
        weights=weights,
        levels=levels,
        device=device,
        numeric_path="bf16" if on_cuda else "fp32",
    )
    shape = (batch_size, 1, tower.spec.size_px, tower.spec.size_px)
    image_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    num_batches = -(-num_images // batch_size)
    # The first, like a pipeline's, is not counted.
    tower(image_BCHW)
    if on_cuda:
        torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(num_batches):
        tower(image_BCHW)
    if on_cuda:
        torch.cuda.synchronize()
    elapsed_s = time.perf_counter() - begun_s
    return {"images_per_s": num_batches * batch_size / elapsed_s}


def measure_extraction(folder: str) -> dict[str, float]:
    """Extract tiny pictures without the tower; return the memory held resident.

    Of the parent the most; of a worker, whose memory goes up and down with the blocks that it has
    in hand, the median. And by how much either grew an image, by a line through all reports from
    the first of NUMBERS on; NaN where there are none.
    """
    num_images: list[int] = []
    held_bytes: dict[str, list[int]] = {"parent": [], "worker": []}

    def watch(progress: ExtractProgress) -> None:
        for worker in progress.workers.values():
            num_images.append(worker.num_written)
            held_bytes["worker"].append(worker.memory_bytes)
            held_bytes["parent"].append(used_memory_bytes("cpu"))

    shutil.rmtree(f"{folder}.zarr", ignore_errors=True)
    config = ExtractConfig(
        Path(folder), Path(f"{folder}.zarr"), levels=(IMAGE_LEVEL,), backbone="sam3-mini"
    )
    begun_s = time.perf_counter()
    result = extract(config, watch)
    assert result.sealed
    settled = np.array(num_images) >= NUMBERS[0]
    return {
        "parent_bytes": peak_memory_bytes(),
        "worker_bytes": median(held_bytes["worker"]),
        "elapsed_s": time.perf_counter() - begun_s,
        **{
            f"{who}_slope_bytes": slope_of(np.array(num_images)[settled], np.array(held)[settled])
            for who, held in held_bytes.items()
        },
    }


MEASURES = {"tower": measure_tower, "extraction": measure_extraction}


@dataclass
class Levels:
    """What was measured for some levels, by round."""

    tower: list[float] = field(default_factory=list)
    pipeline: list[Rate] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The pipeline's rate as a share of the tower's, by the median of the rounds."""
        pairs = zip(self.pipeline, self.tower, strict=True)
        return median(rate.images_per_s / tower for rate, tower in pairs)


def measure_levels(bench: Bench) -> dict[str, Levels]:
    """Measure pipeline and tower in turn, by levels."""
    found = {" + ".join(levels): Levels() for levels in bench.levels}
    for turn in range(bench.rounds):
        for levels in bench.levels:
            name = " + ".join(levels)
            rate = bench.pipeline(levels)
            found[name].pipeline.append(rate)
            found[name].tower.append(bench.tower(levels))
            print(
                f"round {turn + 1}, {name}: {rate.images_per_s:.3g} images/s, the tower alone "
                f"{found[name].tower[-1]:.3g}",
                flush=True,
            )
    return found


def measure_scaling(bench: Bench) -> list[tuple[float, float]]:
    """Return, by round, images a second of one worker and of two."""
    found = []
    if bench.backbone == "sam3" and not bench.on_cuda:
        return []
    if not bench.on_cuda and num_cpu_cores() < 2:
        return []
    num_threads = None if bench.on_cuda else 1
    # A block for each worker at the least.
    num_images = max(BLOCK_ROWS, bench.num_images)
    for turn in range(bench.scaling_rounds):
        one = bench.pipeline(LEVELS[0], num_images=num_images, num_threads=num_threads)
        two = bench.pipeline(
            LEVELS[0], num_images=2 * num_images, num_workers=2, num_threads=num_threads
        )
        found.append((one.images_per_s, two.images_per_s))
        print(
            f"round {turn + 1}: one worker {one.images_per_s:.3g} images/s, two "
            f"{two.images_per_s:.3g}",
            flush=True,
        )
    return found


def measure_memory(folder: Path) -> dict[int, dict[str, float]]:
    """Return what :func:`measure_extraction` does by number of images, medians of several runs."""
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in NUMBERS}
    pictures = {
        number: write_pictures(folder / f"tiny-{number}", number, TINY_PX) for number in NUMBERS
    }
    for turn in range(NUM_MEMORY_RUNS):
        for number, found in runs.items():
            print(f"run {turn + 1}: extracting {number:,} tiny pictures", flush=True)
            found.append(measured("extraction", folder=str(pictures[number])))
    return {
        number: {name: median(one[name] for one in found) for name in found[0]}
        for number, found in runs.items()
    }


def slope_of(numbers: Sequence[float], values: Sequence[float]) -> float:
    """Return by how much values grow by one of what they are given by, by least squares."""
    if len(set(numbers)) < 2:
        return math.nan
    return float(np.polyfit(numbers, values, 1)[0])


def report(
    options: argparse.Namespace,
    machine: Machine,
    bench: Bench,
    by_levels: Mapping[str, Levels],
    scaling: Sequence[tuple[float, float]],
    memory: Mapping[int, Mapping[str, float]],
) -> Report:
    """Put together what was found."""
    rows, bounds, notes = [], [], []
    for name, found in by_levels.items():
        rates = [rate.images_per_s for rate in found.pipeline]
        middle = sorted(found.pipeline, key=lambda rate: rate.images_per_s)[len(rates) // 2]
        rows.append(
            (
                f"`{name}`",
                f"{median(found.tower):.3g}",
                f"{median(rates):.3g}",
                f"{found.share:.2f}",
                f"{middle.shares.tower:.0%}",
                f"{middle.shares.images:.0%}",
                f"{middle.shares.writing:.0%}",
            )
        )
    if bench.backbone == "sam3" and not options.quick:
        bounds += share_bounds(bench, by_levels)
    which = "SAM 3's own size, random weights" if bench.backbone == "sam3" else "sam3-mini"
    notes.append(
        f"{which}, {bench.num_measured} pictures of {PICTURE_PX} × {PICTURE_PX} px in blocks of "
        f"{bench.block_rows}, batches of {bench.batch_size}."
    )
    if scaling:
        ratio = median(two / one for one, two in scaling)
        one, two = (median(rates) for rates in zip(*scaling, strict=True))
        kind = "workers on one device" if bench.on_cuda else "workers of one thread each"
        notes.append(
            f"Two {kind}: {significant(two)} images/s, {ratio:.2f} times one worker's "
            f"{significant(one)} (median of {len(scaling)})."
        )
        if not bench.on_cuda and not options.quick:
            claim = f"two workers of one thread make {MIN_SCALING:g} times the images/s of one"
            bounds.append(Bound(claim, ratio, ratio >= MIN_SCALING))
    if memory:
        (few, at_few), *_, (many, at_many) = memory.items()
        for who in ("parent", "worker"):
            of_numbers = [found[f"{who}_bytes"] for found in memory.values()]
            slopes = {
                f"while {many:,} images are extracted": at_many[f"{who}_slope_bytes"],
                f"by stores of {few:,} to {many:,} images": slope_of([*memory], of_numbers),
            }
            for what, slope in slopes.items():
                claim = f"memory of the {who} grows by less than {SLOPE_BYTES:,} bytes an image"
                bounds.append(Bound(f"{claim}, {what}", slope, slope < SLOPE_BYTES))
        notes.append(
            f"Of {few:,} and {many:,} images without the tower, the parent holds "
            f"{at_few['parent_bytes'] / 1e6:.0f} and {at_many['parent_bytes'] / 1e6:.0f} MB at the "
            f"most, a worker {at_few['worker_bytes'] / 1e6:.0f} and "
            f"{at_many['worker_bytes'] / 1e6:.0f} MB (medians; of {NUM_MEMORY_RUNS} runs)."
        )
    return Report(
        # Two results beside each other: of the miniature and of SAM 3 itself.
        program="extract-full" if bench.backbone == "sam3" else "extract",
        columns=(
            "levels",
            "tower alone, images/s",
            "pipeline, images/s",
            "share",
            "time in the tower",
            "waiting for images",
            "for writing",
        ),
        rows=rows,
        notes=notes,
        bounds=bounds,
        figures={
            "levels": {name: asdict(found) for name, found in by_levels.items()},
            "one_and_two_workers_images_per_s": list(scaling),
            "memory": {str(number): found for number, found in memory.items()},
        },
        settings={
            "full": options.full,
            "images": bench.num_measured,
            "images_a_block": bench.block_rows,
            "batch_size": bench.batch_size,
            "rounds": bench.rounds,
        },
        machine=machine.fields(),
    )


def share_bounds(bench: Bench, by_levels: Mapping[str, Levels]) -> list[Bound]:
    """Return what is claimed of the pipeline beside SAM 3's own tower."""
    limits = {" + ".join(LEVELS[0]): MIN_SHARE_CPU}
    if bench.on_cuda:
        limits = {" + ".join(LEVELS[0]): MIN_SHARE_CUDA, " + ".join(LEVELS[1]): MIN_SHARE_TRUNK}
    bounds = []
    for name, limit in limits.items():
        share = by_levels[name].share
        claim = f"with {name} the pipeline reaches {limit:g} of the tower alone"
        bounds.append(Bound(claim, share, share >= limit))
    return bounds


if __name__ == "__main__":
    raise SystemExit(main())
