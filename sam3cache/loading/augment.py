"""Augmentation of cached batches, for nothing on disk; and which variant of an image to take when.

Features of a changed picture cannot be made from cached ones, but much can be changed beside that:
which part of the square a head sees, what its stem makes of the picture, how far it relies on
single features. All of it happens on the batch's device, after loading, in training alone.

Shape legend: B batch, C channels, H height, W width, K mask planes, N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from sam3cache.errors import ConfigError, InputSizeError
from sam3cache.geometry import INPUT_SIZE_PX, PATCH_PX
from sam3cache.records import Batch

TOKENS = INPUT_SIZE_PX // PATCH_PX
"""Tokens along a side of the square."""

STRIDE_TOKENS = 4
"""Sides of crops are multiples of so many tokens: heads halve a grid of tokens twice."""

IMAGE_LEVEL = "image_1008"


@dataclass(frozen=True)
class Augmentation:
    """How far a batch is changed; the defaults change nothing.

    Attributes:
        crop_side: side of the part of the square that is kept, as a share of it, in (0, 1]; it is
            rounded to whole tokens. The part lies elsewhere in each sample, where there is picture.
        crop_share: share of the batches that are cropped, in [0, 1]; all samples of a batch are,
            or none is, so that they stay of one size.
        brightness: most that is added to the picture, as a share of white.
        contrast: the picture's difference from middle grey is multiplied by exp(u), u in
            [-contrast, contrast].
        gamma: the picture is raised to the power exp(u), u in [-gamma, gamma].
        pixel_noise: most standard deviation of noise that is added to the picture, as a share of
            white.
        feature_noise: most standard deviation of noise that is added to features, as a share of
            their own in that sample and level.
        channel_dropout: share of a level's channels that are set to 0, in [0, 1); the others are
            scaled up for it.

    Raises:
        ConfigError: a value that cannot be used.
    """

    crop_side: float = 1.0
    crop_share: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    pixel_noise: float = 0.0
    feature_noise: float = 0.0
    channel_dropout: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "crop_side": (0 < self.crop_side <= 1, "above 0, at most 1"),
            "crop_share": (0 <= self.crop_share <= 1, "from 0 to 1"),
            "channel_dropout": (0 <= self.channel_dropout < 1, "from 0 to below 1"),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            holds, expected = limits.get(field.name, (0 <= value < math.inf, "0 or more"))
            if not holds:
                raise ConfigError(f"augmentation {field.name} is {value!r}: expected {expected}")

    @classmethod
    def of(cls, names: Sequence[str]) -> Augmentation:
        """Return the augmentation of some names in :data:`AUGMENTATIONS`, all together.

        Raises:
            ConfigError: when a name is not among them.
        """
        values: dict[str, float] = {}
        for name in names:
            if name not in AUGMENTATIONS:
                raise ConfigError(
                    f"augmentation {name!r} is unknown; expected some of {', '.join(AUGMENTATIONS)}"
                )
            values |= AUGMENTATIONS[name]
        return cls(**values)

    def require_grid(self, sizes_px: Mapping[str, int]) -> None:
        """Refuse crops that grids do not allow; :func:`augment` would refuse them, too.

        Args:
            sizes_px: by name of a level, or "target", the side of its grid.

        Raises:
            ConfigError: when no part of about the side that is asked for is whole on every grid.
        """
        if self.crop_side < 1 and self.crop_share > 0:
            _crop_tokens(sizes_px, self.crop_side)


AUGMENTATIONS: Mapping[str, Mapping[str, float]] = {
    "crop": {"crop_side": 2 / 3, "crop_share": 0.5},
    "photometric": {"brightness": 0.1, "contrast": 0.2, "gamma": 0.3, "pixel_noise": 0.03},
    "noise": {"feature_noise": 0.2},
    "channel-dropout": {"channel_dropout": 0.1},
}
"""By the names of ``--augment``, what each changes."""


@dataclass(frozen=True)
class Draws:
    """What is left to chance in a batch, so that its parts can be changed as the whole would be.

    Attributes:
        crop: in [0, 1): below ``crop_share`` the batch is cropped.
        seeds: by sample, of a generator of its own.
    """

    crop: float
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, num_samples: int, generator: torch.Generator) -> Draws:
        """Draw for a batch of so many samples."""
        crop = torch.rand((), generator=generator, device=generator.device)
        seeds = torch.randint(2**62, (num_samples,), generator=generator, device=generator.device)
        return cls(crop.item(), tuple(seeds.tolist()))

    def part(self, start: int, num_samples: int) -> Draws:
        """Return those for some of the batch's samples, which follow each other."""
        return replace(self, seeds=self.seeds[start : start + num_samples])


