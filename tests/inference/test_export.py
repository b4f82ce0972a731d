"""Heads as files of torch.export, run as somebody would who has nothing else."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from head_runs import levels_of_nothing, write_run
from torch import Tensor, nn

from sam3cache.errors import ConfigError, HeadError
from sam3cache.heads import HEADS, Head, load_checkpoint
from sam3cache.inference import export_head
from sam3cache.inference.export import RECORD_IN_FILE, TOLERANCE
from sam3cache.records import Batch

NAN = math.nan


def inputs_of(record: dict, num_images: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return noise as the record describes it, with known, half known and unknown angles."""
    random = torch.Generator().manual_seed(num_images)
    levels = {}
    for name, entry in record["levels"].items():
        shape = (num_images, *entry["shape"][1:])
        if entry["dtype"] == "uint8":
            levels[name] = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        else:
            levels[name] = 2 * torch.randn(shape, generator=random)
    angles = torch.tensor([[NAN, NAN], [40.0, NAN], [-170.0, 80.0], [0.0, 0.0], [NAN, -5.0]])
    return levels, angles[:num_images], torch.full((num_images, 2), 1008)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_same_logits_once_exported_for_any_number_of_images(
    tmp_path: Path, head: str
) -> None:
    run = write_run(
        levels_of_nothing(), tmp_path / "run", head, task="multiclass", classes=("LAD", "RCA")
    )
    made = export_head(run, tmp_path / "head.pt2")
    record = json.loads(made.record_path.read_bytes())
    assert record["max_abs_difference"] == made.max_abs_difference <= TOLERANCE
    eager, info = load_checkpoint(run / "best")
    module = torch.export.load(made.path).module()
    for num_images in (1, 4):
        levels, angles, content = inputs_of(record, num_images)
        with torch.no_grad():
            expected = eager(Batch(levels, angles, content))
            found = module(levels, angles, content)
        assert list(found.shape[1:]) == record["logits"]["shape"][1:]
        assert not found.isnan().any()
        assert (found - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())
        # The angles are among what it reads, unless the head does not read them.
        if num_images == 1:
            other = module(levels, angles.nan_to_num(90.0), content)
            assert torch.equal(other, found) is not hasattr(eager, "view_encoder")
    assert (record["task"], record["classes"]) == (info.task, ["LAD", "RCA"])
    assert (record["preprocessing"], record["tower"]) == ({"pad": 0}, {"weights_sha256": "w"})


def test_the_record_lies_in_the_file_as_well(tmp_path: Path) -> None:
    made = export_head(
        write_run(levels_of_nothing(), tmp_path / "run", "linear"), tmp_path / "head.pt2"
    )
    inside = {RECORD_IN_FILE: ""}
    torch.export.load(made.path, extra_files=inside)
    assert json.loads(inside[RECORD_IN_FILE]) == json.loads(made.record_path.read_bytes())
    # No example of megabytes in it, for a head of 257 weights.
    assert made.path.stat().st_size < 100_000


def test_it_runs_where_there_is_no_sam3cache(tmp_path: Path) -> None:
    run = write_run(levels_of_nothing(), tmp_path / "run", "film-conv")
    made = export_head(run, tmp_path / "head.pt2")
    program = """
import json, sys, torch
sys.modules["sam3cache"] = None
record = json.load(open("head.json", encoding="utf-8"))
head = torch.export.load("head.pt2").module()
levels = {name: torch.ones(2, *entry["shape"][1:]) for name, entry in record["levels"].items()}
logits = head(levels, torch.tensor([[30.0, float("nan")]] * 2), torch.full((2, 2), 1008))
print(json.dumps(logits.sum().item()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, _ = load_checkpoint(run / "best")
    shape = made.record["levels"]["fpn_72"]["shape"][1:]
    angles = torch.tensor([[30.0, NAN]] * 2)
    with torch.no_grad():
        expected = head(Batch({"fpn_72": torch.ones(2, *shape)}, angles, torch.zeros(2, 2)))
    assert json.loads(done.stdout) == pytest.approx(expected.sum().item(), rel=1e-4)


class Own(Head):
    """A head of a user's own, which cuts the padding off."""

    needs = ("fpn_72",)

    def __init__(self, level_shapes: dict[str, tuple[int, int, int]], *, num_classes: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)

    def forward(self, batch: Batch) -> Tensor:
        rows = torch.arange(18, device=batch.content_B2.device)
        inside = rows[None, :, None] * 56 < batch.content_B2[:, 0, None, None]
        logits: Tensor = self.conv(self.feature(batch, "fpn_72"))
        return torch.where(inside[:, None], logits, -9.0)


class Wilful(Own):
    """Does something else for each number of images, and looks at values."""

    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        if float(logits.max()) > 0:
            logits = logits + 1
        return logits


class Random(Own):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return logits + torch.randn_like(logits)


def test_a_head_of_ones_own_is_exported_with_what_it_reads(tmp_path: Path) -> None:
    run = write_run(levels_of_nothing(), tmp_path / "run", "test_export:Own")
    made = export_head(run, tmp_path / "own.pt2", head="test_export:Own")
    levels, angles, content = inputs_of(dict(made.record), 2)
    content[0, 0] = 504
    logits = torch.export.load(made.path).module()(levels, angles, content)
    padded = (logits == -9).all(dim=-1)[:, 0].numpy()
    np.testing.assert_array_equal(padded, [[row >= 9 for row in range(18)], [False] * 18])


@pytest.mark.parametrize("head", ["test_export:Wilful", "test_export:Random"])
def test_a_head_that_cannot_be_exported_is_told_in_one_line_and_nothing_is_written(
    tmp_path: Path, head: str
) -> None:
    run = write_run(levels_of_nothing(), tmp_path / "run", head)
    with pytest.raises(HeadError, match=f"head {head} ") as caught:
        export_head(run, tmp_path / "x.pt2", head=head)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_files_that_are_there_stay_unless_told_otherwise(tmp_path: Path) -> None:
    run = write_run(levels_of_nothing(), tmp_path / "run", "linear")
    (tmp_path / "head.json").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"head\.json is there already"):
        export_head(run, tmp_path / "head.pt2")
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        export_head(run, tmp_path / "head.onnx")
    assert not (tmp_path / "head.pt2").exists()
    export_head(run, tmp_path / "head.pt2", overwrite=True)
    assert json.loads((tmp_path / "head.json").read_bytes())["format_version"] == 1
