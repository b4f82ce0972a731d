"""What caching costs in quality: augmentation of a cached head, against the tower in the loop.

Phantoms of this program's own seed go through sam3-mini once, with variants of the training
pictures (VIEWS). The default head then learns from the same 3 patients, in turn, with three seeds:

- without augmentation;
- with each of the free augmentations of `sam3cache train --augment`, and with all of them;
- with the stored variants, of which each epoch draws one a picture; and with both;
- with the tower in the loop: each picture is flipped, turned, and changed in gamma anew every time
  that it is seen, then goes through the frozen tower. That is what caching forgoes. Pictures lie
  decoded in memory, and changing them is left out of its time, both in its favour.

Two more with the tower in the loop tell whether loop and cache train alike: with pictures as they
are, which should reach what no augmentation does, and with the stored views, drawn with the cache's
chances, which should reach what variants do.

All have the head, the loss, the learning rate, the number of steps and the choice of the best
epoch by validation in common, and are measured on the same test patients as `sam3cache eval` does:
on their pictures as they are, and on the same pictures changed, once, as the loop changes those
that it learns from. That is where augmentation can help, if it does anywhere.

Times are of epochs by turns, after all trainings: an epoch of each, TIME_ROUNDS times.

Exits with 1 when a bound is missed (not checked with --quick: too few steps):

- an epoch with any free augmentation, and with all, takes at most FREE_TIME times one without;
- an epoch with variants takes at most VARIANTS_TIME times one without;
- an epoch with the tower in the loop takes at least LOOP_TIME times one without;
- on pictures as they are, each control is within CONTROL_DICE of what it should reach.

What each gains in Dice is told, whatever it is.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from heads import write_split
from numpy.typing import NDArray
from PIL import Image
from reporting import Bound, Machine, Report, duration, interval_text, significant
from torch import Tensor

from sam3cache.backbone import Tower, load_tower
from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import FeatureStore, StoredSample, open_store
from sam3cache.geometry import Letterbox
from sam3cache.heads import CheckpointInfo, build_head, save_checkpoint
from sam3cache.heads.checkpoint import read_record
from sam3cache.images import letterbox_image, read_image, read_manifest
from sam3cache.images.phantom import make_phantoms
from sam3cache.loading.augment import AUGMENTATIONS
from sam3cache.records import Batch
from sam3cache.runtime import pick_device
from sam3cache.training import TrainConfig, build_loss, default_loss, train
from sam3cache.training.config import resolve_precision
from sam3cache.variants import Variant

HEAD = "film-detail"
PHANTOM_SEED = 7_003
VIEWS = ("hflip", "rot10", "rot-10", "gamma1.5")
FREE = tuple(AUGMENTATIONS)

MAX_ROTATION_DEG, MAX_GAMMA = 10.0, 1.5
LOSS_PX, QUICK_LOSS_PX = 1008, 504

FREE_TIME = 1.3
VARIANTS_TIME = 1.2
LOOP_TIME = 1.2
CONTROL_DICE = 0.02
TIME_ROUNDS = 5

# Patients of four pictures each, in short of two.
VIEWS_A_PATIENT, QUICK_VIEWS_A_PATIENT = 4, 2
SPLITS = ("train",) * 3 + ("val",) * 2 + ("test",) * 10
QUICK_SPLITS = ("train", "val", "test")


Draw = Callable[[np.random.Generator], Sequence[Variant]]
"""What a picture is changed by, at random."""


@dataclass
class Contestant:
    """A way to train.

    Attributes:
        label: in the table.
        augment: names of free augmentations.
        variants: as for ``TrainConfig``.
        draw: of the tower in the loop; None: from the cache.
        control_of: label of another that it should reach as much as.
        dice: by seed, mean over the test pictures as they are.
        dice_changed: by seed, mean over the same pictures, changed.
        epoch_s: by round, how long an epoch trained, validation left out.
    """

    label: str
    augment: tuple[str, ...] = ()
    variants: str = "none"
    draw: Draw | None = None
    control_of: str = ""
    dice: list[float] = field(default_factory=list)
    dice_changed: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)


NONE, ALL_FREE, VARIANTS = "no augmentation", "all free ones", "variants"
IN_LOOP = "tower in the loop, pictures changed anew"


def contestants(*, quick: bool) -> list[Contestant]:
    """Return the lines of the table."""
    found = [
        Contestant(NONE),
        *(Contestant(f"`{name}`", (name,)) for name in FREE),
        Contestant(ALL_FREE, FREE),
        Contestant(VARIANTS, variants="all"),
        Contestant("variants and all free ones", FREE, "all"),
        Contestant(
            "control: tower in the loop, pictures as they are", draw=draw_none, control_of=NONE
        ),
        Contestant(
            "control: tower in the loop, the stored views", draw=draw_stored, control_of=VARIANTS
        ),
        Contestant(IN_LOOP, draw=draw_anew),
    ]
    return [c for c in found if not quick or c.label in (NONE, ALL_FREE, VARIANTS, IN_LOOP)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine(options.device)
    entered = contestants(quick=options.quick)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as name:
        folder = Path(name)
        splits, views = options.splits, options.views_a_patient
        print(f"Drawing {views * len(splits)} phantoms", flush=True)
        drawn = make_phantoms(
            folder / "pictures", views * len(splits), PHANTOM_SEED, views_per_patient=views
        )
        manifest = write_split(drawn, "10 patients, 5 epochs", splits)
        store, costs = extract_views(manifest, folder / "views.zarr", options.device)
        changed = extract_changed(store, manifest, folder / "changed", options.device)
        loop = Loop(store, manifest, options.device)

        def run(contestant: Contestant, name: str, seed: int, epochs: int) -> TrainConfig:
            """Train, and leave a run's folder."""
            config = TrainConfig(
                store=str(store.path),
                name=name,
                output=str(folder),
                head=HEAD,
                epochs=epochs,
                batch_size=4,
                loss_size_px=QUICK_LOSS_PX if options.quick else LOSS_PX,
                seed=seed,
                device=options.device,
                precision=options.precision,
                augment=contestant.augment,
                variants=contestant.variants,
                overwrite=True,
            )
            if contestant.draw is None:
                train(config)
                contestant.epoch_s = epoch_times(config.run_dir)
            else:
                first = read_record(folder / "0-0" / "best")
                contestant.epoch_s = loop.train(config, first, contestant.draw)
            return config

        for seed in range(options.seeds):
            for number, contestant in enumerate(entered):
                config = run(contestant, f"{number}-{seed}", seed, options.epochs)
                for kept, root in (
                    (contestant.dice, store.path),
                    (contestant.dice_changed, changed),
                ):
                    kept.append(dice(root, config.run_dir, "test", options.device))
                print(
                    f"seed {seed}: {contestant.label} {contestant.dice[-1]:.4f}, on changed "
                    f"pictures {contestant.dice_changed[-1]:.4f}",
                    flush=True,
                )
        tower_s = loop.tower_s / max(1, loop.num_images)
        print("Epochs by turns", flush=True)
        times: dict[str, list[float]] = {contestant.label: [] for contestant in entered}
        for turn in range(options.time_rounds):
            # Each begins as often as any other.
            for contestant in (*entered[turn % len(entered) :], *entered[: turn % len(entered)]):
                run(contestant, "timed", seed=turn, epochs=2)
                times[contestant.label].append(contestant.epoch_s[-1])
        for contestant in entered:
            contestant.epoch_s = times[contestant.label]
    return report(options, machine, entered, costs, tower_s).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 patients, one epoch, one seed, under a minute"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training [30]")
    parser.add_argument("--precision", default="auto", help="what heads compute in [auto]")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--workdir", type=Path, help="where pictures and stores lie meanwhile")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    options = parser.parse_args(arguments)
    options.device = pick_device(options.device)
    options.seeds = 1 if options.quick else 3
    options.splits = QUICK_SPLITS if options.quick else SPLITS
    options.views_a_patient = QUICK_VIEWS_A_PATIENT if options.quick else VIEWS_A_PATIENT
    options.epochs = options.epochs or (1 if options.quick else 30)
    options.time_rounds = 1 if options.quick else TIME_ROUNDS
    return options