def augment(batch: Batch, augmentation: Augmentation, chance: torch.Generator | Draws) -> Batch:
    """Return a batch changed at random, on its own device.

    The same batch and the same state of the generator give the same result on the same kind of
    device. Values are drawn once a sample: a picture and its target, and all levels, are cropped
    alike. What a sample's draws are does not depend on those beside it.

    Args:
        batch: of a training, with its target or without; it is not changed itself.
        augmentation: how far.
        chance: a generator of random numbers, best on the CPU, where no GPU has to wait for it; or
            what has been drawn already, for a part of a larger batch.

    Returns:
        A batch of the same levels, dtypes and rows. Of a crop all grids are smaller, still square,
        and ``content_B2`` says what of the part, from its top left, is picture.

    Raises:
        ConfigError: when no crop of about the side that is asked for is whole on every grid.
        InputSizeError: when a level is not square.
    """
    draws = chance if isinstance(chance, Draws) else Draws.of(len(batch.angles_B2), chance)
    generators = [torch.Generator().manual_seed(seed) for seed in draws.seeds]
    levels = dict(batch.levels)
    if IMAGE_LEVEL in levels:
        image_BCHW = levels[IMAGE_LEVEL]
        levels[IMAGE_LEVEL] = _photometric(image_BCHW, batch.content_B2, augmentation, generators)
    for name in sorted(levels):
        if name != IMAGE_LEVEL:
            noisy_BCHW = _noise(levels[name], augmentation.feature_noise, generators)
            levels[name] = _channel_dropout(noisy_BCHW, augmentation.channel_dropout, generators)
    return _crop(replace(batch, levels=levels), augmentation, draws.crop, generators)


def choose_rows(groups: Sequence[Sequence[int]], seed: int, epoch: int) -> list[int]:
    """Return which of its variants each image is seen by in an epoch, the image itself among them.

    Each is as likely as the others. What an image gets depends on the seed, the epoch and its own
    row alone, not on which others are there: so folds that learn from an image meet the same
    variant of it, and one reading gives it to all of them.

    Args:
        groups: by image, its own row (or index) and then those of its variants.
        seed: of the training.
        epoch: which pass this is.

    Returns:
        One of each group, in the order of the groups.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    # A draw for every row up to the last image's: the row is its place among them.
    draws = generator.random(1 + max((group[0] for group in groups), default=-1)).tolist()
    return [group[int(draws[group[0]] * len(group))] for group in groups]


def _drawn(num: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return (B, num) values from 0 to 1, on the CPU."""
    return torch.stack([torch.rand(num, generator=generator) for generator in generators])


def _uniform(
    limit: float, generators: Sequence[torch.Generator], device: torch.device, low: float = -1.0
) -> Tensor:
    """Return (B, 1, 1, 1) values from ``low * limit`` to ``limit``."""
    return ((low + (1 - low) * _drawn(1, generators)) * limit).to(device)[:, :, None, None]


