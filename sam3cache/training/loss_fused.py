"""Dice and cross-entropy of upsampled logits, without keeping anything at full size.

Shape legend: B batch, K planes of logits (planes of a mask where those are compared one by one),
C classes, H height, W width of the logits, T side of the target grid.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sam3cache.records import IGNORE_LABEL

SMOOTHING = 1e-5
"""Added above and below in Dice, as MONAI's ``DiceLoss`` does by default."""

# Pixels compared at once: on a CPU one sample at 1008 px, which stays in its cache; on a GPU a
# whole batch of one plane.
_CHUNK_PIXELS = {"cpu": 1008**2, "cuda": 2**25}

LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From some images' logits and target to the sum of their losses and its gradient by the logits."""


def dice_bce_loss(
    logits_BKHW: Tensor,
    target_BKTT: Tensor,
    bce_weight: float = 0.5,
    class_weights_K: Tensor | None = None,
) -> Tensor:
    """Compare bilinearly upsampled logits with masks.

    ``bce_weight`` x binary cross-entropy + (1 - ``bce_weight``) x soft Dice loss, each over the
    pixels that count, an image and plane at a time, then averaged. Dice is
    1 - (2 Σpy + ε) / (Σp + Σy + ε), which is MONAI's ``DiceLoss(sigmoid=True)`` (Milletari et al.
    2016, without squares in the denominator).

    Loss and gradient are computed together, a few samples at a time, so that memory does not grow
    with the batch; the gradient is that of the formula, not an approximation.

    Args:
        logits_BKHW: float32 (or float64), over the padded square.
        target_BKTT: uint8, 1 = mask, 0 = not, 255 = does not count.
        bce_weight: in [0, 1].
        class_weights_K: of the planes in their average; only their ratios matter.

    Returns:
        The mean loss, a scalar of the logits' type.
    """

    def compute(logits_BKHW: Tensor, target_BKTT: Tensor) -> tuple[Tensor, Tensor]:
        return _dice_bce(logits_BKHW, target_BKTT, bce_weight, class_weights_K)

    return in_chunks(compute, logits_BKHW, target_BKTT)


def dice_ce_loss(
    logits_BKHW: Tensor,
    target_B1TT: Tensor,
    ce_weight: float = 0.5,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Compare bilinearly upsampled logits with class numbers, the first plane being "none".

    ``ce_weight`` x cross-entropy + (1 - ``ce_weight``) x soft Dice loss of softmax probabilities,
    each over the pixels that count, an image at a time, then averaged. Cross-entropy is PyTorch's,
    weights included; Dice is MONAI's ``DiceLoss(softmax=True, include_background=False)``, averaged
    over the classes that the image has: of one that it has not, Dice is 0 whatever the head says,
    and would but shrink what the others teach.

    Memory and gradient are as in ``dice_bce_loss``.

    Args:
        logits_BKHW: float32 (or float64), over the padded square; K = C + 1.
        target_B1TT: uint8, 0 = none, 1 to C = class, 255 = does not count.
        ce_weight: in [0, 1].
        class_weights_C: of the classes: of their pixels in cross-entropy, where "none" weighs 1,
            and, divided by their mean, of their Dice.

    Returns:
        The mean loss, a scalar of the logits' type.
    """

    def compute(logits_BKHW: Tensor, target_B1TT: Tensor) -> tuple[Tensor, Tensor]:
        return _dice_ce(logits_BKHW, target_B1TT, ce_weight, class_weights_C)

    return in_chunks(compute, logits_BKHW, target_B1TT)


def in_chunks(
    compute: LossAndGradient, logits_BKHW: Tensor, target_BMTT: Tensor, chunk: int | None = None
) -> Tensor:
    """Return the mean of a loss over images, of which some are computed at a time.

    Args:
        compute: the loss and its gradient.
        logits_BKHW: float32 or float64.
        target_BMTT: uint8.
        chunk: images at a time; None: as the grid's size suggests.
    """
    loss: Tensor = _InChunks.apply(logits_BKHW, target_BMTT, compute, chunk)
    return loss


class _InChunks(torch.autograd.Function):
    """A loss whose gradient is computed in the forward pass, while the pixels are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BKHW: Tensor,
        target_BMTT: Tensor,
        compute: LossAndGradient,
        chunk: int | None,
    ) -> Tensor:
        num_samples = len(target_BMTT)
        device_type = logits_BKHW.device.type
        pixels = logits_BKHW.shape[1] * target_BMTT.shape[-2] * target_BMTT.shape[-1]
        limit = _CHUNK_PIXELS.get(device_type, _CHUNK_PIXELS["cuda"])
        step = chunk or max(1, limit // pixels)
        gradient_BKHW = torch.empty_like(logits_BKHW)
        loss = logits_BKHW.new_zeros(())
        # Sums over a million pixels need float32, whatever the head computes in.
        with torch.autocast(device_type, enabled=False):
            for at in range(0, num_samples, step):
                part = slice(at, at + step)
                part_loss, gradient_BKHW[part] = compute(logits_BKHW[part], target_BMTT[part])
                loss += part_loss
        ctx.save_for_backward(gradient_BKHW.mul_(1 / num_samples))
        return loss / num_samples

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_BKHW,) = ctx.saved_tensors
        return gradient_BKHW * upstream, None, None, None


