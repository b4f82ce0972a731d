"""The training loop: what happens in an epoch, and what is on disk after it.

Shape legend: B batch, K planes of logits, M planes of a stored mask, C classes, H height, W width.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from sam3cache.errors import (
    CheckpointError,
    ConfigError,
    HeadError,
    NumericError,
    Sam3CacheError,
)
from sam3cache.features import (
    FeatureStore,
    LabelSetSpec,
    count_classes,
    record_data,
)
from sam3cache.features.files import sweep_temporaries
from sam3cache.heads import (
    HEADS,
    CheckpointInfo,
    Head,
    check_fingerprints,
    describe_head,
    save_checkpoint,
)
from sam3cache.heads.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    LOG_FOLDER,
    METRICS_FILE,
    STATE_FILE,
    is_to_be_replaced,
)
from sam3cache.heads.registry import one_line
from sam3cache.loading import CachedSamples
from sam3cache.loading.augment import Augmentation, Draws, augment, choose_rows
from sam3cache.metrics import dice_iou_precision_recall
from sam3cache.records import Batch
from sam3cache.runtime import is_out_of_memory, peak_memory_bytes, pick_device, write_atomic
from sam3cache.tasks import decide, mask_planes, num_outputs
from sam3cache.training.average import MovingAverage
from sam3cache.training.config import (
    BALANCED,
    CE_WEIGHTS,
    TrainConfig,
    resolve_precision,
)
from sam3cache.training.division import (
    Division,
    data_settings,
    divide,
    masks_sha256,
    trained_on,
)
from sam3cache.training.folders import (
    claimed,
    is_in_use,
    is_run,
    mark_to_replace,
    require_unused,
    runs_in,
    unmark,
)
from sam3cache.training.loss import Loss, balanced_weights, build_loss, default_loss
from sam3cache.training.masks import HeldMasks
from sam3cache.training.micro import blank_sample, pick_micro_batch, saved_bytes
from sam3cache.training.opening import label_set_of, new_head, open_to_train
from sam3cache.training.state import (
    RunState,
    as_begun,
    check_same,
    extra_tensors,
    read_state,
    restore,
    save_state,
)
from sam3cache.training.stopping import Stop, never, stopped

MAX_GRADIENT_NORM = 1.0
THRESHOLD = 0.5

# How often the loss is fetched to be shown: each time, a GPU has to catch up.
_REPORT_INTERVAL_S = 0.2

# Name of the losses' sum in a saved state; no parameter's, as those of modules have no space.
_TOTAL_LOSS = "total loss"

_MAX_NAMED = 3

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Progress:
    """What a training is doing now.

    Attributes:
        stage: "load" counts samples read; "train" counts images seen, over all epochs.
        num_done: how many so far.
        num_total: how many in all.
        epoch: the present one, from 1; 0 while loading.
        loss: mean over the images of the epoch so far; None before the first step.
        best_dice: best validation Dice so far; None before the first.
        num_validated: validation images of this epoch that are done; None while it trains.
        num_to_validate: of how many.
        num_before: of the images seen, those that parts of the run before this one saw.
    """

    stage: Literal["load", "train"]
    num_done: int
    num_total: int
    epoch: int = 0
    loss: float | None = None
    best_dice: float | None = None
    num_validated: int | None = None
    num_to_validate: int = 0
    num_before: int = 0


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
        gflop_by_part: the same, part by part as in ``parameters``; see ``heads.describe_head``.
        precision: what the head computed in.
        micro_batch: samples that went through the head at once.
        residency: where the training samples lay.
        placement: the same with its reason, in words.
        resident_bytes: memory that they took there.
        load_s: time that reading them took.
        elapsed_s: time that training and validation took, over all parts of a resumed run.
        images_per_s: training speed, the median of the epochs trained now; None of a run that had
            ended before.
        peak_memory_bytes: of the GPU's tensors, or of the process on a CPU.
        stopped_early: whether it ended for want of a better Dice, before its last epoch.
        num_variants: variants of the training samples that were drawn from beside them.
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
    gflop_by_part: dict[str, float]
    precision: str
    micro_batch: int
    residency: str
    placement: str
    resident_bytes: int
    load_s: float
    elapsed_s: float
    images_per_s: float | None
    peak_memory_bytes: int
    stopped_early: bool = False
    num_variants: int = 0


def train(
    config: TrainConfig,
    report: Callable[[Progress], None] = lambda progress: None,
    stop: Stop = never,
) -> TrainResult:
    """Train a head on the store's training split, keeping the best by validation Dice.

    Args:
        config: what to train.
        report: called as the work goes on.
        stop: asked after each step; see ``stopping.stop_on_signals``.

    Returns:
        The summary of the run.

    Raises:
        ConfigError: settings, splits or an existing run stand against it.
        HeadError: the head is unknown or does not fit the store.
        StoreError: the store cannot be used, or (to resume) is not the one of before.
        CheckpointError: the run to resume is damaged, or lacks its state.
        NumericError: the loss is no longer finite.
        StoppedError: it was told to stop, and has saved where it was.
    """
    run = Run(config, report, stop)
    for _ in run.steps():
        pass
    return run.result()


class Feed(Protocol):
    """What a run asks for its batches; see ``CachedSamples.iterate``."""

    def iterate(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        indices: Sequence[int] | None = None,
        start: int = 0,
        piece_size: int | None = None,
        levels: Sequence[str] | None = None,
        with_target: bool = True,
    ) -> Generator[Batch]:
        """Go through an epoch once."""


class Run:
    """A training under way, a step at a time.

    Args:
        config: what to train.
        report: called as the work goes on.
        stop: asked after each step whether to stop there.
        open_samples: makes what samples come from; for runs that share it.
        mask_of: reads a mask; for runs that share masks. It is asked for those of validation again
            in every epoch.

    Attributes:
        train_feed: what training batches are asked of.
        val_feed: what validation batches are asked of.
        position: where it is: epoch, 0 in training and 1 in validation, images of that done.

    Raises:
        Sam3CacheError: as of ``train``.
    """

    def __init__(
        self,
        config: TrainConfig,
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Stop = never,
        open_samples: Callable[..., CachedSamples] = CachedSamples,
        mask_of: Callable[[FeatureStore, int, str], Tensor] | None = None,
    ) -> None:
        config = as_begun(config)
        self.config, self.report, self.stop = config, report, stop
        self.device = pick_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        store = open_to_train(config)
        level_shapes = {name: spec.shape for name, spec in store.served_levels.items()}
        self.label_set = label_set_of(store, config)
        self.num_classes = len(self.label_set.classes)
        torch.manual_seed(config.seed)
        self.head: Head = new_head(store, config).to(self.device)
        _require_precision(store, config, self.head.needs)
        self.augmentation = Augmentation.of(config.augment)
        grids = {level: level_shapes[level][-1] for level in self.head.needs}
        self.augmentation.require_grid({**grids, "target": config.loss_size_px})
        self.model: nn.Module = self.head
        if config.compile:
            self.model = torch.compile(self.head)  # type: ignore[assignment]
        with self._head_at_work():
            self.parts = describe_head(self.head, level_shapes)
        # A user's own head need not be derived from ours.
        rate = config.learning_rate or _own_learning_rate(config.head, self.head)
        self.learning_rate = rate * config.lr_factor
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=self.learning_rate, weight_decay=config.weight_decay
        )
        self.average: MovingAverage | None = None
        if config.ema:
            self.average = MovingAverage(self.head, config.ema)
            self.average.follow(self.optimizer)
        self.scaler = torch.amp.GradScaler(
            torch.device(self.device).type, enabled=self.precision == "fp16"
        )
        rows = divide(store, config)
        weights = _class_weights(store, config, self.label_set, rows)
        self.loss = _loss(config, self.label_set, weights)
        levels = {
            level: {
                "shape": list(store.served_levels[level].shape),
                "digest": store.fingerprint(level).digest,
                "fields": dict(store.fingerprint(level).fields),
            }
            for level in self.head.needs
        }
        settings = config.settings() | {"learning_rate": rate, "precision": self.precision}
        settings |= data_settings(store, rows, config.label_set)
        masks = masks_sha256(store, rows.all, config.label_set)
        if config.class_weights == BALANCED:
            # By a name of its own: folds of one experiment are asked alike, and find others.
            settings["class_weights_used"] = weights
        self.data = dataclasses.asdict(record_data(store, config.label_set))
        self._total_loss = torch.zeros((), device=self.device)
        self._store, self._val_rows = store, rows.val
        self._mask_of = mask_of or HeldMasks()
        self._claim = ExitStack()
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            # Before anything is loaded: what stands against the run is said at once.
            self.state = self._begin(RunState(settings, levels, masks_sha256=masks))
            # Before the samples, whose place depends on the memory that is then left.
            self.num_empty_masks = self._count_empty_masks()
            with self._memory():
                self._open(store, rows, open_samples)
            self._prepare(rows)
            on_failure.pop_all()

    def close(self) -> None:
        """Let others have the run's folder."""
        self._claim.close()

    def _count_empty_masks(self) -> int:
        """Read the masks of validation.

        Raises:
            ConfigError: none has a pixel.
            StoppedError: it was told to stop.
        """
        num_empty = 0
        for number in range(len(self._val_rows)):
            num_empty += not bool((self._planes(self._val_mask(number)) == 1).any())
            self._refuse_to_go_on("before its first step; nothing is lost")
        if num_empty == len(self._val_rows):
            raise ConfigError(
                f"no mask of the validation split of {self.config.store} has a pixel, so that Dice "
                "is undefined; check the masks, or the split"
            )
        return num_empty

    def _val_mask(self, number: int) -> Tensor:
        return self._mask_of(self._store, self._val_rows[number], self.config.label_set)

    def _prepare(self, rows: Division) -> None:
        """Settle what depends on samples that are there."""
        self.num_train, self.num_val = len(rows.groups), len(rows.val)
        self.num_variants, self.num_without_mask = rows.num_variants, rows.num_without_mask
        self.trained_on = trained_on([self.train_samples.samples[i] for i in self._learned])
        self._choose_micro_batch()
        self.position = (self.state.epoch + 1, 0, self.state.num_seen)
        self._num_before = self.state.epoch * self.num_train + self.state.num_seen
        self._rates: list[float] = []
        self._began_s = self._saved_s = time.monotonic()
        self._busy_s = 0.0

    def _open(
        self, store: FeatureStore, rows: Division, open_samples: Callable[..., CachedSamples]
    ) -> None:
        """Bring the samples to where they are to lie."""
        config, num_val = self.config, 0 if self.config.folds else len(rows.val)
        num_to_load = len(rows.train) + len(rows.val)

        def report_load(num_done: int, num_total: int) -> None:
            self.report(Progress("load", num_done, num_to_load))
            self._refuse_to_go_on("before its first step; nothing is lost")

        def open_rows(
            rows: Sequence[int], report: Callable[[int, int], None], **values: Any
        ) -> Any:
            return open_samples(
                store,
                rows,
                self.head.needs,
                device=self.device,
                residency=config.residency,
                label_set=config.label_set,
                report=report,
                **values,
            )

        # Of folds all samples together, whichever is validated on: so all folds share them.
        self.train_samples: CachedSamples = open_rows(
            rows.pool if config.folds else rows.train,
            report_load,
            target_size_px=config.loss_size_px,
        )
        index_of = {row: index for index, row in enumerate(self.train_samples.rows)}
        self._learned = [index_of[row] for row in rows.train]
        # By image, the places of its row and of those of its variants.
        self._groups = [[index_of[row] for row in group] for group in rows.groups]
        self.has_variants = any(len(group) > 1 for group in self._groups)
        if config.folds:
            self.val_samples = self.train_samples
            self.val_indices = [index_of[row] for row in rows.val]
        else:
            self.val_samples = open_rows(
                rows.val,
                lambda num_done, num_total: report_load(len(rows.train) + num_done, num_total),
            )
            self.val_indices = list(range(num_val))
        self.train_feed: Feed = self.train_samples
        self.val_feed: Feed = self.val_samples

    def _choose_micro_batch(self) -> None:
        """Settle how many samples go through the head at once; a resumed run keeps to that."""
        config, chosen = self.config, self.state.micro_batch or self.config.micro_batch
        if chosen is None and config.batch_size > 1:
            shapes = {level: entry["shape"] for level, entry in self.state.levels.items()}
            size_px = config.loss_size_px
            target_shape = (self.label_set.num_planes, size_px, size_px)
            sample = blank_sample(shapes, target_shape, self.device)
            self.head.eval()  # A batch norm must neither learn from one sample nor refuse it.
            with self._memory():
                bytes_ = saved_bytes(lambda batch: self._loss_of(batch, self.head), sample)
            chosen = pick_micro_batch(config.batch_size, bytes_, self.device)
        self.micro_batch = min(chosen or 1, config.batch_size)
        settings = {**self.state.settings, "micro_batch": self.micro_batch}
        self.state = dataclasses.replace(
            self.state, micro_batch=self.micro_batch, settings=settings
        )

    def train_indices(self, epoch: int) -> list[int] | None:
        """Return the samples that an epoch trains on; None for all."""
        if self.has_variants:
            return choose_rows(self._groups, self.config.order, epoch)
        return self._learned if self.config.folds else None

    def steps(self) -> Iterator[None]:
        """Go through the epochs that are left, halting after every step.

        Raises:
            ConfigError: the device has not enough memory.
            NumericError: the loss is no longer finite.
            StoppedError: it was told to stop, and has saved where it was.
        """
        with closing(self):
            if self.state.epoch == self.state.num_seen == 0:
                self._clear()
            # What a killed part of the run left half written.
            sweep_temporaries(self.config.run_dir)
            if self.device != "cpu":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._began_s = self._saved_s = time.monotonic()
            self._report_train(min(self.state.epoch + 1, self.config.epochs), self._num_before)
            log_dir = self.config.run_dir / LOG_FOLDER
            purge_step = self.state.epoch + 1
            with self._memory(), SummaryWriter(str(log_dir), purge_step=purge_step) as tensorboard:
                while not self.config.is_over(self.state.epoch, self.state.best_epoch):
                    yield from self._epoch(self.state.epoch + 1, tensorboard)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Say what to do where a device runs out of memory."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            num_at_once = self.state.micro_batch or self.config.batch_size
            advice = "--residency ram or stream"
            if num_at_once > 1:
                advice += f", or start again with --overwrite and --micro-batch {num_at_once // 2}"
            raise ConfigError(
                f"{self.device} has not enough memory for {num_at_once} samples at once beside "
                f"what lies there (residency {self.config.residency}); give {advice}"
            ) from error

    @contextmanager
    def _head_at_work(self) -> Iterator[None]:
        """Say in one line what a head of somebody's own fails by; of ours it would be a bug."""
        own: tuple[type[Exception], ...] = () if self.config.head in HEADS else (Exception,)
        try:
            yield
        except own as error:
            if isinstance(error, Sam3CacheError) or is_out_of_memory(error):
                raise
            # Looked up late: importing the compiler takes seconds.
            if self.config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise HeadError(
                f"head {self.config.head} fails in training: {one_line(error)}; correct its code "
                "(sam3cache --debug shows the place)"
            ) from error

    def result(self) -> TrainResult:
        """Return the summary of a run that has ended."""
        config, state = self.config, self.state
        return TrainResult(
            run_dir=config.run_dir,
            best_checkpoint=config.run_dir / BEST,
            best_dice=state.best_dice,
            best_epoch=state.best_epoch,
            epochs=state.epoch,
            num_train=self.num_train,
            num_val=self.num_val,
            num_without_mask=self.num_without_mask,
            num_empty_masks=self.num_empty_masks,
            parameters={name: part.parameters for name, part in self.parts.items()},
            gflop=self.parts["total"].gflop,
            gflop_by_part={name: part.gflop for name, part in self.parts.items()},
            precision=self.precision,
            micro_batch=self.micro_batch,
            residency=self.train_samples.residency,
            placement=self.train_samples.placement,
            resident_bytes=self.train_samples.resident_bytes,
            load_s=self.train_samples.load_s,
            elapsed_s=state.elapsed_s,
            images_per_s=statistics.median(self._rates) if self._rates else None,
            peak_memory_bytes=self._peak_memory_bytes(),
            stopped_early=state.epoch < config.epochs,
            num_variants=self.num_variants,
        )

    def _begin(self, fresh: RunState) -> RunState:
        """Return the state to go on from, unless what is in the run's folder forbids it.

        The folder is this run's alone from now on, until it is closed.
        """
        run_dir = self.config.run_dir
        state_file = run_dir / LAST / STATE_FILE
        self._require_room()
        self._claim.enter_context(claimed(run_dir))
        self._require_room()  # Another may have been quicker.
        if self.config.resume and not is_to_be_replaced(run_dir):
            if state_file.exists():
                return self._resume(state_file, fresh)
            if (run_dir / BEST).exists() or (run_dir / METRICS_FILE).exists():
                raise CheckpointError(
                    f"the run in {run_dir} cannot be resumed without {state_file}, which is "
                    "missing; restore it, or start again with --overwrite"
                )
        return fresh

    def _require_room(self) -> None:
        """Refuse a folder that holds another run, none to resume, or several."""
        config, run_dir = self.config, self.config.run_dir
        runs = [] if is_run(run_dir) else runs_in(run_dir)
        if runs:
            more = ", …" if len(runs) > _MAX_NAMED else ""
            raise ConfigError(
                f"{run_dir} holds {len(runs)} runs ({', '.join(runs[:_MAX_NAMED])}{more}) and is "
                "none itself; choose another --name"
            )
        if config.resume and not is_in_use(run_dir):
            raise ConfigError(
                f"there is no run to resume in {run_dir}; leave --resume out, or check --name"
            )
        require_unused(config, go_on="it", replace="it")

    def _clear(self) -> None:
        """Make the run's folder ready for a run from the start."""
        run_dir = self.config.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        # Killed in between, it is not taken for the run whose half is left.
        mark_to_replace(run_dir)
        for part in (*CHECKPOINTS, LOG_FOLDER):
            if (run_dir / part).exists():
                shutil.rmtree(run_dir / part)
        (run_dir / METRICS_FILE).unlink(missing_ok=True)
        unmark(run_dir)

    def _resume(self, state_file: Path, fresh: RunState) -> RunState:
        state, tensors = read_state(state_file)
        check_same(state, fresh.settings, fresh.masks_sha256)
        check_fingerprints(state.levels, fresh.levels)
        restore(tensors, self.head, self.optimizer)
        extra = extra_tensors(tensors)
        if state.num_seen:
            self._total_loss.copy_(extra.pop(_TOTAL_LOSS))
        if self.average is not None:
            extra.pop(_TOTAL_LOSS, None)
            self.average.restore(extra, state.num_averaged)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state.scaler))
        metrics = self.config.run_dir / METRICS_FILE
        if metrics.exists():
            # Lines of epochs that were not committed are written anew.
            lines = metrics.read_bytes().splitlines(keepends=True)
            write_atomic(metrics, b"".join(lines[: state.epoch]))
        return dataclasses.replace(state, settings=fresh.settings, masks_sha256=fresh.masks_sha256)

    def _pause(self) -> Iterator[None]:
        """Let others have their turn, off the clock."""
        self._busy_s += time.monotonic() - self._began_s
        yield
        self._began_s = time.monotonic()

    def _elapsed_s(self) -> float:
        """Return the time spent on this run since it was last committed."""
        return self._busy_s + time.monotonic() - self._began_s

    def _epoch(self, epoch: int, tensorboard: SummaryWriter) -> Iterator[None]:
        """Train and validate once, and write what there is to write."""
        train_loss = yield from self._train_epoch(epoch)
        train_s = self.state.train_s + self._elapsed_s()
        val_dice = yield from self._validate(epoch, train_loss, train_s)
        elapsed_s = self.state.elapsed_s + self._elapsed_s()
        learning_rate = self._rate(epoch, self.num_train - 1)
        metrics = {"train_loss": train_loss, "val_dice": val_dice}
        best = val_dice > self.state.best_dice
        self.state = dataclasses.replace(
            self.state,
            epoch=epoch,
            num_seen=0,
            best_epoch=epoch if best else self.state.best_epoch,
            best_dice=val_dice if best else self.state.best_dice,
            elapsed_s=elapsed_s,
            train_s=0.0,
            num_averaged=0 if self.average is None else self.average.num_steps,
            scaler=self.scaler.state_dict(),
        )
        self._total_loss.zero_()
        self._rates.append(self.num_train / max(train_s, 1e-9))
        line = {
            "epoch": epoch,
            "lr": learning_rate,
            **metrics,
            "images_per_s": self._rates[-1],
            "elapsed_s": elapsed_s,
            "peak_memory_bytes": self._peak_memory_bytes(),
        }
        for name, value in line.items():
            if name != "epoch":
                tensorboard.add_scalar(name, value, epoch)
        tensorboard.flush()
        run_dir, info = self.config.run_dir, self._info(epoch, metrics)
        with self._averaged():
            for folder in CHECKPOINTS if best else (LAST,):
                save_checkpoint(run_dir / folder, self.head, info)
        with (run_dir / METRICS_FILE).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
        # Last, as it commits the epoch: whatever came before is written again after a crash.
        self._save(self.state)
        self.position = (epoch + 1, 0, 0)
        self._report_train(epoch, epoch * self.num_train, train_loss)
        self._busy_s, self._began_s = 0.0, time.monotonic()  # writing is in no epoch's time

    def _train_epoch(self, epoch: int) -> Generator[None, None, float]:
        """Take a step a batch; return the mean loss over the images."""
        config, num_images = self.config, self.num_train
        num_seen, reported_s = self.state.num_seen, -math.inf
        self.head.train()
        pieces = self.train_feed.iterate(
            config.batch_size,
            seed=config.order,
            epoch=epoch,
            shuffle=True,
            indices=self.train_indices(epoch),
            start=num_seen,
            piece_size=self.micro_batch,
            levels=self.head.needs,
        )
        with closing(pieces):
            while num_seen < num_images:
                loss, num_taken = self._step(pieces, epoch, num_seen)
                num_seen += num_taken
                self._total_loss += loss * num_taken
                self.position = (epoch, 0, num_seen)
                if num_seen == num_images or time.monotonic() - reported_s > _REPORT_INTERVAL_S:
                    reported_s = time.monotonic()
                    mean_loss = self._total_loss.item() / num_seen
                    self._report_train(epoch, (epoch - 1) * num_images + num_seen, mean_loss)
                self._save_within_epoch(num_seen, self._elapsed_s())
                yield from self._pause()
        self._require_finite()
        return self._total_loss.item() / num_images

    def _require_finite(self) -> None:
        """Refuse to save, and to go on with, what no further step can mend.

        Raises:
            NumericError: the loss of the epoch so far, or a weight, is infinite or no number.
        """
        loss, epoch = self._total_loss.item(), self.state.epoch + 1
        found = f"the training loss became {loss}"
        if math.isfinite(loss):
            # A loss is of the weights before its step, so they may be worse already.
            finite = torch.stack([p.isfinite().all() for p in self.head.parameters()])
            if finite.all():
                return
            found = "weights became infinite or no number"
        precision = "" if self.precision == "fp32" else " or --precision fp32"
        raise NumericError(
            f"{found} in epoch {epoch}; start again with --overwrite and a lower --lr{precision} "
            "(--resume keeps to what the run began with)"
        )

    def _save_within_epoch(self, num_seen: int, train_s: float) -> None:
        """Save where the run is, if it is to stop here or was last saved some time ago."""
        is_due = time.monotonic() - self._saved_s >= 60 * self.config.save_minutes
        if not (is_due or self.stop()):
            return
        self._require_finite()
        self._save(
            dataclasses.replace(
                self.state,
                num_seen=num_seen,
                elapsed_s=self.state.elapsed_s + self._elapsed_s(),
                train_s=self.state.train_s + train_s,
                num_averaged=0 if self.average is None else self.average.num_steps,
                scaler=self.scaler.state_dict(),
            )
        )
        epoch, num_images = self.state.epoch + 1, self.num_train
        self._refuse_to_go_on(
            f"in epoch {epoch}, after {num_seen} of {num_images} images; go on with --resume"
        )

    def _refuse_to_go_on(self, where: str) -> None:
        reason = self.stop()
        if reason:
            raise stopped(reason, f"{self.config.run_dir} was stopped by {reason} {where}")

    def _save(self, state: RunState) -> None:
        extra = {} if self.average is None else dict(self.average.weights)
        if state.num_seen:
            extra[_TOTAL_LOSS] = self._total_loss
        path = self.config.run_dir / LAST / STATE_FILE
        save_state(path, state, self.head, self.optimizer, extra)
        self._saved_s = time.monotonic()

    def _averaged(self) -> AbstractContextManager[None]:
        """Let the head have its weights' moving average meanwhile, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

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
                num_total=self.config.epochs * self.num_train,
                epoch=epoch,
                loss=loss,
                best_dice=self.state.best_dice if self.state.best_epoch else None,
                num_validated=num_validated,
                num_to_validate=self.num_val,
                num_before=self._num_before,
            )
        )

    def _step(self, pieces: Iterator[Batch], epoch: int, num_seen: int) -> tuple[Tensor, int]:
        """Take a step on the next batch; return its loss and how many samples it was."""
        config, rate = self.config, self._rate(epoch, num_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        num_samples = min(config.batch_size, self.num_train - num_seen)
        # For the whole step, so that it is the same in whatever pieces it is taken.
        draws = Draws.of(num_samples, self._random(epoch, num_seen)) if config.augment else None
        num_taken, total_loss = 0, torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        while num_taken < num_samples:
            batch = next(pieces)
            if draws is not None:
                own = draws.part(num_taken, len(batch.rows))
                batch = augment(batch, self.augmentation, own)
            # The loss is a mean over the images.
            loss = self._loss_of(batch, self.model) * (len(batch.rows) / num_samples)
            with self._head_at_work():
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.detach()
            num_taken += len(batch.rows)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total_loss, num_taken

    def _rate(self, epoch: int, num_seen: int) -> float:
        """Return the learning rate of the step that takes the next of an epoch's images."""
        config = self.config
        steps_per_epoch = math.ceil(self.num_train / config.batch_size)
        step = (epoch - 1) * steps_per_epoch + num_seen // config.batch_size
        num_warmup = round(config.warmup_epochs * steps_per_epoch)
        return self.learning_rate * _schedule(step, steps_per_epoch * config.epochs, num_warmup)

    def _random(self, epoch: int, num_seen: int) -> torch.Generator:
        """Return what a step draws from: made of its place alone, nothing has to be saved."""
        entropy = [self.config.seed, epoch, num_seen]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(seed >> 1)

    def _loss_of(self, batch: Batch, model: nn.Module) -> Tensor:
        assert batch.target_BKTT is not None
        return self.loss(self._forward(batch, model), batch.target_BKTT)

    def _forward(self, batch: Batch, model: nn.Module) -> Tensor:
        # What a head does not read: a compiled one would be compiled anew for every row.
        batch = dataclasses.replace(batch, target_BKTT=None, rows=())
        with torch.autocast(
            torch.device(self.device).type,
            dtype=_AUTOCAST.get(self.precision),
            enabled=self.precision in _AUTOCAST,
        ):
            try:
                with self._head_at_work():
                    logits_BKHW: Tensor = model(batch)
            except RuntimeError as error:
                if model is self.head or not isinstance(
                    error, torch._dynamo.exc.TorchDynamoException
                ):
                    raise
                raise HeadError(
                    f"head {self.config.head} cannot be compiled here "
                    f"({str(error).strip().splitlines()[0]}); leave --compile out"
                ) from error
        return logits_BKHW.float()

    def _validate(
        self, epoch: int, train_loss: float, train_s: float
    ) -> Generator[None, None, float]:
        """Return the mean over images of Dice, each on its mask's own grid.

        Of an image the mean over its classes. A class that is in neither mask nor prediction has
        no Dice, and an image without any other class has no part in the mean: the rule of
        ``sam3cache eval``.
        """
        dice_by_image, num_done = [], 0
        self.position = (epoch, 1, 0)
        pieces = self.val_feed.iterate(
            self.config.batch_size,
            epoch=epoch,
            indices=self.val_indices if self.config.folds else None,
            piece_size=self.micro_batch,
            levels=self.head.needs,
            with_target=False,
        )
        with closing(pieces):
            for batch in pieces:
                with self._averaged(), torch.no_grad():
                    self.head.eval()
                    logits_BKHW = self._forward(batch, self.model)
                for logits_KHW in logits_BKHW:
                    dice = self._dice(logits_KHW, num_done)
                    dice_by_image += [] if dice is None else [dice]
                    num_done += 1
                self.position = (epoch, 1, num_done)
                self._report_train(epoch, epoch * self.num_train, train_loss, num_done)
                if self.stop():
                    self._save_within_epoch(self.num_train, train_s - self.state.train_s)
                yield from self._pause()
        return sum(dice_by_image) / len(dice_by_image)

    def _dice(self, logits_KHW: Tensor, number: int) -> float | None:
        """Return an image's Dice, the mean over its classes."""
        mask_CHW = self._planes(self._val_mask(number).to(logits_KHW.device))
        box = self.val_samples.letterbox(self.val_indices[number])
        on_grid_KHW = box.logits_to_grid(logits_KHW, *mask_CHW.shape[-2:])
        decided_CHW = decide(on_grid_KHW, self.label_set.task, THRESHOLD)
        scores = [
            dice_iou_precision_recall(decided_HW, mask_HW).dice
            for decided_HW, mask_HW in zip(decided_CHW, mask_CHW, strict=True)
        ]
        dice = [score for score in scores if score is not None]
        return sum(dice) / len(dice) if dice else None

    def _planes(self, mask_MHW: Tensor) -> Tensor:
        """Return a mask as a plane of 0, 1 and 255 a class: as many times larger as classes are."""
        return mask_planes(mask_MHW, self.label_set.task, self.num_classes)

    def _info(self, epoch: int, metrics: dict[str, float]) -> CheckpointInfo:
        return CheckpointInfo(
            head=self.config.head,
            head_options=self.state.settings["head_options"],
            num_classes=num_outputs(self.label_set.task, self.num_classes),
            levels=self.state.levels,
            label_set=self.config.label_set,
            epoch=epoch,
            metrics=metrics,
            settings=self.state.settings,
            trained_on=self.trained_on,
            data=self.data,
            seed=self.config.seed,
            threshold=THRESHOLD,
            task=self.label_set.task,
            classes=self.label_set.classes,
        )

    def _peak_memory_bytes(self) -> int:
        if self.device == "cpu":
            return peak_memory_bytes()
        return int(torch.cuda.max_memory_allocated(self.device))


