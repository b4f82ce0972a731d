"""What a head is asked: which pixels (planes of yes and no), or which class a pixel is of.

Shape legend: K planes of logits, M planes of a stored mask, C classes, H height, W width.

- "multilabel": a plane of 0 and 1 a class, each decided by itself; one class is a binary mask.
  M = C, and a head gives K = C logits.
- "multiclass": one plane of class numbers, 0 for none of them and 1 to C for the classes in order.
  M = 1, and a head gives K = C + 1 logits, the first for "none".

255 in a mask does not count, in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sam3cache.records import IGNORE_LABEL

if TYPE_CHECKING:
    from torch import Tensor

Task = Literal["multilabel", "multiclass"]


def num_outputs(task: Task, num_classes: int) -> int:
    """Return K, the planes of logits that a head gives for some classes."""
    return num_classes + (task == "multiclass")


def default_loss(task: Task) -> str:
    """Return the name of the loss that a task is learned with unless told otherwise."""
    return "dice-bce" if task == "multilabel" else "dice-ce"


def class_probabilities(logits_KHW: Tensor, task: Task) -> Tensor:
    """Return what a head gives every class, in [0, 1]: (C, H, W), "none" left out.

    Args:
        logits_KHW: float; further dimensions may stand before K.
        task: what was asked.
    """
    if task == "multilabel":
        return logits_KHW.sigmoid()
    return logits_KHW.softmax(dim=-3)[..., 1:, :, :]


def decide(logits_KHW: Tensor, task: Task, threshold: float = 0.5) -> Tensor:
    """Return which pixels a head says are of each class: bool (C, H, W).

    Args:
        logits_KHW: float; further dimensions may stand before K.
        task: what was asked.
        threshold: probability from which a pixel counts, of "multilabel"; in "multiclass" each
            pixel is of the class with the highest logit, or of none.
    """
    if task == "multilabel":
        return logits_KHW.sigmoid() >= threshold
    classes = range(1, logits_KHW.shape[-3])
    chosen_1HW = logits_KHW.argmax(dim=-3, keepdim=True)
    return chosen_1HW == logits_KHW.new_tensor(classes).view(-1, 1, 1)


def mask_planes(mask_MHW: Tensor, task: Task, num_classes: int) -> Tensor:
    """Return a stored mask as a plane of 0, 1 and 255 a class: uint8 (C, H, W).

    Args:
        mask_MHW: uint8, as the store has it; further dimensions may stand before M.
        task: what the label set is of.
        num_classes: C.
    """
    if task == "multilabel":
        return mask_MHW
    classes = mask_MHW.new_tensor(range(1, num_classes + 1)).view(-1, 1, 1)
    planes_CHW = (mask_MHW == classes).to(mask_MHW.dtype)
    return planes_CHW.masked_fill(mask_MHW == IGNORE_LABEL, IGNORE_LABEL)
