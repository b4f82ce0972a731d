"""The miniature's own weights: what the record says of them, and that nothing measured is learned.

The recipe's parts are tried here, too; the recipe as a whole takes half an hour.
"""

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sam3cache.backbone
from sam3cache.backbone import BACKBONES, load_tower, weights_sha256

ROOT = Path(__file__).parents[2]
FOLDER = Path(sam3cache.backbone.__file__).parent
WEIGHTS = FOLDER / "sam3_mini.safetensors"
RECORD = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))

sys.path.insert(0, str(ROOT / "recipes"))
recipe = importlib.import_module("sam3_mini")


def test_the_file_is_the_one_that_the_record_describes() -> None:
    assert BACKBONES["sam3-mini"].packaged_file == WEIGHTS.name
    assert WEIGHTS.stat().st_size < 8e6
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == RECORD["sha256"]
    assert weights_sha256("sam3-mini") == RECORD["weights_sha256"]
    assert weights_sha256("sam3-mini", WEIGHTS) == RECORD["weights_sha256"]


def test_the_record_tells_recipe_and_figures() -> None:
    assert RECORD["recipe"] == json.loads(
        json.dumps(
            vars(recipe.Recipe()) | {"seeds": recipe.SEEDS, "held_out_seed": recipe.HELD_OUT_SEED}
        )
    )
    figures = RECORD["figures"]
    mean_dice = sum(figures["dice"]) / len(figures["dice"])
    assert figures["mean_dice"] == pytest.approx(mean_dice, abs=1e-4)
    assert figures["mean_dice"] > 0.7
    assert figures["training_min"] < recipe.MAX_MINUTES


def test_no_seed_of_the_recipe_is_used_for_anything_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.toml", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    seeds = {str(seed) for seed in (*recipe.SEEDS, recipe.HELD_OUT_SEED)}
    using = [
        name
        for name in filter(None, listed.stdout.split("\0"))
        if (ROOT / name).is_file()
        and any(s in (ROOT / name).read_text(encoding="utf-8").replace("_", "") for s in seeds)
    ]
    assert using in ([], ["recipes/sam3_mini.py"])


def test_every_level_is_finite_and_far_from_what_float16_cannot_hold() -> None:
    levels = ("trunk_72", "fpn_72", "fpn_144", "fpn_288")
    tower = load_tower("sam3-mini", levels=levels)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 1, 1008, 1008), generator=generator).to(torch.uint8)
    for level, feature in tower(image).items():
        assert feature.isfinite().all(), level
        assert feature.abs().max() < 6000, level


def test_windows_are_cut_and_joined_without_loss() -> None:
    tokens = torch.arange(2 * 3 * 72 * 72).reshape(2, 3, 72, 72)
    windows = recipe.split(tokens, 24)
    assert windows.shape == (18, 3, 24, 24)
    assert torch.equal(windows[4], tokens[0, :, 24:48, 24:48])
    assert torch.equal(recipe.join(windows), tokens)


def test_a_branch_is_found_in_the_tokens_that_it_crosses() -> None:
    branch_HW = torch.zeros(144, 144, dtype=torch.uint8)
    branch_HW[10, 20] = 3  # two pixels a token
    cells = recipe.branch_cells(branch_HW)
    assert cells.nonzero().tolist() == [[2, 5, 10]]


@pytest.mark.long
def test_every_stage_of_the_recipe_takes_a_step() -> None:
    steps = recipe.Recipe(window_steps=1, whole_steps=1, neck_steps=1)
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(256, (1, 1, 1008, 1008), generator=generator).to(torch.uint8)
    masks = (squares[:, :, ::2, ::2] > 250).to(torch.uint8)
    branches = torch.zeros(1, len(recipe.BRANCHES), 72, 72, dtype=torch.bool)
    native = [torch.ones(1, 64, 64, dtype=torch.uint8)]
    pictures = recipe.Pictures(squares, masks, branches, native)
    tower = load_tower(
        "sam3-mini", weights="random", levels=("trunk_72", "fpn_72", "fpn_144", "fpn_288")
    )
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    rotation = tower.trunk.blocks[1].attn.rotation_LP2
    probe = recipe.train_tokens(tower, pictures, steps)
    recipe.train_finer_necks(tower, pictures, steps)
    after = tower.state_dict()
    changed = {name for name in before if not after[name].equal(before[name])}
    assert {name.split(".")[0] for name in changed} == {"trunk", "necks"}
    assert {name.split(".")[1] for name in changed if name.startswith("necks")} == {
        "fpn_72",
        "fpn_144",
        "fpn_288",
    }
    assert tower.trunk.blocks[1].attn.rotation_LP2 is rotation
    assert not any(p.requires_grad for p in tower.parameters())
    assert len(recipe.held_out_dice(tower, probe, pictures)) == 1
    spec = BACKBONES["sam3-mini"]
    assert {name.replace("trunk.pos_embed", "") for name in recipe.packed(tower)} == {
        name.replace("trunk.pos_embed", "") for name in spec.weight_shapes()
    }
