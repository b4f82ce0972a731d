"""What a head is asked, and what its logits and a mask then say of classes."""

import pytest
import torch

from sam3cache.tasks import class_probabilities, decide, mask_planes, num_outputs


@pytest.mark.parametrize(
    ("task", "num_classes", "expected"), [("multilabel", 1, 1), ("multiclass", 14, 15)]
)
def test_a_head_gives_a_plane_a_class_and_one_for_none(task, num_classes, expected) -> None:
    assert num_outputs(task, num_classes) == expected


def test_each_pixel_of_a_multiclass_head_is_of_one_class_or_of_none() -> None:
    logits_KHW = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 1.5], [1.0, 0.0, 4.0]])[:, None]
    assert decide(logits_KHW, "multiclass").int().tolist() == [[[1, 0, 0]], [[0, 0, 1]]]
    probability_CHW = class_probabilities(logits_KHW, "multiclass")
    assert torch.equal(probability_CHW, logits_KHW.softmax(0)[1:])
    assert torch.equal(decide(logits_KHW[None], "multiclass")[0], decide(logits_KHW, "multiclass"))


def test_each_plane_of_a_multilabel_head_is_decided_by_itself() -> None:
    logits_KHW = torch.tensor([[-1.0, 0.0, 2.0], [3.0, -3.0, 0.1]])[:, None]
    assert decide(logits_KHW, "multilabel").int().tolist() == [[[0, 1, 1]], [[1, 0, 1]]]
    assert decide(logits_KHW, "multilabel", 0.9).int().tolist() == [[[0, 0, 0]], [[1, 0, 0]]]


def test_class_numbers_become_planes_and_what_does_not_count_stays_so() -> None:
    mask_1HW = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    planes_CHW = mask_planes(mask_1HW, "multiclass", 3)
    assert planes_CHW.tolist() == [[[0, 1, 0, 255]], [[0, 0, 1, 255]], [[0, 0, 0, 255]]]
    assert mask_planes(planes_CHW, "multilabel", 3) is planes_CHW
