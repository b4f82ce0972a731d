"""The local copy of a store that lies on an object store: read through, and kept for the next run.

A sealed store never changes, so its copy is named by its seal. Metadata and tables are fetched when
it is opened and compared with the hashes in the seal; a shard is fetched when something of it is
first asked for, compared with the checksum in its receipt, and renamed into place. Processes share
a copy: what one is fetching, others wait for.

    <cache>/stores/<seal, 16 digits>/<name>/…      the copy, a store as any other

where <cache> is ``SAM3CACHE_CACHE``, or the user's cache folder. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock

from sam3cache.errors import CorruptStoreError, NoSpaceError, StoreBusyError
from sam3cache.features.files import sha256_of_file
from sam3cache.features.objects import ObjectPath, request_pool
from sam3cache.features.receipts import SEAL_FILE, ShardRecord, hashes_in_seal, seal_at_end
from sam3cache.features.shards import crc32c
from sam3cache.runtime import existing_folder, write_atomic

CACHE_VARIABLE = "SAM3CACHE_CACHE"

_SEAL_DIGITS = 16
_TAIL_BYTES = 100
_NUM_LOCKS = 64


@dataclass(frozen=True, slots=True)
class Fetching:
    """How far the fetching of a store's shards is.

    Attributes:
        store: the URL of the store.
        folder: of its local copy.
        num_bytes: fetched so far.
        num_bytes_total: to be fetched.
        num_bytes_there: that are needed, too, and were there before.
    """

    store: str
    folder: Path
    num_bytes: int
    num_bytes_total: int
    num_bytes_there: int


_watcher: ContextVar[Callable[[Fetching], None]] = ContextVar(
    "watcher", default=lambda fetching: None
)


@contextmanager
def watch_fetching(watcher: Callable[[Fetching], None]) -> Iterator[None]:
    """Be told, for the length of the ``with``, of what this thread has fetched in one go."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def cache_folder() -> Path:
    """Return the folder of all local copies."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData/Local") / "sam3cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sam3cache"


class Mirror:
    """The local copy of one sealed store.

    Args:
        origin: the store.
        folder: of the copy.

    Attributes:
        folder: of the copy, with the metadata and tables of the store in it.
    """

    def __init__(self, origin: ObjectPath, folder: Path) -> None:
        self._origin, self.folder = origin, folder

    @classmethod
    def of(cls, origin: ObjectPath) -> Mirror | None:
        """Return the copy of a store, with all but its shards; None for one that is not sealed.

        Raises:
            CorruptStoreError: when the store is not as it was sealed.
            StoreError: when the object store refuses us or does not answer.
            OSError: when the cache cannot be written.
        """
        try:
            tail = (origin / SEAL_FILE).read_range(-_TAIL_BYTES, _TAIL_BYTES)
        except FileNotFoundError:
            return None
        seal = seal_at_end(tail)
        if seal is None:
            raise CorruptStoreError(
                f"{origin / SEAL_FILE} does not end as a seal does; see `sam3cache store verify "
                f"{origin}`"
            )
        folder = cache_folder() / "stores" / seal[:_SEAL_DIGITS] / origin.name
        mirror = cls(origin, folder)
        with mirror._lock(SEAL_FILE):
            mirror._fetch_description(seal)
        return mirror

    def _fetch_description(self, seal: str) -> None:
        """Fetch the seal, and what it fixes, as far as the copy lacks it or has it damaged."""
        path = self.folder / SEAL_FILE
        try:
            hashes = hashes_in_seal(path)
        except CorruptStoreError:
            data = (self._origin / SEAL_FILE).read_bytes()
            if seal_at_end(data[-_TAIL_BYTES:]) != seal:
                raise StoreBusyError(
                    f"{self._origin} is being written; wait for it to be sealed, and run again"
                ) from None
            write_atomic(path, data)
            hashes = hashes_in_seal(path)
        for name, expected in hashes.items():
            path = self._local(name)
            if path.exists() and sha256_of_file(path) == expected:
                continue
            data = (self._origin / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != expected:
                raise CorruptStoreError(
                    f"{self._origin / name} is not what the store was sealed with; see "
                    f"`sam3cache store verify {self._origin}`"
                )
            write_atomic(path, data)

    def _local(self, name: str) -> Path:
        """Return where a file of the store lies in the copy.

        Raises:
            CorruptStoreError: when its name, which whoever wrote the store has chosen, leads out of
                the copy on any system.
        """
        is_below = not PureWindowsPath(name).anchor and ".." not in PurePosixPath(name).parts
        if not name or not is_below or "\\" in name:
            raise CorruptStoreError(
                f"{self._origin} names a file {name!r}, which is not one of a store; do not use it"
            )
        return self.folder / name

    def fetch(self, record: ShardRecord) -> Path:
        """Return where a shard lies, fetching it if it is not there.

        Raises:
            CorruptStoreError: when the object is not what its receipt states.
            StoreError: when the object store refuses us or does not answer.
            OSError: when the cache cannot be written.
        """
        path = self._local(record.key)
        if self._has(record):
            return path
        with self._lock(record.key):
            if not self._has(record):
                write_atomic(path, self._checked(record))
        return path

    def fetch_all(self, records: Sequence[ShardRecord]) -> None:
        """Fetch those of some shards that are not there, several at a time.

        Raises:
            NoSpaceError: when there is no room for them; nothing has been fetched then.
            CorruptStoreError: when an object is not what its receipt states.
            StoreError: when the object store refuses us or does not answer.
            OSError: when the cache cannot be written.
        """
        missing = [record for record in records if not self._has(record)]
        if not missing:
            return
        total = sum(record.size_bytes for record in missing)
        there = sum(record.size_bytes for record in records) - total
        self._require_space(total)
        watcher, num_bytes = _watcher.get(), 0
        watcher(Fetching(str(self._origin), self.folder, 0, total, there))
        with request_pool("sam3cache-fetching") as pool:
            futures = {pool.submit(self.fetch, record): record for record in missing}
            for future in as_completed(futures):
                future.result()
                num_bytes += futures[future].size_bytes
                watcher(Fetching(str(self._origin), self.folder, num_bytes, total, there))

    def forget(self, record: ShardRecord) -> None:
        """Delete a shard's copy, which has turned out to be damaged."""
        (self.folder / record.key).unlink(missing_ok=True)

    def _has(self, record: ShardRecord) -> bool:
        try:
            return (self.folder / record.key).stat().st_size == record.size_bytes
        except FileNotFoundError:
            return False

    def _checked(self, record: ShardRecord) -> bytes:
        place = self._origin / record.key
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            raise CorruptStoreError(
                f"{place} is missing, though its receipt says it was written; see `sam3cache store "
                f"verify {self._origin}`"
            ) from None
        if len(data) != record.size_bytes or crc32c(data) != record.crc32c:
            raise CorruptStoreError(
                f"{place} is not what its receipt states ({len(data)} bytes, expected "
                f"{record.size_bytes}, or another checksum); see `sam3cache store verify "
                f"{self._origin}`"
            )
        return data

    def _require_space(self, num_bytes: int) -> None:
        free_bytes = shutil.disk_usage(existing_folder(self.folder)).free
        if num_bytes > free_bytes:
            raise NoSpaceError(
                f"{self._origin}: {num_bytes / 1e9:.2g} GB of it are to be fetched, and "
                f"{self.folder} has {free_bytes / 1e9:.2g} GB free; make room, or set "
                f"{CACHE_VARIABLE} to a folder on another disk"
            )

    def _lock(self, name: str) -> FileLock:
        """Return the lock of a file that is being fetched; some files share one."""
        folder = self.folder.parent / "fetching"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{zlib.crc32(name.encode()) % _NUM_LOCKS:02}.lock")
