"""Many trainings as one: heads from a file, seeds and folds, over all devices of a machine."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sam3cache.errors import CheckpointError, ConfigError, HeadError, StoppedError
from sam3cache.features import FeatureStore, open_store
from sam3cache.training.config import TrainConfig, variants_text
from sam3cache.training.division import data_settings, divide, masks_sha256
from sam3cache.training.folders import (
    claimed,
    is_in_use,
    is_run,
    mark_to_replace,
    require_unused,
    runs_in,
)
from sam3cache.training.loop import TrainResult
from sam3cache.training.outlook import levels_of_head
from sam3cache.training.pool import DevicePool, PoolProgress, PoolTask
from sam3cache.training.state import RunState, as_begun, check_same, read_record
from sam3cache.training.stopping import Stop, never, stopped
from sam3cache.training.summary import RunOutcome, SummaryFile
from sam3cache.training.together import Outcome, failure_text

# What all trainings of a file have in common, and what is made up for each of them.
_NOT_IN_A_FILE = frozenset(
    {"store", "output", "resume", "overwrite", "device", "allow_unsealed", "folds", "fold"}
)


@dataclass(frozen=True)
class PlannedRun:
    """One of many trainings.

    Attributes:
        experiment: what it is a run of, with a seed and a fold of its own.
        config: what to train.
    """

    experiment: str
    config: TrainConfig


def read_experiments(path: Path, base: TrainConfig) -> list[TrainConfig]:
    """Read experiments from a TOML file: ``[[experiment]]`` tables, and ``[defaults]`` for all.

    Keys are the attributes of :class:`TrainConfig`; ``name`` names an experiment.

    Args:
        path: of the file.
        base: what holds where the file says nothing.

    Returns:
        A configuration an experiment, in the order of the file.

    Raises:
        ConfigError: the file cannot be read, or an experiment cannot be trained.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; write the experiments into it, or check its path"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}; correct it") from error
    if unknown := sorted(content.keys() - {"defaults", "experiment"}):
        raise ConfigError(
            f"{path} has {unknown[0]!r}: expected [defaults] and [[experiment]] tables alone"
        )
    defaults, tables = content.get("defaults", {}), content.get("experiment", [])
    if not (isinstance(defaults, dict) and isinstance(tables, list) and tables):
        raise ConfigError(
            f"{path} names no experiment: write an [[experiment]] table for each, with its name"
        )
    configs: list[TrainConfig] = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}, experiment {number}"
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise ConfigError(f'{where} has no name: write name = "...", its folder')
        _check_names(where, {**defaults, **table})
        try:
            configs.append(replace(base, **{**defaults, **table}))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        # Windows and macOS do not tell capitals from small letters in the name of a folder.
        if [config.name.casefold() for config in configs].count(table["name"].casefold()) > 1:
            raise ConfigError(f"{where} is named {table['name']!r}, as another is; rename one")
    return configs


def _check_names(where: str, table: Mapping[str, Any]) -> None:
    known = sorted({field.name for field in fields(TrainConfig)} - _NOT_IN_A_FILE)
    for name in table:
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {like[0]}?" if like else f"expected some of {', '.join(known)}"
            raise ConfigError(f"{where}: {name!r} is no setting of an experiment; {hint}")


def plan_runs(
    experiments: Sequence[TrainConfig], *, seeds: int = 1, folds: int = 0
) -> list[PlannedRun]:
    """Return the runs of some experiments.

    Args:
        experiments: by their names; runs go into ``output/NAME``, with -seed1 and -fold0 behind
            where there are several. Of the stored variants they draw from those that the runs of
            their experiment which are there already began with.
        seeds: runs of each that differ in their seed, counted up from the experiment's own.
        folds: parts of a cross-validation; 0: none.

    Raises:
        ConfigError: a number that cannot be, or runs that are there drew from several choices of
            variants, so that one to begin could be like some of them alone.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}: expected at least 1")
    if folds < 0:
        raise ConfigError(f"folds is {folds}: expected 0 (none), or at least 2")
    planned = []
    for config in experiments:
        for seed in range(config.seed, config.seed + seeds):
            for fold in range(folds) if folds else (None,):
                name = config.name + (f"-seed{seed}" if seeds > 1 else "")
                name += "" if fold is None else f"-fold{fold}"
                own = replace(config, name=name, seed=seed, folds=folds, fold=fold)
                planned.append(PlannedRun(config.name, own))
    return _with_variants_of_the_first(planned)


def _with_variants_of_the_first(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Let runs that are still to begin draw from the variants of those that have begun."""
    replaced = {run.config.name for run in planned if run.config.overwrite}
    open_to_it = [run for run in planned if run.config.variants == "all"]
    first_of = {run.experiment: run for run in open_to_it}
    begun = {name: _variants_of(run, replaced) for name, run in first_of.items()}
    settled = []
    for run in planned:
        config, there = run.config, sorted(begun.get(run.experiment, ()))
        if _record(config) is not None:
            config = as_begun(config)
        elif len(there) == 1:
            config = replace(config, variants=there[0])
        elif there:
            told = ", ".join(f"{name} {names}" for names, name in begun[run.experiment].items())
            raise ConfigError(
                f"the runs of {run.experiment} that are there began with several choices of stored "
                f"variants ({told}): {config.name} could be like one of them alone; name them by "
                "--variants, or begin under another --name"
            )
        settled.append(PlannedRun(run.experiment, config))
    return settled


