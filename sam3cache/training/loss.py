"""Losses by name: logits upsampled to the target's grid and compared there.

Every loss is a mean over images of what each gives by itself, so that parts of a batch add up to
the whole. Pixels of label 255, padding among them, count nowhere. Nothing of the grid's full size
is kept for the backward pass: loss and gradient are computed together, a few images at a time.

Shape legend: B batch, K planes of logits, M planes of a stored mask, C classes, H height, W width,
T side of the target grid.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sam3cache.errors import ConfigError
from sam3cache.features import ClassCount
from sam3cache.tasks import Task, default_loss
from sam3cache.training.loss_fused import dice_bce_loss, dice_ce_loss
from sam3cache.training.loss_monai import boundary_loss, cldice_loss, focal_loss, require_monai

__all__ = ["LOSSES", "build_loss", "default_loss", "dice_bce_loss", "dice_ce_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, K, H, W) and a target (B, M, T, T) to a scalar."""

# What computes a loss: also told the task and a weight for every class, or None.
_Form = Callable[..., Tensor]


def _dice_bce(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    bce_weight: float = 0.5,
) -> Tensor:
    return dice_bce_loss(logits_BKHW, target_BMTT, bce_weight, weights_C)


def _dice_ce(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    ce_weight: float = 0.5,
) -> Tensor:
    return dice_ce_loss(logits_BKHW, target_BMTT, ce_weight, weights_C)


def _focal(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    gamma: float = 2.0,
) -> Tensor:
    return focal_loss(logits_BKHW, target_BMTT, task, weights_C, gamma)


def _dice_focal(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    focal_weight: float = 0.5,
    gamma: float = 2.0,
) -> Tensor:
    focal = focal_loss(logits_BKHW, target_BMTT, task, weights_C, gamma)
    dice = _base(logits_BKHW, target_BMTT, task, weights_C, 0.0)
    return focal_weight * focal + (1 - focal_weight) * dice


def _cldice(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    cldice_weight: float = 0.3,
    iterations: int = 10,
    ce_weight: float = 0.5,
) -> Tensor:
    cldice = cldice_loss(logits_BKHW, target_BMTT, task, weights_C, iterations)
    base = _base(logits_BKHW, target_BMTT, task, weights_C, ce_weight)
    return cldice_weight * cldice + (1 - cldice_weight) * base


def _boundary(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    *,
    boundary_weight: float = 0.5,
    ce_weight: float = 0.5,
) -> Tensor:
    boundary = boundary_loss(logits_BKHW, target_BMTT, task, weights_C)
    base = _base(logits_BKHW, target_BMTT, task, weights_C, ce_weight)
    return boundary_weight * boundary + (1 - boundary_weight) * base


def _base(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    weights_C: Tensor | None,
    ce_weight: float,
) -> Tensor:
    """Return the task's default loss."""
    form = dice_bce_loss if task == "multilabel" else dice_ce_loss
    return form(logits_BKHW, target_BMTT, ce_weight, weights_C)


LOSSES: dict[str, _Form] = {
    "dice-bce": _dice_bce,
    "dice-ce": _dice_ce,
    "focal": _focal,
    "dice-focal": _dice_focal,
    "cldice": _cldice,
    "boundary": _boundary,
}
"""The losses that ``--loss`` takes; docs/heads.md says what each is."""

_OF_ONE_TASK: dict[str, Task] = {"dice-bce": "multilabel", "dice-ce": "multiclass"}
_OF_MONAI = ("focal", "dice-focal", "cldice", "boundary")


def build_loss(
    name: str,
    task: Task,
    *,
    class_weights: Sequence[float] | None = None,
    **options: Any,
) -> Loss:
    """Return a loss, its options checked.

    Args:
        name: a key of ``LOSSES``.
        task: what the head is asked; a few losses are of one task alone.
        class_weights: one a class, in their order: how much each counts against the others. Only
            their ratios matter; in "multiclass" the pixels of no class weigh 1 in cross-entropy
            and focal loss, beside which the classes' weights are taken as they are.
        options: keyword arguments of the loss, plain JSON values; see docs/heads.md.

    Returns:
        A function of logits, float32 (B, K, H, W) over the padded square, and a target, uint8
        (B, M, T, T) with 255 where nothing counts: the mean over images, a scalar.

    Raises:
        ConfigError: the loss, an option or the weights are not what they can be, or MONAI is
            needed and not installed.
    """
    if name not in LOSSES:
        raise ConfigError(f"no loss is named {name!r}; take one of {', '.join(LOSSES)}")
    if _OF_ONE_TASK.get(name, task) != task:
        raise ConfigError(
            f"loss {name} is for a {_OF_ONE_TASK[name]} label set, this one is {task}; take "
            f"{default_loss(task)}, or leave --loss out"
        )
    _check_options(name, options)
    weights = None if class_weights is None else _checked_weights(class_weights, task)
    if name in _OF_MONAI:
        require_monai(name)
    form = LOSSES[name]

    def loss(logits_BKHW: Tensor, target_BMTT: Tensor) -> Tensor:
        weights_C = None
        if weights is not None:
            num_classes = logits_BKHW.shape[1] - (task == "multiclass")
            if len(weights) != num_classes:
                raise ConfigError(
                    f"class_weights has {len(weights)} values for {num_classes} classes; give one "
                    "a class, in their order"
                )
            weights_C = logits_BKHW.new_tensor(weights)
        # Sums over a million pixels need float32, whatever the head computes in.
        with torch.autocast(logits_BKHW.device.type, enabled=False):
            return form(logits_BKHW, target_BMTT, task, weights_C, **options)

    return loss


def balanced_weights(counts: Sequence[ClassCount]) -> list[float]:
    """Return a weight a class by median-frequency balancing.

    A class's frequency is its mean number of pixels in the masks that show it; its weight is the
    median of the classes' frequencies over its own (Eigen & Fergus, ICCV 2015, section 6.3.2). A
    class that no mask shows weighs 1.

    Args:
        counts: of the training masks, in the order of the classes.
    """
    sizes_px = []
    for count in counts:
        num_samples = sum(count.num_samples.values())
        sizes_px.append(sum(count.num_pixels.values()) / num_samples if num_samples else None)
    shown_px = [size_px for size_px in sizes_px if size_px is not None]
    return [1.0 if size_px is None else median(shown_px) / size_px for size_px in sizes_px]


def _checked_weights(class_weights: Sequence[float], task: Task) -> list[float]:
    weights = list(class_weights)
    numbers = all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights)
    if not numbers or not any(weights):
        raise ConfigError(
            f"class_weights is {weights!r}: expected a number of 0 or more a class, and not all 0"
        )
    if len(weights) == 1 and task == "multilabel":
        raise ConfigError(
            "class_weights has one value: with one class there is nothing to weigh it against; "
            "leave it out"
        )
    return [float(w) for w in weights]


# By option: what must hold, and what was expected.
_SHARE = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bce_weight": _SHARE,
    "ce_weight": _SHARE,
    "focal_weight": _SHARE,
    "cldice_weight": _SHARE,
    "boundary_weight": _SHARE,
    "gamma": (lambda v: _is_number(v) and 0 <= v <= 10, "a number from 0 to 10"),
    "iterations": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= 100,
        "a whole number from 1 to 100",
    ),
}


def _check_options(name: str, options: dict[str, Any]) -> None:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in accepted:
            raise ConfigError(f"loss {name} has no option {option}; it takes {', '.join(accepted)}")
        holds, expected = _RULES[option]
        if not holds(value):
            raise ConfigError(f"{option} of loss {name} is {value!r}: expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
