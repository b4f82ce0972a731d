"""What the measures of one 512 x 512 mask cost, and whether they are those of MONAI.

Vessel masks of phantoms, each against itself shifted by three pixels and broken in places, as a
prediction might be; and the two worst masks there are: noise, whose border is everywhere, and a
mask that is full. In turn, ours (Dice, IoU, precision, recall, clDice, HD95 and ASSD in pixels and
millimetres) and MONAI's (Dice, IoU, HD95 and ASSD in pixels; it has no clDice).

Exits with 1 when a bound is missed:

- ours take at most MAX_MS of a vessel mask, the median;
- no Dice, IoU, HD95 or ASSD differs from MONAI's by more than MAX_DIFFERENCE, as a share of it.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from reporting import Bound, Machine, Report, significant

from sam3cache.images.phantom import make_phantoms
from sam3cache.metrics import dice_iou_precision_recall, shape_scores

SIDE_PX = 512
SPACING_MM = (0.3, 0.3)
MAX_MS = 50.0
MAX_DIFFERENCE = 1e-5
SEED = 7_003

Pair = tuple[NDArray[np.bool_], NDArray[np.bool_]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine("cpu")
    num_pictures = 2 if options.quick else options.pictures
    rng = np.random.default_rng(SEED)
    noise = [rng.random((SIDE_PX, SIDE_PX)) < 0.5 for _ in range(2)]
    full = np.ones((SIDE_PX, SIDE_PX), dtype=bool)
    kinds: dict[str, list[Pair]] = {
        "vessels": [(as_predicted(true_HW), true_HW) for true_HW in vessel_masks(num_pictures)],
        "noise": [(noise[0], noise[1])],
        "full": [(full, full)],
    }
    milliseconds: dict[str, dict[str, list[float]]] = {}
    largest = 0.0
    for kind, pairs in kinds.items():
        milliseconds[kind] = {"ours": [], "monai": []}
        timed(ours, pairs[0])  # Imports are no part of it.
        timed(monais, pairs[0])
        for pair in pairs:
            found, ours_ms = timed(ours, pair)
            expected, monai_ms = timed(monais, pair)
            milliseconds[kind]["ours"].append(ours_ms)
            milliseconds[kind]["monai"].append(monai_ms)
            differences = np.abs(np.subtract(found, expected)) / np.maximum(1.0, expected)
            largest = max(largest, float(differences.max()))
    vessels_ms = median(milliseconds["vessels"]["ours"])
    return Report(
        program="metrics",
        columns=("mask", "masks", "ours, ms", "MONAI, ms"),
        rows=[
            (
                kind,
                str(len(kinds[kind])),
                *(significant(median(milliseconds[kind][who])) for who in ("ours", "monai")),
            )
            for kind in kinds
        ],
        notes=["Medians, of one mask of 512 x 512 pixels. MONAI's are without clDice."],
        bounds=[
            Bound(f"a vessel mask takes at most {MAX_MS:g} ms", vessels_ms, vessels_ms <= MAX_MS),
            Bound(
                f"no measure differs from MONAI's by more than {MAX_DIFFERENCE:g} of it",
                *(largest, largest <= MAX_DIFFERENCE),
            ),
        ],
        figures={"ms": milliseconds, "largest_difference": largest},
        settings={"quick": options.quick, "pictures": num_pictures},
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two vessel masks")
    parser.add_argument("--pictures", type=int, default=20, metavar="N", help="vessel masks [20]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser.parse_args(arguments)


def vessel_masks(num_masks: int) -> list[NDArray[np.bool_]]:
    """Draw phantoms, and return their masks at 512 x 512 pixels."""
    with tempfile.TemporaryDirectory(prefix="sam3cache-") as folder:
        manifest = make_phantoms(Path(folder), num_masks, SEED)
        with manifest.open(encoding="utf-8", newline="") as file:
            names = [line["mask"] for line in csv.DictReader(file)]
        masks = []
        for name in names:
            with Image.open(manifest.parent / name) as image:
                resized = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)
                masks.append(np.asarray(resized) > 0)
    return masks


def as_predicted(true_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask as a fair head might predict it: a little off, with pieces missing."""
    predicted_HW = np.roll(true_HW, (2, -3), axis=(0, 1))
    predicted_HW[::60] = False
    predicted_HW[:, 100:130] = False
    return predicted_HW


def timed(measure: Callable[[Pair], list[float]], pair: Pair) -> tuple[list[float], float]:
    """Return the measures and the milliseconds that they took."""
    started_s = time.perf_counter()
    values = measure(pair)
    return values, 1000 * (time.perf_counter() - started_s)


def ours(pair: Pair) -> list[float]:
    """Take all of our measures; return those that MONAI has as well."""
    predicted_HW, true_HW = pair
    mask_HW = true_HW.astype(np.uint8)
    areas = dice_iou_precision_recall(torch.from_numpy(predicted_HW), torch.from_numpy(mask_HW))
    shapes = shape_scores(predicted_HW, mask_HW, SPACING_MM)
    values = areas.dice, areas.iou, shapes.hd95_px, shapes.assd_px
    return [value for value in values if value is not None]


def monais(pair: Pair) -> list[float]:
    """Take the same measures by MONAI."""
    # Here: it takes seconds to import, which --help shall not.
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
    )

    predicted, true = (torch.from_numpy(mask_HW)[None, None].float() for mask_HW in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of an argument that it deprecates and passes itself.
        values = (
            compute_dice(predicted, true),
            compute_iou(predicted, true),
            compute_hausdorff_distance(predicted, true, include_background=True, percentile=95),
            compute_average_surface_distance(
                predicted, true, include_background=True, symmetric=True
            ),
        )
    return [float(value) for value in values]


if __name__ == "__main__":
    raise SystemExit(main())
