"""The loss is MONAI's Dice and PyTorch's cross-entropy on upsampled logits, gradient included."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sam3cache.training import dice_bce_loss


def random_case(
    num_samples: int = 3, num_planes: int = 2, side: int = 9, size_px: int = 31
) -> tuple[Tensor, Tensor]:
    """Logits and a target, of doubles for exactness."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_samples, num_planes, side, side, generator=generator).double()
    shape = (num_samples, num_planes, size_px, size_px)
    target = (torch.rand(shape, generator=generator) < 0.2).to(torch.uint8)
    return logits.requires_grad_(), target


def upsampled(logits: Tensor, size_px: int) -> Tensor:
    return F.interpolate(logits, (size_px, size_px), mode="bilinear", align_corners=False)


def reference(logits: Tensor, target: Tensor, bce_weight: float) -> Tensor:
    """The loss as MONAI and PyTorch have it; every pixel counts."""
    from monai.losses import DiceLoss

    x, y = upsampled(logits, target.shape[-1]), target.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(x, y)
    return bce_weight * bce + (1 - bce_weight) * DiceLoss(sigmoid=True)(x, y)


@pytest.mark.parametrize("bce_weight", [0.0, 0.3, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_monai_and_pytorch(bce_weight: float) -> None:
    logits, target = random_case()
    ours, theirs = dice_bce_loss(logits, target, bce_weight), reference(logits, target, bce_weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    )


def test_the_gradient_follows_what_comes_after_the_loss() -> None:
    logits, target = random_case()
    (once,) = torch.autograd.grad(dice_bce_loss(logits, target), logits)
    (thrice,) = torch.autograd.grad(3 * dice_bce_loss(logits, target), logits)
    torch.testing.assert_close(thrice, 3 * once)


def test_pixels_that_do_not_count_are_as_if_cut_off() -> None:
    logits, target = random_case(size_px=36)
    target[..., 20:] = 255
    ours = dice_bce_loss(logits, target)
    x, y = upsampled(logits, 36)[..., :20], target[..., :20].double()
    from monai.losses import DiceLoss

    bce, dice = F.binary_cross_entropy_with_logits(x, y), DiceLoss(sigmoid=True)(x, y)
    torch.testing.assert_close(ours, 0.5 * bce + 0.5 * dice)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(0.5 * bce + 0.5 * dice, logits)
    )


def test_an_image_where_nothing_counts_gives_no_gradient() -> None:
    logits, target = random_case(num_samples=1)
    (gradient,) = torch.autograd.grad(dice_bce_loss(logits, torch.full_like(target, 255)), logits)
    assert not gradient.any()


def test_padding_does_not_dilute_an_image_among_others() -> None:
    """Every image weighs the same, however much of its square is padding."""
    logits, target = random_case(num_samples=2)
    target[0, ..., 10:] = 255
    alone = [dice_bce_loss(logits[i : i + 1], target[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(dice_bce_loss(logits, target), sum(alone) / 2)


@pytest.mark.parametrize("size_px", [5, 9, 18])
def test_targets_may_be_smaller_than_as_large_as_or_larger_than_logits(size_px: int) -> None:
    logits, target = random_case(size_px=size_px)
    torch.testing.assert_close(dice_bce_loss(logits, target), reference(logits, target, 0.5))


def test_extreme_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[[[-200.0, 200.0], [200.0, -200.0]]]], requires_grad=True)
    target = torch.tensor([[[[1, 0], [1, 255]]]], dtype=torch.uint8)
    loss = dice_bce_loss(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_autocast_does_not_touch_the_loss() -> None:
    logits, target = random_case()
    logits = logits.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = dice_bce_loss(logits, target)
    assert torch.equal(under_autocast, dice_bce_loss(logits, target))
