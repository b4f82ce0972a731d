"""Which column of somebody's CSV is which field of ours: ``columns.toml``.

    image = "cine_path"                                    # a column
    group = { column = "patient_id", hash = true }         # a column, stored as a pseudonym
    split = { column = "set", values = { tuning = "val" } }  # a column, some values renamed
    mask  = { constant = "" }                              # not given, whatever the CSV has
    hash_paths = true                                      # keep hashes in place of paths
    reader = "dicom"                                       # how a folder or file is to be read

    [primary_angle]                                        # a value inside a JSON file
    json = "contours_path"                                 # the column that names the file
    key  = "view_angles.primary_angle"

A field that is not named there is the column of its own name, if there is one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images.dicom import (
    DicomFacts,
    is_called_dicom,
    is_dicom,
    may_be_dicom,
    read_facts,
)
from sam3cache.images.paths import is_absolute, resolve_path
from sam3cache.images.picture import CONTAINER_SUFFIXES, SUFFIXES, require_regular
from sam3cache.images.pseudonyms import Key, load_key, pseudonym
from sam3cache.records import CONTRAST, MEMBER_MARK, split_member

FIELDS = ("image", "mask", "frame", "primary_angle", "secondary_angle", "split", "group", "id")

_ENTRY_KEYS = ("column", "json", "key", "constant", "values", "hash")

ROW = "(row)"
"""Column of a container's table with each row's place in the file, to be hidden as paths are."""

UNNAMED = "the manifest"
"""What messages call a manifest where names of files are hidden, of which its own may be one."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_WHOSE_NAME = "first|last|full|family|given|middle|maiden|person|operators?"
_IDENTITY = re.compile(
    "_(patient|accession|birth|surname|forename|physician|doctor|telephone|phone|e?mail|address)"
    "|_(medical_record|hospital)_?(id|no|nr|num|number)_"
    "|_(subject(s|id|name)?|pat(id|name)?|pid|mrn|ssn|dob|uid|[a-z]+instanceuid)_"
    "|_(study|series|exam|scan|visit|acquisition)?date(time)?_"
    f"|_({_WHOSE_NAME})_?names?_|^_names?_$"
)
"""Columns that tend to tell who somebody is: never kept as text unless asked for."""


def names_a_person(column: str) -> bool:
    """Tell whether a column's name says that it identifies a patient."""
    words = "_".join(_WORDS.findall(column)).lower()
    return _IDENTITY.search(f"_{words}_") is not None


@dataclass(frozen=True, slots=True)
class FieldSource:
    """Where one field of a row comes from: a column, a constant, or a key of a JSON file.

    Attributes:
        column: the column with the value, or with the JSON file's path; None for a constant.
        key: names on the way down the JSON file; empty when the column has the value itself.
        constant: the value of every row, when there is no column.
        values: renames some values.
        hash: whether the value is replaced by a pseudonym; None: where DICOM files are hidden.
    """

    column: str | None
    key: tuple[str, ...] = ()
    constant: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    hash: bool | None = False


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The fields that a manifest has, and the columns that are kept beside them.

    Attributes:
        fields: where each field comes from.
        extra: the columns that are kept beside them.
        listed: those of them that the user has asked for by name.
        left_out: columns that are not kept, as they seem to name a person.
        hash_paths: whether paths become pseudonyms, since they name persons; None: those of DICOM
            files and what belongs to them.
    """

    fields: Mapping[str, FieldSource]
    extra: tuple[str, ...]
    listed: frozenset[str]
    left_out: tuple[str, ...]
    hash_paths: bool | None


def map_columns(
    header: Sequence[str],
    columns: Path | None,
    manifest: str,
    *,
    by_id: bool = False,
    defaults: Mapping[str, str] = MappingProxyType({}),
    unkept: Collection[str] = (),
    is_private: bool = False,
) -> ColumnMap:
    """Map a CSV's columns to our fields.

    Args:
        header: the CSV's column names.
        columns: a ``columns.toml``, or None to use the columns named like our fields.
        manifest: what to call the CSV in messages.
        by_id: whether an id does in place of an image.
        defaults: by field, its column where ``columns.toml`` does not say another.
        unkept: columns that are not kept unless ``extra`` lists them.
        is_private: whether that is so of all columns, unless ``hash_paths = false``.

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
    entries.pop("reader", None)
    hash_paths = entries.pop("hash_paths", None)
    if not isinstance(hash_paths, bool | None):
        raise ManifestError(f"{where}: hash_paths = {hash_paths!r}; expected true or false")
    manifest = UNNAMED if hash_paths else manifest
    has = known_columns(header, hash_paths)
    unknown = sorted(set(entries) - set(FIELDS))
    if unknown:
        raise ManifestError(
            f"{where}: unknown field {unknown[0]!r}; expected some of {', '.join(FIELDS)}, "
            "extra, hash_paths and reader"
        )
    named = {name: name for name in FIELDS if name in header} | dict(defaults)
    fields = {
        name: FieldSource(column, hash=None if name == "group" else False)
        for name, column in named.items()
    }
    fields |= {name: _field_source(name, entry, where) for name, entry in entries.items()}
    for name, source in fields.items():
        if source.column is not None and source.column not in header:
            # In any group of a container.
            fields[name] = replace(source, column=source.column.removeprefix("*/"))
    if "image" not in fields and not (by_id and "id" in fields):
        wanted = "'image' or 'id'" if by_id else "'image'"
        raise ManifestError(
            f"{manifest}: no column {wanted}; it has {has}; rename the column, or say which one it "
            "is with --columns columns.toml"
        )
    used = [source.column for source in fields.values() if source.column is not None]
    for column in [*used, *(extra or ())]:
        if column not in header:
            raise ManifestError(f"{where}: column {column!r} is not in {manifest}, which has {has}")
    listed = frozenset(extra or ())
    left_out: list[str] = []
    if extra is None and (hash_paths or (is_private and hash_paths is None)):
        extra = []  # any of them may hold a path, or part of one
    elif extra is None:
        consumed = {*FIELDS, *used, *unkept}
        others = [c for c in header if c and c not in consumed]
        left_out = [c for c in others if names_a_person(c)]
        extra = [c for c in others if c not in left_out]
    return ColumnMap(fields, tuple(extra), listed, tuple(left_out), hash_paths)


