"""The first pass: from a manifest to a sealed store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from sam3cache.errors import UnsealedStoreError
from sam3cache.extract.batching import find_batch_size, with_batch_size
from sam3cache.extract.config import (
    LABEL_SET,
    ExtractConfig,
    ExtractProgress,
    ExtractResult,
    TimeShares,
    WorkerStatus,
)
from sam3cache.extract.forecast import Forecast, forecast_job
from sam3cache.extract.job import Job, Report, Tasks, plan_job, read_request, require_folder
from sam3cache.extract.levels import halved_batch_size, is_of_tower
from sam3cache.extract.masks import complete_label_sets, hash_masks, num_new_masks
from sam3cache.extract.pool import leave_if_imported, run_pool
from sam3cache.extract.sharing import WholeCount, next_blocks
from sam3cache.extract.state import StoreState
from sam3cache.extract.worker import BlockTask, WorkerSetup
from sam3cache.features import (
    LABEL_CHANGE,
    BlockClaims,
    Place,
    block_of,
    finish_seal,
    interrupted_change,
    is_sealed,
    note_setting,
    read_description,
    seal_store,
    store_lock,
)
from sam3cache.features.receipts import SEAL_COPY, SEAL_FILE
from sam3cache.records import SetAside

_ReportWorkers = Callable[[Mapping[int, WorkerStatus], int], None]
_RunTasks = Callable[[Sequence[WorkerSetup], Sequence[BlockTask], _ReportWorkers], frozenset[int]]

_LOCK_PATIENCE_S = 60.0
# For a process that has computed already: its holder lives, or the lock would be free.
_LATER_LOCK_PATIENCE_S = 1200.0
_MAX_PAUSES = 5
_MAX_LOOKS = 4
_SAID_AFTER_S = 5.0


def extract(
    config: ExtractConfig,
    report: Report = lambda progress: None,
    announce: Callable[[Forecast], None] = lambda forecast: None,
    warn: Callable[[str], None] = lambda message: None,
) -> ExtractResult:
    """Run SAM 3's vision tower once over every image of a manifest and store its features.

    The same call again resumes: finished blocks are not computed twice, changed images are computed
    anew, and several calls on one store share the work.

    Args:
        config: what to do.
        report: called often, from this thread, with how far it is.
        announce: called once, with what is going to be written.
        warn: called with a sentence on what should be known before long work, or has changed it.

    Raises:
        ManifestError: when the manifest is unusable, or none of its images can be read.
        ConfigError: when an option cannot be used here.
        WeightsError: when the weights are absent or not the backbone's.
        FingerprintError: when the store's features were made differently.
        NumericError: when the tower yields NaN, or overflows float16.
        WorkerError: when workers die whatever they are given.
        StoreError: when the folder is no store, is busy, cannot hold these images, or a change of
            its labels was interrupted.
        NoSpaceError: when what is to be written does not fit on the disk.
    """
    leave_if_imported()
    start_s = time.monotonic()
    root = config.output
    require_folder(root)
    # Before the folder is made or locked: what cannot work leaves nothing behind, and looking at
    # files keeps nobody waiting.
    state = StoreState.read(root, LABEL_SET)
    request = read_request(config, state, report)
    job = plan_job(request, state)
    forecast = forecast_job(job)
    announce(forecast)
    forecast.require_space()
    name = request.manifest.name
    for message in (*request.manifest.notes, *_what_is_lost(job, name), *_what_to_know(job, name)):
        warn(message)
    batch_size = find_batch_size(job)
    num_given, blocks_given = 0, set[int]()
    rank = config.rank
    # All of a launch plan the same at once, one after the other under the lock.
    patience_s = _LOCK_PATIENCE_S * rank.num_processes
    later_patience_s = max(patience_s, _LATER_LOCK_PATIENCE_S)
    run_tasks, whole = _engine(config), None
    with ExitStack() as at_work:
        with _locked(root, job, partial(plan_job, request), patience_s, warn) as job:
            if batch_size is not None:
                job = with_batch_size(job, batch_size)
            masks_before = hash_masks(job.state.receipts, job.changed_masks)
            job = job.describe()
            watch = _Watch(warn, job.settings["batch_size"])
            claims = BlockClaims(root)
            if job.tasks:
                # What a block needs is settled: nobody may change the tables meanwhile.
                at_work.enter_context(claims.at_work())
                if rank.number == 0 and (rank.num_processes > 1 or config.engine == "ray"):
                    whole = WholeCount(root, job.tasks)
        manifest = request.manifest
        del request, state
        num_pauses = 0
        while job.tasks and num_pauses < _MAX_PAUSES:
            free = claims.free(job.tasks.blocks)
            tasks = job.tasks.only(next_blocks(free, rank, claims_work=claims.work))
            ours = tasks
            if tasks:
                tell = watch.over(_reporter(report, tasks, whole))
                elsewhere = run_tasks(job.setups(), tasks, tell)
                ours = tasks.only(block for block in tasks.blocks if block not in elsewhere)
                num_given += ours.num_to_compute()
                blocks_given.update(ours.to_compute().blocks)
            if ours:
                num_pauses = 0
            else:
                # Another launch holds all that is left.
                num_pauses += 1
                if num_pauses == 1 and rank.num_processes == 1:
                    warn(
                        f"{len(job.tasks)} blocks are in the hands of other processes, or of one "
                        "that was killed: waiting for them"
                    )
                time.sleep(claims.pause_s)
            with _locked(root, None, job.at, later_patience_s, warn) as job:
                if watch.batch_size < job.settings["batch_size"] and not is_sealed(root):
                    # Another process of the launch may have come down further.
                    recorded = read_description(root)["settings"]
                    for name, value in halved_batch_size(recorded, watch.batch_size).items():
                        note_setting(root, name, value)
                        recorded[name] = value
                    job = replace(job, settings=recorded)
                if job.tasks and job.state.sealed:
                    # By another launch, with other masks: what is written must not go behind that.
                    job = job.describe()
            if whole is not None:
                num_done = max(0, whole.num_rows - job.tasks.num_rows())
                report(ExtractProgress("extracting", num_done, whole.num_rows, {}))
    masks_after = hash_masks(job.state.receipts, job.changed_masks)
    sealed = not job.tasks and _seal(job, claims, later_patience_s)
    found = _count(job, blocks_given)
    return ExtractResult(
        store=root,
        sealed=sealed,
        num_samples=found.num_usable,
        num_computed=num_given - found.num_spoilt,
        num_relabelled=num_new_masks(masks_before, masks_after),
        num_unmasked=job.num_unmasked,
        num_reannotated=job.annotation_changes.num_changed,
        num_kept=job.plan.num_live - num_given,
        num_renamed=job.plan.num_renamed,
        num_removed=job.plan.num_removed,
        num_replaced=job.plan.num_replaced,
        num_moved=job.annotation_changes.num_moved,
        num_with_mask=found.num_with_mask,
        are_masks_of_manifest=job.label_set is not None,
        num_with_angles=found.num_with_angles,
        num_variants=found.num_variants,
        set_aside=found.set_aside,
        leaks=tuple(manifest.leaks),
        split_rule=manifest.split_rule,
        elapsed_s=time.monotonic() - start_s,
        batch_size=job.settings["batch_size"],
        time_shares=watch.time_shares(),
    )


@contextmanager
def _locked(
    root: Place,
    job: Job | None,
    plan: Callable[[StoreState], Job],
    patience_s: float,
    warn: Callable[[str], None],
) -> Iterator[Job]:
    """Hold the store's lock, with a job for the store as it is described.

    It is read and planned for without the lock, as that may take minutes and others wait for it.
    What others have done of the blocks meanwhile is left to whoever turns to these.

    Args:
        root: the store.
        job: that was planned already, or None.
        plan: makes a job for a state.
        patience_s: how long to wait for the lock.
        warn: called, from another thread, when it has to be waited for.

    Raises:
        StoreBusyError: when another process holds it for longer.
    """
    for _ in range(_MAX_LOOKS):
        if job is None:
            job = plan(StoreState.read(root, LABEL_SET))
        with _waited_for(root, patience_s, warn):
            if job.state.is_described_so:
                yield job
                return
        job = None
    # Somebody changes it over and over.
    with _waited_for(root, patience_s, warn):
        yield plan(StoreState.read(root, LABEL_SET))


@contextmanager
def _waited_for(root: Place, patience_s: float, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the store's lock, and say so where it has to be waited for."""
    said = threading.Timer(
        _SAID_AFTER_S,
        warn,
        [f"{root} is held by another process, or by one that was killed: waiting for it"],
    )
    said.daemon = True
    said.start()
    with ExitStack() as lock:
        try:
            lock.enter_context(store_lock(root, timeout_s=patience_s))
        finally:
            said.cancel()
        yield


