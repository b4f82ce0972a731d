"""The training loop: what happens in an epoch, and what is on disk after it.

Shape legend: B batch, K mask planes, H height, W width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sam3cache.errors import CheckpointError, ConfigError, HeadError, NumericError
from sam3cache.features import FeatureStore, StoredSample, open_store, record_data
from sam3cache.features.files import sweep_temporaries
from sam3cache.heads import (
    CheckpointInfo,
    Head,
    build_head,
    check_fingerprints,
    count_parameters,
    forward_gflop,
    save_checkpoint,
)
from sam3cache.heads.checkpoint import short_hash
from sam3cache.loading import CachedSamples
from sam3cache.metrics import dice_iou_precision_recall
from sam3cache.records import Batch
from sam3cache.runtime import peak_memory_bytes, pick_device, write_atomic
from sam3cache.training.config import TrainConfig, check_same_run, resolve_precision
from sam3cache.training.loss import dice_bce_loss
from sam3cache.training.state import STATE_FILE, RunState, read_state, restore, save_state

METRICS_FILE = "metrics.jsonl"
MAX_GRADIENT_NORM = 1.0
THRESHOLD = 0.5

MAX_RECORDED_SAMPLES = 100_000
"""Most training samples that a checkpoint lists, in 17 bytes each for image and group."""

# How often the loss is fetched to be shown: each time, a GPU has to catch up.
_REPORT_INTERVAL_S = 0.2

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Progress:
    """What a training is doing now.

    Attributes:
        stage: "load" counts samples read; "train" counts images seen, over all epochs.
        num_done: how many so far.
        num_total: how many in all.
        epoch: the present one, from 1; 0 while loading.
        loss: of the latest step; None before the first.
        best_dice: best validation Dice so far; None before the first.
        num_validated: validation images of this epoch that are done; None while it trains.
        num_to_validate: of how many.
    """

    stage: Literal["load", "train"]
    num_done: int
    num_total: int
    epoch: int = 0
    loss: float | None = None
    best_dice: float | None = None
    num_validated: int | None = None
    num_to_validate: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training.

    Attributes:
        run_dir: the run's folder.
        best_checkpoint: folder of the checkpoint with the best validation Dice.
        best_dice: mean over the validation images of Dice on their masks' own grids.
        best_epoch: epoch of it, from 1.
        epochs: epochs trained.
        num_train: samples trained on.
        num_val: validation images.
        num_without_mask: samples of both splits left out for want of a mask.
        num_empty_masks: validation images whose mask is empty: Dice 0 if the head marks anything
            there, and no part of the mean if it does not.
        parameters: number of the head's parameters by part.
        gflop: of the head's forward pass over one image; see ``heads.forward_gflop``.
        precision: what the head computed in.
        residency: where the training samples lay.
        placement: the same with its reason, in words.
        resident_bytes: memory that they took there.
        load_s: time that reading them took.
        elapsed_s: time that training and validation took, over all parts of a resumed run.
        images_per_s: training speed in the last epoch; None if there was none to train.
        peak_memory_bytes: of the GPU's tensors, or of the process on a CPU.
    """

    run_dir: Path
    best_checkpoint: Path
    best_dice: float
    best_epoch: int
    epochs: int
    num_train: int
    num_val: int
    num_without_mask: int
    num_empty_masks: int
    parameters: dict[str, int]
    gflop: float
    precision: str
    residency: str
    placement: str
    resident_bytes: int
    load_s: float
    elapsed_s: float
    images_per_s: float | None
    peak_memory_bytes: int


def train(
    config: TrainConfig, report: Callable[[Progress], None] = lambda progress: None
) -> TrainResult:
    """Train a head on the store's training split, keeping the best by validation Dice.

    Args:
        config: what to train.
        report: called as the work goes on.

    Returns:
        The summary of the run.

    Raises:
        ConfigError: settings, splits or an existing run stand against it.
        HeadError: the head is unknown or does not fit the store.
        StoreError: the store cannot be used, or (to resume) is not the one of before.
        CheckpointError: the run to resume is damaged, or lacks its state.
        NumericError: the loss is no longer finite.
    """
    return _Run(config, report).train()


