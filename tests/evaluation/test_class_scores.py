"""Several classes: planes of yes and no, and class numbers, with their confusion."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_store import Drawn, write_page_store, write_run
from test_page import Page

from sam3cache.errors import CheckpointError, ConfigError
from sam3cache.evaluation import MEAN_OVER_CLASSES, EvalConfig, EvalResult, evaluate
from sam3cache.features import open_store
from sam3cache.heads import load_checkpoint, save_checkpoint

NAME = "page_store:FromFeatures"
CLASSES = ("LAD", "LCX")


def evaluated(
    folder: Path,
    drawn: list[Drawn],
    task: str = "multiclass",
    edit: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> EvalResult:
    store = write_page_store(folder / "a.zarr", drawn, classes=CLASSES, task=task, edit_mask=edit)  # type: ignore[arg-type]
    run = write_run(
        folder / "run",
        store,
        num_classes=2 + (task == "multiclass"),
        task=task,  # type: ignore[arg-type]
    )
    return evaluate(EvalConfig(store, run, head=NAME, page=False, check_features=False))


def predicted_numbers(shift: int) -> np.ndarray:
    """What the head says: LCX goes before LAD, which keeps a row of cells."""
    numbers_HW = np.zeros((24, 32), dtype=int)
    columns = slice(2 * (3 + shift), 2 * (7 + shift))
    numbers_HW[4:12, columns] = 1
    numbers_HW[6:14, columns] = 2
    return numbers_HW


@pytest.mark.parametrize("with_ignored", [False, True])
def test_class_numbers_are_scored_class_by_class_with_their_confusion(
    tmp_path: Path, with_ignored: bool
) -> None:
    def edit(row: int, mask_1HW: np.ndarray) -> np.ndarray:
        mask_1HW[:, 8:10, 8:12] = 1  # Which the head says is LCX.
        if with_ignored:
            mask_1HW[:, 5:9, 8:11] = 255
        return mask_1HW

    shifts = [0, 2, 4]
    result = evaluated(tmp_path, [Drawn(shift) for shift in shifts], edit=edit)
    assert (result.task, result.threshold) == ("multiclass", None)
    assert result.threshold_choice.source == "none"
    store = open_store(result.store)
    confusion = np.zeros((3, 3), dtype=int)
    for i, shift in enumerate(shifts):
        mask_1HW = store.read_mask(i)
        assert mask_1HW is not None
        counted = mask_1HW[0] != 255
        true, predicted = mask_1HW[0][counted], predicted_numbers(shift)[counted]
        np.add.at(confusion, (true, predicted), 1)
        for k in (1, 2):
            score = result.images[2 * i + k - 1]
            area = (true == k).sum() + (predicted == k).sum()
            hits = ((true == k) & (predicted == k)).sum()
            assert (score.id, score.class_name) == (f"s{i}", CLASSES[k - 1])
            assert score.dice == pytest.approx(2 * hits / area)
            assert (score.true_px, score.predicted_px) == (
                (true == k).sum(),
                (predicted == k).sum(),
            )
    assert result.confusion is not None
    np.testing.assert_array_equal(result.confusion, confusion)
    assert confusion[1, 2] > 0
    with (result.output / "confusion.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true", "predicted (none)", "predicted LAD", "predicted LCX"]
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == confusion.tolist()


def test_over_all_classes_an_image_counts_once(tmp_path: Path) -> None:
    """A class that is neither there nor predicted has no say in the mean over classes."""

    def without_second(row: int, mask_2HW: np.ndarray) -> np.ndarray:
        if row == 0:
            mask_2HW[1] = 0
        return mask_2HW

    result = evaluated(tmp_path, [Drawn(2), Drawn(0)], "multilabel", without_second)
    first, second = (result.images[i : i + 2] for i in (0, 2))
    assert [score.dice for score in first] == [0.5, 0.0]
    assert [score.dice for score in second] == [1.0, 1.0]
    assert result.overall["dice"].mean == (0.25 + 1.0) / 2
    assert result.overall["dice"].num_values == 2
    assert result.classes["LCX"]["dice"].mean == 0.5
    assert result.confusion is None
    assert not (result.output / "confusion.csv").exists()


def test_a_plane_that_nobody_labelled_is_no_empty_mask(tmp_path: Path) -> None:
    """As "255 does not count" says it of pixels, here of all: nobody said that it is not there."""

    def unlabelled_second(row: int, mask_2HW: np.ndarray) -> np.ndarray:
        mask_2HW[1] = 255
        return mask_2HW

    result = evaluated(tmp_path, [Drawn(0), Drawn(0)], "multilabel", unlabelled_second)
    assert [image.true_px is None for image in result.images] == [False, True] * 2
    assert (result.num_empty_against_empty, result.num_one_empty) == (0, 0)
    assert result.overall["dice"].mean == 1.0


def test_the_checks_speak_of_the_dice_of_the_table(tmp_path: Path) -> None:
    """Also where a class is marked that is not there, which makes an image's mean lower."""

    def without_second(row: int, mask_2HW: np.ndarray) -> np.ndarray:
        mask_2HW[1] = 0
        return mask_2HW

    drawn = [Drawn(i % 3, angles_deg=(float(i), 1.0)) for i in range(6)]
    store = write_page_store(tmp_path / "a.zarr", drawn, classes=CLASSES, edit_mask=without_second)
    run = write_run(tmp_path / "run", store, num_classes=2, settings={"loss": None})
    result = evaluate(EvalConfig(store, run, head=NAME))
    assert result.overall["dice"].mean == pytest.approx((1 + 0.75 + 0.5) / 3 / 2)
    assert result.angle_use is not None
    assert result.feature_use is not None
    for dice_true in (result.angle_use.dice_true, result.feature_use.dice_true):
        assert dice_true == pytest.approx(result.overall["dice"].mean)
    assert result.num_images_with("LAD") == 6
    assert result.num_images_with("LCX") == 0
    assert result.page is not None
    page = Page(result.page.read_text(encoding="utf-8"))
    assert MEAN_OVER_CLASSES in page.text
    assert "LCX 6 0 0.000" in page.text
    assert "loss dice-bce (the default)" in page.text
    assert "RAO  ←  primary angle" in result.page.read_text(encoding="utf-8")


