"""A process a device, each with a training at a time, or with several that share a stream."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from sam3cache.errors import StoppedError, WorkerError
from sam3cache.runtime import num_cpu_cores, set_num_threads
from sam3cache.training.config import TrainConfig
from sam3cache.training.folders import is_in_use
from sam3cache.training.loop import Progress
from sam3cache.training.stopping import SIGNALS, Stop
from sam3cache.training.together import (
    MAX_TOGETHER,
    Outcome,
    SamplePool,
    failure_text,
    is_device_fault,
    sharing_key,
    train_together,
)

_POLL_S = 0.5
_REPORT_INTERVAL_S = 0.2


@dataclass(frozen=True)
class PoolTask:
    """A training to be done.

    Attributes:
        number: what its outcome is known by.
        config: what to train.
        levels: what is read of samples for it and those that share them with it.
    """

    number: int
    config: TrainConfig
    levels: tuple[str, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What it has to have in common with those it shares its samples with."""
        return sharing_key(self.config)

    @property
    def stream(self) -> tuple[Any, ...]:
        """What it has to have in common with those that it can read one stream with."""
        return (*self.key, self.config.order)


@dataclass(frozen=True)
class PoolProgress:
    """What all devices are doing now.

    Attributes:
        num_images: trained on since this start, over all runs; neither loading counts, nor what
            resumed runs had seen before.
        num_total: how many that will be; a guess until all runs have begun.
        num_ended: runs that have ended, well or not.
        num_runs: runs in all.
        devices: by worker, such as "cuda:1", what it is doing, in words.
    """

    num_images: int
    num_total: int
    num_ended: int
    num_runs: int
    devices: Mapping[str, str]


@dataclass
class _Worker:
    device: str
    label: str
    process: SpawnProcess
    pipe: Connection
    tasks: dict[int, PoolTask] = field(default_factory=dict)
    key: tuple[Any, ...] = ()
    stream: tuple[Any, ...] = ()
    has_lost_device: bool = False


