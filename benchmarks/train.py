"""A head trained from the cache, against the same head with the frozen tower in the loop.

The job: film-conv, 521 training and 111 validation images, 30 epochs in batches of 16, its loss at
1008 px. A store of that size is written first, of noise and synthetic masks: speed does not depend
on values. Then one real ``sam3cache.training.train`` goes through an epoch of it, and is halted
between its steps for steps of a script without a cache: letterboxed pixels, through the tower, to
the same head, loss and optimizer. Reading and decoding images is left out of the latter, in its
favour. The loss is measured by itself too, against PyTorch's interpolation with MONAI's.

Then epochs of training alone, by turns: from RAM (and the device's memory, on a GPU) and streamed,
against the same head on tensors in memory, which is the ceiling, and against what one writes in
twenty lines: a .npy file a sample, torch's DataLoader with workers. And ``linear``, which leaves
most to the reading, streamed, against the same files read and checked alone.

With --whole, the job as a user has it: as many pictures of an angiogram's size are written and
extracted (with SAM 3's tower on a GPU, with sam3-mini's elsewhere), ``film-conv`` learns 30 epochs
from that store, and the default head one. What passes from the start of the extraction to the best
checkpoint is its time; drawing pictures is no part of it.

Exits with 1 when a bound is missed:

- from RAM and from the device, training is at least CEILING_RATIO of the ceiling;
- streamed with ``linear``, at least STREAM_RATIO of the slower of reading alone and of the head on
  tensors in memory (its share of reading alone is told: a head that computes longer than its
  samples are read cannot reach that);
- the cache trains at least MINI_RATIO times as fast as with sam3-mini's tower in the loop, and,
  with --full, at least FULL_RATIO times as fast as with SAM 3's own;
- with --whole, the job takes at most WHOLE_MIN minutes (not checked with --quick or --samples);
- our loss is MONAI's within LOSS_DIFFERENCE, and at least LOSS_RATIO times as fast.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from pictures import write_pictures
from reporting import Bound, Machine, Report, alternate, duration, rate, significant
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sam3cache.backbone import load_tower
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import (
    BLOCK_ROWS,
    AnnotationRow,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    describe_store,
    open_store,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.heads import build_head
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch
from sam3cache.runtime import pick_device
from sam3cache.training import Progress, TrainConfig, dice_bce_loss, train
from sam3cache.training.loop import Run

HEAD, LEARNING_RATE = "film-conv", 1e-4
NUM_TRAIN, NUM_VAL, NUM_EPOCHS = 521, 111, 30
FRAME_PX, MASK_PX = 1016, 512

MINI_RATIO = 1.5
FULL_RATIO = 10.0
WHOLE_MIN = 45.0
CEILING_RATIO = 0.95
STREAM_RATIO = 0.9
LOSS_DIFFERENCE = 1e-5
LOSS_RATIO = 1.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    num_train = options.samples or (48 if options.quick else NUM_TRAIN)
    num_val = max(1, round(num_train * NUM_VAL / NUM_TRAIN))
    machine = Machine(device)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
        print(f"Writing a store of {num_train} + {num_val} samples", flush=True)
        store = write_store(Path(folder) / "synthetic.zarr", num_train, num_val)
        config = TrainConfig(
            store=str(store),
            name="epoch",
            head=HEAD,
            learning_rate=LEARNING_RATE,
            output=folder,
            device=device,
            epochs=1,
        )
        batch = one_batch(store, config)

        rivals = [Rival("sam3-mini", config, first(batch, 4) if options.quick else batch)]
        if options.full:
            print("Building SAM 3's tower with random weights", flush=True)
            # An image at a time: the tower takes all but a thousandth of its time.
            rivals.append(Rival("sam3", config, first(batch, 1), max_turns=2))
        print("Training an epoch, halted for steps with the tower in the loop", flush=True)
        # Some six turns an epoch, of whole steps.
        turn_images = config.batch_size * max(1, num_train // config.batch_size // 6)
        epoch = HaltedEpoch(rivals, num_train, turn_images)
        result = train(config, epoch)

        print("Comparing where samples lie, with tensors and with files of one's own", flush=True)
        rates = compare_roads(config, Path(folder), rounds=2 if options.quick else 5)

        print("Comparing losses", flush=True)
        ours_s, monai_s, difference = compare_losses(batch, rounds=3 if options.quick else 9)
        job = users_job(config, num_train, num_val) if options.whole else None

    batch_images = len(batch.rows)
    cached_rate = median(epoch.cached_rates)
    all_images = NUM_EPOCHS * NUM_TRAIN
    # Loading takes both splits; each epoch trains on the one and validates on the other.
    derived_s = result.load_s * (NUM_TRAIN + NUM_VAL) / num_train
    derived_s += all_images / cached_rate + NUM_EPOCHS * epoch.val_s * NUM_VAL / num_val

    rows = [
        (
            "from the cache, in turn with the tower",
            significant(cached_rate),
            duration(all_images / cached_rate),
            "",
        )
    ]
    bounds, names = [], {"sam3-mini": "`sam3-mini`'s tower in the loop"}
    names["sam3"] = "SAM 3's tower in the loop (random weights)"
    for rival, limit in zip(rivals, (MINI_RATIO, FULL_RATIO), strict=False):
        speed = rate(rival.seconds, len(rival.batch.rows))
        ratio = cached_rate / speed
        cells = (significant(speed), duration(all_images / speed), f"{significant(ratio)} ×")
        rows.append((names[rival.backbone], *cells))
        claim = f"the cache trains at least {limit:g} times as fast as {rival.backbone} in the loop"
        bounds.append(Bound(claim, ratio, ratio >= limit))
    for road, of_road in rates.items():
        speed = median(of_road)
        rows.append((ROADS[road], significant(speed), duration(all_images / speed), ""))
        if road in ("ram", "device"):
            ratio = speed / median(rates["tensors"])
            claim = f"{ROADS[road]}, at least {CEILING_RATIO:g} of the ceiling"
            bounds.append(Bound(claim, ratio, ratio >= CEILING_RATIO))
        if road == "linear":
            ratio = speed / min(median(rates["reading"]), median(rates["linear_tensors"]))
            claim = f"streamed, linear is at least {STREAM_RATIO:g} of the slower of disk and head"
            bounds.append(Bound(claim, ratio, ratio >= STREAM_RATIO))
    for name, seconds in (
        ("its loss alone", ours_s),
        ("that loss by interpolation and MONAI", monai_s),
    ):
        speed = rate(seconds, batch_images)
        rows.append((name, significant(speed), duration(all_images / speed), ""))
    loss_ratio = median(monai_s) / median(ours_s)
    rows[-1] = (*rows[-1][:-1], f"{significant(loss_ratio)} ×")
    bounds += [
        Bound(
            f"our loss is MONAI's within {LOSS_DIFFERENCE:g}",
            difference,
            difference <= LOSS_DIFFERENCE,
        ),
        Bound(
            f"our loss is at least {LOSS_RATIO:g} times as fast as MONAI's",
            loss_ratio,
            loss_ratio >= LOSS_RATIO,
        ),
    ]
    if job and num_train == NUM_TRAIN:
        job_min = (job.extract_s + job.train_s) / 60
        claim = f"the job takes at most {WHOLE_MIN:g} minutes"
        bounds.append(Bound(claim, job_min, job_min <= WHOLE_MIN))

    whole = (
        "The tower was in turn with the first row, all others with each other: these two groups "
        f"compare within themselves. 30 epochs with loading and validation: {duration(derived_s)}, "
        "derived."
    )
    if job:
        whole += (
            f" The job, run: {duration(job.extract_s)} to extract {num_train} + {num_val} pictures "
            f"with `{job.backbone}`, and {duration(job.train_s)} for {NUM_EPOCHS} epochs: "
            f"{duration(job.extract_s + job.train_s)} to the best checkpoint. An epoch of the "
            f"default head in {job.default_precision} took {duration(job.default_s)}, loading and "
            "validation included: a part of its training, the rest was not run."
        )
    turns = str(len(epoch.cached_rates))
    if options.full:
        turns += f" ({len(rivals[-1].seconds)} of SAM 3's tower)"
    return Report(
        program="train",
        columns=(
            f"`film-conv`, {result.precision}",
            "images/s",
            f"{NUM_EPOCHS} epochs of {NUM_TRAIN}",
            "ours is faster by",
        ),
        rows=rows,
        notes=[
            whole,
            f"Medians of {turns} turns in alternation, on synthetic features. `linear` streamed is "
            f"{significant(median(rates['linear']) / median(rates['reading']))} of reading alone.",
        ],
        bounds=bounds,
        figures={
            "cached_images_per_s": epoch.cached_rates,
            "in_loop_s_per_image": {
                rival.backbone: [s / len(rival.batch.rows) for s in rival.seconds]
                for rival in rivals
            },
            "road_images_per_s": rates,
            "loss_s_per_batch": {"ours": ours_s, "monai": monai_s},
            "loss_difference": difference,
            "load_s": result.load_s,
            "validation_s": epoch.val_s,
            "derived_job_s": derived_s,
            "job": asdict(job) if job else None,
        },
        settings={
            "num_train": num_train,
            "num_val": num_val,
            "batch_size": config.batch_size,
            "loss_size_px": config.loss_size_px,
            "precision": result.precision,
            "residency": result.residency,
            "parameters": result.parameters["total"],
        },
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="48 samples, in under a minute")
    parser.add_argument("--full", action="store_true", help="SAM 3's own tower too (minutes, 4 GB)")
    parser.add_argument(
        "--whole", action="store_true", help=f"run the job too: extract, {NUM_EPOCHS} epochs"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="training samples [521]")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument(
        "--workdir", type=Path, help="where the store of 1.7 GB lies meanwhile [temporary files]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    return parser.parse_args(arguments)


@dataclass
class Rival:
    """A script without a cache: the tower in every step, then the same head, loss and optimizer.

    Attributes:
        backbone: whose tower.
        config: of the training that it is compared with.
        batch: what a step learns; its features are made anew.
        max_turns: turns after which it has been measured enough.
        seconds: each step took; the first, to warm up, is left out.
    """

    backbone: str
    config: TrainConfig
    batch: Batch
    max_turns: int = 1000
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device, on_cpu = self.config.device, self.config.device == "cpu"
        self.tower = load_tower(
            self.backbone,
            weights="random",
            device=device,
            numeric_path="fp32" if on_cpu else "bf16",
        )
        self.head = build_head(HEAD, {"fpn_72": self.tower.spec.level_shape("fpn_72")})
        self.head.to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=LEARNING_RATE)
        size_px = self.tower.spec.size_px
        shape = (len(self.batch.rows), 1, size_px, size_px)
        self.pixels_BCHW = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.autocast = (
            nullcontext() if on_cpu else torch.autocast(torch.device(device).type, torch.bfloat16)
        )
        # On a CPU a few images at a time are as fast, and spare memory.
        self.micro_batch = 4 if on_cpu else 16
        self.num_turns = 0

    def turn(self) -> None:
        """Take a step and time it."""
        if self.num_turns > self.max_turns:
            return
        started_s = time.perf_counter()
        parts = self.pixels_BCHW.split(self.micro_batch)
        feature_BCHW = torch.cat([self.tower(part)["fpn_72"] for part in parts])
        assert self.batch.target_BKTT is not None
        with self.autocast:
            logits_BKHW = self.head(replace(self.batch, levels={"fpn_72": feature_BCHW}))
        loss = dice_bce_loss(logits_BKHW, self.batch.target_BKTT, self.config.bce_weight)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        loss.item()  # waits for a GPU
        if self.num_turns:
            self.seconds.append(time.perf_counter() - started_s)
        self.num_turns += 1


class HaltedEpoch:
    """Listens to a training, and halts it between steps for the rivals' turns.

    Attributes:
        cached_rates: images a second of the training's own turns.
        val_s: what came after the last step: validation and checkpoints.
    """

    def __init__(self, rivals: Sequence[Rival], num_images: int, turn_images: int) -> None:
        self.rivals, self.num_images, self.turn_images = rivals, num_images, turn_images
        self.cached_rates: list[float] = []
        self.val_s = math.nan
        self._begun: tuple[int, float] | None = None
        for rival in rivals:
            rival.turn()

    def __call__(self, progress: Progress) -> None:
        """Take over a report, which a training gives after a step, and around an epoch."""
        if progress.stage != "train":
            return
        num_done, now_s = progress.num_done, time.perf_counter()
        if self._begun is not None:
            num_before, before_s = self._begun
            if num_done == num_before == self.num_images:
                self.val_s = now_s - before_s
            if num_done == num_before or (
                num_done - num_before < self.turn_images and num_done < self.num_images
            ):
                return
            self.cached_rates.append((num_done - num_before) / (now_s - before_s))
            for rival in self.rivals:
                rival.turn()
        self._begun = num_done, time.perf_counter()


ROADS = {
    "tensors": "tensors in memory, the ceiling",
    "ram": "from RAM",
    "device": "from the device's memory",
    "stream": "streamed",
    "npy": "a `.npy` a sample, DataLoader",
    "reading": "reading alone",
    "linear_tensors": "`linear`, loss at 72 px, on tensors",
    "linear": "`linear`, loss at 72 px, streamed",
}


def compare_roads(config: TrainConfig, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Train epochs by each road in turn.

    Returns:
        By road, images a second in each round; validation is left out.
    """
    roads: dict[str, Callable[[], float]] = {"tensors": InMemory(config).epoch}
    for road in ("ram", "device", "stream"):
        if road != "device" or config.device != "cpu":
            own = replace(config, name=road, residency=road)
            roads[road] = CachedRun(own).epoch
    roads["npy"] = NpyFiles(config, folder / "npy-files").epoch
    # A loss as coarse as the features, so that nothing but reading is left to do.
    coarse = replace(config, name="linear", head="linear", residency="stream", loss_size_px=72)
    linear = CachedRun(coarse)
    roads |= {"reading": linear.read, "linear_tensors": InMemory(coarse).epoch}
    roads["linear"] = linear.epoch
    rates: dict[str, list[float]] = {road: [] for road in roads}
    for number in range(rounds + 1):
        for road, epoch in roads.items():
            images_per_s = epoch()
            if number:  # the first is to warm up
                rates[road].append(images_per_s)
    return rates


