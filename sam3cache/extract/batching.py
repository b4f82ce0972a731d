"""How many images a forward pass takes: as many as make it faster, found by trying."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sam3cache.errors import Sam3CacheError
from sam3cache.extract.config import ExtractConfig
from sam3cache.extract.job import Job
from sam3cache.extract.levels import is_of_tower
from sam3cache.extract.worker import WorkerSetup, begin_process, load_runner, spawn
from sam3cache.features import BLOCK_ROWS
from sam3cache.geometry import INPUT_SIZE_PX

MIN_GAIN = 0.05
"""By this share an images-a-second has to grow for a batch of twice the size to be worth it."""

MIN_IMAGES = 256
"""Of fewer, to load the tower once more takes longer than the best batch saves."""

_MEASURE_S = 0.5
_MIN_BATCHES = 3


def find_batch_size(job: Job) -> int | None:
    """Measure on the first device which batch size suits a new store.

    Returns:
        None where there is nothing to choose: it is given, or the store's; the device is a CPU,
        which one image keeps busy; or the images are few.

    Raises:
        Sam3CacheError: what is wrong with the weights or the device.
    """
    return choose_batch_size(
        job.config, job.state.description, job.setups()[0], job.tasks.num_to_compute()
    )


def choose_batch_size(
    config: ExtractConfig,
    description: Mapping[str, Any] | None,
    setup: WorkerSetup,
    num_to_compute: int,
) -> int | None:
    """Measure on a worker's device, if an extraction of so many images would.

    Args:
        config: what to do.
        description: of the store, None when there is none yet.
        setup: of the worker.
        num_to_compute: images that lack a level.

    Returns:
        None where there is nothing to choose, as :func:`find_batch_size` says.

    Raises:
        Sam3CacheError: what is wrong with the weights or the device.
    """
    if config.batch_size is not None or _is_begun(description) or config.engine != "local":
        return None
    if not setup.device.startswith("cuda") or not any(map(is_of_tower, setup.levels)):
        return None
    return measure_batch_size(setup) if num_to_compute >= MIN_IMAGES else None


def with_batch_size(job: Job, batch_size: int) -> Job:
    """Return a job with the batch size that was found, unless others have begun with theirs."""
    if _is_begun(job.state.description):
        return job
    return replace(job, settings={**job.settings, "batch_size": batch_size})


def _is_begun(description: Mapping[str, Any] | None) -> bool:
    """Return whether the store has features, and with them a batch size."""
    return description is not None and any(map(is_of_tower, description["levels"]))


def find_knee(seconds: Callable[[int], float | None], max_size: int = BLOCK_ROWS) -> int:
    """Double a batch as long as images a second grow by :data:`MIN_GAIN`.

    Args:
        seconds: that a batch of a size takes; None where memory is too small for it.
        max_size: of a batch.
    """
    best, best_rate, size = 1, 0.0, 1
    while size <= max_size:
        elapsed_s = seconds(size)
        if elapsed_s is None or size / elapsed_s < best_rate * (1 + MIN_GAIN):
            break
        best, best_rate = size, size / elapsed_s
        size *= 2
    return best


def measure_batch_size(setup: WorkerSetup) -> int:
    """Return where the knee is on a worker's device; in a process, with which all memory goes.

    Raises:
        Sam3CacheError: what is wrong with the weights or the device.
    """
    process, pipe = spawn(_measure, setup)
    found: object = setup.batch_size
    try:
        # One that has died has said why, and the workers will say it again.
        with suppress(EOFError, ConnectionResetError):
            found = pipe.recv()
    finally:
        pipe.close()
        process.kill()
        process.join()
    if isinstance(found, Sam3CacheError):
        raise found
    assert isinstance(found, int)
    return found


def _measure(setup: WorkerSetup, pipe: Connection) -> None:
    """Measure, and send the batch size; the entry point of the spawned process."""
    from sam3cache.backbone import ignore_warnings_of_sam3

    begin_process()
    ignore_warnings_of_sam3()
    try:
        found: int | Sam3CacheError = knee_of_device(setup)
    except Sam3CacheError as error:
        found = error
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.send(found)


def knee_of_device(setup: WorkerSetup) -> int:
    """Return where the knee is on a worker's device, on pictures of noise.

    Raises:
        Sam3CacheError: what is wrong with the weights or the device.
    """
    runner = load_runner(setup)
    buffers = runner.make_buffers()
    noise = np.random.default_rng(0)
    shape = (BLOCK_ROWS, 3, INPUT_SIZE_PX, INPUT_SIZE_PX)
    pictures = list(noise.integers(0, 256, shape, dtype=np.uint8))

    def seconds(size: int) -> float | None:
        out = {base: buffer[:size] for base, buffer in buffers.items()}
        # The first of a size chooses kernels and takes memory.
        for _ in range(_MIN_BATCHES):
            if not runner.put_through(pictures[:size], out):
                return None
        runner.drain()
        num_batches, begun_s = 0, time.monotonic()
        while num_batches < _MIN_BATCHES or time.monotonic() - begun_s < _MEASURE_S:
            if not runner.put_through(pictures[:size], out):
                return None
            num_batches += 1
        runner.drain()
        return (time.monotonic() - begun_s) / num_batches

    return find_knee(seconds)
