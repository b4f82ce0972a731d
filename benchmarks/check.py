"""What `sam3cache check` costs, and how well it tells masks that lie beside what they mark.

Phantoms of 512 x 512 with their masks: of the whole tree, on the picture's grid and on one of half
its size, and of single vessels, each where it lies and moved by some pixels in a direction drawn by
chance. Then sets of such masks, all where they lie or all moved to the right: does the median tell?
Their seed is not that with which the statistic's limits were chosen. Then a check of a manifest
that names these files again and again: time, and memory by sample.

Shares of single masks have 95 % intervals by Wilson's method, and a bound must hold for their worse
end. Exits with 1 when one is missed:

- of masks that lie right, at most MAX_FALSE_ALARMS are warned of, of each kind;
- of masks that are moved, at least as many as MIN_HITS says, of each kind in it;
- of sets of masks that lie right, at most MAX_FALSE_SETS are warned of, of each kind; of those
  moved by SURE_SET_PX or more, at least MIN_SET_HITS;
- an image with its mask takes at most MAX_CPU_MS of processor time;
- of a sample, at most MAX_KEPT_KB stay in memory.

With --quick there are too few masks for the first two to hold.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image
from reporting import Bound, Machine, Report, significant
from scipy.stats import binomtest

from sam3cache.checking import CheckConfig, Shift, best_shift, check, common_shift
from sam3cache.images.phantom import make_phantoms
from sam3cache.runtime import set_num_threads

SIDE_PX = 512
DISTANCES_PX = (0, 1, 2, 4, 6, 8, 12, 20)
LARGE_VESSEL_PX = 1500
SMALLEST_VESSEL_PX = 150
SEED = 7_004

TREE, HALF_TREE, LARGE, SMALL = KINDS = (
    "whole tree",
    "whole tree, 256 x 256",
    "one large vessel",
    "one small vessel",
)
MAX_FALSE_ALARMS = 0.05
# Of a kind: pixels from which on, and the share of masks moved so far. Small vessels have none:
# most of them are too small for anything to be told.
MIN_HITS = {TREE: (8, 0.95), HALF_TREE: (8, 0.95), LARGE: (12, 0.85)}

SET_KINDS = (TREE, HALF_TREE, LARGE)
SET_SIZE = 30
SET_DISTANCES_PX = (0, 1, 2, 4)
NUM_SETS = 1000
MAX_FALSE_SETS = 0.01
SURE_SET_PX, MIN_SET_HITS = 2, 0.95

MAX_CPU_MS = 60.0
MAX_KEPT_KB = 4.0
NUM_TRACED = 100

Mask = NDArray[np.bool_]
Shifts = Mapping[tuple[str, int], Sequence[Shift | None]]
"""By kind of mask and pixels moved: where each mask fits best."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    set_num_threads(1)
    machine = Machine("cpu")
    num_pictures = 4 if options.quick else options.pictures
    num_rows = 100 if options.quick else options.rows
    with tempfile.TemporaryDirectory(prefix="sam3cache-") as folder:
        manifest = make_phantoms(Path(folder) / "phantoms", num_pictures, SEED, size_px=SIDE_PX)
        each_alone, all_alike = find_shifts(manifest)
        rate = measure_check(manifest, num_rows)
    told = {
        key: (sum(shift is not None and shift.is_clear for shift in shifts), len(shifts))
        for key, shifts in each_alone.items()
    }
    set_shares = {key: share_of_sets(shifts) for key, shifts in all_alike.items()}
    return Report(
        program="check",
        columns=("mask", "number", "right", *(f"{px} px off" for px in DISTANCES_PX[1:])),
        rows=[*rows_of_masks(told), *rows_of_sets(set_shares)],
        notes=[
            "Share of masks that are warned of, by how far they are moved, in brackets the 95% "
            f"interval (Wilson). A large vessel has {LARGE_VESSEL_PX} pixels or more.",
            f"Sets: of {NUM_SETS} sets of {SET_SIZE} masks drawn from these, all moved alike, the "
            "share of which it is said that they are shifted on the whole.",
            f"A check of {num_rows} PNGs of 512 x 512 with masks: "
            f"{significant(rate['images_per_s'])} images/s, {significant(rate['cpu_ms'])} ms of "
            f"processor time an image, {significant(rate['kept_kb'])} kB kept of each.",
        ],
        bounds=[
            *bounds_of_masks(told),
            *bounds_of_sets(set_shares),
            Bound(
                f"an image takes at most {MAX_CPU_MS:g} ms of processor time",
                *(rate["cpu_ms"], rate["cpu_ms"] <= MAX_CPU_MS),
            ),
            Bound(
                f"at most {MAX_KEPT_KB:g} kB are kept of a sample",
                *(rate["kept_kb"], rate["kept_kb"] <= MAX_KEPT_KB),
            ),
        ],
        figures={
            "told": {f"{kind}, {px} px": num for (kind, px), (num, _) in told.items()},
            "masks": {f"{kind}, {px} px": num for (kind, px), (_, num) in told.items()},
            "sets_told": {f"{kind}, {px} px": share for (kind, px), share in set_shares.items()},
            **rate,
        },
        settings={"quick": options.quick, "pictures": num_pictures, "rows": num_rows, "seed": SEED},
        machine=machine.fields(),
    ).publish(options.json)


