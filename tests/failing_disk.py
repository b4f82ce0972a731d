"""A disk that fails at the operation one chooses, at the border to the operating system."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest


class FailingDisk:
    """While entered, the n-th change of a file below a folder fails.

    What counts are the calls that change files: creating or opening for writing, writing,
    flushing, renaming, deleting. A write that fails has written its first half.
    Nothing is really flushed, which takes long and is for power failures alone.

    Args:
        folder: below which files fail.
        fail_at: number of the operation that fails, from 1 on; 0 lets all succeed.
        lasting: whether every later operation fails as well. What is on the disk is then what a
            kill at that moment leaves, as nothing can be tidied up.
        number: of the error, such as errno.ENOSPC.
    """

    def __init__(
        self, folder: Path, fail_at: int, *, lasting: bool = False, number: int = errno.ENOSPC
    ) -> None:
        self.num_operations = 0
        self._folder = os.fspath(folder)
        self._fail_at, self._lasting, self._number = fail_at, lasting, number
        self._patch = pytest.MonkeyPatch()

    @property
    def failed(self) -> bool:
        """Whether the operation was reached."""
        return 0 < self._fail_at <= self.num_operations

    def __enter__(self) -> FailingDisk:
        for name in ("replace", "unlink"):
            self._patch.setattr(os, name, self._failing(getattr(os, name)))
        self._patch.setattr(os, "open", self._failing(os.open, lambda flags, *_: flags & _CHANGES))
        self._patch.setattr(os, "fsync", self._failing(lambda file: None))
        self._patch.setattr(io, "open", self._failing(io.open, lambda mode="r", *_: mode != "rb"))
        opened = io.open

        def open_torn(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode != "wb" or not self._concerns(file):
                return opened(file, mode, *args, **options)
            opened(file, mode).close()
            return io.BufferedWriter(_TornFile(file, self._count))

        self._patch.setattr(io, "open", open_torn)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._patch.undo()

    def _concerns(self, path: Any) -> bool:
        # A number is of an open file, of which ours are all that are flushed.
        return isinstance(path, int) or os.fspath(path).startswith(self._folder)

    def _count(self, path: Any) -> None:
        self.num_operations += 1
        late = self._lasting and self.num_operations > self._fail_at
        if self._fail_at and (self.num_operations == self._fail_at or late):
            text = os.strerror(self._number)
            if isinstance(path, int):
                raise OSError(self._number, text)
            raise OSError(self._number, text, os.fspath(path))

    def _failing(
        self, call: Callable[..., Any], changes: Callable[..., Any] = lambda *args: True
    ) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **options: Any) -> Any:
            if self._concerns(path) and changes(*args):
                self._count(path)
            return call(path, *args, **options)

        return wrapped


_CHANGES = os.O_CREAT | os.O_WRONLY | os.O_RDWR


class _TornFile(io.FileIO):
    """A file whose failing write has written half."""

    def __init__(self, path: Any, count: Callable[[Any], None]) -> None:
        super().__init__(path, "w")
        self._count = count

    def write(self, data: Any) -> int:
        try:
            self._count(self.fileno())
        except OSError:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)
