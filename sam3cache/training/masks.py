"""Masks that a training is judged by, on their own grids.

Shape legend: M planes of a stored mask, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam3cache.features import FeatureStore

MAX_HELD_BYTES = 10**9
"""Most that the masks take which a process holds."""


class HeldMasks:
    """Masks as they are stored, which are read once as far as there is room for them.

    Args:
        max_bytes: most that they take; others are read whenever they are asked for.

    Attributes:
        num_bytes: what they take.
    """

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._held: dict[tuple[str, str, str, int], Tensor] = {}

    def __call__(self, store: FeatureStore, row: int, label_set: str) -> Tensor:
        """Return the mask of a row that has one: uint8 (M, H, W).

        Raises:
            CorruptStoreError: bytes in the store are damaged.
        """
        # Masks that are set anew while runs go on are others, to those that begin then.
        version = (store.seal, store.holder_of(label_set).seal)
        key = (*version, label_set, row)
        if key in self._held:
            return self._held[key]
        stored_MHW = store.read_mask(row, label_set)
        assert stored_MHW is not None
        mask_MHW = torch.from_numpy(stored_MHW)
        if self.num_bytes + mask_MHW.nbytes > self._max_bytes:
            self._held = {k: held for k, held in self._held.items() if k[:2] == version}
            self.num_bytes = sum(held.nbytes for held in self._held.values())
        if self.num_bytes + mask_MHW.nbytes <= self._max_bytes:
            self._held[key] = mask_MHW
            self.num_bytes += mask_MHW.nbytes
        return mask_MHW
