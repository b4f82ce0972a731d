"""Files that are either whole or absent: temporary name, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from sam3cache.runtime import replace_file

TEMPORARY_SUFFIX = ".partial"


def write_atomic(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` so that a crash leaves the old file or the new one, never a part.

    Args:
        path: where to write; its folder is made if it is missing.
        data: the whole content.

    Raises:
        OSError: as the operating system has it (disk full, read-only folder); no temporary stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename durable; POSIX only, as NTFS journals renames and opens no folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as JSON that is the same bytes everywhere: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of ``value`` as canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file's bytes.

    Raises:
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep_temporaries(root: Path) -> int:
    """Delete what killed writers left behind and return how many files that was."""
    strays = list(root.rglob(f".*{TEMPORARY_SUFFIX}"))
    for stray in strays:
        # On Windows another process's open file cannot be deleted, and need not be.
        with suppress(PermissionError):
            stray.unlink(missing_ok=True)
    return len(strays)
