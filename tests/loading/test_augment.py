"""Free augmentation changes what it is told to, alike in all that a batch holds, and repeatably."""

from dataclasses import replace

import pytest
import torch
from head_runs import SMALL

from sam3cache.errors import ConfigError, InputSizeError
from sam3cache.heads import HEADS, build_head
from sam3cache.loading.augment import AUGMENTATIONS, Augmentation, Draws, augment, choose_rows
from sam3cache.records import Batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked_batch(num: int = 3, *, target_px: int = 1008, width_px: int = 1008) -> Batch:
    """A batch whose every grid says where on the square each of its cells is."""

    def place(size: int) -> torch.Tensor:
        """Numbers tokens by row and column, whatever the grid's stride."""
        token = torch.arange(size) * 72 // size
        return (token[:, None] * 72 + token[None]).expand(num, 1, size, size).clone()

    return Batch(
        levels={
            "fpn_72": place(72).float(),
            "fpn_144": place(144).float(),
            "image_1008": (place(1008) % 72).to(torch.uint8),
        },
        angles_B2=torch.zeros(num, 2),
        content_B2=torch.tensor([[1008, width_px]] * num),
        target_BKTT=(place(target_px) % 72).to(torch.uint8),
        rows=tuple(range(num)),
    )


def natural_batch() -> Batch:
    """Grey pictures and features as a head meets them; the last fills only part of the square."""
    generator = seeded(7)
    image_BCHW = torch.randint(20, 236, (2, 1, 1008, 1008), generator=generator).to(torch.uint8)
    image_BCHW[1, :, :, 700:] = 0
    feature_BCHW = torch.randn(2, 256, 72, 72, generator=generator).half()
    return Batch(
        {"fpn_72": feature_BCHW, "image_1008": image_BCHW},
        torch.tensor([[30.0, -20.0], [float("nan")] * 2]),
        torch.tensor([[1008, 1008], [1008, 700]]),
        (torch.rand(2, 1, 1008, 1008, generator=generator) < 0.1).to(torch.uint8),
        (4, 9),
    )


ALL = Augmentation.of(tuple(AUGMENTATIONS))


def same(one: Batch, other: Batch) -> bool:
    assert one.target_BKTT is not None
    assert other.target_BKTT is not None
    return (
        one.levels.keys() == other.levels.keys()
        and all(torch.equal(one.levels[name], other.levels[name]) for name in one.levels)
        and torch.equal(one.target_BKTT, other.target_BKTT)
        and torch.equal(one.content_B2, other.content_B2)
    )


def test_nothing_is_changed_unless_it_is_asked_for() -> None:
    batch = natural_batch()
    assert same(augment(batch, Augmentation(), seeded()), batch)
    assert Augmentation.of(()) == Augmentation()


def test_the_generator_decides_and_the_batch_itself_stays_as_it_is() -> None:
    batch, before = natural_batch(), natural_batch()
    always = replace(ALL, crop_share=1.0)
    first = augment(batch, always, seeded(1))
    assert same(batch, before)
    assert same(first, augment(batch, always, seeded(1)))
    assert not same(first, augment(batch, always, seeded(2)))
    assert first.rows == batch.rows
    assert [grid.dtype for grid in first.levels.values()] == [torch.float16, torch.uint8]


def test_a_part_of_a_batch_is_changed_as_within_the_whole() -> None:
    batch, always, draws = natural_batch(), replace(ALL, crop_share=1.0), Draws.of(2, seeded(6))
    whole = augment(batch, always, draws)
    assert same(whole, augment(batch, always, seeded(6)))
    assert batch.target_BKTT is not None
    assert whole.target_BKTT is not None
    for at in range(2):
        one = Batch(
            {name: grid[at : at + 1] for name, grid in batch.levels.items()},
            batch.angles_B2[at : at + 1],
            batch.content_B2[at : at + 1],
            batch.target_BKTT[at : at + 1],
            batch.rows[at : at + 1],
        )
        changed = augment(one, always, draws.part(at, 1))
        for name, grid in changed.levels.items():
            torch.testing.assert_close(grid[0], whole.levels[name][at])
        assert changed.target_BKTT is not None
        assert torch.equal(changed.target_BKTT[0], whole.target_BKTT[at])
        assert torch.equal(changed.content_B2[0], whole.content_B2[at])


