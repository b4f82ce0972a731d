"""Every figure on the page, in the summary and in the tables follows from the CSV beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_store import Drawn, write_page_store, write_run
from test_page import FROM_FEATURES, Page

from sam3cache.evaluation import EvalConfig, EvalResult, evaluate, mean_interval
from sam3cache.evaluation.scores import range_of

CLASSES = ("LAD", "LCX", "RCA")
VIEWS = [(30.0, 20.0), (35.0, -25.0), (-30.0, 25.0), (-28.0, -20.0), (None, None)]
# Of every view some, of every vessel pattern some, and of each kind of mask.
DRAWN = [
    Drawn(
        (3 * i) % 5,
        group=f"g{i // 2}",
        angles_deg=VIEWS[i % 5],
        has_mask=i != 7,
        is_empty=i == 11,
        extra={"pattern": ("left", "right", "")[i % 3], "spacing_mm": "0.25" if i < 9 else ""},
    )
    for i in range(14)
]
SHARES = ("dice", "iou", "precision", "recall", "cldice")
METRICS = (*SHARES, "hd95_px", "assd_px", "hd95_mm", "assd_mm")

Line = dict[str, str]


def read_csv(path: Path) -> list[Line]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=["multilabel", "multiclass"])
def evaluated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Page, EvalResult]:
    folder = tmp_path_factory.mktemp(request.param)
    task = request.param
    store = write_page_store(folder / "a.zarr", DRAWN, classes=CLASSES, task=task)
    num_planes = len(CLASSES) + (task == "multiclass")
    run = write_run(folder / "run", store, num_classes=num_planes, task=task)
    config = EvalConfig(store, run, head=FROM_FEATURES, by=("pattern", "split"))
    result = evaluate(replace(config, check_angles=False, check_features=False))
    assert result.page is not None
    return Page(result.page.read_text(encoding="utf-8")), result


@pytest.fixture
def page(evaluated: tuple[Page, EvalResult]) -> Page:
    return evaluated[0]


@pytest.fixture
def result(evaluated: tuple[Page, EvalResult]) -> EvalResult:
    return evaluated[1]


@pytest.fixture
def lines(result: EvalResult) -> list[Line]:
    return read_csv(result.output / "per_image.csv")


def values(lines: Iterable[Line], metric: str, class_name: str | None) -> tuple[np.ndarray, list]:
    """What each image has of a measure, over its classes or of one, and the images' groups."""
    by_image: dict[str, tuple[str, list[float]]] = {}
    for line in lines:
        if class_name in (None, line["class_name"]) and line[metric]:
            by_image.setdefault(line["id"], (line["group"], []))[1].append(float(line[metric]))
    return (
        np.array([np.mean(found) for _, found in by_image.values()]),
        [group for group, _ in by_image.values()],
    )


def full_row(lines: Iterable[Line], metric: str, class_name: str | None) -> list[str]:
    found, groups = values(lines, metric, class_name)
    interval = mean_interval(found, groups, 0, range_of(metric))
    assert interval is not None
    numbers = found.mean(), found.std(ddof=1), np.median(found), found.min(), found.max()
    mean, std, median, low, high = (f"{number:.3f}" for number in numbers)
    bounds = f"{interval.low:.3f} to {interval.high:.3f}"
    return [str(len(found)), mean, bounds, std, median, low, high]


def short_row(lines: Iterable[Line], class_name: str | None) -> list[str]:
    lines = list(lines)
    if class_name is None:
        num_counted = len({line["group"] for line in lines})
    else:
        num_counted = len(
            [
                line
                for line in lines
                if line["class_name"] == class_name and int(line["true_px"] or 0)
            ]
        )
    dice, of_groups = values(lines, "dice", class_name)
    interval = mean_interval(dice, of_groups, 0, (0.0, 1.0))
    others = [values(lines, metric, class_name)[0] for metric in ("cldice", "hd95_px", "assd_px")]
    return [
        str(len(dice)),
        str(num_counted),
        f"{dice.mean():.3f}",
        "–" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}",
        f"{np.median(dice):.3f}",
        *(f"{found.mean():.3f}" if len(found) else "–" for found in others),
    ]


def table(page: Page, first_title: str) -> dict[str, list[str]]:
    """The rows by name of the one table whose first column has a title."""
    (found,) = (rows for rows in page.tables if rows[0][0] == first_title)
    return {row[0]: row[1:] for row in found[1:]}


def test_the_tables_of_all_measures_are_those_of_the_csv(page: Page, lines: list[Line]) -> None:
    tables = [rows[1:] for rows in page.tables if rows[0][0] == "Measure"]
    assert len(tables) == 1 + len(CLASSES)
    for rows, class_name in zip(tables, (None, *CLASSES), strict=True):
        assert len(rows) == len(METRICS)
        for row, metric in zip(rows, METRICS, strict=True):
            assert row[1:] == full_row(lines, metric, class_name), (row[0], class_name)


def test_the_headline_is_that_of_the_csv(page: Page, lines: list[Line]) -> None:
    num_images, mean, bounds, *_ = full_row(lines, "dice", None)
    assert f"over their classes {mean} 95% interval {bounds}, by group Images 14" in page.text
    assert f"{num_images} with a Dice" in page.text