def known_columns(header: Sequence[str], hash_paths: bool | None) -> str:
    """Name the columns, but for those of a container whose own names are hidden."""
    return "others" if hash_paths and ROW in header else ", ".join(c for c in header if c != ROW)


def hides_paths(columns: Path | None) -> bool:
    """Tell whether a ``columns.toml`` hides all names of files.

    Raises:
        ManifestError: a ``columns.toml`` that cannot be read.
    """
    if columns is None or not columns.exists():
        return False
    return _read_toml(columns).get("hash_paths") is True


def read_setting(columns: Path | None, name: str) -> str | None:
    """Return a text that a ``columns.toml`` gives by name alone, None where it gives none.

    Raises:
        ManifestError: a ``columns.toml`` that cannot be read.
    """
    if columns is None or not columns.exists():
        return None  # Whoever needs it says that it is not there.
    entry = _read_toml(columns).get(name)
    return entry if isinstance(entry, str) else None


def read_names(columns: Path | None) -> frozenset[str]:
    """Return the names that a ``columns.toml`` says something of.

    Raises:
        ManifestError: a ``columns.toml`` that cannot be read.
    """
    if columns is None or not columns.exists():
        return frozenset()
    return frozenset(_read_toml(columns))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        require_regular(path, f"columns file {path}")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ImageError as error:
        raise ManifestError(str(error)) from None
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
        return FieldSource(entry, hash=_is_hashed(name, entry))
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
        is_hashed = _is_hashed(name, column)
    return FieldSource(
        column,
        tuple(entry["key"].split(".")) if "key" in entry else (),
        str(entry.get("constant", "")),
        {key: str(value) for key, value in values.items()},
        is_hashed,
    )


def _is_hashed(name: str, column: str | None) -> bool | None:
    """Return whether a field is hashed whose entry does not say so."""
    if name != "group":
        return False
    return True if column is not None and names_a_person(column) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


class LateKeyError(Exception):
    """A DICOM file is met, and names before it are not hashed with the key: begin anew."""


