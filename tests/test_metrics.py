"""Measures of masks, against counts done by hand and against MONAI's."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from monai.losses.cldice import soft_skel
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
)

from sam3cache.metrics import MaskScores, ShapeScores, dice_iou_precision_recall, shape_scores


@pytest.mark.parametrize(
    ("prediction", "mask", "expected"),
    [
        pytest.param([1, 1, 0, 0], [1, 0, 1, 0], MaskScores(1 / 2, 1 / 3, 1 / 2, 1 / 2), id="half"),
        pytest.param([1, 1, 1, 0], [1, 1, 1, 0], MaskScores(1, 1, 1, 1), id="all"),
        pytest.param([1, 0, 0, 0], [0, 1, 0, 0], MaskScores(0, 0, 0, 0), id="none"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], MaskScores(None, None, None, None), id="empty"),
        pytest.param([1, 0, 0, 0], [0, 0, 0, 0], MaskScores(0, 0, 0, None), id="false alarm"),
        pytest.param([0, 0, 0, 0], [1, 0, 0, 0], MaskScores(0, 0, None, 0), id="missed"),
        pytest.param([1, 1, 0, 1], [1, 255, 255, 0], MaskScores(2 / 3, 1 / 2, 1 / 2, 1), id="255"),
    ],
)
def test_scores_are_those_counted_by_hand(
    prediction: list[int], mask: list[int], expected: MaskScores
) -> None:
    scores = dice_iou_precision_recall(
        torch.tensor([prediction], dtype=torch.bool), torch.tensor([mask], dtype=torch.uint8)
    )
    assert scores == expected


def lines(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Rows and columns of a pixel's width, so far apart that none touches another."""
    mask_HW = np.zeros((side_px, side_px), dtype=bool)
    for at in range(1, side_px - 1, 4):
        begin, end = sorted(rng.integers(0, side_px + 1, 2))
        mask_HW[at, begin:end] = True
    return mask_HW.T if rng.random() < 0.5 else mask_HW


def drawn(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A mask of one kind, on 33 x 33 pixels."""
    side_px = 33
    mask_HW = np.zeros((side_px, side_px), dtype=bool)
    if kind == "full":
        mask_HW[:] = True
    elif kind == "one pixel":
        mask_HW[tuple(rng.integers(0, side_px, 2))] = True
    elif kind == "lines":
        mask_HW |= lines(rng, side_px)
    elif kind == "noise":
        mask_HW |= rng.random((side_px, side_px)) < rng.uniform(0.02, 0.9)
    elif kind == "boxes":
        for _ in range(3):
            (top, bottom), (left, right) = np.sort(rng.integers(0, side_px + 1, (2, 2)))
            mask_HW[top:bottom, left:right] = True
    return mask_HW


KINDS = ("empty", "full", "one pixel", "lines", "noise", "boxes")


def monai_pair(*masks_HW: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(mask_HW)[None, None].float() for mask_HW in masks_HW)


def known(value: torch.Tensor) -> float | None:
    """MONAI's NaN (both empty) and infinity (one empty) are our None."""
    return float(value) if math.isfinite(value) else None


@pytest.mark.filterwarnings("ignore:the (prediction|ground truth) of class:UserWarning")
# MONAI's own affair.
@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@pytest.mark.parametrize("true_kind", KINDS)
@pytest.mark.parametrize("predicted_kind", KINDS)
def test_scores_are_those_of_monai(predicted_kind: str, true_kind: str) -> None:
    rng = np.random.default_rng([KINDS.index(predicted_kind), KINDS.index(true_kind)])
    for _ in range(5):
        predicted_HW, true_HW = drawn(predicted_kind, rng), drawn(true_kind, rng)
        spacing_mm = tuple(rng.uniform(0.1, 2.0, 2))
        both = monai_pair(predicted_HW, true_HW)
        areas = dice_iou_precision_recall(
            torch.from_numpy(predicted_HW), torch.from_numpy(true_HW.astype(np.uint8))
        )
        shapes = shape_scores(predicted_HW, true_HW.astype(np.uint8), spacing_mm)
        is_empty = not predicted_HW.any()
        expected = {
            "dice": known(compute_dice(*both, ignore_empty=is_empty)),
            "iou": known(compute_iou(*both, ignore_empty=is_empty)),
        }
        for unit, spacing in (("px", None), ("mm", spacing_mm)):
            options = {"include_background": True, "spacing": spacing}
            hd95 = compute_hausdorff_distance(*both, percentile=95, **options)
            assd = compute_average_surface_distance(*both, symmetric=True, **options)
            expected |= {f"hd95_{unit}": known(hd95), f"assd_{unit}": known(assd)}
        found = asdict(areas) | asdict(shapes)
        for name, value in expected.items():
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-5)), name


