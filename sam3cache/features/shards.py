"""Shards in memory: Zarr's ``sharding_indexed`` codec, written whole and read a chunk at a time.

zarr-python encodes a shard only by way of a read-modify-write through its store, and reads one far
below the disk's speed; this is the part of the codec that we need, and the tests hold it to
zarr-python's own reading and writing. Source: Zarr v3 specification, "Sharding codec", version 1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any

import crc32c as crc32c_package
import numpy as np
from numcodecs import Blosc, Zstd
from numpy.typing import NDArray

from sam3cache.errors import CorruptStoreError, MissingSampleError, StoreError
from sam3cache.features.levels import ShardGrid
from sam3cache.features.places import Place

_ABSENT = 2**64 - 1
_CRC_BYTES = 4


def crc32c(data: bytes | NDArray[Any]) -> int:
    """Return the CRC-32C of ``data`` (RFC 3720, appendix B.4); an array has to be contiguous."""
    return int(crc32c_package.crc32c(data.data if isinstance(data, np.ndarray) else data))


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """A shard's bytes, and what a receipt tells of them.

    Attributes:
        data: the whole file.
        chunk_crc32c: of the inner chunks that are present, in row order: of their encoded
            bytes, without a checksum behind them.
    """

    data: bytes
    chunk_crc32c: tuple[int, ...]


def encode_shard(grid: ShardGrid, chunks: Mapping[int, NDArray[np.generic]]) -> EncodedShard:
    """Return a shard's bytes.

    Args:
        grid: the array's layout.
        chunks: by position in the shard, the inner chunks that are present, each of
            ``grid.inner``'s shape (without the row axis) and dtype.
    """
    index = np.full((grid.num_inner, 2), _ABSENT, dtype="<u8")
    parts: list[bytes] = []
    checksums: list[int] = []
    offset = 0
    for position in sorted(chunks):
        array = np.ascontiguousarray(chunks[position], dtype=np.dtype(grid.dtype).newbyteorder("<"))
        assert array.shape == grid.inner[1:], (array.shape, grid.inner)
        encoded = _encode_chunk(grid, array)
        checksum = crc32c(encoded)
        if grid.codec != "zstd":
            encoded += struct.pack("<I", checksum)
        parts.append(encoded)
        checksums.append(checksum)
        index[position] = (offset, len(encoded))
        offset += len(encoded)
    index_bytes = index.tobytes()
    data = b"".join([*parts, index_bytes, struct.pack("<I", crc32c(index_bytes))])
    return EncodedShard(data, tuple(checksums))


def _encode_chunk(grid: ShardGrid, array: NDArray[np.generic]) -> bytes:
    if grid.codec == "zstd":
        return bytes(Zstd(level=3, checksum=True).encode(array))
    if grid.codec == "blosc":
        return bytes(Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE).encode(array))
    return array.tobytes()


@dataclass(frozen=True, slots=True)
class ShardReader:
    """Reads chunks of one shard; holds its index, not the file.

    A chunk is checked against its checksum the first time that it is read; a compressed one always.

    Attributes:
        path: of the shard.
        grid: the array's layout.
        index: uint64 (inner chunks, 2): offset and size in bytes.
        mtime_ns: of the file when its index was read.
        checksums: by position, what the receipt says of the chunks; empty where it does not.
        verified: bool (inner chunks,): whether a chunk has been found to be as it was written.
    """

    path: Place
    grid: ShardGrid
    index: NDArray[np.uint64]
    mtime_ns: int
    checksums: Mapping[int, int]
    verified: NDArray[np.bool_] = field(repr=False)

    @classmethod
    def open(
        cls,
        path: Place,
        grid: ShardGrid,
        expected_bytes: int,
        chunk_crc32c: Sequence[int] = (),
    ) -> ShardReader:
        """Read and check a shard's index.

        Args:
            path: of the shard.
            grid: the array's layout.
            expected_bytes: size that the receipt states.
            chunk_crc32c: what it states of the chunks; without it, a shard that took the place of
                another of the same size is not noticed.

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
        present = np.flatnonzero(index[:, 0] != _ABSENT).tolist()
        if not _fits(index[present], grid, size_bytes - index_bytes - _CRC_BYTES) or (
            chunk_crc32c and len(chunk_crc32c) != len(present)
        ):
            raise CorruptStoreError(_damage(path, "its index"))
        checksums = dict(zip(present, chunk_crc32c, strict=False))
        verified = np.zeros(grid.num_inner, dtype=np.bool_)
        return cls(path, grid, index, stat.st_mtime_ns, checksums, verified)

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the chunks that the shard holds."""
        return tuple(np.flatnonzero(self.index[:, 0] != _ABSENT).tolist())

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
        if self.grid.codec == "raw":
            intact = self._read_raw(position, offset, flat)
        else:
            intact = self._read_packed(position, offset, size_bytes, flat)
        if not intact:
            raise self._damage(position)
        self.verified[position] = True

    def _read_raw(self, position: int, offset: int, flat: NDArray[np.uint8]) -> bool:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            # In one piece: by several, threads wait for each other more than the cache saves.
            if not _read_exactly(file, flat):
                return False
            if self.verified[position]:
                return True
            expected = self.checksums.get(position)
            if expected is None:
                expected = int.from_bytes(file.read(_CRC_BYTES), "little")
        return crc32c(flat) == expected

    def _read_packed(
        self, position: int, offset: int, size_bytes: int, flat: NDArray[np.uint8]
    ) -> bool:
        """Read a compressed chunk into ``flat``; False when it is not what was written."""
        data = np.empty(size_bytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            if not _read_exactly(file, data):
                return False
        if self.grid.codec == "blosc":
            data, stored = (
                data[:-_CRC_BYTES],
                int.from_bytes(data[-_CRC_BYTES:].tobytes(), "little"),
            )
            if crc32c(data) != stored:
                return False
        else:
            stored = crc32c(data)
        if stored != self.checksums.get(position, stored):
            return False
        try:
            codec = Blosc() if self.grid.codec == "blosc" else Zstd(checksum=True)
            codec.decode(data, flat)
        except (RuntimeError, ValueError):
            return False
        return True

    def _damage(self, position: int) -> StoreError:
        if self.path.stat().st_mtime_ns != self.mtime_ns:
            return StoreError(
                f"{self.path} was written anew while the store was open; open the store again"
            )
        return CorruptStoreError(_damage(self.path, f"chunk {position}"))


def _fits(entries: NDArray[np.uint64], grid: ShardGrid, data_bytes: int) -> bool:
    """Return whether an index's entries lie within a shard's data."""
    ends = entries.sum(axis=1)
    if grid.codec == "raw":
        chunk_bytes = int(np.prod(grid.inner)) * np.dtype(grid.dtype).itemsize + _CRC_BYTES
        if (entries[:, 1] != chunk_bytes).any():
            return False
    return bool((entries <= data_bytes).all() and (ends <= data_bytes).all())


def _read_exactly(file: RawIOBase, out: NDArray[np.uint8]) -> bool:
    """Fill ``out`` from a file; False when the file ends before."""
    filled = 0
    while filled < out.size:
        num = file.readinto(out[filled:].data)
        if not num:
            return False
        filled += num
    return True


def _damage(path: Place, what: str) -> str:
    return (
        f"{path} is damaged ({what} does not match its checksum); delete that file and run the "
        "same `sam3cache extract` again to rebuild its block"
    )
