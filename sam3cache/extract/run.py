"""The first pass: from a manifest to a sealed store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from sam3cache.errors import UnsealedStoreError
from sam3cache.extract.config import (
    LABEL_SET,
    ExtractConfig,
    ExtractProgress,
    ExtractResult,
    WorkerStatus,
)
from sam3cache.extract.forecast import Forecast, forecast_job
from sam3cache.extract.job import Job, Report, plan_job, read_request, require_folder
from sam3cache.extract.pool import run_pool
from sam3cache.extract.state import StoreState
from sam3cache.features import (
    LABEL_CHANGE,
    BlockClaims,
    finish_seal,
    interrupted_change,
    seal_store,
    store_lock,
)
from sam3cache.records import SetAside

_MAX_PAUSES = 5
_PAUSE_S = 2.0


def extract(
    config: ExtractConfig,
    report: Report = lambda progress: None,
    announce: Callable[[Forecast], None] = lambda forecast: None,
) -> ExtractResult:
    """Run SAM 3's vision tower once over every image of a manifest and store its features.

    The same call again resumes: finished blocks are not computed twice, changed images are computed
    anew, and several calls on one store share the work.

    Args:
        config: what to do.
        report: called often, from this thread, with how far it is.
        announce: called once, with what is going to be written.

    Raises:
        ManifestError: when the manifest is unusable, or none of its images can be read.
        ConfigError: when an option cannot be used here.
        WeightsError: when the weights are absent or not the backbone's.
        FingerprintError: when the store's features were made differently.
        NumericError: when the tower yields NaN, or overflows float16.
        WorkerError: when a block kills two workers.
        StoreError: when the folder is no store, is busy, cannot hold these images, or a change of
            its labels was interrupted.
        NoSpaceError: when what is to be written does not fit on the disk.
    """
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
    num_computed = 0
    with ExitStack() as at_work:
        with store_lock(root):
            if not state.is_current:
                job = plan_job(request, StoreState.read(root, LABEL_SET))
            job = job.describe()
            claims = BlockClaims(root)
            if job.tasks:
                # What a block needs is settled: nobody may change the tables meanwhile.
                at_work.enter_context(claims.at_work())
        manifest = request.manifest
        del request, state
        num_pauses = 0
        while job.tasks and num_pauses < _MAX_PAUSES:
            tasks = job.tasks.only({block for block in job.tasks.blocks if claims.is_free(block)})
            ours = tasks
            if tasks:
                elsewhere = run_pool(job.setups(), tasks, _reporter(report, tasks.num_rows()))
                ours = tasks.only(set(tasks.blocks) - elsewhere)
                num_computed += ours.num_to_compute()
            if ours:
                num_pauses = 0
            else:
                # Another launch holds all that is left.
                num_pauses += 1
                time.sleep(_PAUSE_S)
            # Locked: whoever seals the store meanwhile folds the receipts that are read here.
            with store_lock(root):
                job = job.at(StoreState.read(root, LABEL_SET))
    sealed = not job.tasks and _seal(job)
    found = _count(job)
    return ExtractResult(
        store=root,
        sealed=sealed,
        num_samples=found.num_usable,
        num_computed=num_computed,
        num_relabelled=job.num_relabelled,
        num_reannotated=job.annotation_changes.num_changed,
        num_kept=job.plan.num_live - num_computed,
        num_renamed=job.plan.num_renamed,
        num_removed=job.plan.num_removed,
        num_moved=job.annotation_changes.num_moved,
        num_with_mask=found.num_with_mask,
        num_with_angles=found.num_with_angles,
        num_variants=found.num_variants,
        set_aside=found.set_aside,
        leaks=tuple(manifest.leaks),
        split_rule=manifest.split_rule,
        elapsed_s=time.monotonic() - start_s,
    )


def _reporter(report: Report, num_total: int) -> Callable[[Mapping[int, WorkerStatus], int], None]:
    return lambda workers, num_done: report(
        ExtractProgress("extracting", num_done, num_total, dict(workers))
    )


@dataclass(slots=True)
class _Count:
    num_usable: int
    num_with_mask: int
    num_with_angles: int
    num_variants: int
    set_aside: tuple[SetAside, ...]


def _count(job: Job) -> _Count:
    """Count what the store holds now; rows of others, who work on it as well, count too."""
    set_aside = []
    count = _Count(0, 0, 0, 0, ())
    wanted = job.plan.wanted
    for row in job.state.rows:
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
            count.num_with_mask += sample.mask is not None
            count.num_with_angles += None not in angles
    count.set_aside = tuple(set_aside)
    return count


def _seal(job: Job) -> bool:
    """Seal the store unless others have given it more work; return whether it is sealed."""
    root = job.state.root
    with store_lock(root):
        state = job.state if job.state.is_current else StoreState.read(root, LABEL_SET)
        if state.sealed:
            finish_seal(root)
            return True
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
        seal_store(root, state.receipts, state.rows)
        return True
