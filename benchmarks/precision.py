"""What fewer bits cost: a level's bytes, reading speed, error and Dice by precision.

Phantoms of this program's own seed go through sam3-mini once, into a store that keeps level fpn_72
in every precision. From it come the bytes on disk; the time to stream shuffled batches of floats,
by turns, as a training does; the error of the values, against float16; and the mean Dice of the
head `linear`, which reads nothing but features, trained and measured on each precision with the
same seeds, of which the difference to float16 with the same seed is what counts.

sam3-mini is a miniature that learned from phantoms. Its features are not SAM 3's: neither these
errors nor these Dice say what SAM 3's released weights lose. On your own weights and images:
`sam3cache doctor --weights FILE --images FOLDER`.

Exits with 1 when a bound is missed (Dice not checked with --quick: too few epochs):

- int8 takes at most MAX_INT8_SHARE of float16's bytes;
- int8 keeps at least MIN_COSINE of the mean cosine, r7 and bf16 more;
- no precision but r5 changes the mean Dice by more than MAX_DICE_CHANGE.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from reporting import Bound, Machine, Report, alternate, duration

from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import FeatureStore, open_store
from sam3cache.features.precision import FEATURE_PRECISIONS, Fidelity, fidelity
from sam3cache.images.phantom import make_phantoms
from sam3cache.loading import CachedSamples
from sam3cache.runtime import pick_device
from sam3cache.training import TrainConfig, train

PHANTOM_SEED = 7_003
VIEWS_PER_PATIENT = 2
BASE = "fpn_72"
LEVELS = (BASE, *(f"{BASE}.{precision}" for precision in FEATURE_PRECISIONS[1:]))
BATCH_SIZE = 16

MAX_INT8_SHARE = 0.51
MIN_COSINE = 0.999
MAX_DICE_CHANGE = 0.01


@dataclass(frozen=True)
class Measured:
    """What one precision costs.

    Attributes:
        sample_bytes: on disk, of one sample.
        samples_per_s: streamed in shuffled batches, as floats on the device.
        relative_l2: mean over the samples.
        cosine_min: the least of all positions of all samples.
        cosine_mean: over them.
        dice: by seed, mean over the test images.
    """

    sample_bytes: float
    samples_per_s: float
    relative_l2: float
    cosine_min: float
    cosine_mean: float
    dice: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    machine = Machine(device)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder_name:
        folder = Path(folder_name)
        print(f"Drawing and extracting {options.phantoms} phantoms", flush=True)
        manifest = make_phantoms(
            folder / "pictures",
            options.phantoms,
            PHANTOM_SEED,
            views_per_patient=VIEWS_PER_PATIENT,
        )
        path = folder / "precisions.zarr"
        extract(
            ExtractConfig(manifest, path, levels=LEVELS, backbone="sam3-mini", devices=(device,))
        )
        store = open_store(path)
        speeds = reading_speeds(store, device, options.rounds)
        dice = train_on_each(path, folder, device, options)
        measured = {
            level: measure(store, level, speeds[level], dice[level], options.errors)
            for level in LEVELS
        }
    return report(options, machine, measured).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few phantoms, one seed, one epoch")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--workdir", type=Path, help="where pictures and stores lie meanwhile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    options = parser.parse_args(arguments)
    options.phantoms = 16 if options.quick else 96
    options.rounds = 3 if options.quick else 15
    options.errors = 4 if options.quick else 48
    options.seeds = 1 if options.quick else 3
    options.epochs = 1 if options.quick else 6
    return options


def reading_speeds(store: FeatureStore, device: str, rounds: int) -> dict[str, float]:
    """Return, by level, samples a second of shuffled batches streamed, by turns, warm."""
    rows = [sample.row for sample in store.samples]
    streams = {
        level: CachedSamples(store, rows, (level,), device=device, residency="stream")
        for level in LEVELS
    }

    def read(level: str) -> None:
        for batch in streams[level].iterate(BATCH_SIZE, shuffle=True):
            batch.levels[level].sum().item()  # waits for the device, too

    seconds = alternate(rounds, {level: lambda level=level: read(level) for level in LEVELS})
    return {level: len(rows) / median(times) for level, times in seconds.items()}


def train_on_each(
    path: Path, folder: Path, device: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return, by level and seed, the mean test Dice of a head that read that level alone."""
    dice: dict[str, list[float]] = {level: [] for level in LEVELS}
    for seed in range(options.seeds):
        for level, precision in zip(LEVELS, FEATURE_PRECISIONS, strict=True):
            result = train(
                TrainConfig(
                    store=str(path),
                    name=f"{precision}-{seed}",
                    output=str(folder / "runs"),
                    head="linear",
                    learning_rate=1e-2,
                    epochs=options.epochs,
                    batch_size=4,
                    feature_precision=precision,
                    seed=seed,
                    device=device,
                )
            )
            config = EvalConfig(path, result.run_dir, device=device, check_angles=False, page=False)
            (metrics,) = evaluate(config).classes.values()
            value = metrics["dice"].mean
            dice[level].append(math.nan if value is None else value)
            print(
                f"seed {seed}: {level} {dice[level][-1]:.4f} ({duration(result.elapsed_s)})",
                flush=True,
            )
    return dice


