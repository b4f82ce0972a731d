"""The images that stand for a comparison on its page, with what each run makes of them.

Shape legend: C classes, H height, W width, K planes of logits, N images, S side of a square of
logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import CheckpointError, HeadError, StoreError
from sam3cache.evaluation.cases import choose_cases
from sam3cache.evaluation.comparing.runs import Run, Scores
from sam3cache.evaluation.evaluate import checkpoint_folder, serve_as_trained
from sam3cache.evaluation.predicting import Rule, logits_of, planes, predict
from sam3cache.features import FeatureStore, StoredSample, open_store
from sam3cache.geometry import Letterbox
from sam3cache.heads import load_checkpoint
from sam3cache.loading import CachedSamples

Source = tuple[Run, Mapping[str, Any], Scores]
"""A run, the summary of its evaluation, and what it scored."""

_TITLES = {"Best": "Best difference", "Median": "Median difference", "Worst": "Worst difference"}


@dataclass(frozen=True)
class ComparedCase:
    """One image, with what each run predicts there.

    Attributes:
        title: which of the differences it stands for.
        sample: the image.
        letterbox: how it lies on the padded square.
        store: that holds it.
        difference: of Dice to the baseline, the mean over the others.
        dice: by experiment, the baseline first.
        mask_CHW: uint8, on the mask's own grid; 255 does not count. None before it is known.
        predicted_CHW: by experiment whose prediction could be made, bool, on the same grid.
    """

    title: str
    sample: StoredSample
    letterbox: Letterbox
    store: FeatureStore
    difference: float
    dice: Mapping[str, float]
    mask_CHW: NDArray[np.uint8] | None
    predicted_CHW: Mapping[str, NDArray[np.bool_]]


def compared_cases(
    store_path: Path,
    sources: Mapping[str, Sequence[Source]],
    ids: Sequence[str],
    dice: Mapping[str, NDArray[np.float64]],
    *,
    heads: Sequence[str],
    device: str,
    overlay: Path | None,
    allow_unsealed: bool,
) -> tuple[list[ComparedCase], list[str]]:
    """Choose the images with the best, the median and the worst difference, and predict them.

    Of an experiment of several runs the first predicts that scored the image.

    Args:
        store_path: of the store that was measured on.
        sources: by experiment, its runs; the baseline first.
        ids: of the images that were compared.
        dice: by experiment, of these images; NaN where an image has none.
        heads: the user's own heads, each as "package.module:Class".
        device: where heads predict.
        overlay: beside the store, or None.
        allow_unsealed: whether the store may be unfinished.

    Returns:
        The cases, the best first, and a sentence on whatever could not be shown.
    """
    baseline, *others = dice
    gain_N = np.mean([dice[name] - dice[baseline] for name in others], axis=0)
    chosen = choose_cases([None if np.isnan(gain) else float(gain) for gain in gain_N])
    try:
        store = open_store(store_path, allow_unsealed=allow_unsealed, overlay=overlay)
    except StoreError as error:
        return [], [f"No pictures, since the store cannot be read: {error}."]
    samples = {sample.id: sample for sample in store.samples}
    if not all(ids[i] in samples for _, i in chosen):
        return [], [f"No pictures, since {store_path.name} lacks images that were compared."]
    cases: list[ComparedCase] = []
    sentences: list[str] = []
    for title, i in chosen:
        case = ComparedCase(
            title=_TITLES.get(title, title),
            sample=samples[ids[i]],
            letterbox=Letterbox.fit(samples[ids[i]].height_px, samples[ids[i]].width_px),
            store=store,
            difference=float(gain_N[i]),
            dice={name: float(of_N[i]) for name, of_N in dice.items()},
            mask_CHW=None,
            predicted_CHW={},
        )
        cases.append(case)
    for name, runs in sources.items():
        for run, summary, scores in runs:
            scored = frozenset(scores.ids)
            mine = [
                at
                for at, case in enumerate(cases)
                if case.sample.id in scored and name not in case.predicted_CHW
            ]
            if not mine:
                continue
            try:
                drawn = _predicted(
                    store_path,
                    run,
                    summary,
                    [cases[at].sample.row for at in mine],
                    heads=heads,
                    device=device,
                    overlay=overlay,
                    allow_unsealed=allow_unsealed,
                )
            except (CheckpointError, HeadError, StoreError) as error:
                sentences.append(f"No borders of {run.name}: {error}.")
                continue
            for at, (letterbox, mask_CHW, predicted_CHW) in zip(mine, drawn, strict=True):
                predictions = {**cases[at].predicted_CHW, name: predicted_CHW}
                cases[at] = replace(
                    cases[at], letterbox=letterbox, mask_CHW=mask_CHW, predicted_CHW=predictions
                )
    return [case for case in cases if case.mask_CHW is not None], sentences


def _predicted(
    store_path: Path,
    run: Run,
    summary: Mapping[str, Any],
    rows: Sequence[int],
    *,
    heads: Sequence[str],
    device: str,
    overlay: Path | None,
    allow_unsealed: bool,
) -> list[tuple[Letterbox, NDArray[np.uint8], NDArray[np.bool_]]]:
    """Have a run predict some images again, as it did when it was evaluated."""
    folder = Path(str(summary["checkpoint"]))
    if run.folder is not None:
        folder = checkpoint_folder(run.folder)
    named = str(summary["head"])
    head, info = load_checkpoint(folder, head=named if named in heads else None, device=device)
    if info.weights_sha256 != summary["weights_sha256"]:
        raise CheckpointError(f"{folder} was trained anew since it was evaluated")
    # A store serves one choice of precisions, and each head has its own.
    store = open_store(store_path, allow_unsealed=allow_unsealed, overlay=overlay)
    serve_as_trained(store, info)
    label_set = str(summary["label_set"])
    if label_set not in store.label_sets:
        raise StoreError(f"{store_path} has no label set {label_set}")
    cached = CachedSamples(
        store, rows, tuple(info.levels), device=device, residency="stream", label_set=label_set
    )
    spec = store.label_sets[label_set]
    threshold = summary.get("threshold")
    # Of a task that has no threshold any does.
    rule = Rule(spec.task, len(spec.classes), 0.5 if threshold is None else float(threshold))
    drawn = []
    for i in range(len(rows)):
        mask_CHW = planes(cached, i, rule)
        if mask_CHW is None:
            raise StoreError(f"{store_path} no longer has a mask of {cached.samples[i].id}")
        (logits_KSS,) = logits_of(head, cached.batch([i]))
        predicted_CHW = predict(logits_KSS, cached.letterbox(i), mask_CHW, rule).predicted_CHW
        drawn.append((cached.letterbox(i), mask_CHW.cpu().numpy(), predicted_CHW.cpu().numpy()))
    return drawn
