"""Memory that batches are read into: used again, and pinned where a GPU is to take it over.

Shape legend: B batch, R words of a record.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# cudaHostRegisterPortable of the CUDA Runtime API.
_FOR_EVERY_CONTEXT = 1


class BatchBuffers:
    """Hands out memory for records, and takes it back once nobody can see it any more.

    New memory costs a page fault every 4 kB, as long as reading itself. A buffer comes back when
    the last tensor over it is gone, so that a consumer may keep a batch for as long as it likes.

    Args:
        num_kept: buffers that wait to be used again, at most.
    """

    def __init__(self, num_kept: int) -> None:
        self._free: deque[NDArray[np.int64]] = deque(maxlen=num_kept)

    def take(self, num_samples: int, num_words: int, *, pinned: bool = False) -> Tensor:
        """Return int64 (num_samples, num_words), of any content.

        Args:
            num_samples: B.
            num_words: R, always the same of one object.
            pinned: for copies to a GPU that need not be waited for. torch then keeps buffers
                itself, and gives none out again before its copy has ended.
        """
        if pinned:
            return torch.empty((num_samples, num_words), dtype=torch.int64, pin_memory=True)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(0, dtype=np.int64)
        if block.size < num_samples * num_words:
            block = np.empty(num_samples * num_words, dtype=np.int64)
        # A view of its own: the tensor, and whatever is made of it, hold on to this object.
        view_BR = block[: num_samples * num_words].reshape(num_samples, num_words)
        weakref.finalize(view_BR, self._free.append, block).atexit = False
        return torch.from_numpy(view_BR)


def pin(held_NR: Tensor) -> weakref.finalize[..., Tensor] | None:
    """Pin memory, so that a GPU fetches from it by itself.

    Returns:
        What unpins it again, which also happens when the tensor object is dropped; None where the
        system grants no pinned memory.
    """
    if not torch.cuda.is_available() or math.prod(held_NR.shape) == 0:
        return None
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size_bytes = held_NR.data_ptr(), held_NR.nbytes
    if int(cudart.cudaHostRegister(address, size_bytes, _FOR_EVERY_CONTEXT)) != 0:
        # The failure would otherwise be reported by whatever is started on the GPU next.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return None
    return weakref.finalize(held_NR, _unpin, address)


def _unpin(address: int) -> None:
    with suppress(RuntimeError):  # of a GPU that has failed
        torch.cuda.synchronize()  # copies from it may be under way
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
