import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from towers import UNIT, UNIT_SAM3, UNIT_SAM31, build_stock_backbone, under

from sam3cache.backbone import BACKBONES, TowerSpec, load_tower, weights_sha256
from sam3cache.backbone.spec import POSITIONS
from sam3cache.backbone.weights import SeededWeights, read_checkpoint
from sam3cache.errors import ConfigError, WeightsError

LAYOUTS = [
    "transformers",
    "transformers-tower",
    "sam3",
    "sam3.1",
    "under-model",
    "image-model",
    "tower",
    "sam3-safetensors",
]
SAM3_PREFIX = "detector.backbone.vision_backbone."
MINI_SHA256 = "c4a6243d53d72c46ac4b0ea66c5b22cb33624c10c8c4c83da4fdbe99cd40bbd7"


@pytest.mark.parametrize("spec", [*BACKBONES.values(), UNIT], ids=lambda spec: spec.name)
def test_the_weights_of_a_spec_are_those_of_the_stock_tower(spec: TowerSpec) -> None:
    from sam3cache.backbone.sam3_modules import _ReadableSchedule

    with torch.device("meta"), _ReadableSchedule():
        neck = build_stock_backbone(spec).vision_backbone
    stock = {name: tuple(parameter.shape) for name, parameter in neck.named_parameters()}
    _, num_positions, dim = stock[POSITIONS]
    stock[POSITIONS] = (1, num_positions - 1, dim)
    fourth = {name for name in stock if name.startswith("convs.3.")}
    assert len(fourth) == 4
    assert spec.weight_shapes() == {
        name: shape for name, shape in stock.items() if name not in fourth
    }


def test_sam3_is_of_its_published_size() -> None:
    num_weights = sum(np.prod(shape) for shape in BACKBONES["sam3"].weight_shapes().values())
    class_position, fourth_level = 1024, 1024 * 256 + 256 + 256 * 256 * 9 + 256
    assert num_weights + class_position + fourth_level == 454_039_808


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tower_has_one_hash_in_every_layout(checkpoints: dict[str, Path], layout: str) -> None:
    expected = weights_sha256(UNIT, checkpoints["tower"])
    assert weights_sha256(UNIT, checkpoints[layout]) == expected
    assert load_tower(UNIT, weights=str(checkpoints[layout])).weights_sha256 == expected


