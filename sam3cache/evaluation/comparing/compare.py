"""Runs against a baseline, image by image: which is better, and how sure is that?

Shape legend: N images, C classes.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sam3cache.errors import ConfigError
from sam3cache.evaluation.comparing.cases import ComparedCase, compared_cases
from sam3cache.evaluation.comparing.page import comparison_html
from sam3cache.evaluation.comparing.runs import (
    HEADLINE,
    OVER_CLASSES,
    Experiment,
    Ground,
    Run,
    Scores,
    by_seed,
    check_same_training,
    combine,
    find_experiments,
    is_evaluated,
    listed,
    read_scores,
    read_summary,
    runs_under_way,
)
from sam3cache.evaluation.comparing.statistics import (
    Differences,
    PairedDifference,
    holm,
    paired_difference,
)
from sam3cache.evaluation.comparing.verdict import SMALL_DICE, Verdict, judge
from sam3cache.evaluation.evaluate import EvalConfig, evaluate
from sam3cache.evaluation.figures import differences_svg
from sam3cache.evaluation.notices import of_few_groups
from sam3cache.evaluation.page import PAGE_FILE
from sam3cache.evaluation.report import not_left_empty, stores_told
from sam3cache.evaluation.scores import DISTANCES, range_of
from sam3cache.evaluation.statistics import BOOTSTRAP, Interval, summarise
from sam3cache.features import open_store, record_data
from sam3cache.heads import CheckpointInfo
from sam3cache.heads.checkpoint import LAST
from sam3cache.records import SPLITS
from sam3cache.runtime import write_atomic

RECORD_FILE = "comparison.json"
DIFFERENCES_FILE = "differences.csv"
PLOT_FILE = "differences.svg"

_VERSIONS = ("sam3cache", "torch", "sam3")

STORES = Path("features")
"""Where the store of a run's name is looked for, when none is given."""

Report = Callable[[str, int, int], None]
"""Called with the run that is evaluated, images done and images in all."""

_ContentOf = Callable[[Path, str], Mapping[str, Any]]


@dataclass(frozen=True)
class CompareConfig:
    """Settings of one comparison.

    Attributes:
        paths: runs, checkpoints, evaluations, or folders of runs; see ``find_experiments``.
        split: "train", "val", "test" or "all"; of an evaluation that is given itself, its own.
        baseline: name of the one that the others are compared with; None: the first.
        store: to evaluate and to draw from; None: the one that the evaluations tell, if it is
            still there.
        heads: the user's own heads, each as "package.module:Class".
        batch_size: images a forward pass.
        device: torch device name.
        seed: of the bootstrap.
        output: folder of the results; None: beside the baseline's run.
        overlay: folder of labels and annotations beside the store, or None.
        allow_unsealed: evaluate on what an unfinished extraction has written so far.
        page: also write report.html, the comparison as a page to look at.
    """

    paths: tuple[Path, ...]
    split: Literal["train", "val", "test", "all"] = "test"
    baseline: str | None = None
    store: Path | None = None
    heads: tuple[str, ...] = ()
    batch_size: int = 16
    device: str = "cpu"
    seed: int = 0
    output: Path | None = None
    overlay: Path | None = None
    allow_unsealed: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if not self.paths:
            raise ConfigError("nothing is named to compare; give two runs, or a folder of runs")
        if self.split not in (*SPLITS, "all"):
            raise ConfigError(f"split {self.split!r}: expected one of {', '.join(SPLITS)}, all")
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected 0 or more")


@dataclass(frozen=True)
class ClassPresence:
    """Where a class is, and who marks it where it is not.

    Attributes:
        name: of the class.
        num_with: images whose mask has it.
        num_without: images whose mask does not.
        num_marked: by experiment, images of the latter that any of its runs marks it on.
    """

    name: str
    num_with: int
    num_without: int
    num_marked: Mapping[str, int]