@pytest.mark.parametrize(
    ("target_px", "side", "tokens"),
    [
        *((1008, 2 / 3, 48), (504, 0.5, 36), (288, 0.7, 52), (256, 0.5, 36), (1008, 0.01, 4)),
        *((252, 2 / 3, 48), (336, 2 / 3, 48)),
    ],
)
def test_a_crop_is_the_same_part_of_every_level_and_of_the_target(
    target_px: int, side: float, tokens: int
) -> None:
    batch = marked_batch(target_px=target_px)
    cropped = augment(batch, Augmentation(crop_side=side), seeded(4))
    sizes = {name: grid.shape[-1] for name, grid in cropped.levels.items()}
    assert sizes == {"fpn_72": tokens, "fpn_144": 2 * tokens, "image_1008": 14 * tokens}
    assert cropped.target_BKTT is not None
    assert cropped.target_BKTT.shape[-1] == tokens * target_px // 72
    token_BHW = cropped.levels["fpn_72"][:, 0]
    rows_BH, columns_BW = token_BHW[:, :, 0] // 72, token_BHW[:, 0] % 72
    assert (rows_BH.diff(dim=1) == 1).all()
    assert (columns_BW.diff(dim=1) == 1).all()
    assert torch.equal(cropped.levels["fpn_144"][:, 0, ::2, ::2], token_BHW)
    assert torch.equal(cropped.levels["image_1008"][:, 0, ::14, ::14].float(), token_BHW % 72)
    at = -(-torch.arange(tokens) * target_px // 72)  # A token's first cell.
    for target_HW, columns_W in zip(cropped.target_BKTT[:, 0], columns_BW, strict=True):
        assert torch.equal(target_HW[0, at].float(), columns_W)
    # Each sample has a part of its own, and all of it is picture.
    assert len({(int(y[0]), int(x[0])) for y, x in zip(rows_BH, columns_BW, strict=True)}) == 3
    assert cropped.content_B2.tolist() == [[14 * tokens] * 2] * 3


def test_crops_reach_every_border_of_the_picture_and_leave_padding_out() -> None:
    batch = marked_batch(width_px=868)  # 62 tokens.
    generator, columns = seeded(5), set()
    for _ in range(60):
        cropped = augment(batch, Augmentation(crop_side=2 / 3), generator)
        columns |= set((cropped.levels["fpn_72"][:, 0, 0] % 72).flatten().tolist())
        assert (cropped.content_B2 == 672).all()
    assert columns == set(range(62))
    narrow = augment(marked_batch(width_px=350), Augmentation(crop_side=2 / 3), seeded())
    assert narrow.content_B2.tolist() == [[672, 350]] * 3
    assert (narrow.levels["fpn_72"][:, 0, 0, 0] % 72 == 0).all()


def test_only_some_batches_are_cropped() -> None:
    batch, generator = marked_batch(1), seeded()
    some = Augmentation(crop_side=0.5, crop_share=0.25)
    sides = [augment(batch, some, generator).levels["fpn_72"].shape[-1] for _ in range(80)]
    assert set(sides) == {36, 72}
    assert 10 <= sides.count(36) <= 30


def test_photometrics_change_the_picture_and_leave_padding_and_features_alone() -> None:
    batch = natural_batch()
    changed = augment(batch, Augmentation.of(["photometric"]), seeded())
    before, after = batch.levels["image_1008"], changed.levels["image_1008"]
    assert (before[:, :, :, :700] != after[:, :, :, :700]).float().mean() > 0.5
    assert (after[1, :, :, 700:] == 0).all()
    assert torch.equal(changed.levels["fpn_72"], batch.levels["fpn_72"])
    # Each sample in its own way.
    shift_B = (after.float() - before.float())[:, :, :, :700].mean(dim=(1, 2, 3))
    assert abs(float(shift_B[0] - shift_B[1])) > 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"brightness": 0.2}, lambda x, draw: x + 0.2 * draw),
        ({"contrast": 0.5}, lambda x, draw: (x - 0.5) * torch.exp(0.5 * draw) + 0.5),
        ({"gamma": 0.4}, lambda x, draw: x ** torch.exp(0.4 * draw)),
    ],
)
def test_a_photometric_change_is_what_it_is_called(settings: dict, expected) -> None:  # type: ignore[no-untyped-def, type-arg]
    values = torch.arange(256).to(torch.uint8)
    image = values.repeat(1, 1, 1008, 4)[..., :1008].contiguous()
    batch = Batch({"image_1008": image}, torch.zeros(1, 2), torch.tensor([[1008, 1008]]))
    changed = augment(batch, Augmentation(**settings), seeded(4)).levels["image_1008"]
    # Draws come in one order, whatever is asked for: gamma, contrast, brightness.
    draws = torch.rand(3, generator=seeded(Draws.of(1, seeded(4)).seeds[0])) * 2 - 1
    draw = draws[["gamma", "contrast", "brightness"].index(next(iter(settings)))]
    wanted = (expected(values / 255, draw) * 255).round().clamp(0, 255)
    assert (changed[0, 0, 0, :256].float() - wanted).abs().max() <= 1
    assert not torch.equal(changed, image)