def _variants_of(run: PlannedRun, replaced: Collection[str]) -> dict[str, str]:
    """Return what variants the runs of an experiment began with, each with one that did."""
    found = dict[str, str]()
    folder = Path(run.config.output)
    of_it = re.compile(re.escape(run.experiment) + r"(-seed\d+)?(-fold\d+)?")
    for name in runs_in(folder):
        if of_it.fullmatch(name) and name not in replaced:
            record = _record_in(folder / name)
            if record is not None and "variants_used" in record.settings:
                found.setdefault(variants_text(record.settings["variants_used"]), name)
    return found


def _record(config: TrainConfig) -> RunState | None:
    """Return where the run to resume stands; None: it is to begin, or cannot be read."""
    return _record_in(config.run_dir) if config.resume else None


def _record_in(run_dir: Path) -> RunState | None:
    try:
        return read_record(run_dir)
    except CheckpointError:
        return None  # The run itself says what is the matter.


def run_experiments(
    runs: Sequence[PlannedRun],
    devices: Sequence[str],
    report: Callable[[PoolProgress], None] = lambda progress: None,
    stop: Stop = never,
    announce: Callable[[list[TrainConfig]], None] = lambda configs: None,
) -> list[RunOutcome]:
    """Train all runs, a process a device, and write ``summary.json`` beside their folders.

    Each run comes out as if it were alone. One that fails is set aside, the others go on.

    Args:
        runs: of one store and one output folder.
        devices: of each worker, such as ["cuda:0", "cuda:1"], or ["cpu", "cpu"].
        report: called as the work goes on.
        stop: asked now and then whether to stop.
        announce: called once, when nothing stands against the runs, with those not finished yet.

    Returns:
        How each run stands, in the order of ``runs``.

    Raises:
        ConfigError: the output holds runs already, is a run or another process's, folds cannot
            be made, or runs to resume began with other settings or data.
        HeadError: the head of an experiment cannot be built; nothing has been trained then.
        StoreError: the store cannot be used.
        StoppedError: it was told to stop, and all runs have saved where they were.
    """
    configs = [run.config for run in runs]
    # By overlay, which changes labels and annotations, and so splits.
    stores = {
        one.overlay: open_store(one.store, allow_unsealed=one.allow_unsealed, overlay=one.overlay)
        for one in {config.overlay: config for config in configs}.values()
    }
    # What stands against the folds of one label set stands against all of its runs.
    first_of = {
        (one.overlay, one.label_set, one.variants, one.fold_seed, one.stratify): one
        for one in reversed(configs)
        if one.folds and one.label_set in stores[one.overlay].label_sets
    }
    for one in first_of.values():
        divide(stores[one.overlay], one)
    _require_room(runs)
    # Those that draw from the same rows share them, however they were asked for.
    runs = [
        PlannedRun(
            run.experiment, replace(run.config, variants=_all_of(stores[run.config.overlay]))
        )
        if run.config.variants == "all"
        else run
        for run in runs
    ]
    levels = _levels_needed(runs)
    with claimed(Path(configs[0].output)):
        _require_room(runs)  # Another may have been quicker.
        _require_same(runs, stores)
        announce([run.config for run in runs if not _is_finished(run.config)])
        _mark_to_replace(runs)  # Last: what is refused leaves what is there.
        return _run_all(runs, levels, devices, report, stop)