def measure(
    store: FeatureStore, level: str, samples_per_s: float, dice: list[float], num_errors: int
) -> Measured:
    """Put together what is known of one precision."""
    item = store.levels[level].item
    receipts = [receipt for key, receipt in store.receipts.items() if key[0] == item]
    num_bytes = sum(shard.size_bytes for receipt in receipts for shard in receipt.shards)
    found = [against_float16(store, level, sample.row) for sample in store.samples[:num_errors]]
    return Measured(
        num_bytes / sum(len(receipt.rows) for receipt in receipts),
        samples_per_s,
        mean(f.relative_l2 for f in found),
        min(f.cosine_min for f in found),
        mean(f.cosine_mean for f in found),
        dice,
    )


def against_float16(store: FeatureStore, level: str, row: int) -> Fidelity:
    """Compare a stored sample with the float16 one, which stands for the values themselves."""
    exact_CHW = store.read(BASE, row).astype(np.float32)
    found = fidelity(store.levels[level].precision, exact_CHW)
    stored_CHW = store.read(level, row).astype(np.float32)
    error = np.linalg.norm(stored_CHW - exact_CHW) / np.linalg.norm(exact_CHW)
    # bf16 keeps the tower's own values, which float16 has rounded: a little apart from the rest.
    assert abs(error - found.relative_l2) <= 2**-11, (level, error, found)
    return found


def report(
    options: argparse.Namespace, machine: Machine, measured: Mapping[str, Measured]
) -> Report:
    """Lay out what was found, and check the bounds."""
    exact = measured[BASE]
    rows, bounds = [], []
    for level, own in measured.items():
        changes = [a - b for a, b in zip(own.dice, exact.dice, strict=True)]
        rows.append(
            [
                f"`{level}`",
                f"{own.sample_bytes / 1e6:.2f} MB",
                f"{own.sample_bytes / exact.sample_bytes:.2f}",
                f"{own.samples_per_s / exact.samples_per_s:.2f} ×",
                f"{own.relative_l2:.1e}",
                f"{1 - own.cosine_min:.1e}",
                f"{1 - own.cosine_mean:.1e}",
                f"{mean(own.dice):.3f}",
                "" if level == BASE else f"{mean(changes):+.4f}{deviation(changes)}",
            ]
        )
        if level not in (BASE, f"{BASE}.r5") and not options.quick:
            change = abs(mean(changes))
            claim = f"{level} changes the mean Dice by at most {MAX_DICE_CHANGE}"
            bounds.append(Bound(claim, change, change <= MAX_DICE_CHANGE))
        if level != BASE and not level.endswith("r5"):
            claim = f"{level} keeps a mean cosine of at least {MIN_COSINE}"
            bounds.append(Bound(claim, own.cosine_mean, own.cosine_mean >= MIN_COSINE))
    small = measured[f"{BASE}.int8"]
    share = small.sample_bytes / exact.sample_bytes
    bounds.append(
        Bound(f"int8 takes at most {MAX_INT8_SHARE} of the bytes", share, share <= MAX_INT8_SHARE)
    )
    figures: dict[str, Any] = {level: vars(own) for level, own in measured.items()}
    return Report(
        program="precision",
        columns=(
            "level",
            "bytes a sample",
            "of float16",
            "reading speed",
            "relative L2 error",
            "1 − least cosine",
            "1 − mean cosine",
            "Dice",
            "against float16",
        ),
        rows=rows,
        notes=[
            f"Features of {options.phantoms} synthetic angiograms by sam3-mini, a miniature that "
            "learned from such pictures: neither errors nor Dice say what SAM 3's released weights "
            "lose (`sam3cache doctor --weights FILE --images FOLDER` does). Errors are against "
            "float16, by position over the channels.",
            f"Dice of `linear`, which reads features alone, after {options.epochs} epochs: mean "
            f"of {options.seeds} seeds, and mean ± standard deviation of the differences to "
            "float16 with the same seed.",
            "Reading speed: shuffled batches of 16 streamed from the page cache, made into floats "
            f"on the device, and added up; medians of {options.rounds} turns. On a CPU, making "
            "floats of int8 costs more than reading them.",
        ],
        bounds=bounds,
        figures=figures,
        settings={
            "phantom_seed": PHANTOM_SEED,
            "phantoms": options.phantoms,
            "epochs": options.epochs,
            "seeds": options.seeds,
        },
        machine=machine.fields(),
    )


def deviation(values: Sequence[float]) -> str:
    """Write the standard deviation of several values."""
    return f" ± {stdev(values):.4f}" if len(values) > 1 else ""


if __name__ == "__main__":
    raise SystemExit(main())
