"""How many samples go through a head at once, so that any batch fits in memory.

Shape legend: B batch, K planes of logits, T side of the target grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.loading.residency import MICRO_BATCH_SHARE
from sam3cache.records import Batch
from sam3cache.runtime import device_memory

MAX_CPU_BYTES = 10**9
"""And no more on a CPU, where larger parts are no faster."""


def blank_sample(
    level_shapes: Mapping[str, tuple[int, int, int]],
    target_shape: tuple[int, int, int],
    device: str,
) -> Batch:
    """Return one black sample with an empty mask.

    Args:
        level_shapes: (C, H, W) by level.
        target_shape: (M, T, T).
        device: where it lies.
    """
    levels = {
        level: torch.zeros(
            (1, *shape),
            dtype=torch.uint8 if level.startswith("image_") else torch.float16,
            device=device,
        )
        for level, shape in level_shapes.items()
    }
    return Batch(
        levels,
        angles_B2=torch.zeros(1, 2, device=device),
        content_B2=torch.full((1, 2), INPUT_SIZE_PX, device=device),
        target_BKTT=torch.zeros((1, *target_shape), dtype=torch.uint8, device=device),
    )


def saved_bytes(forward: Callable[[Batch], Tensor], sample: Batch) -> int:
    """Measure what one sample leaves in memory for the backward pass.

    Args:
        forward: head and loss, in the precision of the training; run once.
        sample: a batch of one.
    """
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor  # not one for each sample
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # Of the same memory, but not the tensor itself: what computed it would be kept by it, and
        # it by what computed it, for ever.
        return tensor.detach()

    devices = [tensor.device for tensor in sample.levels.values() if tensor.is_cuda][:1]
    # Dropout draws random numbers, which the training shall not miss.
    with torch.random.fork_rng(devices=devices), saved_tensors_hooks(note, lambda tensor: tensor):
        forward(sample)
    return sum(seen.values())


def pick_micro_batch(batch_size: int, sample_bytes: int, device: str) -> int:
    """Return how many samples go through a head at once.

    Of all the device's memory, not of what happens to be free, so that a run is the same whoever
    else is there.

    Args:
        batch_size: samples a step.
        sample_bytes: what each leaves in memory.
        device: "cpu" or "cuda:INDEX".

    Returns:
        The whole batch if it fits; else the least number of nearly equal parts that do.
    """
    budget_bytes = int(MICRO_BATCH_SHARE * device_memory(device).total_bytes)
    if device == "cpu":
        budget_bytes = min(budget_bytes, MAX_CPU_BYTES)
    most = max(1, budget_bytes // max(1, sample_bytes))
    num_parts = -(-batch_size // most)
    return -(-batch_size // num_parts)