def test_noise_goes_by_the_spread_of_the_features_and_dropout_keeps_their_mean() -> None:
    batch = natural_batch()
    loud = replace(batch, levels={"fpn_72": 100 * batch.levels["fpn_72"]})
    for given, scale in ((batch, 1), (loud, 100)):
        noisy = augment(given, Augmentation(feature_noise=0.5), seeded(2)).levels["fpn_72"]
        noise_BCHW = (noisy - given.levels["fpn_72"]).float() / scale
        spread_B = noise_BCHW.std(dim=(1, 2, 3))
        assert (spread_B < 0.51).all()
        assert (spread_B > 0.01).all()
        assert spread_B[0] != spread_B[1]
    dropped = augment(batch, Augmentation(channel_dropout=0.25), seeded()).levels["fpn_72"]
    is_zero_BC = (dropped == 0).all(dim=-1).all(dim=-1)
    assert 0.15 < is_zero_BC.float().mean() < 0.35
    assert not torch.equal(is_zero_BC[0], is_zero_BC[1])
    kept = ~is_zero_BC
    ratio = dropped[kept].float().std() / batch.levels["fpn_72"][kept].float().std()
    assert ratio == pytest.approx(4 / 3, rel=1e-2)


@pytest.mark.parametrize("name", list(HEADS))
def test_every_head_takes_a_cropped_batch(name: str) -> None:
    batch = natural_batch()
    shapes = {
        "trunk_72": (1024, 72, 72),
        "fpn_72": (256, 72, 72),
        "fpn_144": (256, 144, 144),
        "fpn_288": (256, 288, 288),
        "image_1008": (1, 1008, 1008),
    }
    head = build_head(name, shapes, SMALL.get(name, {}))
    levels = {
        level: batch.levels.get(level, torch.zeros(2, *shapes[level])) for level in head.needs
    }
    cropped = augment(replace(batch, levels=levels), replace(ALL, crop_share=1.0), seeded())
    with torch.no_grad():
        logits_BKHW = head(cropped)
        whole_BKHW = head(replace(batch, levels=levels))
    assert logits_BKHW.shape[-1] == logits_BKHW.shape[-2] == whole_BKHW.shape[-1] * 48 // 72
    assert logits_BKHW.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_side", 0.0),
        ("crop_side", 1.5),
        ("crop_share", -0.1),
        ("gamma", -1.0),
        ("pixel_noise", float("inf")),
        ("brightness", float("nan")),
        ("channel_dropout", 1.0),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"augmentation {name} is {value}: expected"):
        Augmentation(**{name: value})