class RowReader:
    """Takes our fields out of a manifest's rows.

    Each JSON file is read once, and only the values that the fields ask for are kept of it. What a
    row does not say, the header of a DICOM file may.

    Attributes:
        column_map: where fields come from.
        root: folder that paths are relative to.
        num_dicoms: rows so far whose image is a DICOM file.
        num_with_text: DICOM files so far that say that text is burnt into their pixels.
        has_spacing: whether any of them tells the size of its pixels.
        patients: that groups were made of.
    """

    def __init__(
        self,
        column_map: ColumnMap,
        root: Path,
        *,
        is_keyed: bool = False,
        known_groups: Collection[str] | None = None,
    ) -> None:
        """Begin to take rows.

        Args:
            column_map: where fields come from.
            root: folder that paths are relative to.
            is_keyed: whether all hashes are made with the user's key; they are from the first
                DICOM file on.
            known_groups: of a store with such hashes. They stay as they are, and a row without an
                image counts as of a DICOM file.
        """
        self.column_map = column_map
        self.known_groups = known_groups
        self._is_keyed = is_keyed or known_groups is not None
        self._has_unkeyed = False
        self.num_dicoms = self.num_with_text = 0
        self.has_spacing = False
        self.patients: set[str] = set()
        self.root = root
        self._keys = {source.key for source in column_map.fields.values() if source.key}
        self._found: dict[tuple[str, tuple[str, ...], bool], tuple[str, str]] = {}
        self._facts: tuple[str, DicomFacts | None] = ("", None)

    @cached_property
    def key(self) -> Key:
        """The user's key; it is made when it is asked for first."""
        return load_key()

    @property
    def num_mixed_patients(self) -> int:
        """Ids of patients that occur with who gave them and without, and so in two groups."""
        with_issuer = (patient.partition("\n")[2] for patient in self.patients)
        return len({patient for patient in with_issuer if patient} & self.patients)

    @property
    def uses_key(self) -> bool:
        """Whether anything has been hashed with the key."""
        return "key" in self.__dict__

    def use_key(self) -> None:
        """Make all hashes with the key, so that one text has one hash in all of the manifest.

        Raises:
            LateKeyError: when some have been made without.
        """
        if self._has_unkeyed and not self._is_keyed:
            raise LateKeyError
        self._is_keyed = True

    def hashed(self, text: str, length: int) -> str:
        """Return the pseudonym of a text."""
        if self._is_keyed:
            return self.key.pseudonym(text, length)
        self._has_unkeyed = True
        return pseudonym(text, length)

    def group(self, text: str) -> str:
        """Return a group that is hashed where DICOM files are hidden."""
        if self.column_map.hash_paths is False or text in (self.known_groups or ()):
            return text
        if self._is_keyed:
            return self.key.pseudonym(text, 12)
        self._has_unkeyed = True
        return text

    def facts(self, path: Path, name: str) -> DicomFacts:
        """Return what a DICOM file says; that of the row before is remembered.

        Raises:
            ImageError: a file whose header cannot be read, or that is no picture.
        """
        text = str(path)
        if self._facts[0] != text:
            self._facts = text, read_facts(path, name)
            self.num_with_text += self._facts[1] is not None and self._facts[1].has_text
        facts = self._facts[1]
        if facts is None:
            raise ImageError(f"{name}: DICOM without a picture; leave it out")
        self.has_spacing |= bool(facts.spacing_mm)
        return facts

    def json_value(self, row: Row, path_text: str, key: tuple[str, ...]) -> str:
        """Return the text at a key of a JSON file.

        Raises:
            ImageError: a file that is missing or broken, or that lacks the key.
        """
        if (path_text, key, row.hides) not in self._found:
            name, location = row.resolve(path_text)
            document, problem = _read_json(location or self.root / name)
            for wanted in self._keys:
                self._found[path_text, wanted, row.hides] = (
                    ("", f"{name}: {problem}") if problem else _look_up(document, wanted, name)
                )
        value, problem = self._found[path_text, key, row.hides]
        if problem:
            raise ImageError(problem)
        return value