def extract_views(manifest: Path, root: Path, device: str) -> tuple[FeatureStore, dict[str, float]]:
    """Extract the pictures, then variants of those for training; return what the latter cost."""
    config = ExtractConfig(manifest, root, backbone="sam3-mini", devices=(device,))
    print("Extracting", flush=True)
    first = extract(config)
    bytes_before = level_bytes(open_store(root))
    print("Extracting variants", flush=True)
    second = extract(replace(config, variants=VIEWS))
    store = open_store(root)
    return store, {
        "first_pass_s": first.elapsed_s,
        "variants_s": second.elapsed_s,
        "first_pass_bytes": bytes_before,
        "variants_bytes": level_bytes(store) - bytes_before,
    }


def extract_changed(store: FeatureStore, manifest: Path, folder: Path, device: str) -> Path:
    """Change the test pictures as the loop does those that it learns from; return their store."""
    files = {sample.id: sample for sample in read_manifest(manifest).samples}
    folder.mkdir()
    random = np.random.default_rng(PHANTOM_SEED)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ("id", "image", "mask", "primary_angle", "secondary_angle", "split", "group")
        )
        for sample in store.samples:
            mask_KHW = store.read_mask(sample.row)
            if sample.split != "test" or mask_KHW is None:
                continue
            picture = Picture(sample, read_image(files[sample.id]), mask_KHW).changed(
                draw_anew(random)
            )
            # What the picture does not show any more is no vessel.
            mask_HW = np.where(picture.mask_KHW[0] == 1, 255, 0).astype(np.uint8)
            Image.fromarray(picture.pixels_HWC.squeeze()).save(folder / f"{sample.id}.png")
            Image.fromarray(mask_HW).save(folder / f"{sample.id}-mask.png")
            names = (f"{sample.id}.png", f"{sample.id}-mask.png")
            table.writerow((sample.id, *names, *picture.angles_deg, "test", sample.group))
    root = folder.with_suffix(".zarr")
    extract(ExtractConfig(folder / "manifest.csv", root, backbone="sam3-mini", devices=(device,)))
    return root