@dataclass(frozen=True)
class Compared:
    """One of the experiments that were compared, on the images that all of them scored.

    Attributes:
        name: of its folder.
        head: name of the head.
        runs: names of its seeds or folds; its own alone where it is a single run.
        evaluations: folders that the scores come from.
        thresholds: probability from which a pixel counts as mask, of each run.
        measured: by title, what else its evaluations record of how they came about; each value
            once.
        dice: mean Dice of the images.
        dice_interval: of the mean, by group; None for fewer than two groups.
        dice_of_seeds: the mean of each seed, of folds all of its parts together; of a single run
            its own.
    """

    name: str
    head: str
    runs: tuple[str, ...]
    evaluations: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    dice: float | None
    dice_interval: Interval | None
    dice_of_seeds: tuple[float | None, ...]
    measured: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PairComparison:
    """One experiment against the baseline.

    Attributes:
        name: of the experiment.
        verdict: see ``judge``.
        sentence: the verdict and its reason in plain words.
        dice: difference of Dice, over an image's classes where there are several.
        p_corrected: its p-value, corrected by Holm's method for the number of comparisons.
        measures: by class that any image has, by measure, the difference, of several classes over
            the images that have each; intervals of these are not corrected.
    """

    name: str
    verdict: Verdict
    sentence: str
    dice: PairedDifference
    p_corrected: float | None
    measures: Mapping[str, Mapping[str, PairedDifference]]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        baseline: name of the experiment that the others are compared with.
        split: of the images.
        num_images: images that all experiments scored.
        num_groups: groups they belong to.
        experiments: the baseline first.
        comparisons: of all others, in the order they were named.
        presence: of each class; of several, first of ``OVER_CLASSES``: images with any of them.
        left_out: by experiment, ids of images that it scored and another did not.
        notices: what a reader has to know before the figures, in whole sentences.
        seed: of the bootstrap.
        output: folder that the results were written to.
        page: the comparison as a page to look at; None when that was not asked.
    """

    baseline: str
    split: str
    num_images: int
    num_groups: int
    experiments: tuple[Compared, ...]
    comparisons: tuple[PairComparison, ...]
    presence: tuple[ClassPresence, ...]
    left_out: Mapping[str, tuple[str, ...]]
    notices: tuple[str, ...]
    seed: int
    output: Path
    page: Path | None

    def record(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        record = dataclasses.asdict(self)
        record["output"] = self.output.as_posix()
        record["page"] = None if self.page is None else self.page.as_posix()
        record["bootstrap"] = BOOTSTRAP
        record["correction"] = "holm"
        record["small_dice"] = SMALL_DICE
        return record


@dataclass(frozen=True)
class _Evaluated:
    """An experiment with what its runs scored."""

    experiment: Experiment
    summaries: tuple[Mapping[str, Any], ...]
    scores: tuple[Scores, ...]
    together: Scores = field(repr=False)

    @property
    def name(self) -> str:
        return self.experiment.name


def compare(
    config: CompareConfig, report: Report = lambda run, num_done, num_total: None
) -> Comparison:
    """Compare runs with a baseline on the same images, and write what was found.

    A run that was not evaluated on the split is evaluated first, and so is one that was trained
    anew since, or whose store (or overlay) has other content now.

    Args:
        config: what to compare.
        report: told of progress while a run is evaluated.

    Raises:
        ConfigError: there is nothing to compare, or what there is cannot be compared: other
            images, other pixels, other masks.
        StoreError: a run has to be evaluated, and the store does not serve.
        CheckpointError: likewise, and its checkpoint does not.
    """
    experiments = find_experiments(config.paths, config.split)
    first = _baseline_first(experiments, config.baseline)
    output = _output_of(config, first)
    with not_left_empty(output):
        _prepare_output(output)
        return _compare(config, report, experiments, first, output)


def _compare(
    config: CompareConfig,
    report: Report,
    experiments: Sequence[Experiment],
    first: Sequence[Experiment],
    output: Path,
) -> Comparison:
    # Many runs, mostly of one store.
    content_of = cache(partial(_content, config))
    evaluated = [
        _evaluate(experiment, experiments, config, report, content_of) for experiment in first
    ]
    notices = _of_under_way(config.paths)
    notices += [*_of_replaced(evaluated), *_of_shared_runs(evaluated)]
    notices += [*_of_origin(evaluated), *_check_alike(evaluated)]
    everywhere = frozenset.intersection(*map(_ids, evaluated))
    ids = [name for name in evaluated[0].together.ids if name in everywhere]
    if not ids:
        raise ConfigError(
            f"{evaluated[0].name} and {listed([e.name for e in evaluated[1:]])} have no image in "
            "common; compare runs that were evaluated on the same images"
        )
    left_out = {
        one.name: tuple(name for name in one.together.ids if name not in everywhere)
        for one in evaluated
    }
    notices += _of_images(left_out, len(ids))
    classes, metrics = _in_common(evaluated)
    aligned = [one.together.of(ids, classes, metrics) for one in evaluated]
    notices += _check_masks(evaluated, aligned)
    presence = _presence(evaluated, aligned)
    notices += _of_absent_classes(presence)
    ground = Ground.of(aligned)
    scores = [ground.settle(one) for one in aligned]
    groups = scores[0].groups
    notices += _of_groups(evaluated, scores)
    num_groups = len(set(groups))
    notices += of_few_groups(num_groups)

    told = [one.name for one in presence if one.num_with or one.name == presence[0].name]
    pairs = _pairs(evaluated, scores, told, config.seed)
    compared = tuple(
        _compared(one, of, ground, (ids, classes, metrics), config.seed)
        for one, of in zip(evaluated, scores, strict=True)
    )
    notices += _of_training(evaluated, compared, pairs)
    result = Comparison(
        baseline=evaluated[0].name,
        split=", ".join(dict.fromkeys(str(s.get("split")) for e in evaluated for s in e.summaries)),
        num_images=len(ids),
        num_groups=num_groups,
        experiments=compared,
        comparisons=tuple(pairs),
        presence=tuple(presence),
        left_out={name: names for name, names in left_out.items() if names},
        notices=tuple(notices),
        seed=config.seed,
        output=output,
        page=output / PAGE_FILE if config.page else None,
    )
    differences = _write(result, scores)
    # Whatever else is in the folder, no page of earlier figures stands beside these.
    (output / PAGE_FILE).unlink(missing_ok=True)
    if result.page is not None:
        cases, sentences = _cases(evaluated, scores, config, content_of)
        date = datetime.datetime.now().astimezone().date()
        html = comparison_html(result, differences, cases, sentences, date)
        write_atomic(result.page, html.encode())
    return result


def _baseline_first(experiments: Sequence[Experiment], baseline: str | None) -> list[Experiment]:
    names = [experiment.name for experiment in experiments]
    if len(experiments) < 2:
        raise ConfigError(f"{listed(names)} is all there is to compare; name another run beside it")
    if baseline is None:
        return list(experiments)
    if baseline not in names:
        raise ConfigError(f"baseline {baseline!r}: expected one of {', '.join(names)}")
    at = names.index(baseline)
    return [experiments[at], *experiments[:at], *experiments[at + 1 :]]


def _output_of(config: CompareConfig, experiments: Sequence[Experiment]) -> Path:
    """Return the folder of the results."""
    run = experiments[0].runs[0]
    beside = (run.folder or run.evaluation).resolve().parent
    if run.folder is None and run.evaluation.name.startswith("eval-"):
        beside = beside.parent
    names = "-".join(re.sub(r"[^\w.-]", "-", experiment.name) for experiment in experiments)
    # A name of a folder has its limits on every system; the record names all that were compared.
    return config.output or _as_given(beside) / f"compare-{config.split}-{names[:80]}"


def _prepare_output(folder: Path) -> None:
    """Make the folder of the results, before anything is computed for it."""
    if (folder / RECORD_FILE).exists() or not folder.exists() or not any(folder.iterdir()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return
        except OSError as error:
            reason = error.strerror
    else:
        reason = "it holds something else"
    raise ConfigError(
        f"results cannot be written to {folder} ({reason}); name another folder by -o"
    )


def _as_given(folder: Path) -> Path:
    """Return a folder relative to the present one, where it lies within."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _ids(evaluated: _Evaluated) -> frozenset[str]:
    return frozenset(evaluated.together.ids)