class CachedRun:
    """sam3cache's own loop, the training of an epoch at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self.run = Run(replace(config, epochs=1000))

    def epoch(self) -> float:
        """Train on an epoch; return images a second."""
        begun_s = time.perf_counter()
        for _ in self.run._train_epoch(1):
            pass
        if self.run.device != "cpu":
            torch.cuda.synchronize()
        return self.run.num_train / (time.perf_counter() - begun_s)

    def read(self) -> float:
        """Read an epoch's batches and do nothing with them; return images a second."""
        samples, config = self.run.train_samples, self.run.config
        begun_s = time.perf_counter()
        for _ in samples.iterate(config.batch_size, shuffle=True, piece_size=self.run.micro_batch):
            pass
        if self.run.device != "cpu":
            torch.cuda.synchronize()
        return len(samples) / (time.perf_counter() - begun_s)


class InMemory:
    """The ceiling: head, loss and optimizer on tensors that lie on the device."""

    def __init__(self, config: TrainConfig) -> None:
        self.run = Run(replace(config, name=f"{config.head}-tensors", residency="ram"))
        samples = self.run.train_samples
        self.size = self.run.micro_batch
        self.pieces = [
            samples.batch(range(at, min(at + self.size, len(samples))))
            for at in range(0, len(samples), self.size)
        ]

    def epoch(self) -> float:
        """Train on an epoch; return images a second."""
        return train_plainly(self.run, self.pieces)


