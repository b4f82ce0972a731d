"""The arrays of a store: their shapes, chunks and codecs, as Zarr metadata.

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

BLOCK_ROWS = 16
SHARD_BYTES_LIMIT = 50_000_000
LABEL_TILE_PX = 1024

Codec = Literal["raw", "blosc", "zstd"]


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """One level: an array with a sample a row.

    Attributes:
        name: for example "fpn_72".
        shape: (C, H, W) of one sample.
        dtype: "float16" for features, "uint8" for pictures.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: str = "float16"

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample before any codec."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def samples_per_shard(self) -> int:
        """Largest power of two, at most a block, that keeps a shard near 42 MB."""
        num = BLOCK_ROWS
        while num > 1 and num * self.sample_bytes > SHARD_BYTES_LIMIT:
            num //= 2
        return num

    @property
    def item(self) -> str:
        """Name of the level among the receipts."""
        return f"levels.{self.name}"

    @property
    def grid(self) -> ShardGrid:
        """The array's layout on disk."""
        return ShardGrid(
            folder=f"levels/{self.name}",
            dtype=self.dtype,
            codec="raw" if self.dtype == "float16" else "blosc",
            inner=(1, *self.shape),
            shard=(self.samples_per_shard, *self.shape),
        )


@dataclass(frozen=True, slots=True)
class LabelSetSpec:
    """One set of masks.

    Attributes:
        name: for example "mask".
        classes: names by plane; one name for a binary mask.
        height_px: of the array; no mask is higher.
        width_px: of the array; no mask is wider.
    """

    name: str
    classes: tuple[str, ...]
    height_px: int
    width_px: int

    @property
    def num_planes(self) -> int:
        """K, the number of planes of a mask."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, H, W) that the array gives to a row."""
        return (self.num_planes, self.height_px, self.width_px)

    @property
    def item(self) -> str:
        """Name of the set among the receipts."""
        return f"labels.{self.name}"

    @property
    def grid(self) -> ShardGrid:
        """The array's layout on disk."""
        return ShardGrid(
            folder=f"labels/{self.name}/masks",
            dtype="uint8",
            codec="zstd",
            inner=(1, 1, LABEL_TILE_PX, LABEL_TILE_PX),
            shard=(BLOCK_ROWS, 1, LABEL_TILE_PX, LABEL_TILE_PX),
        )


@dataclass(frozen=True, slots=True)
class ShardGrid:
    """How an array lies on disk: the shape of a shard and of the chunks in it.

    Attributes:
        folder: of the array, below the store.
        dtype: of the array.
        codec: what stands between an inner chunk's values and its bytes.
        inner: shape of an inner chunk (rows, C, H, W).
        shard: shape of a shard; a multiple of ``inner`` in every axis.
    """

    folder: str
    dtype: str
    codec: Codec
    inner: tuple[int, int, int, int]
    shard: tuple[int, int, int, int]

    @property
    def num_inner(self) -> int:
        """Inner chunks a shard. Shards are divided along the rows alone."""
        return self.shard[0] // self.inner[0]

    def key(self, shard_index: tuple[int, int, int, int]) -> str:
        """Return the path of a shard below the store."""
        return f"{self.folder}/c/" + "/".join(str(i) for i in shard_index)

    def metadata(self, num_rows: int, shape: tuple[int, int, int]) -> bytes:
        """Return the array's zarr.json, as zarr-python itself writes it.

        Args:
            num_rows: of the array, a multiple of the block.
            shape: (C, H, W) that the array gives to a row.
        """
        memory = MemoryStore()
        compressors_of: dict[Codec, list[Any]] = {
            "raw": [Crc32cCodec()],
            "blosc": [
                BloscCodec(typesize=1, cname="lz4", clevel=5, shuffle="bitshuffle"),
                Crc32cCodec(),
            ],
            "zstd": [ZstdCodec(level=3, checksum=True)],
        }
        zarr.create_array(
            memory,
            shape=(num_rows, *shape),
            dtype=self.dtype,
            chunks=self.inner,
            shards=self.shard,
            compressors=compressors_of[self.codec],
            serializer=BytesCodec(endian="little" if self.dtype == "float16" else None),
            fill_value=np.nan if self.dtype == "float16" else 0,
            zarr_format=3,
        )
        return _content(memory, "zarr.json")


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """Return the zarr.json of a group with our attributes, as zarr-python itself writes it."""
    memory = MemoryStore()
    zarr.create_group(memory, attributes={"sam3cache": dict(attributes)}, zarr_format=3)
    return _content(memory, "zarr.json")


def _content(memory: MemoryStore, key: str) -> bytes:
    from zarr.core.buffer import default_buffer_prototype

    buffer = asyncio.run(memory.get(key, default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()
