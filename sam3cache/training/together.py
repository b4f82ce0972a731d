"""Several trainings on one device, each as if it were alone, over samples that they share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sam3cache.errors import Sam3CacheError
from sam3cache.features import FeatureStore
from sam3cache.loading import CachedSamples
from sam3cache.loading.joint import JointMember, JointReading
from sam3cache.runtime import is_out_of_memory
from sam3cache.training.config import TrainConfig
from sam3cache.training.loop import Progress, Run, TrainResult
from sam3cache.training.masks import HeldMasks
from sam3cache.training.state import RandomState
from sam3cache.training.stopping import Stop, never

MAX_TOGETHER = 16
"""Trainings that go through a stream side by side: each has weights and moments in memory."""

FAILURES = (Exception,)
"""What a training fails by without the others: code that somebody else wrote may raise anything."""

# What CUDA and its libraries say of a fault after which a process can do nothing more with a GPU.
_DEVICE_FAULT = re.compile(
    r"CUDA error|\[CUDA\]|CU(BLAS|DNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
)

Outcome = TrainResult | Exception


def failure_text(error: Exception) -> str:
    """Return what a training failed by, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, Sam3CacheError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_device_fault(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came of, leaves this process's GPU of no more use to it."""
    while error is not None:
        is_of_device = isinstance(error, RuntimeError) and _DEVICE_FAULT.search(str(error))
        if is_of_device and not is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class SamplePool:
    """Samples that one process has opened, for all its trainings.

    Args:
        levels: what they hold of a sample: what any of the trainings needs.
    """

    def __init__(self, levels: Sequence[str]) -> None:
        self._levels = tuple(levels)
        self._opened: dict[tuple[Any, ...], CachedSamples] = {}
        self.mask = HeldMasks()

    def open(
        self, store: FeatureStore, rows: Sequence[int], levels: Sequence[str], **values: Any
    ) -> CachedSamples:
        """Return samples as ``CachedSamples`` makes them, mostly those that are there already."""
        # Labels or angles may be corrected while runs go on: those that begin then use the new.
        version = (store.seal, "" if store.overlay is None else store.overlay.seal)
        key = (version, tuple(rows), values.get("target_size_px"), values["label_set"])
        if key not in self._opened:
            # Room first: the old ones nobody asks for again.
            self._opened = {k: held for k, held in self._opened.items() if k[0] == version}
            wanted = tuple(dict.fromkeys([*self._levels, *levels]))
            self._opened[key] = CachedSamples(store, rows, wanted, **values)
        return self._opened[key]


def sharing_key(config: TrainConfig) -> tuple[Any, ...]:
    """Return what trainings have to have in common to share their samples.

    To share a stream as well, their ``order`` has to be one.
    """
    return (
        config.store,
        config.overlay or "",
        config.label_set,
        config.feature_precision or "",
        config.loss_size_px,
        config.variants,
        config.folds,
        config.fold_seed,
        config.stratify or "",
        config.residency,
    )


def train_together(
    configs: Sequence[TrainConfig],
    report: Callable[[int, Progress], None] = lambda number, progress: None,
    stop: Stop = never,
    *,
    levels: Sequence[str] = (),
    pool: SamplePool | None = None,
    more: Callable[[], Sequence[TrainConfig]] = list,
) -> Iterator[tuple[int, Outcome]]:
    """Train several heads on one device, each as by ``train``, on a CPU to the bit.

    Where samples are held in memory, one after the other. Where they are streamed, side by side, a
    step each in turn, so that the stream is read once for all of them.

    Args:
        configs: what to train; all of one ``sharing_key``.
        report: called with a training's number, and what it is doing.
        stop: asked after each step.
        levels: what is read of samples beside what the first training needs.
        pool: samples that are open already.
        more: called once, if the samples are streamed, for more trainings to go along.

    Yields:
        By number, a training's result or what it failed by, as soon as it has ended; of one that
        was stopped, the ``StoppedError``.
    """
    samples = pool or SamplePool(levels)
    waiting = list(enumerate(configs))
    lanes: list[_Lane] = []
    readings: list[JointReading] = []
    asked = False
    try:
        while waiting or lanes:
            # Memory that holds the samples is shared anyway: only a stream is worth sharing steps.
            while waiting and (not lanes or (lanes[0].streams and len(lanes) < MAX_TOGETHER)):
                number, config = waiting.pop(0)
                try:
                    run = Run(config, partial(report, number), stop, samples.open, samples.mask)
                except FAILURES as error:
                    yield number, error
                    continue
                lanes.append(_Lane(number, run))
                if lanes[-1].streams and not asked:
                    asked = True
                    first_free = number + len(waiting) + 1
                    waiting += enumerate(more(), start=first_free)
            if lanes and lanes[0].streams:
                readings = _join(lanes)
            try:
                while lanes:
                    lane = min(lanes, key=lambda lane: lane.run.position)
                    outcome = lane.advance()
                    if outcome is not None:
                        lanes.remove(lane)
                        yield lane.number, outcome
            finally:
                for reading in readings:
                    reading.close()
    finally:
        # Whoever takes no more outcomes would leave their folders claimed.
        for lane in lanes:
            lane.run.close()


class _Lane:
    """A training among others: with its own random numbers, and its own place in the stream."""

    def __init__(self, number: int, run: Run) -> None:
        self.number, self.run = number, run
        self._steps = run.steps()
        self._device = torch.device(run.device)
        self._random = RandomState.get(self._device)
        self.members: list[JointMember] = []

    @property
    def streams(self) -> bool:
        """Whether its training samples are streamed."""
        return self.run.train_samples.residency == "stream"

    def advance(self) -> Outcome | None:
        """Take a step; return how the training has ended, if it has."""
        try:
            self._random.set(self._device)
            next(self._steps)
        except StopIteration:
            outcome: Outcome = self.run.result()
        except FAILURES as error:
            outcome = error
        else:
            self._random = RandomState.get(self._device)
            return None
        self.run.close()
        for member in self.members:
            member.leave()
        return outcome


def _join(lanes: Sequence[_Lane]) -> list[JointReading]:
    """Let trainings read what they stream together.

    Indices count in a training's own samples, so only those who have the very same samples join a
    reading. One ``sharing_key`` gives all the same, unless the store has changed in between. To
    train on them in another order is another reading.
    """
    runs = [lane.run for lane in lanes]
    levels = tuple(dict.fromkeys(level for run in runs for level in run.head.needs))
    piece_size = min(run.micro_batch for run in runs)
    for_training: dict[tuple[CachedSamples, int], JointReading] = {}
    for_validation: dict[CachedSamples, JointReading] = {}
    for lane in lanes:
        run, epoch = lane.run, lane.run.state.epoch + 1
        key = (run.train_samples, run.config.order)
        if key not in for_training:
            for_training[key] = JointReading(
                run.train_samples,
                seed=run.config.order,
                shuffle=True,
                piece_size=piece_size,
                levels=levels,
            )
        feed = for_training[key].join(run.train_indices, epoch=epoch, start=run.state.num_seen)
        run.train_feed = feed
        lane.members.append(feed)
        if run.val_samples.residency != "stream":
            continue
        if run.val_samples not in for_validation:
            for_validation[run.val_samples] = JointReading(
                run.val_samples, with_target=False, piece_size=piece_size, levels=levels
            )
        indices = run.val_indices if run.config.folds else None
        feed = for_validation[run.val_samples].join(partial(_always, indices), epoch=epoch)
        run.val_feed = feed
        lane.members.append(feed)
    return [*for_training.values(), *for_validation.values()]


def _always(indices: Sequence[int] | None, epoch: int) -> Sequence[int] | None:
    return indices
