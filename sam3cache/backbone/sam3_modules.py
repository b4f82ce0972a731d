"""The ``sam3`` package's own tower. Importing this module imports ``sam3``; only ``tower`` does.

Legend: B batch, N heads, L tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.vitdet import Attention, ViT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sam3cache.backbone.spec import TowerSpec


class RealRopeAttention(Attention):  # type: ignore[misc]
    """``sam3``'s attention with its rotary encoding in real float32 arithmetic.

    The stock class keeps the rotation as a complex buffer, which ``Module.to(dtype)`` silently
    strips of its imaginary part, and which cannot be broadcast to replicas or compiled. Here
    cosine and sine are plain tensors: they follow the module's device and never its dtype.
    """

    def _setup_rope_freqs(self) -> None:
        super()._setup_rope_freqs()
        rotation_LD = self.freqs_cis
        del self.freqs_cis
        self.cos_LD = rotation_LD.real.contiguous()
        self.sin_LD = rotation_LD.imag.contiguous()

    def _apply_rope(self, q_BNLD: Tensor, k_BNLD: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(q_BNLD), self._rotate(k_BNLD)

    def _rotate(self, x_BNLD: Tensor) -> Tensor:
        # (a + bi)(cos + i sin), with channels paired as in the complex view of the stock class.
        real, imaginary = x_BNLD.float().reshape(*x_BNLD.shape[:-1], -1, 2).unbind(-1)
        rotated = torch.stack(
            (
                real * self.cos_LD - imaginary * self.sin_LD,
                real * self.sin_LD + imaginary * self.cos_LD,
            ),
            dim=-1,
        )
        return rotated.flatten(-2).type_as(x_BNLD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RealRopeAttention:
        super()._apply(fn, recurse)
        device = fn(self.cos_LD.new_empty(0)).device
        self.cos_LD = self.cos_LD.to(device)
        self.sin_LD = self.sin_LD.to(device)
        return self


class _ReadableSchedule(TorchFunctionMode):
    """Keeps ``linspace`` off the meta device: ViT reads numbers from it while it is built."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def build_modules(spec: TowerSpec) -> tuple[nn.Module, list[nn.Module]]:
    """Build trunk and neck levels on the meta device: at once, without memory or random numbers.

    Stochastic depth and activation checkpointing are left out, so that nothing inside can tell
    training mode from evaluation.

    Returns:
        The trunk, which maps (B, 3, size, size) to a list whose last item is (B, C, H, W), and
        the neck's ``convs`` for scales 4, 2 and 1, which map that item to a level. Their
        parameters are to be assigned.
    """
    with torch.device("meta"), _ReadableSchedule():
        trunk = ViT(
            img_size=spec.size_px,
            pretrain_img_size=spec.pretrain_size_px,
            patch_size=spec.patch_px,
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            norm_layer="LayerNorm",
            drop_path_rate=0.0,
            qkv_bias=True,
            use_abs_pos=True,
            tile_abs_pos=True,
            global_att_blocks=spec.global_blocks,
            rel_pos_blocks=(),
            use_rope=True,
            use_interp_rope=True,
            window_size=spec.window,
            pretrain_use_cls_token=True,
            retain_cls_token=False,
            ln_pre=True,
            ln_post=False,
            return_interm_layers=False,
            bias_patch_embed=False,
            use_act_checkpoint=False,
        )
        neck = Sam3DualViTDetNeck(
            trunk=trunk,
            position_encoding=nn.Identity(),  # heads have no use for it: never called
            d_model=spec.neck_dim,
            scale_factors=(4.0, 2.0, 1.0),
        )
    for block in trunk.blocks:
        # ViT names its attention class itself, so the instances change theirs.
        block.attn.__class__ = RealRopeAttention
        block.attn._setup_rope_freqs()
    return trunk, list(neck.convs)