def test_the_centre_line_dice_of_thin_lines_is_that_of_monai() -> None:
    """Its skeleton is a soft one, which of lines of a pixel's width is the lines themselves."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        predicted_HW, true_HW = lines(rng, 40), lines(rng, 40)
        predicted, true = monai_pair(predicted_HW, true_HW)
        predicted_line, true_line = soft_skel(predicted, 3), soft_skel(true, 3)
        precision = (predicted_line * true).sum() / predicted_line.sum()
        sensitivity = (true_line * predicted).sum() / true_line.sum()
        expected = float(2 * precision * sensitivity / (precision + sensitivity))
        scores = shape_scores(predicted_HW, true_HW.astype(np.uint8))
        assert scores.cldice == pytest.approx(0.0 if math.isnan(expected) else expected)


def block(top: int, left: int, height: int, width: int, side_px: int = 20) -> np.ndarray:
    mask_HW = np.zeros((side_px, side_px), dtype=np.uint8)
    mask_HW[top : top + height, left : left + width] = 1
    return mask_HW


EMPTY = block(0, 0, 0, 0)
BAR = block(5, 4, 3, 12)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        pytest.param(EMPTY, EMPTY, ShapeScores(), id="empty"),
        pytest.param(BAR, EMPTY, ShapeScores(0.0), id="false alarm"),
        pytest.param(EMPTY, BAR, ShapeScores(0.0), id="missed"),
        pytest.param(BAR, BAR, ShapeScores(1.0, 0.0, 0.0, 0.0, 0.0), id="same"),
        # Each centre line lies outside the other bar; the borders' rows are 4 to 6 pixels apart.
        pytest.param(
            block(2, 4, 1, 12), block(8, 4, 1, 12), ShapeScores(0.0, 6, 6, 3, 3), id="apart"
        ),
        # A line in the middle of a bar has its centre line, but for one of 11 pixels, which bends
        # off at an end; its border is a pixel away.
        pytest.param(
            block(6, 4, 1, 12), BAR, ShapeScores(20 / 21, 1, 34 / 38, 0.5, 17 / 38), id="thin"
        ),
    ],
)  # fmt: skip
def test_shapes_are_scored_as_by_hand(
    predicted: np.ndarray, true: np.ndarray, expected: ShapeScores
) -> None:
    scores = shape_scores(predicted == 1, true, (0.5, 0.5))
    for name in ShapeScores.__slots__:
        assert getattr(scores, name) == pytest.approx(getattr(expected, name)), name


def test_two_pixels_of_a_pixels_height_and_width_measure_as_their_spacing() -> None:
    scores = shape_scores(block(2, 3, 1, 1) == 1, block(5, 7, 1, 1), (0.2, 0.5))
    assert scores.hd95_px == scores.assd_px == 5.0
    assert scores.hd95_mm == scores.assd_mm == pytest.approx(math.hypot(3 * 0.2, 4 * 0.5))


def test_what_does_not_count_changes_no_shape_and_makes_no_border() -> None:
    """A mask that goes on below what is ignored is measured as if it ended nowhere."""
    rng = np.random.default_rng(0)
    true_HW = block(4, 4, 16, 5)
    true_HW[12:] = 255
    predicted_HW = block(4, 5, 16, 5) == 1
    scores = shape_scores(predicted_HW, true_HW)
    for _ in range(3):
        anything_HW = predicted_HW.copy()
        anything_HW[12:] = rng.random((8, 20)) < 0.5
        assert shape_scores(anything_HW, true_HW) == scores
    # Of the columns 4 to 8 and 5 to 9, rows 4 to 11: the sides, and the tops. No bottoms.
    assert scores.hd95_px == 1.0
    assert scores.assd_px == pytest.approx((8 + 7) / (8 + 8 + 3))
    assert shape_scores(true_HW == 0, np.full_like(true_HW, 255)) == ShapeScores()


def test_a_mask_walled_in_by_what_does_not_count_has_no_border() -> None:
    true_HW = np.full((9, 9), 255, dtype=np.uint8)
    true_HW[4, 4] = 1
    assert shape_scores(true_HW == 1, true_HW) == ShapeScores(1.0)


def test_the_centre_line_tells_a_broken_vessel_from_a_thin_one() -> None:
    """Both predictions miss as many pixels; only one misses a piece of the vessel."""
    true_HW = block(8, 2, 4, 16)
    thin_HW, broken_HW = true_HW.copy(), true_HW.copy()
    thin_HW[8] = 0
    broken_HW[8:12, 8:12] = 0
    thin, broken = (shape_scores(mask_HW == 1, true_HW) for mask_HW in (thin_HW, broken_HW))
    assert thin_HW.sum() == broken_HW.sum()
    assert thin.cldice is not None
    assert broken.cldice is not None
    assert thin.cldice > 0.95 > 0.9 > broken.cldice
