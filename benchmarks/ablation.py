"""The heads side by side, what batch size costs, and what the angles are worth to branch labels.

Phantoms of this program's own seed go through sam3-mini once. Then, each with several seeds, in
turn:

- heads: the default (film-detail), the same of the picture alone (stem only) and of the features
  alone, film-conv and linear, trained on 20 patients (80 pictures) for 6 epochs in batches of 4;
- batch size: film-conv on 512 pictures for BATCH_EPOCHS epochs in batches of 16 to 512, with the
  learning rate of a batch of 16: equal epochs, so the larger the batch, the fewer the steps. For
  LARGER_BATCH also with that rate times the square root of batch / 16, without and with half of
  the training as warm-up, and with as many steps as a batch of 16 makes;
- branches: the default head for the 14 or so branches of a coronary tree, each pixel of one of them
  or of none, with the view angles, and with the angles unknown in training and test alike; their
  loss on a grid of BRANCHES_LOSS_PX, as docs/heads.md advises for many classes on a CPU.

Dice is the mean over the test patients' pictures, as `sam3cache eval` has it; of branches the mean
over those that a picture shows. The interval is Student's, 95%, over the seeds' means: it says how
much of a difference is the luck of a seed, not of a choice of patients.

Exits with 1 when a bound is missed (not checked with --quick: too few steps):

- a default batch size other than BATCHES[0] loses at most MAX_LOSS Dice against it at equal epochs;
- the whole table takes at most MAX_MIN minutes.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from heads import VIEWS, Scores
from reporting import Bound, Machine, Report, duration, interval_text

from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.relabel import (
    AnnotationsConfig,
    LabelsConfig,
    set_annotations,
    set_labels,
)
from sam3cache.images import parse_classes
from sam3cache.images.phantom import make_phantoms
from sam3cache.runtime import pick_device
from sam3cache.training import TrainConfig, train

PHANTOM_SEED = 7_103
NUM_SEEDS = 3
MAX_LOSS = 0.01
MAX_MIN = 60.0
BATCHES = (16, 64, 128, 512)
PARTS = ("heads", "batch", "branches")
LARGER_BATCH = 64
BATCH_EPOCHS = 2
BRANCHES_LOSS_PX = 252
BRANCHES, BLIND = "branches", "blind"


@dataclass(frozen=True)
class Contestant:
    """One line of the table.

    Attributes:
        part: "heads", "batch" or "branches".
        label: in the table.
        settings: of the training.
        against: label of the line that it is compared with; empty for none.
    """

    part: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str = ""


_SMALL = {"epochs": 6, "batch_size": 4}
_DEFAULT = "`film-detail`, the default"
_WITH_ANGLES = "branches, with the angles"


def contestants() -> list[Contestant]:
    """Return the lines of the table."""
    lines = [
        Contestant("heads", _DEFAULT, _SMALL),
        Contestant(
            "heads",
            "the picture alone",
            _SMALL | {"head_options": {"use_features": False}},
            _DEFAULT,
        ),
        Contestant(
            "heads", "the features alone", _SMALL | {"head_options": {"use_image": False}}, _DEFAULT
        ),
        Contestant(
            "heads", "`film-conv`", _SMALL | {"head": "film-conv", "learning_rate": 1e-3}, _DEFAULT
        ),
        Contestant("heads", "`linear`", _SMALL | {"head": "linear"}, _DEFAULT),
    ]
    scaled: dict[str, Any] = {"batch_size": LARGER_BATCH, "lr_scaling": "sqrt"}
    num_long = BATCH_EPOCHS * LARGER_BATCH // BATCHES[0]
    batches: list[tuple[str, dict[str, Any]]] = [
        *((f"batch {size}", {"batch_size": size}) for size in BATCHES),
        (f"batch {LARGER_BATCH}, rate × √(batch / 16)", scaled),
        (
            f"batch {LARGER_BATCH}, the same after a warm-up",
            scaled | {"warmup_epochs": BATCH_EPOCHS / 2},
        ),
        (
            f"batch {LARGER_BATCH}, {num_long} epochs: as many steps",
            {"batch_size": LARGER_BATCH, "epochs": num_long},
        ),
    ]
    common = {"head": "film-conv", "learning_rate": 1e-3, "epochs": BATCH_EPOCHS}
    for label, settings in batches:
        against = "" if label == batches[0][0] else f"`film-conv`, {batches[0][0]}"
        lines.append(Contestant("batch", f"`film-conv`, {label}", common | settings, against))
    branches = _SMALL | {"label_set": BRANCHES, "loss_size_px": BRANCHES_LOSS_PX}
    lines += [
        Contestant("branches", _WITH_ANGLES, branches),
        Contestant(
            "branches", "branches, all angles unknown", branches | {"overlay": BLIND}, _WITH_ANGLES
        ),
    ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine(pick_device(options.device))
    started_s = time.monotonic()
    lines = [line for line in contestants() if line.part in options.parts]
    if options.quick:
        lines = [
            shortened(line) for line in lines if "batch" not in line.label or "512" in line.label
        ]
    scores = {line.label: Scores() for line in lines}
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as name:
        stores = Stores(Path(name), options)
        for seed in range(options.seeds):
            for number, line in enumerate(lines):
                measure(line, stores, scores[line.label], f"{number}-{seed}", seed, options)
    return report(options, machine, lines, scores, time.monotonic() - started_s).publish(
        options.json
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 patients, an epoch, one seed")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts of the table; a result of some has their names [all]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--precision", default="auto", help="what heads compute in [auto]")
    parser.add_argument("--workdir", type=Path, help="where pictures and stores lie meanwhile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    options = parser.parse_args(arguments)
    options.seeds = 1 if options.quick else NUM_SEEDS
    return options


def shortened(line: Contestant) -> Contestant:
    """Return a line that takes seconds."""
    return replace(line, settings={**line.settings, "epochs": 1})


class Stores:
    """The stores of both numbers of pictures, each made when it is first asked for.

    Args:
        folder: where they lie.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._made: dict[str, Path] = {}

    def of(self, part: str) -> Path:
        """Return the store that a part of the table is measured on."""
        name = "many" if part == "batch" else "few"
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    @property
    def blind(self) -> Path:
        """The overlay in which no angle is known."""
        return self._folder / BLIND

    def _make(self, name: str) -> Path:
        num_train = {"many": 128, "few": 20}[name]
        splits = ["train"] * num_train + ["val"] * 4 + ["test"] * 14
        if self._options.quick:
            splits = ["train", "val", "test"]
        print(f"Drawing and extracting {VIEWS * len(splits)} phantoms", flush=True)
        pictures = self._folder / f"{name}-pictures"
        drawn = make_phantoms(pictures, VIEWS * len(splits), PHANTOM_SEED, views_per_patient=VIEWS)
        manifest = write_manifest(drawn, "split.csv", splits)
        store = self._folder / f"{name}.zarr"
        device = pick_device(self._options.device)
        extract(ExtractConfig(manifest, store, backbone="sam3-mini", devices=(device,)))
        if name == "few":
            classes = parse_classes(str(pictures / "classes.json"))
            set_labels(
                LabelsConfig(store, BRANCHES, manifest, classes=classes, mask_columns=("branches",))
            )
            blinded = write_manifest(drawn, "blind.csv", splits, angles=False)
            set_annotations(
                AnnotationsConfig(
                    store, blinded, only=("primary_angle", "secondary_angle"), overlay=self.blind
                )
            )
        return store


