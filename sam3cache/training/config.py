"""What a training is told, checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sam3cache.errors import ConfigError
from sam3cache.features import FEATURE_PRECISIONS
from sam3cache.features import Precision as StoredPrecision
from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.loading import Residency
from sam3cache.loading.augment import IMAGE_LEVEL, Augmentation
from sam3cache.runtime import is_device_name

Precision = Literal["auto", "fp32", "bf16", "fp16"]
LearningRateScaling = Literal["none", "sqrt", "linear"]

# A run's name becomes a folder's, on every system.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")

# What a run's data are known by: they make its result, too, but are no settings to resume with.
_OF_THE_DATA = frozenset({"data_sha256", "num_train", "num_val", "class_weights_used"})

# Where a run lies and what it runs on may change between its parts; the rest makes its result.
_NOT_THE_RESULT = frozenset(
    {
        "store",
        "overlay",
        "name",
        "device",
        "residency",
        "allow_unsealed",
        "save_minutes",
        "compile",
    }
)

CE_WEIGHTS: Mapping[str, str] = {
    "dice-bce": "bce_weight",
    "dice-ce": "ce_weight",
    "cldice": "ce_weight",
    "boundary": "ce_weight",
}
"""By loss, its option for the share of cross-entropy; other losses have none."""

REFERENCE_BATCH = 16
"""The batch size that learning rates are given for."""

# By rule, the power of batch size / REFERENCE_BATCH that the learning rate is multiplied by.
_LR_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


BALANCED = "balanced"
"""Class weights that are found from the training masks; see ``loss.balanced_weights``."""

# By annotation, what a value read from a file or the command line has to be.
_KINDS: Mapping[Any, tuple[Any, str]] = {
    "str": (str, "text"),
    "str | None": (str | None, "text"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "int | None": (int | None, "a whole number"),
    "float": (int | float, "a number"),
    "float | None": (int | float | None, "a number"),
    "Sequence[str]": (list | tuple, "a list of names"),
    "Sequence[float] | str | None": (
        list | tuple | str | None,
        f"a list of numbers, or {BALANCED}",
    ),
    "Mapping[str, Any]": (Mapping, "names and values"),
}

# By annotation of a list, what its elements have to be.
_ELEMENTS: Mapping[Any, Any] = {
    "Sequence[str]": str,
    "Sequence[float] | str | None": int | float,
}


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
        micro_batch: samples that go through the head at once; their gradients add up to those of
            the batch. None: as many as fit, see ``training.micro``, or as a resumed run began with.
        learning_rate: of AdamW, for a batch of 16; a cosine takes it towards 0 at the last step.
            None: the head's own.
        lr_scaling: what a batch of another size does to it: "none", "sqrt" or "linear" in
            batch size / 16.
        warmup_epochs: epochs, or a part of one, in which the rate rises from 0.
        weight_decay: of AdamW.
        loss: name of a loss, see ``training.loss``; None: the default of what is learned.
        loss_options: keyword arguments of the loss, plain JSON values.
        class_weights: of the classes, in their order, in the loss; "balanced": from how large each
            is in the training masks, see ``loss.balanced_weights``; None: all alike.
        bce_weight: share of cross-entropy in the loss, in [0, 1], against Dice.
        loss_size_px: side of the grid that logits and masks are compared on.
        ema: decay of the moving average of the weights, such as 0.999, which is then what is
            validated and kept; 0: none.
        patience: epochs without a better validation Dice after which a run ends; None: never.
        augment: names of augmentations, see ``loading.augment``.
        variants: which stored variants of training images are drawn from: "all" (to resume: those
            that the run began with), "none", or names as "hflip,rot10".
        seed: of the first weights, the order and dropout.
        order_seed: of the order alone; None: the seed. Runs that share it can share one stream.
        folds: cross-validation: in how many parts the groups of the splits train and val are
            divided; 0: none, the splits as they are.
        fold: which part is validated on, from 0; the others are trained on.
        fold_seed: of the division.
        stratify: annotations, with commas between, whose values the parts shall share evenly.
        precision: what a head computes in; auto is bf16 or fp16 on a GPU and fp32 on a CPU.
        compile: let torch compile the head.
        device: "auto", "cpu" or a CUDA device.
        residency: where samples lie; see ``sam3cache.loading``.
        save_minutes: how often the state within an epoch is saved.
        resume: go on where this run was last saved.
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
    micro_batch: int | None = None
    learning_rate: float | None = None
    lr_scaling: LearningRateScaling = "none"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.01
    loss: str | None = None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    class_weights: Sequence[float] | str | None = None
    bce_weight: float = 0.5
    loss_size_px: int = INPUT_SIZE_PX
    ema: float = 0.0
    patience: int | None = None
    augment: Sequence[str] = ()
    variants: str = "all"
    seed: int = 0
    order_seed: int | None = None
    folds: int = 0
    fold: int | None = None
    fold_seed: int = 0
    stratify: str | None = None
    precision: Precision = "auto"
    compile: bool = False
    device: str = "auto"
    residency: Residency = "auto"
    save_minutes: float = 5.0
    resume: bool = False
    overwrite: bool = False
    allow_unsealed: bool = False
    overlay: str | None = None

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, (kinds, expected) = (
                getattr(self, setting.name),
                _KINDS.get(setting.type, (object, "text")),
            )
            # A bool is an int to Python, and to nobody else.
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise ConfigError(f"{setting.name} is {value!r}: expected {expected}")
            one = _ELEMENTS.get(setting.type)
            if one is not None and isinstance(value, list | tuple):
                for element in value:
                    if not isinstance(element, one) or isinstance(element, bool):
                        raise ConfigError(f"{setting.name} holds {element!r}: expected {expected}")
        if not _NAME.fullmatch(self.name) or is_device_name(self.name):
            raise ConfigError(
                f"run name {self.name!r}: expected letters, digits, '.', '_' and '-', beginning "
                "with a letter or digit, not ending with '.', and none that Windows keeps for a "
                "device; choose another with --name"
            )
        rules = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            (
                "learning_rate",
                self.learning_rate is None or 0 < self.learning_rate < math.inf,
                "above 0, such as 1e-4",
            ),
            ("micro_batch", self.micro_batch is None or self.micro_batch >= 1, "at least 1"),
            ("lr_scaling", self.lr_scaling in tuple(_LR_POWERS), ", ".join(_LR_POWERS)),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "0 to below the epochs"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("ema", 0 <= self.ema < 1, "0 (none) or a decay below 1, such as 0.999"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("variants", bool(self.variants), "all, none, or names as hflip,rot10"),
            ("save_minutes", self.save_minutes >= 0, "0 (after every step) or more"),
            ("folds", self.folds == 0 or self.folds >= 2, "0 (none), or at least 2"),
            (
                "fold",
                self.fold is None if not self.folds else self.fold in range(self.folds),
                f"0 to {self.folds - 1}, as folds is {self.folds}" if self.folds else "none",
            ),
            (
                "class_weights",
                not isinstance(self.class_weights, str) or self.class_weights == BALANCED,
                f"a list of numbers, such as [1,1,4], or {BALANCED}",
            ),
            ("bce_weight", 0 <= self.bce_weight <= 1, "between 0 (Dice alone) and 1"),
            ("loss_size_px", 1 <= self.loss_size_px <= 4096, "1 to 4096, such as 1008 or 252"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            ("fold_seed", 0 <= self.fold_seed < 2**63, "0 to 2^63 - 1"),
            (
                "order_seed",
                self.order_seed is None or 0 <= self.order_seed < 2**63,
                "0 to 2^63 - 1",
            ),
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
        # Raises for a name that is not there.
        Augmentation.of(self.augment)
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other: give one of the two")

    @property
    def run_dir(self) -> Path:
        """Folder that the run writes into."""
        return Path(self.output) / self.name

    @property
    def order(self) -> int:
        """Seed of the order of samples."""
        return self.seed if self.order_seed is None else self.order_seed

    def is_over(self, epoch: int, best_epoch: int) -> bool:
        """Return whether a run has ended, by its epochs or for want of a better Dice."""
        is_out_of_patience = self.patience is not None and epoch - best_epoch >= self.patience
        return epoch >= self.epochs or is_out_of_patience

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by for the batch size."""
        power = _LR_POWERS[self.lr_scaling]
        return float((self.batch_size / REFERENCE_BATCH) ** power)

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, as checkpoints record it.

        Of the store its folder's name alone: checkpoints travel, the paths of a machine do not. Of
        variants nothing: which "all" were is settled by the store, and recorded as variants_used.
        """
        settings = dataclasses.asdict(self) | {
            "store": Path(self.store).resolve().name,
            "overlay": None if self.overlay is None else Path(self.overlay).resolve().name,
            "head_options": dict(self.head_options),
            "loss_options": dict(self.loss_options),
        }
        del settings["output"], settings["resume"], settings["overwrite"], settings["variants"]
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def check_same_run(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose result the present settings or data would change.

    A micro-batch has to be the recorded one, too, or not be given: other parts of a batch add up to
    the same but for rounding, and a resumed run is the same, on a CPU to the bit.

    Raises:
        ConfigError: every setting that differs, as recorded → present, or that the data do.
    """
    if present["micro_batch"] is None:
        present = {**present, "micro_batch": recorded.get("micro_batch")}
    else:  # What is recorded is never more than the batch.
        most = min(present["micro_batch"], present["batch_size"])
        present = {**present, "micro_batch": most}
    recorded, present = _with_variants(recorded, present), _with_variants(present, recorded)
    differences = [
        f"{name} {recorded.get(name)} → {present.get(name)}"
        for name in sorted({*recorded, *present} - _NOT_THE_RESULT - _OF_THE_DATA)
        if recorded.get(name) != present.get(name)
    ]
    if differences:
        raise ConfigError(
            f"the run to resume had other settings ({'; '.join(differences)}); repeat all options "
            "that it was started with beside --resume, or start a run under another --name"
        )
    if any(recorded.get(name) != present.get(name) for name in _OF_THE_DATA):
        raise other_data(present["store"])


