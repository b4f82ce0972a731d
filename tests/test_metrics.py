"""Dice and its kin, against counts done by hand."""

import pytest
import torch

from sam3cache.metrics import MaskScores, dice_iou_precision_recall


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
