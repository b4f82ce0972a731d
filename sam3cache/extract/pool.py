"""The pool: a spawned process a device, blocks handed out one at a time, dead workers replaced."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from sam3cache.errors import ConfigError, WorkerError
from sam3cache.extract.agenda import Agenda, how_it_ended
from sam3cache.extract.config import WorkerStatus
from sam3cache.extract.worker import (
    NUM_BLOCKS_HELD,
    BlockReport,
    BlockTask,
    WorkerReady,
    WorkerSetup,
    run_worker,
    spawn,
)

_MAX_FALSE_STARTS = 3
# For the batch that a worker is at, and the block that it writes, when the others have given up.
_END_PATIENCE_S = 10.0
# Windows' Ctrl-Break does not interrupt a wait, and is heard behind it.
_POLL_S = 1.0
_IMPORTED_EXIT_CODE = 96


@dataclass
class _Member:
    """A place in the pool; its process is replaced when it dies."""

    setup: WorkerSetup
    process: SpawnProcess
    pipe: Connection
    tasks: list[BlockTask] = field(default_factory=list)
    is_ready: bool = False
    told_to_end: bool = False


def leave_if_imported() -> None:
    """End this process, without a word, if it is a worker that only imports the user's script.

    A spawned process imports the script that it was spawned from. One that extracts without asking
    whether it is the program itself would do so again here; the pool says so in the first process.
    """
    # What multiprocessing itself goes by, when it refuses to spawn from there.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_IMPORTED_EXIT_CODE)


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
        WorkerError: when workers die whatever they are given.
        ConfigError: when the program is a script that extracts while it is being imported.
        Sam3CacheError: what a worker found wrong, as it was raised there.
        OSError: likewise, such as a full disk.
    """
    leave_if_imported()
    agenda = Agenda(tasks, len(setups))
    elsewhere: set[int] = set()
    num_false_starts = 0
    states: dict[int, WorkerStatus] = {}
    num_before: dict[int, int] = {}
    members: dict[int, _Member] = {}

    def start(number: int, setup: WorkerSetup) -> None:
        members[number] = _Member(setup, *spawn(run_worker, setup))
        feed(number)

    def feed(number: int) -> None:
        member = members[number]
        # Near the end fewer: blocks would wait here while other workers are idle.
        num_held = NUM_BLOCKS_HELD
        if len(setups) > 1:
            num_held = max(1, min(NUM_BLOCKS_HELD, len(agenda) // len(setups)))
        try:
            while len(member.tasks) < num_held and not any(map(agenda.is_suspect, member.tasks)):
                task = agenda.take(is_idle=not member.tasks)
                if task is None:
                    break
                # Noted before it is sent: of a worker that has just died it counts as lost.
                member.tasks.append(task)
                member.pipe.send(task)
            if not member.tasks and not member.told_to_end:
                member.told_to_end = True
                member.pipe.send(None)
        except (BrokenPipeError, ConnectionResetError):
            return  # It has died; its end of the pipe tells so in the loop below.

    def take(number: int, message: object) -> None:
        nonlocal num_false_starts
        if isinstance(message, BaseException):
            raise message
        member = members[number]
        if isinstance(message, WorkerReady):
            member.is_ready = True
            num_false_starts = 0
            return
        if isinstance(message, BlockReport):
            task = next(task for task in member.tasks if task.block == message.block)
            member.tasks.remove(task)
            is_proof = message.outcome in ("written", "tried")
            agenda.note_done(task, is_proof=is_proof, place=number)
            if message.outcome in ("held", "found"):
                elsewhere.add(message.block)
            states[number] = message.status
            feed(number)
        elif isinstance(message, WorkerStatus):
            states[number] = message
        report(states, sum(num_before.values()) + sum(s.num_images for s in states.values()))

    def replace_dead(number: int) -> None:
        nonlocal num_false_starts
        member = members.pop(number)
        member.process.join()
        member.pipe.close()
        if member.told_to_end:
            return  # Nothing was left for it to do: however it ended, nothing is lost.
        if number in states:
            num_before[number] = num_before.get(number, 0) + states.pop(number).num_images
        if member.is_ready:
            agenda.note_death(member.tasks, how_it_ended(member.process.exitcode), number)
        else:
            num_false_starts += 1
            if member.process.exitcode == _IMPORTED_EXIT_CODE:
                raise ConfigError(_IMPORTED)
            if num_false_starts >= _MAX_FALSE_STARTS:
                raise WorkerError(_false_start_message(member, num_false_starts))
            agenda.give_back(member.tasks)
        start(number, member.setup)

    try:
        for number, setup in enumerate(setups[: max(1, len(tasks))]):
            start(number, setup)
        while members:
            ready = wait([member.pipe for member in members.values()], _POLL_S)
            for number in [n for n, member in members.items() if member.pipe in ready]:
                message: object = None
                with suppress(EOFError, ConnectionResetError):
                    message = members[number].pipe.recv()
                if message is None:
                    replace_dead(number)
                else:
                    take(number, message)
    finally:
        _end(list(members.values()))
    return frozenset(elsewhere)


def _end(members: Sequence[_Member]) -> None:
    """Let workers end, which they do when their pipe does, and kill those that take too long.

    They do so behind the batch that they are at, and the block that they write: so their temporary
    files go with them, and nothing is said below the line that says what went wrong.
    """
    for member in members:
        member.pipe.close()
    deadline_s = time.monotonic() + _END_PATIENCE_S
    try:
        for member in members:
            member.process.join(max(0.0, deadline_s - time.monotonic()))
    finally:
        # Also where a second Ctrl-C has cut the waiting short.
        for member in members:
            member.process.kill()
            member.process.join()


_IMPORTED = (
    "this script extracts while it is being imported, and each worker imports it: put what it does "
    'into a function, and call that below a line `if __name__ == "__main__":`'
)


def _false_start_message(member: _Member, num_false_starts: int) -> str:
    return (
        f"{num_false_starts} workers in a row have ended before their first picture, the last for "
        f"{member.setup.name} ({how_it_ended(member.process.exitcode)}): see what they printed "
        "above; if nothing, there is too little memory for the tower: close other programs, or try "
        "fewer --devices; what is finished is kept"
    )