def level_bytes(store: FeatureStore) -> int:
    """Return what a store's levels take."""
    return sum(
        shard.size_bytes
        for (item, _), receipt in store.receipts.items()
        if item.startswith("levels.")
        for shard in receipt.shards
    )


def epoch_times(run_dir: Path) -> list[float]:
    """Return how long each epoch of a run trained."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    num_train = read_record(run_dir / "last").settings["num_train"]
    return [num_train / json.loads(line)["images_per_s"] for line in lines]


def dice(store: Path, checkpoint: Path, split: str, device: str) -> float:
    """Return the mean Dice over the images of a split."""
    config = EvalConfig(
        store,
        checkpoint,
        output=checkpoint / f"eval-{store.stem}-{split}",
        split="val" if split == "val" else "test",
        device=device,
        check_angles=False,
        check_features=False,
        page=False,
    )
    (metrics,) = evaluate(config).classes.values()
    value = metrics["dice"].mean
    assert value is not None
    return value


@dataclass(frozen=True)
class Picture:
    """A training picture as a script without a cache has it: decoded, with its mask."""

    sample: StoredSample
    pixels_HWC: NDArray[np.uint8]
    mask_KHW: NDArray[np.uint8]
    angles_deg: tuple[float, float] = (math.nan, math.nan)

    def changed(self, variants: Sequence[Variant]) -> Picture:
        """Return it as variants make it, one after the other."""
        sample, pixels_HWC, mask_KHW = self.sample, self.pixels_HWC, self.mask_KHW
        angles_deg = (sample.primary_angle_deg, sample.secondary_angle_deg)
        for variant in variants:
            pixels_HWC = variant.picture(pixels_HWC)
            mask_KHW = variant.mask(mask_KHW, sample.height_px, sample.width_px)
            angles_deg = variant.angles(*angles_deg)
        return Picture(sample, pixels_HWC, mask_KHW, angles_deg)


class Loop:
    """A script without a cache: image augmentation and the frozen tower in every step.

    Attributes:
        prepare_s: time in which pictures were changed so far; a script would have other processes
            do so meanwhile.
        tower_s: time in the tower so far.
        num_images: images that went through it.
    """

    def __init__(self, store: FeatureStore, manifest: Path, device: str) -> None:
        files = {sample.id: sample for sample in read_manifest(manifest).samples}
        self.store, self.device = store, device
        self.pictures: list[Picture] = []
        for sample in store.samples:
            mask_KHW = store.read_mask(sample.row)
            if sample.split == "train" and mask_KHW is not None:
                self.pictures.append(Picture(sample, read_image(files[sample.id]), mask_KHW))
        self.tower: Tower = load_tower(
            "sam3-mini",
            levels=("fpn_72",),
            device=device,
            numeric_path="fp32" if device == "cpu" else "bf16",
        )
        self.prepare_s, self.tower_s, self.num_images = 0.0, 0.0, 0

    def train(self, config: TrainConfig, like: CheckpointInfo, draw: Draw) -> list[float]:
        """Train a head as ``sam3cache.training.train`` does; return the time of each epoch.

        Args:
            config: of the run.
            like: the record of a run from the cache, with which the head is written.
            draw: what a picture is changed by, each time that it is seen.
        """
        torch.manual_seed(config.seed)
        shapes = {name: spec.shape for name, spec in self.store.served_levels.items()}
        head = build_head(config.head, shapes, num_classes=like.num_classes).to(self.device)
        rate = float(like.settings["learning_rate"])
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=config.weight_decay)
        loss_of = build_loss(default_loss(like.task), like.task)
        random = np.random.default_rng(config.seed)
        steps_an_epoch = math.ceil(len(self.pictures) / config.batch_size)
        num_steps, step = steps_an_epoch * config.epochs, 0
        epoch_s, best = [], -1.0
        for epoch in range(1, config.epochs + 1):
            started_s, prepared_s = time.perf_counter(), self.prepare_s
            order = random.permutation(len(self.pictures)).tolist()
            head.train()
            for start in range(0, len(order), config.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
                chosen = order[start : start + config.batch_size]
                batch = self.batch(chosen, [draw(random) for _ in chosen], config)
                assert batch.target_BKTT is not None
                with autocast(config):
                    logits_BKHW: Tensor = head(batch)
                loss = loss_of(logits_BKHW.float(), batch.target_BKTT)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
                step += 1
            self.wait()
            elapsed_s = time.perf_counter() - started_s
            epoch_s.append(elapsed_s - (self.prepare_s - prepared_s))
            info = replace(like, epoch=epoch, settings={**like.settings, "name": config.name})
            save_checkpoint(config.run_dir / "last", head, info)
            reached = dice(self.store.path, config.run_dir / "last", "val", self.device)
            if reached > best:
                best = reached
                save_checkpoint(config.run_dir / "best", head, info)
        return epoch_s

    def batch(
        self, order: Sequence[int], changes: Sequence[Sequence[Variant]], config: TrainConfig
    ) -> Batch:
        """Change pictures and put them through the tower."""
        started_s = time.perf_counter()
        images, targets, angles, contents = [], [], [], []
        for i, variants in zip(order, changes, strict=True):
            picture = self.pictures[i].changed(variants)
            square_CHW, box = letterbox_image(picture.pixels_HWC)
            images.append(square_CHW)
            targets.append(target_of(box, picture.mask_KHW, config.loss_size_px))
            angles.append(picture.angles_deg)
            contents.append((box.content_height_px, box.content_width_px))
        self.prepare_s += time.perf_counter() - started_s
        image_BCHW = torch.stack(images).to(self.device)
        self.wait()
        started_s = time.perf_counter()
        feature_BCHW = self.tower(image_BCHW)["fpn_72"].to(torch.float16)
        self.wait()
        self.tower_s += time.perf_counter() - started_s
        self.num_images += len(order)
        return Batch(
            levels={"fpn_72": feature_BCHW, "image_1008": image_BCHW},
            angles_B2=torch.tensor(angles, dtype=torch.float32, device=self.device),
            content_B2=torch.tensor(contents, device=self.device),
            target_BKTT=torch.stack(targets).to(self.device),
            rows=tuple(self.pictures[i].sample.row for i in order),
        )

    def wait(self) -> None:
        """Let a GPU catch up."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def autocast(config: TrainConfig) -> torch.autocast | nullcontext[None]:
    """Compute as the training from the cache does."""
    precision = resolve_precision(config.precision, config.device)
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(torch.device(config.device).type, dtype)


