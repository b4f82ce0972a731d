"""A sample as it lies in memory: bytes as the store has them, made into values a batch at a time.

A level of 8 bits so takes half the memory of float16, wherever it lies, and is multiplied out on
the device.

Shape legend: B batch, C channels, H height, W width, K planes of a stored mask, T side of the
target grid, R words of a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.errors import ConfigError
from sam3cache.features import Encoded, FeatureStore, LevelSpec, StoredSample
from sam3cache.geometry import Letterbox, ResizeMode
from sam3cache.records import IGNORE_LABEL

TARGET_RULE = 2
"""Number of the rule that makes targets of masks: to be raised whenever other targets come out, so
that processes of two versions of the code never share them."""

WORD_BYTES = 8
"""Records are made of int64: devices gather wide words several times as fast as bytes."""


class Record(Protocol):
    """How a sample of one level, or its target, lies in memory."""

    @property
    def name(self) -> str:
        """Name of the level, or "target"."""

    @property
    def num_words(self) -> int:
        """R, the words that a sample takes."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the values of a row depend on; a part that is empty is not fixed."""

    def read_into(self, sample: StoredSample, words_R: NDArray[np.int64]) -> None:
        """Read a sample from the store into its record."""

    def values(self, words_BR: Tensor) -> Tensor:
        """Return what a head sees of a batch's records, on their device."""


@dataclass(frozen=True)
class LevelRecord:
    """A level: its stored values, behind their scales if it is int8.

    Attributes:
        store: to read from.
        name: what the head asks for.
        spec: the stored level that serves it.
    """

    store: FeatureStore
    name: str
    spec: LevelSpec

    @property
    def num_words(self) -> int:
        """R, the words that a sample takes."""
        return math.ceil((self.spec.sample_bytes + self._scale_bytes) / WORD_BYTES)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the values of a row depend on; a part that is empty is not fixed."""
        return {"store": self.store.seal, "level": self.spec.name}

    @property
    def _scale_bytes(self) -> int:
        return 4 * self.spec.shape[0] if self.spec.precision == "int8" else 0

    def read_into(self, sample: StoredSample, words_R: NDArray[np.int64]) -> None:
        """Read a sample from the store into its record.

        Raises:
            MissingSampleError: when the store has no such row.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        content, scale_bytes = words_R.view(np.uint8), self._scale_bytes
        data = content[scale_bytes : scale_bytes + self.spec.sample_bytes]
        data_CHW = data.view(self.spec.dtype).reshape(self.spec.shape)
        scale_C = content[:scale_bytes].view(np.float32) if scale_bytes else None
        self.store.read_stored_into(self.spec.name, sample.row, Encoded(data_CHW, scale_C))

    def values(self, words_BR: Tensor) -> Tensor:
        """Return features (B, C, H, W): float16, bfloat16 if they are stored so; uint8 pictures."""
        content, scale_bytes = words_BR.view(torch.uint8), self._scale_bytes
        data = _part(content, scale_bytes, self.spec.sample_bytes)
        shape = (len(words_BR), *self.spec.shape)
        if self.spec.precision == "int8":
            scale_BC = _part(content, 0, scale_bytes).view(torch.float32)
            data_BCHW = data.view(torch.int8).reshape(shape)
            # As features.precision.decode has it: a product in float32, then rounded once.
            return (data_BCHW * scale_BC[:, :, None, None]).to(torch.float16)
        dtypes = {"bf16": torch.bfloat16, "uint8": torch.uint8}
        return data.view(dtypes.get(self.spec.precision, torch.float16)).reshape(shape)


@dataclass(frozen=True)
class TargetRecord:
    """A sample's mask on the grid that it is compared on.

    Attributes:
        store: to read from.
        label_set: which masks.
        num_planes: K.
        size_px: T.
        mode: how pictures were laid on the square.
    """

    store: FeatureStore
    label_set: str
    num_planes: int
    size_px: int
    mode: ResizeMode
    name: str = "target"

    @property
    def num_words(self) -> int:
        """R, the words that a sample takes."""
        return math.ceil(self.num_planes * self.size_px**2 / WORD_BYTES)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the values of a row depend on; a part that is empty is not fixed."""
        return {
            "store": self.store.seal,
            "labels": self.store.holder_of(self.label_set).seal,
            "label_set": self.label_set,
            "rule": TARGET_RULE,
            "size_px": self.size_px,
            "mode": self.mode,
        }

    def read_into(self, sample: StoredSample, words_R: NDArray[np.int64]) -> None:
        """Read a sample's mask and lay it on the target's grid.

        Raises:
            ConfigError: when the mask holds numbers that its label set has no class for.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self.store.label_sets[self.label_set]
        has_numbers = spec.task == "multiclass"
        mask_KHW = self.store.read_mask(sample.row, self.label_set)
        assert mask_KHW is not None
        highest = int(np.max(mask_KHW, initial=0, where=mask_KHW != IGNORE_LABEL))
        if highest > (len(spec.classes) if has_numbers else 1):
            known = f"class numbers up to {len(spec.classes)}" if has_numbers else "0 and 1"
            raise ConfigError(
                f"label set {self.label_set} holds {highest} (sample {sample.id}); expected "
                f"{known}; set it again with `sam3cache store labels set` and the number of each "
                "class, as --classes lad=1,lcx=2"
            )
        box = Letterbox.fit(sample.height_px, sample.width_px, self.mode)
        resample = box.numbers_to_target if has_numbers else box.mask_to_target
        target_KTT = resample(torch.from_numpy(mask_KHW), self.size_px).numpy()
        words_R.view(np.uint8)[: target_KTT.size] = target_KTT.reshape(-1)

    def values(self, words_BR: Tensor) -> Tensor:
        """Return targets, uint8 (B, K, T, T): planes of 0 and 1, or one of class numbers; 255."""
        shape = (len(words_BR), self.num_planes, self.size_px, self.size_px)
        return _part(words_BR.view(torch.uint8), 0, math.prod(shape[1:])).reshape(shape)


def _part(content: Tensor, begin: int, num_bytes: int) -> Tensor:
    """Return a part of every record, contiguous; copied only where it is not so already."""
    return content[:, begin : begin + num_bytes].contiguous()