def write_manifest(drawn: Path, name: str, splits: Sequence[str], *, angles: bool = True) -> Path:
    """Write a manifest beside the phantoms' own, with patients split as this program wants them."""
    with drawn.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({row["group"] for row in rows})
    for row in rows:
        row["split"] = splits[patients.index(row["group"])]
        if not angles:
            row["primary_angle"] = row["secondary_angle"] = ""
    manifest = drawn.with_name(name)
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def measure(
    line: Contestant,
    stores: Stores,
    scores: Scores,
    name: str,
    seed: int,
    options: argparse.Namespace,
) -> None:
    """Train and evaluate a contestant with a seed, and add what it reached to its scores."""
    store, device = stores.of(line.part), pick_device(options.device)
    settings = dict(line.settings)
    overlay = str(stores.blind) if settings.pop("overlay", None) else None
    result = train(
        TrainConfig(
            store=str(store),
            name=name,
            output=str(store.parent / "runs"),
            seed=seed,
            device=device,
            precision=options.precision,
            overlay=overlay,
            **settings,
        )
    )
    found = evaluate(
        EvalConfig(
            store,
            result.run_dir,
            device=device,
            check_angles=False,
            check_features=False,
            page=False,
            overlay=None if overlay is None else Path(overlay),
        )
    )
    dice = found.overall["dice"].mean
    scores.dice.append(0.0 if dice is None else dice)
    scores.train_s.append(result.elapsed_s)
    scores.parameters, scores.gflop = result.parameters["total"], result.gflop
    print(
        f"seed {seed}: {line.label} {scores.dice[-1]:.4f} (validation {result.best_dice:.4f}, "
        f"{duration(result.elapsed_s)})",
        flush=True,
    )


