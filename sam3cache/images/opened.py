"""Files with many samples, kept open from one sample to the next.

Opening one may cost more than a frame does. Every thread keeps a few of its own, as neither zip
archives nor file positions can be shared; one that has changed on disk is opened anew, and one that
takes much memory is given back when nobody uses it any more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar, cast
from weakref import WeakValueDictionary

MAX_OPEN = 4
"""Files that a thread keeps open."""


class Closable(Protocol):
    """What can be closed; it does so by itself when nothing refers to it any more."""

    def close(self) -> None:
        """Close the file."""


T = TypeVar("T", bound=Closable)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.files: OrderedDict[tuple[object, ...], Closable] = OrderedDict()
        self.in_use: WeakValueDictionary[tuple[object, ...], Closable] = WeakValueDictionary()


_kept = _Kept()


def kept_open(
    path: Path, open_file: Callable[[Path], T], may_keep: Callable[[T], bool] = lambda file: True
) -> T:
    """Return a file as ``open_file`` opens it; the one of before while the file is the same.

    Args:
        path: which file.
        open_file: opens it.
        may_keep: whether a file may stay open when nobody uses it any more; one that takes much
            memory should not.

    Raises:
        OSError: when it is not there.
    """
    stat = path.stat()
    key = (open_file, path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    files, in_use = _kept.files, _kept.in_use
    if key in files:
        files.move_to_end(key)
        return cast("T", files[key])
    if (used := in_use.get(key)) is not None:
        return cast("T", used)
    for old in [old for old in files if old[1] == path]:
        files.pop(old).close()
    opened = open_file(path)
    if not may_keep(opened):
        in_use[key] = opened
        return opened
    while len(files) >= MAX_OPEN:
        files.popitem(last=False)[1].close()
    files[key] = opened
    return opened


def close_kept_files() -> None:
    """Close what this thread keeps open, as before replacing a file under Windows."""
    while _kept.files:
        _kept.files.popitem()[1].close()
