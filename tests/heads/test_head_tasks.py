"""Every head learns many labels and many classes, where its features can tell them."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sam3cache.heads import HEADS, Head, build_head
from sam3cache.records import Batch
from sam3cache.tasks import Task, decide, mask_planes, num_outputs
from sam3cache.training import build_loss, default_loss

SIZE_PX = 84
SHAPES = {"fpn_72": (8, 6, 6), "fpn_144": (8, 12, 12), "image_1008": (1, SIZE_PX, SIZE_PX)}
SMALL = {"embedding_dim": 16, "width": 8, "context_width": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "film-detail": SMALL,
    "film-pyramid": SMALL,
    "film-conv": {"embedding_dim": 16, "widths": [16, 16]},
    "linear": {},
}
NUM_CLASSES = 3


@lru_cache
def case(num_samples: int, seed: int, *, by_view: bool = False) -> tuple[Batch, Tensor]:
    """Samples with a square of each class; (B, 1, T, T) class numbers.

    Channel c of the features shows class c, unless ``by_view``: then all are in channel 0, and the
    sign of the primary angle says whether a square is of class 1 or of class 2.
    """
    generator = torch.Generator().manual_seed(seed)
    angles_B2 = torch.rand(num_samples, 2, generator=generator) * 90 - 45
    numbers_B1TT = torch.zeros(num_samples, 1, SIZE_PX, SIZE_PX, dtype=torch.uint8)
    for i in range(num_samples):
        corners = torch.randperm(9, generator=generator)[:NUM_CLASSES].tolist()
        for c, corner in enumerate(corners):
            top, left = 28 * (corner // 3), 28 * (corner % 3)
            number = (1 if angles_B2[i, 0] > 0 else 2) if by_view else c + 1
            numbers_B1TT[i, 0, top : top + 28, left : left + 28] = number
    shown = numbers_B1TT > 0 if by_view else numbers_B1TT == torch.arange(1, 4)[:, None, None]
    levels: dict[str, Tensor] = {}
    for level in ("fpn_72", "fpn_144"):
        num_channels, side, _ = SHAPES[level]
        feature = torch.randn(num_samples, num_channels, side, side, generator=generator)
        hint = F.avg_pool2d(shown.float(), SIZE_PX // side)
        feature[:, : hint.shape[1]] += 4 * hint
        levels[level] = feature.half()
    noise = torch.randint(20, numbers_B1TT.shape, generator=generator)
    levels["image_1008"] = (120 + noise + 80 * (numbers_B1TT > 0)).to(torch.uint8)
    return Batch(levels, angles_B2, torch.full((num_samples, 2), 1008)), numbers_B1TT


def target_of(numbers_B1TT: Tensor, task: Task, num_classes: int) -> Tensor:
    if task == "multiclass":
        return numbers_B1TT
    return mask_planes(numbers_B1TT, "multiclass", num_classes)


def dice_by_class(name: str, task: Task, num_classes: int, *, by_view: bool = False) -> list[float]:
    """Train on a few batches; return Dice of samples never seen."""
    torch.manual_seed(0)
    num_planes = num_outputs(task, num_classes)
    head: Head = build_head(name, SHAPES, OPTIONS[name], num_classes=num_planes)
    rate, num_steps = (5e-2, 100) if name == "linear" else (5e-3, 45)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    loss = build_loss(default_loss(task), task)
    for step in range(num_steps):
        batch, numbers = case(8, step % 6, by_view=by_view)
        optimizer.zero_grad()
        loss(head(batch), target_of(numbers, task, num_classes)).backward()
        optimizer.step()
    batch, numbers = case(24, 1000, by_view=by_view)
    with torch.no_grad():
        logits = F.interpolate(head.eval()(batch), (SIZE_PX, SIZE_PX), mode="bilinear")
    said = decide(logits, task)
    true = mask_planes(numbers, "multiclass", num_classes) == 1
    both, sizes = (said & true).sum((0, 2, 3)), (said.sum((0, 2, 3)) + true.sum((0, 2, 3)))
    return [float(2 * b / n.clamp(min=1)) for b, n in zip(both, sizes, strict=True)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_a_head_learns_every_class(name: str, task: Task) -> None:
    assert min(dice_by_class(name, task, NUM_CLASSES)) > 0.7


@pytest.mark.parametrize("name", [name for name in HEADS if name != "linear"])
def test_a_head_learns_a_class_that_only_the_view_decides(name: str) -> None:
    assert min(dice_by_class(name, "multiclass", 2, by_view=True)) > 0.7


def test_linear_cannot_tell_classes_by_the_view() -> None:
    assert min(dice_by_class("linear", "multiclass", 2, by_view=True)) < 0.7
