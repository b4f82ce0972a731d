"""The users' recipe: what it computes, and that the view reaches its output."""

import copy

import pytest
import torch
from torch import nn

from sam3cache.heads import Head, build_head
from sam3cache.heads.film_conv import modulated_conv
from sam3cache.records import Batch

SHAPES = {"fpn_72": (256, 72, 72)}


def blank_batch(num_samples: int, num_channels: int = 256, side: int = 72) -> Batch:
    generator = torch.Generator().manual_seed(0)
    feature_BCHW = torch.randn(num_samples, num_channels, side, side, generator=generator)
    angles_B2 = torch.rand(num_samples, 2, generator=generator) * 90 - 45
    return Batch({"fpn_72": feature_BCHW.half()}, angles_B2, torch.full((num_samples, 2), 1008))


def test_the_recipe_has_the_layers_and_the_size_that_were_asked_for() -> None:
    head = build_head("film-conv", SHAPES)
    kinds = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in kinds] == [(256, 128), (128, 64), (64, 1)]
    assert not any(isinstance(layer, nn.LayerNorm) for layer in head.modules())
    parts = head.describe()
    assert parts["total"] == sum(p.numel() for p in head.parameters()) < 5_000_000
    assert parts["total"] == parts["view_encoder"] + parts["film"] + parts["segmentation"]


def test_modulating_the_weights_is_modulating_the_features() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 3, padding=1).double()
    feature_BCHW = torch.randn(3, 5, 7, 6, dtype=torch.double)
    leaves = [torch.randn(3, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    scale_BC, shift_BC = leaves
    plain = conv(feature_BCHW * scale_BC[:, :, None, None] + shift_BC[:, :, None, None])
    folded = modulated_conv(conv, feature_BCHW, scale_BC, shift_BC)
    torch.testing.assert_close(folded, plain)
    upstream = torch.randn_like(plain)
    parameters = [*leaves, *conv.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(folded, parameters, upstream),
        torch.autograd.grad(plain, parameters, upstream),
    )


@pytest.mark.parametrize("name", ["film-conv", "linear"])
def test_half_precision_features_give_float32_logits(name: str) -> None:
    logits_BKHW = build_head(name, SHAPES, num_classes=3)(blank_batch(2))
    assert logits_BKHW.shape == (2, 3, 72, 72)
    assert logits_BKHW.dtype == torch.float32


def test_bf16_autocast_stays_close_to_float32() -> None:
    shapes = {"fpn_72": (16, 12, 12)}
    head = build_head("film-conv", shapes).eval()
    batch = blank_batch(2, 16, 12)
    with torch.no_grad():
        exact = head(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = head(batch)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def learn_the_sign_of_the_angle(name: str) -> tuple[float, float, Head]:
    """Train on blank pictures whose mask is all, for LAO, or nothing, for RAO."""
    torch.manual_seed(0)
    head = build_head(name, {"fpn_72": (32, 6, 6)}, {})
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        angles_B2 = torch.rand(16, 2, generator=generator) * 90 - 45
        feature_BCHW = torch.randn(16, 32, 6, 6, generator=generator).half()
        batch = Batch({"fpn_72": feature_BCHW}, angles_B2, torch.full((16, 2), 1008))
        target = (angles_B2[:, 0] > 0).float()[:, None, None, None].expand(-1, 1, 6, 6)
        loss = nn.functional.binary_cross_entropy_with_logits(head(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-5:]) / 5, copy.deepcopy(head).eval()


def test_film_conv_learns_a_task_that_only_the_angle_decides() -> None:
    first, last, head = learn_the_sign_of_the_angle("film-conv")
    assert last < 0.25 < 0.6 < first
    generator = torch.Generator().manual_seed(9)
    feature_BCHW = torch.randn(1, 32, 6, 6, generator=generator).half().expand(2, -1, -1, -1)
    angles_B2 = torch.tensor([[30.0, 0.0], [-30.0, 0.0]])
    lao, rao = head(Batch({"fpn_72": feature_BCHW}, angles_B2, torch.full((2, 2), 1008)))
    assert lao.sigmoid().mean() > 0.8
    assert rao.sigmoid().mean() < 0.2


def test_linear_cannot_learn_a_task_that_only_the_angle_decides() -> None:
    _, last, _ = learn_the_sign_of_the_angle("linear")
    assert last > 0.6
