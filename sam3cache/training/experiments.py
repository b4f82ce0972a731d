"""Many trainings as one: heads from a file, seeds and folds, over all devices of a machine."""

from __future__ import annotations

import difflib
import json
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from sam3cache.errors import CheckpointError, ConfigError, HeadError, StoppedError
from sam3cache.features import FeatureStore, open_store
from sam3cache.runtime import write_atomic
from sam3cache.training.config import TrainConfig
from sam3cache.training.division import data_settings, divide, masks_sha256
from sam3cache.training.folders import claimed, is_run, mark_to_replace, require_unused, runs_in
from sam3cache.training.loop import TrainResult
from sam3cache.training.outlook import levels_of_head
from sam3cache.training.pool import DevicePool, PoolProgress, PoolTask
from sam3cache.training.state import RunState, as_begun, check_same, read_record
from sam3cache.training.stopping import Stop, never, stopped
from sam3cache.training.together import Outcome, failure_text

SUMMARY_FILE = "summary.json"

Status = Literal["done", "failed", "waiting"]

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


@dataclass(frozen=True)
class RunOutcome:
    """How one of many trainings stands.

    Attributes:
        experiment: what it is a run of.
        name: folder of the run.
        seed: of it.
        fold: part that it is validated on, or None.
        status: "done", "failed", or "waiting" for the next start.
        error: what it failed by, else empty.
        result: what came out; None unless it is done.
    """

    experiment: str
    name: str
    seed: int
    fold: int | None
    status: Status = "waiting"
    error: str = ""
    result: TrainResult | None = None


@dataclass(frozen=True)
class ExperimentSummary:
    """What came out of all runs of one experiment.

    Attributes:
        name: of the experiment.
        num_runs: seeds times folds.
        num_done: how many have ended well.
        dice_mean: mean of their best validation Dice; None without any.
        dice_std: its standard deviation (n - 1); None for fewer than two.
        best_epoch_mean: mean of the epochs of it.
        elapsed_s_mean: mean time of training and validation.
        parameters: of the head.
        gflop: of its forward pass over one image.
    """

    name: str
    num_runs: int
    num_done: int
    dice_mean: float | None
    dice_std: float | None
    best_epoch_mean: float | None
    elapsed_s_mean: float | None
    parameters: int | None
    gflop: float | None


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
            where there are several. To resume, runs draw from the stored variants that the first
            of their experiment began with.
        seeds: runs of each that differ in their seed, counted up from the experiment's own.
        folds: parts of a cross-validation; 0: none.

    Raises:
        ConfigError: a number that cannot be.
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
    begun = dict[str, str]()
    for run in planned:
        if _record(run.config) is not None:
            begun.setdefault(run.experiment, as_begun(run.config).variants)
    return [
        PlannedRun(
            run.experiment,
            as_begun(run.config)
            if _record(run.config) is not None
            else replace(run.config, variants=begun.get(run.experiment, run.config.variants)),
        )
        for run in planned
    ]


def _record(config: TrainConfig) -> RunState | None:
    """Return where the run to resume stands; None: it is to begin, or cannot be read."""
    try:
        return read_record(config.run_dir) if config.resume else None
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
    first = runs[0].config
    store = open_store(first.store, allow_unsealed=first.allow_unsealed, overlay=first.overlay)
    # What stands against the folds of one label set stands against all of its runs.
    first_of = {
        (one.label_set, one.variants, one.fold_seed, one.stratify): one
        for one in (run.config for run in reversed(runs))
        if one.folds and one.label_set in store.label_sets
    }
    for one in first_of.values():
        divide(store, one)
    _require_room(runs)
    levels = _levels_needed(runs)
    with claimed(Path(first.output)):
        _require_room(runs)  # Another may have been quicker.
        _require_same(runs, store)
        announce([run.config for run in runs if not _is_finished(run.config)])
        return _run_all(runs, levels, devices, report, stop)