@dataclass(slots=True)
class Row:
    """One row of a manifest.

    Attributes:
        reader: whose row it is.
        cells: by column.
        image: the image as the row names it; empty without one.
        is_of_contrast: whether it is the frame with the most contrast agent, by its name.
        dicom: where it is when it is a DICOM file.
        is_ungrouped: whether nothing gives its group, once that was asked for.
    """

    reader: RowReader
    cells: Mapping[str, str]
    image: str = ""
    is_of_contrast: bool = False
    dicom: Path | None = None
    is_ungrouped: bool = False

    @property
    def hides(self) -> bool:
        """Whether hashes are kept in place of paths."""
        hash_paths = self.reader.column_map.hash_paths
        return self.is_of_dicom if hash_paths is None else hash_paths

    @property
    def is_of_dicom(self) -> bool:
        """Whether the row is of a DICOM file, so far as can be told."""
        return self.dicom is not None or (not self.image and self.reader.known_groups is not None)

    @property
    def source(self) -> str:
        """The name that may be kept of the image."""
        return self.resolve(self.image)[0] if self.image else ""

    def find_image(self) -> None:
        """Take the image's name, and look whether it is a DICOM file.

        Raises:
            ImageError: a JSON file with its path that is missing or broken, or a path that can be
                none of a file's.
            LateKeyError: as :meth:`RowReader.use_key` does.
        """
        text = self.value("image")
        self.image = text.removesuffix(MEMBER_MARK + CONTRAST)
        self.is_of_contrast = text != self.image
        file = split_member(self.image)[0]
        if not file:
            return
        last = file.replace("\\", "/").rstrip("/").rpartition("/")[2]
        if last in ("", ".", ".."):
            raise ImageError(f"the image {file!r} is no file's name; mend the cell")
        if not may_be_dicom(last):
            return
        name, location, _ = resolve_path(file, self.reader.root)
        path = location or self.reader.root / name
        # Of one that is not there, its name tells.
        if is_called_dicom(path.name) or is_dicom(path):
            self.reader.use_key()
            self.dicom = path
            self.reader.num_dicoms += 1

    def facts(self) -> DicomFacts | None:
        """Return what the header says of a DICOM file, None of another.

        Raises:
            ImageError: as :meth:`RowReader.facts` does.
        """
        return None if self.dicom is None else self.reader.facts(self.dicom, self.source)

    def value(self, name: str) -> str:
        """Return a field as text; empty when it is not given.

        Raises:
            ImageError: a JSON file that is missing or broken, or that lacks the key; a damaged
                DICOM header; a text of several lines.
        """
        source = self.reader.column_map.fields.get(name)
        if source is None:
            return self._of_dicom(name)
        text = source.constant if source.column is None else self.cells[source.column]
        if source.key and text:
            text = self.reader.json_value(self, text, source.key)
        text = source.values.get(text, text)
        if "\n" in text or "\r" in text:
            # Without the text, which may be one to be hidden.
            raise ImageError(
                f"the {name.replace('_', ' ')} has a line break in it; mend the cell (a quote that "
                "nothing closes swallows the lines below)"
            )
        if not text or source.hash is False:
            return text
        return self.reader.group(text) if source.hash is None else self.reader.hashed(text, 12)

    def group(self, source: str) -> str:
        """Return the group, or where nothing gives one what makes the row a group of its own.

        Args:
            source: the name that may be kept of the image.

        Raises:
            ImageError: as :meth:`value` does.
        """
        if group := self.value("group"):
            return group
        self.is_ungrouped = True
        # A row of a stack is a picture among others in one file.
        place = "" if "group" in self.reader.column_map.fields else self.cells.get(ROW, "")
        if not place:
            return source
        return self.reader.hashed(place, 12) if self.hides else place

    def _of_dicom(self, name: str) -> str:
        facts = self.facts()
        if facts is None or name not in ("primary_angle", "secondary_angle", "group"):
            return ""
        if name == "group":
            if not facts.patient:
                return ""
            self.reader.patients.add(facts.patient)
            return self.reader.key.pseudonym(facts.patient, 12)
        frame = self.value("frame")
        try:
            return facts.angle(name, int(float(frame)))
        except (ValueError, OverflowError):
            return facts.angle(name, None)  # It is looked for when the picture is read.

    def extra(self) -> tuple[str, ...]:
        """Return the other columns that are kept, in the order of the map."""
        column_map = self.reader.column_map
        if not (self.is_of_dicom and self.hides):
            return tuple(self._portable(self.cells[column]) for column in column_map.extra)
        return tuple(
            # Any other may hold a path, or part of one.
            self._portable(self.cells[column]) if column in column_map.listed else ""
            for column in column_map.extra
        )

    def _portable(self, text: str) -> str:
        """Keep a cell as it is, but for a path of this machine."""
        return self.resolve(text)[0] if is_absolute(text) else text

    def resolve(self, path_text: str) -> tuple[str, Path | None]:
        """Return the name that may be kept of a path, and where it is when that does not say it."""
        root = self.reader.root
        name, location, whole = resolve_path(path_text, root)
        if not self.hides:
            return name, location
        is_image = self.dicom is not None and path_text == self.image
        suffix = PurePosixPath(split_member(name)[0]).suffix
        known = suffix if suffix.lower() in {*SUFFIXES, *CONTAINER_SUFFIXES} else ""
        hashed = self.reader.hashed(whole, 16)
        return hashed + (".dcm" if is_image else known), location or root / name


def _read_json(path: Path) -> tuple[Any, str]:
    """Return a file's document, or what is wrong with the file."""
    try:
        require_regular(path, path.name)
        return json.loads(path.read_text(encoding="utf-8-sig")), ""
    except ImageError:
        return None, "no file, but a pipe, device or socket; name a file"
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
