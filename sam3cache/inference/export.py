"""A trained head as a ``.pt2`` file of torch.export, to be run without sam3cache.

Shape legend: B batch, C channels, H height, W width, K planes of logits, S side of the square.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sam3cache
from sam3cache.errors import ConfigError, HeadError
from sam3cache.evaluation import checkpoint_folder
from sam3cache.features.precision import split_name
from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.heads import CheckpointInfo, Head, load_checkpoint
from sam3cache.inference.predictor import (
    IMAGE_LEVEL,
    class_names,
    decision_words,
    precision_of,
    threshold_of,
    trial_batch,
)
from sam3cache.records import Batch
from sam3cache.runtime import write_atomic

FORMAT_VERSION = 1
RECORD_IN_FILE = "sam3cache.json"
"""Name of the record inside the .pt2, for ``torch.export.load(…, extra_files=…)``."""

TOLERANCE = 1e-4
"""Largest difference of a logit from the head's own, as a share of the largest logit (at least 1).

Measured at every export; another order of sums gives about 1e-6 in float32.
"""

# torch.export's own failures are RuntimeErrors; the others are what a user's own forward may raise.
_MISTAKES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)

_BATCH = 3
"""Of the trial: torch.export takes 0 and 1 for special."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        path: the .pt2.
        record_path: the JSON beside it.
        max_abs_difference: of a logit from the head's own, on a trial of three images.
        record: what the JSON says.
    """

    path: Path
    record_path: Path
    max_abs_difference: float
    record: Mapping[str, Any]


class ExportedHead(nn.Module):
    """A head with plain tensors for arguments."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, levels: dict[str, Tensor], angles_B2: Tensor, content_B2: Tensor) -> Tensor:
        """Return logits float32 (B, K, S, S).

        Args:
            levels: by name, features float32 (B, C, H, W); ``image_1008`` is uint8.
            angles_B2: float32, degrees, primary and secondary; NaN where unknown.
            content_B2: int64, height and width in pixels of what is picture on the square.
        """
        logits_BKSS: Tensor = self.head(Batch(levels, angles_B2, content_B2))
        return logits_BKSS.float()