def test_a_crop_that_cannot_be_is_refused_before_or_when_it_is_tried() -> None:
    crop = Augmentation.of(["crop"])
    expected = (
        r"no crop of about 67% of the square is whole on the grid of target, 1001 px a side; take "
        r"--loss-size 999 or 1002 \(or a multiple of 72\), or leave crop out"
    )
    with pytest.raises(ConfigError, match=expected) as caught:
        crop.require_grid({"fpn_72": 72, "target": 1001})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"of the square is whole on the grid of target, 1001"):
        augment(marked_batch(target_px=1001), replace(crop, crop_share=1.0), seeded())
    Augmentation.of(["noise"]).require_grid({"target": 1001})
    crop.require_grid({"fpn_72": 72, "image_1008": 1008, "target": 1008})
    oblong = Batch({"a": torch.zeros(1, 1, 72, 36)}, torch.zeros(1, 2), torch.tensor([[1008, 504]]))
    with pytest.raises(InputSizeError, match=r"a of shape \(1, 1, 72, 36\) is not square"):
        augment(oblong, crop, seeded())
    with pytest.raises(ConfigError, match=r"'flip' is unknown; expected some of crop, photometric"):
        Augmentation.of(["crop", "flip"])


def test_a_crop_of_another_side_than_was_asked_for_is_refused() -> None:
    crop = replace(Augmentation.of(["crop"]), crop_share=1.0)
    for target_px in range(1, 1100):
        if target_px % 3 == 0:  # As docs/augmentation.md says.
            crop.require_grid({"fpn_72": 72, "fpn_144": 144, "target": target_px})
            continue
        with pytest.raises(ConfigError, match=f"grid of target, {target_px} px a side"):
            crop.require_grid({"fpn_72": 72, "fpn_144": 144, "target": target_px})
    for target_px in (512, 256, 128, 100):
        with pytest.raises(ConfigError, match=f"take --loss-size {target_px // 3 * 3} or "):
            augment(marked_batch(target_px=target_px), crop, seeded())


def test_each_epoch_takes_one_of_each_image_and_all_alike_over_many() -> None:
    groups = [(10 * i, *range(10 * i + 1, 10 * i + i % 4 + 1)) for i in range(40)]
    epochs = [choose_rows(groups, seed=3, epoch=epoch) for epoch in range(300)]
    for chosen in epochs:
        assert all(row in group for row, group in zip(chosen, groups, strict=True))
    for group, drawn in zip(groups, zip(*epochs, strict=True), strict=True):
        expected = len(epochs) / len(group)
        assert all(abs(drawn.count(row) - expected) < 60 for row in group)
    assert choose_rows(groups, 3, 0) == epochs[0] != epochs[1]
    assert choose_rows(groups, 4, 0) != epochs[0]
    assert choose_rows([], 0, 0) == []


def test_an_image_is_seen_by_the_same_variant_whichever_others_are_there() -> None:
    groups = [[row, 100 + row, 200 + row] for row in range(12)]
    for epoch in range(3):
        chosen = choose_rows(groups, 0, epoch)
        for fold in range(3):
            part = [row for row in range(12) if row % 3 != fold]
            assert choose_rows([groups[row] for row in part], 0, epoch) == [chosen[r] for r in part]


@pytest.mark.gpu
def test_a_gpu_crops_as_the_processor_does_and_repeats_itself() -> None:
    batch = natural_batch()
    assert batch.target_BKTT is not None
    on_gpu = Batch(
        {name: grid.cuda() for name, grid in batch.levels.items()},
        batch.angles_B2.cuda(),
        batch.content_B2.cuda(),
        batch.target_BKTT.cuda(),
        batch.rows,
    )
    crop = Augmentation(crop_side=0.5)
    here, there = augment(batch, crop, seeded()), augment(on_gpu, crop, seeded())
    for name, grid in here.levels.items():
        assert there.levels[name].is_cuda
        assert torch.equal(there.levels[name].cpu(), grid)
    assert same(augment(on_gpu, ALL, seeded(2)), augment(on_gpu, ALL, seeded(2)))
