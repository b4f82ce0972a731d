"""What is left to be done, and what to do about blocks on which workers die.

A block that was in a worker's hands when it died is done again by a worker that has nothing else.
One on which that worker dies as well is taken apart: halves of its rows are tried, without anything
being written, and halves of those that kill again, down to single rows. Those that kill are set
aside, and the block is done without them.

A machine, or a device of several, that kills whatever it is given tells itself by that nothing
succeeds on it, a control neither: a picture that has succeeded before, or one of a block that
nobody has begun.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sam3cache.errors import WorkerError
from sam3cache.extract.config import FATAL_REASON
from sam3cache.extract.worker import BlockTask

MAX_DEATHS_OF_A_BLOCK = 2
MAX_DEATHS_IN_A_ROW = 6
"""After which a control is tried: a block may be full of pictures that kill."""


@dataclass
class _Search:
    """The search for the rows of a block that kill workers.

    Attributes:
        task: the whole block.
        num_open: parts of it that are still to be tried.
        fatal: by row, why it is to be set aside.
    """

    task: BlockTask
    num_open: int
    fatal: dict[int, str] = field(default_factory=dict)


class Agenda:
    """Hands out tasks: those that may have killed a worker first, each to a worker of its own.

    Args:
        tasks: in their order, each asked for when its turn comes.
        num_workers: that take them. Each of them may die once or twice before any succeeds.
    """

    def __init__(self, tasks: Sequence[BlockTask], num_workers: int) -> None:
        self._tasks, self._next = tasks, 0
        self._returned: deque[BlockTask] = deque()
        self._suspects: deque[BlockTask] = deque()
        self._num_deaths: dict[int, int] = {}
        self._searches: dict[int, _Search] = {}
        self._max_in_a_row = max(MAX_DEATHS_IN_A_ROW, MAX_DEATHS_OF_A_BLOCK * num_workers)
        self._num_in_a_row = 0
        self._num_in_a_row_at: dict[int, int] = {}
        self._proof: BlockTask | None = None
        self._control: BlockTask | None = None

    def __len__(self) -> int:
        return len(self._suspects) + len(self._returned) + len(self._tasks) - self._next

    def is_suspect(self, task: BlockTask) -> bool:
        """Return whether a task may have killed a worker, so that it has to be alone in one."""
        return task.is_trial or task.block in self._num_deaths

    def take(self, *, is_idle: bool) -> BlockTask | None:
        """Return the next task for a worker, or None when there is none that it may have.

        Args:
            is_idle: whether the worker has nothing in hand.
        """
        if self._suspects and is_idle:
            return self._suspects.popleft()
        if self._returned:
            return self._returned.popleft()
        if self._next == len(self._tasks):
            return None
        self._next += 1
        return self._tasks[self._next - 1]

    def note_done(self, task: BlockTask, *, is_proof: bool, place: int = 0) -> None:
        """Note that a worker has done with a task and lives on.

        Args:
            task: that it was.
            is_proof: whether it has looked at the pictures, rather than found nothing to do.
            place: number of the worker, and of those before and after it on the same device.
        """
        if is_proof and len(task.aside) < len(task.rows):
            self._num_in_a_row = self._num_in_a_row_at[place] = 0
            self._proof = task
        if task is self._control:
            self._control = None
        elif task.is_trial:
            self._close_part(task.block)
        else:
            self._num_deaths.pop(task.block, None)
            self._searches.pop(task.block, None)

    def give_back(self, tasks: Sequence[BlockTask]) -> None:
        """Take back tasks that a worker never began."""
        self._returned.extendleft(task for task in reversed(tasks) if not self.is_suspect(task))
        self._suspects.extendleft(task for task in reversed(tasks) if self.is_suspect(task))

    def note_death(self, tasks: Sequence[BlockTask], how: str, place: int = 0) -> None:
        """Note that a worker has died.

        Args:
            tasks: that it had in hand.
            how: it died, such as "exit code 1".
            place: as for :meth:`note_done`.

        Raises:
            WorkerError: when it seems not to be for a picture.
        """
        self._num_in_a_row += 1
        num_here = self._num_in_a_row_at[place] = self._num_in_a_row_at.get(place, 0) + 1
        # What succeeds elsewhere says nothing for a device on which nothing does.
        is_long = self._num_in_a_row >= self._max_in_a_row or num_here >= MAX_DEATHS_IN_A_ROW
        was_control = any(task is self._control for task in tasks)
        control = self._find_control(tasks) if is_long and self._control is None else None
        if was_control or (is_long and self._control is None and control is None):
            num_told = num_here if num_here >= MAX_DEATHS_IN_A_ROW else self._num_in_a_row
            raise _hopeless(
                f"{num_told} workers have ended one after the other, whatever pictures "
                f"they were given, the last on block {tasks[0].block}",
                how,
            )
        self._note_parts(tasks, how)
        if control is not None:
            # First of all, for the device on which the last worker has died.
            self._control = control
            self._suspects.appendleft(control)

    def _find_control(self, tasks: Sequence[BlockTask]) -> BlockTask | None:
        """Return a picture that is expected to succeed, as a trial; None where there is none."""
        task = self._proof
        if task is None and self._next < len(self._tasks):
            task = self._tasks[-1]
        if task is None:
            # One that was in the same hands as a block that kills.
            known = {*self._searches, *(task.block for task in tasks)}
            task = next((t for t in reversed(self._suspects) if t.block not in known), None)
        rows = () if task is None else tuple(r for r in task.rows if r.row not in task.aside)
        return replace(task, rows=rows[:1], aside={}, is_trial=True) if task and rows else None

    def _note_parts(self, tasks: Sequence[BlockTask], how: str) -> None:
        """Go on with the search for what killed a worker; what was begun first goes first."""
        for task in reversed(tasks):
            if task.is_trial:
                self._take_apart(task, how)
                continue
            num_deaths = self._num_deaths.get(task.block, 0) + 1
            self._num_deaths[task.block] = num_deaths
            if num_deaths < MAX_DEATHS_OF_A_BLOCK:
                self._suspects.appendleft(task)
            elif num_deaths == MAX_DEATHS_OF_A_BLOCK:
                self._searches[task.block] = _Search(task, num_open=1)
                self._take_apart(task, how)
            else:
                raise _hopeless(
                    f"block {task.block} ({_sources(task)}) has ended {num_deaths} workers, though "
                    "its pictures do not one by one",
                    how,
                )

    def _take_apart(self, task: BlockTask, how: str) -> None:
        """Have the halves of what killed a worker tried; a single row is set aside."""
        search = self._searches[task.block]
        rows = task.rows
        if len(rows) > 1:
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                self._suspects.append(replace(task, rows=half, is_trial=True))
                search.num_open += 1
        else:
            source = task.samples[rows[0].row].source
            search.fatal[rows[0].row] = (
                f"{source} {FATAL_REASON} ({how}): it crashes its decoder, or takes more memory "
                "than there is; save it anew, or take it out of the manifest"
            )
        self._close_part(task.block, how)

    def _close_part(self, block: int, how: str = "") -> None:
        search = self._searches[block]
        search.num_open -= 1
        if search.num_open:
            return
        if search.fatal and self._proof is None:
            raise _hopeless(f"each picture of block {block} has ended a worker", how)
        self._suspects.appendleft(replace(search.task, aside=search.fatal))


def how_it_ended(exit_code: int | None) -> str:
    """Say how a process ended: by which signal, where there are signals, or with which code."""
    if exit_code is not None and exit_code < 0:
        try:
            return f"killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"killed by signal {-exit_code}"
    return f"exit code {exit_code}"


def _sources(task: BlockTask) -> str:
    sources = sorted({task.samples[row.row].source for row in task.rows})
    return ", ".join(sources[:3]) + (", …" if len(sources) > 3 else "")


def _hopeless(what: str, how: str) -> WorkerError:
    return WorkerError(
        f"{what} ({how}): too little memory, as a rule; see what they printed above, and try a "
        "smaller --batch-size or fewer --devices; what is finished is kept"
    )
