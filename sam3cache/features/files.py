"""Hashes of JSON and of files, and the sweeping up of what killed writers left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sam3cache.features.places import Place
from sam3cache.runtime import TEMPORARY_SUFFIX


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as JSON that is the same bytes everywhere: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of ``value`` as canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_of_list(values: Iterable[Any]) -> str:
    """Return what :func:`sha256_of_json` does of a list, of which one value is held at a time."""
    hasher = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        hasher.update((b"," if number else b"") + canonical_json(value))
    hasher.update(b"]")
    return hasher.hexdigest()


def sha256_of_file(path: Place) -> str:
    """Return the SHA-256, in hexadecimal, of a file's bytes.

    Raises:
        OSError: when the file cannot be read.
    """
    if not isinstance(path, Path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep_temporaries(root: Place) -> int:
    """Delete what killed writers left behind and return how many files that was.

    What lies below claims/ may be of a writer at work. Objects have no temporaries.
    """
    if not isinstance(root, Path):
        return 0
    strays = [
        path
        for path in root.rglob(f".*{TEMPORARY_SUFFIX}")
        if path.relative_to(root).parts[0] != "claims"
    ]
    for stray in strays:
        # On Windows another process's open file cannot be deleted, and need not be.
        with suppress(PermissionError):
            stray.unlink(missing_ok=True)
    return len(strays)
