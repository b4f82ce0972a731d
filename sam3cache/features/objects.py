"""A folder of an object store, with those of pathlib's methods that a feature store needs.

What is asked of S3 is little: whole objects written in one conditional put, read whole or by range,
listed and deleted. :mod:`sam3cache.features.s3` makes the requests, again and again while a
server is down; nothing that is missing or refused ever reads as something.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from sam3cache.errors import ConfigError, StoreBusyError

if TYPE_CHECKING:
    from sam3cache.features.s3 import Connection

SCHEME = "s3://"
FIRST_PATIENCE_S = 20.0
"""How long a command waits for its first answer: a mistyped address is told soon."""

NUM_REQUESTS = 16
"""Requests at a time, where there are many to be made."""


_MAX_PUTS = 10

_of_thread = threading.local()


@contextmanager
def request_pool(name: str) -> Iterator[ThreadPoolExecutor]:
    """Give threads for many requests; what ends the ``with`` early waits for no server.

    Args:
        name: of the threads.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_REQUESTS, name, _give_up_on, (stop,)) as pool:
        try:
            yield pool
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _give_up_on(stop: threading.Event) -> None:
    """Let requests that this thread makes be tried again only until an event is set."""
    _of_thread.stop = stop


def has_given_up(pause_s: float) -> bool:
    """Wait before a request is tried again; return whether it shall not be."""
    stop: threading.Event | None = getattr(_of_thread, "stop", None)
    if stop is None:
        time.sleep(pause_s)
        return False
    return stop.wait(pause_s)


class ConditionFailedError(Exception):
    """A conditional request came too late: somebody else has written the object."""


class BeyondEndError(Exception):
    """A range was asked for that begins behind the end of the object."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What is known of an object without reading it.

    Attributes:
        st_size: in bytes.
        st_mtime_ns: when it was written, to the second, by the server's clock.
        etag: changes with its content.
        age_s: time since it was written, by the server's clock; None where it does not say.
    """

    st_size: int
    st_mtime_ns: int
    etag: str
    age_s: float | None = None