def rows_of_masks(told: Mapping[tuple[str, int], tuple[int, int]]) -> Iterator[Sequence[str]]:
    """Yield a row a kind: shares with their intervals, by distance."""
    for kind in KINDS:
        if (kind, 0) in told:
            cells = []
            for px in DISTANCES_PX:
                low, high = interval(*told[kind, px])
                num_told, num_masks = told[kind, px]
                cells.append(f"{num_told / num_masks:.0%} ({low:.0%} to {high:.0%})")
            yield kind, str(told[kind, 0][1]), *cells


def rows_of_sets(shares: Mapping[tuple[str, int], float]) -> Iterator[Sequence[str]]:
    """Yield a row a kind of which there are enough masks; blank where nothing was measured."""
    for kind in SET_KINDS:
        if (kind, 0) in shares:
            cells = (
                f"{shares[kind, px]:.1%}" if (kind, px) in shares else "" for px in DISTANCES_PX
            )
            yield f"set: {kind}", str(NUM_SETS), *cells


def bounds_of_masks(told: Mapping[tuple[str, int], tuple[int, int]]) -> Iterator[Bound]:
    """Yield what is claimed of single masks, kind by kind, of their intervals' worse end."""
    kinds = [kind for kind in KINDS if (kind, 0) in told]
    for kind in kinds:
        high = interval(*told[kind, 0])[1]
        yield Bound(
            f"{kind}: at most {MAX_FALSE_ALARMS:.0%} that lie right are warned of",
            *(high, high <= MAX_FALSE_ALARMS),
        )
    for kind in kinds:
        if kind in MIN_HITS:
            least_px, least = MIN_HITS[kind]
            low = min(interval(*told[kind, px])[0] for px in DISTANCES_PX if px >= least_px)
            yield Bound(
                f"{kind}: at least {least:.0%} are warned of from {least_px} px on",
                *(low, low >= least),
            )


def bounds_of_sets(shares: Mapping[tuple[str, int], float]) -> Iterator[Bound]:
    """Yield what is claimed of sets of masks, kind by kind."""
    for kind in SET_KINDS:
        if (kind, 0) in shares:
            yield Bound(
                f"sets, {kind}: at most {MAX_FALSE_SETS:.0%} that lie right are warned of",
                *(shares[kind, 0], shares[kind, 0] <= MAX_FALSE_SETS),
            )
            hits = min(shares[kind, px] for px in SET_DISTANCES_PX if px >= SURE_SET_PX)
            yield Bound(
                f"sets, {kind}: at least {MIN_SET_HITS:.0%} are from {SURE_SET_PX} px on",
                *(hits, hits >= MIN_SET_HITS),
            )


