"""Paths as manifests write them, and what of them may be kept."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from sam3cache.images.pseudonyms import pseudonym
from sam3cache.records import MEMBER_MARK, split_member


class ResolvedPath(NamedTuple):
    """A path of a manifest, the same however it is spelt.

    Attributes:
        name: what may be kept of it: the path below the manifest's folder, or of one that leads
            elsewhere the file's name and a hash.
        location: where it is when that does not say it.
        whole: all of it, which is to be hashed where no path may be kept.
    """

    name: str
    location: Path | None
    whole: str


def resolve_path(text: str, root: Path) -> ResolvedPath:
    """Resolve a path of a manifest.

    Relative paths are relative to the manifest; backslashes are folder separators on every system.
    Of paths that lead out of the manifest's folder only the file's name and a hash of the whole are
    kept, because the name goes into the store and the path must not.
    """
    if not is_absolute(text):
        name = text.replace("\\", "/")
        # Nearly all paths show here that they have no other spelling, and there may be many.
        if "./" not in name and "//" not in name and not name.endswith(("/", ".")):
            return ResolvedPath(name, None, name)
        return _resolve_relative(name, root)
    location = Path(text)
    for base in (root, root.resolve()):
        if location != base and location.is_relative_to(base):
            return _resolve_relative(location.relative_to(base).as_posix(), root)
    file, member = _parts(PureWindowsPath(text).as_posix())
    whole = posixpath.normpath(file) + member
    return ResolvedPath(_outer_name(whole), location, whole)


def _resolve_relative(name: str, root: Path) -> ResolvedPath:
    """Resolve a relative path by its shortest spelling."""
    if "://" in name:
        return ResolvedPath(name, None, name)  # No path, and to be told as it is.
    file, member = _parts(name)
    short = posixpath.normpath(file)
    # Behind a link, two steps down and up again lead elsewhere: it is opened as it is written.
    location = root / name if ".." in file.split("/") else None
    if short == ".." or short.startswith("../"):
        outer, base = (Path(os.path.normpath(path)) for path in (root / short, root))
        if outer == base or not outer.is_relative_to(base):
            # From the manifest's folder on, so that both may be moved together.
            whole = short + member
            return ResolvedPath(_outer_name(whole), location, whole)
        short = outer.relative_to(base).as_posix()
    return ResolvedPath(short + member, location, short + member)


def _parts(name: str) -> tuple[str, str]:
    """Split a name before the mark of what is meant inside its file."""
    file = split_member(name)[0]
    return file, name[len(file) :]


def _outer_name(whole: str) -> str:
    """Return what may be kept of a path that leads elsewhere."""
    path = PureWindowsPath(whole)
    # What is meant inside the file counts, but is no suffix.
    suffix = path.suffix.partition(MEMBER_MARK)[0]
    return f"{path.stem}-{pseudonym(path.as_posix(), 8)}{suffix}"


def is_absolute(text: str) -> bool:
    r"""Tell whether a path starts at a root of any system: /a, C:\\a, C:a or \\\\server\\a."""
    # Nearly all paths show at their first two characters that they are not; a path object is slow.
    if text[:1] not in ("/", "\\") and text[1:2] != ":":
        return False
    return PureWindowsPath(text).anchor != ""
