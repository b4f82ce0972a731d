"""What a vision tower is made of: names, sizes and shapes, known without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sam3cache.errors import ConfigError

NumericPath = Literal["fp32", "bf16", "bf16+compile"]
"""How a tower computes; what it computes differs by rounding, so fingerprints tell paths apart."""

NUMERIC_PATHS: tuple[NumericPath, ...] = ("fp32", "bf16", "bf16+compile")

POSITIONS = "trunk.pos_embed"
"""The learned positions, here without the class token's own: the tower never reads that one."""


@dataclass(frozen=True, slots=True)
class Level:
    """Where a level leaves the tower.

    Attributes:
        neck_index: index into the neck's ``convs``, or None for the trunk itself.
        scale: height and width as a multiple of the trunk's.
    """

    neck_index: int | None
    scale: int


LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        "trunk_72": Level(None, 1),
        "fpn_72": Level(2, 1),
        "fpn_144": Level(1, 2),
        "fpn_288": Level(0, 4),
    }
)
"""The levels, named by what makes them and by their side at 1008 px."""


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """SAM 3's vision tower (ViT trunk and simple feature pyramid), or a miniature of it.

    Defaults are SAM 3's own, as ``sam3.model_builder`` of the ``sam3`` package builds it.

    Attributes:
        name: what the command line calls it.
        embed_dim: channels of the trunk; a multiple of ``4 * num_heads``, as axial RoPE needs.
        depth: number of transformer blocks; the last is a global one.
        num_heads: attention heads of a block.
        mlp_ratio: hidden channels of a block's MLP as a multiple of ``embed_dim``.
        global_blocks: indices of the blocks that attend over the whole image.
        size_px: side of the square input; ``size_px / patch_px`` is a multiple of ``window``.
        pretrain_size_px: side of the input that the learned positions were made for; they are
            tiled over the larger grid.
        patch_px: side of a patch, and so the stride of the trunk.
        window: side in tokens of the attention window of the other blocks.
        neck_dim: channels of every neck level.
        neck_levels_on_file: how many neck levels a checkpoint of this model may hold. SAM 3 has a
            fourth, of stride 28, that nothing reads; SAM 3.1 does not.
        hub_repo: where its weights are on the Hugging Face hub; None when they are not there.
        hub_file: the checkpoint's name there.
        packaged_file: weights that come with this package, in the folder of this module; a JSON
            file of that name tells how they were made.
    """

    name: str
    embed_dim: int = 1024
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.625
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    size_px: int = 1008
    pretrain_size_px: int = 336
    patch_px: int = 14
    window: int = 24
    neck_dim: int = 256
    neck_levels_on_file: tuple[int, ...] = (4,)
    hub_repo: str | None = None
    hub_file: str | None = None
    packaged_file: str | None = None

    def level_shape(self, level: str) -> tuple[int, int, int]:
        """Return (C, H, W) of a level's features.

        Raises:
            ConfigError: the level is unknown.
        """
        check_levels((level,))
        side = self.size_px // self.patch_px * LEVELS[level].scale
        is_trunk = LEVELS[level].neck_index is None
        return (self.embed_dim if is_trunk else self.neck_dim, side, side)

    def architecture_fields(self) -> dict[str, str | int | float]:
        """Return what a fingerprint records of the architecture: all that can alter a feature."""
        return {
            "size_px": self.size_px,
            "patch_px": self.patch_px,
            "pretrain_size_px": self.pretrain_size_px,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": float(self.mlp_ratio),
            "window": self.window,
            "global_blocks": ",".join(map(str, self.global_blocks)),
            "neck_dim": self.neck_dim,
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return, by ``sam3``'s names, the shape of every weight that a feature depends on.

        This holds for all levels, whichever are computed, and is what a checkpoint must match.
        """
        dim, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        num_positions = (self.pretrain_size_px // self.patch_px) ** 2
        shapes: dict[str, tuple[int, ...]] = {
            POSITIONS: (1, num_positions, dim),
            "trunk.patch_embed.proj.weight": (dim, 3, self.patch_px, self.patch_px),
        }

        def add(name: str, *weight_shape: int, bias: int) -> None:
            shapes[f"{name}.weight"] = weight_shape
            shapes[f"{name}.bias"] = (bias,)

        add("trunk.ln_pre", dim, bias=dim)
        for index in range(self.depth):
            block = f"trunk.blocks.{index}"
            add(f"{block}.norm1", dim, bias=dim)
            add(f"{block}.attn.qkv", 3 * dim, dim, bias=3 * dim)
            add(f"{block}.attn.proj", dim, dim, bias=dim)
            add(f"{block}.norm2", dim, bias=dim)
            add(f"{block}.mlp.fc1", hidden, dim, bias=hidden)
            add(f"{block}.mlp.fc2", dim, hidden, bias=dim)
        # Transposed convolutions hold (in, out, kernel, kernel), plain ones (out, in, …).
        add("convs.0.dconv_2x2_0", dim, dim // 2, 2, 2, bias=dim // 2)
        add("convs.0.dconv_2x2_1", dim // 2, dim // 4, 2, 2, bias=dim // 4)
        add("convs.1.dconv_2x2", dim, dim // 2, 2, 2, bias=dim // 2)
        for index, channels in enumerate((dim // 4, dim // 2, dim)):
            add(f"convs.{index}.conv_1x1", self.neck_dim, channels, 1, 1, bias=self.neck_dim)
            add(f"convs.{index}.conv_3x3", self.neck_dim, self.neck_dim, 3, 3, bias=self.neck_dim)
        return shapes


def check_levels(levels: tuple[str, ...]) -> None:
    """Refuse an empty, repeated or unknown choice of levels.

    Raises:
        ConfigError: naming the levels there are.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels or len(set(levels)) < len(levels):
        raise ConfigError(
            f"levels {', '.join(levels) or '(none)'}: expected one or more of "
            f"{', '.join(LEVELS)}, each once"
        )


def find_numeric_path(name: object) -> NumericPath:
    """Return a numeric path by its name.

    Raises:
        ConfigError: there is no such path.
    """
    for path in NUMERIC_PATHS:
        if path == name:
            return path
    raise ConfigError(f"numeric path {name!r}: expected one of {', '.join(NUMERIC_PATHS)}")


BACKBONES: Mapping[str, TowerSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            TowerSpec("sam3", hub_repo="facebook/sam3", hub_file="sam3.pt"),
            TowerSpec(
                "sam3.1",
                neck_levels_on_file=(3,),
                hub_repo="facebook/sam3.1",
                hub_file="sam3.1_multiplex.pt",
            ),
            TowerSpec(
                "sam3-mini",
                embed_dim=96,
                depth=4,
                num_heads=3,
                mlp_ratio=2.0,
                global_blocks=(1, 3),
                neck_levels_on_file=(3, 4),
                packaged_file="sam3_mini.safetensors",
            ),
        )
    }
)
"""By name, the towers that can be run. ``sam3-mini`` has SAM 3's shapes at 2.3M parameters, and
weights pretrained on artificial angiograms (recipes/sam3_mini.py)."""


def find_spec(backbone: str | TowerSpec) -> TowerSpec:
    """Return the spec of a backbone's name; a spec is returned as it is.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(backbone, TowerSpec):
        return backbone
    if backbone not in BACKBONES:
        raise ConfigError(f"backbone {backbone!r}: expected one of {', '.join(BACKBONES)}")
    return BACKBONES[backbone]