class _Run:
    """A training under way."""

    def __init__(self, config: TrainConfig, report: Callable[[Progress], None]) -> None:
        self.config, self.report = config, report
        self.device = pick_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        store = open_store(
            config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay
        )
        if config.feature_precision is not None:
            store.serve(config.feature_precision)
        level_shapes = {name: spec.shape for name, spec in store.served_levels.items()}
        self.num_planes = _num_planes(store, config)
        torch.manual_seed(config.seed)
        self.head: Head = build_head(
            config.head,
            level_shapes,
            config.head_options,
            num_classes=self.num_planes,
        ).to(self.device)
        _require_precision(store, config, self.head.needs)
        self.gflop = forward_gflop(self.head, level_shapes)
        # A user's own head need not be derived from ours.
        self.learning_rate = config.learning_rate or _own_learning_rate(config.head, self.head)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=self.learning_rate, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(
            torch.device(self.device).type, enabled=self.precision == "fp16"
        )
        train_rows = _rows(store, config, "train")
        val_rows = _rows(store, config, "val")
        with_mask = [row for row in val_rows if store.has_mask(row, config.label_set)]
        levels = {
            level: {
                "shape": list(store.served_levels[level].shape),
                "digest": store.fingerprint(level).digest,
                "fields": dict(store.fingerprint(level).fields),
            }
            for level in self.head.needs
        }
        learned = [row for row in train_rows if store.has_mask(row, config.label_set)]
        settings = config.settings() | {
            "learning_rate": self.learning_rate,
            "precision": self.precision,
            "num_train": len(learned),
            "num_val": len(with_mask),
            "data_sha256": _data_sha256(store, [*learned, *with_mask], config.label_set),
        }
        self.data = dataclasses.asdict(record_data(store, config.label_set))
        # Before anything is loaded: what stands against the run is said at once.
        self.state = self._begin(RunState(settings, levels))

        # Before the samples, whose place depends on the memory that is then left.
        self.val_masks = [_mask(store, row, config.label_set) for row in with_mask]
        self.num_empty_masks = sum(not (mask == 1).any() for mask in self.val_masks)
        if self.num_empty_masks == len(self.val_masks):
            raise ConfigError(
                f"no mask of the validation split of {config.store} has a pixel, so that Dice is "
                "undefined; check the masks, or the split"
            )

        num_to_load = len(learned) + len(with_mask)

        def report_load(num_done: int, num_total: int) -> None:
            report(Progress("load", num_done, num_to_load))

        def report_load_val(num_done: int, num_total: int) -> None:
            report(Progress("load", len(learned) + num_done, num_to_load))

        self.train_samples = CachedSamples(
            store,
            train_rows,
            self.head.needs,
            device=self.device,
            residency=config.residency,
            target_size_px=config.loss_size_px,
            label_set=config.label_set,
            report=report_load,
        )
        self.val_samples = CachedSamples(
            store,
            with_mask,
            self.head.needs,
            device=self.device,
            residency=config.residency,
            label_set=config.label_set,
            report=report_load_val,
        )
        self.trained_on = _trained_on(self.train_samples.samples)
        self.num_without_mask = self.train_samples.num_without_mask + len(val_rows) - len(with_mask)

    def train(self) -> TrainResult:
        """Go through the epochs that are left."""
        if self.state.epoch == 0:
            self._clear()
        # What a killed part of the run left half written.
        sweep_temporaries(self.config.run_dir)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._report_train(self.state.epoch, self.state.epoch * len(self.train_samples))
        images_per_s = None
        log_dir = self.config.run_dir / "tensorboard"
        with SummaryWriter(str(log_dir), purge_step=self.state.epoch + 1) as tensorboard:
            for epoch in range(self.state.epoch + 1, self.config.epochs + 1):
                images_per_s = self._epoch(epoch, tensorboard)
        config, state = self.config, self.state
        return TrainResult(
            run_dir=config.run_dir,
            best_checkpoint=config.run_dir / "best",
            best_dice=state.best_dice,
            best_epoch=state.best_epoch,
            epochs=state.epoch,
            num_train=len(self.train_samples),
            num_val=len(self.val_samples),
            num_without_mask=self.num_without_mask,
            num_empty_masks=self.num_empty_masks,
            parameters=count_parameters(self.head),
            gflop=self.gflop,
            precision=self.precision,
            residency=self.train_samples.residency,
            placement=self.train_samples.placement,
            resident_bytes=self.train_samples.resident_bytes,
            load_s=self.train_samples.load_s,
            elapsed_s=state.elapsed_s,
            images_per_s=images_per_s,
            peak_memory_bytes=self._peak_memory_bytes(),
        )

    def _begin(self, fresh: RunState) -> RunState:
        """Return the state to go on from, unless what is in the run's folder forbids it."""
        run_dir = self.config.run_dir
        state_file = run_dir / "last" / STATE_FILE
        exists = run_dir.exists() and any(run_dir.iterdir())
        if self.config.resume:
            if not exists:
                raise ConfigError(
                    f"there is no run to resume in {run_dir}; leave --resume out, or check --name"
                )
            if state_file.exists():
                return self._resume(state_file, fresh)
            if (run_dir / "best").exists() or (run_dir / METRICS_FILE).exists():
                raise CheckpointError(
                    f"the run in {run_dir} cannot be resumed without {state_file}, which is "
                    "missing; restore it, or start again with --overwrite"
                )
        elif exists and not self.config.overwrite:
            raise ConfigError(
                f"{run_dir} holds a run already; choose another --name, or give --resume to go on "
                "with it, or --overwrite to replace it"
            )
        return fresh

    def _clear(self) -> None:
        """Make the run's folder ready for a run from the start."""
        run_dir = self.config.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        for part in ("best", "last", "tensorboard"):
            if (run_dir / part).exists():
                shutil.rmtree(run_dir / part)
        (run_dir / METRICS_FILE).unlink(missing_ok=True)

    def _resume(self, state_file: Path, fresh: RunState) -> RunState:
        state, tensors = read_state(state_file)
        check_same_run(state.settings, fresh.settings)
        check_fingerprints(state.levels, fresh.levels)
        restore(tensors, self.head, self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state.scaler))
        metrics = self.config.run_dir / METRICS_FILE
        if metrics.exists():
            # Lines of epochs that were not committed are written anew.
            lines = metrics.read_bytes().splitlines(keepends=True)
            write_atomic(metrics, b"".join(lines[: state.epoch]))
        return dataclasses.replace(state, settings=fresh.settings)

    def _epoch(self, epoch: int, tensorboard: SummaryWriter) -> float:
        """Train and validate once, write what there is to write; return images a second."""
        started_s = time.monotonic()
        train_loss = self._train_epoch(epoch)
        train_s = time.monotonic() - started_s
        val_dice = self._validate(epoch, train_loss)
        elapsed_s = self.state.elapsed_s + time.monotonic() - started_s
        learning_rate = self.optimizer.param_groups[0]["lr"]
        metrics = {"train_loss": train_loss, "val_dice": val_dice}
        best = val_dice > self.state.best_dice
        self.state = dataclasses.replace(
            self.state,
            epoch=epoch,
            best_epoch=epoch if best else self.state.best_epoch,
            best_dice=val_dice if best else self.state.best_dice,
            elapsed_s=elapsed_s,
            scaler=self.scaler.state_dict(),
        )
        images_per_s = len(self.train_samples) / max(train_s, 1e-9)
        line = {
            "epoch": epoch,
            "lr": learning_rate,
            **metrics,
            "images_per_s": images_per_s,
            "elapsed_s": elapsed_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        for name, value in line.items():
            if name != "epoch":
                tensorboard.add_scalar(name, value, epoch)
        tensorboard.flush()
        run_dir, info = self.config.run_dir, self._info(epoch, metrics)
        for folder in ("best", "last") if best else ("last",):
            save_checkpoint(run_dir / folder, self.head, info)
        with (run_dir / METRICS_FILE).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
        # Last, as it commits the epoch: whatever came before is written again after a crash.
        save_state(run_dir / "last" / STATE_FILE, self.state, self.head, self.optimizer)
        self._report_train(epoch, epoch * len(self.train_samples), train_loss)
        return images_per_s

    def _train_epoch(self, epoch: int) -> float:
        """Take a step a batch; return the mean loss over the images."""
        config, num_images = self.config, len(self.train_samples)
        steps_per_epoch = math.ceil(num_images / config.batch_size)
        step = (epoch - 1) * steps_per_epoch
        num_seen, reported_s = 0, -math.inf
        total_loss = torch.zeros((), device=self.device)
        self.head.train()
        batches = self.train_samples.iterate(
            config.batch_size, seed=config.seed, epoch=epoch, shuffle=True
        )
        for batch in batches:
            # The cosine of CosineAnnealingLR, as a function of the step: nothing to save.
            cosine = math.cos(math.pi * step / (steps_per_epoch * config.epochs))
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * 0.5 * (1 + cosine)
            loss = self._step(batch)
            step += 1
            num_seen += len(batch.rows)
            total_loss += loss * len(batch.rows)
            if num_seen == num_images or time.monotonic() - reported_s > _REPORT_INTERVAL_S:
                reported_s = time.monotonic()
                self._report_train(epoch, (epoch - 1) * num_images + num_seen, loss.item())
        mean_loss = total_loss.item() / num_images
        if not math.isfinite(mean_loss):
            raise NumericError(
                f"the training loss became {mean_loss} in epoch {epoch}; lower --lr, or take "
                "--precision fp32"
            )
        return mean_loss

    def _report_train(
        self,
        epoch: int,
        num_done: int,
        loss: float | None = None,
        num_validated: int | None = None,
    ) -> None:
        self.report(
            Progress(
                "train",
                num_done=num_done,
                num_total=self.config.epochs * len(self.train_samples),
                epoch=epoch,
                loss=loss,
                best_dice=self.state.best_dice if self.state.best_epoch else None,
                num_validated=num_validated,
                num_to_validate=len(self.val_samples),
            )
        )

    def _step(self, batch: Batch) -> Tensor:
        assert batch.target_BKTT is not None
        loss = dice_bce_loss(self._forward(batch), batch.target_BKTT, self.config.bce_weight)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _forward(self, batch: Batch) -> Tensor:
        with torch.autocast(
            torch.device(self.device).type,
            dtype=_AUTOCAST.get(self.precision),
            enabled=self.precision in _AUTOCAST,
        ):
            logits_BKHW: Tensor = self.head(batch)
        return logits_BKHW.float()

    @torch.no_grad()
    def _validate(self, epoch: int, train_loss: float) -> float:
        """Return the mean over images of Dice, each on its mask's own grid.

        A plane that is empty in both mask and prediction has no Dice, and an image without any
        other plane has no part in the mean: the rule of ``sam3cache eval``.
        """
        self.head.eval()
        dice_by_image, index = [], 0
        for batch in self.val_samples.iterate(self.config.batch_size):
            for logits_KHW in self._forward(batch):
                mask_KHW = self.val_masks[index].to(logits_KHW.device)
                box = self.val_samples.letterbox(index)
                on_grid_KHW = box.logits_to_grid(logits_KHW, *mask_KHW.shape[-2:])
                scores = [
                    dice_iou_precision_recall(plane_HW.sigmoid() >= THRESHOLD, mask_HW).dice
                    for plane_HW, mask_HW in zip(on_grid_KHW, mask_KHW, strict=True)
                ]
                dice = [score for score in scores if score is not None]
                if dice:
                    dice_by_image.append(sum(dice) / len(dice))
                index += 1
            self._report_train(epoch, epoch * len(self.train_samples), train_loss, index)
        return sum(dice_by_image) / len(dice_by_image)

    def _info(self, epoch: int, metrics: dict[str, float]) -> CheckpointInfo:
        return CheckpointInfo(
            head=self.config.head,
            head_options=self.state.settings["head_options"],
            num_classes=self.num_planes,
            levels=self.state.levels,
            label_set=self.config.label_set,
            epoch=epoch,
            metrics=metrics,
            settings=self.state.settings,
            trained_on=self.trained_on,
            data=self.data,
            seed=self.config.seed,
            threshold=THRESHOLD,
        )

    def _peak_memory_bytes(self) -> int:
        if self.device == "cpu":
            return peak_memory_bytes()
        return int(torch.cuda.max_memory_allocated(self.device))


def _require_precision(store: FeatureStore, config: TrainConfig, levels: Sequence[str]) -> None:
    """Refuse a head of which a level is not stored in the precision that was asked for."""
    for level in levels:
        spec = store.served_levels[level]
        if config.feature_precision and spec.precision not in (config.feature_precision, "uint8"):
            raise ConfigError(
                f"{config.store} has level {level} in no precision {config.feature_precision}, "
                f"only as {spec.name}; leave --feature-precision out, or extract "
                f"{spec.base}.{config.feature_precision} into the store"
            )


def _own_learning_rate(name: str, head: Head) -> float:
    value = getattr(head, "learning_rate", None)
    if value is None:
        return Head.learning_rate
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise HeadError(
            f"head {name} has learning_rate {value!r}: expected a number above 0, such as 1e-4; "
            "correct it, or give --lr"
        )
    return float(value)


def _num_planes(store: FeatureStore, config: TrainConfig) -> int:
    if config.label_set not in store.label_sets:
        raise ConfigError(
            f"{config.store} has no label set {config.label_set!r} (it has "
            f"{', '.join(store.label_sets) or 'none'}); name one with --label-set, or set it "
            f"with `sam3cache store labels set {config.store} {config.label_set} --from MANIFEST`"
        )
    return store.label_sets[config.label_set].num_planes


def _data_sha256(store: FeatureStore, rows: list[int], label_set: str) -> str:
    """Return a hash of what a run learns from, in the order that indices count in.

    Of a mask its origin, size and time of change stand for its pixels: no mask has to be read.
    """
    by_row, masks = {sample.row: sample for sample in store.samples}, store.label_rows(label_set)
    digest = hashlib.sha256()
    for row in rows:
        sample = by_row[row]
        angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
        mask = dataclasses.astuple(masks[row])[1:]  # all but the row
        line = (sample.id, sample.pixel_sha256, sample.split, *angles, *mask)
        digest.update(f"{line!r}\n".encode())
    return digest.hexdigest()


def _trained_on(samples: Sequence[StoredSample]) -> dict[str, str]:
    """Return what lets an evaluation tell images that a head knows; see ``CheckpointInfo``."""
    if len(samples) > MAX_RECORDED_SAMPLES:
        return {}
    return {
        "images": " ".join(sorted({short_hash(sample.pixel_sha256) for sample in samples})),
        "groups": " ".join(sorted({short_hash(sample.group) for sample in samples})),
    }


def _mask(store: FeatureStore, row: int, label_set: str) -> Tensor:
    mask_KHW = store.read_mask(row, label_set)
    assert mask_KHW is not None
    return torch.from_numpy(mask_KHW)


def _rows(store: FeatureStore, config: TrainConfig, split: str) -> list[int]:
    """Return the rows of a split, of which at least one has to have a mask."""
    rows = [sample.row for sample in store.samples if sample.split == split]
    if not any(store.has_mask(row, config.label_set) for row in rows):
        counts = Counter(sample.split for sample in store.samples)
        there = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
        missing = "with a mask " if rows else ""
        raise ConfigError(
            f"{config.store} has no sample {missing}in split {split!r} (samples: {there}); "
            "training needs both train and val: set the manifest's split column and extract again"
        )
    return rows
