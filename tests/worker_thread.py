"""Extraction whose worker is a thread of this process, for tests of what is stored.

It does blocks by the worker's own code. Starting a process takes longer than all else that a small
extraction does; those of the pool, and their deaths, are tested in tests/extract/test_extract_tower
and test_extract_faults.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sam3cache.errors import Sam3CacheError
from sam3cache.extract import WorkerStatus
from sam3cache.extract import run as run_module
from sam3cache.extract.worker import BlockReport, BlockTask, WorkerSetup, _Worker


@contextmanager
def threads_as_before() -> Iterator[None]:
    """Undo what a worker sets for its process, and for all that starts from it."""
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, str(num_threads))
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


@threads_as_before()
def run_in_this_process(
    setups: Sequence[WorkerSetup],
    tasks: Sequence[BlockTask],
    report: Callable[[Mapping[int, Any], int], None],
) -> frozenset[int]:
    """Do what the pool does, with one worker that is a thread."""
    ours, theirs = multiprocessing.Pipe()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            _Worker(setups[0], theirs).serve()
        except (Sam3CacheError, OSError) as error:
            failures.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    elsewhere = set()
    try:
        for task in tasks:
            ours.send(task)
        ours.send(None)
        while True:
            message = ours.recv()
            if isinstance(message, BlockReport) and message.outcome != "written":
                elsewhere.add(message.block)
            status = message.status if isinstance(message, BlockReport) else message
            if isinstance(status, WorkerStatus):
                report({0: status}, status.num_images)
    except (EOFError, ConnectionError):
        pass
    finally:
        thread.join()
        ours.close()
    if failures:
        raise failures[0]
    return frozenset(elsewhere)


@contextmanager
def one_process() -> Iterator[None]:
    """Let every extraction in the ``with`` do without a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "run_pool", run_in_this_process)
        yield
