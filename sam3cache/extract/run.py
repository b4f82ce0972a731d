"""The first pass: from a manifest to a sealed store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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
from sam3cache.extract.rows import Wanted
from sam3cache.extract.state import StoreState
from sam3cache.extract.worker import BlockTask
from sam3cache.features import BlockClaims, finish_seal, seal_store, store_lock
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
        StoreError: when the folder is no store, is busy, or cannot hold these images.
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
    with store_lock(root):
        if not state.is_current:
            job = plan_job(request, StoreState.read(root, LABEL_SET))
        job = job.describe()
    manifest = request.manifest
    del request, state
    claims = BlockClaims(root)
    num_computed = 0
    num_pauses = 0
    while job.tasks and num_pauses < _MAX_PAUSES:
        tasks = [task for task in job.tasks if claims.is_free(task.block)]
        if tasks:
            num_images = sum(len(task.rows) for task in tasks)
            elsewhere = run_pool(job.setups(), tasks, _reporter(report, num_images))
            ours = [task for task in tasks if task.block not in elsewhere]
            num_computed += sum(len(task.rows) for task in ours if _computes(task))
        if tasks and ours:
            num_pauses = 0
        else:
            # Another launch holds all that is left.
            num_pauses += 1
            time.sleep(_PAUSE_S)
        # Locked: whoever seals the store meanwhile folds the receipts that are read here.
        with store_lock(root):
            job = job.at(StoreState.read(root, LABEL_SET))
    sealed = not job.tasks and _seal(job)
    usable = [row for row in job.state.rows if row.status == "ok"]
    owners = job.plan.owners
    return ExtractResult(
        store=root,
        sealed=sealed,
        num_samples=len(usable),
        num_computed=num_computed,
        num_relabelled=job.num_relabelled,
        num_reannotated=job.num_reannotated,
        num_kept=len(owners) - num_computed,
        num_renamed=job.plan.num_renamed,
        num_removed=job.plan.num_removed,
        num_moved=job.plan.num_moved,
        num_with_mask=sum(row.row in owners and _has_mask(owners[row.row]) for row in usable),
        num_with_angles=sum(row.row in owners and _has_angles(owners[row.row]) for row in usable),
        set_aside=tuple(
            SetAside(row.id, row.source, row.reason)
            for row in job.state.rows
            if row.status == "aside"
        ),
        leaks=tuple(manifest.leaks),
        split_rule=manifest.split_rule,
        elapsed_s=time.monotonic() - start_s,
    )


def _reporter(report: Report, num_total: int) -> Callable[[Mapping[int, WorkerStatus], int], None]:
    return lambda workers, num_done: report(
        ExtractProgress("extracting", num_done, num_total, dict(workers))
    )


def _has_mask(item: Wanted) -> bool:
    return item.mask is not None and item.mask.present


def _has_angles(item: Wanted) -> bool:
    return None not in (item.sample.primary_angle_deg, item.sample.secondary_angle_deg)


def _computes(task: BlockTask) -> bool:
    return any(item.startswith("levels.") for item in task.items)


def _seal(job: Job) -> bool:
    """Seal the store unless others have given it more work; return whether it is sealed."""
    root = job.state.root
    with store_lock(root):
        state = job.state if job.state.is_current else StoreState.read(root, LABEL_SET)
        if state.sealed:
            finish_seal(root)
            return True
        if any(row.status == "pending" for row in state.rows) or job.at(state).tasks:
            return False
        seal_store(root)
        return True
