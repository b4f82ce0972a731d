"""``film-conv``: one level modulated by the view, then three convolutions.

Shape legend: B batch, C and O channels in and out, D embedding, H height, W width, K planes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam3cache.heads.head import Head, LevelShapes
from sam3cache.heads.view import FiLM, ViewEncoder, modulated
from sam3cache.records import Batch


class FilmConv(Head):
    """FiLM of level ``fpn_72`` by the view embedding, then convolutions 256 → 128 → 64 → K.

    The logits keep the level's stride of 14 px; whoever compares or shows them upsamples them
    bilinearly.

    Args:
        level_shapes: shapes of the store's levels.
        num_classes: K, mask planes.
        embedding_dim: D, length of the view embedding.
        widths: channels after the first and the second convolution.
    """

    needs: tuple[str, ...] = ("fpn_72",)

    def __init__(
        self,
        level_shapes: LevelShapes,
        *,
        num_classes: int = 1,
        embedding_dim: int = 256,
        widths: tuple[int, int] = (128, 64),
    ) -> None:
        super().__init__()
        num_channels = level_shapes["fpn_72"][0]
        self.view_encoder = ViewEncoder(embedding_dim)
        self.film = FiLM(embedding_dim, num_channels)
        self.segmentation = ModulatedConvs(
            nn.Conv2d(num_channels, widths[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[0], widths[1], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(widths[1], num_classes, 1),
        )

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K, H, W) at the stride of ``fpn_72``."""
        feature_BCHW = self.feature(batch, "fpn_72")
        embedding_BD = self.view_encoder(batch.angles_B2)
        scale_BC, shift_BC = self.film.coefficients(embedding_BD)
        logits_BKHW: Tensor = self.segmentation(feature_BCHW, scale_BC, shift_BC)
        return logits_BKHW.float()


class ModulatedConvs(nn.Sequential):
    """Convolutions of features that are modulated first: ``scale * feature + shift``."""

    def forward(  # type: ignore[override]
        self, feature_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor
    ) -> Tensor:
        """Return what the last layer makes of features (B, C, H, W)."""
        first, *rest = self
        assert isinstance(first, nn.Conv2d)
        if feature_BCHW.device.type == "cpu":
            hidden_BOHW = modulated_conv(first, feature_BCHW, scale_BC, shift_BC)
        else:
            hidden_BOHW = first(modulated(feature_BCHW, scale_BC, shift_BC))
        for layer in rest:
            hidden_BOHW = layer(hidden_BOHW)
        return hidden_BOHW


def modulated_conv(
    conv: nn.Conv2d, feature_BCHW: Tensor, scale_BC: Tensor, shift_BC: Tensor
) -> Tensor:
    """Return ``conv(scale * feature + shift)`` with the modulation moved into the weights.

    The same sum in another order: each sample gets its own kernel, scaled by input channel, and
    the shift becomes the weights of one more input channel of ones (so that it stops at the zero
    padding, as it must). As cached features need no gradient, the backward pass then skips the
    convolution's input gradient, a third of its work. On a CPU a training step takes two thirds
    of the time; on a GPU grouped convolutions are slow.

    Args:
        conv: same-size convolution C → O without groups.
        feature_BCHW: features.
        scale_BC: factor by sample and channel.
        shift_BC: summand by sample and channel.

    Returns:
        Features (B, O, H, W).
    """
    num_samples, _, height, width = feature_BCHW.shape
    weight_BOCkk = conv.weight * scale_BC[:, None, :, None, None]
    shift_BO1kk = torch.einsum("ocij,bc->boij", conv.weight, shift_BC)[:, :, None]
    weight_BOCkk = torch.cat((weight_BOCkk, shift_BO1kk.to(weight_BOCkk.dtype)), dim=2)
    ones_B1HW = feature_BCHW.new_ones(num_samples, 1, height, width)
    feature_1xHW = torch.cat((feature_BCHW, ones_B1HW), dim=1).flatten(0, 1)[None]
    out_1xHW = F.conv2d(
        feature_1xHW, weight_BOCkk.flatten(0, 1), padding=conv.padding, groups=num_samples
    )
    out_BOHW = out_1xHW.view(num_samples, conv.out_channels, height, width)
    return out_BOHW if conv.bias is None else out_BOHW + conv.bias[:, None, None]