def _evaluate(
    experiment: Experiment,
    all_of_them: Sequence[Experiment],
    config: CompareConfig,
    report: Report,
    content_of: _ContentOf,
) -> _Evaluated:
    """Read what an experiment's runs scored, evaluating what has not been."""
    check_same_training(experiment)
    evaluated = [run for run in experiment.runs if is_evaluated(run)]
    for run in experiment.runs:
        info, stale_store = run.info(), None
        if is_evaluated(run):
            summary = read_summary(run.evaluation)
            stale_store = _store_of_other_content(run, summary, config, content_of)
            if stale_store is None:
                continue
            recorded = _store_told(run, summary, content_of)
            if run.folder is None or info is None or recorded != stale_store.resolve():
                raise ConfigError(
                    f"{run.evaluation} was measured on other images, masks or annotations than "
                    f"{stale_store} has now; write another with `sam3cache eval {stale_store} "
                    f"{run.folder or 'CHECKPOINT'} --split {config.split} -o FOLDER`, and compare "
                    "such folders"
                )
        if run.folder is None or info is None:
            raise ConfigError(f"{run.evaluation} lacks a part of an evaluation; write it anew")
        store = config.store or stale_store or _known_store(run, all_of_them, content_of)
        if store is None:
            raise ConfigError(
                f"{run.name} was not evaluated on split {config.split} with the weights it has "
                f"now; name the store by --store, or run `sam3cache eval STORE "
                f"{run.folder.as_posix()} --split {config.split}` first"
            )
        evaluate(
            EvalConfig(
                store=store,
                checkpoint=run.folder,
                split=config.split,
                batch_size=config.batch_size,
                device=config.device,
                seed=config.seed,
                head=info.head if info.head in config.heads else None,
                allow_unsealed=config.allow_unsealed,
                overlay=config.overlay,
                output=run.evaluation,
                **_asked_alike(
                    info,
                    # Those of the other seeds and folds, with which it is taken together.
                    (*(evaluated if stale_store is None else ()), run, *experiment.runs),
                    all_of_them,
                ),
                check_angles=False,
                check_features=False,
                page=False,
            ),
            partial(report, run.name),
        )
        evaluated.append(run)
    summaries = tuple(read_summary(run.evaluation) for run in experiment.runs)
    _check_asked_alike(experiment, summaries, config.split)
    scores = tuple(
        read_scores(run.evaluation, summary)
        for run, summary in zip(experiment.runs, summaries, strict=True)
    )
    return _Evaluated(experiment, summaries, scores, combine(experiment, scores))


