"""``sam3cache train`` as it is typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from store_builder import build_store
from variant_store import VARIANT, build_variant_store

from sam3cache.heads.checkpoint import read_record

Invoke = Callable[..., Result]

QUICK = ("--epochs", "1", "--loss-size", "24", "--device", "cpu")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small store in features/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    return build_store(Path("features/x.zarr"), num_samples=7, level_shapes={"fpn_72": (8, 6, 6)})


def test_the_only_store_is_found_and_the_summary_says_what_comes_next(
    store: Path, invoke: Invoke
) -> None:
    result = invoke("train", "--head", "film-conv", *QUICK)
    assert result.exit_code == 0
    assert "Checkpoint: checkpoints/film-conv/best" in result.stdout
    assert "Next: sam3cache eval features/x.zarr checkpoints/film-conv" in result.stdout
    assert "1 samples without a mask were left out" in result.stdout
    assert "Samples: ram, shared with other processes; " in result.stdout
    assert "Training film-conv on 2 samples; validation on 2." in result.stderr
    assert "Training: 2/2 images" in result.stderr
    assert ("Note: a Dice near 0" in result.stdout) == ("Dice 0.00" in result.stdout)
    assert Path("checkpoints/film-conv/best/model.safetensors").exists()


def test_json_on_stdout_is_the_summary_alone(store: Path, invoke: Invoke) -> None:
    result = invoke("train", store, "--head", "linear", "--name", "floor", *QUICK, "--json")
    summary = json.loads(result.stdout)
    assert summary["best_checkpoint"] == "checkpoints/floor/best"
    assert summary["epochs"] == 1
    assert 0 <= summary["best_dice"] <= 1


def test_options_of_the_head_reach_it(store: Path, invoke: Invoke) -> None:
    options = ("--head", "film-conv", "--head-option", "widths=[6,4]")
    options += ("--head-option", "embedding_dim=32")
    assert invoke("train", store, *options, *QUICK).exit_code == 0
    record = json.loads(Path("checkpoints/film-conv/best/checkpoint.json").read_text("utf-8"))
    assert record["head_options"] == {"widths": [6, 4], "embedding_dim": 32}


HEAD_OF_MINE = """
from torch import nn

from sam3cache.heads import Head


class Plain(Head):
    needs = ("fpn_72",)

    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)

    def forward(self, batch):
        return self.layer(self.feature(batch, "fpn_72"))
