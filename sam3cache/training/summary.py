"""What came out of many trainings: a line a run, a summary an experiment, and ``summary.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sam3cache.heads.checkpoint import BEST
from sam3cache.runtime import write_atomic
from sam3cache.training.folders import is_run
from sam3cache.training.loop import TrainResult

SUMMARY_FILE = "summary.json"

_PATHS = ("run_dir", "best_checkpoint")

Status = Literal["done", "failed", "waiting"]


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
    return values | {"run_dir": outcome.name, "best_checkpoint": f"{outcome.name}/{BEST}"}


class SummaryFile:
    """``summary.json`` of a folder of runs, which tells those of earlier commands as well.

    Of an experiment that an earlier command trained it keeps what came out of it then: other seeds
    of its name may have been trained with other settings.

    Args:
        folder: of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: list[Mapping[str, Any]] = []
        self._experiments: list[Mapping[str, Any]] = []
        # What is damaged or of another version is no loss: the runs themselves know more.
        with suppress(OSError, ValueError, LookupError, TypeError):
            content = json.loads((folder / SUMMARY_FILE).read_bytes())
            runs = [run for run in content["runs"] if is_run(folder / run["name"])]
            there = {run["experiment"] for run in runs}
            kept = [one for one in content["experiments"] if one["name"] in there]
            self._runs, self._experiments = runs, kept

    def done(self, name: str) -> RunOutcome | None:
        """Return what came out of a run, if it is known to be done."""
        with suppress(LookupError, TypeError):
            for run in self._runs:
                if run["name"] == name and run["status"] == "done":
                    result = run["result"]
                    paths = {key: self._folder / result[key] for key in _PATHS}
                    return RunOutcome(**{**run, "result": TrainResult(**{**result, **paths})})
        return None

    def write(self, outcomes: Sequence[RunOutcome]) -> None:
        """Write how runs stand beside those of earlier commands, replacing what was there."""
        present = as_json(outcomes)
        names = {outcome.name for outcome in outcomes}
        experiments = {outcome.experiment for outcome in outcomes}
        content = {
            "experiments": [one for one in self._experiments if one["name"] not in experiments],
            "runs": [run for run in self._runs if run["name"] not in names],
        }
        content = {key: [*others, *present[key]] for key, others in content.items()}
        text = json.dumps(content, indent=2) + "\n"
        write_atomic(self._folder / SUMMARY_FILE, text.encode())
