"""The pool: a spawned process a device, blocks handed out one at a time, dead workers replaced."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from sam3cache.errors import WorkerError
from sam3cache.extract.config import WorkerStatus
from sam3cache.extract.worker import (
    NUM_BLOCKS_HELD,
    BlockReport,
    BlockTask,
    WorkerSetup,
    run_worker,
)

MAX_DEATHS_OF_A_BLOCK = 2
# For the batch or block that a worker is at when the others have given up.
_END_PATIENCE_S = 5.0


@dataclass
class _Member:
    """A place in the pool; its process is replaced when it dies."""

    setup: WorkerSetup
    process: SpawnProcess
    pipe: Connection
    tasks: deque[BlockTask] = field(default_factory=deque)
    told_to_end: bool = False


class _Queue:
    """Tasks in their order, each asked for when its turn comes; those given back go first."""

    def __init__(self, tasks: Sequence[BlockTask]) -> None:
        self._tasks, self._next = tasks, 0
        self._returned: deque[BlockTask] = deque()

    def __len__(self) -> int:
        return len(self._returned) + len(self._tasks) - self._next

    def take(self) -> BlockTask:
        if self._returned:
            return self._returned.popleft()
        self._next += 1
        return self._tasks[self._next - 1]

    def give_back(self, tasks: Sequence[BlockTask]) -> None:
        self._returned.extendleft(reversed(tasks))


def run_pool(
    setups: Sequence[WorkerSetup],
    tasks: Sequence[BlockTask],
    report: Callable[[Mapping[int, WorkerStatus], int], None],
) -> frozenset[int]:
    """Do every task, and return the blocks that another process turned out to have or hold.

    Args:
        setups: a worker each.
        tasks: the blocks to do.
        report: called with the workers' states, by worker number, and the number of images put
            through since the start.

    Raises:
        WorkerError: when a block has killed two workers.
        Sam3CacheError: what a worker found wrong, as it was raised there.
        OSError: likewise, such as a full disk.
    """
    context = multiprocessing.get_context("spawn")
    queue = _Queue(tasks)
    elsewhere: set[int] = set()
    deaths: dict[int, int] = {}
    states: dict[int, WorkerStatus] = {}
    num_before: dict[int, int] = {}
    members: dict[int, _Member] = {}

    def start(number: int, setup: WorkerSetup) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_worker, args=(setup, theirs), daemon=True)
        process.start()
        theirs.close()
        members[number] = _Member(setup, process, ours)
        feed(number)

    def feed(number: int) -> None:
        member = members[number]
        try:
            # Near the end, one each: a second block would wait here while others are idle.
            num_held = NUM_BLOCKS_HELD if len(queue) > len(setups) else 1
            while queue and len(member.tasks) < num_held:
                # Noted before it is sent: of a worker that has just died it counts as lost.
                member.tasks.append(queue.take())
                member.pipe.send(member.tasks[-1])
            if not queue and not member.tasks and not member.told_to_end:
                member.told_to_end = True
                member.pipe.send(None)
        except (BrokenPipeError, ConnectionResetError):
            return  # It has died; its end of the pipe tells so in the loop below.

    def take(number: int, message: object) -> None:
        if isinstance(message, BaseException):
            raise message
        member = members[number]
        if isinstance(message, BlockReport):
            task = member.tasks.popleft()
            assert task.block == message.block, (task.block, message.block)
            if message.outcome != "written":
                elsewhere.add(message.block)
            states[number] = message.status
            feed(number)
        elif isinstance(message, WorkerStatus):
            states[number] = message
        report(states, sum(num_before.values()) + sum(s.num_images for s in states.values()))

    def replace_dead(number: int) -> None:
        member = members.pop(number)
        member.process.join()
        member.pipe.close()
        if member.told_to_end:
            return  # Nothing was left for it to do: however it ended, nothing is lost.
        culprit = member.tasks[0]
        deaths[culprit.block] = deaths.get(culprit.block, 0) + 1
        if number in states:
            num_before[number] = num_before.get(number, 0) + states.pop(number).num_images
        if deaths[culprit.block] >= MAX_DEATHS_OF_A_BLOCK:
            raise WorkerError(_death_message(member, culprit))
        queue.give_back(member.tasks)
        start(number, member.setup)

    try:
        for number, setup in enumerate(setups[: max(1, len(tasks))]):
            start(number, setup)
        while members:
            ready = wait([member.pipe for member in members.values()])
            for number in [n for n, member in members.items() if member.pipe in ready]:
                try:
                    message = members[number].pipe.recv()
                except (EOFError, ConnectionResetError):
                    replace_dead(number)
                else:
                    take(number, message)
    finally:
        # A worker ends when its pipe does, behind the batch or block that it is at: so it takes its
        # temporary files along, and nothing is said below the line that says what went wrong.
        for member in members.values():
            member.pipe.close()
        deadline_s = time.monotonic() + _END_PATIENCE_S
        for member in members.values():
            member.process.join(max(0.0, deadline_s - time.monotonic()))
            member.process.kill()
            member.process.join()
    return frozenset(elsewhere)


def _death_message(member: _Member, culprit: BlockTask) -> str:
    how = f"worker {member.setup.name} ended with exit code {member.process.exitcode}"
    sources = ", ".join(sorted({sample.source for sample in culprit.samples.values()})[:3])
    return (
        f"{how}, the second to do so on block {culprit.block} ({sources}, …): too little memory, "
        "or an image that crashes its decoder; see what it printed above, try a smaller "
        "--batch-size, or take these images out of the manifest; what is finished is kept"
    )
