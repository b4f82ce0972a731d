"""``sam3cache.testing``: heads that obey pass, and each rule finds the head that breaks it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam3cache.errors import HeadError
from sam3cache.heads import HEADS, Head, ViewEncoder
from sam3cache.records import Batch
from sam3cache.testing import check_head

SHAPES = {
    "fpn_72": (16, 6, 6),
    "fpn_144": (16, 12, 12),
    "fpn_288": (16, 24, 24),
    "image_1008": (1, 84, 84),
}


class Good(Head):
    """A convolution beside the view: what the broken ones below are made of."""

    needs = ("fpn_72",)

    def __init__(self, level_shapes: Any, *, num_classes: int = 1, offset: Any = 0) -> None:
        super().__init__()
        self.num_classes, self.offset = num_classes, offset
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)
        self.view = ViewEncoder(num_classes, hidden_dim=8)

    def forward(self, batch: Batch) -> Tensor:
        view = self.view(batch.angles_B2)[:, :, None, None]
        return (self.layer(self.feature(batch, "fpn_72")) + view).float()


class Plain(nn.Module):
    """Not derived from ``Head``, and blind to the view."""

    needs = ("fpn_72",)

    def __init__(self, level_shapes: Any, *, num_classes: int = 1) -> None:
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(batch.levels["fpn_72"].float()).float()


class NormalisedByBatch(Good):
    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        self.norm = nn.BatchNorm2d(self.num_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.norm(super().forward(batch)) + self.view(batch.angles_B2)[:, :, None, None]


class AcrossTheBatch(Good):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return logits - logits.mean(0, keepdim=True) / 2


class InPlace(Good):
    def forward(self, batch: Batch) -> Tensor:
        batch.levels["fpn_72"].add_(1)
        return super().forward(batch)


class Unused(Good):
    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        self.spare = nn.Linear(2, 2)


class BlindToUnknown(Good):
    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        self.view = nn.Linear(2, self.num_classes)  # type: ignore[assignment]


class NotFiniteBackwards(Good):
    """The forward pass hides the NaN; its gradient does not."""

    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, batch: Batch) -> Tensor:
        scaled = batch.angles_B2 * self.gain
        shift = torch.where(scaled.isnan(), 0, scaled).sum(1)[:, None, None, None]
        return super().forward(batch) + shift / 90


class RandomInEvaluation(Good):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return logits + torch.rand_like(logits)


class OtherSeed(Good):
    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        self.start = nn.Parameter(torch.from_numpy(np.random.default_rng().random(1)).float())


class HiddenState(Good):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        if self.training:
            self.offset = self.offset + float(logits.detach().mean())
        return logits + self.offset


class OneSample(Good):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).view(1, -1, 6, 6)


class GridOfTheBatch(Good):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return F.interpolate(logits, 6 + len(logits))


class OneType(Good):
    def forward(self, batch: Batch) -> Tensor:
        logits = self.layer(self.feature(batch, "fpn_72"))
        start = self.view(batch.angles_B2)[:, :, None, None].expand(logits.shape)
        return start.index_add(0, torch.arange(len(logits)), logits)


class Rounded(Good):
    def forward(self, batch: Batch) -> Tensor:
        view = self.view(batch.angles_B2)[:, :, None, None]
        return (self.layer(self.feature(batch, "fpn_72")) + 3000 - 3000 + view).float()


class Detached(Good):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).detach()


class AssertsInTraining(Good):
    def forward(self, batch: Batch) -> Tensor:
        assert not self.training, "looked at alone"
        return super().forward(batch)


class Tied(Good):
    def __init__(self, level_shapes: Any, **options: Any) -> None:
        super().__init__(level_shapes, **options)
        num_channels = level_shapes["fpn_72"][0]
        self.first = nn.Conv2d(num_channels, num_channels, 1)
        self.second = nn.Conv2d(num_channels, num_channels, 1)
        self.second.weight = self.first.weight

    def forward(self, batch: Batch) -> Tensor:
        x = self.second(self.first(self.feature(batch, "fpn_72")).tanh())
        return (self.layer(x) + self.view(batch.angles_B2)[:, :, None, None]).float()


class Decided(Good):
    def forward(self, batch: Batch) -> Tensor:
        return (super().forward(batch) > 0).long()


class Untrained(Head):
    needs = ("fpn_72",)

    def __init__(self, level_shapes: Any, *, num_classes: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, batch: Batch) -> Tensor:
        return batch.levels["fpn_72"][:, : self.num_classes].float()


@pytest.mark.parametrize("name", HEADS)
def test_every_head_of_the_package_obeys(name: str) -> None:
    report = check_head(name, level_shapes=SHAPES, num_classes=3)
    assert report.head == name
    assert report.uses_angles == (name != "linear")
    assert not report.uses_batch_statistics
    assert report.logits_shape[0] == 3
    assert report.parts["total"].parameters > 0
    assert report.bf16_error < 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("film-detail", {"use_features": False}),
        ("film-detail", {"use_image": False}),
        ("film-detail", {"stride_px": 8, "use_image": False}),
        ("film-pyramid", {"levels": ["fpn_72", "fpn_144"]}),
        ("film-pyramid", {"levels": "fpn_72,fpn_288"}),
        ("film-pyramid", {"levels": "fpn_72,image_1008"}),
    ],
)
def test_so_do_their_other_forms(name: str, options: dict[str, Any]) -> None:
    assert check_head(name, level_shapes=SHAPES, options=options).uses_angles


def test_a_head_of_ones_own_is_reported_on() -> None:
    report = check_head(Good, level_shapes=SHAPES)
    assert (report.head, report.needs) == ("test_testing:Good", ("fpn_72",))
    assert report.logits_shape == (2, 6, 6)
    assert report.parts["layer"] == (34, 2 * 16 * 2 * 36 / 1e9)
    assert "angles: change a probability by" in str(report)
    assert check_head(Tied, level_shapes=SHAPES).parts["second"].parameters > 0
    plain = check_head(Plain, level_shapes=SHAPES)
    assert not plain.uses_angles
    assert "angles: unused" in str(plain)


def test_batch_statistics_are_no_mistake_but_said() -> None:
    report = check_head(NormalisedByBatch, level_shapes=SHAPES)
    assert report.uses_batch_statistics
    assert "depend on the others" in str(report)


def test_a_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_head(Good, level_shapes=SHAPES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (AcrossTheBatch, "gives a sample other logits beside others than alone"),
        (InPlace, "changes the fpn_72 that it is given; that is the cache itself"),
        (Unused, r"gives spare\.weight no gradient; the logits do not depend on it"),
        (BlindToUnknown, "gradient that is not finite; angles may be unknown"),
        (NotFiniteBackwards, "gives gain a gradient that is not finite"),
        (RandomInEvaluation, "gives other logits for the same batch in evaluation mode"),
        (OtherSeed, "begins with another start although the seed is the same"),
        (HiddenState, "gives other logits when loaded from its checkpoint"),
        (OneSample, r"returned \(1, 4, 6, 6\) for a batch of 2; expected logits of shape \(2, 2"),
        (GridOfTheBatch, r"on grids of \(7, 7\) and \(8, 8\) and \(11, 11\); expected the same"),
        (OneType, "fails on bfloat16 autocast: RuntimeError"),
        (Rounded, "gives logits that bfloat16 autocast changes by"),
        (Detached, "lets no gradient through in training: RuntimeError"),
        (AssertsInTraining, "fails on training: AssertionError: looked at alone; take shapes"),
        (Decided, "returned torch.int64 on a batch of 1; expected logits, float32"),
        (Untrained, "has no parameter to train; register its layers as attributes"),
        ("test_testing:Nothing", "cannot be imported: AttributeError"),
        ("unet", "no head is named 'unet'"),
    ],
)
def test_a_rule_that_is_broken_is_named_in_one_line(head: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message) as caught:
        check_head(head, level_shapes=SHAPES)
    assert "\n" not in str(caught.value)


def test_a_class_that_cannot_be_named_is_refused() -> None:
    class Local(Good):
        pass

    with pytest.raises(HeadError, match=r"Local is not a class at the top level of a module"):
        check_head(Local, level_shapes=SHAPES)


def test_options_that_no_checkpoint_can_hold_are_refused() -> None:
    with pytest.raises(HeadError, match="options that are no plain JSON values"):
        check_head(Good, level_shapes=SHAPES, options={"offset": torch.zeros(1)})
