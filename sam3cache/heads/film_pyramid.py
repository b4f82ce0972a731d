"""``film-pyramid``: several levels of the neck, from coarse to fine, with or without the picture.

For those who cache more than ``fpn_72``. Each finer level joins what the coarser ones made of the
picture so far (Lin et al. 2017, feature pyramid networks, §3), and where the picture itself is
read, the features begin as a help that changes nothing, as in ``film-detail``.

Shape legend: B batch, C channels, D embedding, H height, W width, K planes of logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sam3cache.errors import HeadError
from sam3cache.heads.film_detail import (
    FIRST_LOGIT,
    Context,
    Stem,
    channel_norm,
    conv_norm_act,
    resize,
    zeros,
)
from sam3cache.heads.head import Head, LevelShapes
from sam3cache.heads.view import FiLM, ViewEncoder
from sam3cache.records import Batch

LEVELS = ("fpn_72", "fpn_144", "fpn_288", "image_1008")
"""What it can read; the first always."""


class FilmPyramid(Head):
    """Features of ``fpn_72`` and finer levels modulated by the view, and a stem on the picture.

    About 4.5 million parameters; with all levels 18 GFLOP forward an image. Logits are on the grid
    of the finest of: ``fpn_144`` (stride 7), the stem (stride 4), ``fpn_288`` (stride 3.5).

    Args:
        level_shapes: shapes of the store's levels.
        num_classes: K, planes of logits.
        levels: those to read, as a list or as text with commas: ``fpn_72`` and at least one of
            ``fpn_144``, ``fpn_288`` and ``image_1008``. None: all of these that ``level_shapes``
            has.
        embedding_dim: D, length of the view embedding.
        width: channels at stride 4 and finer, a multiple of 8; twice as many at strides 7 and 8.
        context_width: channels at stride 14, a multiple of 8; see ``film-detail``.
    """

    # What it is proposed for; what a head reads depends on the levels that are there.
    needs: tuple[str, ...] = ("fpn_72", "fpn_144")
    learning_rate: ClassVar[float] = 2e-3

    def __init__(
        self,
        level_shapes: LevelShapes,
        *,
        num_classes: int = 1,
        levels: Sequence[str] | str | None = None,
        embedding_dim: int = 256,
        width: int = 32,
        context_width: int = 96,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("context_width", context_width)):
            if not isinstance(value, int) or value < 8 or value % 8:
                raise ValueError(f"{name} is {value!r}: expected a multiple of 8, at least 8")
        if not isinstance(embedding_dim, int) or embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim!r}: expected at least 1")
        if levels is None:
            self.needs = tuple(level for level in LEVELS if level in level_shapes)
            if len(self.needs) == 1:
                raise HeadError(
                    f"head film-pyramid needs one of {', '.join(LEVELS[1:])} beside fpn_72, none "
                    f"of which is among the store's levels ({', '.join(level_shapes)}); run "
                    f"`sam3cache extract` with --levels {','.join(level_shapes)},{LEVELS[1]}, or "
                    "take --head film-conv"
                )
        else:
            self.needs = self.levels_read({"levels": levels})
        chosen = isinstance(levels, str | list | tuple | None) and set(self.needs)
        if not chosen or "fpn_72" not in chosen or len(chosen) == 1 or chosen - {*LEVELS}:
            raise ValueError(
                f"levels is {levels!r}: expected fpn_72 and at least one of {', '.join(LEVELS[1:])}"
            )
        channels = {level: level_shapes[level][0] for level in self.needs}
        has_image = "image_1008" in self.needs

        self.view_encoder = ViewEncoder(embedding_dim)
        self.context = Context(channels["fpn_72"], context_width, embedding_dim)
        self.stem = Stem(channels["image_1008"], width, stride_px=4) if has_image else None
        self.laterals = nn.ModuleDict(
            {
                level: Lateral(channels[level], num_out, embedding_dim, silent=has_image)
                for level, num_out in (("fpn_144", 2 * width), ("fpn_288", width))
                if level in self.needs
            }
        )
        # By stride, from coarse to fine: 8, 7, 4, 3.5.
        widths = [2 * width] * (has_image + ("fpn_144" in self.needs))
        widths += [width] * (has_image + ("fpn_288" in self.needs))
        self.joins = nn.ModuleList(
            Join(num_in, num_out)
            for num_in, num_out in zip([context_width, *widths], widths, strict=False)
        )
        if self.stem is not None:
            first_join = self.joins[0]
            assert isinstance(first_join, Join)
            zeros(first_join.enter)
        self.logits = nn.Conv2d(widths[-1], num_classes, 1)
        nn.init.constant_(self.logits.bias, FIRST_LOGIT)  # type: ignore[arg-type]

    @classmethod
    def levels_read(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the levels that were asked for, or what every head of this kind reads."""
        levels = options.get("levels")
        if isinstance(levels, str):
            levels = levels.split(",")
        if not isinstance(levels, list | tuple):
            return LEVELS[:1]
        return tuple(dict.fromkeys(str(level) for level in levels))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, K, H, W) on the finest grid."""
        embedding_BD = self.view_encoder(batch.angles_B2)
        _, fused_BCHW = self.context(batch.levels["fpn_72"], embedding_BD)
        lateral = {
            level: part(batch.levels[level], embedding_BD) for level, part in self.laterals.items()
        }
        quarter = eighth = None
        if self.stem is not None:
            quarter, eighth = self.stem(self.feature(batch, "image_1008"))
        by_stride = (eighth, lateral.get("fpn_144"), quarter, lateral.get("fpn_288"))
        finer = [part for part in by_stride if part is not None]
        for join, part_BCHW in zip(self.joins, finer, strict=True):
            fused_BCHW = join(fused_BCHW, part_BCHW)
        logits_BKHW: Tensor = self.logits(fused_BCHW)
        return logits_BKHW.float()


class Lateral(nn.Module):
    """Brings a level of the neck to few channels: normalised, modulated by the view.

    Args:
        num_channels: of the level.
        num_out: channels returned.
        embedding_dim: D, length of the view embedding.
        silent: begin with zeros.
    """

    def __init__(
        self, num_channels: int, num_out: int, embedding_dim: int, *, silent: bool
    ) -> None:
        super().__init__()
        self.film = FiLM(embedding_dim, num_channels)
        self.enter = nn.Conv2d(num_channels, num_out, 1)
        if silent:
            zeros(self.enter)

    def forward(self, feature_BCHW: Tensor, embedding_BD: Tensor) -> Tensor:
        """Return (B, ``num_out``, H, W)."""
        token_BCHW = self.film(channel_norm(feature_BCHW), embedding_BD)
        entered_BCHW: Tensor = self.enter(token_BCHW)
        return entered_BCHW


class Join(nn.Module):
    """Adds the coarser levels to a finer one, and smooths.

    Args:
        num_in: channels of the coarser.
        num_out: channels of the finer, and of the result.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(num_in, num_out, 1)
        self.smooth = conv_norm_act(num_out, num_out)

    def forward(self, coarse_BCHW: Tensor, fine_BCHW: Tensor) -> Tensor:
        """Return (B, ``num_out``, H, W) on the finer grid."""
        joined_BCHW: Tensor = self.smooth(fine_BCHW + resize(self.enter(coarse_BCHW), fine_BCHW))
        return joined_BCHW