def test_the_table_by_class_is_that_of_the_csv(page: Page, lines: list[Line]) -> None:
    rows = table(page, "Class")
    assert list(rows) == list(CLASSES)
    for name, row in rows.items():
        assert row == short_row(lines, name)


@pytest.mark.parametrize(
    ("title", "column", "names"),
    [
        (
            *("View", "view"),
            ["LAO caudal", "LAO cranial", "RAO caudal", "RAO cranial", "unknown"],
        ),
        ("pattern", "by_pattern", ["left", "right", "unknown"]),
        ("split", "by_split", ["test"]),
    ],
)
def test_the_tables_by_view_and_annotation_are_those_of_the_csv(
    page: Page, lines: list[Line], title: str, column: str, names: list[str]
) -> None:
    rows = table(page, title)
    assert list(rows) == names
    for name, row in rows.items():
        value = "" if name == "unknown" else name
        here = [line for line in lines if line[column] == value]
        assert row == short_row(here, None), name


def test_the_map_of_views_has_the_means_of_the_csv(page: Page, lines: list[Line]) -> None:
    for region in ("LAO cranial", "LAO caudal", "RAO cranial", "RAO caudal"):
        dice, _ = values([line for line in lines if line["view"] == region], "dice", None)
        # Once for a screen, once for a phone.
        assert page.text.count(f"{region} {dice.mean():.3f} ({len(dice)})") == 2


def test_the_confusion_of_classes_is_that_of_the_csv(
    page: Page, result: EvalResult, lines: list[Line]
) -> None:
    if result.task == "multilabel":
        assert not (result.output / "confusion.csv").exists()
        assert "Confusion of classes" not in page.text
        return
    matrix = read_csv(result.output / "confusion.csv")
    names = ["(none)", *CLASSES]
    assert [line["true"] for line in matrix] == names
    counts = np.array([[int(line[f"predicted {name}"]) for name in names] for line in matrix])
    rows = table(page, "True class")
    for name, row, of_class in zip(names, rows.values(), counts, strict=True):
        assert row[0] == f"{of_class.sum():,}", name
        for text, count in zip(row[1:], of_class, strict=True):
            share = count / of_class.sum()
            assert text == ("<0.1%" if 0 < share < 0.0005 else f"{share:.1%}")
    for k, name in enumerate(CLASSES, start=1):
        of_class = [line for line in lines if line["class_name"] == name and line["true_px"]]
        assert counts[k].sum() == sum(int(line["true_px"]) for line in of_class)
        assert counts[:, k].sum() == sum(int(line["predicted_px"]) for line in of_class)
        hits = [float(line["dice"]) * _area(line) / 2 for line in of_class if line["dice"]]
        assert counts[k, k] == pytest.approx(sum(hits))


def _area(line: Line) -> int:
    return int(line["true_px"]) + int(line["predicted_px"])


def test_the_summary_has_the_same_figures(result: EvalResult, lines: list[Line]) -> None:
    summary = json.loads((result.output / "summary.json").read_text(encoding="utf-8"))
    checked = 0

    def check(found: dict[str, dict], here: list[Line], class_name: str | None) -> int:
        for metric in METRICS:
            numbers, groups = values(here, metric, class_name)
            told = found[metric]
            assert told["num_values"] == len(numbers)
            if len(numbers):
                assert told["mean"] == pytest.approx(numbers.mean())
                assert told["median"] == pytest.approx(np.median(numbers))
                interval = mean_interval(numbers, groups, 0, range_of(metric))
                bounds = None if told["interval"] is None else tuple(told["interval"].values())
                expected = None if interval is None else (interval.low, interval.high)
                assert bounds == (None if expected is None else pytest.approx(expected))
        return 1

    checked += check(summary["overall"], lines, None)
    checked += sum(check(summary["classes"][name], lines, name) for name in CLASSES)
    for column, strata in summary["strata"].items():
        in_csv = "view" if column == "view" else f"by_{column}"
        for value, stratum in strata.items():
            here = [line for line in lines if line[in_csv] == value]
            assert stratum["num_images"] == len({line["id"] for line in here})
            assert stratum["num_groups"] == len({line["group"] for line in here})
            checked += check(stratum["overall"], here, None)
            checked += sum(check(stratum["classes"][name], here, name) for name in CLASSES)
    assert checked == 4 * (1 + 5 + 3 + 1)


@pytest.mark.parametrize("part", ["Measure", "View"])
def test_a_figure_that_is_not_that_of_the_csv_would_be_found(
    page: Page, lines: list[Line], part: str
) -> None:
    """The tests above can fail: one score changed in the CSV changes the figure."""
    changed = [dict(line) for line in lines]
    changed[0]["dice"] = str(float(changed[0]["dice"]) / 2 + 0.1)
    checks: dict[str, Callable[[Page, list[Line]], None]] = {
        "Measure": test_the_tables_of_all_measures_are_those_of_the_csv,
        "View": test_the_map_of_views_has_the_means_of_the_csv,
    }
    with pytest.raises(AssertionError):
        checks[part](page, changed)
