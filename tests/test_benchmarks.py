"""The programs in benchmarks/ run, say what they missed, and the README says what they measured."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# What only serves the programs.
HELPERS = {"pictures", "reporting", "readme_table"}
PROGRAMS = sorted(path for path in BENCHMARKS.glob("*.py") if path.stem not in HELPERS)

# As Python does for a program: its folder comes first.
sys.path.insert(0, str(BENCHMARKS))
reporting = importlib.import_module("reporting")


def report(*bounds: bool) -> object:
    return reporting.Report(
        program="example",
        columns=("`what`", "images/s"),
        rows=(("ours", "8.3"), ("theirs", "0.041")),
        notes=["Noise."],
        bounds=[reporting.Bound("a claim", 1.0, holds) for holds in bounds],
        figures={},
        settings={},
        machine={
            "device": "cpu",
            "device_name": "A CPU (R)",
            "cpu": "A CPU (R)",
            "num_cores": 2,
            "num_threads": 2,
            "share_of_others": 0.3,
        },
        versions={"torch": "2.9"},
        date="2026-01-02T03:04",
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_explains_itself(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process, where what all of them import is imported once.
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(option in output for option in ("--quick", "--json FILE"))


def test_training_is_measured_and_its_bounds_decide_the_exit_status(tmp_path: Path) -> None:
    # In this process: importing MONAI again takes longer than all the rest.
    program = importlib.import_module("train")
    options = ("--quick", "--samples", "2", "--device", "cpu", "--workdir", str(tmp_path))
    status = program.main([*options, "--json", str(tmp_path)])
    (file,) = tmp_path.iterdir()  # the store is gone
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert status == (0 if all(bound["holds"] for bound in measured["bounds"]) else 1)
    assert len(measured["bounds"]) == 5
    assert measured["figures"]["loss_difference"] <= 1e-5
    assert len(measured["figures"]["cached_images_per_s"]) == 1
    assert measured["figures"]["in_loop_s_per_image"]["sam3-mini"][0] > 0
    assert measured["figures"]["validation_s"] > 0


def test_reading_is_measured_and_its_bounds_decide_the_exit_status(tmp_path: Path) -> None:
    program = importlib.import_module("store")
    options = ("--quick", "--samples", "3", "--workdir", str(tmp_path))
    status = program.main([*options, "--json", str(tmp_path)])
    (file,) = tmp_path.iterdir()  # what was read is gone
    measured = json.loads(file.read_text(encoding="utf-8"))
    assert status == (0 if all(bound["holds"] for bound in measured["bounds"]) else 1)
    warm = measured["figures"]["warm_gb_per_s"]
    assert all(len(rates) == 5 and min(rates) > 0 for rates in warm.values())
    assert len(measured["rows"]) == len(warm) == 13


@pytest.mark.parametrize(
    ("dice", "quick", "missed"),
    [
        # The default, without features, on random ones, film-conv, linear; two seeds each.
        (((0.82, 0.84), (0.78, 0.79), (0.77, 0.8), (0.5, 0.5), (0.3, 0.3)), False, []),
        (((0.79, 0.8), (0.7, 0.7), (0.7, 0.7), (0.5, 0.5), (0.3, 0.3)), False, [0]),
        # 0.03 and 0.00 above: 0.015 on average.
        (((0.83, 0.83), (0.8, 0.83), (0.7, 0.7), (0.82, 0.82), (0.3, 0.3)), False, [1, 3]),
        (((0.2, 0.2), (0.2, 0.2), (0.2, 0.2), (0.2, 0.2), (0.2, 0.2)), True, []),
    ],
)
def test_what_features_are_worth_is_judged_by_the_seeds_means(
    dice: tuple[tuple[float, ...], ...], quick: bool, missed: list[int]
) -> None:
    program = importlib.import_module("heads")
    scores = {
        contestant.label: program.Scores(list(values), [1.0, 1.0], 4_500_000, 13.3)
        for contestant, values in zip(program.CONTESTANTS, dice, strict=True)
    }
    report = program.report(
        program.parse_options(["--quick"] if quick else []),
        reporting.Machine("cpu"),
        {"10 patients, 5 epochs": scores},
    )
    assert [i for i, bound in enumerate(report.bounds) if not bound.holds] == missed
    assert len(report.bounds) == (2 if quick else 7)
    assert report.rows[1][4] == f"{(dice[0][0] + dice[0][1] - dice[1][0] - dice[1][1]) / 2:+.3f}"


@pytest.mark.parametrize(("bounds", "status"), [((), 0), ((True,), 0), ((True, False), 1)])
def test_a_missed_bound_fails(bounds: tuple[bool, ...], status: int) -> None:
    assert report(*bounds).publish(None) == status


def test_the_readme_says_what_the_newest_result_says(tmp_path: Path) -> None:
    report().publish(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["example-a-cpu-r-2026-01-02.json"]
    older = json.loads((tmp_path / "example-a-cpu-r-2026-01-02.json").read_text(encoding="utf-8"))
    older |= {"date": "2025-12-31T00:00", "rows": [["ours", "7"]]}
    (tmp_path / "example-another.json").write_text(json.dumps(older), encoding="utf-8")
    marks = "<!-- benchmark:{0} -->\n{1}<!-- /benchmark:{0} -->\n"
    readme = "Fast.\n" + marks.format("example", "stale\n") + marks.format("unmeasured", "stale\n")
    body = (
        "| `what` | images/s |\n| --- | ---: |\n| ours | 8.3 |\n| theirs | 0.041 |\n\n"
        "A CPU (R), 2 cores (2 threads), torch 2.9, 2026-01-02. Other programs took 30% of the "
        "processor meanwhile: it is faster alone.\nNoise.\n"
    )
    expected = "Fast.\n" + marks.format("example", body) + marks.format("unmeasured", "")
    assert reporting.with_results(readme, tmp_path) == expected


def test_the_readme_is_in_step_with_the_results() -> None:
    for page in reporting.PAGES:
        text = page.read_text(encoding="utf-8")
        assert reporting.with_results(text) == text, "run: python benchmarks/readme_table.py"
        for name in re.findall(r"<!-- benchmark:([\w-]+) -->", text):
            assert reporting.newest_result(name) is not None, f"nothing measured: {name}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "3 s"),
        (119, "119 s"),
        (120, "2 min"),
        (5400, "90 min"),
        (9000, "2.5 h"),
        (2e5, "2.3 days"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert reporting.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0413, "0.041"), (8.26, "8.3"), (152.0, "150"), (1.0, "1")]
)
def test_figures_have_two_significant_digits(value: float, text: str) -> None:
    assert reporting.significant(value) == text