def _require_same(runs: Sequence[PlannedRun], store: FeatureStore) -> None:
    """Refuse runs of which some began with other settings or data than the rest would.

    Before any begins: those that are done stay so in the summary, and no experiment has seeds that
    learned from other data than each other.
    """
    data = dict[tuple[Any, ...], tuple[dict[str, Any], str]]()
    for config in (run.config for run in runs):
        record = _record(config)
        if record is None or config.label_set not in store.label_sets:
            continue
        key: tuple[Any, ...] = (config.label_set, config.variants, config.folds, config.fold)
        key += (config.fold_seed, config.stratify)
        if key not in data:
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
    before = _read_summary(folder)
    outcomes = []
    for run in runs:
        outcome = before.pop(run.config.name, None)
        if outcome is None or outcome.status != "done" or not _is_finished(run.config):
            config = run.config
            outcome = RunOutcome(run.experiment, config.name, config.seed, config.fold)
        outcomes.append(outcome)
    # Of other seeds or experiments, in the same folder.
    others = list(before.values())
    for run in runs:
        if run.config.overwrite:
            mark_to_replace(run.config.run_dir)

    def ended(number: int, outcome: Outcome) -> None:
        if isinstance(outcome, StoppedError):
            return
        if isinstance(outcome, TrainResult):
            outcomes[number] = replace(outcomes[number], status="done", result=outcome)
        else:
            outcomes[number] = replace(
                outcomes[number], status="failed", error=failure_text(outcome), result=None
            )
        write_summary(folder, [*others, *outcomes])

    tasks = [PoolTask(number, run.config, levels) for number, run in enumerate(runs)]
    reason = DevicePool(tasks, devices, report, ended, stop).run()
    write_summary(folder, [*others, *outcomes])
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


def summarize(outcomes: Sequence[RunOutcome]) -> list[ExperimentSummary]:
    """Put the runs of each experiment together, in their order."""
    summaries = []
    for name in dict.fromkeys(outcome.experiment for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.experiment == name]
        results = [outcome.result for outcome in own if outcome.result is not None]
        dice = [result.best_dice for result in results]
        summaries.append(
            ExperimentSummary(
                name=name,
                num_runs=len(own),
                num_done=len(results),
                dice_mean=statistics.fmean(dice) if dice else None,
                dice_std=statistics.stdev(dice) if len(dice) > 1 else None,
                best_epoch_mean=(
                    statistics.fmean(r.best_epoch for r in results) if results else None
                ),
                elapsed_s_mean=statistics.fmean(r.elapsed_s for r in results) if results else None,
                parameters=results[0].parameters["total"] if results else None,
                gflop=results[0].gflop if results else None,
            )
        )
    return summaries


def as_json(outcomes: Sequence[RunOutcome]) -> dict[str, Any]:
    """Return what ``summary.json`` holds."""
    return {
        "experiments": [asdict(summary) for summary in summarize(outcomes)],
        "runs": [asdict(outcome) | {"result": _result_json(outcome)} for outcome in outcomes],
    }


def _result_json(outcome: RunOutcome) -> dict[str, Any] | None:
    if outcome.result is None:
        return None
    values = asdict(outcome.result)
    # Where the summary lies is where the runs lie: no path of this machine is needed.
    return values | {"run_dir": outcome.name, "best_checkpoint": f"{outcome.name}/best"}


def _read_summary(folder: Path) -> dict[str, RunOutcome]:
    """Return how runs stood, by name, as far as their folders are still there.

    What cannot be read, of another version or damaged, is no loss: the runs themselves know more.
    """
    try:
        entries = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["runs"]
        outcomes = [_from_json(folder, entry) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return {outcome.name: outcome for outcome in outcomes if is_run(folder / outcome.name)}


def _from_json(folder: Path, entry: Mapping[str, Any]) -> RunOutcome:
    result = entry["result"]
    if result is not None:
        paths = {key: folder / result[key] for key in ("run_dir", "best_checkpoint")}
        result = TrainResult(**{**result, **paths})
    return RunOutcome(**{**entry, "result": result})


def write_summary(folder: Path, outcomes: Sequence[RunOutcome]) -> None:
    """Write how all runs stand, replacing what was there."""
    content = json.dumps(as_json(outcomes), indent=2) + "\n"
    write_atomic(folder / SUMMARY_FILE, content.encode())
