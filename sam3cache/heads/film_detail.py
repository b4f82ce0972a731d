"""``film-detail``, the default: frozen features say what and where, a stem on the picture how fine.

Every neck level of SAM 3 is computed from tokens of 14 x 14 pixels, and thin vessels are finer than
that. So a small trainable stem reads the picture itself at stride 4, and the features come to it
as a help that it may take or leave: normalised, and through convolutions that begin as zeros
(Zhang et al. 2023, ControlNet, §3.1), so that a new head is one that ignores the features.

Shape legend: B batch, C channels, D embedding, H height, W width, K mask planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam3cache.heads.head import Head, LevelShapes
from sam3cache.heads.view import FiLM, ViewEncoder
from sam3cache.records import Batch

CELLS = 7
"""Cells of 2 x 2 pixels along a side of a token's 14 x 14."""

FIRST_LOGIT = -2.0
"""Masks are a small part of a picture: a new head marks little of it."""


class FilmDetail(Head):
    """Features of ``fpn_72`` modulated by the view, fused with a stem on ``image_1008``.

    About 4.5 million parameters and 13 GFLOP forward an image by default; logits at stride 4.

    Args:
        level_shapes: shapes of the store's levels.
        num_classes: K, mask planes.
        embedding_dim: D, length of the view embedding.
        width: channels of the stem at stride 4, a multiple of 8; twice as many at stride 8.
        context_width: channels of the features at stride 14, a multiple of 8; two and four times
            as many at strides 28 and 56.
        stride_px: of the logits and the stem's finest layer, 4 or 8; 8 takes two thirds of the
            time and loses thin vessels.
        use_features: False leaves the frozen features out, to learn what they are worth.
        use_image: False leaves the picture out, to learn what the features are worth alone.
    """

    needs: tuple[str, ...] = ("fpn_72", "image_1008")
    learning_rate: ClassVar[float] = 2e-3

    def __init__(
        self,
        level_shapes: LevelShapes,
        *,
        num_classes: int = 1,
        embedding_dim: int = 256,
        width: int = 32,
        context_width: int = 96,
        stride_px: int = 4,
        use_features: bool = True,
        use_image: bool = True,
    ) -> None:
        super().__init__()
        # Not only in (4, 8): 4.0 is, and no stride.
        if not (isinstance(stride_px, int) and stride_px in (4, 8)):
            raise ValueError(f"stride_px is {stride_px!r}: expected 4 or 8")
        for name, flag in (("use_features", use_features), ("use_image", use_image)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}: expected true or false")
        if not (use_features or use_image):
            raise ValueError("use_features and use_image are both false: expected one of them true")
        for name, value in (("width", width), ("context_width", context_width)):
            if not isinstance(value, int) or value < 8 or value % 8:
                raise ValueError(f"{name} is {value!r}: expected a multiple of 8, at least 8")
        if not isinstance(embedding_dim, int) or embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim!r}: expected at least 1")
        self.needs = self.levels_read({"use_features": use_features, "use_image": use_image})
        self.view_encoder = ViewEncoder(embedding_dim)
        self.stem = Stem(level_shapes["image_1008"][0], width, stride_px) if use_image else None
        num_features = level_shapes["fpn_72"][0] if use_features else 0
        self.context = Context(num_features, context_width, embedding_dim) if use_features else None
        self.segmentation: nn.Module = (
            Fusion(
                width,
                context_width if use_features else None,
                num_features,
                embedding_dim,
                stride_px,
                num_classes,
            )
            if use_image
            else Draft(context_width, num_features, stride_px, num_classes)
        )

    @classmethod
    def levels_read(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what is left without the features, or without the picture."""
        left_out = {
            level
            for level, option in (("fpn_72", "use_features"), ("image_1008", "use_image"))
            if options.get(option) is False
        }
        return tuple(level for level in cls.needs if level not in left_out)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K, H, W) at stride ``stride_px``."""
        embedding_BD = self.view_encoder(batch.angles_B2)
        context = None
        if self.context is not None:
            context = self.context(batch.levels["fpn_72"], embedding_BD)
        logits_BKHW: Tensor
        if self.stem is None:
            logits_BKHW = self.segmentation(context)
        else:
            detail = self.stem(self.feature(batch, "image_1008"))
            logits_BKHW = self.segmentation(detail, context, embedding_BD)
        return logits_BKHW.float()


class Stem(nn.Module):
    """Reads the picture: a few convolutions down to strides 4 and 8.

    Args:
        num_channels: 1 or 3.
        width: channels at stride 4.
        stride_px: of the finest layer returned.
    """

    def __init__(self, num_channels: int, width: int, stride_px: int) -> None:
        super().__init__()
        self.first = conv_norm_act(num_channels, width // 2, stride=2)
        self.quarter = nn.Sequential(conv_norm_act(width // 2, width, stride=2))
        if stride_px == 4:
            self.quarter.append(conv_norm_act(width, width))
        self.eighth = nn.Sequential(
            conv_norm_act(width, 2 * width, stride=2), conv_norm_act(2 * width, 2 * width)
        )

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return features at stride 4 and at stride 8 of pixels in [0, 255]."""
        pixels_BCHW = image_BCHW / 127.5 - 1
        quarter_BCHW = self.quarter(self.first(pixels_BCHW))
        return quarter_BCHW, self.eighth(quarter_BCHW)


class Context(nn.Module):
    """Reads the frozen features: normalised, modulated by the view, over strides 14, 28 and 56.

    Most parameters lie at the coarse strides, where they cost little: a vessel is told from a
    catheter or a rib by its course, not by its edge.

    Args:
        num_channels: of the features.
        width: channels at stride 14.
        embedding_dim: D, length of the view embedding.
    """

    def __init__(self, num_channels: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.film = FiLM(embedding_dim, num_channels)
        self.enter = nn.Conv2d(num_channels, width, 1)
        self.fine = conv_norm_act(width, width)
        self.middle = nn.Sequential(
            conv_norm_act(width, 2 * width, stride=2), conv_norm_act(2 * width, 2 * width)
        )
        self.coarse = nn.Sequential(
            conv_norm_act(2 * width, 4 * width, stride=2), conv_norm_act(4 * width, 4 * width)
        )
        self.coarse_to_middle = nn.Conv2d(4 * width, 2 * width, 1)
        self.middle_out = conv_norm_act(2 * width, 2 * width)
        self.middle_to_fine = nn.Conv2d(2 * width, width, 1)
        self.fine_out = conv_norm_act(width, width)

    def forward(self, feature_BCHW: Tensor, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, C, H, W), and the same in context (B, width, H, W)."""
        token_BCHW = self.film(channel_norm(feature_BCHW), embedding_BD)
        fine = self.fine(self.enter(token_BCHW))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.middle_out(middle + resize(self.coarse_to_middle(coarse), middle))
        return token_BCHW, self.fine_out(fine + resize(self.middle_to_fine(middle), fine))


class Fusion(nn.Module):
    """Brings picture and features together at stride 8, then at stride 4, and draws the masks.

    The features by themselves make a draft of the logits: each token for its own 14 x 14 pixels,
    in cells of 2 x 2 (Shi et al. 2016, sub-pixel convolution), and what its surroundings say of
    it. The stem sees that draft and adds what it lacks.

    Args:
        width: of the stem.
        context_width: channels of the features in context; None without features.
        num_features: channels of the features before that.
        embedding_dim: D, length of the view embedding.
        stride_px: of the logits.
        num_classes: K.
    """

    def __init__(
        self,
        width: int,
        context_width: int | None,
        num_features: int,
        embedding_dim: int,
        stride_px: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stride_px = stride_px
        self.film = FiLM(embedding_dim, 2 * width)
        self.eighth = conv_norm_act(2 * width, 2 * width)
        last = width if stride_px == 4 else 2 * width
        if stride_px == 4:
            self.eighth_to_quarter = nn.Conv2d(2 * width, width, 1)
            self.quarter = nn.Sequential(conv_norm_act(width, width), conv_norm_act(width, width))
        if context_width is not None:
            self.context_to_eighth = zeros(nn.Conv2d(context_width, 2 * width, 1))
            self.token_logits = zeros(nn.Conv2d(num_features, num_classes * CELLS**2, 1))
            self.context_logits = zeros(nn.Conv2d(context_width, num_classes, 1))
            self.draft_to_last = nn.Conv2d(num_classes, last, 1)
        self.logits = nn.Conv2d(last, num_classes, 1)
        nn.init.constant_(self.logits.bias, FIRST_LOGIT)  # type: ignore[arg-type]

    def forward(
        self,
        detail: tuple[Tensor, Tensor],
        context: tuple[Tensor, Tensor] | None,
        embedding_BD: Tensor,
    ) -> Tensor:
        """Return logits (B, K, H, W) at stride ``stride_px``."""
        quarter, eighth = detail
        if context is not None:
            eighth = eighth + resize(self.context_to_eighth(context[1]), eighth)
        fused = self.eighth(self.film(eighth, embedding_BD))
        if self.stride_px == 4:
            fused = quarter + resize(self.eighth_to_quarter(fused), quarter)
        draft_BKHW: Tensor | float = 0.0
        if context is not None:
            token_BCHW, context_BCHW = context
            cells = F.pixel_shuffle(self.token_logits(token_BCHW), CELLS)
            draft_BKHW = F.avg_pool2d(cells, self.stride_px // 2)
            draft_BKHW = draft_BKHW + resize(self.context_logits(context_BCHW), draft_BKHW)
            fused = fused + self.draft_to_last(draft_BKHW)
        if self.stride_px == 4:
            fused = self.quarter(fused)
        logits_BKHW: Tensor = self.logits(fused) + draft_BKHW
        return logits_BKHW


class Draft(nn.Module):
    """Draws the masks from the features alone, in cells of 2 x 2 pixels.

    What ``Fusion`` only drafts has to be the mask here: so the surroundings, too, say something of
    each cell by itself.

    Args:
        context_width: channels of the features in context.
        num_features: channels of the features before that.
        stride_px: of the logits.
        num_classes: K.
    """

    def __init__(
        self, context_width: int, num_features: int, stride_px: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stride_px = stride_px
        self.token_logits = nn.Conv2d(num_features, num_classes * CELLS**2, 1, bias=False)
        self.context_logits = nn.Conv2d(context_width, num_classes * CELLS**2, 1)
        nn.init.constant_(self.context_logits.bias, FIRST_LOGIT)  # type: ignore[arg-type]

    def forward(self, context: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits (B, K, H, W) at stride ``stride_px``; the view is in the context."""
        token_BCHW, context_BCHW = context
        cells = self.token_logits(token_BCHW) + self.context_logits(context_BCHW)
        return F.avg_pool2d(F.pixel_shuffle(cells, CELLS), self.stride_px // 2)


def channel_norm(feature_BCHW: Tensor) -> Tensor:
    """Bring each position's channels to mean 0 and variance 1, whatever a backbone's scale is.

    In float32 whatever the rest computes in: a variance overflows float16 from a deviation of 256
    on, and bfloat16 would keep little of a feature beside a large mean.
    """
    with torch.autocast(feature_BCHW.device.type, enabled=False):
        feature_BCHW = feature_BCHW.float()
        centred_BCHW = feature_BCHW - feature_BCHW.mean(dim=1, keepdim=True)
        variance_B1HW = centred_BCHW.square().mean(dim=1, keepdim=True)
        return centred_BCHW * torch.rsqrt(variance_B1HW + 1e-12)


def conv_norm_act(num_in: int, num_out: int, *, stride: int = 1) -> nn.Module:
    """Return a 3 x 3 convolution, normalised by groups of channels, and an activation.

    Not by the batch: what a picture gives must not depend on those beside it.
    """
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(max(1, num_out // 8), num_out),
        nn.SiLU(inplace=True),
    )


def zeros(conv: nn.Conv2d) -> nn.Conv2d:
    """Let a convolution begin as one that returns zeros."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Bring features to another's grid, bilinearly."""
    return F.interpolate(x_BCHW, like_BCHW.shape[-2:], mode="bilinear", align_corners=False)
