"""What every head is.

Shape legend: B batch, C channels, H height, W width, K mask planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sam3cache.records import Batch

LevelShapes = Mapping[str, tuple[int, int, int]]
"""By level name: (C, H, W) of one sample's features."""


class Head(nn.Module):
    """Base of heads: features and view angles in, mask logits out.

    A head is built as ``Class(level_shapes, num_classes=K, **options)``, options being plain JSON
    values, so that a checkpoint can rebuild it. Deriving from this class is a convenience: any
    ``nn.Module`` with ``needs`` and this constructor and ``forward`` is a head.

    Attributes:
        needs: levels read from the store, in the order of use.
        learning_rate: what it is trained with unless told otherwise.
    """

    needs: tuple[str, ...] = ()
    learning_rate: ClassVar[float] = 1e-4

    @classmethod
    def levels_read(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the levels that a head built with some options reads: mostly ``needs``."""
        return cls.needs

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K, H, W) over the padded square, at any stride."""
        raise NotImplementedError

    @staticmethod
    def feature(batch: Batch, level: str) -> Tensor:
        """Return a level's features (B, C, H, W) in the type that the layers compute in.

        Features rest in float16, in which a CPU convolves slowly or not at all. Under autocast
        they become its type, else float32.
        """
        feature_BCHW = batch.levels[level]
        device_type = feature_BCHW.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return feature_BCHW.to(torch.get_autocast_dtype(device_type) if autocast else torch.float32)

    def describe(self) -> dict[str, int]:
        """Return the number of trainable parameters by part, and their ``total``."""
        return count_parameters(self)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters of each direct child, and their ``total``."""

    def count(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters() if p.requires_grad)

    return {name: count(part) for name, part in module.named_children()} | {"total": count(module)}