def _engine(config: ExtractConfig) -> _RunTasks:
    if config.engine == "ray":
        from sam3cache.extract.ray_engine import run_ray

        return run_ray
    return run_pool


def _reporter(report: Report, tasks: Tasks, whole: WholeCount | None) -> _ReportWorkers:
    """Report on tasks that are done here, or on all that the processes of a launch do together."""
    num_rows = tasks.num_rows() if whole is None else whole.num_rows

    def tell(workers: Mapping[int, WorkerStatus], num_done: int) -> None:
        # What a worker had done when it died is done again.
        num_done = min(num_done, num_rows) if whole is None else whole.num_done()
        report(ExtractProgress("extracting", num_done, num_rows, dict(workers)))

    return tell


@dataclass
class _Watch:
    """Keeps what is to be said of the workers when they have ended, or at once.

    Attributes:
        warn: called once, when memory turns out too small for the batch size.
        batch_size: the smallest that a worker has come down to.
    """

    warn: Callable[[str], None]
    batch_size: int
    _num_rounds: int = 0
    _states: dict[tuple[int, int], WorkerStatus] = field(default_factory=dict)

    def over(self, report: _ReportWorkers) -> _ReportWorkers:
        """Return what keeps the workers' states, and passes them on."""
        self._num_rounds += 1
        number_of_round = self._num_rounds

        def keep(workers: Mapping[int, WorkerStatus], num_done: int) -> None:
            for number, worker in workers.items():
                self._states[number_of_round, number] = worker
                if worker.batch_size < self.batch_size:
                    self.warn(
                        f"{worker.name} has not enough memory for batches of {self.batch_size}: "
                        f"going on with {worker.batch_size}"
                    )
                    self.batch_size = worker.batch_size
            report(workers, num_done)

        return keep

    def time_shares(self) -> TimeShares | None:
        """Return what all workers together spent their time on."""
        return TimeShares.of(self._states.values()) if self._states else None


