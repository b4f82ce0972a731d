"""Leases: locks on an object store, where nobody notices that a holder has died.

A lease is an object that a conditional put creates, and that its holder writes anew as long as it
lives; one that has not been written for :data:`LEASE_S`, by the server's own clock, is anybody's
to take over, by a put on condition that it is still the same.

Two things keep a holder that was held up, and has lost its lease without knowing it, from writing.
Before every attempt to write, a lease that was last written :data:`SURE_S` ago is written again,
which fails if it is another's: an attempt ends before the lease does. And what is written is put on
condition that nobody else has written it (:meth:`ObjectPath.write_bytes`).
"""

from __future__ import annotations

import json
import os
import platform
import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sam3cache.errors import StoreBusyError, StoreError
from sam3cache.features.files import canonical_json
from sam3cache.features.objects import ConditionFailedError, ObjectPath

LEASE_S = 60.0
"""From its last renewal on, how long a lease is its holder's."""

SURE_S = 30.0
"""From the same moment on, how long a holder writes without asking anew."""

_RENEW_S = 15.0
_RELEASE_S = 5.0
_MAX_RENEWALS = 3
_POLL_S = 0.5
# Servers tell their clock in whole seconds.
_CLOCK_S = 1.0


class Lease:
    """A lease that this process holds; :func:`held_lease` makes one.

    Args:
        path: of the object.
        token: that tells it from the leases of others.
        etag: of the object.
        asked_s: when it was asked for, by this process's clock.
    """

    def __init__(self, path: ObjectPath, token: str, etag: str, asked_s: float) -> None:
        self._path, self._token, self._etag, self._asked_s = path, token, etag, asked_s
        self._is_lost = False
        self._lock = threading.RLock()
        self._ended = threading.Event()
        path.hold(self, self.require)
        threading.Thread(target=self._keep, name="sam3cache-lease", daemon=True).start()

    def require(self, anew: bool = False) -> None:
        """See that the lease is still ours, and will be for the length of an attempt to write.

        Args:
            anew: ask the server however short ago it was asked.

        Raises:
            StoreBusyError: when it is not.
            StoreError: when the server does not answer.
        """
        with self._lock:
            if anew or time.monotonic() - self._asked_s > SURE_S:
                self._renew()
            if self._is_lost:
                raise StoreBusyError(
                    f"{self._path} is another process's now: this one was held up for more than "
                    f"{LEASE_S:.0f} s; what is finished is kept: run the same command again"
                )

    def release(self) -> None:
        """Give it up, for others to have at once."""
        self._ended.set()
        self._path.let_go(self)
        # Only as long as it is sure to be ours. Where the server is down, it ends by itself.
        if not self._lock.acquire(timeout=_RELEASE_S):
            return
        try:
            if not self._is_lost and time.monotonic() - self._asked_s < SURE_S:
                with suppress(StoreError):
                    self._path.unlink_soon(_RELEASE_S)
        finally:
            self._lock.release()

    def _keep(self) -> None:
        while not self._ended.wait(_RENEW_S * random.uniform(0.8, 1.0)):
            # A server that is down is asked again: as long, nobody else gets the lease either.
            with self._lock, suppress(StoreError):
                if not self._ended.is_set():
                    self._renew()

    def _renew(self) -> None:
        for _ in range(_MAX_RENEWALS if not self._is_lost else 0):
            asked_s = time.monotonic()
            try:
                self._etag = self._path.put_if(_content(self._token), self._etag)
            except (ConditionFailedError, FileNotFoundError):
                # Another's; or ours, and the answer to an earlier attempt got lost on the way. That
                # may have been long ago: it counts only once it is written anew.
                etag = _etag_of(self._path, self._token)
                if etag is None:
                    self._is_lost = True
                    return
                self._etag = etag
            else:
                self._asked_s = asked_s
                return


@contextmanager
def held_lease(path: ObjectPath) -> Iterator[bool]:
    """Hold a lease for the length of the ``with``; yields False when another process has it.

    Raises:
        StoreError: when the server does not know conditional puts, or does not answer.
    """
    lease = _acquire(path)
    try:
        yield lease is not None
    finally:
        if lease is not None:
            lease.release()


def _acquire(path: ObjectPath) -> Lease | None:
    token, asked_s = secrets.token_hex(8), time.monotonic()
    etag: str | None = None
    try:
        etag = path.put_if(_content(token), None)
        _require_conditions(path)
    except ConditionFailedError:
        try:
            found = path.stat()
            etag = _etag_of(path, token)
            if etag is None and found.age_s is not None and found.age_s > LEASE_S + _CLOCK_S:
                asked_s = time.monotonic()
                etag = path.put_if(_content(token), found.etag)
        except (ConditionFailedError, FileNotFoundError):
            return None  # Somebody was quicker, or has just let go.
    return None if etag is None else Lease(path, token, etag, asked_s)


def held_below(folder: ObjectPath) -> set[str]:
    """Return the names of the leases in a folder that are held just now."""
    return {name for name, stat in folder.listing().items() if not _is_over(stat.age_s)}


def sweep_leases(folder: ObjectPath) -> None:
    """Delete the leases in a folder that nobody holds."""
    for name, stat in folder.listing().items():
        if _is_over(stat.age_s):
            (folder / name).unlink()


def _is_over(age_s: float | None) -> bool:
    return age_s is not None and age_s > LEASE_S + _CLOCK_S


@contextmanager
def store_lease(root: ObjectPath, *, timeout_s: float) -> Iterator[None]:
    """Hold a whole store for a change of its tables, metadata or seal.

    Args:
        root: the store.
        timeout_s: how long to wait for another holder; long enough at least for a dead one's lease
            to end.

    Raises:
        StoreBusyError: naming the holder, when it does not let go in time.
        StoreError: as of :func:`held_lease`.
    """
    path = root / ".lock"
    deadline_s = time.monotonic() + max(timeout_s, LEASE_S + _RENEW_S)
    while True:
        with held_lease(path) as ours:
            if ours:
                yield
                return
        if time.monotonic() > deadline_s:
            raise StoreBusyError(
                f"{root} is being changed by {holder_of(path)}; wait for it, or end it, and run "
                "again"
            )
        time.sleep(_POLL_S * random.uniform(0.5, 1.0))


def holder_of(path: ObjectPath) -> str:
    """Name the process that has a lease."""
    try:
        who = json.loads(path.read_bytes())
        return f"process {who['pid']} on {who['host']}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "another process"


def _content(token: str) -> bytes:
    """Say whose a lease is; never twice the same, for the sake of its etag."""
    return canonical_json(
        {
            "token": token,
            "pid": os.getpid(),
            "host": platform.node(),
            "renewal": secrets.token_hex(4),
        }
    )


def _etag_of(path: ObjectPath, token: str) -> str | None:
    """Return the etag of a lease that has our token, None when another process has it."""
    try:
        etag = path.stat().etag
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    is_ours = isinstance(content, dict) and content.get("token") == token
    return etag if is_ours else None


_conditional_buckets: set[tuple[int, str]] = set()


def _require_conditions(path: ObjectPath) -> None:
    """Refuse a server that answers conditional puts, and does not mind the condition."""
    key = (os.getpid(), path.bucket)
    if key in _conditional_buckets:
        return
    for condition, etag in (("If-None-Match", None), ("If-Match", '"0"')):
        try:
            path.put_if(b"", etag)
        except ConditionFailedError:
            continue
        path.unlink()
        raise StoreError(
            f"{path}: the server does not mind the condition of a put ({condition}), without "
            "which processes cannot share a store; write to a folder and copy it: aws s3 sync"
        )
    _conditional_buckets.add(key)