def interval(num_told: int, num_masks: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's method."""
    found = binomtest(num_told, num_masks).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 phantoms, 100 rows")
    parser.add_argument("--pictures", type=int, default=120, metavar="N", help="phantoms [120]")
    parser.add_argument("--rows", type=int, default=2000, metavar="N", help="rows checked [2000]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser.parse_args(arguments)


def find_shifts(manifest: Path) -> tuple[Shifts, Shifts]:
    """Return where masks fit best: each moved on its own, and those for sets, all moved alike."""
    rng = np.random.default_rng(SEED)
    each_alone: dict[tuple[str, int], list[Shift | None]] = defaultdict(list)
    all_alike: dict[tuple[str, int], list[Shift | None]] = defaultdict(list)
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        with Image.open(manifest.parent / row["image"]) as image:
            picture_HW1 = np.asarray(image)[..., None]
        with Image.open(manifest.parent / row["branches"]) as image:
            branches_HW = np.asarray(image)
        for kind, mask_HW in kinds_of(branches_HW):
            step = 2 if kind == HALF_TREE else 1
            for distance_px in DISTANCES_PX:
                angle = rng.uniform(0, 2 * math.pi)
                way = round(distance_px * math.sin(angle)), round(distance_px * math.cos(angle))
                shift = best_shift(picture_HW1, moved(mask_HW, *way)[::step, ::step])
                each_alone[kind, distance_px].append(shift)
            for distance_px in SET_DISTANCES_PX if kind in SET_KINDS else ():
                shift = best_shift(picture_HW1, moved(mask_HW, 0, distance_px)[::step, ::step])
                all_alike[kind, distance_px].append(shift)
    return each_alone, all_alike


def share_of_sets(shifts: Sequence[Shift | None]) -> float:
    """Return the share of sets drawn from masks, with replacement, that are told to be shifted."""
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(len(shifts), size=SET_SIZE) for _ in range(NUM_SETS))
    return sum(common_shift(shifts[i] for i in draw) is not None for draw in draws) / NUM_SETS


def kinds_of(branches_HW: NDArray[np.uint8]) -> Iterator[tuple[str, Mask]]:
    """Yield the masks of a phantom, by kind."""
    for kind in KINDS[:2]:
        yield kind, branches_HW > 0
    for number in np.unique(branches_HW)[1:]:
        mask_HW = branches_HW == number
        num_pixels = int(mask_HW.sum())
        if num_pixels >= SMALLEST_VESSEL_PX:
            yield KINDS[2 if num_pixels >= LARGE_VESSEL_PX else 3], mask_HW


def moved(mask_HW: Mask, down_px: int, right_px: int) -> Mask:
    """Move a mask; what leaves the picture is gone."""
    reach_px = max(abs(down_px), abs(right_px))
    height_px, width_px = mask_HW.shape
    top, left = reach_px - down_px, reach_px - right_px
    return np.pad(mask_HW, reach_px)[top : top + height_px, left : left + width_px]


def measure_check(manifest: Path, num_rows: int) -> dict[str, float]:
    """Check a manifest that names the phantoms' files in so many rows."""
    check(CheckConfig(manifest))  # Imports are no part of it.
    config = CheckConfig(repeated(manifest, num_rows))
    process = psutil.Process()
    before = process.cpu_times()
    started_s = time.perf_counter()
    check(config)
    elapsed_s = time.perf_counter() - started_s
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "images_per_s": num_rows / elapsed_s,
        "cpu_ms": 1000 * cpu_s / num_rows,
        "kept_kb": kept_bytes(manifest) / 1000,
        "memory_mb": process.memory_info().rss / 1e6,
    }


def kept_bytes(manifest: Path) -> float:
    """Return by how much memory grows with a sample, its row included.

    Of two lengths the difference, so that what is kept once, however many there are, is left out.
    """
    traced_bytes(manifest)
    few, many = (traced_bytes(repeated(manifest, num * NUM_TRACED)) for num in (1, 2))
    return (many - few) / NUM_TRACED


def traced_bytes(manifest: Path) -> int:
    """Return what a check holds once all samples are looked at.

    Counted allocation by allocation: what a process holds of the system says little of so few.
    """
    traced: list[int] = []

    def report(num_done: int, num_total: int) -> None:
        if num_done == num_total:
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    check(CheckConfig(manifest), report)
    tracemalloc.stop()
    return traced[0]


def repeated(manifest: Path, num_rows: int) -> Path:
    """Write a manifest that names the files of another again and again."""
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    path = manifest.parent / f"{num_rows}-rows.csv"
    fields = ["id", "image", "mask", "primary_angle", "secondary_angle", "split", "group"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[i % len(rows)] | {"id": f"s{i}"} for i in range(num_rows))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
