import copy
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv
from towers import (
    ALL_LEVELS,
    UNIT,
    build_stock_backbone,
    normalize,
    random_images,
    sam3_names,
)

from sam3cache.backbone import BACKBONES, LEVELS, Tower, load_tower
from sam3cache.backbone.weights import read_checkpoint
from sam3cache.errors import ConfigError, InputSizeError, Sam3CacheError

BF16_ERROR, BF16_COSINE = 0.02, 0.9995
"""What rounding to bfloat16 may cost, by level; SAM 3's own size is in test_full_size.py."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def cosine(actual: Tensor, expected: Tensor) -> float:
    return float(
        torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0)
    )


@pytest.fixture(scope="module")
def tower(checkpoints: dict[str, Path]) -> Tower:
    return load_tower(UNIT, weights=checkpoints["sam3"], levels=ALL_LEVELS)


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> Any:
    """sam3's own backbone with the same weights as ``tower``."""
    with torch.random.fork_rng():
        backbone = build_stock_backbone(UNIT)
    state = sam3_names(read_checkpoint(checkpoints["sam3"], UNIT))
    state = {name: value for name, value in state.items() if not name.endswith("freqs_cis")}
    outcome = backbone.vision_backbone.load_state_dict(state, strict=False)
    assert all(name.endswith("freqs_cis") for name in outcome.missing_keys)
    assert not outcome.unexpected_keys
    return backbone


@pytest.fixture(scope="module")
def image() -> Tensor:
    return random_images(UNIT, num_images=1)


@pytest.fixture(scope="module")
def features(tower: Tower, image: Tensor) -> dict[str, Tensor]:
    return tower(image)


@pytest.fixture(scope="module")
def mini() -> Tower:
    return load_tower("sam3-mini", levels=("trunk_72", "fpn_72"))


