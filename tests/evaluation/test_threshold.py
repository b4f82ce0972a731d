"""The threshold: from where it is, and that the best of the validation split is the best."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page_store import Drawn, write_page_store, write_run

from sam3cache.errors import ConfigError
from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.evaluation.predicting import Prediction
from sam3cache.evaluation.threshold import THRESHOLDS, DiceByThreshold
from sam3cache.features import open_store
from sam3cache.heads import load_checkpoint, save_checkpoint
from sam3cache.metrics import dice_iou_precision_recall
from sam3cache.training.division import trained_on

FAINT = "page_store:Faint"


def drawn_prediction(rng: np.random.Generator, num_classes: int) -> Prediction:
    """Probabilities that lie on thresholds, too, and a mask with pixels that do not count."""
    probability_CHW = rng.choice([*THRESHOLDS, 0.01, 0.33, 0.999], (num_classes, 9, 11))
    mask_CHW = rng.choice([0, 0, 1, 255], (num_classes, 9, 11))
    if rng.random() < 0.3:
        mask_CHW[0] = 0
        probability_CHW[0] *= rng.random()
    return Prediction(
        torch.from_numpy(probability_CHW.astype(np.float32)),
        torch.from_numpy(probability_CHW >= 0.5),
        torch.from_numpy(mask_CHW.astype(np.uint8)),
        *([], [], []),
    )


@pytest.mark.parametrize("num_classes", [1, 3])
def test_the_dice_at_each_threshold_is_that_of_masks_cut_there(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    predictions = [drawn_prediction(rng, num_classes) for _ in range(8)]
    found = DiceByThreshold()
    for prediction in predictions:
        found.add(prediction)
    means = {}
    for threshold in THRESHOLDS:
        of_images = []
        for prediction in predictions:
            assert prediction.mask_CHW is not None
            dice = [
                dice_iou_precision_recall(probability_HW >= threshold, mask_HW).dice
                for probability_HW, mask_HW in zip(
                    prediction.probability_CHW, prediction.mask_CHW, strict=True
                )
            ]
            known = [value for value in dice if value is not None]
            of_images += [np.mean(known)] if known else []
        means[threshold] = np.mean(of_images)
    threshold, mean_dice = found.best()
    assert mean_dice == pytest.approx(max(means.values()))
    assert means[threshold] == pytest.approx(mean_dice)


def test_of_equal_thresholds_the_nearest_to_a_half_is_taken() -> None:
    found = DiceByThreshold()
    mask_1HW = torch.tensor([[[1, 1, 0, 0]]], dtype=torch.uint8)
    probability_1HW = torch.tensor([[[0.38, 0.38, 0.08, 0.02]]])
    found.add(Prediction(probability_1HW, probability_1HW > 0.5, mask_1HW, [0], [2], []))
    assert found.best() == (0.35, 1.0)


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    """Validation images that the head is right on, test images that it is half right on."""
    drawn = [Drawn(0 if i % 2 == 0 else 2) for i in range(12)]
    store = write_page_store(tmp_path / "a.zarr", drawn, splits=("val", "test"))
    run = write_run(tmp_path / "run", store, FAINT)
    return EvalConfig(
        *(store, run),
        head=FAINT,
        threshold="auto",
        check_angles=False,
        check_features=False,
        page=False,
    )


def test_the_threshold_is_chosen_on_the_validation_split_and_told(config: EvalConfig) -> None:
    done: list[tuple[int, int]] = []
    result = evaluate(replace(config, page=True), lambda *progress: done.append(progress))
    assert result.threshold == 0.2
    choice = result.threshold_choice
    assert (choice.source, choice.split, choice.num_images) == ("auto", "val", 6)
    assert (choice.mean_dice, choice.on_evaluated) == (1.0, False)
    assert choice.sentence == (
        "Threshold 0.2: of 19 from 0.05 to 0.95 that of the highest mean Dice, 1.000, on the 6 "
        "images with a mask of split val; none of them is evaluated here."
    )
    assert result.overall["dice"].mean == 0.5
    assert not any("threshold" in notice for notice in result.notices)
    summary = json.loads((result.output / "summary.json").read_text(encoding="utf-8"))
    assert summary["threshold_choice"]["sentence"] == choice.sentence
    assert result.page is not None
    assert choice.sentence in result.page.read_text(encoding="utf-8")
    assert done[-1] == (12, 12)


def test_a_number_is_kept_and_the_checkpoints_own_is_the_rule(config: EvalConfig) -> None:
    given = evaluate(replace(config, threshold=0.2))
    assert (given.threshold_choice.source, given.overall["dice"].mean) == ("given", 0.5)
    own = evaluate(replace(config, threshold=None))
    assert (own.threshold, own.threshold_choice.source) == (0.5, "checkpoint")
    assert own.overall["dice"].mean == 0.0


@pytest.mark.parametrize("split", ["val", "all"])
def test_a_threshold_chosen_on_what_is_measured_is_told_so(config: EvalConfig, split: str) -> None:
    result = evaluate(replace(config, split=split))  # type: ignore[arg-type]
    assert result.threshold_choice.on_evaluated
    assert result.threshold_choice.sentence.endswith("of split val; 6 of them are evaluated here.")
    told = "The threshold was chosen on images of split val that are measured here"
    assert any(sentence.startswith(told) for sentence in result.notices)


def test_the_images_that_are_measured_have_no_say(config: EvalConfig, tmp_path: Path) -> None:
    """With test images on which another threshold is best, the choice is the same."""
    drawn = [Drawn(0) if i % 2 == 0 else Drawn(0, is_empty=True) for i in range(12)]
    store = write_page_store(tmp_path / "b.zarr", drawn, splits=("val", "test"))
    assert evaluate(replace(config, store=store, output=tmp_path / "b")).threshold == 0.2


@pytest.mark.parametrize("bare", [{"has_mask": False}, {"is_empty": True}, None])
def test_without_a_validation_mask_there_is_nothing_to_choose_by(
    config: EvalConfig, tmp_path: Path, bare: dict[str, bool] | None
) -> None:
    drawn = [Drawn(0, **(bare or {})), Drawn(0)]
    splits = ("test",) if bare is None else ("val", "test")
    store = write_page_store(tmp_path / "b.zarr", drawn, splits=splits)
    with pytest.raises(ConfigError, match=r"split val.* give .*a number, or leave "):
        evaluate(replace(config, store=store, output=tmp_path / "b"))


def test_a_threshold_chosen_on_what_the_head_learned_from_is_said(
    config: EvalConfig, tmp_path: Path
) -> None:
    store = open_store(config.store)
    learned = trained_on([sample for sample in store.samples if sample.split == "val"][:4])
    head, info = load_checkpoint(config.checkpoint / "best", head=FAINT)
    assert not any("was trained on" in sentence for sentence in evaluate(config).notices)
    save_checkpoint(tmp_path / "knows" / "best", head, replace(info, trained_on=learned))
    result = evaluate(replace(config, checkpoint=tmp_path / "knows"))
    assert result.threshold_choice.num_seen == 4
    (said,) = [s for s in result.notices if s.startswith("The threshold was chosen")]
    assert "on 6 images of split val, of which the head was trained on 4:" in said


@pytest.mark.parametrize("threshold", ["auto", 0.4])
def test_class_numbers_have_no_threshold(tmp_path: Path, threshold: float | str) -> None:
    drawn = [Drawn(0), Drawn(1)]
    store = write_page_store(tmp_path / "a.zarr", drawn, classes=("A", "B"), task="multiclass")
    name = "page_store:FromFeatures"
    run = write_run(tmp_path / "run", store, name, num_classes=3, task="multiclass")
    with pytest.raises(ConfigError, match="leave --threshold out"):
        evaluate(EvalConfig(store, run, head=name, threshold=threshold))  # type: ignore[arg-type]


def test_of_cross_validation_the_part_that_was_held_out_chooses(
    config: EvalConfig, tmp_path: Path
) -> None:
    """Whatever the splits are called, it is told how many of its images are measured."""
    drawn = [Drawn(0) for _ in range(12)]
    store = write_page_store(tmp_path / "b.zarr", drawn, splits=("train", "val", "test"))
    settings = {"folds": 2, "fold": 0, "fold_seed": 0, "stratify": None}
    run = write_run(tmp_path / "fold", store, FAINT, settings=settings)
    of = {}
    for split in ("train", "val", "test"):
        result = evaluate(replace(config, store=store, checkpoint=run, split=split))  # type: ignore[arg-type]
        assert result.threshold_choice.num_images == 4
        of[split] = result.threshold_choice
    assert of["val"].sentence.endswith("4 of them are evaluated here.")
    assert of["test"].sentence.endswith("none of them is evaluated here.")
    # What is trained on is the other half of 4 + 4 images, whatever their splits are called.
    assert not of["train"].on_evaluated
    assert "; none of them " in of["train"].sentence
