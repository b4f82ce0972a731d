"""Heads as files of torch.export, run as somebody would who has nothing else."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from head_runs import levels_of, levels_of_nothing, write_run
from torch import Tensor, nn

from sam3cache.errors import ConfigError, HeadError
from sam3cache.features import open_store
from sam3cache.geometry import Letterbox
from sam3cache.heads import HEADS, Head, load_checkpoint
from sam3cache.inference import PredictConfig, export_head, predict_images
from sam3cache.inference.export import RECORD_IN_FILE, TOLERANCE
from sam3cache.records import Batch

NAN = math.nan
DOCUMENT = Path(__file__).parents[2] / "docs" / "predict.md"
SNIPPET = re.findall(
    r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
)[-1]


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


def carried(
    steps: list[str], logits_KSS: np.ndarray, content_px: list[int], size_px: tuple[int, int]
) -> np.ndarray:
    """Do with logits what the record says, one line of cells at a time."""
    code = compile("\n".join(steps), "head.json", "exec")
    for axis, (content, num_pixels) in enumerate(zip(content_px, size_px, strict=True), start=1):

        def along(line: np.ndarray, content: int = content, num_pixels: int = num_pixels):
            names = {"logits": line, "content_px": content, "num_pixels": num_pixels}
            exec(code, dict(vars(np)), names)
            return names["logits"]

        logits_KSS = np.apply_along_axis(along, axis, logits_KSS)
    return logits_KSS


def test_documented_steps_and_recorded_ones_lead_to_what_predict_writes(
    store_path: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(levels_of(open_store(store_path)), tmp_path / "run", "film-conv")
    steps = export_head(run, "head.pt2").record["logits"]["to_picture"]
    predict_images(PredictConfig(run, (pictures,), tmp_path, store=store_path, probabilities="npy"))
    here: dict = {}
    text = SNIPPET.replace("features/angio.zarr", store_path.as_posix()).replace("[:2]", "[:3]")
    exec(compile(text, str(DOCUMENT), "exec"), here)
    assert here["sizes"] == [(96, 128), (128, 96), (112, 112)]
    for number, size_px in enumerate(here["sizes"]):
        expected = np.load(tmp_path / "probabilities" / f"s0{number}.npy")
        found = here["pictures"][number].sigmoid().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        recorded = carried(steps, here["logits"][number].numpy(), here["content"][number], size_px)
        np.testing.assert_allclose(recorded, here["pictures"][number], rtol=0, atol=1e-5)
    # Pictures that end within a cell, and one that is thinner than a cell.
    logits = torch.randn(2, *here["logits"].shape[2:], generator=torch.Generator().manual_seed(0))
    for size_px in ((97, 131), (480, 333), (2, 700)):
        box = Letterbox.fit(*size_px)
        content_px = [box.content_height_px, box.content_width_px]
        expected = box.logits_to_grid(logits, *size_px)
        found = here["to_picture"](logits, content_px, size_px)
        assert (found - expected).abs().max() <= 1e-5
        np.testing.assert_allclose(
            carried(steps, logits.numpy(), content_px, size_px), expected, rtol=0, atol=1e-5
        )


def test_a_threshold_that_is_given_is_recorded_and_a_binary_mask_called_so(tmp_path: Path) -> None:
    run = write_run(levels_of_nothing(), tmp_path / "run", "linear")
    record = export_head(run, tmp_path / "head.pt2", threshold=0.35).record
    assert (record["threshold"], record["decide"]) == (0.35, "binary: sigmoid(logit) >= threshold")
    with pytest.raises(ConfigError, match=r"threshold 1\.5: expected"):
        export_head(run, tmp_path / "other.pt2", threshold=1.5)
    classes = ("LAD", "RCA")
    run = write_run(
        levels_of_nothing(), tmp_path / "run", "linear", task="multiclass", classes=classes
    )
    with pytest.raises(ConfigError, match="leave --threshold out"):
        export_head(run, tmp_path / "other.pt2", threshold=0.35)
    assert not (tmp_path / "other.pt2").exists()


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
    with pytest.raises(ConfigError, match=r"there is no folder .*absent; make it first"):
        export_head(run, tmp_path / "absent" / "head.pt2")
    assert not (tmp_path / "head.pt2").exists()
    assert not (tmp_path / "absent").exists()
    export_head(run, tmp_path / "head.pt2", overwrite=True)
    assert json.loads((tmp_path / "head.json").read_bytes())["format_version"] == 1
