"""``linear``: the floor that every other head has to beat.

Shape legend: B batch, H height, W width, K planes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sam3cache.heads.head import Head, LevelShapes
from sam3cache.records import Batch


class Linear(Head):
    """A 1×1 convolution on ``fpn_72``; it sees neither neighbours nor angles.

    Args:
        level_shapes: shapes of the store's levels.
        num_classes: K, mask planes.
    """

    needs: tuple[str, ...] = ("fpn_72",)
    # A layer alone cannot blow up, and learns next to nothing at the rate of deeper heads.
    learning_rate: ClassVar[float] = 1e-2

    def __init__(self, level_shapes: LevelShapes, *, num_classes: int = 1) -> None:
        super().__init__()
        self.segmentation = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K, H, W) at the stride of ``fpn_72``."""
        logits_BKHW: Tensor = self.segmentation(self.feature(batch, "fpn_72"))
        return logits_BKHW.float()
