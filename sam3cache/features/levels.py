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

from sam3cache.errors import ConfigError
from sam3cache.features.precision import (
    MANTISSA_BITS,
    Precision,
    in_words,
    split_name,
    stored_dtype,
)
from sam3cache.tasks import Task

BLOCK_ROWS = 16
SHARD_BYTES_LIMIT = 50_000_000
LABEL_TILE_PX = 1024

Codec = Literal["raw", "blosc", "zstd"]


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """One level: an array with a sample a row, and for int8 another with the scales.

    Attributes:
        name: for example "fpn_72", or "fpn_72.int8".
        shape: (C, H, W) of one sample.
        dtype: of the array; by default what the name's precision is stored in.

    Raises:
        ConfigError: when the name ends in no precision, or the dtype is not that one's.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: str = ""

    def __post_init__(self) -> None:
        expected = stored_dtype(self.precision)
        if self.dtype not in ("", expected):
            raise ConfigError(
                f"level {self.name} of dtype {self.dtype}: expected {expected}; correct its name "
                "or its dtype"
            )
        object.__setattr__(self, "dtype", expected)

    @property
    def base(self) -> str:
        """What the level is of, whatever its precision: the name that heads ask for."""
        return split_name(self.name)[0]

    @property
    def precision(self) -> Precision:
        """How its values are stored."""
        return split_name(self.name)[1]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample before any codec, without its scales."""
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
        is_packed = self.precision == "uint8" or self.precision in MANTISSA_BITS
        return ShardGrid(
            folder=f"levels/{self.name}",
            dtype=self.dtype,
            codec="blosc" if is_packed else "raw",
            inner=(1, *self.shape),
            shard=(self.samples_per_shard, *self.shape),
        )

    @property
    def scale_grid(self) -> ShardGrid | None:
        """Layout of the array (rows, C) of scales; None unless the level is int8."""
        if self.precision != "int8":
            return None
        num_channels = self.shape[0]
        return ShardGrid(
            folder=f"levels/{self.name}.scale",
            dtype="float32",
            codec="raw",
            inner=(1, num_channels),
            shard=(BLOCK_ROWS, num_channels),
        )

    @property
    def grids(self) -> tuple[ShardGrid, ...]:
        """Its arrays: the values and, for int8, the scales."""
        return (self.grid,) if self.scale_grid is None else (self.grid, self.scale_grid)

    def metadata_files(self, num_rows: int) -> dict[str, bytes]:
        """Return every zarr.json of the level by its path below the store.

        Args:
            num_rows: of the arrays, a multiple of the block.
        """
        attributes: dict[str, Any] = {"precision": in_words(self.precision)}
        if self.precision == "bf16":
            attributes["value"] = "the upper 16 bits of a float32 whose lower ones are 0"
        scales = self.scale_grid
        if scales is not None:
            attributes["value"] = "int8 times scale[row, channel]"
            attributes["scale"] = scales.folder
        # What has no attributes reads as its dtype says.
        has_own = self.precision not in ("float16", "uint8")
        files = {
            f"{self.grid.folder}/zarr.json": self.grid.metadata(
                num_rows, self.shape, attributes if has_own else None
            )
        }
        if scales is not None:
            files[f"{scales.folder}/zarr.json"] = scales.metadata(num_rows, self.shape[:1])
        return files


@dataclass(frozen=True, slots=True)
class LabelSetSpec:
    """One set of masks.

    Attributes:
        name: for example "mask".
        classes: names by plane, or of the class numbers from 1 on; one name for a binary mask.
        height_px: of the array; no mask is higher.
        width_px: of the array; no mask is wider.
        task: whether masks are planes of 0 and 1, or one plane of class numbers; see
            :mod:`sam3cache.tasks`.
    """

    name: str
    classes: tuple[str, ...]
    height_px: int
    width_px: int
    task: Task = "multilabel"

    @property
    def num_planes(self) -> int:
        """K, the number of planes of a mask."""
        return 1 if self.task == "multiclass" else len(self.classes)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the set's zarr.json says of it."""
        task = {} if self.task == "multilabel" else {"task": self.task}
        return {"classes": list(self.classes), **task}

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
        inner: shape of an inner chunk; its first axis is the rows.
        shard: shape of a shard; a multiple of ``inner`` in every axis.
    """

    folder: str
    dtype: str
    codec: Codec
    inner: tuple[int, ...]
    shard: tuple[int, ...]

    @property
    def num_inner(self) -> int:
        """Inner chunks a shard. Shards are divided along the rows alone."""
        return self.shard[0] // self.inner[0]

    def key(self, shard_index: tuple[int, ...]) -> str:
        """Return the path of a shard below the store; axes left out are at 0."""
        index = shard_index + (0,) * (len(self.shard) - len(shard_index))
        return f"{self.folder}/c/" + "/".join(str(i) for i in index)

    def metadata(
        self,
        num_rows: int,
        shape: tuple[int, ...],
        attributes: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Return the array's zarr.json, as zarr-python itself writes it.

        Args:
            num_rows: of the array, a multiple of the block.
            shape: that the array gives to a row, (C, H, W) for levels.
            attributes: what is to be said of the values, if anything.
        """
        memory = MemoryStore()
        dtype = np.dtype(self.dtype)
        compressors_of: dict[Codec, list[Any]] = {
            "raw": [Crc32cCodec()],
            "blosc": [
                BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle"),
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
            serializer=BytesCodec(endian="little" if dtype.itemsize > 1 else None),
            fill_value=np.nan if dtype.kind == "f" else 0,
            attributes=None if attributes is None else {"sam3cache": dict(attributes)},
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
