import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare_store import HEAD, evaluated, write_shifted
from page_store import CELL_PX, MASK_WIDTH_PX, Drawn, write_page_store
from test_page import Page, nearest_difference

from sam3cache.errors import ConfigError
from sam3cache.evaluation import CompareConfig, Comparison, EvalConfig, compare, evaluate
from sam3cache.evaluation.comparing.runs import find_experiments
from sam3cache.evaluation.comparing.statistics import Differences, paired_difference
from sam3cache.evaluation.figures import differences_svg
from sam3cache.evaluation.statistics import Interval
from sam3cache.extract.relabel import AnnotationsConfig, set_annotations
from sam3cache.heads.checkpoint import short_hash
from sam3cache.pages import NARROW_PX, PREDICTED_COLOUR, TRUE_COLOUR, WIDE_PX

SHIFTS = [1, 1, 1, 1, 0, 1, 1, 2, 1, 1, 1, 1]
"""Against one of 0 cells a head of 1 gains 0.25 Dice on all of these but one, where it loses it."""


def write_store(root: Path, shifts: Sequence[int] = SHIFTS, **options: object) -> Path:
    return write_page_store(root, [Drawn(shift) for shift in shifts], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and runs of 0 to 3 cells that were evaluated on it; copied by whoever wants one."""
    root = tmp_path_factory.mktemp("world")
    store = write_store(root / "angio.zarr")
    for cells in range(4):
        evaluated(root / f"head{cells}", store, cells)
    return root


@pytest.fixture
def store(world: Path) -> Path:
    return world / "angio.zarr"


Head = Callable[..., Path]


@pytest.fixture
def head(tmp_path: Path, world: Path) -> Head:
    """Put an evaluated run of so many cells into the test's folder, under a name."""

    def put(cells: int, name: str = "") -> Path:
        folder = tmp_path / (name or f"head{cells}")
        return Path(shutil.copytree(world / f"head{cells}", folder))

    return put


def comparison(*paths: Path, **options: object) -> Comparison:
    config = CompareConfig(paths, heads=(HEAD,), page=False)
    return compare(replace(config, **options))  # type: ignore[arg-type]


def test_differences_are_paired_by_image_and_said_in_one_sentence(head: Head) -> None:
    first, second = head(0), head(1)
    result = comparison(first, second)
    assert (result.baseline, result.num_images, result.num_groups) == ("head0", 12, 12)
    (pair,) = result.comparisons
    dice = pair.measures["vessel"]["dice"]
    assert dice == pair.dice
    assert (dice.baseline, dice.other, dice.mean) == pytest.approx((0.75, 23 / 24, 5 / 24))
    assert (dice.num_better, dice.num_worse, dice.median) == (11, 1, pytest.approx(0.25))
    assert dice.interval is not None
    assert pair.verdict == "better"
    assert pair.sentence == (
        f"head1 is better than head0: +0.208 Dice (95% interval {dice.interval.low:.3f} to "
        f"{dice.interval.high:.3f}) over 12 images of 12 groups; 11 images better, 1 worse."
    )
    assert [one.dice for one in result.experiments] == pytest.approx([0.75, 23 / 24])
    back = comparison(first, second, baseline="head1").comparisons[0]
    assert (back.name, back.verdict, back.dice.mean) == ("head0", "worse", pytest.approx(-5 / 24))


def test_what_is_written_tells_the_same_as_the_result(tmp_path: Path, head: Head) -> None:
    first, second = head(0), head(1)
    result = comparison(first, second)
    assert result.output == tmp_path / "compare-test-head0-head1"
    assert sorted(path.name for path in result.output.iterdir()) == [
        "comparison.json",
        "differences.csv",
        "differences.svg",
    ]
    record = json.loads((result.output / "comparison.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(result.record()))
    with (result.output / "differences.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    of_runs = []
    for run in (first, second):
        with (run / "eval-test" / "per_image.csv").open(encoding="utf-8", newline="") as file:
            of_runs.append({line["id"]: line["dice"] for line in csv.DictReader(file)})
    assert {line["id"]: line["dice_baseline"] for line in lines} == of_runs[0]
    assert {line["id"]: line["dice_run"] for line in lines} == of_runs[1]
    differences = [float(line["dice_difference"]) for line in lines]
    assert np.mean(differences) == pytest.approx(record["comparisons"][0]["dice"]["mean"])
    again = comparison(first, second)
    assert again == result


def test_identical_runs_are_equal_to_the_last_digit(head: Head) -> None:
    (pair,) = comparison(head(1, "a"), head(1, "b")).comparisons
    assert pair.verdict == "equal"
    assert pair.sentence == "b and a are equal: the same Dice on all 12 images of 12 groups."
    for found in pair.measures["vessel"].values():
        assert found.mean in (0.0, None)
        assert found.interval in (Interval(0.0, 0.0), None)
        assert found.num_better == found.num_worse == 0


def test_seeds_of_one_experiment_are_averaged_image_by_image(tmp_path: Path, head: Head) -> None:
    for cells in (0, 1):
        head(cells, f"new-seed{cells}")
    head(2, "old")
    result = comparison(tmp_path / "old", tmp_path / "new")
    new = result.experiments[1]
    assert (new.name, new.runs) == ("new", ("new-seed0", "new-seed1"))
    assert new.dice_of_seeds == pytest.approx((0.75, 23 / 24))
    assert new.dice == pytest.approx(41 / 48)
    with (result.output / "differences.csv").open(encoding="utf-8", newline="") as file:
        by_image = [float(line["dice_run"]) for line in csv.DictReader(file)]
    assert by_image == pytest.approx([1 - abs(s) / 8 - abs(s - 1) / 8 for s in SHIFTS])
    assert any(sentence.startswith("One seed each: old.") for sentence in result.notices)
    # 0.85 against 0.75: less than what the two seeds differ by.
    assert any(
        sentence == "The seeds of new differ by 0.208 Dice among themselves, which is more "
        "than new differs from old."
        for sentence in result.notices
    )


def test_where_nothing_is_and_nobody_marks_anything_is_nothing_to_compare(tmp_path: Path) -> None:
    mixed = write_page_store(
        tmp_path / "mixed.zarr", [Drawn(0, is_empty=True), *map(Drawn, SHIFTS)]
    )
    for cells in (0, 1):
        evaluated(tmp_path / f"new-seed{cells}", mixed, cells)
    evaluated(tmp_path / "old", mixed, 2)
    result = comparison(tmp_path / "old", tmp_path / "new")
    assert (result.num_images, result.comparisons[0].dice.num_images) == (13, 12)


def edit_scores(run: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Change the lines of a run's per_image.csv."""
    path = run / "eval-test" / "per_image.csv"
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        edit(line)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def test_marking_what_is_not_there_counts_against_a_head(head: Head) -> None:
    silent, loud = head(0), head(1)

    def empty(line: dict[str, str], *, dice: str) -> None:
        number = int(line["id"].removeprefix("s"))
        if number < 9:
            # Of the last of them neither marks anything.
            line["true_px"], line["dice"] = "0", "" if number == 8 else dice

    edit_scores(silent, lambda line: empty(line, dice=""))
    edit_scores(loud, lambda line: empty(line, dice="0.0"))
    result = comparison(silent, loud)
    (pair,) = result.comparisons
    assert pair.dice.num_images == 11
    assert (pair.dice.num_better, pair.dice.num_worse) == (3, 8)
    assert pair.dice.mean == pytest.approx((3 * 0.25 - 8) / 11)
    assert pair.verdict == "worse"
    assert (
        "The masks of 9 images are empty; something is marked by head0 on 0, head1 on 8 of them: "
        "that is Dice 0, and marking nothing, where another marks something, Dice 1."
        in result.notices
    )


def test_what_is_marked_of_a_class_that_is_not_there_counts_and_is_told_by_class(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "two.zarr", classes=("LAD", "RCA"))
    silent, loud = (evaluated(tmp_path / name, store, 0, num_classes=2) for name in "ab")

    def without_rca(line: dict[str, str], *, dice: str, images: Sequence[str]) -> None:
        if line["class_name"] == "RCA" and line["id"] in images:
            line["true_px"], line["dice"] = "0", dice

    edit_scores(silent, lambda line: without_rca(line, dice="", images=["s0"]))
    edit_scores(loud, lambda line: without_rca(line, dice="0.0", images=["s0"]))
    result = comparison(silent, loud)
    (pair,) = result.comparisons
    # In the image both find the LAD to 0.75, and one finds an RCA that is not there: as in an
    # evaluation its mean is over both classes, and the other's of the LAD alone.
    assert pair.dice.mean == pytest.approx((0.75 / 2 - 0.75) / 12)
    assert (pair.dice.num_better, pair.dice.num_worse) == (0, 1)
    assert (pair.measures["RCA"]["dice"].num_images, pair.measures["RCA"]["dice"].mean) == (11, 0)
    assert [(one.name, one.num_with, one.num_without) for one in result.presence] == [
        ("all classes", 12, 0),
        ("LAD", 12, 0),
        ("RCA", 11, 1),
    ]
    assert result.presence[2].num_marked == {"a": 0, "b": 1}
    told = "Images lack a class in 1 of 24 cases, and it is marked all the same by a on 0, b on 1 "
    assert any(sentence.startswith(told) for sentence in result.notices)


def test_a_class_that_no_image_has_is_no_gain(tmp_path: Path) -> None:
    def without_rca(row: int, mask_2HW: np.ndarray) -> np.ndarray:
        mask_2HW[1] = 0
        return mask_2HW

    store = write_store(tmp_path / "two.zarr", classes=("LAD", "RCA"), edit_mask=without_rca)
    first, second = (evaluated(tmp_path / f"h{c}", store, c, num_classes=2) for c in (0, 1))

    def silent(line: dict[str, str]) -> None:
        if line["class_name"] == "RCA" and line["id"] == "s4":
            line["dice"] = ""

    edit_scores(second, silent)
    page, result = page_of(first, second)
    (pair,) = result.comparisons
    assert list(pair.measures) == ["all classes", "LAD"]
    assert "No image here has RCA: no differences are told of that." in result.notices
    assert result.presence[2].num_marked == {"h0": 12, "h1": 11}
    assert "RCA 0 12 12 11" in page.text
    # The mean of LAD and RCA, but of s4, of which no RCA is marked, the LAD alone.
    summary = json.loads((first / "eval-test" / "summary.json").read_text(encoding="utf-8"))
    assert result.experiments[0].dice == pytest.approx(summary["overall"]["dice"]["mean"])
    assert pair.dice.other == pytest.approx((10 * 0.5 + 0.75 / 2 + 0.75) / 12)


def test_corrected_masks_are_evaluated_anew_and_other_stores_refused(tmp_path: Path) -> None:
    store, other = tmp_path / "angio.zarr", tmp_path / "other.zarr"
    write_store(store)
    runs = [evaluated(tmp_path / name, store, cells) for name, cells in (("a", 0), ("b", 1))]
    assert comparison(*runs).comparisons[0].dice.mean == pytest.approx(5 / 24)
    refusal = "measured on other images, masks or annotations than .* -o FOLDER"
    write_store(other, [0] * 9)
    with pytest.raises(ConfigError, match=refusal):
        comparison(*runs, store=other)
    # A copy is welcome.
    assert comparison(*runs, store=Path(shutil.copytree(store, tmp_path / "copy.zarr"))).num_images
    shutil.rmtree(store)
    # Half a cell to the right: a head of 0 cells now meets 7/8 of the masks, one of 1 less.
    write_store(store, [0] * 12, edit_mask=lambda row, mask_MHW: np.roll(mask_MHW, 1, axis=-1))
    with pytest.raises(ConfigError, match=refusal):
        comparison(*(run / "eval-test" for run in runs))
    told: list[str] = []
    config = CompareConfig(tuple(runs), heads=(HEAD,), page=False)
    result = compare(config, lambda run, *_: told.append(run))
    assert set(told) == {"a", "b"}
    assert result.comparisons[0].dice.baseline == pytest.approx(7 / 8)


def test_folds_are_put_together_each_image_once(tmp_path: Path) -> None:
    names = [f"image{i}" for i in range(12)]
    drawn = [Drawn(s, id=names[i], pixels=i) for i, s in enumerate(SHIFTS)]
    whole = write_page_store(tmp_path / "whole.zarr", drawn)
    parts = [
        write_page_store(tmp_path / f"{k}.zarr", part)
        for k, part in enumerate((drawn[:5], drawn[5:]))
    ]
    for k, part in enumerate(parts):
        evaluated(tmp_path / f"new-fold{k}", part, 1)
    evaluated(tmp_path / "old", whole, 0)
    # Drawn by themselves the images of the second part have other numbers, and so other groups.
    result = comparison(tmp_path / "old", tmp_path / "new")
    assert result.num_images == 12
    assert result.comparisons[0].dice.mean == pytest.approx(5 / 24)
    assert "new knows other groups than old; the groups of old are taken." in result.notices
    shutil.copytree(tmp_path / "new-fold1", tmp_path / "new-fold2")
    evaluated(tmp_path / "new-fold2", whole, 1, output=tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "new-fold2" / "eval-test")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "new-fold2" / "eval-test")
    with pytest.raises(ConfigError, match=r"the runs of new share 12 images .* but not all"):
        comparison(tmp_path / "old", tmp_path / "new")


def test_folds_of_several_seeds_have_a_mean_of_each_seed(tmp_path: Path) -> None:
    names = [f"image{i}" for i in range(12)]
    drawn = [Drawn(s, id=name) for s, name in zip(SHIFTS, names, strict=True)]
    for fold, part in enumerate((drawn[:5], drawn[5:])):
        store = write_page_store(tmp_path / f"{fold}.zarr", part)
        for cells in (0, 1):
            evaluated(tmp_path / f"new-seed{cells}-fold{fold}", store, cells)
            if cells == 0:
                evaluated(tmp_path / f"old-fold{fold}", store, 2)
    result = comparison(tmp_path / "old", tmp_path / "new")
    old, new = result.experiments
    assert len(new.runs) == 4
    assert new.dice_of_seeds == pytest.approx((0.75, 23 / 24))
    assert old.dice_of_seeds == pytest.approx((old.dice,))
    assert any(sentence.startswith("One seed each: old. What") for sentence in result.notices)


def test_folds_of_several_seeds_on_the_same_images_have_a_mean_of_each_seed(
    tmp_path: Path, store: Path
) -> None:
    """On split test every fold of a seed scores all images."""
    for seed, of_folds in enumerate(((0, 1), (2, 1))):
        for fold, cells in enumerate(of_folds):
            evaluated(tmp_path / f"new-seed{seed}-fold{fold}", store, cells)
    evaluated(tmp_path / "old", store, 2)
    result = comparison(tmp_path / "old", tmp_path / "new")
    new = result.experiments[1]
    means = {0: 0.75, 1: 23 / 24, 2: 3 / 4}
    assert new.dice_of_seeds == pytest.approx(
        ((means[0] + means[1]) / 2, (means[2] + means[1]) / 2)
    )
    (single,) = [sentence for sentence in result.notices if sentence.startswith("One seed each:")]
    assert single.startswith("One seed each: old. What")


def test_a_seed_that_lacks_a_fold_on_the_same_images_has_no_mean(
    tmp_path: Path, store: Path
) -> None:
    for name, cells in (("seed0-fold0", 0), ("seed0-fold1", 1), ("seed1-fold0", 1)):
        evaluated(tmp_path / f"new-{name}", store, cells)
    evaluated(tmp_path / "old", store, 2)
    result = comparison(tmp_path / "old", tmp_path / "new")
    assert result.experiments[1].dice_of_seeds == pytest.approx(((0.75 + 23 / 24) / 2,))


def test_seeds_of_before_variants_were_recorded_otherwise_are_of_one_experiment(
    tmp_path: Path, store: Path
) -> None:
    before, now = {"variants": "all", "variants_used": []}, {"variants_used": []}
    for seed, settings in enumerate((before, now)):
        evaluated(tmp_path / f"x-seed{seed}", store, seed, settings=settings)
    evaluated(tmp_path / "y", store, 2)
    assert len(comparison(tmp_path / "y", tmp_path / "x").experiments[1].runs) == 2
    evaluated(tmp_path / "x-seed2", store, 1, settings={"variants_used": ["hflip"]})
    with pytest.raises(ConfigError, match=r"variants_used \[\] → \['hflip'\]\); rename one"):
        comparison(tmp_path / "y", tmp_path / "x")
    (tmp_path / "x-seed1" / ".to-replace").touch()
    with pytest.raises(ConfigError, match=r"; x-seed1 still to be replaced: go on with"):
        comparison(tmp_path / "y", tmp_path / "x")


def test_evaluations_of_before_the_origin_was_recorded_say_nothing_of_it(tmp_path: Path) -> None:
    drawn = [Drawn(shift, extra={"synthetic": "yes"}) for shift in (1, 0, 1)]
    store = write_page_store(tmp_path / "d.zarr", drawn, settings={"backbone": "sam3-mini"})
    first, second = evaluated(tmp_path / "a", store, 0), evaluated(tmp_path / "b", store, 1)
    summary = second / "eval-test" / "summary.json"
    content = json.loads(summary.read_text(encoding="utf-8"))
    del content["origin"], content["num_synthetic"]
    summary.write_text(json.dumps(content), encoding="utf-8")
    notices = comparison(first, second).notices
    assert notices[0].startswith("The pictures are synthetic angiograms")
    assert notices[1].startswith("The features come from sam3-mini")


def test_a_run_that_has_no_checkpoint_yet_is_left_out_and_said(tmp_path: Path, head: Head) -> None:
    """As ``train --overwrite`` leaves it: what was evaluated is of the run that is gone."""
    folder = tmp_path / "many"
    for name, cells in (("x-seed0", 0), ("x-seed1", 1), ("y", 2)):
        shutil.copytree(head(cells, f"of {name}"), folder / name)
    gone = folder / "x-seed1"
    shutil.rmtree(gone / "best")
    (gone / "tensorboard").mkdir()
    for path in (folder, folder / "x"):
        paths = [folder] if path == folder else [path, folder / "y"]
        result = comparison(*paths)
        assert result.experiments[0].runs == ("x-seed0",)
        assert (
            result.notices[0] == "x-seed1 has begun, and no checkpoint of an epoch yet: left out."
        )
    with pytest.raises(ConfigError, match="x-seed1 has begun and has no checkpoint of an epoch"):
        comparison(gone, folder / "y")
    # A folder of runs of which one is called as the last checkpoint is, or as the logs are.
    for name in ("last", "tensorboard"):
        shutil.copytree(head(3, f"of {name}"), folder / name)
    names = {one.name for one in comparison(folder).experiments}
    assert names == {"x", "y", "last", "tensorboard"}
    # Of others whose names begin alike nothing is said.
    shutil.move(gone, folder / "x2-seed1")
    assert not any("has begun" in s for s in comparison(folder / "x", folder / "y").notices)
    # A run that has had epochs, and whose checkpoint was deleted, is its evaluation.
    (folder / "x2-seed1" / "metrics.jsonl").touch()
    assert comparison(folder / "x", folder / "x2-seed1").experiments[1].runs == ("x2-seed1",)


def test_a_seed_stands_for_its_folds(tmp_path: Path) -> None:
    drawn = [Drawn(s, id=f"image{i}") for i, s in enumerate(SHIFTS)]
    for fold, part in enumerate((drawn[:5], drawn[5:])):
        store = write_page_store(tmp_path / f"{fold}.zarr", part)
        for name, cells in (("a-seed1", 0), ("a-seed10", 2), ("b-seed1", 1)):
            evaluated(tmp_path / f"{name}-fold{fold}", store, cells)
    result = comparison(tmp_path / "a-seed1", tmp_path / "b-seed1")
    assert [(one.name, one.runs) for one in result.experiments] == [
        ("a-seed1", ("a-seed1-fold0", "a-seed1-fold1")),
        ("b-seed1", ("b-seed1-fold0", "b-seed1-fold1")),
    ]


def test_a_table_that_lacks_lines_is_damaged(head: Head) -> None:
    first, second = head(0), head(1)
    table = second / "eval-test" / "per_image.csv"
    table.write_text("".join(table.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    expected = "per_image.csv has 11 images, summary.json 12.*write it anew"
    with pytest.raises(ConfigError, match=expected):
        comparison(first, second)
    # Nothing was written, and nothing is left.
    assert not (first.parent / "compare-test-head0-head1").exists()


def test_runs_that_are_on_both_sides_are_said(head: Head) -> None:
    head(0, "x-seed0")
    head(1, "x-seed1")
    other = head(2, "y")
    notices = comparison(other.with_name("x"), other.with_name("x-seed1"), other).notices
    assert "x-seed1 is part of x and of x-seed1: the two differ less for it." in notices
    assert sum("is part of" in sentence for sentence in notices) == 1


def test_a_run_that_is_still_to_be_replaced_is_said(head: Head) -> None:
    first, second = head(0), head(1)
    (second / ".to-replace").touch()
    for path, name in ((second, "head1"), (second / "best", "head1/best")):
        assert comparison(first, path).notices[0] == (
            f"{name} is still of before: `train --overwrite` was ended before it was trained anew; "
            "`train --resume` does it."
        )


def test_a_seed_that_lacks_a_fold_is_told_of_no_seed(tmp_path: Path) -> None:
    """Of two seeds and two folds the first seed's first fold failed: that seed has no mean."""
    drawn = [Drawn(s, id=f"image{i}") for i, s in enumerate(SHIFTS)]
    stores = [
        write_page_store(tmp_path / f"{fold}.zarr", part)
        for fold, part in enumerate((drawn[:5], drawn[5:]))
    ]
    for seed, fold in ((0, 1), (1, 0), (1, 1)):
        evaluated(tmp_path / f"new-seed{seed}-fold{fold}", stores[fold], seed)
    for fold in (0, 1):
        evaluated(tmp_path / f"old-fold{fold}", stores[fold], 2)
    _, new = comparison(tmp_path / "old", tmp_path / "new").experiments
    assert new.dice_of_seeds == pytest.approx((23 / 24,))


def test_a_seed_does_not_count_twice(tmp_path: Path, store: Path, head: Head) -> None:
    for name in ("new-seed1", "new-seed01"):
        head(1, name)
    with pytest.raises(ConfigError, match=r"new-seed01 and new-seed1 are both of seed 1, and"):
        comparison(head(0, "old"), tmp_path / "new")


def test_seeds_on_other_label_sets_or_masks_are_not_averaged(tmp_path: Path, head: Head) -> None:
    store = write_store(tmp_path / "angio.zarr")
    other = write_store(
        tmp_path / "other.zarr",
        edit_mask=lambda row, mask_MHW: mask_MHW if row else np.roll(mask_MHW, 1, -1) | mask_MHW,
    )
    for seed, on in enumerate((store, other)):
        evaluated(tmp_path / f"new-seed{seed}", on, 1)
    with pytest.raises(ConfigError, match=r"runs of new were measured against other masks of 1 im"):
        comparison(head(0, "old"), tmp_path / "new")
    summary = tmp_path / "new-seed1" / "eval-test" / "summary.json"
    told = json.loads(summary.read_text(encoding="utf-8"))
    told |= {"label_set": "reader2", "store": "gone", "store_from_here": ""}
    summary.write_text(json.dumps(told), "utf-8")
    with pytest.raises(ConfigError, match="runs of new were evaluated on label sets mask, reader2"):
        comparison(tmp_path / "old", tmp_path / "new")


def test_seeds_that_learned_from_other_data_are_told(
    tmp_path: Path, store: Path, head: Head
) -> None:
    for seed, digest in enumerate("ab"):
        evaluated(tmp_path / f"new-seed{seed}", store, 1, settings={"data_sha256": digest})
    said = "The runs of new record other images, masks or annotations than each other"
    result = comparison(head(0, "old"), tmp_path / "new")
    assert any(sentence.startswith(said) for sentence in result.notices)


def test_seeds_are_taken_together_at_thresholds_of_one_kind(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr", [*SHIFTS, 1, 1], splits=("test", "val"))
    auto = evaluated(tmp_path / "new-seed0", store, 1, threshold="auto")
    write_shifted(tmp_path / "new-seed1", store, 1)
    old = evaluated(tmp_path / "old", store, 0)
    # What was not evaluated is as its other seed was.
    result = comparison(old, tmp_path / "new")
    other = tmp_path / "new-seed1" / "eval-test" / "summary.json"
    assert json.loads(other.read_text(encoding="utf-8"))["threshold_choice"]["source"] == "auto"
    assert len(result.experiments[1].dice_of_seeds) == 2
    evaluate(EvalConfig(store, auto, head=HEAD, check_angles=False, check_features=False))
    with pytest.raises(
        ConfigError, match=r"0\.5 of new-seed0; auto of new-seed1.* --threshold 0\.5"
    ):
        comparison(old, tmp_path / "new")


def test_runs_of_other_settings_are_no_seeds_of_one_experiment(tmp_path: Path, store: Path) -> None:
    evaluated(tmp_path / "old", store, 2)
    for seed, epochs in enumerate((30, 10)):
        settings = {"seed": seed, "epochs": epochs, "name": f"new-seed{seed}"}
        evaluated(tmp_path / f"new-seed{seed}", store, seed, settings=settings)
    with pytest.raises(ConfigError, match=r"new-seed0 and new-seed1 are not .*epochs 30 → 10"):
        comparison(tmp_path / "old", tmp_path / "new")
    result = comparison(tmp_path / "new-seed0", tmp_path / "new-seed1")
    assert result.comparisons[0].verdict == "better"


def test_images_that_one_run_lacks_are_listed_and_left_out(tmp_path: Path, head: Head) -> None:
    shorter = write_store(tmp_path / "shorter.zarr", SHIFTS[:6])
    first, second = head(0, "a"), evaluated(tmp_path / "b", shorter, 1)
    result = comparison(first, second)
    assert result.num_images == 6
    assert result.left_out == {"a": tuple(f"s{i}" for i in range(6, 12))}
    assert (
        "6 images of a were not scored by all others and are left out, 6 stay: s6, s7, s8, s9, s10 "
        "and 1 more." in result.notices
    )
    assert result.experiments[0].dice == pytest.approx(np.mean([1 - s / 4 for s in SHIFTS[:6]]))


def other_images(tmp_path: Path) -> Path:
    return write_page_store(tmp_path / "o.zarr", [Drawn(0, id=f"t{i}") for i in range(12)])


def other_pixels(tmp_path: Path) -> Path:
    # A page store's pixels have the number of the row as their hash.
    return write_page_store(
        tmp_path / "o.zarr", [Drawn(s, id=f"s{11 - i}") for i, s in enumerate(SHIFTS)]
    )


def other_pixels_and_one_more(tmp_path: Path) -> Path:
    return write_page_store(
        tmp_path / "o.zarr", [Drawn(s, id=f"s{12 - i}") for i, s in enumerate([*SHIFTS, 0])]
    )


def other_masks(tmp_path: Path) -> Path:
    drawn = [Drawn(s, is_empty=i in (2, 5)) for i, s in enumerate(SHIFTS)]
    return write_page_store(tmp_path / "o.zarr", drawn)


def other_classes(tmp_path: Path) -> Path:
    return write_store(tmp_path / "o.zarr", classes=("catheter",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (other_images, "a and b have no image in common"),
        (other_pixels, "a and b were evaluated on images of the same names but with other pixels"),
        (other_pixels_and_one_more, "a and b were evaluated on .* but with other pixels"),
        (other_masks, r"a and b were measured against other masks of 2 images \(s2, s5\)"),
        (other_classes, r"other classes \(a has vessel; b has catheter\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, head: Head, write, message) -> None:
    first, second = head(0, "a"), evaluated(tmp_path / "b", write(tmp_path), 1)
    with pytest.raises(ConfigError, match=message) as refused:
        comparison(first, second)
    assert "\n" not in str(refused.value)


def test_where_pixels_were_not_recorded_and_images_differ_that_is_said(
    tmp_path: Path, head: Head
) -> None:
    shorter = write_store(tmp_path / "shorter.zarr", SHIFTS[:6])
    first, second = head(0, "a"), evaluated(tmp_path / "b", shorter, 1)
    table = second / "eval-test" / "per_image.csv"
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    with table.open("w", encoding="utf-8", newline="") as file:
        names = [name for name in lines[0] if name != "pixels"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    said = "Whether the images have the same pixels could not be checked of b, "
    assert any(sentence.startswith(said) for sentence in comparison(first, second).notices)


def test_the_page_says_what_the_figures_stand_on(tmp_path: Path, head: Head) -> None:
    drawn = [Drawn(shift, extra={"synthetic": "yes"}) for shift in (1, 0, 1)]
    mini = {"backbone": "sam3-mini"}
    store = write_page_store(tmp_path / "drawn.zarr", drawn, settings=mini)
    first = evaluated(tmp_path / "a", store, 0, threshold=0.3)
    second = evaluated(tmp_path / "b", store, 1, threshold=0.3)
    page, result = page_of(first, second)
    assert result.notices[:3] == (
        "The pictures are synthetic angiograms, drawn and not measured: nothing here speaks of "
        "patients.",
        "The features come from sam3-mini, a miniature of SAM 3's classes pretrained on synthetic "
        "angiograms: this shows that the road works, not how good SAM 3 is.",
        "Only 3 groups of images: intervals from so few are wide, and say little.",
    )
    assert all(sentence in page.text for sentence in result.notices)
    assert "Threshold 0.3 Label set mask Store drawn.zarr Checkpoint a/best Epoch" in page.text
    assert "Checkpoint b/best" in page.text

    # Where it is true of one alone, that one is named.
    other = comparison(first, head(1, "c")).notices
    assert other[0].startswith("Some of the pictures are synthetic angiograms")
    assert other[1].startswith("Of a: The features come from sam3-mini")


def test_other_thresholds_and_stores_are_said(tmp_path: Path, store: Path, head: Head) -> None:
    first = head(0, "a")
    second = evaluated(tmp_path / "b", store, 1, threshold=0.3)
    third = evaluated(tmp_path / "c", write_store(tmp_path / "other.zarr", [*SHIFTS, 2]), 1)
    notices = comparison(first, second, third).notices
    assert notices[0] == "The evaluations are of other thresholds: a 0.5, b 0.3, c 0.5."
    assert any(
        sentence == "a and c were measured on stores or label sets of other content; the masks of "
        "these images have the same number of pixels."
        for sentence in notices
    )


def test_what_was_not_evaluated_is_and_what_was_trained_anew_is_again(
    tmp_path: Path, store: Path, head: Head
) -> None:
    first = head(0, "a")
    second = write_shifted(tmp_path / "b", store, 2)
    told = []
    # The store is the one that the other run was evaluated on.
    config = CompareConfig((first, second), heads=(HEAD,), page=False)
    result = compare(config, lambda *progress: told.append(progress))
    assert result.comparisons[0].dice.other == pytest.approx(
        np.mean([1 - abs(s - 2) / 4 for s in SHIFTS])
    )
    assert told[-1] == ("b", 12, 12)
    assert {name for name, _, _ in told} == {"b"}
    write_shifted(second, store, 1)
    assert compare(config).comparisons[0].dice.other == pytest.approx(23 / 24)
    # Neither is evaluated once more.
    told.clear()
    compare(config, lambda *progress: told.append(progress))
    assert told == []


def test_what_was_trained_anew_is_evaluated_as_it_was_before(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr", [*SHIFTS, 1, 1], splits=("test", "val"))
    first = evaluated(tmp_path / "a", store, 0)
    second = evaluated(tmp_path / "b", store, 1, threshold="auto")
    write_shifted(second, store, 2)
    assert comparison(first, second).num_images == 7
    told = json.loads((second / "eval-test" / "summary.json").read_text(encoding="utf-8"))
    assert told["threshold_choice"]["source"] == "auto"


def test_what_was_not_evaluated_has_its_threshold_chosen_as_the_others_had(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr", [*SHIFTS, 1, 1], splits=("test", "val"))
    first = evaluated(tmp_path / "a", store, 0, threshold="auto")
    second = write_shifted(tmp_path / "b", store, 1)
    third = write_shifted(tmp_path / "c", store, 1)
    notices = comparison(first, second).notices
    assert not any("other thresholds" in sentence for sentence in notices)
    told = json.loads((second / "eval-test" / "summary.json").read_text(encoding="utf-8"))
    assert told["threshold_choice"]["source"] == "auto"
    # A number was meant for the head that it was given for.
    comparison(evaluated(first, store, 0, threshold=0.3), third)
    told = json.loads((third / "eval-test" / "summary.json").read_text(encoding="utf-8"))
    assert told["threshold_choice"]["source"] == "checkpoint"


def test_what_had_an_overlay_is_compared_with_it_or_evaluated_anew(
    tmp_path: Path, head: Head, store: Path
) -> None:
    """Masks beside a store are others than its own: neither is taken for the other."""
    store = Path(shutil.copytree(store, tmp_path / "own.zarr"))
    runs = [evaluated(tmp_path / name, store, cells) for name, cells in (("a", 0), ("b", 1))]
    overlay = tmp_path / "overlay"
    manifest = tmp_path / "readers.csv"
    rows = [f"s{i},{'val' if i == 0 else 'test'}" for i in range(12)]
    manifest.write_text("\n".join(["id,split", *rows]), encoding="utf-8")
    set_annotations(AnnotationsConfig(store, manifest, only=("split",), overlay=overlay))
    assert comparison(*runs, overlay=overlay).num_images == 11
    with pytest.raises(
        ConfigError, match=r"a/eval-test was measured on .* with an overlay, .*/a --split test -o"
    ):
        comparison(*runs)
    assert comparison(*runs, overlay=overlay).num_images == 11
    # Another reader's results are not written over.
    other = tmp_path / "other"
    rows = [f"s{i},{'val' if i < 2 else 'test'}" for i in range(12)]
    manifest.write_text("\n".join(["id,split", *rows]), encoding="utf-8")
    set_annotations(AnnotationsConfig(store, manifest, only=("split",), overlay=other))
    with pytest.raises(ConfigError, match=r"a/eval-test was measured with another overlay than"):
        comparison(*runs, overlay=other)
    # Where the store is not at hand, what was measured stands.
    shutil.rmtree(store)
    assert comparison(*(run / "eval-test" for run in runs)).num_images == 11


def test_stores_of_one_relative_path_are_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projects are laid out alike: results say which of their stores they are on."""
    for name, shifts in (("a", SHIFTS), ("b", [0] * 5)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_store(Path("features/angio.zarr"), shifts)
        for cells in (0, 1):
            run = Path("checkpoints") / f"h{cells}"
            evaluated(run, Path("features/angio.zarr"), cells)
    # In the other project these are still results on the store that they were made on.
    there = [tmp_path / "a" / "checkpoints" / f"h{cells}" for cells in (0, 1)]
    assert comparison(*there).num_images == 12
    with pytest.raises(ConfigError, match=r"eval-test holds the results on another store, .*/a/"):
        evaluated(there[0], Path("features/angio.zarr"), 0)
    # And from another folder of the same project they are on the same store.
    monkeypatch.chdir(tmp_path / "b" / "checkpoints")
    evaluated(Path("h0"), Path("../features/angio.zarr"), 0)
    # So they are where the project has moved to.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    evaluated(Path("checkpoints/h0"), Path("features/angio.zarr"), 0)


def test_a_copied_project_is_compared_on_its_own_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks that were corrected in the copy count there, though the first store is there too."""
    monkeypatch.chdir(tmp_path)
    store = write_store(Path("a/features/angio.zarr"), [0] * 12)
    for cells in (0, 1):
        evaluated(Path("a/checkpoints") / f"h{cells}", store, cells)
    shutil.copytree("a", "b")
    shutil.rmtree("b/features")
    write_store(
        Path("b/features/angio.zarr"),
        [0] * 12,
        edit_mask=lambda row, mask_MHW: np.roll(mask_MHW, 1, axis=-1),
    )
    result = comparison(Path("b/checkpoints/h0"), Path("b/checkpoints/h1"))
    assert result.comparisons[0].dice.baseline == pytest.approx(7 / 8)
    first = comparison(Path("a/checkpoints/h0"), Path("a/checkpoints/h1"))
    assert first.comparisons[0].dice.baseline == 1.0


def test_other_images_of_a_store_of_the_same_pictures_are_other_results(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", splits=("test", "val"))
    run = evaluated(tmp_path / "run", store, 0)
    other = write_store(tmp_path / "b.zarr", splits=("val", "test"))
    with pytest.raises(ConfigError, match="holds the results on another store"):
        evaluated(run, other, 0)


def test_seeds_trained_anew_are_asked_alike_whatever_others_were(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr", [*SHIFTS, 1, 1], splits=("test", "val"))
    first = evaluated(tmp_path / "first", store, 0, threshold="auto")
    evaluated(tmp_path / "new-seed0", store, 1)
    for seed in (0, 1):
        write_shifted(tmp_path / f"new-seed{seed}", store, 2)
    comparison(first, tmp_path / "new")
    for seed in (0, 1):
        summary = tmp_path / f"new-seed{seed}" / "eval-test" / "summary.json"
        told = json.loads(summary.read_text(encoding="utf-8"))
        assert told["threshold_choice"]["source"] == "checkpoint"


def test_images_of_patients_that_a_head_has_seen_are_told(
    tmp_path: Path, store: Path, head: Head
) -> None:
    seen = {"images": "", "groups": short_hash("g3")}
    run = write_shifted(tmp_path / "b", store, 1, trained_on=seen)
    result = comparison(head(0, "a"), run)
    said = "b was trained on other images of groups with the names of 1 of those"
    assert any(sentence.startswith(said) for sentence in result.notices)


def test_thresholds_chosen_on_the_images_compared_are_told(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr", splits=("val",))
    runs = [
        evaluated(tmp_path / name, store, cells, split="val", threshold="auto")
        for name, cells in (("a", 0), ("b", 1))
    ]
    notices = comparison(*runs, split="val").notices
    assert any(s.startswith("The threshold of a, b was chosen on images that") for s in notices)


def test_without_a_store_what_has_to_be_run_is_named(tmp_path: Path, store: Path) -> None:
    first, second = write_shifted(tmp_path / "a", store, 0), write_shifted(tmp_path / "b", store, 2)
    with pytest.raises(ConfigError, match=r"a was not evaluated on split test .* name the store"):
        comparison(first, second)
    assert comparison(first, second, store=store).num_images == 12


def test_a_store_is_found_by_the_name_that_the_run_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = write_store(Path("features/angio.zarr"))
    settings = {"store": "angio.zarr"}
    runs = [write_shifted(Path("checkpoints") / n, store, 1, settings=settings) for n in "ab"]
    result = comparison(*runs)
    assert result.output == Path("checkpoints/compare-test-a-b")
    assert result.comparisons[0].verdict == "equal"


def test_several_comparisons_are_corrected_for(head: Head) -> None:
    runs = [head(cells) for cells in range(4)]
    alone = comparison(*runs[:2]).comparisons[0]
    result = comparison(*runs)
    p_values = [pair.dice.p_value for pair in result.comparisons]
    assert p_values[0] == alone.dice.p_value == alone.p_corrected
    # The smallest of three counts threefold.
    smallest = int(np.argmin(p_values))  # type: ignore[arg-type]
    assert result.comparisons[smallest].p_corrected == pytest.approx(3 * min(p_values))  # type: ignore[type-var, operator]
    for pair in result.comparisons:
        assert "after Holm's correction for 3 comparisons" in pair.sentence


def test_several_classes_are_compared_each_and_together(tmp_path: Path) -> None:
    store = write_store(tmp_path / "two.zarr", classes=("LAD", "RCA"))
    first, second = (evaluated(tmp_path / f"h{c}", store, c, num_classes=2) for c in (0, 1))
    (pair,) = comparison(first, second).comparisons
    assert list(pair.measures) == ["all classes", "LAD", "RCA"]
    assert pair.dice == pair.measures["all classes"]["dice"]
    assert pair.measures["RCA"]["dice"].mean == pytest.approx(5 / 24)
    assert "+0.208 Dice over the classes of an image (95%" in pair.sentence


@pytest.fixture
def place(tmp_path: Path, head: Head) -> Path:
    """Runs in all their forms."""
    single = head(0, "single")
    for name in ("film-seed0", "film-seed10", "film-seed2-fold1", "film-fold1", "lin", "lin2"):
        shutil.copytree(single / "best", tmp_path / "runs" / name / "best")
    shutil.copytree(single / "eval-test", tmp_path / "copied" / "eval-test")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["single"], {"single": ["single"]}),
        (["single/best"], {"single/best": ["single/best"]}),
        (["single/eval-test"], {"single": ["single"]}),
        (["copied"], {"copied": ["copied"]}),
        (["copied/eval-test", "single"], {"copied": ["copied"], "single": ["single"]}),
        (["runs/lin"], {"lin": ["lin"]}),
        (["runs/film"], {"film": ["film-fold1", "film-seed0", "film-seed2-fold1", "film-seed10"]}),
        (
            ["runs"],
            {
                "film": ["film-fold1", "film-seed0", "film-seed2-fold1", "film-seed10"],
                "lin": ["lin"],
                "lin2": ["lin2"],
            },
        ),
    ],
)
def test_runs_are_found_in_all_their_forms(
    place: Path, paths: list[str], found: dict[str, list[str]]
) -> None:
    experiments = find_experiments([place / path for path in paths], "test")
    assert {e.name: [run.name for run in e.runs] for e in experiments} == found


def test_a_run_beside_its_name_s_seeds_is_none_of_them(place: Path) -> None:
    shutil.copytree(place / "single", place / "runs" / "film")
    found = {e.name: len(e.runs) for e in find_experiments([place / "runs"], "test")}
    assert found == {"film": 1, "film-runs": 4, "lin": 1, "lin2": 1}


def test_a_folder_of_folders_of_runs_has_them_all(place: Path) -> None:
    """Seeds lie in a folder of their own, and so do experiments."""
    shutil.copytree(place / "runs", place / "all" / "heads")
    shutil.copytree(place / "single", place / "all" / "single")
    for seed in (0, 1):
        shutil.copytree(place / "single", place / "all" / "floor" / f"floor-seed{seed}")
    found = {e.name: len(e.runs) for e in find_experiments([place / "all"], "test")}
    assert found == {"single": 1, "floor": 2, "film": 4, "lin": 1, "lin2": 1}


def test_a_run_with_others_in_its_folder_is_not_guessed_at(place: Path) -> None:
    shutil.copytree(place / "single", place / "floor")
    shutil.copytree(place / "single", place / "floor" / "floor-seed0")
    with pytest.raises(
        ConfigError, match=r"floor is a run, and holds others \(floor-seed0\); name"
    ):
        find_experiments([place / "floor"], "test")
    named = [place / "floor" / "best", place / "floor" / "floor"]
    names = [e.name for e in find_experiments(named, "test")]
    assert names == ["floor/best", "floor"]


def test_runs_of_one_name_are_told_apart_by_their_folders(place: Path) -> None:
    shutil.copytree(place / "single", place / "runs" / "single")
    experiments = find_experiments([place / "single", place / "runs" / "single"], "test")
    assert [e.name for e in experiments] == [f"{place.name}/single", "runs/single"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "nothing is named to compare"),
        (["nowhere"], "nowhere holds nothing to compare: expected a run such as checkpoints/first"),
        (["empty", "single"], "empty holds nothing to compare"),
        (["single"], "single is all there is to compare"),
        (["single", "single"], "single is named twice"),
    ],
)
def test_nothing_to_compare_is_one_line(place: Path, paths: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison(*(place / path for path in paths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "split 'tset': expected one of train"),
        ({"batch_size": 0}, "batch size 0"),
        ({"seed": -1}, "seed -1"),
        ({"baseline": "c"}, "baseline 'c': expected one of a, b"),
        ({"output": Path("taken")}, "taken .*something else"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(
    tmp_path: Path, head: Head, monkeypatch, options, message
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [head(0, name) for name in "ab"]
    Path("taken").mkdir()
    Path("taken/thesis.tex").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        comparison(*runs, **options)
    assert [path.name for path in Path("taken").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"classes": {}}'),
        ("per_image.csv", ""),
        ("per_image.csv", "id,group,class_name\ns0,g0,vessel\n"),
        (
            "per_image.csv",
            "id,group,class_name,dice,iou,precision,recall,true_px\ns0,g0,vessel,x,,,,\n",
        ),
        ("per_image.csv", "\x00"),
    ],
)
def test_a_damaged_evaluation_is_one_line(head: Head, file: str, text: str) -> None:
    first, damaged = head(0, "a"), head(1, "b") / "eval-test"
    (damaged / file).write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"eval-test does not hold an evaluation that can be read"
    ):
        comparison(first, damaged)


def page_of(*paths: Path, **options: object) -> tuple[Page, Comparison]:
    result = comparison(*paths, page=True, **options)
    assert result.page is not None
    return Page(result.page.read_text(encoding="utf-8")), result


def test_the_page_shows_the_runs_side_by_side_and_needs_no_other_file(
    tmp_path: Path, head: Head
) -> None:
    page, result = page_of(head(0), head(1))
    assert [link for link in page.links if not link.startswith(("data:image/", "#"))] == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", page.html)
    ids = re.findall(r'\sid="([^"]+)"', page.html)
    assert len(ids) == len(set(ids))
    assert str(tmp_path) not in page.html
    assert result.comparisons[0].sentence in page.text
    assert "head0 (baseline) compare_store:Shifted 1 0.750" in page.text
    interval = result.comparisons[0].dice.interval
    assert interval is not None
    assert f"Dice 12 0.750 0.958 +0.208 {interval.low:.3f} to {interval.high:.3f} 11 1" in page.text
    shown = re.findall(
        r"(\w+) difference (\S+) Dice Image (\w+) .*? head0 Dice ([\d.]+) head1 Dice ([\d.]+)",
        page.text,
    )
    assert shown == [
        ("Best", "+0.250", "s0", "0.750", "1.000"),
        ("Median", "+0.250", "s7", "0.500", "0.750"),
        ("Worst", "-0.250", "s4", "1.000", "0.750"),
    ]
    # The image of shift 0: head0 is right, head1 is a cell too far to the left.
    for run, cells in (("head0", 0), ("head1", 1)):
        (drawn_HW3,) = (
            page.picture(alt) for alt in page.images if alt.startswith("s4") and f"of {run}" in alt
        )
        assert drawn_HW3.shape == (480, 640, 3)
        cell_px = 640 * CELL_PX // MASK_WIDTH_PX
        left_px = (3 - cells) * cell_px
        assert nearest_difference(drawn_HW3, left_px, 4 * cell_px, PREDICTED_COLOUR) < 120
        # Where the prediction is right its line lies on the true one.
        wanted = TRUE_COLOUR if cells else PREDICTED_COLOUR
        assert nearest_difference(drawn_HW3, 3 * cell_px, 4 * cell_px, wanted) < 120


def test_a_page_without_a_store_or_a_head_has_the_rest(tmp_path: Path) -> None:
    store = write_store(tmp_path / "angio.zarr")
    first, second = (evaluated(tmp_path / f"head{c}", store, c) for c in (0, 1))
    page, _ = page_of(first, second, heads=())
    assert "No borders of head0: " in page.text
    assert "name it again with --head" in page.text
    assert not page.images
    store.rename(tmp_path / "gone.zarr")
    page, _ = page_of(first, second)
    assert "No pictures, since the store is not at hand; name it by --store." in page.text
    assert "head1 is better than head0" in page.text
    page, _ = page_of(first, second, store=tmp_path / "gone.zarr")
    assert len(page.images) == 6


def test_names_on_a_page_are_text_whatever_they_are(head: Head) -> None:
    odd = "a &lt;b&gt;&$x$ é"
    page, result = page_of(head(0, odd), head(1, "b"), baseline="b")
    assert "a &amp;lt;b&amp;gt;&amp;$x$ é against b" in page.html
    assert result.comparisons[0].name == odd
    assert result.comparisons[0].sentence in page.text


def test_the_plot_has_a_dot_an_image_in_a_row_a_run() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for name in ("first", "second"):
        values_N = rng.normal(0.01, 0.02, 30)
        values_N[3] = np.nan
        found = paired_difference(np.zeros(30), values_N, [str(i) for i in range(30)], seed=0)
        rows.append(Differences(name, values_N, found))
    for width_px in (WIDE_PX, NARROW_PX):
        svg = differences_svg("plot", rows, width_px)
        groups = re.findall(r'<g id="plot-PathCollection_\d">(.*?)\n   </g>', svg, re.DOTALL)
        assert [len(re.findall("<use ", dots)) for dots in groups] == [29, 29]
        for row in rows:
            assert row.name in svg
            assert f"mean {row.summary.mean:+.3f}" in svg
    assert differences_svg("plot", rows) == differences_svg("plot", rows)
    nothing = Differences(
        "nothing", np.full(3, np.nan), paired_difference(*np.full((2, 3), np.nan), ["a"] * 3, 0)
    )
    assert "nothing to compare" in differences_svg("plot", [nothing])


def test_an_evaluation_of_another_split_is_taken_where_it_is_given_itself(
    store: Path, head: Head
) -> None:
    first, second = head(0, "a"), head(1, "b")
    evaluate(EvalConfig(store, first, "all", head=HEAD, check_angles=False, check_features=False))
    result = comparison(first / "eval-all", second)
    assert result.split == "all, test"
    assert "The evaluations are of other splits: a all, b test." in result.notices
