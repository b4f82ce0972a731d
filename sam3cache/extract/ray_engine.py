"""The Ray engine: a worker a device on every node of a Ray cluster, fed by Ray Data.

Rows of a Ray dataset are some blocks each; an actor has a worker process, the pool's own, which
writes them, and gives back how each went. Nothing large travels: pictures and features stay between
the worker and the file system, which every node sees under the same path. Ray Data takes the blocks
of a lost node to others, and starts actors on nodes that are added.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import queue
import secrets
import socket
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sam3cache import runtime
from sam3cache.errors import ConfigError, Sam3CacheError, WorkerError
from sam3cache.extract.config import WorkerStatus
from sam3cache.extract.pool import run_pool
from sam3cache.extract.worker import (
    NUM_BLOCKS_HELD,
    BlockReport,
    BlockTask,
    WorkerSetup,
    run_worker,
    spawn,
)

# A Ray task is so many blocks at the most: between two tasks the tower waits for pictures, and with
# a node goes only what was not yet written of them.
_MAX_TASK_BLOCKS = 32
_REPORT_INTERVAL_S = 1.0
_CONNECT_TIMEOUT_S = 10.0


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine alone.

    Raises:
        ConfigError: when Ray is not installed, or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed: pip install 'sam3cache[ray]', on "
            "every node; or leave --engine out to use the devices of this machine"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    more = {"include_dashboard": False} if address == "local" else {}
    try:
        # Ray itself asks for minutes.
        host, colon, port = address.rpartition("://")[2].rpartition(":")
        if colon:
            socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster could be joined at RAY_ADDRESS={address} ({str(error).splitlines()[0]}"
            "): start one with `ray start --head`, or unset RAY_ADDRESS to use this machine"
        ) from None


def cluster_devices(text: str) -> list[str]:
    """Resolve what the user wrote into torch device names, a worker each.

    Args:
        text: "all" (every GPU of the cluster, or a CPU worker a node where there is none), "cpu"
            (a CPU worker a node) or "cpu:N" for N workers.

    Returns:
        "cpu" or "cuda:0", which is how each worker sees the GPU that Ray gives it.

    Raises:
        ConfigError: when the text cannot be read, or there is no cluster, or none of its nodes
            can have a worker.
    """
    wanted = text.strip().lower()
    if wanted.startswith("cpu:"):
        devices = runtime.parse_devices(wanted)
        connect()
        return devices
    if wanted not in ("all", "cpu"):
        raise ConfigError(
            f"device {text!r}: with --engine ray, Ray chooses the devices; write all, cpu, or "
            "cpu:8 for eight workers"
        )
    connect()
    nodes = _nodes()
    num_gpus = sum(int(node.num_gpus) for node in nodes) if wanted == "all" else 0
    return ["cuda:0"] * num_gpus or ["cpu"] * len(nodes)


def device_name(device: str) -> str:
    """Return what a device of the cluster is called, which this machine may not have."""
    connect()
    import ray

    asking = ray.remote(num_gpus=int(device != "cpu"), num_cpus=1)(_name_here)
    return str(ray.get(asking.remote(device)))


def _name_here(device: str) -> str:
    return runtime.device_memory(device).name


@dataclass(frozen=True, slots=True)
class _Node:
    num_cpus: float
    num_gpus: float


def _nodes() -> list[_Node]:
    import ray

    return usable_nodes(ray.nodes())


def usable_nodes(described: Sequence[Mapping[str, Any]]) -> list[_Node]:
    """Return the nodes that can have a worker.

    Args:
        described: all nodes, as ``ray.nodes()`` has them.

    Raises:
        ConfigError: when there is none.
    """
    resources = [node["Resources"] for node in described if node["Alive"]]
    nodes = [
        _Node(found["CPU"], found.get("GPU", 0)) for found in resources if found.get("CPU", 0) >= 1
    ]
    if not nodes:
        raise ConfigError(
            f"none of the {len(resources)} nodes of the Ray cluster that are up has a CPU, and a "
            "worker needs one: start nodes with `ray start --num-cpus 4`, or leave --engine out to "
            "use the devices of this machine"
        )
    return nodes


def run_ray(
    setups: Sequence[WorkerSetup],
    tasks: Sequence[BlockTask],
    report: Callable[[Mapping[int, WorkerStatus], int], None],
) -> frozenset[int]:
    """Do every task on the nodes of a cluster, and return the blocks that another process holds.

    Args:
        setups: a worker each, to begin with: there are more when nodes are added.
        tasks: the blocks to do.
        report: called about every second, with what all workers together were doing when they last
            finished some blocks, and the number of images in these.

    Raises:
        WorkerError: when a block has killed its worker again and again, or Ray gives up.
        Sam3CacheError: what a worker found wrong, as it was raised there.
        OSError: likewise, such as a full disk.
    """
    connect()
    import ray

    num_images = {task.block: len(task.rows) for task in tasks}
    results: queue.Queue[_Result] = queue.Queue()
    elsewhere: set[int] = set()
    states: dict[str, WorkerStatus] = {}
    num_done = 0

    def collect() -> None:
        for row in _dataset(setups, tasks).iter_rows():
            results.put(pickle.loads(row["result"]))

    # By a thread, since Ray Data says nothing until a row is there.
    collector = ThreadPoolExecutor(1, "collect")
    collecting = collector.submit(collect)
    try:
        while not (collecting.done() and results.empty()):
            with suppress(queue.Empty):
                result = results.get(timeout=_REPORT_INTERVAL_S)
                if result.error is not None:
                    raise result.error
                # "found" is what a node had written before it was lost.
                elsewhere.update(b for b, outcome in result.outcomes.items() if outcome == "held")
                num_done += sum(num_images[block] for block in result.outcomes)
                if result.status is not None:
                    states[result.worker] = result.status
            report({0: _together(states.values())} if states else {}, num_done)
        collecting.result()
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"Ray gave up ({str(error).strip().splitlines()[-1]}); every finished block is kept: "
            "run the same command again to go on"
        ) from error
    finally:
        if not collecting.done():
            # The actors end with the connection, and the thread with them.
            ray.shutdown()
        collector.shutdown(wait=False)
    return frozenset(elsewhere)


def _together(states: Collection[WorkerStatus]) -> WorkerStatus:
    """Return what many workers were doing as if they were one, the fullest of them."""
    return WorkerStatus(
        name=f"{len(states)} worker{'s' * (len(states) > 1)}",
        num_images=sum(state.num_images for state in states),
        num_written=sum(state.num_written for state in states),
        memory_bytes=max(state.memory_bytes for state in states),
        batch_size=min(state.batch_size for state in states),
        elapsed_s=sum(state.elapsed_s for state in states),
        images_s=sum(state.images_s for state in states),
        tower_s=sum(state.tower_s for state in states),
        writing_s=sum(state.writing_s for state in states),
    )


def _dataset(setups: Sequence[WorkerSetup], tasks: Sequence[BlockTask]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    nodes = _nodes()
    on_gpu = setups[0].device != "cpu"
    if on_gpu:
        with_gpus = [node for node in nodes if node.num_gpus]
        if not with_gpus:
            raise WorkerError(
                f"none of the {len(nodes)} nodes of the Ray cluster has a GPU any more; every "
                "finished block is kept: run the same command again when one has"
            )
        num_cpus = min(int(node.num_cpus / node.num_gpus) for node in with_gpus)
    else:
        num_a_node = -(-len(setups) // len(nodes))
        num_cpus = min(int(node.num_cpus) for node in nodes) // num_a_node
    num_cpus = max(1, num_cpus)
    # Its number would be that of a worker on this machine.
    setup = replace(setups[0], name=setups[0].device.partition(":")[0], num_threads=num_cpus)
    rows = [{"tasks": packed} for packed in _pack(tasks, len(setups))]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _BlockWriter,
        fn_constructor_args=(setup,),
        # Without an initial size, a node that is added gets nothing to do.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=max(len(rows), len(setups)), initial_size=len(setups)
        ),
        num_cpus=num_cpus,
        num_gpus=int(on_gpu),
    )


def _pack(tasks: Sequence[BlockTask], num_workers: int) -> Iterator[bytes]:
    """Pack blocks into rows, a Ray task each; large ones first, so that workers end together."""
    begin = 0
    while begin < len(tasks):
        size = (len(tasks) - begin) // (2 * num_workers)
        end = min(len(tasks), begin + min(_MAX_TASK_BLOCKS, max(1, size)))
        yield zlib.compress(pickle.dumps([tasks[place] for place in range(begin, end)]))
        begin = end


@dataclass(frozen=True, slots=True)
class _Result:
    """What an actor gives back for a row.

    Attributes:
        worker: a name for the actor, of its own.
        outcomes: by block, how it went.
        error: for which the run must stop.
        status: of the worker, as it was last.
    """

    worker: str
    outcomes: Mapping[int, str]
    error: Exception | None
    status: WorkerStatus | None


class _BlockWriter:
    """An actor: has a worker process, and hands it the blocks that Ray Data brings.

    Args:
        setup: of the worker.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._name = secrets.token_hex(8)
        self._status: WorkerStatus | None = None
        self._start()

    def _start(self) -> None:
        self._process, self._pipe = spawn(run_worker, self._setup)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        outcomes: dict[int, str] = {}
        failure: Exception | None = None
        try:
            outcomes.update(self._do(pickle.loads(zlib.decompress(row["tasks"]))))
        except (Sam3CacheError, OSError) as error:
            # As a value: raised here, it would be tried again, and wrapped by Ray.
            failure = error
        return {"result": pickle.dumps(_Result(self._name, outcomes, failure, self._status))}

    def _do(self, tasks: Sequence[BlockTask]) -> Iterator[tuple[int, str]]:
        waiting, held = deque(tasks), list[BlockTask]()
        while waiting or held:
            try:
                while waiting and len(held) < NUM_BLOCKS_HELD:
                    held.append(waiting.popleft())
                    self._pipe.send(held[-1])
                message = self._pipe.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                # The pool knows what to do with blocks that kill workers.
                self._process.join()
                self._pipe.close()
                elsewhere = run_pool((self._setup,), held, lambda workers, num_done: None)
                for task in held:
                    yield task.block, "held" if task.block in elsewhere else "written"
                held = []
                self._start()
                continue
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, BlockReport):
                self._status = message.status
                held = [task for task in held if task.block != message.block]
                yield message.block, message.outcome
