"""The runs that a comparison is of: where they lie, which belong together, what they scored.

A run's name ends in "-seed0" or "-fold1" where it is one of several of an experiment. What the
images say decides how they are taken together: runs that scored the same images are averaged image
by image, runs that scored none in common (folds) are put together, each image once.

Shape legend: N images, C classes, M measures.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import CheckpointError, ConfigError
from sam3cache.evaluation.evaluate import checkpoint_folder
from sam3cache.evaluation.report import IMAGES_FILE, SUMMARY_FILE
from sam3cache.heads.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    LOG_FOLDER,
    METRICS_FILE,
    MODEL_FILE,
    STATE_FILE,
    CheckpointInfo,
    is_to_be_replaced,
    read_record,
)

OVER_CLASSES = "all classes"
"""The class that stands for the mean over an image's classes, where there are several."""

HEADLINE = "dice"
"""The measure that decides."""

SILENCE_IS_RIGHT = (HEADLINE, "iou", "cldice")
"""Measures that are 1, rather than undefined, where the mask is empty and nothing is marked.

An evaluation leaves such images out. Between two heads that would reward the one that marks what is
not there: it has a Dice of 0, the other none, and so neither would count.
"""

MAX_NAMES = 5
"""Most names that are listed in one sentence."""

_MEMBER = re.compile(r"(?:^|[-_.])(seed|fold)[-_]?(\d+)(?=$|[-_.])")

_FOLD = re.compile(r"[-_.]fold[-_]?\d+")

# Beside anything of folds: what may differ between the runs of one experiment.
_OF_ONE_RUN = frozenset(
    {
        *("name", "seed", "order_seed", "store", "overlay", "num_train", "num_val", "data_sha256"),
        *("device", "residency", "precision", "micro_batch", "compile", "save_minutes"),
        *("allow_unsealed", "class_weights_used"),
        # What was asked for; which they were stands in "variants_used".
        "variants",
    }
)


