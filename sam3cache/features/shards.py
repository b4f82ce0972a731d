"""Shards in memory: Zarr's ``sharding_indexed`` codec, written whole and read a chunk at a time.

zarr-python encodes a shard only by way of a read-modify-write through its store, and reads one far
below the disk's speed; this is the part of the codec that we need, and the tests hold it to
zarr-python's own reading and writing. Source: Zarr v3 specification, "Sharding codec", version 1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from sam3cache.errors import CorruptStoreError, MissingSampleError, StoreError
from sam3cache.features.levels import ShardGrid

_ABSENT = 2**64 - 1
_CRC_BYTES = 4


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """Return the CRC-32C of ``data`` (RFC 3720, appendix B.4)."""
    return int(google_crc32c.value(bytes(data)))


def encode_shard(grid: ShardGrid, chunks: Mapping[int, NDArray[np.generic]]) -> bytes:
    """Return a shard's bytes.

    Args:
        grid: the array's layout.
        chunks: by position in the shard, the inner chunks that are present, each of
            ``grid.inner``'s shape (without the row axis) and dtype.
    """
    index = np.full((grid.num_inner, 2), _ABSENT, dtype="<u8")
    parts: list[bytes] = []
    offset = 0
    for position in sorted(chunks):
        array = np.ascontiguousarray(chunks[position], dtype=np.dtype(grid.dtype).newbyteorder("<"))
        assert array.shape == grid.inner[1:], (array.shape, grid.inner)
        encoded = _encode_chunk(grid, array)
        parts.append(encoded)
        index[position] = (offset, len(encoded))
        offset += len(encoded)
    index_bytes = index.tobytes()
    return b"".join([*parts, index_bytes, struct.pack("<I", crc32c(index_bytes))])


def _encode_chunk(grid: ShardGrid, array: NDArray[np.generic]) -> bytes:
    if grid.codec == "zstd":
        return bytes(Zstd(level=3, checksum=True).encode(array))
    if grid.codec == "blosc":
        blosc = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE)
        data = bytes(blosc.encode(array))
    else:
        data = array.tobytes()
    return data + struct.pack("<I", crc32c(data))


@dataclass(frozen=True, slots=True)
class ShardReader:
    """Reads chunks of one shard; holds its index, not the file.

    Attributes:
        path: of the shard.
        grid: the array's layout.
        index: uint64 (inner chunks, 2): offset and size in bytes.
        mtime_ns: of the file when its index was read.
    """

    path: Path
    grid: ShardGrid
    index: NDArray[np.uint64]
    mtime_ns: int

    @classmethod
    def open(cls, path: Path, grid: ShardGrid, expected_bytes: int) -> ShardReader:
        """Read and check a shard's index.

        Args:
            path: of the shard.
            grid: the array's layout.
            expected_bytes: size that the receipt states.

        Raises:
            CorruptStoreError: when the file is missing, of another size, or its index is damaged.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise CorruptStoreError(
                f"{path} is missing, though its receipt says it was written; run the same "
                "`sam3cache extract` again to rebuild that block"
            ) from None
        size_bytes = stat.st_size
        index_bytes = grid.num_inner * 16
        if size_bytes != expected_bytes or size_bytes < index_bytes + _CRC_BYTES:
            raise CorruptStoreError(
                f"{path} has {size_bytes} bytes, expected {expected_bytes}; run the same "
                "`sam3cache extract` again to rebuild that block"
            )
        with path.open("rb") as file:
            file.seek(size_bytes - index_bytes - _CRC_BYTES)
            raw = file.read(index_bytes + _CRC_BYTES)
        (stored,) = struct.unpack("<I", raw[index_bytes:])
        if crc32c(raw[:index_bytes]) != stored:
            raise CorruptStoreError(_damage(path, "its index"))
        index = np.frombuffer(raw[:index_bytes], dtype="<u8").reshape(grid.num_inner, 2)
        return cls(path, grid, index, stat.st_mtime_ns)

    def read_into(self, position: int, out: NDArray[np.generic]) -> None:
        """Read one inner chunk straight into ``out``, checking its checksum.

        Args:
            position: of the chunk in the shard.
            out: C-contiguous, of the inner chunk's shape without the row axis, and its dtype.

        Raises:
            MissingSampleError: when the shard has no such chunk.
            CorruptStoreError: when the bytes do not match their checksum.
            StoreError: when the shard was replaced after its index was read.
        """
        offset, size_bytes = (int(value) for value in self.index[position])
        if offset == _ABSENT:
            raise MissingSampleError(f"{self.path} holds nothing at position {position}")
        flat = out.reshape(-1).view(np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            if self.grid.codec == "raw":
                intact = _read_exactly(file, flat) and crc32c(flat) == int.from_bytes(
                    file.read(_CRC_BYTES), "little"
                )
            else:
                data = np.empty(size_bytes, np.uint8)
                intact = _read_exactly(file, data) and self._decode(data, flat)
        if not intact:
            raise self._damage(position)

    def _decode(self, data: NDArray[np.uint8], flat: NDArray[np.uint8]) -> bool:
        """Decompress a chunk's bytes into ``flat``; False when they do not match their checksum."""
        if self.grid.codec == "blosc":
            payload, stored = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
            if crc32c(payload) != int.from_bytes(stored.tobytes(), "little"):
                return False
            Blosc().decode(payload, flat)
            return True
        try:
            Zstd(checksum=True).decode(data, flat)
        except RuntimeError:
            return False
        return True

    def _damage(self, position: int) -> StoreError:
        if self.path.stat().st_mtime_ns != self.mtime_ns:
            return StoreError(
                f"{self.path} was written anew while the store was open; open the store again"
            )
        return CorruptStoreError(_damage(self.path, f"chunk {position}"))


def _read_exactly(file: FileIO, out: NDArray[np.uint8]) -> bool:
    """Fill ``out`` from a file; False when the file ends before."""
    filled = 0
    while filled < out.size:
        num = file.readinto(out[filled:].data)
        if not num:
            return False
        filled += num
    return True


def _damage(path: Path, what: str) -> str:
    return (
        f"{path} is damaged ({what} does not match its checksum); delete that file and run the "
        "same `sam3cache extract` again to rebuild its block"
    )
