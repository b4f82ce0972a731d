"""Which rows of a block kill workers is found out, unless the machine kills them all."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sam3cache.errors import WorkerError
from sam3cache.extract.agenda import MAX_DEATHS_IN_A_ROW, Agenda, how_it_ended
from sam3cache.extract.config import FATAL_REASON
from sam3cache.extract.worker import NUM_BLOCKS_HELD, BlockTask
from sam3cache.features import LabelRow, SampleRow
from sam3cache.records import Sample


def block(number: int, num_rows: int = 16) -> BlockTask:
    numbers = range(16 * number, 16 * number + num_rows)
    return BlockTask(
        block=number,
        items=frozenset({"samples"}),
        rows=tuple(SampleRow(row, f"s{row}", f"{row}.png") for row in numbers),
        samples={row: Sample(f"s{row}", f"{row}.png", Path()) for row in numbers},
        masks={row: LabelRow(row) for row in numbers},
    )


class Worker:
    """Does what an agenda hands out, in the order in which it comes; dies of fatal rows."""

    def __init__(self, agenda: Agenda, fatal: set[int]) -> None:
        self.agenda, self.fatal = agenda, fatal
        self.num_deaths = 0
        self.written: dict[int, dict[int, str]] = {}

    def work(self) -> None:
        held: list[BlockTask] = []
        while True:
            while len(held) < NUM_BLOCKS_HELD and not any(map(self.agenda.is_suspect, held)):
                task = self.agenda.take(is_idle=not held)
                if task is None:
                    break
                held.append(task)
            if not held:
                return
            # Pictures are decoded ahead: what kills is not always the block in the tower.
            rows = {row.row for task in held for row in task.rows if row.row not in task.aside}
            if rows & self.fatal:
                self.num_deaths += 1
                self.agenda.note_death(held, "exit code 1")
                held = []
                continue
            task = held.pop(0)
            if not task.is_trial:
                self.written[task.block] = dict(task.aside)
            self.agenda.note_done(task, is_proof=True)


@pytest.mark.parametrize(
    "fatal",
    [
        (),
        (0,),
        (15,),
        (36,),
        (16, 31),
        (18, 19),
        (5, 34),
        (3, 20),
        (32, 33),
        (0, 4, 8),
        (0, 4, 8, 12),
        tuple(range(16, 32)),
        tuple(range(16)),
        tuple(range(31)),
    ],
    ids=str,
)
def test_fatal_rows_are_set_aside_and_all_others_are_written(fatal: Sequence[int]) -> None:
    worker = Worker(Agenda([block(0), block(1), block(2, 5)], num_workers=1), {*fatal})
    worker.work()
    expected = {*fatal}
    assert sorted(worker.written) == [0, 1, 2]
    aside = {row: reason for rows in worker.written.values() for row, reason in rows.items()}
    assert aside.keys() == expected
    for row, reason in aside.items():
        assert reason.startswith(f"{row}.png {FATAL_REASON} (exit code 1): ")
    # A start for each: twice for the block, and once for each half that holds it.
    assert worker.num_deaths <= 2 + 6 * len(expected)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_machine_that_kills_all_ends_it_soon_and_sets_nothing_aside(
    num_rows: int, num_blocks: int
) -> None:
    tasks = [block(number, num_rows) for number in range(num_blocks)]
    worker = Worker(Agenda(tasks, num_workers=1), set(range(16 * num_blocks)))
    with pytest.raises(WorkerError, match="too little memory, as a rule") as failure:
        worker.work()
    assert worker.num_deaths <= MAX_DEATHS_IN_A_ROW + 1
    assert worker.written == {}
    assert "\n" not in str(failure.value)


def test_a_device_that_kills_all_sets_nothing_aside_while_another_works() -> None:
    agenda = Agenda([block(number) for number in range(50)], num_workers=2)

    def work() -> None:
        while True:
            # The worker that has just been started anew has nothing in hand: it gets the suspects.
            given, other = agenda.take(is_idle=True), agenda.take(is_idle=False)
            assert given is not None
            assert other is not None
            assert not given.aside
            agenda.note_done(other, is_proof=True, place=0)
            agenda.note_death([given], "exit code 1", place=1)

    with pytest.raises(WorkerError, match=f"^{MAX_DEATHS_IN_A_ROW + 1} workers have ended one"):
        work()


def test_where_all_devices_kill_their_workers_are_counted_together() -> None:
    agenda = Agenda([block(number) for number in range(50)], num_workers=4)

    def work() -> None:
        for number in range(50):
            given = agenda.take(is_idle=True)
            assert given is not None
            agenda.note_death([given], "exit code 1", place=number % 4)

    with pytest.raises(WorkerError, match=r"^9 workers have ended one after the other"):
        work()


def test_a_block_that_kills_only_as_a_whole_is_named() -> None:
    agenda = Agenda([block(0), block(1)], num_workers=1)

    def work() -> None:
        while (task := agenda.take(is_idle=True)) is not None:
            if task.block == 0 and len(task.rows) == 16:
                agenda.note_death([task], "killed by SIGKILL")
            else:
                agenda.note_done(task, is_proof=True)

    with pytest.raises(WorkerError, match=r"block 0 \(0\.png, 1\.png, 10\.png, …\) has ended 3"):
        work()


def test_a_suspect_goes_to_a_worker_that_has_nothing_else() -> None:
    agenda = Agenda([block(0), block(1), block(2)], num_workers=2)
    first = [agenda.take(is_idle=True), agenda.take(is_idle=False)]
    held = [task for task in first if task is not None]
    agenda.note_death(held, "exit code 1")
    assert len(agenda) == 3
    busy = agenda.take(is_idle=False)
    assert busy is not None
    assert busy.block == 2
    assert agenda.take(is_idle=False) is None
    idle = agenda.take(is_idle=True)
    assert idle is not None
    assert idle.block == 0
    assert agenda.is_suspect(idle)
    agenda.note_done(idle, is_proof=True)
    assert not agenda.is_suspect(idle)


def test_tasks_that_were_never_begun_are_no_suspects() -> None:
    agenda = Agenda([block(0), block(1)], num_workers=1)
    held = [task for task in (agenda.take(is_idle=True), agenda.take(is_idle=False)) if task]
    agenda.give_back(held)
    assert [agenda.take(is_idle=True), agenda.take(is_idle=False)] == held
    assert not any(map(agenda.is_suspect, held))


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_what_ended_a_process_is_named() -> None:
    assert how_it_ended(1) == "exit code 1"
    assert how_it_ended(-signal.SIGSEGV) == "killed by SIGSEGV"