@dataclass(frozen=True, slots=True)
class Run:
    """One trained head, or one evaluation of it.

    Attributes:
        name: of its folder.
        folder: of the run or checkpoint; None where there is an evaluation alone.
        evaluation: folder of its evaluation on the split, there or not.
    """

    name: str
    folder: Path | None
    evaluation: Path

    def info(self) -> CheckpointInfo | None:
        """Return what its checkpoint records; None where there is none that can be read."""
        if self.folder is None:
            return None
        try:
            return read_record(checkpoint_folder(self.folder))
        except CheckpointError:
            return None

    @property
    def is_to_be_replaced(self) -> bool:
        """Whether it is what ``train --overwrite`` has not trained anew yet."""
        folder = self.folder
        return folder is not None and is_to_be_replaced(checkpoint_folder(folder).parent)

    def member(self) -> tuple[int | None, int | None]:
        """Return its seed and its fold, as its checkpoint or else its name tells them."""
        info = self.info()
        if info is not None:
            return info.seed, info.settings.get("fold")
        numbers = {kind: int(number) for kind, number in _MEMBER.findall(self.name)}
        return numbers.get("seed"), numbers.get("fold")

    def earlier_summary(self) -> dict[str, Any]:
        """Return the summary of its evaluation, of whatever weights; empty where none is read."""
        if not (self.evaluation / SUMMARY_FILE).is_file():
            return {}
        try:
            return read_summary(self.evaluation)
        except ConfigError:
            return {}


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs that are compared as one: seeds or folds of the same training, or a single run."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Scores:
    """What a run, or an experiment, scored.

    Attributes:
        ids: of the images.
        groups: by image.
        classes: of the masks; of several the first is ``OVER_CLASSES``.
        metrics: names of the measures.
        value_NCM: NaN where an image has none; see ``SILENCE_IS_RIGHT``. Of ``OVER_CLASSES`` those
            measures are as in the evaluation, and all others NaN until ``Ground.settle``.
        true_px_NC: pixels of the mask; NaN without a mask.
        pixels: by image a short hash of its picture, as one evaluation read it; none where that
            was written before there was such a column.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    value_NCM: NDArray[np.float64]
    true_px_NC: NDArray[np.float64]
    pixels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def own_classes(self) -> tuple[str, ...]:
        """The classes without ``OVER_CLASSES``."""
        return tuple(name for name in self.classes if name != OVER_CLASSES)

    def values(self, class_name: str, metric: str) -> NDArray[np.float64]:
        """Return one measure of one class, a value an image."""
        return self.value_NCM[:, self.classes.index(class_name), self.metrics.index(metric)]

    def of(
        self, ids: Sequence[str], classes: Sequence[str], metrics: Sequence[str] | None = None
    ) -> Scores:
        """Return the scores of these images, in this order, and of these classes and measures."""
        metrics = self.metrics if metrics is None else metrics
        place = {name: i for i, name in enumerate(self.ids)}
        rows = np.array([place[name] for name in ids], dtype=np.intp)
        columns = np.array([self.classes.index(name) for name in classes], dtype=np.intp)
        planes = np.array([self.metrics.index(name) for name in metrics], dtype=np.intp)
        return Scores(
            tuple(ids),
            tuple(self.groups[i] for i in rows),
            tuple(classes),
            tuple(metrics),
            self.value_NCM[np.ix_(rows, columns, planes)],
            self.true_px_NC[np.ix_(rows, columns)],
        )

    def of_other_masks(self, other: Scores) -> list[str]:
        """Return the images, the same in both, whose masks have another number of pixels."""
        same_NC = (self.true_px_NC == other.true_px_NC) | (
            np.isnan(self.true_px_NC) & np.isnan(other.true_px_NC)
        )
        return [self.ids[i] for i in np.flatnonzero(~same_NC.all(axis=1))]


@dataclass(frozen=True)
class Ground:
    """What of the images counts for all experiments alike.

    Attributes:
        nothing_NC: where there is nothing to compare: the mask is empty and no experiment marks
            anything. A single class of several counts where it is; who marks it elsewhere loses by
            it in the mean over classes.
        known_NCM: where all experiments have a value: what means over an image's classes are taken
            of in measures that are not defined everywhere (distances), so that all are of the same
            classes. A head that misses a class would else gain by having no distance there.
    """

    nothing_NC: NDArray[np.bool_]
    known_NCM: NDArray[np.bool_]

    @classmethod
    def of(cls, scores: Sequence[Scores]) -> Ground:
        """Find it, given what experiments scored of the same images, classes and measures."""
        is_empty_NC = scores[0].true_px_NC == 0
        dice_NC = [one.value_NCM[..., one.metrics.index(HEADLINE)] for one in scores]
        nothing_NC = is_empty_NC & np.logical_and.reduce([of == 1 for of in dice_NC])
        # The first is the only class, or stands for all.
        nothing_NC[:, 1:] = is_empty_NC[:, 1:]
        known_NCM = np.logical_and.reduce([np.isfinite(one.value_NCM) for one in scores])
        return cls(nothing_NC, known_NCM)

    def settle(self, scores: Scores) -> Scores:
        """Fill in means over an image's classes, and leave out where nothing is to compare."""
        value_NCM = scores.value_NCM.copy()
        if scores.classes[0] == OVER_CLASSES:
            known_NCM = np.where(self.known_NCM, value_NCM, np.nan)[:, 1:]
            is_known = [metric in SILENCE_IS_RIGHT for metric in scores.metrics]
            value_NCM[:, :1] = np.where(is_known, value_NCM[:, :1], _mean_over_classes(known_NCM))
        value_NCM[self.nothing_NC] = np.nan
        return dataclasses.replace(scores, value_NCM=value_NCM)


