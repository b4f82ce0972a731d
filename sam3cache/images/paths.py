"""Paths as manifests write them, and what of them may be kept."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from sam3cache.images.pseudonyms import pseudonym
from sam3cache.records import MEMBER_MARK


def resolve_path(text: str, root: Path) -> tuple[str, Path | None]:
    """Return a portable name for a path of a manifest, and where it is when outside its folder.

    Relative paths are relative to the manifest; backslashes are folder separators on every system.
    An absolute path inside the manifest's folder becomes relative. Any other keeps only its file's
    name and a hash of the whole, because the name goes into the store and the path must not.
    """
    if not is_absolute(text):
        return text.replace("\\", "/"), None
    location = Path(text)
    for base in (root, root.resolve()):
        if location.is_relative_to(base):
            return location.relative_to(base).as_posix(), None
    path = PureWindowsPath(text)
    # What is meant inside the file counts, but is no suffix.
    suffix = path.suffix.partition(MEMBER_MARK)[0]
    return f"{path.stem}-{pseudonym(path.as_posix(), 8)}{suffix}", location


def is_absolute(text: str) -> bool:
    r"""Tell whether a path starts at a root of any system: /a, C:\\a, C:a or \\\\server\\a."""
    # Nearly all paths show at their first two characters that they are not; a path object is slow.
    if text[:1] not in ("/", "\\") and text[1:2] != ":":
        return False
    return PureWindowsPath(text).anchor != ""