def export_head(
    checkpoint: str | Path,
    path: str | Path,
    *,
    head: str | None = None,
    threshold: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> ExportResult:
    """Write a trained head as a ``.pt2``, and beside it a JSON that says how to use it.

    ``torch.export.load(path).module()(levels, angles_B2, content_B2)`` gives the logits, for any
    number of images. It runs on the device that it was exported for.

    Args:
        checkpoint: a run's folder, whose best checkpoint is taken, or that of one checkpoint.
        path: the file to write, in a folder that is there; its name ends in ``.pt2``.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        threshold: probability from which a pixel counts, for the JSON; None: the checkpoint's own.
        device: where it shall run.
        overwrite: whether to replace files that are there.

    Raises:
        ConfigError: the name ends otherwise, its folder is not there, a file is in the way, or the
            threshold cannot be used.
        CheckpointError: there is no such checkpoint, or it does not fit.
        HeadError: the head cannot be exported, or gives other logits then.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigError(f"{path}: expected a name that ends in .pt2, as head.pt2")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{path}: there is no folder {path.parent}; make it first, or name another place"
        )
    record_path = path.with_suffix(".json")
    for one in (path, record_path):
        if one.exists() and not overwrite:
            raise ConfigError(f"{one} is there already; name another, or replace it by --overwrite")
    folder = checkpoint_folder(Path(checkpoint))
    trained, info = load_checkpoint(folder, head=head, device=device)
    info = dataclasses.replace(info, threshold=threshold_of(info, threshold))
    module = ExportedHead(trained.requires_grad_(False)).eval()
    batch = trial_batch(info, _BATCH, device)
    trial = (dict(batch.levels), batch.angles_B2, batch.content_B2)
    try:
        with torch.no_grad():
            expected_BKSS = module(*trial)
            program = torch.export.export(module, trial, dynamic_shapes=_dynamic(trial))
            found_BKSS = program.module()(*trial)
    except _MISTAKES as error:
        raise HeadError(
            f"head {info.head} cannot be exported: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or ['no reason given'])[0]}; write its forward "
            "without choices that depend on values or on the number of images (docs/predict.md)"
        ) from error
    difference = float((found_BKSS - expected_BKSS).abs().max())
    limit = TOLERANCE * max(1.0, float(expected_BKSS.abs().max()))
    # Not >: NaN, too, is no agreement.
    if not difference <= limit:
        raise HeadError(
            f"head {info.head} gives other logits once it is exported (by {difference:.2g}, where "
            f"{limit:.2g} is allowed); write its forward without randomness, and without choices "
            "that depend on values"
        )
    record = _record(info, tuple(expected_BKSS.shape[1:]), device, difference)
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    program.example_inputs = None  # Megabytes, of no use to anybody.
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={RECORD_IN_FILE: text})
    write_atomic(path, file.getbuffer())
    write_atomic(record_path, text.encode())
    return ExportResult(path, record_path, difference, record)


def _dynamic(trial: tuple[dict[str, Tensor], Tensor, Tensor]) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=1)
    return {level: {0: batch} for level in trial[0]}, {0: batch}, {0: batch}


def _to_picture(num_cells: int) -> list[str]:
    """Return what ``Letterbox.logits_to_grid`` does along one axis, to be done without it."""
    return [
        f"extent = content_px * {num_cells} / {INPUT_SIZE_PX}",
        "last = maximum(1, ceil(extent - 0.5)) - 1",
        "centre = clip((arange(num_pixels) + 0.5) * (extent / num_pixels) - 0.5, 0, last)",
        "lower = floor(centre).astype(int)",
        "upper = minimum(lower + 1, last).astype(int)",
        "logits = (1 - (centre - lower)) * logits[lower] + (centre - lower) * logits[upper]",
    ]


def _record(
    info: CheckpointInfo, logits_shape: tuple[int, ...], device: str, difference: float
) -> dict[str, Any]:
    """Return all that somebody needs who has the file alone."""
    fields: dict[str, Any] = {}
    for entry in info.levels.values():
        fields |= entry["fields"]
    content_px = f"each side * {INPUT_SIZE_PX} / the longest, rounded (halves to even), at least 1"
    if fields.get("preprocessing.resize_mode") == "squash":
        content_px = "all of it"
    return {
        "format_version": FORMAT_VERSION,
        "call": "torch.export.load(FILE).module()(levels, angles_B2, content_B2)",
        "device": device,
        "levels": {
            level: {
                "shape": ["batch", *entry["shape"]],
                "dtype": "uint8" if level == IMAGE_LEVEL else "float32",
                "of": split_name(level)[0],
                "precision": "uint8" if level == IMAGE_LEVEL else precision_of(entry),
                "fingerprint": entry["fields"],
                "digest": entry["digest"],
            }
            for level, entry in info.levels.items()
        },
        "angles_B2": {
            "shape": ["batch", 2],
            "dtype": "float32",
            "meaning": "degrees: primary (LAO positive), secondary (cranial positive); NaN unknown",
        },
        "content_B2": {
            "shape": ["batch", 2],
            "dtype": "int64",
            "meaning": "height and width in pixels of what is picture, at the top left of the "
            f"{INPUT_SIZE_PX} px square: {content_px}",
        },
        "logits": {
            "shape": ["batch", *logits_shape],
            "dtype": "float32",
            "meaning": "on cells of the padded square, with the picture at its top left; "
            "to_picture carries each line of them to the picture's own pixels, first along its "
            "height, then along its width, by content_px of content_B2 and num_pixels of the "
            "picture (functions are NumPy's)",
            "to_picture": _to_picture(logits_shape[-1]),
        },
        "preprocessing": {
            name.removeprefix("preprocessing."): value
            for name, value in fields.items()
            if name.startswith("preprocessing.")
        },
        "tower": {
            name: value
            for name, value in fields.items()
            if name in ("weights_sha256", "numeric_path") or name.startswith("architecture.")
        },
        "task": info.task,
        "decide": decision_words(info),
        "threshold": info.threshold if info.task == "multilabel" else None,
        "classes": list(class_names(info)),
        "label_set": info.label_set,
        "tolerance": TOLERANCE,
        "max_abs_difference": difference,
        "checkpoint": {
            key: value
            for key, value in dataclasses.asdict(info).items()
            if key in ("head", "head_options", "epoch", "metrics", "seed", "weights_sha256")
        },
        "sam3cache_version": sam3cache.__version__,
        "torch_version": str(torch.__version__),
    }