def find_experiments(paths: Sequence[Path], split: str) -> list[Experiment]:
    """Find what the paths hold: a run, a checkpoint, an evaluation, or a folder of runs.

    A path that is nothing itself stands for its seeds and folds: ``checkpoints/first`` for
    ``checkpoints/first-seed0``, ``checkpoints/first-seed1`` and so on.

    Raises:
        ConfigError: a path holds none of these, or two experiments cannot be told apart.
    """
    found = [experiment for path in paths for experiment in _experiments_in(path, split)]
    names = [experiment.name for experiment in found]
    if len(set(names)) < len(names):
        # Named as one writes them, where the last part alone does not tell them apart.
        found = [
            dataclasses.replace(e, name=_long_name(e)) if names.count(e.name) > 1 else e
            for e in found
        ]
    names = [experiment.name for experiment in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; name each run once")
    return found


def runs_under_way(paths: Sequence[Path]) -> list[str]:
    """Return the runs among the paths, or in them, that have no checkpoint yet to be compared."""
    found = []
    for path in paths:
        inside = _named(path) if not path.exists() else (*path.glob("*"), *path.glob("*/*"))
        found += [folder.name for folder in sorted(inside) if _is_under_way(folder)]
    return list(dict.fromkeys(found))


def _is_under_way(folder: Path) -> bool:
    """Return whether a run has begun in a folder, and has not finished its first epoch.

    What was evaluated there is then of a run that it replaces.
    """
    has_begun = (folder / LOG_FOLDER).is_dir() or (folder / LAST / STATE_FILE).is_file()
    has_epoch = (folder / METRICS_FILE).exists() or (folder / BEST).exists()
    return has_begun and not has_epoch and not any(folder.glob(f"*/{BEST}"))


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary that an evaluation wrote.

    Raises:
        ConfigError: it is missing or damaged.
    """
    with _readable(folder):
        summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        if not all(summary["classes"].values()):
            raise ValueError("it tells of no measure")
        return summary


def read_scores(folder: Path, summary: Mapping[str, Any]) -> Scores:
    """Read the scores that an evaluation wrote, of the classes and measures of its summary.

    Raises:
        ConfigError: the table is missing or damaged.
    """
    with _readable(folder):
        classes = tuple(summary["classes"])
        metrics = tuple(summary["classes"][classes[0]])
        with (folder / IMAGES_FILE).open(encoding="utf-8", newline="") as file:
            scores = _read_table(csv.DictReader(file), classes, metrics)
        num_here, num_told = len(scores.ids), summary.get("num_images", len(scores.ids))
        if num_here != num_told:
            raise ValueError(f"{IMAGES_FILE} has {num_here} images, {SUMMARY_FILE} {num_told}")
        return scores


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged file can cause into one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{folder} does not hold an evaluation that can be read ({reason}); write it anew with "
            "`sam3cache eval`"
        ) from None


def is_evaluated(run: Run) -> bool:
    """Return whether there is an evaluation of the weights that the run has now."""
    if not all((run.evaluation / name).is_file() for name in (IMAGES_FILE, SUMMARY_FILE)):
        return False
    info = run.info()
    if info is None:
        return True
    summary = read_summary(run.evaluation)
    classes = tuple(summary.get("classes") or ())
    # Those of before versions that compared names may stand at the wrong ones.
    is_named_alike = len(classes) < 2 or not info.classes or classes == tuple(info.classes)
    return is_named_alike and bool(summary.get("weights_sha256") == info.weights_sha256)


def check_same_training(experiment: Experiment) -> None:
    """Refuse to take together what was not trained alike, but for seeds and folds.

    Raises:
        ConfigError: with every setting that differs; or the same seed is there twice.
    """
    recorded = [(run, info) for run in experiment.runs if (info := run.info()) is not None]
    if len(recorded) < 2:
        return
    of_member: dict[tuple[int | None, int | None], Run] = {}
    for run, _ in recorded:
        seed, fold = run.member()
        other = of_member.setdefault((seed, fold), run)
        if other is not run:
            where = "" if fold is None else f" and fold {fold}"
            raise ConfigError(
                f"{other.name} and {run.name} are both of seed {seed}{where}, and would count "
                "twice; rename one, or give the two by themselves"
            )
    first, of_first = recorded[0][0], _of_training(recorded[0][1])
    for run, info in recorded[1:]:
        here = _of_training(info)
        differences = [
            f"{name} {of_first.get(name)} → {here.get(name)}"
            for name in sorted({*of_first, *here})
            if of_first.get(name) != here.get(name)
        ]
        if differences:
            old = [one.name for one in experiment.runs if one.is_to_be_replaced]
            advice = "rename one, or give the two by themselves"
            if old:
                advice = (
                    f"{listed(old)} still to be replaced: go on with `sam3cache train --resume`"
                )
            raise ConfigError(
                f"{first.name} and {run.name} are not seeds or folds of one experiment "
                f"({'; '.join(differences)}); {advice}"
            )


def combine(experiment: Experiment, scores: Sequence[Scores]) -> Scores:
    """Take the runs of an experiment together.

    Of runs with the same images each value is the mean, where all of them have one; runs that
    have no image in common are put one after the other.

    Raises:
        ConfigError: they share some images, but not all; or they are of other classes or masks, or
            share no measure.
    """
    classes = scores[0].classes
    metrics = [name for name in scores[0].metrics if all(name in s.metrics for s in scores)]
    if not metrics or any(set(s.classes) != set(classes) for s in scores):
        raise ConfigError(
            f"the runs of {experiment.name} were measured on other classes or have no measure in "
            "common; evaluate them anew on one label set"
        )
    parts = []
    for same in _by_images(scores):
        aligned = _aligned(same, classes, metrics)
        if changed := sorted({name for one in aligned for name in one.of_other_masks(aligned[0])}):
            raise ConfigError(
                f"the runs of {experiment.name} were measured against other masks of "
                f"{len(changed)} images ({listed(changed)}); evaluate all anew on one label set"
            )
        parts.append(_mean(aligned))
    ids = [name for part in parts for name in part.ids]
    if len(set(ids)) < len(ids):
        shared = sorted({name for name in ids if ids.count(name) > 1})
        raise ConfigError(
            f"the runs of {experiment.name} share {len(shared)} images ({listed(shared)}) but not "
            "all: seeds score the same images, folds none in common; evaluate them on one split "
            "of one store, or give them by themselves"
        )
    return _joined(parts)


def by_seed(scores: Sequence[Scores], seeds: Sequence[int | None]) -> list[Scores]:
    """Return what each seed of an experiment scored, of folds all of its parts together.

    Args:
        scores: of its runs, in the order of their names, all of the same classes and measures.
        seeds: of the same runs; where one is not known, the order of the names stands for them.
    """
    keys: list[int] = [seed for seed in seeds if seed is not None]
    if len(keys) < len(scores):
        place = {id(one): i for same in _by_images(scores) for i, one in enumerate(same)}
        keys = [place[id(one)] for one in scores]
    parts: dict[int, list[Scores]] = {}
    for key, one in zip(keys, scores, strict=True):
        parts.setdefault(key, []).append(one)
    # The folds of a seed have images of their own, or, on split test, all the same ones.
    joined = [
        _joined(
            [_mean(_aligned(same, same[0].classes, same[0].metrics)) for same in _by_images(of)]
        )
        for of in parts.values()
    ]
    # A seed that lacks a fold is left out: it lacks images or, on split test, a head.
    num_images = len({name for one in scores for name in one.ids})
    num_runs = max(map(len, parts.values()))
    return [
        one
        for one, of in zip(joined, parts.values(), strict=True)
        if len(one.ids) == num_images and len(of) == num_runs
    ]


def _by_images(scores: Sequence[Scores]) -> list[list[Scores]]:
    """Group runs that scored the same images."""
    found: dict[frozenset[str], list[Scores]] = {}
    for one in scores:
        found.setdefault(frozenset(one.ids), []).append(one)
    return list(found.values())


def _aligned(
    same: Sequence[Scores], classes: Sequence[str], metrics: Sequence[str]
) -> list[Scores]:
    """Return runs of the same images with these in one order."""
    return [one.of(same[0].ids, classes, metrics) for one in same]


def _mean(aligned: Sequence[Scores]) -> Scores:
    """Return the mean of each value over runs, where all of them have it."""
    mean_NCM = np.mean([one.value_NCM for one in aligned], axis=0)
    return dataclasses.replace(aligned[0], value_NCM=mean_NCM)


def _joined(parts: Sequence[Scores]) -> Scores:
    """Put the scores of parts of the images one after the other."""
    return dataclasses.replace(
        parts[0],
        ids=tuple(name for part in parts for name in part.ids),
        groups=tuple(group for part in parts for group in part.groups),
        value_NCM=np.concatenate([part.value_NCM for part in parts]),
        true_px_NC=np.concatenate([part.true_px_NC for part in parts]),
    )


def listed(names: Sequence[str]) -> str:
    """Write names for people, the first few of many."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _experiments_in(path: Path, split: str) -> list[Experiment]:
    run = _run_at(path, split)
    if run is not None:
        _require_no_runs_inside(path, split)
        return [Experiment(run.name, (run,))]
    if _is_under_way(path):
        raise ConfigError(
            f"{path} has begun and has no checkpoint of an epoch yet; let it go on (`sam3cache "
            "train --resume`), or name others"
        )
    if path.is_dir():
        experiments = _by_stem(sorted(path.iterdir()), split, path.resolve().name)
        # Seeds, folds and experiments lie in a folder of their own, one deeper.
        for inside in sorted(path.iterdir()):
            if inside.is_dir() and _run_at(inside, split) is None and not _is_under_way(inside):
                experiments += _by_stem(sorted(inside.iterdir()), split, inside.name)
        if experiments:
            return experiments
    elif path.parent.is_dir():
        named = _named(path)
        experiments = _by_stem(
            [other for other in named if _stem(other.name, "") == path.name], split, path.name
        )
        # A seed of which there are folds.
        folds = [run for other in named if (run := _run_at(other, split)) is not None]
        if not experiments and folds:
            experiments = [Experiment(path.name, tuple(sorted(folds, key=_order)))]
        if experiments:
            return experiments
    raise ConfigError(
        f"{path} holds nothing to compare: expected a run such as checkpoints/first, a folder of "
        f"runs, or an evaluation with {IMAGES_FILE} and {SUMMARY_FILE}"
    )


def _named(path: Path) -> list[Path]:
    """Return the seeds and folds that a name stands for; of that of a seed, its folds."""
    return [
        other
        for other in sorted(path.parent.glob("*"))
        if _stem(other.name, "") == path.name
        or (_MEMBER.search(path.name) and _FOLD.fullmatch(other.name.removeprefix(path.name)))
    ]


def _run_at(path: Path, split: str) -> Run | None:
    """Return the run, checkpoint or evaluation that lies at a path, if one does."""
    own_name = path.resolve().name
    if (path / SUMMARY_FILE).is_file() and (path / IMAGES_FILE).is_file():
        if own_name.startswith("eval-"):
            own_name = path.resolve().parent.name
        return Run(own_name, None, path)
    evaluation = path / f"eval-{split}"
    if _is_under_way(path):
        return None
    if (checkpoint_folder(path) / MODEL_FILE).is_file():
        if own_name in CHECKPOINTS:
            own_name = f"{path.resolve().parent.name}/{own_name}"
        return Run(own_name, path, evaluation)
    if (evaluation / SUMMARY_FILE).is_file():
        return Run(own_name, None, evaluation)
    return None


def _by_stem(paths: Iterable[Path], split: str, otherwise: str) -> list[Experiment]:
    runs: dict[str, list[Run]] = {}
    for path in paths:
        run = _run_at(path, split) if path.is_dir() else None
        if run is not None:
            _require_no_runs_inside(path, split)
            runs.setdefault(_stem(path.name, otherwise), []).append(run)
    experiments = []
    for stem, of in runs.items():
        # A run without a number of its own is none of the seeds beside it.
        alone = [run for run in of if run.name == stem] if len(of) > 1 else []
        several = sorted((run for run in of if run not in alone), key=_order)
        experiments += [Experiment(stem, (run,)) for run in alone]
        experiments.append(Experiment(f"{stem}-runs" if alone else stem, tuple(several)))
    return experiments


def _require_no_runs_inside(path: Path, split: str) -> None:
    """Refuse a run in whose folder lie others: by its path either could be meant."""
    own = {*CHECKPOINTS, f"eval-{split}"}
    inside = [
        other.name
        for other in sorted(path.iterdir())
        if other.is_dir() and other.name not in own and (other / BEST / MODEL_FILE).is_file()
    ]
    if inside:
        stem = _stem(inside[0], inside[0])
        raise ConfigError(
            f"{path} is a run, and holds others ({listed(inside)}); name those by {path / stem}, "
            f"and the run itself by {path / BEST}"
        )


def _stem(name: str, otherwise: str) -> str:
    """Return an experiment's name, from that of one of its runs."""
    return _MEMBER.sub("", name).strip("-_.") or otherwise


def _order(run: Run) -> list[tuple[str, int]]:
    """Order names by the numbers in them: seed2 before seed10."""
    parts = re.split(r"(\d+)", run.name)
    return [
        (text, int(number)) for text, number in zip(parts[::2], [*parts[1::2], "0"], strict=True)
    ]


def _long_name(experiment: Experiment) -> str:
    run = experiment.runs[0]
    folder = (run.folder or run.evaluation).resolve()
    if folder.name.startswith("eval-"):
        folder = folder if run.folder is None else folder.parent
    return f"{folder.parent.name}/{experiment.name if len(experiment.runs) > 1 else folder.name}"


def _of_training(info: CheckpointInfo) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in info.settings.items()
        if name not in _OF_ONE_RUN and "fold" not in name
    }
    features = {f"features {level}": of["digest"][:12] for level, of in info.levels.items()}
    return {**settings, **features, "head": info.head, "head_options": dict(info.head_options)}


