"""Every loss by name: MONAI's and PyTorch's own values, what does not count, weights, refusals.

Shape legend: see ``sam3cache.training.loss``.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sam3cache.errors import ConfigError
from sam3cache.features import ClassCount
from sam3cache.tasks import Task
from sam3cache.training import build_loss, default_loss
from sam3cache.training.loss import LOSSES, balanced_weights

NUM_CLASSES = 3
TASKS: tuple[Task, ...] = ("multilabel", "multiclass")
ALL = [
    (name, task)
    for name in LOSSES
    for task in TASKS
    if {"dice-bce": "multilabel", "dice-ce": "multiclass"}.get(name, task) == task
]


def random_case(
    task: Task, num_samples: int = 2, side: int = 9, size_px: int = 24
) -> tuple[Tensor, Tensor]:
    """Logits and a target of blocks; in "multiclass" one class is in no image."""
    generator = torch.Generator().manual_seed(0)
    num_planes = NUM_CLASSES + (task == "multiclass")
    logits = 2 * torch.randn(num_samples, num_planes, side, side, generator=generator).double()
    num_stored, highest = (NUM_CLASSES, 2) if task == "multilabel" else (1, 3)
    shape = (num_samples, num_stored, size_px // 4, size_px // 4)
    blocks = torch.randint(highest, shape, generator=generator, dtype=torch.uint8)
    return logits.requires_grad_(), blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)


def upsampled(logits: Tensor, size_px: int) -> Tensor:
    return F.interpolate(logits, (size_px, size_px), mode="bilinear", align_corners=False)


def one_hot(target: Tensor, num_planes: int) -> Tensor:
    numbers = torch.arange(num_planes)[:, None, None]
    return (target == numbers).double()


def monais_dice(x: Tensor, target: Tensor, task: Task) -> Tensor:
    from monai.losses import DiceLoss

    if task == "multilabel":
        return DiceLoss(sigmoid=True)(x, target.double())
    planes = DiceLoss(softmax=True, include_background=False, reduction="none")(
        x, one_hot(target, x.shape[1])
    )
    present = one_hot(target, x.shape[1])[:, 1:].amax((2, 3), keepdim=True)
    assert not present.all(), "the case is to have a class that no image has"
    return ((planes * present).sum(1) / present.sum(1)).mean()


def monais_focal(x: Tensor, target: Tensor, task: Task) -> Tensor:
    from monai.losses import FocalLoss

    if task == "multilabel":
        return FocalLoss(gamma=1.5)(x, target)
    # A pixel's loss is its true class's; MONAI's own mean is over planes as well.
    return FocalLoss(gamma=1.5, use_softmax=True, to_onehot_y=True)(x, target) * x.shape[1]


def of_present_planes(
    loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor, task: Task
) -> Tensor:
    """Mean over images of the mean over planes, one by one."""
    p = x.sigmoid() if task == "multilabel" else x.softmax(1)[:, 1:]
    y = target.double() if task == "multilabel" else one_hot(target, x.shape[1])[:, 1:]
    means = []
    for image_p, image_y in zip(p, y, strict=True):
        has = [task == "multilabel" or bool(plane.any()) for plane in image_y]
        planes = [
            loss(image_p[None, i : i + 1], image_y[None, i : i + 1])
            for i in range(len(has))
            if has[i]
        ]
        means.append(sum(planes) / len(planes))
    return sum(means) / len(means)


def monais_cldice(x: Tensor, target: Tensor, task: Task) -> Tensor:
    from monai.losses import SoftclDiceLoss

    return of_present_planes(SoftclDiceLoss(iter_=4), x, target, task)


def monais_boundary(x: Tensor, target: Tensor, task: Task) -> Tensor:
    from monai.losses import BoundaryLoss

    return of_present_planes(BoundaryLoss(), x, target, task) / target.shape[-1]


def pytorchs_entropy(x: Tensor, target: Tensor, task: Task) -> Tensor:
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(x, target.double())
    return F.cross_entropy(x, target[:, 0].long())


Reference = Callable[[Tensor, Tensor, Task], Tensor]


def shares(*parts: tuple[float, Reference]) -> Reference:
    return lambda x, target, task: sum(share * part(x, target, task) for share, part in parts)


DEFAULT = ((0.3, pytorchs_entropy), (0.7, monais_dice))
REFERENCES: dict[str, tuple[dict[str, Any], Reference]] = {
    "dice-bce": ({"bce_weight": 0.3}, shares(*DEFAULT)),
    "dice-ce": ({"ce_weight": 0.3}, shares(*DEFAULT)),
    "focal": ({"gamma": 1.5}, monais_focal),
    "dice-focal": (
        {"gamma": 1.5, "focal_weight": 0.2},
        shares((0.2, monais_focal), (0.8, monais_dice)),
    ),
    "cldice": (
        {"cldice_weight": 0.4, "iterations": 4, "ce_weight": 0.3},
        shares((0.4, monais_cldice), *((0.6 * share, part) for share, part in DEFAULT)),
    ),
    "boundary": (
        {"boundary_weight": 0.4, "ce_weight": 0.3},
        shares((0.4, monais_boundary), *((0.6 * share, part) for share, part in DEFAULT)),
    ),
}


@pytest.mark.parametrize(("name", "task"), ALL)
def test_loss_and_gradient_are_those_of_monai_and_pytorch(name: str, task: Task) -> None:
    options, reference = REFERENCES[name]
    logits, target = random_case(task)
    ours = build_loss(name, task, **options)(logits, target)
    theirs = reference(upsampled(logits, 24), target, task)
    # MONAI's focal loss and distances are in float32.
    torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits),
        torch.autograd.grad(theirs, logits),
        rtol=1e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize(("name", "task"), ALL)
def test_padding_is_as_if_cut_off(name: str, task: Task) -> None:
    options = {"boundary_weight": 1.0} if name == "boundary" else {}
    loss = build_loss(name, task, **options)
    logits, target = random_case(task)
    x = upsampled(logits, 24)[..., :16, :16]
    cut = loss(x, target[..., :16, :16].contiguous())
    target[..., 16:, :] = 255
    target[..., 16:] = 255
    padded = loss(logits, target)
    if name == "boundary":  # its distances are in sides of the grid
        padded = padded * 24 / 16
    torch.testing.assert_close(padded, cut, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "task"), ALL)
def test_pixels_of_the_ignored_label_teach_nothing(name: str, task: Task) -> None:
    logits, target = random_case(task, side=24)
    target[..., 5:11, 6:13] = 255
    loss = build_loss(name, task)
    before = loss(logits, target)
    (gradient,) = torch.autograd.grad(before, logits)
    assert not gradient[..., 5:11, 6:13].any()
    assert gradient[..., :5, :].any()
    with torch.no_grad():
        logits[..., 5:11, 6:13] += 5
    torch.testing.assert_close(loss(logits, target), before)


@pytest.mark.parametrize(("name", "task"), ALL)
def test_an_image_where_nothing_counts_gives_no_gradient(name: str, task: Task) -> None:
    logits, target = random_case(task)
    target[:] = 255
    loss = build_loss(name, task)(logits, target)
    assert loss.isfinite()
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize(("name", "task"), ALL)
def test_an_image_without_any_class_gives_a_finite_loss(name: str, task: Task) -> None:
    logits, target = random_case(task)
    loss = build_loss(name, task)(logits, target.zero_())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "task"), ALL)
def test_parts_of_a_batch_add_up_and_neither_weighs_more(name: str, task: Task) -> None:
    logits, target = random_case(task, num_samples=3)
    target[0, ..., 10:] = 255
    loss = build_loss(name, task, class_weights=[1, 2, 3])
    alone = [loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(logits, target), sum(alone) / 3)


@pytest.mark.parametrize(("name", "task"), ALL)
def test_weights_that_are_alike_are_no_weights(name: str, task: Task) -> None:
    logits, target = random_case(task)
    plain = build_loss(name, task)(logits, target)
    # Beside classes, the pixels of none have weight 1.
    alike = [1.0] * 3 if task == "multiclass" else [0.2] * 3
    torch.testing.assert_close(build_loss(name, task, class_weights=alike)(logits, target), plain)


@pytest.mark.parametrize("name", [name for name, task in ALL if task == "multilabel"])
def test_planes_count_by_their_weights(name: str) -> None:
    logits, target = random_case("multilabel")
    by_plane = [
        build_loss(name, "multilabel")(logits[:, i : i + 1], target[:, i : i + 1]) for i in range(3)
    ]
    weighted = build_loss(name, "multilabel", class_weights=[3, 0, 1])(logits, target)
    torch.testing.assert_close(weighted, (3 * by_plane[0] + by_plane[2]) / 4)


def test_classes_count_by_their_weights_as_pytorch_has_it() -> None:
    logits, target = random_case("multiclass")
    target[:, :, :3] = 255
    weights = [4.0, 0.5, 1.5]
    loss = build_loss("dice-ce", "multiclass", class_weights=weights, ce_weight=1.0)
    x = upsampled(logits, 24)
    theirs = [
        F.cross_entropy(
            x[i : i + 1],
            target[i : i + 1, 0].long(),
            torch.tensor([1.0, *weights]).double(),
            ignore_index=255,
        )
        for i in range(2)
    ]
    torch.testing.assert_close(loss(logits, target), sum(theirs) / 2)


@pytest.mark.parametrize("name", [name for name, task in ALL if task == "multiclass"])
def test_a_class_of_more_weight_pulls_harder(name: str) -> None:
    logits, target = random_case("multiclass")

    def pull(class_weights: list[float]) -> float:
        loss = build_loss(name, "multiclass", class_weights=class_weights)(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        return float(-gradient[:, 1].clamp(max=0).sum())

    assert pull([9, 1, 1]) > 1.2 * pull([1, 1, 1])


@pytest.mark.parametrize(("name", "task"), ALL)
def test_nothing_of_full_size_is_kept_for_the_backward_pass(name: str, task: Task) -> None:
    logits, target = random_case(task, num_samples=5, side=4, size_px=64)
    loss = build_loss(name, task)(logits, target)
    graph, outlives = [loss.grad_fn], 0
    while graph:
        node = graph.pop()
        if node is None:
            continue
        saved = getattr(node, "saved_tensors", ())
        outlives += sum(tensor.numel() for tensor in saved)
        graph += [following for following, _ in node.next_functions]
    # Of a sum of two losses, each has a gradient of the logits' own size.
    assert 0 < outlives <= 2 * logits.numel() < target.numel()


@pytest.mark.parametrize(("name", "task"), ALL)
def test_autocast_does_not_touch_a_loss(name: str, task: Task) -> None:
    logits, target = random_case(task)
    loss, logits = build_loss(name, task), logits.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(logits, target)
    assert torch.equal(under_autocast, loss(logits, target))


@pytest.mark.parametrize(("name", "task"), ALL)
def test_extreme_logits_give_a_finite_loss_and_gradient(name: str, task: Task) -> None:
    logits, target = random_case(task)
    logits = (logits.detach().float() * 200).requires_grad_()
    loss = build_loss(name, task)(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "task", "options", "message"),
    [
        ("tversky", "multilabel", {}, "no loss is named 'tversky'; take one of dice-bce, dice-ce"),
        ("dice-bce", "multiclass", {}, "for a multilabel label set, this one is multiclass; take"),
        ("dice-ce", "multilabel", {}, "take dice-bce, or leave --loss out"),
        ("dice-bce", "multilabel", {"gamma": 2}, "has no option gamma; it takes bce_weight"),
        ("dice-bce", "multilabel", {"bce_weight": 1.5}, "is 1.5: expected a number from 0 to 1"),
        ("focal", "multilabel", {"gamma": "high"}, "gamma of loss focal is 'high': expected"),
        ("cldice", "multiclass", {"iterations": 0}, "iterations of loss cldice is 0: expected"),
        ("cldice", "multiclass", {"iterations": 2.5}, "is 2.5: expected a whole number"),
        ("focal", "multiclass", {"class_weights": [-1, 1, 1]}, "expected a number of 0 or more"),
        ("focal", "multiclass", {"class_weights": [0, 0, 0]}, "and not all 0"),
        ("focal", "multiclass", {"class_weights": ["a", 1, 1]}, "expected a number of 0 or more"),
        ("focal", "multilabel", {"class_weights": [2]}, "with one class there is nothing to weigh"),
        ("focal", "multiclass", {"class_weights": [1, 2]}, "has 2 values for 3 classes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    name: str, task: Task, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_loss(name, task, **options)(*random_case(task))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["focal", "dice-focal", "cldice", "boundary"])
@pytest.mark.parametrize("installed", [None, "1.5.2"])
def test_a_library_that_is_missing_or_old_is_named_with_what_to_install(
    loss: str, installed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is installed is what stands on the path, as importlib finds it.
    elsewhere = [entry for entry in sys.path if not entry.endswith("site-packages")]
    if installed is not None:
        record = tmp_path / f"monai-{installed}.dist-info" / "METADATA"
        record.parent.mkdir()
        record.write_text(f"Metadata-Version: 2.1\nName: monai\nVersion: {installed}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    message = rf"needs monai 1\.6 or newer, installed is {installed or 'none'}; run"
    with pytest.raises(ConfigError, match=message) as caught:
        build_loss(loss, "multilabel")
    assert '"sam3cache[losses]"' in str(caught.value)
    for task in TASKS:
        build_loss(default_loss(task), task)


def test_balanced_weights_follow_the_sizes_of_the_classes_where_they_are_shown() -> None:
    def count(num_samples: int, num_pixels: int) -> ClassCount:
        return ClassCount("", {"train": num_samples}, {"train": num_pixels}, {"train": 10**6})

    # Mean sizes of 50, 200 and 100 pixels, and a class that no mask shows.
    counts = [count(2, 100), count(1, 200), count(10, 1000), count(0, 0)]
    assert balanced_weights(counts) == [2.0, 0.5, 1.0, 1.0]
