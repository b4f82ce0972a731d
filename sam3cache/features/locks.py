"""Locks that die with their holder, so that a killed process leaves no claim."""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from sam3cache.errors import StoreBusyError
from sam3cache.features.files import canonical_json
from sam3cache.features.leases import LEASE_S, held_below, held_lease, store_lease, sweep_leases
from sam3cache.features.objects import ObjectPath
from sam3cache.features.places import Place, place_of

# What Lustre without -o flock, NFS without a lock service and the like answer.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_MARK = "store.held"
_PAUSE_S = 2.0


def locks_work(root: Place) -> bool:
    """Return whether the file system of a store, whose folder exists, lets files be locked.

    An object store has leases, or refuses.
    """
    if isinstance(root, ObjectPath):
        return True
    try:
        # filelock warns, and makes do with a file that is there: that would outlive its holder.
        with warnings.catch_warnings(action="error"), FileLock(root / ".lock", timeout=0):
            return True
    except Timeout:
        return True
    except (NotImplementedError, UserWarning):
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise


@contextmanager
def store_lock(root: Place, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the whole store for a change of its tables, metadata or seal.

    Args:
        root: the store; made if it is missing.
        timeout_s: how long to wait for another holder.

    Raises:
        StoreBusyError: naming the holder, when it does not let go in time.
    """
    root = place_of(root)
    if isinstance(root, ObjectPath):
        with store_lease(root, timeout_s=timeout_s):
            yield
        return
    root.mkdir(parents=True, exist_ok=True)
    holder = root / ".holder.json"
    path, if_dead = root / ".lock", ""
    kind: type[BaseFileLock] = FileLock
    if not locks_work(root):
        # It is held for moments: there, a file that exists must do, which a kill leaves behind.
        path, kind = root / "claims" / _MARK, SoftFileLock
        path.parent.mkdir(exist_ok=True)
        if_dead = f" (is it gone? then delete {path})"
    try:
        with kind(path, timeout=timeout_s):
            me = {"pid": os.getpid(), "host": platform.node(), "since_unix_s": int(time.time())}
            # A courtesy to those who wait: a disk too full for it will tell by what matters.
            with suppress(OSError):
                holder.write_bytes(canonical_json(me))
            try:
                yield
            finally:
                # It means nothing without the lock, and must not hide what went wrong.
                with suppress(OSError):
                    holder.unlink()
    except Timeout:
        raise StoreBusyError(
            f"{root} is being changed by {_describe(holder)}; wait for it, or end it, and run again"
            f"{if_dead}"
        ) from None


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_bytes())
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


_RUN_LOCK = "run-"


class BlockClaims:
    """Claims on blocks of one store, by lock files that the operating system frees, or by leases.

    Attributes:
        work: whether they keep anybody out. Where the file system has no locks, every block is
            free and every claim succeeds: then only those may be done that are one's own.
        pause_s: after which it is worth a look whether a block that was held is free.
    """

    def __init__(self, root: Place) -> None:
        self._folder = root / "claims"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.work = locks_work(root)
        self.pause_s = LEASE_S / 4 if isinstance(root, ObjectPath) else _PAUSE_S

    @contextmanager
    def claim(self, block: int) -> Iterator[bool]:
        """Hold a block for the length of the ``with``; yields False when another process has it."""
        if not self.work:
            yield True
            return
        with _held(self._folder / _name(block)) as ours:
            yield ours

    def free(self, blocks: Sequence[int]) -> list[int]:
        """Return those of some blocks that nobody holds just now."""
        if not self.work:
            return list(blocks)
        if isinstance(self._folder, ObjectPath):
            held = held_below(self._folder)
            return [block for block in blocks if _name(block) not in held]
        folder = self._folder
        return [block for block in blocks if not _is_held(folder / _name(block))]

    def any_held(self) -> bool:
        """Return whether anybody holds any block just now."""
        if not self.work:
            return False
        if isinstance(self._folder, ObjectPath):
            return any(not name.startswith(_RUN_LOCK) for name in held_below(self._folder))
        locks = self._folder.glob("*.lock")
        return any(_is_held(path) for path in locks if not path.name.startswith(_RUN_LOCK))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Say for the length of the ``with`` that blocks of the store are being worked on.

        Several processes may say so at once; :func:`require_idle` refuses as long as one does.
        """
        if not self.work:
            yield
            return
        path = self._folder / f"{_RUN_LOCK}{os.getpid()}-{secrets.token_hex(4)}.lock"
        try:
            with _held(path):
                yield
        finally:
            if isinstance(path, Path):
                with suppress(PermissionError):
                    path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete the lock files; for the holder of the whole store, once every block is done."""
        if isinstance(self._folder, ObjectPath):
            sweep_leases(self._folder)
            return
        for path in self._folder.glob("*.lock"):
            if path.name.startswith(_RUN_LOCK) and _is_held(path):
                continue
            # On Windows a file that is still held cannot be deleted, and need not be.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _name(block: int) -> str:
    return f"{block:08d}.lock"


def require_idle(root: Path) -> None:
    """Refuse to change a store that an extraction is at work on; hold :func:`store_lock`.

    Raises:
        StoreBusyError: when one is.
    """
    for path in (root / "claims").glob("*.lock"):
        if _is_held(path):
            raise StoreBusyError(
                f"an extraction is at work on {root} ({_holder_of(path)}); "
                "wait for it, or end it, and run again"
            )


def _holder_of(path: Path) -> str:
    if path.name.startswith(_RUN_LOCK):
        return f"process {path.stem.removeprefix(_RUN_LOCK).partition('-')[0]}"
    return f"block {path.stem}"


@contextmanager
def _held(path: Place) -> Iterator[bool]:
    """Hold a lock for the length of the ``with``; yields False when another process has it."""
    if isinstance(path, ObjectPath):
        with held_lease(path) as ours:
            yield ours
        return
    # Of all threads: a block is claimed by one, and let go by the one that has written it.
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False  # To lock it would make it.
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
