"""Batches through a tower: in whatever size, on whatever device, and when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from towers import UNIT

from sam3cache.backbone import Tower, load_tower
from sam3cache.errors import ConfigError
from sam3cache.extract.batching import MIN_GAIN, find_knee
from sam3cache.extract.device import TowerRunner, make_runner
from sam3cache.runtime import is_out_of_memory

DTYPES = {"fpn_72": torch.float16, "trunk_72": torch.float32}
NUM_PICTURES = 7


@pytest.fixture(scope="module")
def tower() -> Tower:
    return load_tower(UNIT, weights="random", levels=tuple(DTYPES))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    noise = np.random.default_rng(0)
    shapes = [(1 + 2 * (i == 3), UNIT.size_px, UNIT.size_px) for i in range(NUM_PICTURES)]
    return [noise.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def put_all(runner: TowerRunner, pictures: list[np.ndarray]) -> Mapping[str, torch.Tensor]:
    """Put pictures through as a worker does."""
    buffers = runner.make_buffers()
    start = 0
    while start < len(pictures):
        batch = pictures[start : start + runner.batch_size]
        out = {name: buffer[start : start + len(batch)] for name, buffer in buffers.items()}
        if runner.put_through(batch, out):
            start += len(batch)
    runner.arrival()()
    runner.drain()
    assert runner.num_images == len(pictures)
    assert runner.tower_s > 0
    return {name: buffer[: len(pictures)].clone() for name, buffer in buffers.items()}


def with_memory_for(max_images: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return what makes a tower run out of memory beyond so many images."""

    def check(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments[0]) > max_images:
            # As a machine says it; a GPU has a type of its own for it.
            torch.empty(1 << 50, dtype=torch.uint8)

    return check


def test_features_lie_where_they_belong_in_the_type_they_are_kept_in(
    tower: Tower, pictures: list[np.ndarray]
) -> None:
    found = put_all(make_runner(tower, "cpu", DTYPES, 3, "cpu"), pictures)
    for place, picture_CHW in enumerate(pictures):
        alone = tower(torch.from_numpy(picture_CHW)[None])
        for name, dtype in DTYPES.items():
            assert found[name].dtype == dtype
            difference = (found[name][place].float() - alone[name][0]).abs().max()
            assert difference < 2e-3 * alone[name].abs().max()


def test_memory_that_ran_out_is_known_from_other_failures() -> None:
    for allocate in (
        lambda: torch.empty(1 << 50, dtype=torch.uint8),
        lambda: np.empty(1 << 50, dtype=np.uint8),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert not isinstance(caught.value, torch.OutOfMemoryError)
        assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(caught.value)


@pytest.mark.parametrize(("max_images", "batch_size"), [(1, 1), (3, 2), (6, 4), (7, 8)])
def test_a_batch_that_memory_is_too_small_for_is_halved_and_nothing_is_lost(
    tower: Tower, pictures: list[np.ndarray], max_images: int, batch_size: int
) -> None:
    whole = put_all(make_runner(tower, "cpu", DTYPES, batch_size, "cpu"), pictures)
    hook = tower.register_forward_pre_hook(with_memory_for(max_images))
    try:
        runner = make_runner(tower, "cpu", DTYPES, 8, "cpu")
        found = put_all(runner, pictures)
    finally:
        hook.remove()
    assert runner.batch_size == batch_size
    # The same batches give the same bits.
    assert all(torch.equal(found[name], whole[name]) for name in DTYPES)


def test_memory_too_small_for_one_picture_is_told_in_one_line(
    tower: Tower, pictures: list[np.ndarray]
) -> None:
    hook = tower.register_forward_pre_hook(with_memory_for(0))
    try:
        with pytest.raises(ConfigError, match="cuda:1 has not enough memory for a single image"):
            put_all(make_runner(tower, "cuda:1", DTYPES, 4, "cpu"), pictures)
    finally:
        hook.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_on_cuda_overlapped_batches_do_not_get_into_each_others_way(
    pictures: list[np.ndarray], batch_size: int
) -> None:
    tower = load_tower(UNIT, weights="random", levels=tuple(DTYPES), device="cuda:0")
    found = put_all(make_runner(tower, "cuda:0", DTYPES, batch_size, "cuda:0"), pictures)
    for start in range(0, NUM_PICTURES, batch_size):
        batch = pictures[start : start + batch_size]
        num_channels = max(len(picture) for picture in batch)
        shape = (num_channels, UNIT.size_px, UNIT.size_px)
        stacked = np.stack([np.broadcast_to(picture, shape) for picture in batch])
        features = tower(torch.from_numpy(stacked))
        torch.cuda.synchronize()
        for name, dtype in DTYPES.items():
            expected = features[name].to(dtype).cpu()
            assert torch.equal(found[name][start : start + len(batch)], expected)


@pytest.mark.parametrize(
    ("images_per_s", "knee"),
    [
        # By batch size: 1, 2, 4, 8, 16; None where memory is too small.
        ((10, 19, 36, 60, 80), 16),
        ((10, 19, 36, 37, 38), 4),
        ((10, 9, 30, 30, 30), 1),
        ((10, 19, None, 60, 80), 2),
        ((None, None, None, None, None), 1),
        ((10, 10 * (1 + MIN_GAIN) + 1e-6, 1, 1, 1), 2),
    ],
)
def test_a_batch_grows_as_long_as_it_makes_the_device_faster(
    images_per_s: tuple[float | None, ...], knee: int
) -> None:
    rates = dict(zip((1, 2, 4, 8, 16), images_per_s, strict=True))
    asked = []

    def seconds(size: int) -> float | None:
        asked.append(size)
        rate = rates[size]
        return None if rate is None else size / rate

    assert find_knee(seconds) == knee
    # Nothing is tried beyond what did not pay.
    assert max(asked) <= 2 * knee
