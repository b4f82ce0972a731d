"""``.npz``: several NumPy arrays in one zip archive.

Arrays that ``np.savez`` wrote are read frame by frame where they lie. Those of
``np.savez_compressed`` can only be inflated from their beginning, so a frame costs all frames
before it, unless they are asked for in order.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import QuotingError
from sam3cache.images.opened import kept_open
from sam3cache.images.picture import Picture, array_picture, names_stack

ZIP_MAGIC = b"PK\x03\x04"

_SKIPPED_BYTES = 1 << 20
_COLUMN_BYTES = 1 << 28


def open_npz(path: Path, name: str, member: str, *, frame: int | None, is_mask: bool) -> Picture:
    """Open an array of an archive as a picture; without a name, the only one.

    Raises:
        QuotingError: no such array.
        ImageError: none that is a picture.
    """
    archive = kept_open(path, NpzFile)
    is_stack = names_stack(member)
    if not member:
        if len(archive.names) != 1:
            some = ", ".join(archive.names[:8]) or "none"
            raise QuotingError(
                f"{name}: holds the arrays {some}; say which one, as FILE.npz::NAME",
                f"{name}: holds not one array; say which one, as FILE.npz::NAME",
            )
        member = archive.names[0]
    if member not in archive.names:
        raise QuotingError(
            f"{name}: no array {member!r}; it has {', '.join(archive.names[:8]) or 'none'}",
            f"{name}: no such array; mend the name behind ::",
        )
    return array_picture(
        archive.array(member), name, frame=frame, is_mask=is_mask, is_stack=is_stack
    )


class NpzFile:
    """An open archive."""

    def __init__(self, path: Path) -> None:
        """Read the archive's list of contents.

        Raises:
            OSError, zipfile.BadZipFile: when it cannot be read.
        """
        self._path = path
        self._zip = zipfile.ZipFile(path)
        entries = [entry for entry in self._zip.infolist() if entry.filename.endswith(".npy")]
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        self._arrays: dict[str, Any] = {}

    def __del__(self) -> None:
        if hasattr(self, "_zip"):
            self.close()

    def close(self) -> None:
        """Close the archive."""
        self._arrays = {}
        self._zip.close()

    @property
    def is_open(self) -> bool:
        """Whether the archive can still be read."""
        return self._zip.fp is not None

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays by name."""
        return {name: self.array(name).shape for name in self._entries}

    def values(self, name: str, begin: int, end: int) -> Any:
        """Return some rows of an array that is short."""
        array = self.array(name)
        if array.shape and math.prod(array.shape) * array.dtype.itemsize > _COLUMN_BYTES:
            raise ValueError(f"array {name!r} is too large for a column")
        values = array[...]
        return values[begin:end] if array.shape else values

    def attributes(self, name: str) -> dict[str, Any]:
        """Return nothing: archives have no attributes."""
        return {}

    def array(self, name: str) -> Any:
        """Return an array that stays on disk: ``shape``, ``dtype``, and frames by index.

        Raises:
            ValueError: when it is damaged, compressed otherwise or in Fortran's order.
        """
        if name not in self._arrays:
            self._arrays[name] = self._open(self._entries[name])
        return self._arrays[name]

    def _open(self, entry: zipfile.ZipInfo) -> Any:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("an archive that is compressed otherwise than NumPy does")
        with self._zip.open(entry) as file:
            shape, dtype, header_bytes = _read_npy_header(file)
        if entry.file_size < header_bytes + math.prod(shape) * dtype.itemsize:
            raise ValueError("an array that is shorter than its header says")
        if entry.compress_type == zipfile.ZIP_DEFLATED or not math.prod(shape):
            return _Deflated(self._zip, entry, shape, dtype, header_bytes)
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            # Of the local header, only the lengths of what follows it may differ from the list.
            name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(30))
        offset = entry.header_offset + 30 + name_bytes + extra_bytes + header_bytes
        return np.memmap(self._path, dtype, "r", offset, shape)


class _Deflated:
    """An array in an archive that has to be inflated from its beginning."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        entry: zipfile.ZipInfo,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        header_bytes: int,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._archive, self._entry, self._header_bytes = archive, entry, header_bytes
        self._file: IO[bytes] | None = None
        self._position = 0

    def __getitem__(self, index: Any) -> NDArray[Any]:
        shape = self.shape if index is ... else self.shape[1:]
        num_bytes = math.prod(shape) * self.dtype.itemsize
        begin = self._header_bytes + (0 if index is ... else index * num_bytes)
        if self._file is None or self._position > begin:
            self._file = self._archive.open(self._entry)
            self._position = 0
        while self._position < begin:
            skipped = len(self._file.read(min(_SKIPPED_BYTES, begin - self._position)))
            if not skipped:
                raise EOFError("an array that ends too early")
            self._position += skipped
        data = self._file.read(num_bytes)
        self._position += len(data)
        if len(data) < num_bytes:
            raise EOFError("an array that ends too early")
        return np.frombuffer(data, self.dtype).reshape(shape)


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, type, and where the values begin."""
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    read = np.lib.format.read_array_header_2_0
    if version == (1, 0):
        read = np.lib.format.read_array_header_1_0
    shape, is_fortran, dtype = read(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    if is_fortran and len(shape) > 1:
        raise ValueError("an array in Fortran's order; save it in C order")
    return shape, dtype, file.tell()