def report(
    options: argparse.Namespace,
    machine: Machine,
    lines: Sequence[Contestant],
    scores: Mapping[str, Scores],
    elapsed_s: float,
) -> Report:
    """Lay out what was found, and check the bounds."""
    rows, bounds = [], []
    is_whole = set(options.parts) == {*PARTS}
    for line in lines:
        own = scores[line.label]
        row = [line.label, f"{own.parameters / 1e6:.2f} M", f"{own.gflop:.1f}"]
        row += [f"{mean(own.dice):.3f}", interval_text(own.dice, within=(0.0, 1.0))]
        differences: list[float] = []
        if line.against in scores:
            pairs = zip(own.dice, scores[line.against].dice, strict=True)
            differences = [mine - theirs for mine, theirs in pairs]
        row += [f"{mean(differences):+z.3f}" if differences else ""]
        row += [interval_text(differences, sign=True) if differences else ""]
        row.append(duration(median(own.train_s)))
        rows.append(row)
    default_batch = f"`film-conv`, batch {TrainConfig('', 'x').batch_size}"
    first_batch = f"`film-conv`, batch {BATCHES[0]}"
    if not options.quick:
        # A default that is the reference itself loses nothing: there is nothing to check.
        if default_batch in scores and first_batch in scores and default_batch != first_batch:
            loss = mean(scores[first_batch].dice) - mean(scores[default_batch].dice)
            claim = f"the default batch loses at most {MAX_LOSS} Dice against {BATCHES[0]}"
            bounds.append(Bound(claim, loss, loss <= MAX_LOSS))
        minutes = elapsed_s / 60
        claim = f"the table takes at most {MAX_MIN:g} min"
        bounds.append(Bound(claim, minutes, minutes <= MAX_MIN))
    return Report(
        program="-".join(["ablation", *(() if is_whole else options.parts)]),
        columns=(
            "`sam3-mini` features of phantoms",
            "parameters",
            "GFLOP",
            "Dice",
            "95% over seeds",
            "difference",
            "95% over seeds",
            "training",
        ),
        rows=rows,
        notes=[
            f"Mean over {options.seeds} seeds of mean Dice over the test pictures, of patients "
            "that neither heads nor sam3-mini have seen; differences seed by seed: of heads to the "
            f"default, of batches to {BATCHES[0]}, of unknown angles to known ones. Intervals are "
            "Student's over the seeds.",
            f"Heads and branches: 80 pictures, {_SMALL['epochs']} epochs in batches of "
            f"{_SMALL['batch_size']}. Batches: 512 pictures, {BATCH_EPOCHS} epochs, so that "
            f"batch {BATCHES[-1]} makes {BATCH_EPOCHS * 512 // BATCHES[-1]} steps and batch "
            f"{BATCHES[0]} {BATCH_EPOCHS * 512 // BATCHES[0]}. Learning rates are the heads' own "
            "but 0.001 for `film-conv`, higher for so few steps.",
            "sam3-mini is a miniature that learned from the masks of other phantoms: none of this "
            "says how good SAM 3 is.",
        ],
        bounds=bounds,
        figures={label: vars(own) for label, own in scores.items()},
        settings={
            "phantom_seed": PHANTOM_SEED,
            "seeds": options.seeds,
            "parts": list(options.parts),
            "precision": options.precision,
        },
        machine=machine.fields(),
    )


if __name__ == "__main__":
    raise SystemExit(main())
