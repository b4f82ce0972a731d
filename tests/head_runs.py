"""Checkpoints of heads with random weights: what training leaves, at once."""

from pathlib import Path
from typing import Any

import torch

from sam3cache.evaluation import fingerprints_of
from sam3cache.features import FeatureStore, Fingerprint
from sam3cache.heads import CheckpointInfo, build_head, save_checkpoint
from sam3cache.tasks import Task, num_outputs

SMALL: dict[str, dict[str, Any]] = {
    "film-detail": {"embedding_dim": 16, "width": 8, "context_width": 8},
    "film-pyramid": {"embedding_dim": 16, "width": 8, "context_width": 8},
    "film-conv": {"embedding_dim": 64, "widths": [16, 16]},
}
"""Options with which heads are small; a head that is not here is built as it is."""

SHAPES = {
    "fpn_72": (256, 18, 18),
    "fpn_144": (256, 36, 36),
    "fpn_288": (256, 72, 72),
    "trunk_72": (96, 18, 18),
    "image_1008": (1, 252, 252),
}
"""A quarter of the real sides: convolutions take any, in a sixteenth of the time."""

Levels = dict[str, dict[str, Any]]
"""By name: shape, digest and fields, as checkpoints record them."""


def levels_of(store: FeatureStore, precision: str = "float16") -> Levels:
    """Return the levels of a store by their plain names, in one of the precisions it has."""
    if precision != "float16":
        store.serve(precision)  # type: ignore[arg-type]
    served = store.served_levels
    made_like = fingerprints_of(store)
    return {
        level: {"shape": list(served[level].shape), **made_like[level]}
        for level in served
        if "." not in level
    }


def levels_of_nothing() -> Levels:
    """Return every level of SAM 3, of features that nobody made."""
    levels = {}
    for level, shape in SHAPES.items():
        made_like = Fingerprint({"level": level, "weights_sha256": "w", "preprocessing.pad": 0})
        entry = {"digest": made_like.digest, "fields": dict(made_like.fields)}
        levels[level] = {"shape": list(shape), **entry}
    return levels


def write_run(
    levels: Levels,
    folder: Path,
    head: str,
    *,
    task: Task = "multilabel",
    classes: tuple[str, ...] = ("vessel",),
    threshold: float = 0.5,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose best checkpoint is of a head as it is built; zeros become random, too.

    Args:
        levels: that the head can read.
        folder: of the run.
        head: its name.
        task: what it is asked.
        classes: names of what it predicts.
        threshold: of the checkpoint.
        options: of the head; None: those that make it small.
    """
    options = SMALL.get(head, {}) if options is None else options
    shapes = {level: tuple(entry["shape"]) for level, entry in levels.items()}
    num_classes = num_outputs(task, len(classes))
    torch.manual_seed(3)
    built = build_head(head, shapes, options, num_classes=num_classes)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in built.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    info = CheckpointInfo(
        head=head,
        head_options=options,
        num_classes=num_classes,
        levels={level: levels[level] for level in built.needs},
        label_set="mask",
        epoch=1,
        threshold=threshold,
        task=task,
        classes=classes,
    )
    save_checkpoint(folder / "best", built, info)
    return folder
