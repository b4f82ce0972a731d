"""Which column of somebody's CSV is which field of ours: ``columns.toml``.

    image = "cine_path"                                    # a column
    group = { column = "patient_id", hash = true }         # a column, stored as a pseudonym
    split = { column = "set", values = { tuning = "val" } }  # a column, some values renamed
    mask  = { constant = "" }                              # not given, whatever the CSV has
    hash_paths = true                                      # keep hashes in place of paths

    [primary_angle]                                        # a value inside a JSON file
    json = "contours_path"                                 # the column that names the file
    key  = "view_angles.primary_angle"

A field that is not named there is the column of its own name, if there is one.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images.files import SUFFIXES

FIELDS = ("image", "mask", "frame", "primary_angle", "secondary_angle", "split", "group", "id")

_ENTRY_KEYS = ("column", "json", "key", "constant", "values", "hash")

_IDENTITY = re.compile(
    r"(patient|subject).*|mrn|dob|birth.*|date_of_birth|surname|((first|last|full)_?)?name",
    re.IGNORECASE,
)
"""Columns that tend to name a person: never kept as text unless asked for."""


def names_a_person(column: str) -> bool:
    """Tell whether a column's name says that it identifies a patient."""
    return _IDENTITY.fullmatch(column) is not None


def pseudonym(text: str, length: int = 12) -> str:
    """Return a short hash of a text: the same for the same text, and not readable back."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True)
class FieldSource:
    """Where one field of a row comes from: a column, a constant, or a key of a JSON file.

    Attributes:
        column: the column with the value, or with the JSON file's path; None for a constant.
        key: names on the way down the JSON file; empty when the column has the value itself.
        constant: the value of every row, when there is no column.
        values: renames some values.
        hash: whether the value is replaced by a pseudonym.
    """

    column: str | None
    key: tuple[str, ...] = ()
    constant: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    hash: bool = False


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The fields that a manifest has, and the columns that are kept beside them.

    Attributes:
        fields: where each field comes from.
        extra: the columns that are kept beside them.
        hash_paths: whether paths become pseudonyms, since they name persons.
    """

    fields: Mapping[str, FieldSource]
    extra: tuple[str, ...]
    hash_paths: bool


def map_columns(
    header: Sequence[str], columns: Path | None, manifest: str, *, by_id: bool = False
) -> ColumnMap:
    """Map a CSV's columns to our fields.

    Args:
        header: the CSV's column names.
        columns: a ``columns.toml``, or None to use the columns named like our fields.
        manifest: what to call the CSV in messages.
        by_id: whether an id does in place of an image.

    Raises:
        ManifestError: a ``columns.toml`` that cannot be read or says something unknown, or a
            column that the CSV lacks.
    """
    entries = {} if columns is None else _read_toml(columns)
    where = manifest if columns is None else columns.name
    extra = entries.pop("extra", None)
    if extra is not None and not (
        isinstance(extra, list) and all(isinstance(column, str) for column in extra)
    ):
        raise ManifestError(f"{where}: extra = {extra!r}; expected a list of column names")
    hash_paths = entries.pop("hash_paths", False)
    if not isinstance(hash_paths, bool):
        raise ManifestError(f"{where}: hash_paths = {hash_paths!r}; expected true or false")
    unknown = sorted(set(entries) - set(FIELDS))
    if unknown:
        raise ManifestError(
            f"{where}: unknown field {unknown[0]!r}; expected some of {', '.join(FIELDS)}, extra "
            "and hash_paths"
        )
    fields = {name: FieldSource(name, hash=False) for name in FIELDS if name in header}
    fields |= {name: _field_source(name, entry, where) for name, entry in entries.items()}
    if "image" not in fields and not (by_id and "id" in fields):
        wanted = "'image' or 'id'" if by_id else "'image'"
        raise ManifestError(
            f"{manifest}: no column {wanted}; it has {', '.join(header)}; rename the column, or "
            "say which one it is with --columns columns.toml"
        )
    used = [source.column for source in fields.values() if source.column is not None]
    for column in [*used, *(extra or ())]:
        if column not in header:
            raise ManifestError(
                f"{where}: column {column!r} is not in {manifest}, which has {', '.join(header)}"
            )
    if extra is None and hash_paths:
        extra = []  # any of them may hold a path, or part of one
    elif extra is None:
        consumed = {*FIELDS, *used}
        extra = [c for c in header if c and c not in consumed and not names_a_person(c)]
    return ColumnMap(fields, tuple(extra), hash_paths)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ManifestError(
            f"columns file {path}: {error.strerror or 'cannot be read'}; check its path"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"columns file {path}: not TOML ({' '.join(str(error).split())}); see docs/data.md for "
            "an example"
        ) from None


