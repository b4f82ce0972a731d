"""Where a store lies: in a folder, or below a URL of an object store.

Both are asked by pathlib's own names (``/``, ``read_bytes``, ``stat``, ``glob``); what differs
beyond these is here. A folder's files are written to a temporary name and renamed, objects are put
in one request (:mod:`sam3cache.features.objects`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sam3cache import runtime
from sam3cache.errors import StoreError
from sam3cache.features.objects import SCHEME, ObjectPath, request_pool

Place = Path | ObjectPath

T = TypeVar("T")


def place_of(path: str | Place) -> Place:
    """Return what a user's path names.

    Args:
        path: a folder, or an URL as ``s3://bucket/angio.zarr``. A URL that was made a ``Path``
            was given to something that works on folders alone.

    Raises:
        ConfigError: when a URL names no object.
        StoreError: when it is meant for folders alone.
    """
    if isinstance(path, ObjectPath):
        return path
    if isinstance(path, str) and path.startswith(SCHEME):
        return ObjectPath(path)
    path = Path(path)
    if path.parts[:1] == (SCHEME.rstrip("/"),):
        url = f"{SCHEME}{'/'.join(path.parts[1:])}"
        raise StoreError(
            f"{url}: this works on a store in a folder alone; copy it first (aws s3 sync {url} "
            f"{path.name}), then give the copy"
        )
    return path


def write_atomic(place: Place, data: bytes | bytearray | memoryview) -> None:
    """Write a file or an object so that a crash leaves the old one or the new one, never a part.

    Raises:
        OSError: as the operating system has it.
        StoreError: as the object store has it.
    """
    if isinstance(place, ObjectPath):
        place.write_bytes(data)
    else:
        runtime.write_atomic(place, data)


def replace_file(source: Place, target: Place) -> None:
    """Rename a file over another; an object is copied first, so that for a moment both are there.

    Raises:
        OSError: as the operating system has it.
        StoreError: as the object store has it.
    """
    if isinstance(source, ObjectPath):
        assert isinstance(target, ObjectPath), target
        source.copy_to(target)
        source.unlink()
    else:
        assert isinstance(target, Path), target
        runtime.replace_file(source, target)


def for_places(call: Callable[[Place], T], places: Sequence[Place]) -> Iterator[T]:
    """Call something for many files, objects several at a time; results come in their order."""
    if any(isinstance(place, ObjectPath) for place in places):
        with request_pool("sam3cache-objects") as pool:
            yield from pool.map(call, places)
    else:
        yield from map(call, places)


def file_sizes(root: Place) -> dict[str, int] | None:
    """Return the sizes of all objects of a store, by path: a request a thousand instead of each.

    Returns:
        None for a store in a folder, where looking a file up costs nothing.
    """
    if isinstance(root, Path):
        return None
    return {name: stat.st_size for name, stat in root.listing().items()}


def stamp(root: Place, names: Iterable[str], pattern: str = "") -> frozenset[tuple[object, ...]]:
    """Return what changes whenever one of some files of a store is written.

    Args:
        root: the store.
        names: of files below it.
        pattern: of more of them.
    """
    found: set[tuple[object, ...]] = set()
    for name in names:
        with suppress(FileNotFoundError, NotADirectoryError):
            found.add((name, *_version(root / name)))
    if not pattern:
        return frozenset(found)
    if isinstance(root, ObjectPath):
        folder, _, below = pattern.partition("/")
        listed = (root / folder).glob_stat(below)
        return frozenset(found | {(str(p), s.etag, s.st_size, s.st_mtime_ns) for p, s in listed})
    for path in root.glob(pattern):
        with suppress(FileNotFoundError):
            found.add((path.relative_to(root).as_posix(), *_version(path)))
    return frozenset(found)


def _version(place: Place) -> tuple[object, ...]:
    if isinstance(place, ObjectPath):
        found = place.stat()
        return found.etag, found.st_size, found.st_mtime_ns
    stat = place.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def files_below(root: Place, leave_out: str) -> Iterator[str]:
    """Go through the paths of all files of a store.

    Args:
        root: the store.
        leave_out: folder of it to be left out.
    """
    if isinstance(root, ObjectPath):
        yield from (name for name in root.listing() if not name.startswith(f"{leave_out}/"))
        return
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root).as_posix()
        if here == ".":
            folders[:] = [name for name in folders if name != leave_out]
        for name in names:
            yield name if here == "." else f"{here}/{name}"


@contextmanager
def close_by(root: Place, name: str) -> Iterator[Path]:
    """Give a folder in which one file of a store lies, to be read over and over.

    Yields:
        The store's own folder; of an object store, one for the length of the ``with``, which
        stays empty when there is no such object.
    """
    if isinstance(root, Path):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="sam3cache-") as folder:
        copy = Path(folder) / name
        copy.parent.mkdir(parents=True)
        with suppress(FileNotFoundError):
            copy.write_bytes((root / name).read_bytes())
        yield Path(folder)
