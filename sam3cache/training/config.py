"""What a training is told, checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sam3cache.errors import ConfigError
from sam3cache.features import FEATURE_PRECISIONS
from sam3cache.features import Precision as StoredPrecision
from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.loading import Residency

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# A run's name becomes a folder's, on every system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Where a run lies and what it runs on may change between its parts; the rest makes its result.
# The data do, too, but a hash is no setting that one could resume with.
_NOT_THE_RESULT = frozenset(
    {"store", "overlay", "name", "device", "residency", "allow_unsealed", "data_sha256"}
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        store: path of the feature store, as given.
        name: of the run: its folder below ``output``.
        head: name in ``HEADS``, or "package.module:Class".
        head_options: keyword arguments of the head's own, plain JSON values.
        output: folder of all runs.
        label_set: label set of the store to learn.
        feature_precision: which of the precisions that a level is stored in is read, such as
            "int8"; None: the most exact.
        epochs: passes over the training split.
        batch_size: samples a step.
        learning_rate: of AdamW at the first step; a cosine takes it to 0 at the last. None: the
            head's own.
        weight_decay: of AdamW.
        bce_weight: share of cross-entropy in the loss, in [0, 1]; the rest is Dice.
        loss_size_px: side of the grid that logits and masks are compared on.
        seed: of the first weights, the order and dropout.
        precision: what a head computes in; auto is bf16 or fp16 on a GPU and fp32 on a CPU.
        device: "auto", "cpu" or a CUDA device.
        residency: where samples lie; see ``sam3cache.loading``.
        resume: go on after the last finished epoch of this run.
        overwrite: replace a run of this name.
        allow_unsealed: train on what an unfinished extraction has stored so far.
        overlay: folder of labels and annotations beside the store, or None.

    Raises:
        ConfigError: a value that cannot be used.
    """

    store: str
    name: str
    head: str = "film-detail"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    output: str = "checkpoints"
    label_set: str = "mask"
    feature_precision: StoredPrecision | None = None
    epochs: int = 30
    batch_size: int = 16
    learning_rate: float | None = None
    weight_decay: float = 0.01
    bce_weight: float = 0.5
    loss_size_px: int = INPUT_SIZE_PX
    seed: int = 0
    precision: Precision = "auto"
    device: str = "auto"
    residency: Residency = "auto"
    resume: bool = False
    overwrite: bool = False
    allow_unsealed: bool = False
    overlay: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"run name {self.name!r}: expected letters, digits, '.', '_' and '-', beginning "
                "with a letter or digit; choose another with --name"
            )
        rules = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            (
                "learning_rate",
                self.learning_rate is None or 0 < self.learning_rate < math.inf,
                "above 0, such as 1e-4",
            ),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("bce_weight", 0 <= self.bce_weight <= 1, "between 0 (Dice alone) and 1"),
            ("loss_size_px", 1 <= self.loss_size_px <= 4096, "1 to 4096, such as 1008 or 252"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            (
                "feature_precision",
                self.feature_precision in (None, *FEATURE_PRECISIONS),
                f"one of {', '.join(FEATURE_PRECISIONS)}",
            ),
            ("precision", self.precision in get_args(Precision), "auto, fp32, bf16 or fp16"),
            ("residency", self.residency in get_args(Residency), "auto, device, ram or stream"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected {expected}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other: give one of the two")

    @property
    def run_dir(self) -> Path:
        """Folder that the run writes into."""
        return Path(self.output) / self.name

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, as checkpoints record it.

        Of the store its folder's name alone: checkpoints travel, the paths of a machine do not.
        """
        settings = dataclasses.asdict(self) | {
            "store": Path(self.store).resolve().name,
            "overlay": None if self.overlay is None else Path(self.overlay).resolve().name,
            "head_options": dict(self.head_options),
        }
        del settings["output"], settings["resume"], settings["overwrite"]
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def check_same_run(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose result the present settings or data would change.

    Raises:
        ConfigError: every setting that differs, as recorded → present, or that the data do.
    """
    differences = [
        f"{name} {recorded.get(name)} → {present.get(name)}"
        for name in sorted({*recorded, *present} - _NOT_THE_RESULT)
        if recorded.get(name) != present.get(name)
    ]
    if differences:
        raise ConfigError(
            f"the run to resume had other settings ({'; '.join(differences)}); resume with the "
            "old ones, or start a run under another --name"
        )
    if recorded.get("data_sha256") != present.get("data_sha256"):
        raise ConfigError(
            f"the run to resume learned from other images, angles or masks than {present['store']} "
            "now has in its splits train and val; resume on the store as it was, or start a run "
            "under another --name"
        )


def resolve_precision(precision: Precision, device: str) -> Precision:
    """Return fp32, bf16 or fp16 for a device.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if device == "cpu":
        if precision == "fp16":
            raise ConfigError(
                "precision fp16 needs a CUDA device, the head is on the CPU; take fp32 (or auto)"
            )
        # bf16 is emulated, and many times slower, on CPUs without instructions for it.
        return "fp32" if precision == "auto" else precision
    if precision == "auto":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return precision
