"""The head of several levels: which it reads, its size, and that features begin as a help."""

from typing import Any

import pytest
import torch

from sam3cache.errors import HeadError
from sam3cache.heads import Head, build_head, describe_head, fitting_heads
from sam3cache.records import Batch

FULL = {
    "fpn_72": (256, 72, 72),
    "fpn_144": (256, 144, 144),
    "fpn_288": (256, 288, 288),
    "image_1008": (1, 1008, 1008),
}
SHAPES = {
    "fpn_72": (16, 6, 6),
    "fpn_144": (16, 12, 12),
    "fpn_288": (16, 24, 24),
    "image_1008": (1, 84, 84),
}
SMALL = {"embedding_dim": 16, "width": 8, "context_width": 8}


def without(*levels: str) -> dict[str, tuple[int, int, int]]:
    return {level: shape for level, shape in SHAPES.items() if level not in levels}


def random_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    levels = {
        level: torch.randn(2, *shape, generator=generator).half() for level, shape in SHAPES.items()
    }
    levels["image_1008"] = torch.full((2, 1, 84, 84), 100, dtype=torch.uint8)
    return Batch(levels, torch.tensor([[10.0, 20.0], [-30.0, torch.nan]]), torch.full((2, 2), 1008))


def small_head(shapes: dict[str, tuple[int, int, int]], **options: Any) -> Head:
    torch.manual_seed(0)
    return build_head("film-pyramid", shapes, SMALL | options, num_classes=2)


def test_with_every_level_it_keeps_within_its_size() -> None:
    head = build_head("film-pyramid", FULL)
    total = describe_head(head, FULL)["total"]
    assert 4e6 < total.parameters < 6e6
    assert 10 < total.gflop < 20


@pytest.mark.parametrize(
    ("missing", "side"),
    [
        ((), 24),
        (("fpn_288",), 21),
        (("image_1008",), 24),
        (("fpn_288", "image_1008"), 12),
        (("fpn_144", "fpn_288"), 21),
        (("fpn_144", "image_1008"), 24),
    ],
)
def test_it_reads_what_the_store_has_and_draws_on_the_finest_grid(
    missing: tuple[str, ...], side: int
) -> None:
    shapes = without(*missing)
    head = small_head(shapes)
    assert head.needs == tuple(shapes)
    assert head(random_batch()).shape == (2, 2, side, side)


@pytest.mark.parametrize("levels", [["fpn_72", "fpn_144"], "fpn_72,fpn_144"])
def test_levels_may_be_chosen(levels: list[str] | str) -> None:
    head = small_head(SHAPES, levels=levels)
    assert head.needs == ("fpn_72", "fpn_144")
    assert head(random_batch()).shape[-1] == 12


@pytest.mark.parametrize("levels", ["fpn_72,image_1008", "fpn_72,fpn_288", "image_1008,fpn_72"])
def test_the_levels_chosen_are_all_that_a_store_has_to_have(levels: str) -> None:
    chosen = levels.split(",")
    head = small_head({level: SHAPES[level] for level in chosen}, levels=levels)
    assert head.needs == tuple(chosen)


@pytest.mark.parametrize("level", ["fpn_72", "fpn_144", "fpn_288"])
def test_beside_the_picture_features_begin_as_a_help_that_changes_nothing(level: str) -> None:
    batch, other = random_batch(), random_batch(seed=1)
    changed = Batch(batch.levels | {level: other.levels[level]}, batch.angles_B2, batch.content_B2)
    with torch.no_grad():
        with_image = small_head(SHAPES).eval()
        assert torch.equal(with_image(batch), with_image(changed))
        alone = small_head(without("image_1008")).eval()
        assert not torch.allclose(alone(batch), alone(changed))


def test_a_store_of_its_first_level_alone_is_refused_with_what_to_extract() -> None:
    expected = (
        r"film-pyramid needs one of fpn_144, fpn_288, image_1008 beside fpn_72, none of which is "
        r"among the store's levels \(fpn_72\); run `sam3cache extract` with --levels fpn_72,fpn_144"
    )
    with pytest.raises(HeadError, match=expected) as caught:
        build_head("film-pyramid", {"fpn_72": SHAPES["fpn_72"]})
    assert "\n" not in str(caught.value)


def test_it_is_named_to_those_who_have_its_levels() -> None:
    assert "film-pyramid" in fitting_heads(SHAPES)
    assert "film-pyramid" not in fitting_heads(["fpn_72", "image_1008"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "fpn_72"}, "levels is 'fpn_72': expected fpn_72 and at least one of fpn_144"),
        ({"levels": ["fpn_144", "fpn_288"]}, "expected fpn_72 and at least one of"),
        ({"levels": 72}, "levels is 72: expected fpn_72 and"),
        ({"levels": "fpn_72,trunk_72"}, "needs trunk_72, which is not among the store's levels"),
        ({"width": 12}, "width is 12: expected a multiple of 8"),
        ({"embedding_dim": 0}, "embedding_dim is 0: expected at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused_in_one_line(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HeadError, match=message) as caught:
        build_head("film-pyramid", SHAPES, options)
    assert "\n" not in str(caught.value)
