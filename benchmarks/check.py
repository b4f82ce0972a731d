"""What `sam3cache check` costs, and how well it tells masks that lie beside what they mark.

Phantoms of 512 x 512 with their masks: of the whole tree, on the picture's grid and on one of half
its size, and of single vessels, each where it lies and moved by some pixels in a direction drawn by
chance. Their seed is not that with which the statistic's limits were chosen. Then a check of a
manifest that names these files again and again: time, and memory by sample.

Exits with 1 when a bound is missed:

- of all masks that lie right, at most MAX_FALSE_ALARMS are warned of;
- of masks of the whole tree that are moved by 8 pixels or more, at least MIN_HITS are;
- an image with its mask takes at most MAX_CPU_MS of processor time;
- of a sample, at most MAX_KEPT_KB stay in memory.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image
from reporting import Bound, Machine, Report, significant

from sam3cache.checking import CheckConfig, best_shift, check
from sam3cache.images.phantom import make_phantoms
from sam3cache.runtime import set_num_threads

SIDE_PX = 512
DISTANCES_PX = (0, 2, 4, 6, 8, 12, 20)
LARGE_VESSEL_PX = 1500
SMALLEST_VESSEL_PX = 150
MAX_FALSE_ALARMS = 0.02
MIN_HITS = 0.95
MAX_CPU_MS = 60.0
MAX_KEPT_KB = 4.0
NUM_TRACED = 100
SEED = 7_004

KINDS = ("whole tree", "whole tree, 256 x 256", "one large vessel", "one small vessel")

Mask = NDArray[np.bool_]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    set_num_threads(1)
    machine = Machine("cpu")
    num_pictures = 4 if options.quick else options.pictures
    num_rows = 100 if options.quick else options.rows
    with tempfile.TemporaryDirectory(prefix="sam3cache-") as folder:
        manifest = make_phantoms(Path(folder) / "phantoms", num_pictures, SEED, size_px=SIDE_PX)
        num_masks, num_told = count_told(manifest)
        rate = measure_check(manifest, num_rows)
    shares = {key: num_told[key] / number for key, number in num_masks.items()}
    num_false, num_right = (sum(of[kind, 0] for kind in KINDS) for of in (num_told, num_masks))
    false_alarms = num_false / num_right
    hits = min(shares[kind, px] for kind in KINDS[:2] for px in DISTANCES_PX if px >= 8)
    return Report(
        program="check",
        columns=("mask", "masks", "right", *(f"{px} px off" for px in DISTANCES_PX[1:])),
        rows=[
            (
                kind,
                str(num_masks[kind, 0]),
                *(f"{shares[kind, px]:.0%}" for px in DISTANCES_PX),
            )
            for kind in KINDS
            if num_masks[kind, 0]
        ],
        notes=[
            f"Share of masks that are warned of, by how far they are moved. A large vessel has "
            f"{LARGE_VESSEL_PX} pixels or more.",
            f"A check of {num_rows} PNGs of 512 x 512 with masks: "
            f"{significant(rate['images_per_s'])} images/s, {significant(rate['cpu_ms'])} ms of "
            f"processor time an image, {significant(rate['kept_kb'])} kB kept of each.",
        ],
        bounds=[
            Bound(
                f"of all masks that lie right at most {MAX_FALSE_ALARMS:.0%} are warned of",
                *(false_alarms, false_alarms <= MAX_FALSE_ALARMS),
            ),
            Bound(
                f"of masks of the whole tree at least {MIN_HITS:.0%} are from 8 px on",
                *(hits, hits >= MIN_HITS),
            ),
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
            "told": {f"{kind}, {px} px": num_told[kind, px] for kind, px in num_masks},
            "masks": {f"{kind}, {px} px": number for (kind, px), number in num_masks.items()},
            **rate,
        },
        settings={"quick": options.quick, "pictures": num_pictures, "rows": num_rows, "seed": SEED},
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 phantoms, 100 rows")
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="phantoms [60]")
    parser.add_argument("--rows", type=int, default=2000, metavar="N", help="rows checked [2000]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser.parse_args(arguments)


def count_told(manifest: Path) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """Return, by kind of mask and pixels moved, how many there are and how many are warned of."""
    rng = np.random.default_rng(SEED)
    num_masks: Counter[tuple[str, int]] = Counter()
    num_told: Counter[tuple[str, int]] = Counter()
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        with Image.open(manifest.parent / row["image"]) as image:
            picture_HW1 = np.asarray(image)[..., None]
        with Image.open(manifest.parent / row["branches"]) as image:
            branches_HW = np.asarray(image)
        for kind, mask_HW in kinds_of(branches_HW):
            for distance_px in DISTANCES_PX:
                angle = rng.uniform(0, 2 * math.pi)
                way = round(distance_px * math.sin(angle)), round(distance_px * math.cos(angle))
                moved_HW = moved(mask_HW, *way)
                if kind == KINDS[1]:
                    moved_HW = moved_HW[::2, ::2]
                shift = best_shift(picture_HW1, moved_HW)
                num_masks[kind, distance_px] += 1
                num_told[kind, distance_px] += shift is not None and shift.is_clear
    return num_masks, num_told


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
        "kept_kb": kept_bytes(CheckConfig(repeated(manifest, NUM_TRACED))) / 1000,
        "memory_mb": process.memory_info().rss / 1e6,
    }


def kept_bytes(config: CheckConfig) -> float:
    """Return what stays in memory of a sample until all are looked at, its row included.

    Counted allocation by allocation: what a process holds of the system says little of so few.
    """
    traced: list[int] = []

    def report(num_done: int, num_total: int) -> None:
        if num_done == num_total:
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    check(config, report)
    tracemalloc.stop()
    return traced[0] / NUM_TRACED


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
