"""The default head: its size, its stride, and that it may take frozen features or leave them."""

import pytest
import torch
from torch import Tensor, nn

from sam3cache.errors import HeadError
from sam3cache.heads import HEADS, build_head, describe_head, forward_gflop
from sam3cache.heads.film_detail import FilmDetail, channel_norm
from sam3cache.heads.head import Head
from sam3cache.records import Batch
from sam3cache.training import TrainConfig

SHAPES = {"fpn_72": (256, 72, 72), "image_1008": (1, 1008, 1008)}
SMALL_SHAPES = {"fpn_72": (16, 6, 6), "image_1008": (1, 84, 84)}
SMALL = {"embedding_dim": 32, "width": 8, "context_width": 8}


def small_batch(num_samples: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    feature_BCHW = torch.randn(num_samples, 16, 6, 6, generator=generator).half()
    image_BCHW = torch.randint(256, (num_samples, 1, 84, 84), generator=generator).to(torch.uint8)
    angles_B2 = torch.rand(num_samples, 2, generator=generator) * 90 - 45
    levels = {"fpn_72": feature_BCHW, "image_1008": image_BCHW}
    return Batch(levels, angles_B2, torch.full((num_samples, 2), 84))


def with_features(batch: Batch, feature_BCHW: Tensor) -> Batch:
    return Batch(batch.levels | {"fpn_72": feature_BCHW}, batch.angles_B2, batch.content_B2)


def small_head(**options: object) -> Head:
    torch.manual_seed(0)
    return build_head("film-detail", SMALL_SHAPES, SMALL | options)


def after_some_steps(head: Head) -> Head:
    """Train until no zero of the first weights is left."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for seed in range(3):
        loss = (head(small_batch(seed=seed)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def test_it_is_as_large_and_as_light_as_was_asked_for() -> None:
    head = build_head("film-detail", SHAPES)
    parts = head.describe()
    assert 4e6 < parts["total"] < 6e6
    assert 0.8e6 < parts["view_encoder"] < 1.3e6
    assert parts["total"] == sum(p.numel() for p in head.parameters())
    assert forward_gflop(head, SHAPES) < 20


def test_arithmetic_is_counted_as_pytorch_documents_it() -> None:
    class OneLayer(Head):
        needs = ("fpn_72",)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(16, 4, 3, padding=1)
            self.dropout = nn.Dropout()

        def forward(self, batch: Batch) -> Tensor:
            return self.dropout(self.layer(batch.levels["fpn_72"].float()))

    head, before = OneLayer(), torch.get_rng_state()
    # Two operations a weight and position.
    assert forward_gflop(head, SMALL_SHAPES) == pytest.approx(2 * 16 * 4 * 9 * 36 / 1e9)
    assert head.training
    assert torch.equal(torch.get_rng_state(), before), "a count must not change a training"


@pytest.mark.parametrize("name", HEADS)
def test_parts_add_up_to_the_whole(name: str) -> None:
    shapes = SHAPES | {"fpn_144": (64, 36, 36)}
    head = build_head(name, shapes, num_classes=2)
    parts = describe_head(head, shapes)
    total = parts.pop("total")
    assert "other" not in parts, "every parameter and product belongs to a part"
    assert [*parts] == [part for part, _ in head.named_children()]
    assert total.parameters == sum(p.numel() for p in head.parameters())
    assert total.parameters == sum(part.parameters for part in parts.values())
    assert total.gflop == pytest.approx(sum(part.gflop for part in parts.values()))
    assert total.gflop == forward_gflop(head, shapes)
    assert all(part.gflop > 0 for part in parts.values())


def test_what_a_head_does_by_itself_is_a_part_of_its_own() -> None:
    class ByItself(Head):
        needs = ("fpn_72",)

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU())
            self.weight = nn.Parameter(torch.ones(1, 4, 1, 1))

        def forward(self, batch: Batch) -> Tensor:
            # A part's own parts, not the part; and twice.
            first = self.layers[0]
            hidden = first(batch.levels["fpn_72"].float()) + first(batch.levels["fpn_72"].float())
            return nn.functional.conv2d(hidden, self.weight)

    parts = describe_head(ByItself(), SMALL_SHAPES)
    assert [*parts] == ["layers", "other", "total"]
    assert parts["layers"] == (16 * 4 + 4, 2 * (2 * 16 * 4 * 36) / 1e9)
    assert parts["other"] == (4, 2 * 4 * 36 / 1e9)
    assert parts["total"].parameters == 16 * 4 + 4 + 4


@pytest.mark.parametrize(("stride_px", "side"), [(4, 252), (8, 126)])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_logits_have_the_stride_that_was_asked_for(
    stride_px: int, side: int, num_channels: int
) -> None:
    shapes = SHAPES | {"image_1008": (num_channels, 1008, 1008)}
    options = SMALL | {"stride_px": stride_px}
    head = build_head("film-detail", shapes, options, num_classes=3).eval()
    levels = {
        "fpn_72": torch.zeros(1, *shapes["fpn_72"], dtype=torch.float16),
        "image_1008": torch.zeros(1, *shapes["image_1008"], dtype=torch.uint8),
    }
    batch = Batch(levels, torch.full((1, 2), torch.nan), torch.full((1, 2), 1008))
    with torch.no_grad():
        logits_BKHW = head(batch)
    assert logits_BKHW.shape == (1, 3, side, side)
    assert logits_BKHW.dtype == torch.float32
    assert logits_BKHW.isfinite().all()


def test_a_new_head_ignores_the_features_and_a_trained_one_does_not() -> None:
    head, batch = small_head().eval(), small_batch()
    other = with_features(batch, small_batch(seed=1).levels["fpn_72"])
    trained = after_some_steps(small_head())
    with torch.no_grad():
        assert torch.equal(head(batch), head(other))
        assert not torch.allclose(trained(batch), trained(other), atol=1e-4)


def test_every_parameter_learns() -> None:
    head = after_some_steps(small_head()).train()
    head(small_batch()).square().mean().backward()
    without = {name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()}
    # Whether an angle is unknown was not asked here.
    assert without == {"view_encoder.unknown_2F"}


def test_the_scale_of_a_backbones_features_does_not_matter() -> None:
    head, batch = after_some_steps(small_head()), small_batch()
    scaled = with_features(batch, batch.levels["fpn_72"].float() * 40 + 300)
    with torch.no_grad():
        torch.testing.assert_close(head(batch), head(scaled), atol=1e-3, rtol=1e-3)
    normal_BCHW = channel_norm(batch.levels["fpn_72"].float())
    torch.testing.assert_close(normal_BCHW.mean(1), torch.zeros(2, 6, 6))
    torch.testing.assert_close(normal_BCHW.std(1, correction=0), torch.ones(2, 6, 6))


def test_what_a_picture_gives_does_not_depend_on_those_beside_it() -> None:
    head, batch = after_some_steps(small_head()).train(), small_batch(3)
    alone = Batch(
        {name: level[:1] for name, level in batch.levels.items()},
        batch.angles_B2[:1],
        batch.content_B2[:1],
    )
    with torch.no_grad():
        torch.testing.assert_close(head(batch)[:1], head(alone))


def test_it_can_be_had_without_the_features() -> None:
    head, batch = after_some_steps(small_head(use_features=False)), small_batch()
    other = with_features(batch, small_batch(seed=1).levels["fpn_72"])
    with torch.no_grad():
        assert torch.equal(head(batch), head(other))
    assert head.needs == ("image_1008",)
    parts = {name.split(".")[1] for name, _ in head.named_parameters() if "segmentation" in name}
    assert parts == {"film", "eighth", "eighth_to_quarter", "quarter", "logits"}
    shapes = {"image_1008": SMALL_SHAPES["image_1008"]}
    build_head("film-detail", shapes, SMALL | {"use_features": False})


def test_it_can_be_had_without_the_picture() -> None:
    shapes = {"fpn_72": SMALL_SHAPES["fpn_72"]}
    torch.manual_seed(0)
    head = build_head("film-detail", shapes, SMALL | {"use_image": False}, num_classes=3).eval()
    assert head.needs == ("fpn_72",)
    batch, other = small_batch(), small_batch(seed=1)
    with torch.no_grad():
        logits_BKHW = head(batch)
        assert logits_BKHW.shape == (2, 3, 21, 21), "stride 4, as with the picture"
        # There is nothing else to start from: a new head does not ignore the features.
        assert not torch.allclose(logits_BKHW, head(with_features(batch, other.levels["fpn_72"])))
    parts = describe_head(build_head("film-detail", SHAPES, {"use_image": False}), SHAPES)
    whole = describe_head(build_head("film-detail", SHAPES), SHAPES)
    assert parts["context"] == whole["context"]
    assert "stem" not in parts


@pytest.mark.parametrize("use_features", [True, False])
def test_the_view_reaches_the_output_with_and_without_features(use_features: bool) -> None:
    head, batch = after_some_steps(small_head(use_features=use_features)), small_batch()
    turned = Batch(batch.levels, -batch.angles_B2, batch.content_B2)
    with torch.no_grad():
        assert not torch.allclose(head(batch), head(turned), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_px": 2}, "stride_px is 2: expected 4 or 8"),
        ({"stride_px": 4.0}, "stride_px is 4.0: expected 4 or 8"),
        ({"width": 12}, "width is 12: expected a multiple of 8"),
        ({"context_width": 0}, "context_width is 0: expected a multiple of 8"),
        ({"embedding_dim": 0}, "embedding_dim is 0: expected at least 1"),
        ({"use_features": "no"}, "use_features is 'no': expected true or false"),
        ({"use_image": 0}, "use_image is 0: expected true or false"),
        ({"use_features": False, "use_image": False}, "are both false: expected one of them true"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_one_line(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(HeadError, match=message):
        build_head("film-detail", SMALL_SHAPES, options)


def test_bf16_autocast_stays_close_to_float32() -> None:
    head, batch = after_some_steps(small_head()), small_batch()
    with torch.no_grad():
        exact = head(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = head(batch)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_it_is_the_default_and_has_a_learning_rate_of_its_own() -> None:
    assert TrainConfig("x.zarr", "run").head == next(iter(HEADS)) == "film-detail"
    assert FilmDetail.learning_rate > Head.learning_rate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1.0, 40.0), (300.0, 0.0)])
def test_features_of_any_scale_are_normalised_in_half_precision_too(
    dtype: torch.dtype, scale: float, shift: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    feature_BCHW = torch.randn(1, 64, 6, 6, generator=generator) * scale + shift
    with torch.autocast("cpu", torch.bfloat16):
        normal_BCHW = channel_norm(feature_BCHW.to(dtype))
    assert normal_BCHW.dtype == torch.float32
    torch.testing.assert_close(normal_BCHW.mean(1), torch.zeros(1, 6, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        normal_BCHW.std(1, correction=0), torch.ones(1, 6, 6), atol=1e-3, rtol=0
    )