def _with_variants(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with variants as the option has them; runs of before recorded none."""
    texts = {}
    if "variants_used" in settings and "variants_used" in others:
        texts["variants"] = variants_text(settings["variants_used"])
    rest = {k: v for k, v in settings.items() if k not in ("variants", "variants_used")}
    return rest | texts


def variants_text(names: Sequence[str]) -> str:
    """Return what ``TrainConfig.variants`` is to draw from variants of these names alone."""
    return ",".join(names) or "none"


def other_data(store: str) -> ConfigError:
    """Return what refuses to resume a run on data that have changed."""
    return ConfigError(
        f"the run to resume learned from other images, angles or masks than {store} now has in its "
        "splits train and val; resume on the store as it was, or start a run under another --name"
    )


def require_effect(config: TrainConfig, levels: Sequence[str]) -> None:
    """Refuse an augmentation of what the head does not read, or a share that the loss has not.

    A run that began so before this was refused may go on.

    Args:
        config: of the run.
        levels: that its head reads.

    Raises:
        ConfigError: saying what is without effect.
    """
    if config.resume:
        return
    is_without_ce = config.loss is not None and config.loss not in CE_WEIGHTS
    if is_without_ce and config.bce_weight != TrainConfig.bce_weight:
        raise ConfigError(
            f"bce_weight is {config.bce_weight}, which loss {config.loss} does not have; leave it "
            f"out (where [defaults] of a file set it, bce_weight = {TrainConfig.bce_weight} does "
            f"so for one experiment), or take one of {', '.join(CE_WEIGHTS)}"
        )
    if "photometric" in config.augment and IMAGE_LEVEL not in levels:
        raise ConfigError(
            f"augmentation photometric changes {IMAGE_LEVEL} alone, which head {config.head} does "
            f"not read (it reads {', '.join(levels)}); leave it out"
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
