"""Locks that die with their holder, so that a killed process leaves no claim."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sam3cache.errors import StoreBusyError
from sam3cache.features.files import canonical_json


@contextmanager
def store_lock(root: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the whole store for a change of its tables, metadata or seal.

    Args:
        root: the store; made if it is missing.
        timeout_s: how long to wait for another holder.

    Raises:
        StoreBusyError: naming the holder, when it does not let go in time.
    """
    root.mkdir(parents=True, exist_ok=True)
    holder = root / ".holder.json"
    try:
        with FileLock(root / ".lock", timeout=timeout_s):
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
        ) from None


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_bytes())
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


_RUN_LOCK = "run-"


class BlockClaims:
    """Claims on blocks of one store, by lock files that the operating system frees."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "claims"
        self._folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, block: int) -> Iterator[bool]:
        """Hold a block for the length of the ``with``; yields False when another process has it."""
        lock = FileLock(self._path(block), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_free(self, block: int) -> bool:
        """Return whether nobody holds a block just now."""
        return not _is_held(self._path(block))

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:08d}.lock"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Say for the length of the ``with`` that blocks of the store are being worked on.

        Several processes may say so at once; :func:`require_idle` refuses as long as one does.
        """
        path = self._folder / f"{_RUN_LOCK}{os.getpid()}-{secrets.token_hex(4)}.lock"
        try:
            with FileLock(path, timeout=0):
                yield
        finally:
            with suppress(PermissionError):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete the lock files; for the holder of the whole store, once every block is done."""
        for path in self._folder.glob("*.lock"):
            if path.name.startswith(_RUN_LOCK) and _is_held(path):
                continue
            # On Windows a file that is still held cannot be deleted, and need not be.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


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


def _is_held(path: Path) -> bool:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
