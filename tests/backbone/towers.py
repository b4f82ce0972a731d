"""A tower small enough for unit tests, the stock one to compare with, and its checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sam3cache.backbone import TowerSpec
from sam3cache.backbone.spec import POSITIONS
from sam3cache.backbone.tower import _import_sam3_modules
from sam3cache.backbone.weights import FileWeights, read_checkpoint

ALL_LEVELS = ("trunk_72", "fpn_72", "fpn_144", "fpn_288")

UNIT = TowerSpec(
    "unit",
    embed_dim=64,
    depth=4,
    num_heads=2,
    mlp_ratio=2.0,
    global_blocks=(1, 3),
    size_px=168,
    pretrain_size_px=56,
    window=4,
    neck_levels_on_file=(3, 4),
)
UNIT_SAM3 = replace(UNIT, name="unit-sam3", neck_levels_on_file=(4,))
UNIT_SAM31 = replace(UNIT, name="unit-sam3.1", neck_levels_on_file=(3,))


def build_stock_backbone(spec: TowerSpec) -> Any:
    """SAM3VLBackbone as sam3's own builder assembles it, on the current default device."""
    _import_sam3_modules()
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.position_encoding import PositionEmbeddingSine
    from sam3.model.vitdet import ViT
    from sam3.model.vl_combiner import SAM3VLBackbone

    trunk = ViT(
        img_size=spec.size_px,
        pretrain_img_size=spec.pretrain_size_px,
        patch_size=spec.patch_px,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        norm_layer="LayerNorm",
        drop_path_rate=0.1,
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
    )
    neck = Sam3DualViTDetNeck(
        trunk=trunk,
        position_encoding=PositionEmbeddingSine(num_pos_feats=spec.neck_dim, normalize=True),
        d_model=spec.neck_dim,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
    )
    return SAM3VLBackbone(visual=neck, text=None, scalp=1).eval()


def build_transformers_model(spec: TowerSpec) -> nn.Module:
    """transformers' own implementation of the tower, with SAM 3's LayerNorm epsilon."""
    from transformers import Sam3VisionConfig, Sam3VisionModel, Sam3ViTConfig

    trunk = Sam3ViTConfig(
        hidden_size=spec.embed_dim,
        intermediate_size=int(spec.embed_dim * spec.mlp_ratio),
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        image_size=spec.size_px,
        patch_size=spec.patch_px,
        window_size=spec.window,
        global_attn_indexes=list(spec.global_blocks),
        pretrain_image_size=spec.pretrain_size_px,
        layer_norm_eps=1e-5,
    )
    return Sam3VisionModel(
        Sam3VisionConfig(backbone_config=trunk, fpn_hidden_size=spec.neck_dim)
    ).eval()


def randomize(module: nn.Module) -> None:
    """Move every parameter, biases and norms too, away from what it begins with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def random_images(spec: TowerSpec, *, num_images: int = 2, num_channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    shape = (num_images, num_channels, spec.size_px, spec.size_px)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def normalize(image_BCHW: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5, written out anew."""
    return (image_BCHW.float() / 255 - 0.5) / 0.5


def sam3_names(weights: FileWeights) -> dict[str, Tensor]:
    """A tower as the sam3 package saves it: a class position, rotations and a fourth neck level."""
    tower = {name: weights.read(name).clone() for name in weights.names()}
    positions = tower[POSITIONS]
    tower[POSITIONS] = torch.cat([torch.randn_like(positions[:, :1]), positions], dim=1)
    tower["trunk.blocks.0.attn.freqs_cis"] = torch.zeros(16, 16, dtype=torch.complex64)
    for name in [name for name in tower if name.startswith("convs.2.")]:
        tower[name.replace("convs.2.", "convs.3.")] = torch.randn_like(tower[name])
    return tower


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_checkpoints(folder: Path, model: nn.Module) -> dict[str, Path]:
    """Write one tower in every layout; the names are the files' stems."""
    prefix = "detector.backbone.vision_backbone."
    hub = folder / "transformers.safetensors"
    save_file(
        under("detector_model.vision_encoder.", model.state_dict())
        | {"tracker_model.other": torch.zeros(1)},
        hub,
    )
    sam3 = sam3_names(read_checkpoint(hub, UNIT))
    sam31 = {name: tensor for name, tensor in sam3.items() if not name.startswith("convs.3.")}
    necks = {name: tensor for name, tensor in sam31.items() if name.startswith("convs.")}
    other = {"detector.transformer.other": torch.zeros(1), "tracker.other": torch.zeros(1)}
    files = {
        "sam3": under(prefix, sam3) | under(f"{prefix}sam2_", necks) | other,
        "sam3.1": under(prefix, sam31)
        | under(f"{prefix}interactive_", necks)
        | under(f"{prefix}propagation_", necks)
        | other,
        "under-model": {"model": under(prefix, sam3), "epoch": 3},
        "image-model": under("backbone.vision_backbone.", sam3),
        "tower": sam31,
    }
    paths = {"transformers": hub}
    for name, content in files.items():
        paths[name] = folder / f"{name}.pt"
        torch.save(content, paths[name])
    paths["sam3-safetensors"] = folder / "sam3-safetensors.safetensors"
    del sam31["trunk.blocks.0.attn.freqs_cis"]
    save_file(under(prefix, sam31), paths["sam3-safetensors"])
    paths["transformers-tower"] = folder / "transformers-tower.safetensors"
    save_file(model.state_dict(), paths["transformers-tower"])
    return paths