def _what_is_lost(job: Job, manifest_name: str) -> Iterator[str]:
    """Say which masks are taken away: a manifest that names some speaks for all."""
    if job.num_unmasked:
        yield (
            f"{job.num_unmasked} samples have a mask in {job.state.root} and none in "
            f"{manifest_name}, which names masks of others: theirs are taken away. To have "
            "them back, name them in the manifest and run it again, or set masks by `sam3cache "
            "store labels set`"
        )


def _what_to_know(job: Job, manifest_name: str) -> Iterator[str]:
    """Say what a user should know before long work: why it is done, and what it is good for."""
    if not job.tasks.num_to_compute():
        return
    state, wanted = job.state, job.plan.wanted
    if (
        job.config.engine == "ray"
        and job.config.batch_size is None
        and job.config.devices[0] != "cpu"
        and state.description is None
        and any(map(is_of_tower, job.levels))
    ):
        yield (
            f"with --engine ray nothing measures which batch size suits the nodes: the store takes "
            f"batches of {job.settings['batch_size']}; sam3cache plan on a node measures the rate "
            "of a --batch-size"
        )
    # A table says "ok" from the seal on, and a seal that was broken in order leaves its receipts.
    num_stored = 0 if state.receipts else sum(row.status == "ok" for row in state.rows)
    if num_stored:
        yield (
            f"{state.root} was complete once, but {SEAL_FILE} and {SEAL_COPY} are gone, without "
            f"which nothing vouches for its features: all {num_stored} images are computed anew; "
            "to keep what is there, stop and restore one of the two files"
        )
    lacking = []
    if wanted.largest_mask_px[0] <= 0 and not job.label_sets:
        lacking.append("a mask, without which no head can be trained")
    if not any(
        wanted.is_usable(index)
        and None not in (sample.primary_angle_deg, sample.secondary_angle_deg)
        for index, sample in enumerate(wanted.samples)
    ):
        lacking.append("both view angles, which heads then take as unknown")
    if lacking:
        yield (
            f"no sample of {manifest_name} has {', and none '.join(lacking)}; a manifest "
            "that names them later costs no new features (docs/data.md)"
        )


