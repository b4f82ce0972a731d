"""The view encoder tells views apart, before training and after it."""

import math

import pytest
import torch
from torch import Tensor, nn

from sam3cache.heads import FiLM, ViewEncoder

VIEWS = torch.tensor([[0.0, 0.0], [30.0, -25.0], [-45.0, 25.0], [90.0, 0.0], [-120.0, 40.0]])


def spread(embedding_BD: Tensor) -> float:
    """Root mean square distance of embeddings from their mean, relative to their own size."""
    embedding_BD = embedding_BD.detach()
    centred = embedding_BD - embedding_BD.mean(0)
    return float(centred.square().mean().sqrt() / embedding_BD.square().mean().sqrt())


@pytest.fixture
def encoder() -> ViewEncoder:
    torch.manual_seed(0)
    return ViewEncoder()


def train_a_little(encoder: ViewEncoder) -> None:
    """Teach the encoder, through a FiLM, to carry the sine of the primary angle."""
    generator = torch.Generator().manual_seed(1)
    film = FiLM(256, 8)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *film.parameters()], lr=1e-4)
    for _ in range(40):
        angles_B2 = torch.rand(16, 2, generator=generator) * 120 - 60
        modulated = film(torch.ones(16, 8, 1, 1), encoder(angles_B2)).mean((1, 2, 3))
        loss = (modulated - angles_B2[:, 0].deg2rad().sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_encoder_has_about_a_million_parameters(encoder: ViewEncoder) -> None:
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize("trained", [False, True], ids=["at first", "after training"])
def test_different_views_have_different_embeddings(encoder: ViewEncoder, trained: bool) -> None:
    if trained:
        train_a_little(encoder)
    embedding_BD = encoder(VIEWS)
    assert spread(embedding_BD) > 0.3
    cosines = nn.functional.cosine_similarity(embedding_BD[:, None], embedding_BD[None], dim=-1)
    assert (cosines - torch.eye(len(VIEWS))).max() < 0.95


@pytest.mark.parametrize("trained", [False, True], ids=["at first", "after training"])
@pytest.mark.parametrize("axis", [0, 1], ids=["primary", "secondary"])
def test_views_one_degree_apart_have_different_embeddings(
    encoder: ViewEncoder, trained: bool, axis: int
) -> None:
    if trained:
        train_a_little(encoder)
    step = torch.zeros(2)
    step[axis] = 1.0
    change = encoder(VIEWS + step) - encoder(VIEWS)
    assert change.square().mean(1).sqrt().min() > 0.01 * encoder(VIEWS).square().mean().sqrt()


def test_an_angle_and_itself_plus_360_degrees_are_one_view(encoder: ViewEncoder) -> None:
    around = encoder(VIEWS + torch.tensor([360.0, 0.0]))
    torch.testing.assert_close(around, encoder(VIEWS), atol=1e-4, rtol=1e-4)


def test_an_unknown_angle_has_an_embedding_of_its_own_that_learns(encoder: ViewEncoder) -> None:
    angles_B2 = torch.tensor([[math.nan, math.nan], [math.nan, 25.0], [30.0, math.nan]])
    embedding_BD = encoder(torch.cat((angles_B2, VIEWS)))
    assert embedding_BD.isfinite().all()
    assert torch.cdist(embedding_BD, embedding_BD).add(torch.eye(8) * 9).min() > 0.1
    embedding_BD[:3].sum().backward()
    assert encoder.unknown_2F.grad is not None
    assert (encoder.unknown_2F.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_film_is_near_identity_at_first_yet_differs_by_view(encoder: ViewEncoder) -> None:
    torch.manual_seed(0)
    film, feature_BCHW = FiLM(256, 32), torch.randn(1, 32, 6, 6).expand(len(VIEWS), -1, -1, -1)
    modulated = film(feature_BCHW, encoder(VIEWS))
    change = (modulated - feature_BCHW).square().mean((1, 2, 3)).sqrt()
    assert change.max() < 0.5
    assert change.min() > 0.01
    assert (modulated[1:] - modulated[:1]).abs().mean() > 0.01


def test_autocast_does_not_round_views_together(encoder: ViewEncoder) -> None:
    film = FiLM(256, 32)
    exact = film.coefficients(encoder(VIEWS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = film.coefficients(encoder(VIEWS))
    assert all(torch.equal(*pair) for pair in zip(exact, under_autocast, strict=True))
