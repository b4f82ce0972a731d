"""benchmarks/tower.py counts work as PyTorch does, and its bounds decide its exit status."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from towers import ALL_LEVELS, UNIT, random_images

from sam3cache.backbone import BACKBONES, load_tower

# As Python does for a program: its folder comes first.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
program = importlib.import_module("tower")


@pytest.mark.parametrize("levels", [*((level,) for level in ALL_LEVELS), ALL_LEVELS], ids=str)
def test_work_is_counted_as_pytorch_counts_it(levels: tuple[str, ...]) -> None:
    tower = load_tower(UNIT, weights="random", levels=levels)
    image = random_images(UNIT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tower(image)
    assert counter.get_total_flops() == len(image) * program.tower_flop(UNIT, levels)


def test_sam3_takes_as_much_work_as_is_known() -> None:
    flop = program.tower_flop(BACKBONES["sam3"], program.NECK_LEVELS)
    assert round(flop / 1e12, 2) == 5.61


@pytest.mark.parametrize(
    ("on_gpu", "images_per_s", "missed"),
    [
        # sam3 in float32 and autocast; ours in fp32, bf16, and compiled. 5.61 TFLOP an image.
        (False, (0.05, 0.08, 0.05, 0.10, 0.10), []),
        (False, (0.05, 0.08, 0.05, 0.08, 0.10), [0]),
        (True, (9.0, 25.0, 9.0, 70.0, 88.0), []),
        (True, (9.0, 25.0, 9.0, 60.0, 70.0), [0, 1]),
        (True, (9.0, 35.0, 9.0, 90.0, 60.0), [1]),
    ],
)
def test_speed_is_bounded_at_full_size(
    on_gpu: bool, images_per_s: tuple[float, ...], missed: list[int]
) -> None:
    options = program.parse_options(["--full", "--device", "cpu"])
    options.on_gpu = on_gpu
    names = (
        program.FP32,
        program.AUTOCAST,
        "sam3cache, fp32",
        "sam3cache, bf16",
        "sam3cache, bf16+compile",
    )
    bounds = program.bounds_of_speed(
        options,
        program.tower_flop(BACKBONES["sam3"], program.NECK_LEVELS),
        dict(zip(names, images_per_s, strict=True)),
        {torch.bfloat16: 700e12},
    )
    assert [i for i, bound in enumerate(bounds) if not bound.holds] == missed


@pytest.mark.long
def test_the_tower_is_measured_and_its_bounds_decide_the_exit_status(tmp_path: Path) -> None:
    status = program.main(["--quick", "--device", "cpu", "--json", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert status == (0 if all(bound["holds"] for bound in measured["bounds"]) else 1)
    figures = measured["figures"]
    assert figures["errors"]["sam3cache, fp32"]["fpn_72"][0] <= 2e-5
    assert all(rate > 0 for rate in figures["images_per_s"].values())
    assert [row[0] for row in measured["rows"]] == list(figures["images_per_s"])