def _store_of_other_content(
    run: Run, summary: Mapping[str, Any], config: CompareConfig, content_of: _ContentOf
) -> Path | None:
    """Return the store to evaluate on anew, if an evaluation was of other content than it has.

    Where the store is not at hand there is nothing to look at.

    Raises:
        ConfigError: the evaluation had an overlay, and none is named now.
    """
    there = summary.get("data") or {}
    store = config.store or _store_told(run, summary, content_of)
    if store is None:
        return None
    anew = f"`sam3cache eval {store} {run.folder or 'CHECKPOINT'} --split {config.split} -o FOLDER`"
    if config.overlay is None and there.get("overlay_seal"):
        raise ConfigError(
            f"{run.evaluation} was measured on {store} with an overlay, whose masks and "
            f"annotations may be others; name it by --overlay, or evaluate without it by {anew}, "
            "and compare that"
        )
    here = content_of(store, str(summary.get("label_set")))
    names = ("samples_sha256", "labels_sha256", "annotations_sha256")
    if here and all(here[name] == there.get(name) for name in names):
        return None
    if there.get("overlay_seal"):
        raise ConfigError(
            f"{run.evaluation} was measured with another overlay than {config.overlay}, or with "
            f"this one before it was changed; write another by {anew} --overlay "
            f"{config.overlay}, and compare such folders"
        )
    return store


def _store_told(run: Run, summary: Mapping[str, Any], content_of: _ContentOf) -> Path | None:
    """Return the store of an evaluation; of two, as of a copied project, that of its images."""
    stores = stores_told(summary, run.evaluation)
    if len(stores) > 1:
        images = (summary.get("data") or {}).get("samples_sha256")
        label_set = str(summary.get("label_set"))
        of_images = [s for s in stores if content_of(s, label_set).get("samples_sha256") == images]
        stores = of_images or stores[1:]
    return stores[0] if stores else None


