"""Batches through a tower: into memory that is laid out beforehand, and on CUDA all at once.

On CUDA three things go on at a time: a batch is copied in, the one before it is in the tower, and
the features of the one before that are copied out. On a CPU they follow each other.

Shape legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam3cache.errors import ConfigError
from sam3cache.features import BLOCK_ROWS
from sam3cache.runtime import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

    from sam3cache.backbone import Tower

_MAX_FLIGHTS = 2

# torch leaves what makes them without types.
_Stream: Any = torch.cuda.Stream
_Event: Any = torch.cuda.Event


class TowerRunner:
    """Puts pictures through a tower on a CPU, where a batch is done when a call returns.

    Args:
        tower: to put them through.
        name: of the worker, for messages.
        dtypes: by what is wanted of the tower, the type that it is kept in.
        batch_size: pictures a forward pass, at most.

    Attributes:
        batch_size: as it is now: halved whenever the device has not had memory enough.
        num_images: pictures that have come out of the tower.
        tower_s: time that the tower was at work on them.
    """

    def __init__(
        self, tower: Tower, name: str, dtypes: Mapping[str, torch.dtype], batch_size: int
    ) -> None:
        self._tower, self._name, self._dtypes = tower, name, dtypes
        self.batch_size = batch_size
        self.num_images = 0
        self.tower_s = 0.0

    def make_buffers(self) -> dict[str, Tensor]:
        """Return memory for the features of a block: by name, (16, C, H, W)."""
        return {
            base: self._memory((BLOCK_ROWS, *self._tower.spec.level_shape(base)), dtype)
            for base, dtype in self._dtypes.items()
        }

    def put_through(self, pictures: Sequence[NDArray[np.uint8]], out: Mapping[str, Tensor]) -> bool:
        """Put a batch through the tower, or begin to: see :meth:`arrival`.

        Args:
            pictures: (C, size, size) each, of one channel or three.
            out: by what is wanted of the tower, where it goes: (B, C, H, W) of a block's buffers.

        Returns:
            Whether the device had memory enough. If not, nothing has been done, and the batch size
            has been halved until it is less than was tried.

        Raises:
            ConfigError: when it has not enough for a single picture.
        """
        try:
            self._put_through(pictures, out)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(pictures) == 1:
                raise ConfigError(
                    f"{self._name} has not enough memory for a single image: end what else uses "
                    "it, or use a larger device, or --devices cpu"
                ) from None
        else:
            return True
        # Out of the handler, whose traceback holds on to what is to be freed.
        while self.batch_size >= len(pictures):
            self.batch_size //= 2
        self._free()
        return False

    def arrival(self) -> Callable[[], None]:
        """Return what waits, in any thread, until all that was put through lies in its buffers."""
        return lambda: None

    def drain(self) -> None:
        """Wait until the device has nothing left to do."""

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def _put_through(
        self, pictures: Sequence[NDArray[np.uint8]], out: Mapping[str, Tensor]
    ) -> None:
        image_BCHW = self._memory(_batch_shape(pictures), torch.uint8)
        _fill(image_BCHW, pictures)
        begun_s = time.monotonic()
        features = self._tower(image_BCHW)
        for base, target_BCHW in out.items():
            target_BCHW.copy_(features[base])
        self.tower_s += time.monotonic() - begun_s
        self.num_images += len(pictures)

    def _free(self) -> None:
        """Give back what memory is held for later."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch on its way through a CUDA device."""

    num_images: int
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    landed: torch.cuda.Event


class CudaRunner(TowerRunner):
    """Puts pictures through a tower on a CUDA device, with two batches on their way at most."""

    def __init__(
        self,
        tower: Tower,
        name: str,
        dtypes: Mapping[str, torch.dtype],
        batch_size: int,
        device: str,
    ) -> None:
        super().__init__(tower, name, dtypes, batch_size)
        self._device = torch.device(device)
        self._compute = torch.cuda.current_stream(self._device)
        self._way_in = _Stream(self._device)
        self._way_out = _Stream(self._device)
        self._flights: deque[_Flight] = deque()
        # In turn; that of the flight before last has landed, so that its memory may be written to.
        self._inputs: deque[Tensor] = deque(
            torch.empty(0, dtype=torch.uint8) for _ in range(_MAX_FLIGHTS)
        )

    def arrival(self) -> Callable[[], None]:
        """Return what waits, in any thread, until all that was put through lies in its buffers."""
        if not self._flights:
            return super().arrival()
        return self._flights[-1].landed.synchronize

    def drain(self) -> None:
        """Wait until the device has nothing left to do."""
        while self._flights:
            self._land()

    def _land(self) -> None:
        flight = self._flights.popleft()
        flight.landed.synchronize()
        self.tower_s += flight.begun.elapsed_time(flight.ended) / 1e3
        self.num_images += flight.num_images

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Pinned: only such memory is copied from and to while the device computes.
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def _put_through(
        self, pictures: Sequence[NDArray[np.uint8]], out: Mapping[str, Tensor]
    ) -> None:
        if len(self._flights) == _MAX_FLIGHTS:
            self._land()
        with torch.cuda.device(self._device):
            image_BCHW = self._copied_in(pictures)
            begun, ended = (_Event(enable_timing=True) for _ in range(2))
            landed = _Event()
            begun.record(self._compute)
            features = self._tower(image_BCHW)
            # Converted where it is quick, and half as much is left to copy.
            kept = {base: features[base].to(self._dtypes[base]) for base in out}
            ended.record(self._compute)
            self._way_out.wait_event(ended)
            with torch.cuda.stream(self._way_out):
                for base, target_BCHW in out.items():
                    target_BCHW.copy_(kept[base], non_blocking=True)
                    # Or its memory would be given to the next batch before it has been copied.
                    kept[base].record_stream(self._way_out)
                landed.record(self._way_out)
        self._flights.append(_Flight(len(pictures), begun, ended, landed))

    def _copied_in(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        shape = _batch_shape(pictures)
        self._inputs.rotate()
        if self._inputs[0].numel() < int(np.prod(shape)):
            self._inputs[0] = self._memory(shape, torch.uint8)
        pinned_BCHW = self._inputs[0].flatten()[: int(np.prod(shape))].view(shape)
        _fill(pinned_BCHW, pictures)
        with torch.cuda.stream(self._way_in):
            image_BCHW = pinned_BCHW.to(self._device, non_blocking=True)
        self._compute.wait_stream(self._way_in)
        image_BCHW.record_stream(self._compute)
        return image_BCHW

    def _free(self) -> None:
        self.drain()
        torch.cuda.empty_cache()


def make_runner(
    tower: Tower, name: str, dtypes: Mapping[str, torch.dtype], batch_size: int, device: str
) -> TowerRunner:
    """Return what puts pictures through a tower on the device that it is on."""
    if torch.device(device).type == "cuda":
        return CudaRunner(tower, name, dtypes, batch_size, device)
    return TowerRunner(tower, name, dtypes, batch_size)


def _batch_shape(pictures: Sequence[NDArray[np.uint8]]) -> tuple[int, ...]:
    num_channels = max(picture.shape[0] for picture in pictures)
    return (len(pictures), num_channels, *pictures[0].shape[1:])


def _fill(image_BCHW: Tensor, pictures: Sequence[NDArray[np.uint8]]) -> None:
    """Lay pictures into a batch; a grey one beside coloured ones gets their channels."""
    target_BCHW = image_BCHW.numpy()
    for place, picture_CHW in enumerate(pictures):
        target_BCHW[place] = picture_CHW