def test_the_angles_check_works_on_class_numbers(tmp_path: Path) -> None:
    result = evaluated(tmp_path, [Drawn(i % 4, angles_deg=(float(i), 1.0)) for i in range(8)])
    assert result.angle_use is not None
    assert result.angle_use.verdict == "unused"
    assert result.angle_use.num_images == 8


@pytest.mark.parametrize("names", [("LCX", "LAD"), ("LAD", "LM")], ids=["order", "names"])
def test_classes_that_are_others_or_elsewhere_are_not_measured(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    store = write_page_store(tmp_path / "a.zarr", [Drawn(1)], classes=CLASSES)
    run = write_run(tmp_path / "run", store, num_classes=2)
    head, info = load_checkpoint(run / "best", head=NAME)
    save_checkpoint(run / "best", head, replace(info, classes=names))
    with pytest.raises(CheckpointError, match=rf"for classes {names[0]}, {names[1]}, .* LAD, LCX"):
        evaluate(EvalConfig(store, run, head=NAME, page=False))
    save_checkpoint(run / "best", head, replace(info, classes=CLASSES))
    assert evaluate(EvalConfig(store, run, head=NAME, page=False)).num_images == 1


def test_a_matrix_of_an_earlier_evaluation_does_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for task in ("multiclass", "multilabel"):
        store = write_page_store(tmp_path / "a.zarr", [Drawn(1)], classes=CLASSES, task=task)  # type: ignore[arg-type]
        num_planes = 2 + (task == "multiclass")
        run = write_run(tmp_path / task, store, num_classes=num_planes, task=task)  # type: ignore[arg-type]
        config = EvalConfig(store, run, head=NAME, page=False, output=folder)
        assert (folder / "confusion.csv").exists() == (task == "multilabel")
        evaluate(replace(config, check_features=False))
        assert (folder / "confusion.csv").exists() == (task == "multiclass")
        _remove(tmp_path / "a.zarr")


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("head_task", "mask_task", "words"),
    [
        ("multilabel", "multiclass", "was trained for task multilabel, label set mask of"),
        ("multiclass", "multilabel", "was trained for task multiclass, label set mask of"),
    ],
)
def test_a_head_of_the_other_task_is_refused(
    tmp_path: Path, head_task: str, mask_task: str, words: str
) -> None:
    store = write_page_store(tmp_path / "a.zarr", [Drawn(0)], classes=CLASSES, task=mask_task)  # type: ignore[arg-type]
    run = write_run(tmp_path / "run", store, num_classes=2, task=head_task)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=words):
        evaluate(EvalConfig(store, run, head=NAME))


def test_a_head_of_too_few_classes_is_refused(tmp_path: Path) -> None:
    store = write_page_store(tmp_path / "a.zarr", [Drawn(0)], classes=CLASSES, task="multiclass")
    run = write_run(tmp_path / "run", store, num_classes=2, task="multiclass")
    with pytest.raises(CheckpointError, match=r"predicts 2 planes, .* asks for 3 \(multiclass: LA"):
        evaluate(EvalConfig(store, run, head=NAME))


@pytest.mark.parametrize(
    ("task", "number", "words"),
    [
        ("multilabel", 2, "holds class numbers"),
        ("multiclass", 3, "holds class number 3; expected 0 to 2"),
    ],
)
def test_a_number_of_no_class_is_refused(
    tmp_path: Path, task: str, number: int, words: str
) -> None:
    def spoil(row: int, mask_MHW: np.ndarray) -> np.ndarray:
        mask_MHW[0, 3, 3] = number
        return mask_MHW

    with pytest.raises(ConfigError, match=words):
        evaluated(tmp_path, [Drawn(0)], task, spoil)
