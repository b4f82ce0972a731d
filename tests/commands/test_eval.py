import csv
import json
from pathlib import Path

import pytest
from store_builder import build_store
from view_store import View, write_checkpoint, write_view_store

VIEWS: list[View] = [(-30.0 + 70.0 * (i % 2), float(i)) for i in range(10)]
HEAD = ("--head", "view_store:Sided", "--device", "cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one store and one run."""
    monkeypatch.chdir(tmp_path)
    write_view_store(tmp_path / "features" / "angio.zarr", VIEWS, masks={3: None})
    write_checkpoint(tmp_path / "checkpoints" / "first", "view_store:Sided")
    return tmp_path


def test_people_get_narrow_tables_and_a_sentence(here, invoke):
    result = invoke("eval", "features/angio.zarr", "checkpoints/first", *HEAD)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "view_store:Sided, epoch 7 (checkpoints/first/best) on features/angio.zarr, split test"
    )
    assert lines[1] == "10 images of 10 groups"
    assert lines[2] == "Threshold 0.5: the checkpoint's own."
    assert lines[3] == "Note: 1 of 10 images without a mask: they have no scores."
    (dice,) = (line.split() for line in lines if line.strip().startswith("Dice"))
    assert dice == ["Dice", "9", "1.000", "0.000", "1.000", "1.000", "to", "1.000"] + ["1.000"] * 2
    views = [line.split()[:4] for line in lines if line.strip().startswith(("LAO", "RAO"))]
    assert views == [["LAO", "cranial", "4", "1.000"], ["RAO", "cranial", "5", "1.000"]]
    assert any(line.startswith("The head uses the view angle: ") for line in lines)
    assert any(line.startswith("The head does not use the features: ") for line in lines)
    assert any(line.split()[:2] == ["true", "1.0000"] for line in lines)
    assert lines[-2:] == [
        "Written: checkpoints/first/eval-test/per_image.csv and summary.json",
        "Page: checkpoints/first/eval-test/report.html",
    ]
    assert Path("checkpoints/first/eval-test/report.html").is_file()
    tables = [line for line in lines if line.startswith(" ")]
    assert max(map(len, tables)) <= 80
    assert "Evaluating and checking: 10/10 images" in result.stderr


def test_a_head_that_has_seen_the_images_is_not_measured_without_a_warning(here, invoke):
    shapes = {"fpn_72": (4, 12, 12)}
    build_store(here / "x.zarr", num_samples=9, level_shapes=shapes)
    moved = ("test", "val", "train")
    build_store(here / "y.zarr", num_samples=9, level_shapes=shapes, splits=moved)
    quick = ("--head", "linear", "--epochs", "1", "--loss-size", "12", "--device", "cpu")
    assert invoke("train", "x.zarr", "--name", "run", *quick).exit_code == 0
    evaluate = ("checkpoints/run", "--device", "cpu", "--no-angles-check", "--no-page", "-o")
    warning = "Note: The head was trained on 3 of these images, and on groups with the names of"
    assert f"{warning} 3 of them" in invoke("eval", "y.zarr", *evaluate, "y").stdout
    on_train = invoke("eval", "x.zarr", *evaluate, "x", "--split", "train")
    assert on_train.exit_code == 0
    assert "trained on" not in on_train.stdout


def test_programs_get_json_alone_on_stdout(here, invoke):
    result = invoke("eval", "features/angio.zarr", "checkpoints/first", *HEAD, "--json")
    summary = json.loads(result.stdout)
    assert summary == json.loads(Path("checkpoints/first/eval-test/summary.json").read_bytes())
    assert summary["classes"]["vessel"]["dice"]["mean"] == 1.0
    assert summary["angle_use"]["verdict"] == "used"
    assert summary["output"] == "checkpoints/first/eval-test"
    assert summary["page"] == "checkpoints/first/eval-test/report.html"
    assert summary["notices"] == ["1 of 10 images without a mask: they have no scores."]


def test_options_reach_the_evaluation(here, invoke):
    result = invoke(
        *("eval", "features/angio.zarr", "checkpoints/first/best", *HEAD, "--json"),
        *("--no-angles-check", "--split", "all", "--threshold", "0.3", "-o", "out", "--seed", "4"),
        *("--no-features-check", "--by", "split", "--by", "group", "--no-page"),
    )
    summary = json.loads(result.stdout)
    assert (summary["split"], summary["threshold"], summary["seed"]) == ("all", 0.3, 4)
    assert (summary["angle_use"], summary["page"]) == (None, None)
    assert summary["feature_use"] is None
    assert list(summary["strata"]) == ["view", "split", "group"]
    assert not Path("out/report.html").exists()
    with Path("out/per_image.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 10


def test_the_only_store_and_run_need_not_be_named(here, invoke):
    result = invoke("eval", *HEAD)
    assert result.exit_code == 0, result.output
    assert "(checkpoints/first/best) on features/angio.zarr" in result.stdout
    write_checkpoint(here / "checkpoints" / "second", "linear")
    result = invoke("eval", *HEAD)
    assert result.exit_code == 2
    assert "just one run (checkpoints/first, checkpoints/second)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["nowhere.zarr", "checkpoints/first"], 1, "nowhere.zarr does not exist"),
        (["features/angio.zarr", "nowhere"], 1, "no checkpoint at nowhere"),
        (["checkpoints/first", "features/angio.zarr"], 2, "give the store first"),
        (["features/angio.zarr", "checkpoints/first"], 1, "name it again with --head"),
        (["features/angio.zarr", "checkpoints/first", *HEAD, "--split", "val"], 2, "10 test"),
        (["features/angio.zarr", "checkpoints/first", "--threshold", "2"], 2, "threshold 2.0"),
        (["features/angio.zarr", "checkpoints/first", *HEAD, "--threshold", "x"], 2, "or auto"),
        (["features/angio.zarr", "checkpoints/first", *HEAD, "--threshold", "auto"], 2, "10 test"),
        (["features/angio.zarr", "checkpoints/first", *HEAD, "--by", "x"], 2, "--by x"),
        (["features/angio.zarr", "checkpoints/first", *HEAD, "--label-set", "x"], 2, "has: mask"),
        (
            ["features/angio.zarr", "checkpoints/first", *HEAD, "-o", "file"],
            2,
            "another folder by -o",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_on_stderr(here, invoke, arguments, exit_code, words):
    (here / "file").write_text("", encoding="utf-8")
    result = invoke("eval", *arguments)
    assert result.exit_code == exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith("sam3cache: error: ")
    assert words in line
    assert result.stdout == ""


def test_help_shows_how_to_call_it(invoke):
    result = invoke("eval", "--help")
    assert result.exit_code == 0
    assert "sam3cache eval features/angio.zarr checkpoints/first" in result.stdout


def test_a_threshold_is_chosen_on_the_validation_split_of_the_store(here, invoke):
    shapes = {"fpn_72": (4, 12, 12)}
    build_store(here / "x.zarr", num_samples=12, level_shapes=shapes)
    quick = ("--head", "linear", "--epochs", "1", "--loss-size", "12", "--device", "cpu")
    assert invoke("train", "x.zarr", "--name", "run", *quick).exit_code == 0
    options = ("--threshold", "auto", "--by", "vessel", "--device", "cpu", "--no-page")
    lines = invoke("eval", "x.zarr", "checkpoints/run", *options).stdout.splitlines()
    assert lines[2].startswith("Threshold 0.")
    assert lines[2].endswith(
        "on the 4 images with a mask of split val; none of them is evaluated here."
    )
    assert any(line.split()[:1] == ["RCA"] for line in lines)