class NpyFiles:
    """What one writes in twenty lines: a file a sample and array, read by worker processes."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.run = Run(replace(config, name="npy", residency="ram"))
        folder.mkdir()
        samples = self.run.train_samples
        for index in range(len(samples)):
            batch = samples.batch([index])
            assert batch.target_BKTT is not None
            np.save(folder / f"{index}.feature.npy", batch.levels["fpn_72"][0].cpu().numpy())
            np.save(folder / f"{index}.mask.npy", batch.target_BKTT[0].cpu().numpy())
            np.save(folder / f"{index}.angles.npy", batch.angles_B2[0].cpu().numpy())
        self.loader = DataLoader(
            NpyDataset(folder, len(samples)),
            batch_size=self.run.micro_batch,
            shuffle=True,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context="spawn",
            pin_memory=self.run.device != "cpu",
        )

    def epoch(self) -> float:
        """Train on an epoch; return images a second."""
        return train_plainly(self.run, map(self.batch, self.loader))

    def batch(self, arrays: Sequence[Tensor]) -> Batch:
        """Bring a batch to the device."""
        feature, mask, angles = (a.to(self.run.device, non_blocking=True) for a in arrays)
        content = torch.full((len(angles), 2), FRAME_PX, device=self.run.device)
        return Batch({"fpn_72": feature}, angles, content, mask, tuple(range(len(angles))))


class NpyDataset(Dataset[tuple[Tensor, ...]]):
    """Samples of three files each."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.folder, self.num_samples = folder, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        names = ("feature", "mask", "angles")
        return tuple(torch.from_numpy(np.load(self.folder / f"{index}.{n}.npy")) for n in names)