@dataclass(slots=True)
class _Count:
    num_usable: int
    num_with_mask: int
    num_with_angles: int
    num_variants: int
    num_spoilt: int
    set_aside: tuple[SetAside, ...]


def _count(job: Job, blocks_given: Container[int]) -> _Count:
    """Count what the store holds now; rows of others, who work on it as well, count too.

    Args:
        job: when nothing more is to be done of it.
        blocks_given: to the workers of this process: rows of them that turned out not to be usable
            are counted as spoilt.
    """
    set_aside = []
    count = _Count(0, 0, 0, 0, 0, ())
    wanted = job.plan.wanted
    kept_masks: frozenset[int] = frozenset()
    if job.label_set is None:
        kept_masks = frozenset(line.row for line in job.state.masks.values() if line.present)
    for row in job.state.rows:
        if row.status == "aside" and block_of(row.row) in blocks_given:
            with suppress(KeyError):
                job.plan.index(row.row)
                count.num_spoilt += 1
        if row.variant is not None:
            count.num_variants += row.status == "ok"
            continue
        if row.status == "aside":
            set_aside.append(SetAside(row.id, row.source, row.reason))
        if row.status != "ok":
            continue
        count.num_usable += 1
        with suppress(KeyError):
            sample = wanted.samples[job.plan.index(row.row)]
            angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
            has_mask = row.row in kept_masks if job.label_set is None else sample.mask is not None
            count.num_with_mask += has_mask
            count.num_with_angles += None not in angles
    count.set_aside = tuple(set_aside)
    return count


def _seal(job: Job, claims: BlockClaims, patience_s: float) -> bool:
    """Seal the store unless others have given it more work; return whether it is sealed."""
    root = job.state.root
    for _ in range(_MAX_PAUSES):
        with store_lock(root, timeout_s=patience_s):
            # Nothing is missing, and yet another process writes: other masks, from its manifest.
            if is_sealed(root) or not claims.any_held():
                return _seal_now(job)
        time.sleep(claims.pause_s)
    return False


def _seal_now(job: Job) -> bool:
    """Seal the store, whose lock is held, unless something is missing of it."""
    root = job.state.root
    if is_sealed(root):
        finish_seal(root)
        return True
    state = job.state if job.state.is_current else StoreState.read(root, LABEL_SET)
    tasks = job.tasks if state is job.state else job.at(state).tasks
    if tasks or any(row.status == "pending" for row in state.rows):
        return False
    # Another launch has added a level: it knows what is missing of that one.
    if state.description is not None and set(state.description["levels"]) - set(job.levels):
        return False
    change = interrupted_change(root)
    # It has taken the old set away, which a seal would forget.
    if change.startswith(LABEL_CHANGE):
        raise UnsealedStoreError(
            f"every feature is in {root}, and yet it is not sealed: {change} was interrupted; "
            "run that command again, which seals it"
        )
    label_sets = job.label_sets.values()
    has_noted = complete_label_sets(root, label_sets, state.rows, state.receipts)
    seal_store(root, None if has_noted else state.receipts, state.rows)
    return True
