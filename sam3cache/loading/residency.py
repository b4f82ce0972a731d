"""Where samples lie, and why there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sam3cache.errors import ConfigError
from sam3cache.runtime import DeviceMemory, size_text

Residency = Literal["auto", "device", "ram", "stream"]
"""Where samples lie: the device's memory, main memory, or the store on disk."""

USABLE_SHARE = 0.7
"""Share of the free memory that samples may take; the rest is for the head and everybody else."""

# What a GPU has to have left beside samples. Of all its memory, twice a micro-batch's share: once
# for what the backward pass needs of it, and as much in passing. And 1 GB for the loss's chunks,
# weights and moments. Of 8 GB with 7.5 free: 0.4 x 8 + 1 = 4.2 are kept, and of the 3.3 that are
# left the training samples take 0.7 at most, then those of validation 0.7 of the rest.
MICRO_BATCH_SHARE = 0.2
"""Share of a device's memory that is planned for what the backward pass needs of a micro-batch."""

_LOSS_BYTES = 10**9


@dataclass(frozen=True, slots=True)
class Placement:
    """A choice, with its reason.

    Attributes:
        residency: "device", "ram" or "stream".
        reason: why, in words.
    """

    residency: Residency
    reason: str

    def __str__(self) -> str:
        """Say both in one line."""
        return f"{self.residency}, {self.reason}"


def room_on_gpu(memory: DeviceMemory) -> int:
    """Return the bytes of a GPU that are free beside what a training needs there itself."""
    needed_bytes = int(2 * MICRO_BATCH_SHARE * memory.total_bytes) + _LOSS_BYTES
    return max(0, memory.free_bytes - needed_bytes)


def choose_residency(
    wanted: Residency,
    num_bytes: int,
    free_bytes: Mapping[Residency, int],
    shared_bytes: int = 0,
) -> Placement:
    """Choose where samples go.

    Args:
        wanted: a place, or "auto".
        num_bytes: what the samples take.
        free_bytes: free memory by place, the nearest place first, that of "device" as
            ``room_on_gpu`` has it; without "device" on the CPU, where "ram" is its memory.
        shared_bytes: what of the samples other processes hold in RAM already.

    Raises:
        ConfigError: an unknown place, or one with too little memory.
    """
    if wanted not in get_args(Residency):
        raise ConfigError(
            f"residency {wanted!r} is unknown; take one of {', '.join(get_args(Residency))}"
        )
    if wanted == "stream":
        return Placement("stream", "as asked")
    if wanted == "device" and "device" not in free_bytes:
        wanted = "ram"
    missing_bytes = {
        place: num_bytes - (shared_bytes if place == "ram" else 0) for place in free_bytes
    }
    for place in free_bytes if wanted == "auto" else (wanted,):
        if missing_bytes[place] <= USABLE_SHARE * free_bytes[place]:
            fits = f"{size_text(num_bytes)} fit in {_usable(place, free_bytes[place])}"
            return Placement(place, "as asked" if wanted == place else fits)
    if wanted == "auto":
        place, roomiest_bytes = max(free_bytes.items(), key=lambda item: item[1])
        usable = _usable(place, roomiest_bytes)
        return Placement("stream", f"as {size_text(num_bytes)} do not fit in {usable}")
    raise ConfigError(
        f"residency {wanted}: the samples take {size_text(missing_bytes[wanted])}, more than "
        f"{_usable(wanted, free_bytes[wanted])}; take auto or stream, or smaller targets"
    )


def _usable(place: Residency, free_bytes: int) -> str:
    beside = " beside what training needs" if place == "device" else ""
    return f"{USABLE_SHARE:.0%} of the {size_text(free_bytes)} free{beside}"