def _field_source(name: str, entry: Any, where: str) -> FieldSource:
    """Check one entry of a ``columns.toml``."""
    if isinstance(entry, str):
        return FieldSource(entry, hash=name == "group" and names_a_person(entry))
    expected = 'expected a column, { constant = … } or { json = "column", key = "a.b" }'
    if not isinstance(entry, dict):
        raise ManifestError(f"{where}: {name} = {entry!r}; {expected}")
    unknown = sorted(set(entry) - set(_ENTRY_KEYS))
    if unknown:
        raise ManifestError(
            f"{where}: {name} has an unknown key {unknown[0]!r}; expected {', '.join(_ENTRY_KEYS)}"
        )
    if len({"column", "json", "constant"} & set(entry)) != 1 or ("key" in entry) != (
        "json" in entry
    ):
        raise ManifestError(
            f"{where}: {name} has the keys {', '.join(entry) or '(none)'}; {expected}"
        )
    column = entry.get("column", entry.get("json"))
    values, is_hashed = entry.get("values", {}), entry.get("hash")
    texts = [column or "", entry.get("key", "")]
    if (
        not all(isinstance(text, str) for text in texts)
        or not isinstance(values, dict)
        or not isinstance(is_hashed, bool | None)
        or not all(_is_scalar(v) for v in (entry.get("constant", ""), *values.values()))
    ):
        raise ManifestError(f"{where}: {name} has a value of the wrong type; {expected}")
    if is_hashed is None:
        is_hashed = name == "group" and column is not None and names_a_person(column)
    return FieldSource(
        column,
        tuple(entry["key"].split(".")) if "key" in entry else (),
        str(entry.get("constant", "")),
        {key: str(value) for key, value in values.items()},
        is_hashed,
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


class RowReader:
    """Takes our fields out of a CSV's rows.

    Each JSON file is read once, and only the values that the fields ask for are kept of it.
    """

    def __init__(self, column_map: ColumnMap, root: Path) -> None:
        self._fields = column_map.fields
        self._hash_paths = column_map.hash_paths
        self._root = root
        self._keys = {source.key for source in self._fields.values() if source.key}
        self._found: dict[tuple[str, tuple[str, ...]], tuple[str, str]] = {}

    def value(self, row: Mapping[str, str], name: str) -> str:
        """Return a field of a row as text; empty when it is not given.

        Raises:
            ImageError: a JSON file that is missing or broken, or that lacks the key.
        """
        source = self._fields.get(name)
        if source is None:
            return ""
        text = source.constant if source.column is None else row[source.column]
        if source.key and text:
            text = self._json_value(text, source.key)
        text = source.values.get(text, text)
        return pseudonym(text) if source.hash and text else text

    def resolve(self, path_text: str) -> tuple[str, Path | None]:
        """Return the name that may be kept of a path, and where it is when that does not say it."""
        name, location = resolve_path(path_text, self._root)
        if not self._hash_paths:
            return name, location
        # What is hashed does not change when the manifest's folder moves.
        unique = name if location is None else PureWindowsPath(location).as_posix()
        suffix = PurePosixPath(name).suffix
        known = suffix if suffix.lower() in {*SUFFIXES, ".json"} else ""
        return pseudonym(unique, 16) + known, location or self._root / name

    def _json_value(self, path_text: str, key: tuple[str, ...]) -> str:
        if (path_text, key) not in self._found:
            name, location = self.resolve(path_text)
            document, problem = _read_json(location or self._root / name)
            for wanted in self._keys:
                self._found[path_text, wanted] = (
                    ("", f"{name}: {problem}") if problem else _look_up(document, wanted, name)
                )
        value, problem = self._found[path_text, key]
        if problem:
            raise ImageError(problem)
        return value


def _read_json(path: Path) -> tuple[Any, str]:
    """Return a file's document, or what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")), ""
    except OSError as error:
        problem = error.strerror or "cannot be read"
        return None, f"{problem}; restore the JSON file or empty the cell"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({' '.join(str(error).split())[:80]}); export it again"


def _look_up(document: Any, key: tuple[str, ...], name: str) -> tuple[str, str]:
    """Return the text at a key, empty for null, or what is wrong with the document."""
    value = document
    for part in key:
        if not isinstance(value, dict) or part not in value:
            return "", f"{name}: no key {'.'.join(key)!r}; add it, with null when it is unknown"
        value = value[part]
    if isinstance(value, dict | list):
        kind = "a list" if isinstance(value, list) else "an object"
        return "", f"{name}: {'.'.join(key)!r} is {kind}; expected the key of one value"
    return "" if value is None else str(value), ""


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
    return f"{path.stem}-{pseudonym(path.as_posix(), 8)}{path.suffix}", location


def is_absolute(text: str) -> bool:
    r"""Tell whether a path starts at a root of any system: /a, C:\\a, C:a or \\\\server\\a."""
    # Nearly all paths show at their first two characters that they are not; a path object is slow.
    if text[:1] not in ("/", "\\") and text[1:2] != ":":
        return False
    return PureWindowsPath(text).anchor != ""