class ObjectPath:
    """An object, or all below it as if it were a folder, by its URL.

    Args:
        url: as ``s3://bucket/features/angio.zarr``.

    Raises:
        ConfigError: when the URL names no bucket, or nothing in it.
    """

    __slots__ = ("bucket", "key")

    def __init__(self, url: str) -> None:
        bucket, _, key = url.removeprefix(SCHEME).partition("/")
        key = "/".join(part for part in key.split("/") if part)
        if not (url.startswith(SCHEME) and bucket and key):
            raise ConfigError(f"{url}: expected a bucket and a name, as s3://bucket/angio.zarr")
        if ".." in key.split("/"):
            raise ConfigError(f"{url}: an object's name has no .. in it; write the name in full")
        self.bucket, self.key = bucket, key

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def as_posix(self) -> str:
        """Return the URL."""
        return str(self)

    def resolve(self) -> ObjectPath:
        """Return the path itself: there are no links."""
        return self

    def absolute(self) -> ObjectPath:
        """Return the path itself: it begins nowhere else."""
        return self

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        """The last part's suffix."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        """The path without its last part."""
        return ObjectPath(f"{SCHEME}{self.bucket}/{PurePosixPath(self.key).parent}")

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        """Return what comes behind another path."""
        return PurePosixPath(self.key).relative_to(other.key)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: there are no folders."""

    def exists(self) -> bool:
        """Return whether there is such an object, or any below it."""
        first = self._first_below("")
        # What sorts between the two is another's.
        return first == self.key or (bool(first) and self.is_dir())

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        return self._first_below("") == self.key

    def is_dir(self) -> bool:
        """Return whether there are objects below it."""
        return bool(self._first_below("/"))

    def _first_below(self, separator: str) -> str:
        """Return the first key that begins like this one; empty when there is none.

        One request, whereas looking up an object that is not there takes a second one to see that
        its bucket is.
        """
        answer = self._ask("list_objects_v2", Prefix=f"{self.key}{separator}", MaxKeys=1)
        return next((str(entry["Key"]) for entry in answer.get("Contents", ())), "")

    def stat(self) -> ObjectStat:
        """Look an object up.

        Raises:
            FileNotFoundError: when there is none.
        """
        answer = self._ask("head_object", Key=self.key)
        return _stat(answer["ContentLength"], answer["LastModified"], answer["ETag"], answer)

    def read_bytes(self) -> bytes:
        """Read an object.

        Raises:
            FileNotFoundError: when there is none.
        """
        data: bytes = self._ask("get_object", Key=self.key)["Body"]
        return data

    def read_text(self, *, encoding: str) -> str:
        """Read an object as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, begin: int, num_bytes: int) -> bytes:
        """Read a part of an object: less than asked for where it ends before.

        Args:
            begin: where the part begins; below 0, that many bytes before the end.
            num_bytes: of the part.

        Raises:
            FileNotFoundError: when there is no such object.
        """
        if not num_bytes:
            return b""
        last = f"{begin + num_bytes - 1}" if begin >= 0 else ""
        span = f"{begin}-{last}" if begin >= 0 else f"{begin}"
        try:
            data: bytes = self._ask("get_object", Key=self.key, Range=f"bytes={span}")["Body"]
        except BeyondEndError:
            return b""
        return data[:num_bytes]

    def open(self, mode: str = "rb", buffering: int = 0) -> io.RawIOBase:
        """Open an object for reading by position; each read is a request."""
        assert mode == "rb", mode
        return _ObjectFile(self)

    def write_bytes(self, data: bytes | bytearray | memoryview) -> None:
        """Write an object in one put, which leaves the old one or the new one, never a part.

        It is made on condition that the object is still as it was found, and only while every
        lease that this process holds in the bucket is sure to be its own: whoever was held up so
        long that another has taken over cannot write any more.

        Raises:
            StoreBusyError: when another process has taken over, or writes it at the same time.
        """
        body = bytes(data)
        # Most objects are new.
        condition = {"IfNoneMatch": "*"}
        for _ in range(_MAX_PUTS):
            try:
                self._ask("put_object", Key=self.key, Body=body, **condition)
            except ConditionFailedError:
                # An older one is there; or one of another process, which has our lease then; or
                # our own, and the answer got lost on the way.
                _connection(self.bucket).require_leases(anew=True)
                condition = self._as_found()
            else:
                return
        raise StoreBusyError(
            f"{self} is being written by another process; wait for it, or end it, and run again"
        )

    def _as_found(self) -> dict[str, str]:
        try:
            return {"IfMatch": self.stat().etag}
        except FileNotFoundError:
            return {"IfNoneMatch": "*"}

    def put_if(self, data: bytes, etag: str | None) -> str:
        """Write an object if it is still what it was, whatever leases are held.

        Args:
            data: its content.
            etag: of what is there; None for nothing.

        Returns:
            The new etag.

        Raises:
            ConditionFailedError: when it is not.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        answer = self._ask("put_object", guarded=False, Key=self.key, Body=data, **condition)
        return str(answer["ETag"])

    def copy_to(self, target: ObjectPath) -> None:
        """Copy an object within its bucket, in one step.

        Raises:
            FileNotFoundError: when there is none.
        """
        source = {"Bucket": self.bucket, "Key": self.key}
        target._ask("copy_object", Key=target.key, CopySource=source)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object; one that is not there is no error."""
        self._ask("delete_object", Key=self.key)

    def unlink_soon(self, patience_s: float) -> None:
        """Delete an object, whatever leases are held, or give up after some time."""
        self._ask("delete_object", guarded=False, patience_s=patience_s, Key=self.key)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Return the objects below whose names match part by part, as ``*/*.json``."""
        return (path for path, _ in self.glob_stat(pattern))

    def glob_stat(self, pattern: str) -> Iterator[tuple[ObjectPath, ObjectStat]]:
        """Return such objects with what the listing says of them."""
        wanted = pattern.split("/")
        for name, stat in self.listing().items():
            parts = name.split("/")
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield self / name, stat

    def iterdir(self) -> Iterator[ObjectPath]:
        """Return what is directly below."""
        names = dict.fromkeys(name.partition("/")[0] for name in self.listing())
        return (self / name for name in names)

    def listing(self) -> dict[str, ObjectStat]:
        """Return every object below, by the rest of its name, in its order."""
        found: dict[str, ObjectStat] = {}
        prefix = f"{self.key}/"
        position: dict[str, str] = {}
        while True:
            answer = self._ask("list_objects_v2", Prefix=prefix, **position)
            for entry in answer.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                # Some programs mark what they show as a folder by an empty object.
                if name and not name.endswith("/"):
                    found[name] = _stat(entry["Size"], entry["LastModified"], entry["ETag"], answer)
            if not answer.get("IsTruncated"):
                return found
            position = {"ContinuationToken": answer["NextContinuationToken"]}

    def require_reachable(self) -> None:
        """Ask the bucket for something, to learn soon what stands against it.

        Once this process has had an answer from it, nothing is asked.

        Raises:
            StoreError: when there is no such bucket, it refuses us, or nothing answers.
        """
        if _connection(self.bucket).has_answered:
            return
        self._ask("list_objects_v2", Prefix=f"{self.key}/", MaxKeys=1, patience_s=FIRST_PATIENCE_S)

    def hold(self, lease: object, require: Callable[[bool], None]) -> None:
        """Make every put in this bucket depend on a lease, until :meth:`let_go`.

        Args:
            lease: by which it is let go.
            require: raises where the lease is not ours any more; takes whether to ask anew.
        """
        _connection(self.bucket).leases[lease] = require

    def let_go(self, lease: object) -> None:
        """Undo :meth:`hold`."""
        _connection(self.bucket).leases.pop(lease, None)

    def _ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return _connection(self.bucket).ask(operation, self, **arguments)


class _ObjectFile(io.RawIOBase):
    """An object that is read by position."""

    def __init__(self, path: ObjectPath) -> None:
        self._path, self._position = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, whence
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._path.read_range(self._position, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


_connections: dict[tuple[object, ...], Connection] = {}
_connections_lock = threading.Lock()


def _connection(bucket: str) -> Connection:
    """Return this process's connection: what a fork has copied would share its sockets."""
    settings = (item for item in os.environ.items() if item[0].startswith("AWS_"))
    key = (os.getpid(), bucket, *sorted(settings))
    with _connections_lock:
        if key not in _connections:
            try:
                from sam3cache.features.s3 import Connection
            except ImportError:
                raise ConfigError(
                    f"{SCHEME}{bucket} needs the package boto3: pip install 'sam3cache[s3]'"
                ) from None
            _connections[key] = Connection(bucket)
        return _connections[key]


def _stat(size_bytes: int, written: datetime, etag: str, answer: dict[str, Any]) -> ObjectStat:
    now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    age_s = None if now is None else (parsedate_to_datetime(now) - written).total_seconds()
    return ObjectStat(size_bytes, int(written.timestamp()) * 10**9, etag, age_s)