def _normal_like(x_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return normal noise of a tensor's shape, drawn on its own device."""
    noise_BCHW = torch.empty(x_BCHW.shape, device=x_BCHW.device)
    for noise_CHW, generator in zip(noise_BCHW, generators, strict=True):
        if x_BCHW.device.type != "cpu":
            # Numbers by the million do not travel: a generator of the device's own draws them.
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = torch.Generator(x_BCHW.device).manual_seed(seed)
        noise_CHW.normal_(generator=generator)
    return noise_BCHW


def _photometric(
    image_BCHW: Tensor,
    content_B2: Tensor,
    augmentation: Augmentation,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Change a picture's brightness, contrast, gamma and noise; padding stays 0."""
    settings = augmentation
    if not (settings.brightness or settings.contrast or settings.gamma or settings.pixel_noise):
        return image_BCHW
    device = image_BCHW.device

    def drawn(limit: float, low: float = -1.0) -> Tensor:
        return _uniform(limit, generators, device, low)

    pixels_BCHW = image_BCHW.float() / 255
    pixels_BCHW = pixels_BCHW.pow(drawn(settings.gamma).exp())
    factor, summand = drawn(settings.contrast).exp(), drawn(settings.brightness)
    pixels_BCHW = (pixels_BCHW - 0.5) * factor + 0.5 + summand
    if settings.pixel_noise:
        # The same in all channels: a grey picture that lies in three stays grey.
        noise_B1HW = _normal_like(pixels_BCHW[:, :1], generators)
        pixels_BCHW = pixels_BCHW + drawn(settings.pixel_noise, 0.0) * noise_B1HW
    pixels_BCHW = (pixels_BCHW * 255).round_().clamp_(0, 255)
    height, width = image_BCHW.shape[-2:]
    content_B2 = content_B2.to(device)
    # Of a miniature of the square, as tests have it, the content is as much smaller.
    limit_B2 = content_B2 * torch.tensor([height, width], device=device) / INPUT_SIZE_PX
    is_row_BH = torch.arange(height, device=device) < limit_B2[:, :1]
    is_column_BW = torch.arange(width, device=device) < limit_B2[:, 1:]
    inside_B1HW = (is_row_BH[:, :, None] & is_column_BW[:, None])[:, None]
    return (pixels_BCHW * inside_B1HW).to(torch.uint8)


def _noise(feature_BCHW: Tensor, limit: float, generators: Sequence[torch.Generator]) -> Tensor:
    if not limit:
        return feature_BCHW
    amount = _uniform(limit, generators, feature_BCHW.device, 0.0)
    spread_B111 = feature_BCHW.float().std(dim=(1, 2, 3), keepdim=True)
    noise_BCHW = _normal_like(feature_BCHW, generators).mul_(amount * spread_B111)
    return feature_BCHW + noise_BCHW.to(feature_BCHW.dtype)


def _channel_dropout(
    feature_BCHW: Tensor, share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    if not share:
        return feature_BCHW
    kept_BC = _drawn(feature_BCHW.shape[1], generators) >= share
    factor_BC = (kept_BC / (1 - share)).to(feature_BCHW)
    return feature_BCHW * factor_BC[:, :, None, None]


def _crop(
    batch: Batch, augmentation: Augmentation, chance: float, generators: Sequence[torch.Generator]
) -> Batch:
    """Cut the same part of the square out of all that a batch holds of a sample."""
    if augmentation.crop_side == 1 or not augmentation.crop_share:
        return batch
    grids = dict(batch.levels)
    if batch.target_BKTT is not None:
        grids["target"] = batch.target_BKTT
    for name, grid in grids.items():
        if grid.shape[-1] != grid.shape[-2]:
            raise InputSizeError(
                f"{name} of shape {tuple(grid.shape)} is not square, and cannot be cropped; leave "
                "crop out of the augmentation"
            )
    step, side = _crop_tokens(
        {name: grid.shape[-1] for name, grid in grids.items()}, augmentation.crop_side
    )
    if chance >= augmentation.crop_share or side == TOKENS:
        return batch
    # Where there is picture, and as much of it as can be.
    room_B2 = (batch.content_B2.add(PATCH_PX - 1) // PATCH_PX - side).clamp(min=0)
    draw_B2 = _drawn(2, generators).to(room_B2.device)
    start_B2 = step * (draw_B2 * (room_B2 // step + 1)).long()
    cropped = {name: _cut(grid, start_B2, side) for name, grid in grids.items()}
    return replace(
        batch,
        content_B2=(batch.content_B2 - start_B2 * PATCH_PX).clamp(0, side * PATCH_PX),
        target_BKTT=cropped.pop("target", None),
        levels=cropped,
    )


def _crop_tokens(sizes_px: Mapping[str, int], share: float) -> tuple[int, int]:
    """Return where a crop may begin, and its side, in tokens: both are whole on every grid.

    Args:
        sizes_px: by name, the side of each grid.
        share: of the square's side that is asked for.

    Raises:
        ConfigError: when no side that is about what is asked for is whole on every grid.
    """
    step = 1
    for name, size_px in sizes_px.items():
        step = math.lcm(step, _token_step(size_px))
        if not _has_side(step, share):
            fewer = next((s for s in range(size_px, 0, -1) if _has_side(_token_step(s), share)), 0)
            more = next(s for s in count(size_px) if _has_side(_token_step(s), share))
            sizes = " or ".join(str(size) for size in (fewer, more) if size)
            raise ConfigError(
                f"no crop of about {share:.0%} of the square is whole on the grid of {name}, "
                f"{size_px} px a side; take {'--loss-size ' * (name == 'target')}{sizes} (or a "
                f"multiple of {TOKENS}), or leave crop out of the augmentation"
            )
    return step, _side(step, share)


def _token_step(size_px: int) -> int:
    """Return the fewest tokens that are whole pixels of a grid."""
    return TOKENS // math.gcd(TOKENS, size_px)


def _side(step: int, share: float) -> int:
    """Return the side nearest to a share of the square's that is a multiple of a step."""
    side_step = math.lcm(step, STRIDE_TOKENS)
    return min(TOKENS, side_step * max(1, round(share * TOKENS / side_step)))


def _has_side(step: int, share: float) -> bool:
    """Return whether multiples of a step allow about the side that single tokens would."""
    is_coarse = math.lcm(step, STRIDE_TOKENS) >= TOKENS
    return not is_coarse and abs(_side(step, share) - _side(1, share)) <= STRIDE_TOKENS


def _cut(grid_BCHW: Tensor, start_B2: Tensor, side: int) -> Tensor:
    """Return the part of each sample that begins at its start (y, x), all in tokens."""
    num, channels, _, size = grid_BCHW.shape
    device = grid_BCHW.device
    # Whole by the choice of the starts. One gather: no start has to come to the processor.
    first_B2 = start_B2.to(device) * size // TOKENS
    at_B2k = first_B2[:, :, None] + torch.arange(side * size // TOKENS, device=device)
    at_B111 = torch.arange(num, device=device)[:, None, None, None]
    at_1C11 = torch.arange(channels, device=device)[None, :, None, None]
    return grid_BCHW[at_B111, at_1C11, at_B2k[:, 0, None, :, None], at_B2k[:, 1, None, None, :]]