def test_the_layout_is_told_by_the_names_of_tensors_not_of_files(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    disguised = tmp_path / "sam3.pt"
    disguised.write_bytes(checkpoints["transformers"].read_bytes())
    assert weights_sha256(UNIT, disguised) == weights_sha256(UNIT, checkpoints["sam3"])


def test_every_tensor_of_transformers_own_full_model_is_used_once() -> None:
    from transformers import Sam3VideoConfig, Sam3VideoModel

    from sam3cache.backbone.weights import _difference, _select_tower

    with torch.device("meta"):
        model = Sam3VideoModel(Sam3VideoConfig())
    found = _select_tower(model.state_dict())
    assert found is not None
    layout, tower = found
    spec = BACKBONES["sam3"]
    names = [theirs for name in spec.weight_shapes() for theirs in layout.names(name)]
    assert len(set(names)) == len(names)
    assert _difference(layout, tower, spec) == ""
    assert {name for name in tower if not name.startswith("neck.fpn_layers.3.")} == set(names)


def test_another_weight_another_name_or_another_shape_is_another_hash(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(checkpoints["sam3-safetensors"])
    hashes = {weights_sha256(UNIT, checkpoints["sam3"])}
    biases = [f"{SAM3_PREFIX}trunk.blocks.{i}.norm1.bias" for i in (0, 1)]
    for change in ("one ulp", "two tensors swapped"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        if change == "one ulp":
            changed[biases[0]][0] = torch.nextafter(changed[biases[0]][0], torch.tensor(9.0))
        else:
            changed[biases[0]], changed[biases[1]] = changed[biases[1]], changed[biases[0]]
        save_file(changed, tmp_path / "changed.safetensors")
        hashes.add(weights_sha256(UNIT, tmp_path / "changed.safetensors"))
    assert len(hashes) == 3


def test_half_precision_files_are_read_as_the_numbers_they_hold(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    half = {name: t.half() for name, t in load_file(checkpoints["sam3-safetensors"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({name: t.float() for name, t in half.items()}, tmp_path / "float.safetensors")
    hashes = {weights_sha256(UNIT, tmp_path / f"{name}.safetensors") for name in ("half", "float")}
    assert len(hashes) == 1


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(SAM3_PREFIX + name)


def having(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({SAM3_PREFIX + name: tensor})


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{SAM3_PREFIX}trunk.blocks.2.mlp.fc1.weight"][3, 5] = torch.nan


def with_opposite_infinities(tensors: dict[str, Tensor]) -> None:
    bias = tensors[f"{SAM3_PREFIX}convs.0.conv_3x3.bias"]
    bias[0], bias[1] = torch.inf, -torch.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("trunk.ln_pre.bias"), "1 of 70 tensors are missing, such as trunk.ln_pre.bias"),
        (without("convs.1.conv_1x1.weight"), "missing, such as convs.1.conv_1x1.weight"),
        (having("trunk.extra", torch.zeros(1)), "1 tensors are unexpected, such as trunk.extra"),
        (having("convs.4.conv_1x1.bias", torch.zeros(1)), "unexpected, such as convs.4"),
        (having("trunk.ln_pre.bias", torch.zeros(65)), "trunk.ln_pre.bias is (65,), expected (64,"),
        (having("trunk.pos_embed", torch.zeros(1, 18, 64)), "pos_embed is (1, 17, 64), expected"),
        (having("trunk.pos_embed", torch.zeros(64)), "pos_embed is (64,), expected (1, 16, 64)"),
        (having("trunk.ln_pre.bias", torch.zeros(64, dtype=torch.int8)), "is torch.int8, expected"),
        (with_nan, "trunk.blocks.2.mlp.fc1.weight holds NaN or infinity"),
        (with_opposite_infinities, "convs.0.conv_3x3.bias holds NaN or infinity"),
    ],
)
def test_a_tower_that_does_not_fit_in_every_tensor_is_refused(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    tensors = load_file(checkpoints["sam3-safetensors"])
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    for refuse in (weights_sha256, lambda spec, weights: load_tower(spec, weights=weights)):
        with pytest.raises(WeightsError) as caught:
            refuse(UNIT, path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "layout", "message"),
    [
        (UNIT_SAM3, "sam3.1", "3 neck levels, expected 4"),
        (UNIT_SAM31, "sam3", "4 neck levels, expected 3"),
        (UNIT_SAM31, "transformers", "4 neck levels, expected 3"),
        (BACKBONES["sam3"], "sam3", "tensors are missing"),
        (replace(UNIT, depth=2), "transformers", "tensors are unexpected"),
        (replace(UNIT, embed_dim=96), "transformers", "expected"),
    ],
)
def test_weights_of_another_model_are_refused(
    checkpoints: dict[str, Path], spec: TowerSpec, layout: str, message: str
) -> None:
    with pytest.raises(WeightsError, match=f"not the weights of {spec.name}: .*{message}"):
        weights_sha256(spec, checkpoints[layout])


def test_a_refusal_names_the_backbone_that_the_weights_do_fit(tmp_path: Path) -> None:
    path = write_seeded(BACKBONES["sam3-mini"], tmp_path / "mini.safetensors")
    with pytest.raises(WeightsError, match="they fit backbone sam3-mini, choose that"):
        load_tower("sam3", weights=path)


@pytest.mark.parametrize(("spec", "layout"), [(UNIT_SAM3, "sam3"), (UNIT_SAM31, "sam3.1")])
def test_each_release_is_accepted_as_itself(
    checkpoints: dict[str, Path], spec: TowerSpec, layout: str
) -> None:
    assert len(weights_sha256(spec, checkpoints[layout])) == 64


def write_seeded(spec: TowerSpec, path: Path) -> Path:
    weights = SeededWeights(spec)
    tower = {name: weights.read(name) for name in weights.names()}
    tower[POSITIONS] = nn.functional.pad(tower[POSITIONS], (0, 0, 1, 0))
    save_file(under(SAM3_PREFIX, tower), path)
    return path


def truncate(source: Path, path: Path) -> None:
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_tensor(source: Path, path: Path) -> None:
    torch.save(torch.zeros(3), path)


def write_other_model(source: Path, path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


def write_whole_module(source: Path, path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


def write_legacy_format(source: Path, path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("source", "write", "message"),
    [
        ("sam3", truncate, "only part of one"),
        ("transformers", truncate, "only part of one"),
        ("sam3", lambda source, path: path.write_bytes(b""), "only part of one"),
        ("sam3", lambda source, path: path.write_text("<html>"), "not a readable checkpoint"),
        (
            "sam3",
            lambda source, path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
            "not a readable",
        ),
        ("sam3", write_whole_module, "not a readable checkpoint"),
        ("sam3", write_legacy_format, "expected torch's zip format or safetensors"),
        ("sam3", write_tensor, "holds a Tensor, expected a dict"),
        ("sam3", write_other_model, "none of its 2 tensors belongs to SAM 3's vision tower"),
        ("sam3", lambda source, path: path.mkdir(), "a folder, expected a checkpoint file"),
        ("sam3", lambda source, path: None, "no such file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    source: str,
    write: Callable[[Path, Path], None],
    message: str,
) -> None:
    path = tmp_path / "weights.pt"
    write(checkpoints[source], path)
    with pytest.raises(WeightsError) as caught:
        weights_sha256("sam3", str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_unknown_backbone_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'sam2': expected one of sam3, sam3\.1, sam3-mini"):
        weights_sha256("sam2")


def test_random_weights_of_the_miniature_are_the_same_everywhere() -> None:
    assert weights_sha256("sam3-mini", "random") == f"random:{MINI_SHA256}"


def test_random_weights_saved_to_a_file_are_the_same_weights(tmp_path: Path) -> None:
    path = write_seeded(BACKBONES["sam3-mini"], tmp_path / "mini.safetensors")
    assert weights_sha256("sam3-mini", path) == MINI_SHA256


def test_seeded_weights_neither_follow_nor_disturb_the_global_random_state() -> None:
    hashes = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        hashes.add(load_tower(UNIT, weights="random").weights_sha256)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert len(hashes) == 1
    assert hashes.pop().startswith("random:")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may hide changes from a map")
def test_an_opened_checkpoint_has_read_no_weight(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Weights changed on disk after opening are seen, so nothing had been copied before."""
    path = tmp_path / "tower.pt"
    path.write_bytes(checkpoints["sam3"].read_bytes())
    weights = read_checkpoint(path, UNIT)
    stored = weights.read("trunk.ln_pre.weight").clone()
    content = path.read_bytes()
    offset = content.index(stored.numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(stored.nbytes))
    assert torch.equal(weights.read("trunk.ln_pre.weight"), torch.zeros_like(stored))