def _content(config: CompareConfig, store: Path, label_set: str) -> Mapping[str, Any]:
    """Return what a store has now, as evaluations record it; nothing without the label set."""
    opened = open_store(store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    if label_set not in opened.label_sets:
        return {}
    return dataclasses.asdict(record_data(opened, label_set))


def _asked_alike(
    info: CheckpointInfo, own: Sequence[Run], experiments: Sequence[Experiment]
) -> dict[str, Any]:
    """Return the label set and the threshold to evaluate a run with.

    Args:
        info: of its checkpoint.
        own: runs of its experiment: the first that was ever evaluated is followed.
        experiments: all of them; else another is followed, but for a number as threshold, which was
            meant for another head.
    """
    others = (o for e in experiments for o in e.runs if is_evaluated(o))
    for one in itertools.chain(own, others):
        summary = one.earlier_summary()
        if not _is_asked_like(info, summary):
            continue
        source = _source(summary)
        given = summary.get("threshold") if source == "given" and one in own else None
        threshold = "auto" if source == "auto" else given
        return {"label_set": summary.get("label_set"), "threshold": threshold}
    return {}


def _is_asked_like(info: CheckpointInfo, summary: Mapping[str, Any]) -> bool:
    """Return whether an evaluation was of the classes that a head answers."""
    classes = tuple(summary.get("classes", ()))
    return summary.get("task") == info.task and info.classes in ((), classes)


def _source(summary: Mapping[str, Any]) -> str:
    """Return where the threshold of an evaluation is from; see ``ThresholdChoice``."""
    return str((summary.get("threshold_choice") or {}).get("source"))


def _check_asked_alike(
    experiment: Experiment, summaries: Sequence[Mapping[str, Any]], split: str
) -> None:
    """Refuse a mean over seeds of which some were evaluated otherwise than others."""
    if len(sets := list(dict.fromkeys(str(s.get("label_set")) for s in summaries))) > 1:
        raise ConfigError(
            f"the runs of {experiment.name} were evaluated on label sets {listed(sets)}, which no "
            "mean can be of; evaluate all on one, by `sam3cache eval … --label-set`"
        )
    runs_by_rule: dict[str, list[Run]] = {}
    for run, summary in zip(experiment.runs, summaries, strict=True):
        rule = "auto" if _source(summary) == "auto" else str(summary.get("threshold"))
        runs_by_rule.setdefault(rule, []).append(run)
    if len(runs_by_rule) > 1:
        (rule, _), (_, (other, *_)) = list(runs_by_rule.items())[:2]
        told = "; ".join(
            f"{of} of {listed([run.name for run in runs])}" for of, runs in runs_by_rule.items()
        )
        raise ConfigError(
            f"the runs of {experiment.name} were evaluated at thresholds of more than one kind "
            f"({told}), which no mean can be of; evaluate all alike, by `sam3cache eval "
            f"{summaries[0].get('store')} {other.folder or 'CHECKPOINT'} --split {split} "
            f"--threshold {rule}` and so on"
        )


def _known_store(
    run: Run, experiments: Sequence[Experiment], content_of: _ContentOf
) -> Path | None:
    """Return the store that an evaluation tells of, or one of the name the run learned on."""
    others = (o for e in experiments for o in e.runs if is_evaluated(o))
    for other in itertools.chain(others, (run,)):
        store = _store_told(other, other.earlier_summary(), content_of)
        if store is not None:
            return store
    info = run.info()
    named = STORES / str(info.settings.get("store", "") if info else "")
    return named if (named / "zarr.json").is_file() else None


def _check_alike(evaluated: Sequence[_Evaluated]) -> list[str]:
    """Refuse other pixels of the same images; say which settings of the evaluations differ."""
    sentences = [*_check_pixels(evaluated), *_of_training_data(evaluated)]
    for name, title in (
        ("threshold", "thresholds"),
        ("split", "splits"),
        ("label_set", "label sets"),
    ):
        values = {
            one.name: {
                # Each chose its own: they are of one kind.
                "auto" if name == "threshold" and _source(s) == "auto" else str(s.get(name))
                for s in one.summaries
            }
            for one in evaluated
        }
        if len(set(map(frozenset, values.values()))) > 1:
            told = ", ".join(f"{of} {'/'.join(sorted(v))}" for of, v in values.items())
            sentences.append(f"The evaluations are of other {title}: {told}.")
    return sentences


def _of_training_data(evaluated: Sequence[_Evaluated]) -> list[str]:
    """Say where the seeds of an experiment learned from other data."""
    sentences = []
    for one in evaluated:
        learned: dict[object, set[object]] = {}
        for run in one.experiment.runs:
            if (info := run.info()) is not None:
                # In the order of its rows: each fold has its own.
                data = learned.setdefault(info.settings.get("fold"), set())
                data.add((info.settings.get("data_sha256"), tuple(info.classes)))
        if any(len(data) > 1 for data in learned.values()):
            sentences.append(
                f"The runs of {one.name} record other images, masks or annotations than each "
                "other, changed between or extracted apart: they may differ by more than their "
                "seeds."
            )
    return sentences


def _check_pixels(evaluated: Sequence[_Evaluated]) -> list[str]:
    """Refuse other pixels of the same images; say of which evaluations that cannot be known."""
    of_set: dict[frozenset[str], tuple[str, object]] = {}
    of_image: dict[str, tuple[str, str]] = {}
    unknown = []
    for one in evaluated:
        for run, summary, scores in zip(
            one.experiment.runs, one.summaries, one.scores, strict=True
        ):
            # One hash over all images is there always, and can be compared where they are the same.
            whole = summary.get("data_sha256")
            pairs = [(of_set.setdefault(frozenset(scores.ids), (run.name, whole)), whole)]
            pairs += [
                (of_image.setdefault(name, (run.name, pixels)), pixels)
                for name, pixels in scores.pixels.items()
            ]
            for (other, there), here in pairs:
                if there != here:
                    raise ConfigError(
                        f"{other} and {run.name} were evaluated on images of the same names but "
                        "with other pixels; evaluate both on one store"
                    )
            if not scores.pixels:
                unknown.append(run.name)
    if not unknown or len(of_set) == 1:
        return []
    return [
        f"Whether the images have the same pixels could not be checked of {listed(unknown)}, "
        "evaluated before that was recorded image by image; evaluate anew to know."
    ]


def _in_common(evaluated: Sequence[_Evaluated]) -> tuple[tuple[str, ...], list[str]]:
    """Return the classes, which have to be the same, and the measures that all have."""
    together = [one.together for one in evaluated]
    if len({frozenset(of.classes) for of in together}) > 1:
        told = "; ".join(f"{of.name} has {', '.join(of.together.own_classes)}" for of in evaluated)
        raise ConfigError(f"the runs were measured on other classes ({told}); compare like heads")
    metrics = [m for m in together[0].metrics if all(m in of.metrics for of in together)]
    if HEADLINE not in metrics:
        raise ConfigError("the evaluations have no Dice in common; write them anew")
    return together[0].classes, metrics


def _check_masks(evaluated: Sequence[_Evaluated], scores: Sequence[Scores]) -> list[str]:
    """Refuse other masks of the same images, by the number of their pixels.

    The hash over all masks of a store differs from one store to the next, also where the masks
    that are compared do not, so that it alone tells nothing.
    """
    sentences = []
    for other, of in zip(evaluated[1:], scores[1:], strict=True):
        hashes = [
            {str(s.get("data", {}).get("labels_sha256")) for s in one.summaries}
            for one in (evaluated[0], other)
        ]
        if hashes[0] == hashes[1] and len(hashes[0]) == 1:
            continue
        if changed := of.of_other_masks(scores[0]):
            raise ConfigError(
                f"{evaluated[0].name} and {other.name} were measured against other masks of "
                f"{len(changed)} images ({listed(changed)}); evaluate both anew on one label set"
            )
        sentences.append(
            f"{evaluated[0].name} and {other.name} were measured on stores or label sets of other "
            "content; the masks of these images have the same number of pixels."
        )
    return sentences


def _presence(evaluated: Sequence[_Evaluated], aligned: Sequence[Scores]) -> list[ClassPresence]:
    """Count, class by class, the images that have it, and who marks it on the others."""
    true_px_NC = aligned[0].true_px_NC
    return [
        ClassPresence(
            name,
            int((true_px_NC[:, k] > 0).sum()),
            int((true_px_NC[:, k] == 0).sum()),
            {
                one.name: int((of.values(name, HEADLINE)[true_px_NC[:, k] == 0] < 1).sum())
                for one, of in zip(evaluated, aligned, strict=True)
            },
        )
        for k, name in enumerate(aligned[0].classes)
    ]


def _of_absent_classes(presence: Sequence[ClassPresence]) -> list[str]:
    """Say who marks something where there is nothing."""
    sentences = []
    images, *classes = presence
    if any(images.num_marked.values()):
        sentences.append(
            f"The masks of {images.num_without} images are empty; something is marked by "
            f"{_told(images.num_marked)} of them: that is Dice 0, and marking nothing, where "
            "another marks something, Dice 1."
        )
    marked = {name: sum(one.num_marked[name] for one in classes) for name in images.num_marked}
    if any(marked.values()):
        num_lacking = sum(one.num_without for one in classes)
        num_cases = num_lacking + sum(one.num_with for one in classes)
        sentences.append(
            f"Images lack a class in {num_lacking} of {num_cases} cases, and it is marked all the "
            f"same by {_told(marked)} of them: that is Dice 0 in the mean over an image's classes. "
            "Tables of single classes are of the images that have them."
        )
    if absent := [one.name for one in classes if not one.num_with]:
        sentences.append(f"No image here has {listed(absent)}: no differences are told of that.")
    return sentences


def _told(num_marked: Mapping[str, int]) -> str:
    return ", ".join(f"{name} on {number}" for name, number in num_marked.items())


def _of_images(left_out: Mapping[str, Sequence[str]], num_images: int) -> list[str]:
    return [
        f"{len(names)} images of {name} were not scored by all others and are left out, "
        f"{num_images} stay: {listed(names)}."
        for name, names in left_out.items()
        if names
    ]


def _of_under_way(paths: Sequence[Path]) -> list[str]:
    names = runs_under_way(paths)
    if not names:
        return []
    verb = "has" if len(names) == 1 else "have"
    return [f"{listed(names)} {verb} begun, and no checkpoint of an epoch yet: left out."]


def _of_replaced(evaluated: Sequence[_Evaluated]) -> list[str]:
    runs = [run for one in evaluated for run in one.experiment.runs]
    old = [run.name for run in runs if run.is_to_be_replaced]
    if not old:
        return []
    return [
        f"{listed(old)} {'is' if len(old) == 1 else 'are'} still of before: `train --overwrite` "
        "was ended before it was trained anew; `train --resume` does it."
    ]


def _of_shared_runs(evaluated: Sequence[_Evaluated]) -> list[str]:
    sentences = []
    for one, other in itertools.combinations(evaluated, 2):
        own = {run.evaluation.resolve(): run.name for run in one.experiment.runs}
        names = [own[p] for run in other.experiment.runs if (p := run.evaluation.resolve()) in own]
        if names:
            sentences.append(
                f"{listed(names)} {'is' if len(names) == 1 else 'are'} part of {one.name} and of "
                f"{other.name}: the two differ less for it."
            )
    return sentences


def _of_origin(evaluated: Sequence[_Evaluated]) -> list[str]:
    """Say what limits all figures because of the pictures and features that they come from."""
    # Evaluations of before versions that recorded it say nothing of either.
    knowing = [one for one in evaluated if all("origin" in s for s in one.summaries)]
    summaries = [summary for one in knowing for summary in one.summaries]
    sentences = []
    drawn = [int(s["num_synthetic"]) for s in summaries]
    if any(drawn):
        all_drawn = drawn == [s["num_images"] for s in summaries]
        sentences.append(
            f"{'The' if all_drawn else 'Some of the'} pictures are synthetic angiograms, drawn and "
            f"not measured: {'nothing here speaks' if all_drawn else 'these do not speak'} of "
            "patients."
        )
    of_sentence: dict[str, list[str]] = {}
    for one in knowing:
        for sentence in dict.fromkeys(s for of in one.summaries for s in of["origin"]):
            of_sentence.setdefault(sentence, []).append(one.name)
    for sentence, names in of_sentence.items():
        whose = "" if len(names) == len(knowing) else f"Of {listed(names)}: "
        sentences.append(whose + sentence)
    return sentences


def _of_groups(evaluated: Sequence[_Evaluated], scores: Sequence[Scores]) -> list[str]:
    return [
        f"{other.name} knows other groups than {evaluated[0].name}; the groups of "
        f"{evaluated[0].name} are taken."
        for other, of in zip(evaluated[1:], scores[1:], strict=True)
        if of.groups != scores[0].groups
    ]


def _of_training(
    evaluated: Sequence[_Evaluated],
    compared: Sequence[Compared],
    pairs: Sequence[PairComparison],
) -> list[str]:
    """Say what the intervals do not know of: images seen in training, and other seeds."""
    sentences = []
    for one in evaluated:
        num_seen: dict[frozenset[str], int] = {}
        for summary, scores in zip(one.summaries, one.scores, strict=True):
            images = frozenset(scores.ids)
            seen_here = int(summary.get("num_seen_in_training") or 0)
            num_seen[images] = max(num_seen.get(images, 0), seen_here)
        # Who compares on the training split asks for just that.
        if all(s.get("split") == "train" for s in one.summaries):
            continue
        if any(num_seen.values()):
            sentences.append(
                f"{one.name} was trained on {sum(num_seen.values())} of the images it was "
                "evaluated on: its scores on those say little about new ones."
            )
        elif num := max(int(s.get("num_in_training_groups") or 0) for s in one.summaries):
            sentences.append(
                f"{one.name} was trained on other images of groups with the names of {num} of "
                "those it was evaluated on: its scores on these say little about new patients."
            )
    chosen_here = [
        one.name
        for one in evaluated
        if any((s.get("threshold_choice") or {}).get("on_evaluated") for s in one.summaries)
    ]
    if chosen_here:
        sentences.append(
            f"The threshold of {listed(chosen_here)} was chosen on images that are among these: "
            "such scores are a little too high."
        )
    chosen = [
        summary
        for one in evaluated
        for summary in one.summaries
        if summary.get("split") in ("val", "all")
        if Path(str(summary.get("checkpoint"))).name != LAST
    ]
    if chosen:
        sentences.append(
            "Each checkpoint is that of the epoch with the highest Dice on its validation images, "
            "which are among these: all scores are a little too high, and most so of heads whose "
            "Dice goes up and down."
        )
    single = [one.name for one in compared if len(one.dice_of_seeds) < 2]
    if single:
        sentences.append(
            f"One seed each: {listed(single)}. What another seed would have given is not in "
            "the intervals, which are over images; train several seeds to see it."
        )
    for pair in pairs:
        spreads = [
            (one.name, max(known) - min(known))
            for one in compared
            if one.name in (pair.name, compared[0].name)
            if len(known := [dice for dice in one.dice_of_seeds if dice is not None]) > 1
        ]
        name, spread = max(spreads, key=lambda of: of[1], default=("", 0.0))
        if pair.verdict != "equal" and abs(pair.dice.mean or 0.0) < spread:
            sentences.append(
                f"The seeds of {name} differ by {spread:.3f} Dice among themselves, which is "
                f"more than {pair.name} differs from {compared[0].name}."
            )
    return sentences


def _pairs(
    evaluated: Sequence[_Evaluated], scores: Sequence[Scores], classes: Sequence[str], seed: int
) -> list[PairComparison]:
    first, groups = scores[0], scores[0].groups
    headline = first.classes[0]
    measures = [
        {
            name: {
                metric: paired_difference(
                    first.values(name, metric),
                    of.values(name, metric),
                    groups,
                    seed,
                    lower_is_better=metric in DISTANCES,
                )
                for metric in first.metrics
            }
            for name in classes
        }
        for of in scores[1:]
    ]
    dice = [of[headline][HEADLINE] for of in measures]
    corrected = holm([difference.p_value for difference in dice])
    pairs = []
    for other, of, difference, p in zip(evaluated[1:], measures, dice, corrected, strict=True):
        verdict, sentence = judge(
            other.name,
            evaluated[0].name,
            difference,
            p_corrected=p,
            num_comparisons=len(dice),
            over_classes=headline == OVER_CLASSES,
        )
        pairs.append(PairComparison(other.name, verdict, sentence, difference, p, of))
    return pairs


def _compared(
    one: _Evaluated,
    scores: Scores,
    ground: Ground,
    common: tuple[Sequence[str], Sequence[str], Sequence[str]],
    seed: int,
) -> Compared:
    """Summarise an experiment on the images, classes and measures that all have in common."""
    ids, classes, metrics = common
    headline = scores.classes[0]
    values = [None if np.isnan(v) else float(v) for v in scores.values(headline, HEADLINE)]
    summary = summarise(values, scores.groups, seed, range_of(HEADLINE))
    of_seeds = []
    seeds = [run.member()[0] for run in one.experiment.runs]
    for of in by_seed([of.of(of.ids, classes, metrics) for of in one.scores], seeds):
        dice_N = ground.settle(of.of(ids, classes)).values(headline, HEADLINE)
        known = dice_N[np.isfinite(dice_N)]
        of_seeds.append(float(known.mean()) if len(known) else None)
    return Compared(
        name=one.name,
        head=", ".join(dict.fromkeys(str(s.get("head")) for s in one.summaries)),
        runs=tuple(run.name for run in one.experiment.runs),
        evaluations=tuple(run.evaluation.as_posix() for run in one.experiment.runs),
        thresholds=tuple(s.get("threshold") for s in one.summaries),
        dice=summary.mean,
        dice_interval=summary.interval,
        dice_of_seeds=tuple(of_seeds),
        measured=_measured(one),
    )


def _threshold_text(summary: Mapping[str, Any]) -> str:
    threshold, choice = summary.get("threshold"), summary.get("threshold_choice") or {}
    if threshold is None:
        return "none: a pixel has its likeliest class"
    chosen = f" (chosen on split {choice['split']})" if choice.get("source") == "auto" else ""
    return f"{threshold:g}{chosen}"


def _measured(one: _Evaluated) -> dict[str, tuple[str, ...]]:
    """Return how the figures of an experiment came about, as its evaluations record it."""
    told: dict[str, list[str]] = {}
    for summary in one.summaries:
        checkpoint = Path(str(summary.get("checkpoint", "")))
        environment = summary.get("environment") or {}
        values = {
            "Threshold": _threshold_text(summary),
            "Label set": str(summary.get("label_set", "–")),
            "Store": Path(str(summary.get("store", "–"))).name,
            "Checkpoint": "/".join(checkpoint.parts[-2:]) or "–",
            "Epoch": str(summary.get("epoch", "–")),
            "Versions": ", ".join(
                f"{name} {environment[name]}" for name in _VERSIONS if environment.get(name)
            )
            or "–",
        }
        for title, value in values.items():
            told.setdefault(title, []).append(value)
    return {title: tuple(dict.fromkeys(values)) for title, values in told.items()}


def _cases(
    evaluated: Sequence[_Evaluated],
    scores: Sequence[Scores],
    config: CompareConfig,
    content_of: _ContentOf,
) -> tuple[list[ComparedCase], list[str]]:
    """Return the images to show, and a sentence on what cannot be shown."""
    store = config.store
    if store is None:
        told = (
            _store_told(run, summary, content_of)
            for one in evaluated
            for run, summary in zip(one.experiment.runs, one.summaries, strict=True)
        )
        store = next(filter(None, told), None)
    if store is None:
        return [], ["No pictures, since the store is not at hand; name it by --store."]
    return compared_cases(
        store,
        {
            one.name: list(zip(one.experiment.runs, one.summaries, one.scores, strict=True))
            for one in evaluated
        },
        scores[0].ids,
        {
            one.name: of.values(of.classes[0], HEADLINE)
            for one, of in zip(evaluated, scores, strict=True)
        },
        heads=config.heads,
        device=config.device,
        overlay=config.overlay,
        allow_unsealed=config.allow_unsealed,
    )


def _write(result: Comparison, scores: Sequence[Scores]) -> list[Differences]:
    """Write the table of differences, the plot and the record; return what was plotted."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    first = scores[0]
    columns = [f"{m}_{kind}" for m in first.metrics for kind in ("baseline", "run", "difference")]
    writer.writerow(["run", "id", "group", "class_name", *columns])
    for pair, of in zip(result.comparisons, scores[1:], strict=True):
        for i, k in itertools.product(range(len(first.ids)), range(len(first.classes))):
            before_M, after_M = first.value_NCM[i, k], of.value_NCM[i, k]
            cells_M3 = np.stack((before_M, after_M, after_M - before_M), axis=1)
            cells = ["" if np.isnan(value) else repr(float(value)) for value in cells_M3.flat]
            writer.writerow([pair.name, first.ids[i], first.groups[i], first.classes[k], *cells])
    write_atomic(result.output / DIFFERENCES_FILE, table.getvalue().encode())
    headline = first.classes[0]
    differences = [
        Differences(
            pair.name, of.values(headline, HEADLINE) - first.values(headline, HEADLINE), pair.dice
        )
        for pair, of in zip(result.comparisons, scores[1:], strict=True)
    ]
    write_atomic(result.output / PLOT_FILE, differences_svg("plot", differences).encode())
    text = json.dumps(result.record(), indent=2, allow_nan=False) + "\n"
    write_atomic(result.output / RECORD_FILE, text.encode())
    return differences