class DevicePool:
    """Hands trainings out to a process a device, and takes their outcomes.

    Args:
        tasks: what to train.
        devices: of each worker; the CPU's share its cores.
        report: called as the work goes on.
        ended: called with the number of each training that has ended, and how.
        stop: asked now and then whether to stop.
    """

    def __init__(
        self,
        tasks: Sequence[PoolTask],
        devices: Sequence[str],
        report: Callable[[PoolProgress], None],
        ended: Callable[[int, Outcome], None],
        stop: Stop,
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        # In the order of the keys' first: trainings that share samples follow each other.
        keys = list(dict.fromkeys(task.key for task in tasks))
        self._queue = sorted(tasks, key=lambda task: keys.index(task.key))
        self._num_of_stream = Counter(task.stream for task in tasks)
        self._devices = list(devices)[: max(1, len(tasks))]
        self._report, self._ended, self._stop = report, ended, stop
        self._workers: list[_Worker] = []
        self._progress: dict[int, Progress] = {}
        self._saying: dict[str, str] = {}
        self._has_ended: set[int] = set()
        self._epochs = {task.number: task.config.epochs for task in tasks}
        self._names = {task.number: task.config.name for task in tasks}
        self._reason: str | None = None

    def run(self) -> str | None:
        """Train everything; return what it was stopped by, if it was.

        Raises:
            WorkerError: when processes cannot work at all.
        """
        if not self._queue:
            return None
        try:
            for number, device in enumerate(self._devices):
                label = device if self._devices.count(device) == 1 else f"{device}:{number}"
                self._start(device, label)
            while self._workers:
                ready = wait([worker.pipe for worker in self._workers], timeout=_POLL_S)
                # First, as the same signal may have ended a worker that was only starting.
                if self._reason is None and (reason := self._stop()) is not None:
                    self._reason = reason
                    self._queue.clear()
                    for worker in self._workers:
                        with suppress(OSError):
                            worker.pipe.send(reason)
                for worker in [w for w in self._workers if w.pipe in ready]:
                    self._listen(worker)
        finally:
            for worker in self._workers:
                worker.pipe.close()
                worker.process.kill()
                worker.process.join()
        return self._reason

    def _start(self, device: str, label: str) -> None:
        ours, theirs = self._context.Pipe()
        num_threads = None
        if self._devices.count("cpu") > 1:
            num_threads = max(1, num_cpu_cores() // self._devices.count("cpu"))
        process = self._context.Process(
            target=_work, args=(theirs, device, num_threads), daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(device, label, process, ours))

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, *content = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._bury(worker)
            return
        if kind == "progress":
            number, progress = content
            self._progress[number] = progress
            self._saying[worker.label] = _words(self._names[number], progress)
            self._tell()
        elif kind == "ended":
            number, outcome = content
            del worker.tasks[number]
            self._note_end(number, outcome)
        elif kind == "lost device":
            worker.has_lost_device = True
            # It has nothing more to do, and could not be relied on to end.
            worker.process.kill()
            # Until it has gone, its claims would keep others from the runs that are put back.
            worker.process.join()
            self._put_back(worker)
        else:
            wanted = self._next(worker) if kind == "ready" else self._more(worker)
            worker.tasks |= {task.number: task for task in wanted}
            # Of one that has just died, its end of the pipe tells.
            with suppress(BrokenPipeError, ConnectionResetError):
                worker.pipe.send(wanted)

    def _next(self, worker: _Worker) -> list[PoolTask]:
        """Take a training from the queue, of those that share what the worker has open if any."""
        if not self._queue:
            return []
        own = [task for task in self._queue if task.key == worker.key]
        task = (own or self._queue)[0]
        self._queue.remove(task)
        worker.key, worker.stream = task.key, task.stream
        return [task]

    def _more(self, worker: _Worker) -> list[PoolTask]:
        """Take what shall go side by side with the training that a worker has begun to stream."""
        share = math.ceil(self._num_of_stream[worker.stream] / len(self._devices))
        num_more = min(share, MAX_TOGETHER) - len(worker.tasks)
        own = [task for task in self._queue if task.stream == worker.stream][: max(0, num_more)]
        for task in own:
            self._queue.remove(task)
        return own

    def _put_back(self, worker: _Worker) -> None:
        """Let the runs go on elsewhere that went side by side with one that has lost the device."""
        tasks = [self._to_go_on(task) for task in worker.tasks.values()]
        worker.tasks.clear()
        if self._reason is None:
            self._queue[:0] = tasks

    def _to_go_on(self, task: PoolTask) -> PoolTask:
        progress = self._progress.get(task.number)
        if progress is None or progress.stage == "load":
            return task
        return replace(task, config=replace(task.config, resume=True, overwrite=False))

    def _bury(self, worker: _Worker) -> None:
        """Note that a worker has gone: at its end, or in the middle of its work."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        self._saying.pop(worker.label, None)
        for number in worker.tasks:
            error = WorkerError(
                f"its process on {worker.label} ended with exit code {worker.process.exitcode}: "
                "too little memory, or a crash; see what it printed above; --resume goes on with "
                "it, --overwrite with a smaller --micro-batch starts it again"
            )
            self._note_end(number, error)
        if self._queue and not worker.tasks and not worker.has_lost_device:
            raise WorkerError(
                f"the process on {worker.label} ended with exit code {worker.process.exitcode} "
                "before it took up any work; see what it printed above"
            )
        if self._queue:
            self._start(worker.device, worker.label)

    def _note_end(self, number: int, outcome: Outcome) -> None:
        self._has_ended.add(number)
        self._ended(number, outcome)
        self._tell()

    def _tell(self) -> None:
        begun = {n: p for n, p in self._progress.items() if p.stage == "train"}
        # Of one that has ended, early or not, nothing is left to do.
        num_images = sum(
            (p.num_total if n in self._has_ended else p.num_done) - p.num_before
            for n, p in begun.items()
        )
        num_to_do = sum(p.num_total - p.num_before for p in begun.values())
        per_epoch = max((p.num_total / self._epochs[n] for n, p in begun.items()), default=0.0)
        to_begin = self._epochs.keys() - begun.keys() - self._has_ended
        num_to_begin = round(per_epoch * sum(self._epochs[number] for number in to_begin))
        self._report(
            PoolProgress(
                num_images=num_images,
                num_total=num_to_do + num_to_begin,
                num_ended=len(self._has_ended),
                num_runs=len(self._epochs),
                devices=dict(self._saying),
            )
        )


def _words(name: str, progress: Progress) -> str:
    if progress.stage == "load":
        return f"{name}, loading {progress.num_done}/{progress.num_total}"
    best = "" if progress.best_dice is None else f", best val Dice {progress.best_dice:.4f}"
    return f"{name}, epoch {progress.epoch}{best}"


def _work(pipe: Connection, device: str, num_threads: int | None) -> None:
    """Train what comes by the pipe until nothing more does; the target of a worker's process."""
    # For the parent, which says by the pipe what to do: of the console, and what a batch system
    # sends to every process of a job.
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if num_threads is not None:
        set_num_threads(num_threads)
    link = _Link(pipe)
    key, pool = None, SamplePool(())
    # Where the parent has gone, nobody listens: what was trained lies on the disk.
    with suppress(BrokenPipeError, ConnectionResetError):
        while tasks := link.ask("ready"):
            if tasks[0].key != key:
                # Room first: what was open is not needed any more.
                key, pool = tasks[0].key, SamplePool(tasks[0].levels)
            if not link.train(tasks[0], device, pool):
                break


class _Link:
    """A worker's side of its pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._reason: str | None = None
        self._told_s: dict[tuple[int, str], float] = {}

    def ask(self, kind: str) -> list[PoolTask]:
        """Ask for trainings; none when it is to stop."""
        if self.stop():
            return []
        self._pipe.send((kind,))
        try:
            answer = self._pipe.recv()
            if isinstance(answer, str):  # crossed on the way: the answer comes next
                self._reason, answer = answer, self._pipe.recv()
        except EOFError:
            return []
        tasks: list[PoolTask] = answer
        return tasks

    def stop(self) -> str | None:
        """Return what wants it to stop."""
        try:
            if self._reason is None and self._pipe.poll():
                self._reason = self._pipe.recv()
        except (EOFError, OSError):
            self._reason = "the end of the program that started it"
        return self._reason

    def train(self, task: PoolTask, device: str, pool: SamplePool) -> bool:
        """Do a training, with those that go along, and send their outcomes.

        Returns:
            Whether this process can do another: a fault of a GPU leaves it to a new one.
        """
        tasks = [task]

        def more() -> list[TrainConfig]:
            own = self.ask("more")
            tasks.extend(own)
            return [_on(device, one) for one in own]

        def report(number: int, progress: Progress) -> None:
            # The first of each stage always: however short a run is, it is counted.
            key, now_s = (tasks[number].number, progress.stage), time.monotonic()
            if now_s - self._told_s.get(key, -math.inf) > _REPORT_INTERVAL_S:
                self._told_s[key] = now_s
                self._pipe.send(("progress", tasks[number].number, progress))

        outcomes = train_together(
            [_on(device, task)], report, self.stop, levels=task.levels, pool=pool, more=more
        )
        for number, outcome in outcomes:
            is_lost = isinstance(outcome, Exception) and is_device_fault(outcome)
            if isinstance(outcome, Exception) and not isinstance(outcome, StoppedError):
                # In words: the parent need not know the errors of a user's own head.
                outcome = WorkerError(failure_text(outcome))
            self._pipe.send(("ended", tasks[number].number, outcome))
            if is_lost:
                self._pipe.send(("lost device",))
                return False
        return True


def _on(device: str, task: PoolTask) -> TrainConfig:
    """Return a training's configuration on a device; resumed where there is something to resume."""
    config = replace(task.config, device=device)
    return replace(config, resume=config.resume and is_in_use(config.run_dir))
