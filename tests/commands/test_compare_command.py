"""``sam3cache compare`` as it is typed, on heads that were trained for it."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from store_builder import build_store

from sam3cache.training import TrainConfig, train

Invoke = Callable[..., Result]


def run(name: str, **settings: Any) -> None:
    train(
        TrainConfig(
            *("features/x.zarr", name, "linear"),
            **{"batch_size": 4, "loss_size_px": 24, "device": "cpu", "epochs": 1, **settings},
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 images, and runs: one of an epoch, two seeds of four epochs, two folds.

    They lie where `sam3cache train --seeds 2` and `--folds 2` would put them.
    """
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shape = {"fpn_72": (8, 12, 12)}
        build_store(Path("features/x.zarr"), num_samples=24, level_shapes=shape)
        run("poor")
        for k in range(2):
            good = {"epochs": 4, "learning_rate": 0.01}
            run(f"good-seed{k}", output="checkpoints/good", seed=k, **good)
            run(f"parts-fold{k}", output="checkpoints/parts", folds=2, fold=k)
    return root


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(invoke: Invoke, *arguments: str) -> Result:
    return invoke("compare", *arguments, "--device", "cpu")


def test_trained_runs_are_evaluated_compared_and_told_in_a_sentence(
    here: Path, invoke: Invoke
) -> None:
    result = compare(invoke, "checkpoints/poor", "checkpoints/good")
    assert result.exit_code == 0, result.output
    for name in ("poor", "good-seed0", "good-seed1"):
        assert f"Evaluating {name}: 8/8 images" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Split test: 8 images of 8 groups, against poor"
    (dice,) = (line.split() for line in lines if line.strip().startswith("Dice "))
    assert dice[1] == "7"  # The last image has no mask.
    (sentence,) = (line for line in lines if "over 7 images of 7 groups" in line)
    assert sentence.startswith(("good is ", "Whether good is ", "good and poor are alike"))
    assert lines[-2:] == [
        "Written: checkpoints/compare-test-poor-good/differences.csv, differences.svg and "
        "comparison.json",
        "Page: checkpoints/compare-test-poor-good/report.html",
    ]
    for name in ("differences.csv", "differences.svg", "comparison.json", "report.html"):
        assert (here / "checkpoints" / "compare-test-poor-good" / name).is_file()
    assert max(len(line) for line in lines if line.startswith(" ")) <= 80


def test_programs_get_json_alone_on_stdout(here: Path, invoke: Invoke) -> None:
    result = compare(
        *(invoke, "checkpoints/good", "checkpoints/poor", "--baseline", "poor", "--json"),
        *("--no-page", "-o", "out", "--split", "all", "--seed", "4"),
    )
    record = json.loads(result.stdout)
    assert record == json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))
    assert (record["baseline"], record["split"], record["seed"]) == ("poor", "all", 4)
    assert (record["page"], Path("out/report.html").exists()) == (None, False)
    (pair,) = record["comparisons"]
    means = []
    for run in ("good-seed0", "good-seed1"):
        folder = Path("checkpoints/good", run, "eval-all")
        with (folder / "per_image.csv").open(encoding="utf-8", newline="") as file:
            dice = [float(line["dice"]) for line in csv.DictReader(file) if line["dice"]]
        means.append(sum(dice) / len(dice))
    assert pair["dice"]["num_images"] == 23
    assert pair["dice"]["other"] == pytest.approx(sum(means) / 2)


def test_folds_are_compared_on_what_was_held_out_of_each(here: Path, invoke: Invoke) -> None:
    """All images of the splits train and val, each by the head that has not seen it."""
    shutil.copytree("checkpoints/parts", "checkpoints/copy")
    result = compare(invoke, "checkpoints/parts", "checkpoints/copy", "--split", "val", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["num_images"] == 16
    assert [len(one["runs"]) for one in record["experiments"]] == [2, 2]
    assert record["comparisons"][0]["verdict"] == "equal"
    assert not any("was trained on" in sentence for sentence in record["notices"])
    held_out = []
    for fold in range(2):
        folder = Path(f"checkpoints/parts/parts-fold{fold}")
        summary = json.loads((folder / "eval-val" / "summary.json").read_text(encoding="utf-8"))
        assert summary["num_seen_in_training"] == summary["num_in_training_groups"] == 0
        held_out.append(summary["num_images"])
    assert sum(held_out) == 16


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["checkpoints/poor"], 2, "poor is all there is to compare"),
        (["checkpoints/poor", "nowhere"], 2, "nowhere holds nothing to compare"),
        (["checkpoints/poor", "checkpoints/good", "--baseline", "x"], 2, "one of poor, good"),
        (["checkpoints/poor", "checkpoints/good", "--store", "no.zarr"], 1, "no.zarr does not"),
        (["checkpoints/poor", "checkpoints/good", "-o", "features"], 2, "name another folder"),
        (["checkpoints/poor", "checkpoints/good", "--batch-size", "0"], 2, "batch size 0"),
    ],
)
def test_what_cannot_be_compared_is_one_line_on_stderr(
    here: Path, invoke: Invoke, arguments: list[str], exit_code: int, words: str
) -> None:
    result = compare(invoke, *arguments)
    assert result.exit_code == exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith("sam3cache: error: ")
    assert words in line
    assert result.stdout == ""


def test_help_shows_how_to_call_it(invoke: Invoke) -> None:
    result = invoke("compare", "--help")
    assert result.exit_code == 0
    assert "sam3cache compare checkpoints/film-conv checkpoints/linear" in result.stdout