def draw_none(random: np.random.Generator) -> list[Variant]:
    """Leave a picture as it is."""
    del random
    return []


def draw_stored(random: np.random.Generator) -> list[Variant]:
    """Take the picture or one of VIEWS, with equal chances, as an epoch from the cache does."""
    view = random.choice(["", *VIEWS])
    return [Variant.parse(view)] if view else []


def draw_anew(random: np.random.Generator) -> list[Variant]:
    """Change a picture by all the kinds of VIEWS, by any amount between."""
    changes = [
        Variant("rot", float(random.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG))),
        Variant("gamma", float(MAX_GAMMA ** random.uniform(-1, 1))),
    ]
    return changes if random.random() < 0.5 else [Variant("hflip"), *changes]


def target_of(box: Letterbox, mask_KHW: NDArray[np.uint8], size_px: int) -> Tensor:
    """Lay a mask on the target's grid."""
    return box.mask_to_target(torch.from_numpy(np.ascontiguousarray(mask_KHW)), size_px)


def report(
    options: argparse.Namespace,
    machine: Machine,
    entered: Sequence[Contestant],
    costs: dict[str, float],
    tower_s: float,
) -> Report:
    """Lay out what was found, and check the bounds."""
    by_label = {contestant.label: contestant for contestant in entered}
    plain = by_label[NONE]

    def slower(contestant: Contestant) -> float:
        pairs = zip(contestant.epoch_s, plain.epoch_s, strict=True)
        return median(own / without for own, without in pairs)

    rows = []
    for contestant in entered:
        cells = [contestant.label]
        for own, base in (
            (contestant.dice, plain.dice),
            (contestant.dice_changed, plain.dice_changed),
        ):
            gains = [mine - theirs for mine, theirs in zip(own, base, strict=True)]
            cells.append(f"{mean(own):.3f}")
            cells.append("" if contestant is plain else f"{mean(gains):+z.3f}")
            cells.append("" if contestant is plain else interval_text(gains, sign=True))
        cells += [duration(median(contestant.epoch_s)), f"{significant(slower(contestant))} ×"]
        rows.append(cells)
    limits = [
        *((c.label, "at most", FREE_TIME) for c in entered if c.augment and c.variants == "none"),
        (VARIANTS, "at most", VARIANTS_TIME),
        (IN_LOOP, "at least", LOOP_TIME),
    ]
    bounds = []
    for label, word, limit in () if options.quick else limits:
        ratio = slower(by_label[label])
        holds = ratio <= limit if word == "at most" else ratio >= limit
        bounds.append(Bound(f"{label}: an epoch takes {word} {limit} × one without", ratio, holds))
    for contestant in () if options.quick else entered:
        if contestant.control_of:
            other = by_label[contestant.control_of]
            apart = abs(mean(contestant.dice) - mean(other.dice))
            claim = f"{contestant.label}: within {CONTROL_DICE} of {other.label}"
            bounds.append(Bound(claim, apart, apart <= CONTROL_DICE))
    counts = {
        name: options.views_a_patient * options.splits.count(name) for name in ("train", "test")
    }
    return Report(
        program="augmentation",
        columns=(
            "training",
            "Dice",
            "gained",
            "95% over seeds",
            "Dice, changed pictures",
            "gained",
            "95% over seeds",
            "an epoch",
            "against none",
        ),
        rows=rows,
        notes=[
            f"`{HEAD}` on sam3-mini's features of {counts['train']} synthetic angiograms of "
            f"{options.splits.count('train')} patients, {options.epochs} epochs in batches of 4, "
            f"heads in {options.precision}. Dice: mean of {options.seeds} seeds over "
            f"{counts['test']} pictures of other patients, as they are, and changed once as the "
            "loop changes its own. What is gained is of each seed against no augmentation, with "
            "Student's interval.",
            f"Variants: {', '.join(VIEWS)}; extracting them took {duration(costs['variants_s'])} "
            f"and {costs['variants_bytes'] / 1e6:.0f} MB once, all pictures themselves "
            f"{duration(costs['first_pass_s'])} and {costs['first_pass_bytes'] / 1e6:.0f} MB. In "
            f"the loop every picture is flipped half the time, turned by up to "
            f"{MAX_ROTATION_DEG:g} degrees and raised to a gamma of up to {MAX_GAMMA:g} or its "
            f"inverse. Times: medians of {options.time_rounds} epochs, by turns.",
            f"sam3-mini is a miniature: its tower takes {significant(tower_s)} s an image here. "
            "SAM 3's own takes far longer (`benchmarks/train.py --full`), every time in the loop.",
        ],
        bounds=bounds,
        figures={
            "dice": {c.label: c.dice for c in entered},
            "dice_changed": {c.label: c.dice_changed for c in entered},
            "epoch_s": {c.label: c.epoch_s for c in entered},
            "tower_s_per_image": tower_s,
            **costs,
        },
        settings={
            "phantom_seed": PHANTOM_SEED,
            "head": HEAD,
            "epochs": options.epochs,
            "batch_size": 4,
            "precision": options.precision,
            "variants": VIEWS,
            "augmentations": {name: dict(values) for name, values in AUGMENTATIONS.items()},
        },
        machine=machine.fields(),
    )


if __name__ == "__main__":
    raise SystemExit(main())