def _dice_bce(
    logits_BKHW: Tensor, target_BKTT: Tensor, bce_weight: float, class_weights_K: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows_TH, columns_TW = interpolation(logits_BKHW, target_BKTT.shape[-1])
    x_BKTT = rows_TH @ logits_BKHW @ columns_TW.T
    counted_BKTT = target_BKTT != IGNORE_LABEL
    y_BKTT = (target_BKTT == 1).to(x_BKTT.dtype)
    p_BKTT = x_BKTT.sigmoid().mul_(counted_BKTT)

    num_counted = _total(counted_BKTT).clamp(min=1)
    # Cross-entropy with logits is softplus(x) - x y.
    bce = _total(F.softplus(x_BKTT).mul_(counted_BKTT)) - _total(x_BKTT.mul_(y_BKTT))
    above = 2 * _total(p_BKTT * y_BKTT) + SMOOTHING
    below = _total(p_BKTT) + _total(y_BKTT) + SMOOTHING
    loss = bce_weight * bce / num_counted + (1 - bce_weight) * (1 - above / below)

    # d Dice loss / dp = (above - 2 y below) / below², dp/dx = p (1 - p), d BCE / dx = (p - y) / n;
    # all are 0 where p and y are, that is, where pixels do not count.
    gradient_BKTT = (1 - p_BKTT).mul_(p_BKTT)
    gradient_BKTT.mul_(
        (y_BKTT * (-2 * (1 - bce_weight) / below)).add_((1 - bce_weight) * above / below**2)
    )
    gradient_BKTT.add_(p_BKTT.sub_(y_BKTT).mul_(bce_weight / num_counted))
    gradient_BKHW = rows_TH.T @ gradient_BKTT @ columns_TW
    share_K11 = plane_shares(logits_BKHW, class_weights_K)[:, None, None]
    return (loss * share_K11).sum(), gradient_BKHW.mul_(share_K11)


def _dice_ce(
    logits_BKHW: Tensor, target_B1TT: Tensor, ce_weight: float, class_weights_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_planes = logits_BKHW.shape[1]
    rows_TH, columns_TW = interpolation(logits_BKHW, target_B1TT.shape[-1])
    x_BKTT = rows_TH @ logits_BKHW @ columns_TW.T
    # p = softmax(x), and the logarithm of what it was divided by, for cross-entropy.
    normalizer_B1TT = x_BKTT.logsumexp(dim=1, keepdim=True)
    classes_K11 = torch.arange(num_planes, device=x_BKTT.device)[:, None, None]
    is_class_BKTT = target_B1TT == classes_K11
    true_x_B1TT = (x_BKTT * is_class_BKTT).sum(dim=1, keepdim=True)
    p_BKTT = x_BKTT.sub_(normalizer_B1TT).exp_()

    weights_K11 = pixel_weights(logits_BKHW, class_weights_C)[:, None, None]
    # 0 where pixels do not count: they are of no class.
    weight_B1TT = (is_class_BKTT * weights_K11).sum(dim=1, keepdim=True)
    weight_B111 = _total(weight_B1TT)
    weight_B111 = torch.where(weight_B111 > 0, weight_B111, 1)
    ce_B111 = _total((normalizer_B1TT - true_x_B1TT) * weight_B1TT) / weight_B111

    size_BK11 = _total(is_class_BKTT).to(p_BKTT.dtype)
    share_BK11 = dice_shares(size_BK11, class_weights_C)
    counted_B1TT = target_B1TT != IGNORE_LABEL
    above = 2 * _total(p_BKTT * is_class_BKTT) + SMOOTHING
    below = _total(p_BKTT * counted_B1TT) + size_BK11 + SMOOTHING
    dice_B = (share_BK11 * (1 - above / below)).sum(dim=(1, 2, 3))
    loss = ce_weight * ce_B111.sum() + (1 - ce_weight) * dice_B.sum()

    # With g = d Dice loss / dp = (above - 2 y below) / below², d Dice loss / dx_k is
    # p_k (g_k - Σ p g); d CE / dx = w (p - y) / Σw.
    share_BK11 = (1 - ce_weight) * share_BK11
    part_BKTT = is_class_BKTT * (-2 * share_BK11 / below)
    part_BKTT.add_(share_BK11 * above / below**2).mul_(p_BKTT)
    part_BKTT.sub_(p_BKTT * part_BKTT.sum(dim=1, keepdim=True)).mul_(counted_B1TT)
    part_BKTT.add_(
        p_BKTT.sub_(is_class_BKTT.to(p_BKTT.dtype)).mul_(ce_weight * weight_B1TT / weight_B111)
    )
    return loss, rows_TH.T @ part_BKTT @ columns_TW


def plane_shares(logits_BKHW: Tensor, class_weights_K: Tensor | None) -> Tensor:
    """Return how much each plane's own loss counts: (K,), of sum 1."""
    num_planes = logits_BKHW.shape[1]
    if class_weights_K is None:
        return logits_BKHW.new_full((num_planes,), 1 / num_planes)
    return class_weights_K / class_weights_K.sum()


def pixel_weights(logits_BKHW: Tensor, class_weights_C: Tensor | None) -> Tensor:
    """Return how much a pixel counts by its class number: (C + 1,), 1 for "none"."""
    if class_weights_C is None:
        return logits_BKHW.new_ones(logits_BKHW.shape[1])
    return F.pad(class_weights_C, (1, 0), value=1.0)


def dice_shares(size_BK11: Tensor, class_weights_C: Tensor | None) -> Tensor:
    """Return how much each class's own loss counts in an image: (B, K, 1, 1), 0 for "none".

    Args:
        size_BK11: pixels of the image that are of each class; classes without any count 0.
        class_weights_C: of the classes, divided by their mean.
    """
    present_BK11 = (size_BK11 > 0).to(size_BK11.dtype)
    present_BK11[:, 0] = 0
    share_BK11 = present_BK11 / present_BK11.sum(dim=1, keepdim=True).clamp(min=1)
    if class_weights_C is not None:
        relative_C = class_weights_C / class_weights_C.mean()
        share_BK11 = share_BK11 * F.pad(relative_C, (1, 0))[:, None, None]
    return share_BK11


def _total(x_BKTT: Tensor) -> Tensor:
    return x_BKTT.sum(dim=(2, 3), keepdim=True)


def interpolation(logits_BKHW: Tensor, size_px: int) -> tuple[Tensor, Tensor]:
    """Return matrices (T, H) and (T, W): ``rows @ logits @ columns.T`` are the logits upsampled."""
    height, width = logits_BKHW.shape[-2:]
    like = logits_BKHW.dtype, logits_BKHW.device
    return _interpolation_matrix(height, size_px, *like), _interpolation_matrix(
        width, size_px, *like
    )


@lru_cache(maxsize=8)
def _interpolation_matrix(
    num_cells: int, size_px: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return bilinear interpolation along one axis as a matrix (T, cells).

    Two products with it are ``F.interpolate(align_corners=False)``, and two with its transpose
    are the gradient: twenty times faster than PyTorch's on a CPU, and on a GPU the same in every
    run, which PyTorch's is not.
    """
    eye = torch.eye(num_cells, dtype=dtype, device=device)[None, None]
    return F.interpolate(eye, (size_px, num_cells), mode="bilinear", align_corners=False)[0, 0]