def train_plainly(run: Run, pieces: Iterable[Batch]) -> float:
    """Take an epoch's steps with a run's head, loss and optimizer; return images a second.

    Like the loop, a step a batch of so many pieces; without all that it does beside.
    """
    begun_s, num_seen = time.perf_counter(), 0
    batch_size = run.config.batch_size
    for piece in pieces:
        assert piece.target_BKTT is not None
        of_batch = min(batch_size, run.num_train - num_seen // batch_size * batch_size)
        with torch.autocast(
            torch.device(run.device).type, torch.bfloat16, enabled=run.precision == "bf16"
        ):
            logits_BKHW = run.head(piece)
        loss = run.loss(logits_BKHW.float(), piece.target_BKTT) * len(piece.rows) / of_batch
        loss.backward()
        num_seen += len(piece.rows)
        if num_seen % batch_size == 0 or num_seen == run.num_train:
            torch.nn.utils.clip_grad_norm_(run.head.parameters(), 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
    if run.device != "cpu":
        torch.cuda.synchronize()
    return num_seen / (time.perf_counter() - begun_s)


def compare_losses(batch: Batch, rounds: int) -> tuple[list[float], list[float], float]:
    """Time our loss and its gradient against MONAI's on a batch, in alternation.

    Returns:
        Seconds of ours and of MONAI's in each round, and how far their values are apart.
    """
    from monai.losses import DiceLoss  # takes seconds

    assert batch.target_BKTT is not None
    target_BKTT, device = batch.target_BKTT, batch.target_BKTT.device
    logits_BKHW = torch.randn(len(target_BKTT), 1, 72, 72, device=device, requires_grad=True)
    dice_loss = DiceLoss(sigmoid=True)

    def ours() -> Tensor:
        return dice_bce_loss(logits_BKHW, target_BKTT, 0.5)

    def monai() -> Tensor:
        size = target_BKTT.shape[-2:]
        up_BKTT = F.interpolate(logits_BKHW, size, mode="bilinear", align_corners=False)
        y_BKTT = target_BKTT.float()
        bce = F.binary_cross_entropy_with_logits(up_BKTT, y_BKTT)
        return 0.5 * bce + 0.5 * dice_loss(up_BKTT, y_BKTT)

    def with_gradient(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(loss(), logits_BKHW)[0].sum().item()  # waits for a GPU

        return run

    seconds = alternate(rounds, {"ours": with_gradient(ours), "monai": with_gradient(monai)})
    return seconds["ours"], seconds["monai"], abs(ours().item() - monai().item())


@dataclass(frozen=True)
class Job:
    """What the users' job took, in seconds.

    Attributes:
        backbone: that extracted.
        extract_s: all pictures.
        train_s: the training of ``film-conv``.
        default_s: an epoch of the default head, with its loading and validation.
        default_precision: what it computed in.
    """

    backbone: str
    extract_s: float
    train_s: float
    default_s: float
    default_precision: str


def users_job(config: TrainConfig, num_train: int, num_val: int) -> Job:
    """Extract pictures and train on them, as a user does."""
    print(f"Writing {num_train + num_val} pictures", flush=True)
    folder = Path(str(config.output))
    manifest = write_pictures(
        folder / "pictures",
        num_train + num_val,
        splits=("train",) * num_train + ("val",) * num_val,
        shapes=((FRAME_PX, FRAME_PX),),
    )
    backbone = "sam3-mini" if config.device == "cpu" else "sam3"
    print("Extracting them", flush=True)
    store, started_s = folder / "job.zarr", time.monotonic()
    extract(
        ExtractConfig(
            manifest,
            store,
            backbone=backbone,
            weights="random" if backbone == "sam3" else None,
            devices=(config.device,),
        )
    )
    extracted_s = time.monotonic()
    print(f"Training {NUM_EPOCHS} epochs", flush=True)
    job = replace(config, store=str(store), name="job", epochs=NUM_EPOCHS)
    train(job)
    trained_s = time.monotonic()
    print("Training the default head for an epoch", flush=True)
    default = train(replace(job, name="default", head="film-detail", learning_rate=None, epochs=1))
    return Job(
        backbone,
        extracted_s - started_s,
        trained_s - extracted_s,
        time.monotonic() - trained_s,
        default.precision,
    )


def one_batch(store: Path, config: TrainConfig) -> Batch:
    """Return a first batch of the store, with targets."""
    opened = open_store(store)
    rows = [sample.row for sample in opened.samples if sample.split == "train"]
    samples = CachedSamples(
        opened,
        rows[: config.batch_size],
        ("fpn_72",),
        device=config.device,
        target_size_px=config.loss_size_px,
    )
    return samples.batch(range(len(samples)))


def first(batch: Batch, num: int) -> Batch:
    """Return the first samples of a batch."""
    assert batch.target_BKTT is not None
    return Batch(
        {level: feature[:num] for level, feature in batch.levels.items()},
        batch.angles_B2[:num],
        batch.content_B2[:num],
        batch.target_BKTT[:num],
        batch.rows[:num],
    )


def write_store(path: Path, num_train: int, num_val: int) -> Path:
    """Write a sealed store of noise, all blocks alike, whose masks are curves across the frame."""
    level = LevelSpec("fpn_72", (256, 72, 72))
    fingerprint = Fingerprint({"level": "fpn_72", "weights_sha256": "none: synthetic features"})
    labels = LabelSetSpec("mask", ("vessel",), MASK_PX, MASK_PX)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((BLOCK_ROWS, *level.shape), np.float32).astype(np.float16)
    y, x = np.mgrid[:MASK_PX, :MASK_PX]
    masks = [
        (np.abs(y - MASK_PX * (0.5 + 0.3 * np.sin(x / 60 + i))) < 12).astype(np.uint8)[None]
        for i in range(BLOCK_ROWS)
    ]
    rows = range(num_train + num_val)
    samples = [
        SampleRow(row, f"s{row}", f"{row}.png", None, FRAME_PX, FRAME_PX, 1, status="ok")
        for row in rows
    ]
    annotations = [
        AnnotationRow(
            row,
            f"s{row}",
            "train" if row < num_train else "val",
            f"g{row}",
            float(row % 120 - 60),
            float(row % 60 - 30),
        )
        for row in rows
    ]
    with store_lock(path):
        describe_store(
            path,
            settings={"backbone": "none: synthetic features"},
            levels={"fpn_72": (level, fingerprint)},
            label_sets={"mask": labels},
            samples=samples,
            annotations=annotations,
        )
    for begin in range(0, len(rows), BLOCK_ROWS):
        block, own = begin // BLOCK_ROWS, rows[begin : begin + BLOCK_ROWS]
        write_level_block(
            path, level, fingerprint.digest, block, {row: features[row - begin] for row in own}
        )
        write_label_block(
            path,
            labels,
            block,
            {row: masks[row - begin] for row in own},
            {row: LabelRow(row, source=f"masks/{row}.png") for row in own},
        )
        write_sample_facts(path, block, [samples[row] for row in own])
    with store_lock(path):
        seal_store(path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
