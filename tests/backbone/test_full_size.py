"""SAM 3's tower at its own size, with seeded weights: minutes, and about 8 GB."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from towers import (
    ALL_LEVELS,
    build_stock_backbone,
    build_transformers_model,
    normalize,
    random_images,
    under,
)

from sam3cache.backbone import BACKBONES, Tower, load_tower
from sam3cache.backbone.sam3_modules import _ReadableSchedule
from sam3cache.backbone.spec import POSITIONS
from sam3cache.backbone.weights import SeededWeights, _transformers_names

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(3600)]

SPEC = BACKBONES["sam3"]
EXPECTED_PARAMETERS = 454_039_808


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    weights = SeededWeights(SPEC)
    tensors = {name: weights.read(name) for name in weights.names()}
    tensors[POSITIONS] = nn.functional.pad(tensors[POSITIONS], (0, 0, 1, 0))
    for part in ("conv_1x1.weight", "conv_1x1.bias", "conv_3x3.weight", "conv_3x3.bias"):
        tensors[f"convs.3.{part}"] = tensors[f"convs.2.{part}"].clone()
    return tensors


@pytest.fixture(scope="module")
def image() -> Tensor:
    return random_images(SPEC, num_images=1)


@pytest.fixture(scope="module")
def tower(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    path: Path = tmp_path_factory.mktemp("full-size") / "sam3.safetensors"
    save_file(under("detector.backbone.vision_backbone.", tensors), path)
    yield load_tower("sam3", weights=path, levels=ALL_LEVELS)
    path.unlink()


@pytest.fixture(scope="module")
def features(tower: Tower, image: Tensor) -> dict[str, Tensor]:
    return tower(image)


def test_the_full_tower_equals_sam3s_own_backbone_to_the_bit(
    tensors: dict[str, Tensor], image: Tensor, features: dict[str, Tensor]
) -> None:
    with torch.device("meta"), _ReadableSchedule():
        backbone = build_stock_backbone(SPEC)
    neck = backbone.vision_backbone
    outcome = neck.load_state_dict(tensors, strict=False, assign=True)
    assert not outcome.unexpected_keys
    assert all(name.endswith("freqs_cis") for name in outcome.missing_keys)
    for block in neck.trunk.blocks:
        block.attn._setup_rope_freqs()
    assert sum(parameter.numel() for parameter in neck.parameters()) == EXPECTED_PARAMETERS
    with torch.no_grad():
        pyramid = backbone.forward_image(normalize(image))["backbone_fpn"]
    for level, expected in zip(("fpn_288", "fpn_144", "fpn_72"), pyramid, strict=True):
        assert torch.equal(features[level], expected), level


def test_the_full_tower_in_bf16_keeps_within_rounding(
    image: Tensor, features: dict[str, Tensor]
) -> None:
    tower = load_tower("sam3", weights="random", levels=ALL_LEVELS, numeric_path="bf16")
    for level, feature in tower(image).items():
        actual, expected = feature.double().flatten(), features[level].double().flatten()
        assert (actual - expected).norm() / expected.norm() < 0.02, level
        assert torch.cosine_similarity(actual, expected, dim=0) > 0.9995, level


def test_the_full_tower_agrees_with_transformers(
    tensors: dict[str, Tensor], image: Tensor, features: dict[str, Tensor]
) -> None:
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = _transformers_names(name)
        state |= dict(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    positions = "backbone.embeddings.position_embeddings"
    state[positions] = state[positions][:, 1:]
    model = build_transformers_model(SPEC)
    model.load_state_dict(state, strict=True, assign=True)
    with torch.no_grad():
        output = model(normalize(image))
    expected = {
        "trunk_72": output.last_hidden_state.transpose(1, 2).unflatten(2, (72, 72)),
        "fpn_288": output.fpn_hidden_states[0],
        "fpn_144": output.fpn_hidden_states[1],
        "fpn_72": output.fpn_hidden_states[2],
    }
    for level, feature in features.items():
        error = (feature - expected[level]).norm() / expected[level].norm()
        assert error < 2e-5, level