def _schedule(step: int, num_steps: int, num_warmup: int) -> float:
    """Return a step's share of the learning rate: a straight rise, then half a cosine towards 0."""
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    # The cosine of CosineAnnealingLR, as a function of the step: nothing to save.
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def _class_weights(
    store: FeatureStore, config: TrainConfig, label_set: LabelSetSpec, rows: Division
) -> list[float] | None:
    """Return a weight a class, or None for all alike."""
    if config.class_weights is None:
        return None
    if config.class_weights == BALANCED:
        if len(label_set.classes) == 1:
            raise ConfigError(
                f"class_weights is {BALANCED}, which needs several classes: label set "
                f"{label_set.name} has {label_set.classes[0]} alone; leave it out"
            )
        learned = {group[0] for group in rows.groups}  # an image's own row, without its variants
        return balanced_weights(count_classes(store, label_set.name, only=learned))
    return [float(weight) for weight in config.class_weights]


def _loss(config: TrainConfig, label_set: LabelSetSpec, weights: list[float] | None) -> Loss:
    """Return the loss of a configuration, or the default of what is learned."""
    name = config.loss or default_loss(label_set.task)
    options = dict(config.loss_options)
    if name in CE_WEIGHTS:
        options.setdefault(CE_WEIGHTS[name], config.bce_weight)
    if weights is not None and len(weights) != len(label_set.classes):
        raise ConfigError(
            f"class_weights has {len(weights)} values: expected {len(label_set.classes)}, for "
            f"{', '.join(label_set.classes)}"
        )
    return build_loss(name, label_set.task, class_weights=weights, **options)


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
