"""Results by annotation, pixel spacing from an annotation, and what the notices say of both."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from page_store import Drawn, write_page_store, write_run

from sam3cache.errors import ConfigError
from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.evaluation.spacing import spacing_of, spacing_of_mask
from sam3cache.features import StoredSample

NAME = "page_store:FromFeatures"
DRAWN = [
    Drawn(0, group="a", extra={"pattern": "right", "phase": "diastole"}),
    Drawn(1, group="a", extra={"pattern": "right", "phase": ""}, angles_deg=(-30.0, 10.0)),
    Drawn(2, group="b", extra={"pattern": "left"}),
    Drawn(3, group="c", extra={"pattern": "left"}, has_mask=False, angles_deg=(None, None)),
]


def config_of(tmp_path: Path, drawn: list[Drawn]) -> EvalConfig:
    store = write_page_store(tmp_path / "a.zarr", drawn)
    run = write_run(tmp_path / "run", store)
    return EvalConfig(store, run, head=NAME, check_angles=False, check_features=False, page=False)


def test_results_are_given_by_view_and_by_each_annotation_asked_for(tmp_path: Path) -> None:
    result = evaluate(replace(config_of(tmp_path, DRAWN), by=("pattern", "group", "phase")))
    assert list(result.strata) == ["view", "pattern", "group", "phase"]
    found = {
        column: {
            value: (stratum.num_images, stratum.num_groups, stratum.overall["dice"].mean)
            for value, stratum in strata.items()
        }
        for column, strata in result.strata.items()
    }
    assert found == {
        "view": {"LAO caudal": (2, 2, 0.75), "RAO cranial": (1, 1, 0.75), "": (1, 1, None)},
        "pattern": {"left": (2, 2, 0.5), "right": (2, 1, 0.875)},
        "group": {"a": (2, 1, 0.875), "b": (1, 1, 0.5), "c": (1, 1, None)},
        "phase": {"diastole": (1, 1, 1.0), "": (3, 3, 0.625)},
    }
    with (result.output / "per_image.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["by_pattern"] for line in lines] == ["right", "right", "left", "left"]
    assert [line["view"] for line in lines] == ["LAO caudal", "RAO cranial", "LAO caudal", ""]


def test_without_any_known_view_there_are_no_results_by_view(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, [Drawn(0, angles_deg=(None, 20.0)), Drawn(1, angles_deg=(1, None))]
    )
    assert evaluate(config).strata == {}
    assert list(evaluate(replace(config, by=("view",))).strata["view"]) == [""]


def test_a_column_named_view_is_told_beside_the_view_regions(tmp_path: Path) -> None:
    drawn = [Drawn(0, extra={"view": "spider"}), Drawn(1, extra={"view": "AP"}), Drawn(2)]
    result = evaluate(replace(config_of(tmp_path, drawn), by=("view",)))
    found = {name: list(values) for name, values in result.strata.items()}
    assert found == {"view": ["LAO caudal"], "view (column)": ["AP", "spider", ""]}
    with (result.output / "per_image.csv").open(encoding="utf-8", newline="") as file:
        assert [line["by_view"] for line in csv.DictReader(file)] == ["spider", "AP", ""]


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (("vessel",), "--by vessel: no image has .* expected one of group, pattern, phase, split"),
        (("pattern", "pattern"), "--by pattern is given twice"),
        (("dice",), "--by dice: no image has such an annotation"),
    ],
)
def test_what_is_no_annotation_is_refused(tmp_path: Path, by: tuple[str, ...], words: str) -> None:
    config = replace(config_of(tmp_path, DRAWN), by=by)
    with pytest.raises(ConfigError, match=words):
        evaluate(config)
    assert not (config.checkpoint / "eval-test").exists()


def sample(extra: dict[str, str]) -> StoredSample:
    return StoredSample(0, "s", "s.png", None, 100, 200, "", 0.0, 0.0, "test", "g", extra)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"spacing_mm": "0.3"}, (0.3, 0.3)),
        ({"pixel_spacing_mm": " 0.25 "}, (0.25, 0.25)),
        ({"pixel_spacing": "0.3\\0.4"}, (0.3, 0.4)),
        ({"pixel_spacing": "[0.3, 0.4]"}, (0.3, 0.4)),
        ({"pixel_spacing": "0.3 x 0.4"}, (0.3, 0.4)),
        ({"spacing_mm": "", "pixel_spacing": "0.2"}, (0.2, 0.2)),
        ({"spacing_mm": "0.1", "pixel_spacing": "0.2"}, (0.1, 0.1)),
        ({}, None),
        ({"spacing_mm": ""}, None),
        ({"spacing_mm": "unknown"}, None),
        ({"spacing_mm": "0"}, None),
        ({"spacing_mm": "-0.3"}, None),
        ({"spacing_mm": "nan"}, None),
        ({"spacing_mm": "inf"}, None),
        ({"spacing_mm": "0.3 0.3 0.3"}, None),
        ({"spacing": "0.3"}, None),
    ],
)
def test_spacing_is_one_or_two_positive_numbers(
    extra: dict[str, str], expected: tuple[float, float] | None
) -> None:
    assert spacing_of(sample(extra)) == expected


def test_a_pixel_of_a_mask_is_as_large_as_the_picture_says() -> None:
    """A picture of 100 x 200 pixels of 0.3 x 0.4 mm, with a mask of 50 x 50."""
    of_mask = spacing_of_mask(sample({"pixel_spacing": "0.3\\0.4"}), (50, 50))
    assert of_mask == pytest.approx((0.6, 1.6))
    assert spacing_of_mask(sample({}), (50, 50)) is None


def test_distances_are_in_millimetres_where_the_spacing_is_known(tmp_path: Path) -> None:
    """A shift of 2 cells is 4 pixels of the mask, which are 16 of the picture."""
    drawn = [
        Drawn(2, extra={"spacing_mm": "0.3"}),
        Drawn(2, extra={"spacing_mm": ""}),
        Drawn(2, extra={"spacing_mm": "wide"}),
        Drawn(0, extra={"spacing_mm": "0.3"}),
    ]
    result = evaluate(config_of(tmp_path, drawn))
    assert [image.hd95_px for image in result.images] == [4.0, 4.0, 4.0, 0.0]
    assert [image.hd95_mm for image in result.images] == [pytest.approx(4.8), None, None, 0.0]
    assert (result.num_with_spacing, result.unit) == (2, "px")
    assert result.overall["hd95_mm"].mean == pytest.approx(2.4)
    assert "1 of 4 images have a pixel spacing that is not one or two" in " ".join(result.notices)


def test_tables_are_in_millimetres_where_every_image_with_a_mask_has_them(tmp_path: Path) -> None:
    """Or else a line of many images would show the distance of the few that have a spacing."""
    known = {"spacing_mm": "0.3"}
    drawn = [Drawn(2, extra=known), Drawn(0, extra=known), Drawn(0, has_mask=False)]
    result = evaluate(config_of(tmp_path, drawn))
    assert (result.num_with_spacing, result.unit) == (2, "mm")
    bare = [Drawn(2), Drawn(0, extra=known, has_mask=False)]
    result = evaluate(config_of(tmp_path / "bare", bare))
    assert (result.num_with_spacing, result.unit) == (0, "px")


def test_failures_without_a_distance_are_told(tmp_path: Path) -> None:
    """A prediction of nothing has Dice and clDice 0, and no distance to a mask."""
    drawn = [Drawn(0), Drawn(0, predicts_nothing=True), Drawn(0, is_empty=True)]
    result = evaluate(config_of(tmp_path, drawn))
    assert [image.cldice for image in result.images] == [1.0, 0.0, None]
    assert [image.assd_px for image in result.images] == [0.0, None, None]
    assert (result.num_one_empty, result.num_empty_against_empty) == (1, 1)
    assert result.notices[-1].startswith(
        "1 of 3 images have a prediction or a mask, but not both: there"
    )
    assert result.overall["hd95_px"].num_values == 1