def stock_features(stock: Any, image_BCHW: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        pyramid = stock.forward_image(normalize(image_BCHW))["backbone_fpn"]
        trunk = stock.vision_backbone.trunk(normalize(image_BCHW))[-1]
    return {
        "trunk_72": trunk,
        "fpn_288": pyramid[0],
        "fpn_144": pyramid[1],
        "fpn_72": pyramid[2],
    }


def test_features_equal_those_of_sam3s_own_backbone_to_the_bit(tower: Tower, stock: Any) -> None:
    image = random_images(UNIT)
    features, expected = tower(image), stock_features(stock, image)
    for level in ALL_LEVELS:
        assert torch.equal(features[level], expected[level]), level
        assert features[level].dtype == torch.float32
        assert features[level].is_contiguous()


def test_features_agree_with_transformers_independent_implementation(
    checkpoints: dict[str, Path], transformers_model: nn.Module
) -> None:
    tower = load_tower(UNIT, weights=checkpoints["transformers"], levels=ALL_LEVELS)
    image = random_images(UNIT)
    with torch.no_grad():
        output = transformers_model(normalize(image))
    side = UNIT.size_px // UNIT.patch_px
    expected = {
        "trunk_72": output.last_hidden_state.transpose(1, 2).unflatten(2, (side, side)),
        "fpn_288": output.fpn_hidden_states[0],
        "fpn_144": output.fpn_hidden_states[1],
        "fpn_72": output.fpn_hidden_states[2],
    }
    for level, feature in tower(image).items():
        assert relative_error(feature, expected[level]) < 2e-5, level


@pytest.mark.parametrize("layout", ["sam3.1", "transformers", "sam3-safetensors", "tower"])
def test_every_layout_gives_the_same_features_to_the_bit(
    checkpoints: dict[str, Path], image: Tensor, features: dict[str, Tensor], layout: str
) -> None:
    other = load_tower(UNIT, weights=checkpoints[layout], levels=ALL_LEVELS)
    for level, feature in other(image).items():
        assert torch.equal(feature, features[level]), level


def test_the_miniature_has_sam3s_shapes_and_sam3s_own_arithmetic(mini: Tower) -> None:
    with torch.random.fork_rng():
        trunk = build_stock_backbone(BACKBONES["sam3-mini"]).vision_backbone.trunk
    outcome = trunk.load_state_dict(mini.trunk.state_dict(), strict=False)
    assert all(name.endswith("freqs_cis") for name in outcome.missing_keys)
    image = random_images(mini.spec, num_images=1)
    with torch.no_grad():
        expected = trunk(normalize(image))[-1]
    features = mini(image)
    assert torch.equal(features["trunk_72"], expected)
    assert features["fpn_72"].shape == (1, 256, 72, 72)


@pytest.mark.parametrize("global_blocks", [(3,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_tokens_stay_in_windows_between_windowed_blocks_to_the_bit(
    global_blocks: tuple[int, ...],
) -> None:
    spec = replace(UNIT, global_blocks=global_blocks)
    tower = load_tower(spec, weights="random", levels=("trunk_72",))
    with torch.random.fork_rng():
        trunk = build_stock_backbone(spec).vision_backbone.trunk
    trunk.load_state_dict(tower.trunk.state_dict(), strict=False)
    image = random_images(spec)
    with torch.no_grad():
        expected = trunk(normalize(image))[-1]
    assert torch.equal(tower(image)["trunk_72"], expected)


def test_the_miniature_in_bf16_keeps_within_rounding(mini: Tower) -> None:
    tower = load_tower("sam3-mini", levels=mini.levels, numeric_path="bf16")
    image = random_images(mini.spec, num_images=1)
    features = mini(image)
    for level, feature in tower(image).items():
        assert relative_error(feature.float(), features[level]) < BF16_ERROR, level
        assert cosine(feature, features[level]) > BF16_COSINE, level


@pytest.mark.parametrize("name", list(BACKBONES))
def test_level_shapes_are_sam3s(name: str) -> None:
    spec = BACKBONES[name]
    assert spec.level_shape("trunk_72") == (spec.embed_dim, 72, 72)
    assert spec.level_shape("fpn_72") == (256, 72, 72)
    assert spec.level_shape("fpn_144") == (256, 144, 144)
    assert spec.level_shape("fpn_288") == (256, 288, 288)


@pytest.mark.parametrize(
    "levels", [("fpn_72",), ("trunk_72",), ("fpn_288", "fpn_144"), ALL_LEVELS, ALL_LEVELS[::-1]]
)
def test_only_the_levels_asked_for_are_kept_and_computed(levels: tuple[str, ...]) -> None:
    tower = load_tower(UNIT, weights="random", levels=levels)
    indices = {LEVELS[level].neck_index for level in levels} - {None}
    shapes = UNIT.weight_shapes()
    wanted = ["trunk.", *(f"convs.{index}." for index in indices)]
    num_expected = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if name.startswith(tuple(wanted))
    )
    num_class_position = UNIT.embed_dim
    num_held = sum(p.numel() for p in tower.state_dict().values())
    assert num_held == num_expected + num_class_position

    calls: list[str] = []
    for name, module in tower.named_modules():
        if name in ("trunk", *(f"necks.{level}" for level in ALL_LEVELS)):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    features = tower(random_images(UNIT, num_images=1))
    assert list(features) == list(levels)
    assert {level: (1, *UNIT.level_shape(level)) for level in levels} == {
        level: tuple(feature.shape) for level, feature in features.items()
    }
    assert sorted(calls) == sorted(
        ["trunk", *(f"necks.{level}" for level in levels if level != "trunk_72")]
    )


def test_a_level_does_not_depend_on_which_others_are_computed(
    checkpoints: dict[str, Path], image: Tensor, features: dict[str, Tensor]
) -> None:
    alone = load_tower(UNIT, weights=checkpoints["sam3"], levels=("fpn_144",))
    assert torch.equal(alone(image)["fpn_144"], features["fpn_144"])


def batch(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        batch(1, 3, 1012, 1012),
        batch(1, 3, 1021, 1021),
        batch(1, 3, 1024, 1024),
        batch(1, 3, 994, 994),
        batch(1, 3, 504, 2016),
        batch(1, 3, 1344, 756),
        batch(1, 3, 1008, 1022),
        batch(3, 1008, 1008),
        batch(1008, 1008),
        batch(0, 3, 1008, 1008),
        batch(1, 2, 1008, 1008),
        batch(1, 4, 1008, 1008),
        batch(1, 1008, 1008, 3),
        batch(1, 3, 1008, 1008, dtype=torch.float32),
        batch(1, 3, 1008, 1008, dtype=torch.int64),
    ],
    ids=lambda wrong: f"{str(wrong.dtype).removeprefix('torch.')}-{tuple(wrong.shape)}",
)
def test_any_input_but_the_towers_own_is_refused(mini: Tower, wrong: Tensor) -> None:
    with pytest.raises(InputSizeError) as caught:
        mini(wrong)
    assert str(tuple(wrong.shape)) in str(caught.value)
    assert "expected uint8 (B, 1 or 3, 1008, 1008)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grey_is_the_same_as_three_equal_channels(tower: Tower) -> None:
    grey = random_images(UNIT, num_channels=1)
    features, expected = tower(grey), tower(grey.repeat(1, 3, 1, 1))
    for level in ALL_LEVELS:
        assert torch.equal(features[level], expected[level])


def test_normalisation_is_that_of_sam3s_image_processor(tower: Tower) -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(UNIT.size_px**2 // 256 + 1)
    image = image[: UNIT.size_px**2].view(1, 1, UNIT.size_px, UNIT.size_px).repeat(1, 3, 1, 1)
    seen: list[Tensor] = []
    hook = tower.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tower(image)
    hook.remove()
    official = tv.normalize(tv.to_dtype(image, torch.float32, scale=True), [0.5] * 3, [0.5] * 3)
    assert (seen[0] - official).abs().max() <= 2**-23
    assert seen[0].min() == -1
    assert seen[0].max() == 1


def test_the_callers_image_is_left_as_it_was(tower: Tower, image: Tensor) -> None:
    before = image.clone()
    tower(image)
    assert torch.equal(image, before)


def test_a_tower_cannot_be_trained(tower: Tower, image: Tensor) -> None:
    assert [name for name, p in tower.named_parameters() if p.requires_grad] == []
    with torch.enable_grad():
        features = tower(image)
    assert not any(feature.requires_grad for feature in features.values())


def test_a_head_can_be_trained_on_its_features(features: dict[str, Tensor]) -> None:
    head = nn.Conv2d(256, 1, 1)
    head(features["fpn_72"]).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "switch", [lambda tower: tower.train(), lambda tower: tower.trunk.train()], ids=["all", "trunk"]
)
def test_train_has_no_effect(
    checkpoints: dict[str, Path],
    image: Tensor,
    features: dict[str, Tensor],
    switch: Callable[[Tower], object],
) -> None:
    switched = load_tower(UNIT, weights=checkpoints["sam3"])
    switch(switched)
    for _ in range(2):
        assert torch.equal(switched(image)["fpn_72"], features["fpn_72"])
    switched.train()
    assert not any(module.training for module in switched.modules())


def test_the_stock_tower_does_change_in_training_mode(
    stock: Any, image: Tensor, features: dict[str, Tensor]
) -> None:
    """The control of the test above."""
    training = copy.deepcopy(stock).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert any(
            not torch.equal(stock_features(training, image)["trunk_72"], features["trunk_72"])
            for _ in range(10)
        )


EXACT_CONVERSIONS = {
    "to-float32": lambda tower: tower.to(torch.float32),
    "to-cpu": lambda tower: tower.to("cpu"),
    "to-cpu-float32": lambda tower: tower.to("cpu", torch.float32),
    "float": lambda tower: tower.float(),
    "type": lambda tower: tower.type(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda tower: pickle.loads(pickle.dumps(tower)),
    "double-and-back": lambda tower: tower.double().float(),
}
ROUNDING_CONVERSIONS = {
    "to-bfloat16": lambda tower: tower.to(torch.bfloat16),
    "bfloat16": lambda tower: tower.bfloat16(),
    "half": lambda tower: tower.half(),
    "type-bfloat16": lambda tower: tower.type(torch.bfloat16),
    "bfloat16-and-back": lambda tower: tower.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("convert", EXACT_CONVERSIONS.values(), ids=EXACT_CONVERSIONS)
def test_no_exact_conversion_alters_a_feature(
    tower: Tower,
    image: Tensor,
    features: dict[str, Tensor],
    convert: Callable[[Tower], Tower],
) -> None:
    converted = convert(copy.deepcopy(tower))
    for level, feature in converted(image).items():
        assert torch.equal(feature, features[level]), level


@pytest.mark.parametrize("convert", ROUNDING_CONVERSIONS.values(), ids=ROUNDING_CONVERSIONS)
def test_no_rounding_conversion_loses_the_rotations(
    tower: Tower,
    image: Tensor,
    features: dict[str, Tensor],
    convert: Callable[[Tower], Tower],
) -> None:
    converted = convert(copy.deepcopy(tower))
    for level, feature in converted(image).items():
        assert cosine(feature, features[level]) > 0.999, level
    rotations = [(a.attn.rotation_LP2, b.attn.rotation_LP2) for a, b in blocks_of(converted, tower)]
    assert all(torch.equal(after, before) for after, before in rotations)
    assert all(after.dtype == torch.float32 for after, _ in rotations)


def blocks_of(*towers: Tower) -> Any:
    return zip(*(tower.trunk.blocks for tower in towers), strict=True)


def test_the_stock_tower_does_lose_its_rotations(
    stock: Any, image: Tensor, features: dict[str, Tensor]
) -> None:
    """The control of the test above."""
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        stripped = copy.deepcopy(stock).to(torch.float32)
    actual = stock_features(stripped, image)["trunk_72"]
    assert cosine(actual, features["trunk_72"]) < 0.999


def test_the_state_is_real_and_holds_the_weights_alone(
    tower: Tower, image: Tensor, features: dict[str, Tensor], tmp_path: Path
) -> None:
    state = tower.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state.keys() == {name for name, _ in tower.named_parameters()}
    assert not list(tower.buffers())
    torch.save(state, tmp_path / "state.pt")
    other = load_tower(UNIT, weights="random", levels=ALL_LEVELS)
    assert not torch.equal(other(image)["fpn_72"], features["fpn_72"])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(image)["fpn_72"], features["fpn_72"])


def test_the_bf16_path_rounds_weights_and_output_but_not_rotations(
    checkpoints: dict[str, Path], image: Tensor, features: dict[str, Tensor]
) -> None:
    tower = load_tower(UNIT, weights=checkpoints["sam3"], levels=ALL_LEVELS, numeric_path="bf16")
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert tower.trunk.blocks[0].attn.rotation_LP2.dtype == torch.float32
    assert tower.numeric_path == "bf16"
    for level, feature in tower(image).items():
        assert feature.dtype == torch.bfloat16
        assert relative_error(feature.float(), features[level]) < BF16_ERROR, level
        assert cosine(feature, features[level]) > BF16_COSINE, level


@pytest.mark.long
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="needs a C++ compiler"
)
def test_the_compiled_path_is_compiled_once_for_every_batch_and_keeps_within_rounding(
    checkpoints: dict[str, Path], tower: Tower
) -> None:
    compiled, plain = (
        load_tower(UNIT, weights=checkpoints["sam3"], levels=ALL_LEVELS, numeric_path=path)
        for path in ("bf16+compile", "bf16")
    )
    image = random_images(UNIT, num_images=3)
    compiled(image[:2])
    with torch.compiler.set_stance("fail_on_recompile"):
        features = copy.deepcopy(compiled)(image)
    expected = tower(image)
    for level, feature in features.items():
        assert relative_error(feature.float(), expected[level]) < BF16_ERROR, level
        assert cosine(feature, expected[level]) > BF16_COSINE, level
    # It rounds elsewhere: hence a name of its own in the fingerprint.
    assert not torch.equal(features["trunk_72"], plain(image)["trunk_72"])


@pytest.mark.long
def test_without_a_compiler_the_compiled_path_is_refused_in_one_line(image: Tensor) -> None:
    from torch._inductor import config

    spec = replace(UNIT, depth=1, global_blocks=(0,))
    tower = load_tower(spec, weights="random", numeric_path="bf16+compile")
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.raises(ConfigError, match=r"torch\.compile fails here \(.*, or use bf16") as caught,
    ):
        tower(image)
    assert "\n" not in str(caught.value)


def test_the_hash_is_of_the_weights_whatever_the_numeric_path(
    checkpoints: dict[str, Path], tower: Tower
) -> None:
    other = load_tower(UNIT, weights=checkpoints["sam3"], numeric_path="bf16")
    assert other.weights_sha256 == tower.weights_sha256


def test_the_fp32_path_ignores_autocast(
    tower: Tower, image: Tensor, features: dict[str, Tensor]
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = tower(image)
    assert torch.equal(within["fpn_72"], features["fpn_72"])


def tf32_state() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [(False, False), (False, True), (True, True)])
def test_tf32_is_off_within_a_forward_and_as_before_after_it(
    tower: Tower, image: Tensor, before: tuple[bool, bool]
) -> None:
    at_start = tf32_state()
    within: list[tuple[bool, bool]] = []
    hook = tower.trunk.register_forward_hook(lambda *_: within.append(tf32_state()))
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        tower(image)
        assert within == [(False, False)]
        assert tf32_state() == before
    finally:
        hook.remove()
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = at_start


def test_the_tower_outlives_its_file(
    checkpoints: dict[str, Path], image: Tensor, features: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "tower.pt"
    path.write_bytes(checkpoints["sam3"].read_bytes())
    tower = load_tower(UNIT, weights=path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tower(image)["fpn_72"], features["fpn_72"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "sam2"}, "backbone 'sam2': expected one of sam3"),
        ({"levels": ("fpn_36",)}, "levels fpn_36: expected one or more of trunk_72, fpn_72"),
        ({"levels": ()}, r"levels \(none\): expected"),
        ({"levels": ("fpn_72", "fpn_72")}, "each once"),
        ({"numeric_path": "fp16"}, r"numeric path 'fp16': expected one of fp32, bf16"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    arguments = {"backbone": "sam3", "weights": "random"} | options
    with pytest.raises(ConfigError, match=message) as caught:
        load_tower(**arguments)
    assert isinstance(caught.value, Sam3CacheError)


def test_the_architecture_is_told_apart_field_by_field() -> None:
    full, mini = (BACKBONES[name].architecture_fields() for name in ("sam3", "sam3-mini"))
    assert full.keys() == mini.keys()
    assert {name for name in full if full[name] != mini[name]} == {
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "global_blocks",
    }
    assert full == BACKBONES["sam3.1"].architecture_fields()


@pytest.mark.gpu
def test_on_a_gpu_the_fp32_path_agrees_with_the_cpu(tower: Tower) -> None:
    image = random_images(UNIT)
    expected = tower(image)
    moved = copy.deepcopy(tower).to("cuda")
    assert moved.trunk.blocks[0].attn.rotation_LP2.is_cuda
    for level, feature in moved(image).items():
        assert feature.is_cuda
        assert relative_error(feature.cpu(), expected[level]) < 2e-5
