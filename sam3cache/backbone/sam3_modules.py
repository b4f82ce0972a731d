"""The ``sam3`` package's own tower, run without needless copies. Only ``tower`` imports this.

The modules, their weights and their arithmetic are the stock package's, bit for bit in float32;
what changes is how tokens are laid out on the way. Importing this module imports ``sam3``.

Legend: B batch (of images or of windows), C channels, H height, W width, L tokens, N heads,
D channels of a head, P pairs of them, Q query and key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sam3.model.necks import Sam3DualViTDetNeck
from sam3.model.vitdet import (
    Attention,
    Block,
    ViT,
    get_abs_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sam3cache.backbone.spec import TowerSpec


class TokenTrunk(ViT):  # type: ignore[misc]
    """``sam3``'s trunk, which keeps tokens in windows for as long as blocks attend in windows.

    The stock blocks cut their tokens into windows and join them again, each for itself. All but
    attention looks at one token at a time, so of a joining and the next cutting nothing is left.

    Attributes:
        compiles: whether blocks run through ``torch.compile``, which joins what is bound by memory
            (rotary encoding, norms, activations, additions) to few kernels. Meant for GPUs: on a
            CPU, where that is a small part, it gains a few hundredths.
    """

    compiles: bool

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Return a list of one item, as the stock trunk does: (B, C, H, W), channels last."""
        x_BHWC = self.patch_embed(pixels_BCHW)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        x_BHWC = self.ln_pre(x_BHWC + get_abs_pos(self.pos_embed, True, grid, tiling=True))
        window = 0
        for block in self.blocks:
            if window and block.window_size != window:
                x_BHWC = window_unpartition(x_BHWC, window, grid, grid)
            if block.window_size and block.window_size != window:
                x_BHWC, _ = window_partition(x_BHWC, block.window_size)
            window = block.window_size
            x_BHWC = _run_compiled(block, x_BHWC) if self.compiles else block(x_BHWC)
        if window:
            x_BHWC = window_unpartition(x_BHWC, window, grid, grid)
        return [x_BHWC.permute(0, 3, 1, 2)]


class TokenBlock(Block):  # type: ignore[misc]
    """``sam3``'s block, for tokens that lie as it attends: whole grids, or windows of them."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x_BHWC = x_BHWC + self.attn(self.norm1(x_BHWC))
        x_BHWC = x_BHWC + self.mlp(self.norm2(x_BHWC))
        return x_BHWC


class TokenAttention(Attention):  # type: ignore[misc]
    """``sam3``'s attention, with its rotary encoding as real numbers and nothing transposed.

    The stock class keeps the rotation as a complex buffer, which ``Module.to(dtype)`` silently
    strips of its imaginary part. Here it is a plain float32 tensor of cosines and sines: it follows
    the module's device and never its dtype. Queries and keys are turned where the projection has
    left them, and attention reads and writes tokens there.
    """

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Let every token attend to all tokens of its grid."""
        batch, height, width, _ = x_BHWC.shape
        qkv = self.qkv(x_BHWC).view(batch, height * width, 3, self.num_heads, self.head_dim)
        q_BNLD, k_BNLD = _rotate(qkv[:, :, :2], self.rotation_LP2).transpose(1, 3).unbind(2)
        v_BNLD = qkv[:, :, 2].transpose(1, 2)
        x_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD)
        x_BHWC = self.proj(x_BNLD.transpose(1, 2).reshape(batch, height, width, -1))
        return x_BHWC

    def _setup_rope_freqs(self) -> None:
        super()._setup_rope_freqs()
        self.rotation_LP2 = torch.view_as_real(self.freqs_cis).clone()
        del self.freqs_cis

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenAttention:
        super()._apply(fn, recurse)
        self.rotation_LP2 = self.rotation_LP2.to(fn(self.rotation_LP2.new_empty(0)).device)
        return self


def _rotate(x_BLQND: Tensor, rotation_LP2: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels by their token's angles, in float32."""
    x_BLQNP2 = x_BLQND.float().view(*x_BLQND.shape[:-1], -1, 2)
    rotation_L11P2 = rotation_LP2[:, None, None]
    if torch.compiler.is_compiling():
        # The compiler has no complex numbers, and needs none to do this in one pass.
        real, imaginary = x_BLQNP2.unbind(-1)
        cos, sin = rotation_L11P2.unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        # Nor are there any in memory, but seen as such, pairs are turned in one pass here too, in
        # less than half the time that real arithmetic takes step by step.
        turned = torch.view_as_real(
            torch.view_as_complex(x_BLQNP2) * torch.view_as_complex(rotation_L11P2)
        )
    return turned.flatten(-2).type_as(x_BLQND)


def _run_compiled(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """Run a block compiled: blocks share their code, so one of each kind is compiled."""
    # Whatever the batch: else each size would be compiled anew.
    torch._dynamo.maybe_mark_dynamic(x_BHWC, 0)
    return _compiled()(block, x_BHWC)


@cache
def _compiled() -> Callable[[nn.Module, Tensor], Tensor]:
    # A graph in one piece: what cannot be compiled is an error, not another arithmetic.
    return torch.compile(lambda block, x_BHWC: block(x_BHWC), fullgraph=True)


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


def build_modules(spec: TowerSpec, *, compiles: bool = False) -> tuple[nn.Module, list[nn.Module]]:
    """Build trunk and neck levels on the meta device: at once, without memory or random numbers.

    Stochastic depth and activation checkpointing are left out, so that nothing inside can tell
    training mode from evaluation.

    Args:
        spec: of the tower.
        compiles: whether the trunk's blocks run through ``torch.compile``.

    Returns:
        The trunk, which maps (B, 3, size, size) to a list whose last item is (B, C, H, W), and
        the neck's ``convs`` for scales 4, 2 and 1, which map that item to a level. Their
        parameters are to be assigned.
    """
    # Heads have no use for position encodings: never called.
    neck = build_stock_neck(spec, nn.Identity(), (4.0, 2.0, 1.0))
    trunk = neck.trunk
    # ViT names the classes of its parts itself, so the instances change theirs.
    trunk.__class__ = TokenTrunk
    trunk.compiles = compiles
    for block in trunk.blocks:
        block.__class__ = TokenBlock
        block.attn.__class__ = TokenAttention
        block.attn._setup_rope_freqs()
    return trunk, list(neck.convs)


def build_stock_neck(
    spec: TowerSpec, position_encoding: nn.Module, scale_factors: Sequence[float]
) -> Sam3DualViTDetNeck:
    """Build the stock package's neck, and in it the stock trunk, on the meta device."""
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
        return Sam3DualViTDetNeck(
            trunk=trunk,
            position_encoding=position_encoding,
            d_model=spec.neck_dim,
            scale_factors=scale_factors,
        )