def _read_table(
    lines: Iterable[Mapping[str, str]], classes: tuple[str, ...], metrics: tuple[str, ...]
) -> Scores:
    """Read per_image.csv: a line an image and class, in any order."""
    groups: dict[str, str] = {}
    pixels: dict[str, str] = {}
    values: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        groups[line["id"]] = line["group"]
        if line.get("pixels"):
            pixels[line["id"]] = line["pixels"]
        values[line["id"], line["class_name"]] = [
            float(line[name]) if line[name] else np.nan for name in (*metrics, "true_px")
        ]
    nothing = [np.nan] * (len(metrics) + 1)
    table = np.array([[values.get((id_, name), nothing) for name in classes] for id_ in groups])
    if not len(table):
        raise ValueError("it has no images")
    value_NCM, true_px_NC = table[..., :-1], table[..., -1]
    if len(classes) > 1:
        classes = (OVER_CLASSES, *classes)
        # Before silence becomes 1: here a class that is neither there nor marked has no say.
        in_image = [m in SILENCE_IS_RIGHT for m in metrics]
        over_N1M = np.where(in_image, _mean_over_classes(value_NCM), np.nan)
        value_NCM = np.concatenate((over_N1M, value_NCM), axis=1)
        # Of the classes whose masks are known, if any is.
        of_all_N1 = np.nansum(true_px_NC, axis=1, keepdims=True)
        of_all_N1[np.isnan(true_px_NC).all(axis=1)] = np.nan
        true_px_NC = np.concatenate((of_all_N1, true_px_NC), axis=1)
    for metric in SILENCE_IS_RIGHT:
        if metric in metrics:
            value_NC = value_NCM[..., metrics.index(metric)]
            value_NC[np.isnan(value_NC) & (true_px_NC == 0)] = 1.0
    return Scores(
        tuple(groups), tuple(groups.values()), classes, metrics, value_NCM, true_px_NC, pixels
    )


def _mean_over_classes(value_NCM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, 1, M): the mean over the classes that have a value; NaN where none has."""
    known_NCM = np.isfinite(value_NCM)
    sum_N1M = np.where(known_NCM, value_NCM, 0.0).sum(axis=1, keepdims=True)
    num_N1M = known_NCM.sum(axis=1, keepdims=True)
    return np.where(num_N1M > 0, sum_N1M / np.maximum(num_N1M, 1), np.nan)
