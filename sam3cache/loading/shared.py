"""Memory that the processes of one user share: the first loads it, with the last it is freed.

A segment is a file in memory (Linux's /dev/shm; a temporary file elsewhere) that every user maps.
Each user holds the operating system's lock on a file of its own, which dies with it: a segment
without a living user, as after kill -9, is deleted by whoever comes next. The one who loads a
segment holds a lock as well, so that others wait for it, or take over where it died; only a whole
segment ever gets its name.

    KEY.<random>.user   locked while that user lives
    KEY.load            locked while somebody loads
    KEY.partial         what has been loaded so far
    KEY.data            the whole segment; never changed
    door                locked for the moment of coming or leaving
"""

from __future__ import annotations

import errno
import getpass
import mmap
import os
import re
import shutil
import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

_MEMORY = Path("/dev/shm") if sys.platform == "linux" else None
_DOOR_PATIENCE_S = 10.0
_LOAD_POLL_S = 0.2


def shared_folder() -> Path:
    """Return where this user's segments lie.

    Raises:
        OSError: when the user has no name.
    """
    try:
        user = getpass.getuser()
    except (KeyError, ImportError) as error:  # as older Pythons say that there is none
        raise OSError(errno.ENOENT, "the user has no name") from error
    base = _MEMORY if _MEMORY is not None and _MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / f"sam3cache-{re.sub(r'[^A-Za-z0-9._-]', '_', user)}"


class SharedSegment:
    """One user's hold on a segment. Any failure is an OSError: private memory can do instead.

    Args:
        folder: of this user's segments; made if it is missing.
        key: of what the segment holds; equal keys are equal bytes.
        size_bytes: of the segment, above 0.

    Raises:
        OSError: when the folder cannot be used, or belongs to somebody else.
    """

    def __init__(self, folder: Path, key: str, size_bytes: int) -> None:
        self._folder, self._key, self.size_bytes = folder, key, size_bytes
        folder.mkdir(mode=0o700, exist_ok=True)
        # Released by whichever thread happens to drop the segment.
        user = FileLock(self._path(f"{uuid.uuid4().hex}.user"), mode=0o600, thread_local=False)
        with _door(folder).acquire(timeout=_DOOR_PATIENCE_S):
            user.acquire(timeout=0)
            try:
                _require_own(folder, Path(user.lock_file))
            except OSError:
                user.release()
                Path(user.lock_file).unlink()
                raise
            # Also at the end of the program; not where it is killed.
            self._leave = weakref.finalize(self, _leave, folder, user)
            sweep(folder)
        self._load_lock = FileLock(self._path("load"), mode=0o600, thread_local=False)

    @property
    def is_expected(self) -> bool:
        """Whether the segment is there, or somebody has begun to load it."""
        return self._is_whole() or self._path("partial").exists()

    def begin_loading(self, waiting: Callable[[float], None]) -> bool:
        """Claim the segment's loading, waiting for whoever does it already.

        Args:
            waiting: called now and then, with the share that the other has loaded.

        Returns:
            Whether there is something to load: then every byte has to be written, before
            ``finish_loading`` or ``leave``.

        Raises:
            OSError: when there is no room for it.
        """
        while not self._is_whole():
            try:
                self._load_lock.acquire(timeout=_LOAD_POLL_S)
            except Timeout:
                with suppress(FileNotFoundError):
                    waiting(min(1.0, self._path("partial").stat().st_size / self.size_bytes))
                continue
            if self._is_whole():
                self._load_lock.release()
                break
            free_bytes = shutil.disk_usage(self._folder).free
            if free_bytes < self.size_bytes:
                raise OSError(
                    errno.ENOSPC,
                    f"{self._folder.parent} has {free_bytes / 1e9:.2g} GB free, not the "
                    f"{self.size_bytes / 1e9:.2g} GB that are needed",
                )
            # Whatever a dead one has left is begun anew.
            self._path("partial").unlink(missing_ok=True)
            self._path("partial").touch(mode=0o600)
            return True
        return False

    def write(self, offset: int, data: NDArray[np.int64]) -> None:
        """Write a part of the segment that this process loads.

        By writing rather than through a mapping: memory that runs out is an error then, not the
        end of the process, and pages need not be cleared first, which takes as long as the copy.

        Raises:
            OSError: when there is no room for it.
        """
        with self._path("partial").open("r+b", buffering=0) as file:
            file.seek(offset)
            rest = data.view(np.uint8)
            while rest.size:
                rest = rest[file.write(rest.data) :]

    def finish_loading(self) -> None:
        """Give the segment, now whole, to everybody."""
        self._path("partial").replace(self._path("data"))
        self._load_lock.release()

    def map(self, *, writable: bool) -> NDArray[np.int64]:
        """Map the whole segment.

        Args:
            writable: ask for a mapping that could be written to, which pinning needs.
        """
        with self._path("data").open("r+b" if writable else "rb") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), dtype=np.int64)

    def leave(self) -> None:
        """Give the hold up. What was mapped stays valid, as long as it is kept."""
        self._load_lock.release()
        self._leave()

    def _is_whole(self) -> bool:
        try:
            return self._path("data").stat().st_size == self.size_bytes
        except FileNotFoundError:
            return False

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._key}.{suffix}"


@cache
def _door(folder: Path) -> FileLock:
    """Return a folder's lock for coming and leaving: one object, as one thread may nest."""
    return FileLock(folder / "door", mode=0o600)


def _require_own(folder: Path, own_file: Path) -> None:
    """Refuse a folder that another user has made, or may write into."""
    status = folder.lstat()
    is_own = not folder.is_symlink() and status.st_uid == own_file.stat().st_uid
    if not is_own or (os.name == "posix" and status.st_mode & 0o077):
        raise OSError(errno.EACCES, f"{folder} is not this user's alone")


def _leave(folder: Path, user: FileLock) -> None:
    user.release()
    # A finalizer may run anywhere, even while this thread waits at the door, which filelock
    # refuses with a RuntimeError: then the next to come or leave sweeps.
    with suppress(OSError, RuntimeError), _door(folder).acquire(timeout=_DOOR_PATIENCE_S):
        sweep(folder)


def sweep(folder: Path) -> None:
    """Delete the segments that no living process uses; for whoever stands in the door."""
    used = set()
    for path in folder.glob("*.user"):
        lock = FileLock(path, mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            used.add(path.name.partition(".")[0])
        else:
            lock.release()
            path.unlink(missing_ok=True)
    for path in folder.glob("*.*"):
        if path.name.partition(".")[0] not in used:
            # Windows keeps what is still mapped, which a later sweep finds.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