"""


def test_of_a_head_of_ones_own_the_next_command_names_it(
    store: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("heads_of_mine.py").write_text(HEAD_OF_MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(".")
    result = invoke("train", store, "--head", "heads_of_mine:Plain", "--name", "own", *QUICK)
    assert result.exit_code == 0, result.output
    (line,) = [text for text in result.stdout.splitlines() if text.startswith("Next: ")]
    assert line.endswith("eval features/x.zarr checkpoints/own --head heads_of_mine:Plain")
    command = line.removeprefix("Next: sam3cache ").split()
    measured = invoke(*command, "--device", "cpu", "--no-page")
    assert measured.exit_code == 0, measured.output


def test_variants_that_are_drawn_from_are_told_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    store = build_variant_store(Path("features/x.zarr"))
    told = "on 8 samples and 8 variants of them (--variants none leaves them out)"
    for variants, used in (("all", [VARIANT]), ("none", [])):
        options = ("--head", "linear", "--variants", variants, "--name", variants)
        result = invoke("train", store, *options, *QUICK)
        assert result.exit_code == 0, result.output
        for text in (result.stdout, result.stderr):
            assert (told in text) == bool(used)
        assert read_record(Path(f"checkpoints/{variants}/best")).settings["variants_used"] == used


def test_many_runs_end_in_a_table_and_what_failed_is_listed(store: Path, invoke: Invoke) -> None:
    Path("heads.toml").write_text(
        '[[experiment]]\nname = "floor"\nhead = "linear"\n'
        '[[experiment]]\nname = "wild"\nhead = "linear"\n'
        "learning_rate = 1e37\nweight_decay = 1e3\n",
        encoding="utf-8",
    )
    options = ("--experiments", "heads.toml", "--folds", "2", *QUICK)
    result = invoke("train", store, *options)
    assert result.exit_code == 3
    (line,) = [text for text in result.stdout.splitlines() if text.startswith("floor")]
    assert line.split()[1] == "2/2"
    assert "±" in line
    assert "Set aside, 2 of 4 runs:" in result.stdout
    assert "wild-fold0: weights became infinite" in result.stdout
    assert "Label set" not in result.stdout, "all are of one"
    assert "Training on 2 samples in fold 0, label set mask; validation on" in result.stderr
    summary = json.loads(Path("checkpoints/heads/summary.json").read_text("utf-8"))
    assert [run["status"] for run in summary["runs"]] == ["done"] * 2 + ["failed"] * 2
    assert Path("checkpoints/heads/floor-fold1/best/model.safetensors").exists()
    again = invoke("train", store, *options)
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr


def test_settings_without_an_option_of_their_own_are_set_by_name(
    store: Path, invoke: Invoke
) -> None:
    options = ("--head", "linear", "--micro-batch", "1", "--ema", "0.9", "--augment", "noise")
    options += ("--set", "weight_decay=0.05", "--set", "order_seed=3", "--loss", "focal")
    assert invoke("train", store, *options, *QUICK).exit_code == 0
    record = json.loads(Path("checkpoints/linear/best/checkpoint.json").read_text("utf-8"))
    kept = ("micro_batch", "ema", "augment", "weight_decay", "order_seed", "loss")
    assert [record["settings"][name] for name in kept] == [1, 0.9, ["noise"], 0.05, 3, "focal"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (["features/y.zarr"], 1, "features/y.zarr does not exist"),
        (["features/x.zarr", "--epochs", "0"], 2, "epochs is 0: expected at least 1"),
        (["features/x.zarr", "--head", "unet"], 2, "no head is named 'unet'"),
        (
            ["features/x.zarr"],
            1,
            "head film-detail needs image_1008, which is not among the store's levels (fpn_72); "
            "run `sam3cache extract` with --levels fpn_72,image_1008, or take --head film-conv or "
            "linear",
        ),
        (["features/x.zarr", "--head-option", "wide"], 2, "expected NAME=VALUE"),
        (["features/x.zarr", "--set", "epochs=3"], 2, "--set epochs: no such setting"),
        (["features/x.zarr", "--set", "warmup_epochs=x"], 2, "warmup_epochs is 'x'"),
        (["features/x.zarr", "--micro-batch", "few"], 2, "expected auto or a number"),
        (["features/x.zarr", "--experiments", "no.toml"], 2, "no.toml does not exist; write the"),
        (["features/x.zarr", "--head", "linear", "--folds", "9"], 2, "9 folds need as many groups"),
        (["features/x.zarr", "--head", "linear", "--variants", "rot10"], 2, "no variant 'rot10'"),
        (
            ["features/x.zarr", "--head", "linear", "--set", "class_weights=balanced"],
            2,
            "class_weights is balanced, which needs several classes: label set mask has vessel",
        ),
        (
            ["features/x.zarr", "--head", "linear", "--augment", "photometric"],
            2,
            "photometric changes image_1008 alone, which head linear does not read (it reads fpn",
        ),
        (["features/x.zarr", "--head", "linear", "--resume"], 2, "there is no run to resume"),
        (
            ["features/x.zarr", "--head", "linear", "--loss", "focal", "--bce-weight", "0.3"],
            2,
            "bce_weight is 0.3, which loss focal does not have; leave it out ",
        ),
        (["features/x.zarr", "--head", "linear", "--folds", "-1"], 2, "folds is -1: expected 0"),
        (["features/x.zarr", "--head", "linear", "--folds", "1"], 2, "folds is 1: expected 0"),
        (["features/x.zarr", "--head", "linear", "--seeds", "0"], 2, "seeds is 0: expected at"),
        (["features/x.zarr", "--head", "linear", "--seeds", "-1"], 2, "seeds is -1: expected at"),
    ],
)
def test_a_mistake_is_answered_by_one_line(
    store: Path, invoke: Invoke, arguments: list[str], exit_code: int, expected: str
) -> None:
    result = invoke("train", *arguments)
    assert result.exit_code == exit_code
    assert result.stderr.startswith("sam3cache: error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_cuda_is_a_device_of_one_run_and_of_several(store: Path, invoke: Invoke) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it would train there")
    for several in ((), ("--seeds", "2")):
        result = invoke("train", store, "--head", "linear", "--device", "cuda", *several)
        assert result.exit_code == 2
        assert "device cuda:0 is not there" in result.stderr


def test_a_run_and_a_folder_of_runs_never_share_a_name(store: Path, invoke: Invoke) -> None:
    linear = ("--head", "linear", *QUICK)
    inside = invoke("train", store, *linear, "-o", "checkpoints/both", "--name", "first")
    assert inside.exit_code == 0, inside.output
    for option in ("--overwrite", "--resume"):
        result = invoke("train", store, *linear, "--name", "both", option)
        assert result.exit_code == 2
        assert "checkpoints/both holds 1 runs (first) and is none itself; choose" in result.stderr
    result = invoke(
        *("train", store, *linear, "-o", "checkpoints/both", "--name", "first"),
        *("--seeds", "2", "--overwrite"),
    )
    assert result.exit_code == 2
    assert "checkpoints/both/first is a single run, and not a folder for several" in result.stderr
    assert Path("checkpoints/both/first/best/model.safetensors").exists()


@pytest.mark.parametrize("num_stores", [0, 2])
def test_without_a_store_there_must_be_just_one_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke, num_stores: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(num_stores):
        Path(f"features/{number}.zarr").mkdir(parents=True)
    found = "none" if num_stores == 0 else "features/0.zarr, features/1.zarr"
    result = invoke("train")
    assert result.exit_code == 2
    assert f"features/ does not hold just one ({found})" in result.stderr


def test_every_option_stands_under_a_heading_of_the_help(invoke: Invoke) -> None:
    text = invoke("train", "--help").stdout
    for heading in ("What to train:", "How:", "Many runs:", "Where it runs:", "The run:"):
        assert heading in text
    other = text[text.index("\nOther:") :]
    assert other.count("--") == 1, "an option is in no group"