def _all_of(store: FeatureStore) -> str:
    return variants_text(sorted({str(variant.variant) for variant in store.variants}))


def _require_same(runs: Sequence[PlannedRun], stores: Mapping[str | None, FeatureStore]) -> None:
    """Refuse runs of which some began with other settings or data than the rest would.

    Before any begins: those that are done stay so in the summary, and no experiment has seeds that
    learned from other data than each other.
    """
    data = dict[tuple[Any, ...], tuple[dict[str, Any], str]]()
    for config in (run.config for run in runs):
        record = _record(config)
        if record is None:
            continue
        key: tuple[Any, ...] = (config.overlay, config.label_set, config.variants)
        key += (config.folds, config.fold, config.fold_seed, config.stratify)
        if key not in data:
            store = stores[config.overlay]
            rows = divide(store, config)
            masks = masks_sha256(store, rows.all, config.label_set)
            data[key] = data_settings(store, rows, config.label_set), masks
        settings, masks = data[key]
        # What a run settles for itself is compared by the run.
        given = config.settings()
        for name, open_to_it in (("learning_rate", None), ("precision", "auto")):
            if given[name] == open_to_it:
                del given[name]
        try:
            check_same(record, {**record.settings, **given, **settings}, masks)
        except ConfigError as error:
            raise ConfigError(f"run {config.name}: {error} (no run has begun)") from error


def _mark_to_replace(runs: Sequence[PlannedRun]) -> None:
    """Mark what ``--overwrite`` is to replace, unless any of it is at work."""
    folders = [run.config.run_dir for run in runs if run.config.overwrite]
    with ExitStack() as stack:
        for folder in folders:
            if is_in_use(folder):
                stack.enter_context(claimed(folder))
        for folder in folders:
            mark_to_replace(folder)


def _is_finished(config: TrainConfig) -> bool:
    record = _record(config)
    return record is not None and config.is_over(record.epoch, record.best_epoch)


def _require_room(runs: Sequence[PlannedRun]) -> None:
    """Refuse a folder that holds some of the runs already, or is a run itself."""
    folder = Path(runs[0].config.output)
    if is_run(folder) and not runs_in(folder):
        raise ConfigError(
            f"{folder} is a single run, and not a folder for several; choose another --name"
        )
    for run in runs:
        require_unused(run.config, go_on="all that is not done", replace="them")


def _run_all(
    runs: Sequence[PlannedRun],
    levels: tuple[str, ...],
    devices: Sequence[str],
    report: Callable[[PoolProgress], None],
    stop: Stop,
) -> list[RunOutcome]:
    folder = Path(runs[0].config.output)
    summary = SummaryFile(folder)
    outcomes = []
    for run in runs:
        config = run.config
        done = summary.done(config.name) if _is_finished(config) else None
        waiting = RunOutcome(run.experiment, config.name, config.seed, config.fold)
        outcomes.append(done or waiting)

    def ended(number: int, outcome: Outcome) -> None:
        if isinstance(outcome, StoppedError):
            return
        if isinstance(outcome, TrainResult):
            outcomes[number] = replace(outcomes[number], status="done", result=outcome)
        else:
            outcomes[number] = replace(
                outcomes[number], status="failed", error=failure_text(outcome), result=None
            )
        summary.write(outcomes)

    tasks = [PoolTask(number, run.config, levels) for number, run in enumerate(runs)]
    reason = DevicePool(tasks, devices, report, ended, stop).run()
    summary.write(outcomes)
    if reason is not None:
        num_done = sum(outcome.status == "done" for outcome in outcomes)
        raise stopped(
            reason,
            f"stopped by {reason} with {num_done} of {len(runs)} runs done; go on with --resume",
        )
    return outcomes


def _levels_needed(runs: Sequence[PlannedRun]) -> tuple[str, ...]:
    """Return what has to be read for all experiments, as they may share their samples.

    Raises:
        HeadError: naming the experiment of which the head cannot be built.
    """
    levels: list[str] = []
    first_of = {run.experiment: run.config for run in reversed(runs)}
    for experiment in dict.fromkeys(run.experiment for run in runs):
        try:
            levels += levels_of_head(first_of[experiment])
        except (ConfigError, HeadError) as error:
            raise type(error)(f"experiment {experiment}: {error} (no run has begun)") from error
    return tuple(dict.fromkeys(levels))
