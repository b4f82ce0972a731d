"""Eight heads trained together, against the same eight alone, one after the other.

A store of noise and synthetic masks is written first: speed does not depend on values. Eight heads
of the kind that one compares (``film-conv`` and ``linear`` at several learning rates) then train
on it, by turns

- alone, each with a stream of its own, and together, over one stream;
- alone, each from RAM, and together from RAM;
- in one process of one thread, and in two such processes (``--devices cpu:2``).

Exits with 1 when a bound is missed:

- streamed together, the eight read at most BYTES_RATIO of what they read alone;
- on one device they take at most TIME_RATIO of the sum of their times alone, streamed and from RAM;
- in two processes they take at most DEVICES_RATIO of the time in one (checked on two cores, where
  each process has one thread, and not with --quick, where starting takes longer than the work);
- each ends with exactly the losses that it has alone.

What is read is counted by the operating system, on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
from reporting import Bound, Machine, Report, duration, significant
from train import write_store

from sam3cache.runtime import num_cpu_cores, pick_device
from sam3cache.training import TrainConfig, TrainResult, plan_runs, run_experiments, train
from sam3cache.training.together import train_together

BYTES_RATIO = 0.15
TIME_RATIO = 1.05
DEVICES_RATIO = 0.6
NUM_TRAIN, NUM_VAL, NUM_EPOCHS = 96, 20, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    num_train = options.samples or (8 if options.quick else NUM_TRAIN)
    rounds = 1 if options.quick else 3
    machine = Machine(device)
    alone: dict[str, list[float]] = {"stream": [], "ram": []}
    together: dict[str, list[float]] = {"stream": [], "ram": []}
    read_alone: list[int] = []
    read_together: list[int] = []
    by_processes: dict[int, list[float]] = {1: [], 2: []}
    num_unequal = 0
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
        root = Path(folder)
        num_val = max(1, round(num_train * NUM_VAL / NUM_TRAIN))
        print(f"Writing a store of {num_train} + {num_val} samples", flush=True)
        store = write_store(root / "synthetic.zarr", num_train, num_val)
        configs = eight(store, root, device, options.quick)
        for number in range(rounds):
            for residency in ("stream", "ram"):
                print(f"Round {number + 1} of {rounds}: {residency}", flush=True)
                own = [replace(config, residency=residency) for config in configs]
                losses, seconds, num_bytes = train_alone(own)
                alone[residency].append(seconds)
                joint_losses, joint_seconds, joint_bytes = train_jointly(own)
                together[residency].append(joint_seconds)
                num_unequal += losses != joint_losses
                if residency == "stream":
                    read_alone.append(num_bytes)
                    read_together.append(joint_bytes)
            if device == "cpu":
                for num_processes in by_processes:
                    print(f"Round {number + 1} of {rounds}: {num_processes} processes", flush=True)
                    by_processes[num_processes].append(train_in_processes(configs, num_processes))

    rows, bounds = [], []
    for residency, name in (("stream", "streamed"), ("ram", "from RAM")):
        ratio = median(together[residency]) / median(alone[residency])
        cells = (duration(median(alone[residency])), duration(median(together[residency])))
        rows.append((f"eight heads, {name}", *cells, f"{significant(ratio)} ×"))
        claim = f"{name} together, at most {TIME_RATIO:g} of the sum of the times alone"
        bounds.append(Bound(claim, ratio, ratio <= TIME_RATIO))
    if read_alone[0]:
        ratio = median(read_together) / median(read_alone)
        sizes = (f"{median(read_alone) / 1e9:.2g} GB", f"{median(read_together) / 1e9:.2g} GB")
        rows.append(("read from the store, streamed", *sizes, f"{significant(ratio)} ×"))
        claim = f"streamed together, at most {BYTES_RATIO:g} of the bytes read alone"
        bounds.append(Bound(claim, ratio, ratio <= BYTES_RATIO))
    if device == "cpu":
        ratio = median(by_processes[2]) / median(by_processes[1])
        cells = tuple(duration(median(seconds)) for seconds in by_processes.values())
        rows.append(("one process, and two (`cpu:2`)", *cells, f"{significant(ratio)} ×"))
        if not options.quick and num_cpu_cores() == 2:
            claim = f"two processes take at most {DEVICES_RATIO:g} of the time of one"
            bounds.append(Bound(claim, ratio, ratio <= DEVICES_RATIO))
    bounds.append(Bound("each run's losses are those of it alone", num_unequal, num_unequal == 0))
    return Report(
        program="experiments",
        columns=("", "alone", "together", "ratio"),
        rows=rows,
        notes=[
            f"{num_train} + {num_val} samples, {configs[0].epochs} epochs, batches of "
            f"{configs[0].batch_size}; medians of {rounds} rounds in alternation, on synthetic "
            "features. Starting processes is in their times."
        ],
        bounds=bounds,
        figures={
            "alone_s": alone,
            "together_s": together,
            "read_alone_bytes": read_alone,
            "read_together_bytes": read_together,
            "in_processes_s": {str(number): s for number, s in by_processes.items()},
        },
        settings={
            "num_train": num_train,
            "num_val": num_val,
            "epochs": configs[0].epochs,
            "batch_size": configs[0].batch_size,
            "loss_size_px": configs[0].loss_size_px,
        },
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="8 samples, in under a minute")
    parser.add_argument("--samples", type=int, metavar="N", help="training samples [96]")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--workdir", type=Path, help="where the store lies meanwhile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    return parser.parse_args(arguments)


def eight(store: Path, root: Path, device: str, quick: bool) -> list[TrainConfig]:
    """Return eight experiments of the kind that one compares."""
    base = TrainConfig(
        store=str(store),
        name="base",
        output=str(root / "runs"),
        device=device,
        epochs=1 if quick else NUM_EPOCHS,
        batch_size=4 if quick else 16,
        loss_size_px=126 if quick else 504,
        overwrite=True,
    )
    conv = {"head": "film-conv", "head_options": {"widths": [16, 8]} if quick else {}}
    return [
        replace(base, name=f"{number}", learning_rate=rate, **settings)
        for number, (rate, settings) in enumerate(
            (rate, settings)
            for rate in (1e-4, 3e-4, 1e-3, 3e-3)
            for settings in (conv, {"head": "linear"})
        )
    ]


def train_alone(configs: Sequence[TrainConfig]) -> tuple[list[list[float]], float, int]:
    """Train one after the other; return losses, seconds and bytes read."""
    begun_s, begun_bytes = time.perf_counter(), bytes_read()
    for config in configs:
        train(config)
    seconds, num_bytes = time.perf_counter() - begun_s, bytes_read() - begun_bytes
    return losses_of(configs), seconds, num_bytes


def train_jointly(configs: Sequence[TrainConfig]) -> tuple[list[list[float]], float, int]:
    """Train all as ``sam3cache train --experiments`` does on a device; return the same."""
    begun_s, begun_bytes = time.perf_counter(), bytes_read()
    outcomes = list(train_together(configs))
    seconds, num_bytes = time.perf_counter() - begun_s, bytes_read() - begun_bytes
    assert all(isinstance(outcome, TrainResult) for _, outcome in outcomes), outcomes
    return losses_of(configs), seconds, num_bytes


def train_in_processes(configs: Sequence[TrainConfig], num_processes: int) -> float:
    """Train all in some processes of one thread each; return seconds."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        begun_s = time.perf_counter()
        outcomes = run_experiments(plan_runs(configs), ["cpu"] * num_processes)
        seconds = time.perf_counter() - begun_s
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    assert all(outcome.status == "done" for outcome in outcomes), outcomes
    return seconds


def losses_of(configs: Sequence[TrainConfig]) -> list[list[float]]:
    """Read the losses of runs, and remove them."""
    losses = []
    for config in configs:
        lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["train_loss"] for line in lines])
        shutil.rmtree(config.run_dir)
    return losses


def bytes_read() -> int:
    """Return what this process has read from files so far; 0 where nobody counts."""
    return int(psutil.Process().io_counters().read_chars) if sys.platform == "linux" else 0


if __name__ == "__main__":
    raise SystemExit(main())
