"""Losses of MONAI on upsampled logits: focal, clDice and boundary.

MONAI takes seconds to import and comes as an extra: it is imported when one of these is used.
Each image is cut to the part that counts before MONAI sees it, so that padding is as if it were
not there; pixels of label 255 within are left out as each loss says.

Shape legend: B batch, K planes of logits, M planes of a stored mask, C classes, P planes compared
one by one, H height, W width, T side of the target grid, h and w of the part that counts.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sam3cache.errors import ConfigError
from sam3cache.records import IGNORE_LABEL
from sam3cache.tasks import Task, class_probabilities, mask_planes
from sam3cache.training.loss_fused import (
    dice_shares,
    in_chunks,
    interpolation,
    pixel_weights,
    plane_shares,
)

# From an image's logits (1, K, h, w) and target (1, M, h, w), cut, to its loss.
_OfImage = Callable[[Tensor, Tensor], Tensor]


def require_monai(loss: str) -> None:
    """Refuse a loss whose library is not there.

    Raises:
        ConfigError: MONAI is missing, or too old.
    """
    try:
        version = importlib.metadata.version("monai")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    # Before 1.6, clDice leaves the first plane out, and there is no boundary loss.
    if numbers is None or tuple(map(int, numbers.groups())) < (1, 6):
        raise ConfigError(
            f"loss {loss} needs monai 1.6 or newer, installed is {version}; run "
            '`python -m pip install "sam3cache[losses]"`, or take another --loss'
        )


def focal_loss(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    class_weights_C: Tensor | None,
    gamma: float,
) -> Tensor:
    """Return MONAI's ``FocalLoss`` (Lin et al. 2017, eq. 4): the mean over pixels that count.

    Of "multilabel" by plane, with a sigmoid; of "multiclass" with a softmax, a pixel weighing what
    its class does, and the sum divided by the sum of the weights.
    """
    from monai.losses import FocalLoss

    softmax = task == "multiclass"
    focal = FocalLoss(gamma=gamma, use_softmax=softmax, reduction="none")

    def of_image(logits_1Khw: Tensor, target_1Mhw: Tensor) -> Tensor:
        if softmax:
            numbers_1Khw = torch.arange(logits_1Khw.shape[1], device=logits_1Khw.device)
            y_1Khw = (target_1Mhw == numbers_1Khw[:, None, None]).to(logits_1Khw.dtype)
            weights_K11 = pixel_weights(logits_1Khw, class_weights_C)[:, None, None]
            total = (focal(logits_1Khw, y_1Khw) * weights_K11).sum()
            weight = (y_1Khw * weights_K11).sum()
            mean: Tensor = total / torch.where(weight > 0, weight, 1)
            return mean
        counted_1Khw = target_1Mhw != IGNORE_LABEL
        y_1Khw = (target_1Mhw == 1).to(logits_1Khw.dtype)
        total_1K = (focal(logits_1Khw, y_1Khw) * counted_1Khw).sum(dim=(2, 3))
        mean_1K = total_1K / counted_1Khw.sum(dim=(2, 3)).clamp(min=1)
        mean = (mean_1K * plane_shares(logits_1Khw, class_weights_C)).sum()
        return mean

    return _by_image(of_image, logits_BKHW, target_BMTT)


def cldice_loss(
    logits_BKHW: Tensor,
    target_BMTT: Tensor,
    task: Task,
    class_weights_C: Tensor | None,
    iterations: int,
) -> Tensor:
    """Return MONAI's ``SoftclDiceLoss`` (Shit et al. 2021, alg. 2) by class, then averaged.

    Pixels of label 255 are taken for background in both. A skeleton's iterations hold much memory,
    so that one class of one image is computed at a time.

    Args:
        logits_BKHW: see ``build_loss``.
        target_BMTT: see ``build_loss``.
        task: see ``build_loss``.
        class_weights_C: of the classes in their average.
        iterations: of the skeleton: at least the radius of the thickest vessel in pixels.
    """
    from monai.losses import SoftclDiceLoss

    cldice = SoftclDiceLoss(iter_=iterations)

    def of_planes(p_P1hw: Tensor, y_P1hw: Tensor) -> Tensor:
        loss: Tensor = cldice(p_P1hw, y_P1hw.to(p_P1hw.dtype))
        return loss

    def of_image(logits_1Khw: Tensor, target_1Mhw: Tensor) -> Tensor:
        p_Phw, y_Phw, counted_Phw, share_P = _planes(
            logits_1Khw, target_1Mhw, task, class_weights_C
        )
        p_P1hw = (p_Phw * counted_Phw)[:, None]
        losses = [
            share * in_chunks(_with_gradient(of_planes), p_P1hw[i : i + 1], y_Phw[i : i + 1, None])
            for i, share in enumerate(share_P.unbind())
        ]
        return sum(losses, logits_1Khw.sum() * 0)

    return _by_image(of_image, logits_BKHW, target_BMTT)


def boundary_loss(
    logits_BKHW: Tensor, target_BMTT: Tensor, task: Task, class_weights_C: Tensor | None
) -> Tensor:
    """Return the boundary loss (Kervadec et al. 2019, eq. 5) with MONAI's maps of distances.

    The mean, over the pixels that count, of probability x signed distance to the mask's boundary,
    in sides of the target grid; by class, then averaged. Distances are to the nearest pixel that is
    known to be mask, or known not to be: one of label 255 is neither. They are computed on the CPU.
    """
    from monai.losses import BoundaryLoss

    distance_map = BoundaryLoss().compute_distance_map
    size_px = target_BMTT.shape[-1]

    def of_image(logits_1Khw: Tensor, target_1Mhw: Tensor) -> Tensor:
        p_Phw, y_Phw, counted_Phw, share_P = _planes(
            logits_1Khw, target_1Mhw, task, class_weights_C
        )
        distance_Phw = distance_map(y_Phw[None].float())[0]
        if not counted_Phw.all():
            within_Phw = distance_map((y_Phw | ~counted_Phw)[None].float())[0]
            distance_Phw = torch.where(y_Phw, within_Phw, distance_Phw) * counted_Phw
        total_P = (p_Phw * (distance_Phw / size_px)).sum(dim=(1, 2))
        mean_P = total_P / counted_Phw.sum(dim=(1, 2)).clamp(min=1)
        loss: Tensor = (mean_P * share_P).sum()
        return loss

    return _by_image(of_image, logits_BKHW, target_BMTT)


def _planes(
    logits_1Khw: Tensor, target_1Mhw: Tensor, task: Task, class_weights_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an image's planes to compare: those of a mask, or of the classes that it has.

    Returns:
        Probabilities, masks (bool) and what counts (bool), each (P, h, w), and each plane's share
        of the average (P,).
    """
    p_Chw = class_probabilities(logits_1Khw, task)[0]
    target_Chw = mask_planes(target_1Mhw, task, len(p_Chw))[0]
    y_Chw, counted_Chw = target_Chw == 1, target_Chw != IGNORE_LABEL
    if task == "multilabel":
        return p_Chw, y_Chw, counted_Chw, plane_shares(logits_1Khw, class_weights_C)
    size_C = y_Chw.sum(dim=(1, 2)).to(p_Chw.dtype)
    # dice_shares wants "none" first, and gives it nothing.
    share_C = dice_shares(torch.cat((size_C[:1], size_C))[None, :, None, None], class_weights_C)
    share_C = share_C.flatten()[1:]
    has = size_C > 0
    return p_Chw[has], y_Chw[has], counted_Chw[has], share_C[has]


def _by_image(of_image: _OfImage, logits_BKHW: Tensor, target_BMTT: Tensor) -> Tensor:
    """Return the mean over images of a loss, each upsampled and cut to the part that counts."""

    def upsampled(logits_1KHW: Tensor, target_1MTT: Tensor) -> Tensor:
        counted_TT = (target_1MTT != IGNORE_LABEL).flatten(0, 1).any(dim=0)
        if not counted_TT.any():
            return logits_1KHW.sum() * 0
        rows, columns = _extent(counted_TT.any(dim=1)), _extent(counted_TT.any(dim=0))
        rows_TH, columns_TW = interpolation(logits_1KHW, target_1MTT.shape[-1])
        x_1Khw = rows_TH[rows] @ logits_1KHW @ columns_TW[columns].T
        return of_image(x_1Khw, target_1MTT[..., rows, columns])

    return in_chunks(_with_gradient(upsampled), logits_BKHW, target_BMTT, chunk=1)


def _extent(is_used: Tensor) -> slice:
    """Return the range from the first to the last True."""
    indices = is_used.nonzero()
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _with_gradient(loss: _OfImage) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return partial(_loss_and_gradient, loss)


def _loss_and_gradient(loss: _OfImage, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = loss(x, target)
        (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient
