"""What the user has, resolved into samples: a table or container of any kind, or a folder.

A reader makes a table of text cells of what it reads (``images/readers.py``), and all tables are
understood alike: as that of a CSV.
"""

from __future__ import annotations

import hashlib
import io
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images.columns import (
    ROW,
    UNNAMED,
    LateKeyError,
    Row,
    RowReader,
    hides_paths,
    known_columns,
    map_columns,
    read_setting,
)
from sam3cache.images.dicom import dicom_files_table, text_note
from sam3cache.images.files import SUFFIXES
from sam3cache.images.readers import FOLDER, READERS, find_reader
from sam3cache.images.tables import SPLIT_SYNONYMS, Table, read_csv_rows, saying_path
from sam3cache.records import CONTRAST, MEMBER_MARK, SPLITS, Sample, SetAside, split_member

MAX_ANGLE_DEG = {"primary": 180, "secondary": 90}
"""DICOM PS3.3, C.8.7.5.1.2: Positioner Primary and Secondary Angle."""

_COUNTED_BYTES = 1 << 24

_SPACING = ("spacing_mm", "spacing_from")
"""Columns that headers of DICOM files give, the first as docs/evaluation.md expects it."""

_SPLIT_SHARES = ((0.70, "train"), (0.85, "val"), (1.0, "test"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """All samples of a manifest, and those that cannot be used.

    Attributes:
        root: folder that paths are relative to.
        samples: in the manifest's order, with unique ids.
        set_aside: what cannot be used, each with its reason.
        split_rule: where the splits come from, in words.
        leaks: groups that the manifest itself puts into more than one split.
        fields: fields that it gives; "split" only if it has any.
        header_fields: of these, what headers of DICOM files give, and nothing else does.
        extra: other columns that it gives.
        notes: what is to be told of it, a sentence each.
        notes_of_files: of these, what concerns those who store nothing of it, too.
        key_mark: of the key that names of persons are hashed with, what tells it from another; ""
            where none was needed.
        lines: of ``samples`` and then of ``set_aside``, where they stand; none of a folder.
        unit: what these numbers count, as "line".
        is_hidden: whether hashes are kept in place of any row's paths, which name persons.
        num_ungrouped: samples that nothing gives a group: each file, or picture in one, is its own.
        name: what messages call it: its path, unless that is hidden as well.
    """

    root: Path
    samples: tuple[Sample, ...]
    set_aside: tuple[SetAside, ...]
    split_rule: str
    leaks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("image", "mask")
    header_fields: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    notes_of_files: tuple[str, ...] = ()
    key_mark: str = ""
    lines: Sequence[int] = ()
    unit: str = ""
    is_hidden: bool = False
    num_ungrouped: int = 0
    name: str = ""


def read_manifest(
    path: Path,
    columns: Path | None = None,
    *,
    seed: int = 0,
    by_id: bool = False,
    mask_columns: Sequence[str] = (),
    known_groups: Collection[str] | None = None,
) -> Manifest:
    """Read a table, a container of pictures, or a folder.

    No picture is decoded, and no header of one is read but those of DICOM files; ``probe`` does
    that.

    Args:
        path: a CSV (comma, semicolon or tab) with a header, or a Parquet file of such columns; an
            HDF5 file or ``.npz``; a COCO file; a DICOM file; or a folder with a ``manifest.csv`` or
            ``manifest.parquet``, which then speaks for it, with ``images/`` and ``masks/`` matched
            by their stems, with COCO files in ``annotations/``, or of DICOM files.
        columns: a ``columns.toml`` that says which column is what, and which ``reader`` to take.
        seed: of the split by groups, where the manifest has none.
        by_id: whether a row may have an id in place of an image, for samples that a store has
            already; its ``source`` is then empty.
        mask_columns: columns of a CSV, or folders beside ``images/``, whose files each sample's
            ``masks`` shall name.
        known_groups: of a store of DICOM files, whose names are hashed with the user's key. They
            stay as they are, and rows without an image count as of DICOM files.

    Raises:
        ManifestError: the manifest as a whole cannot be used; nothing is set aside for that.
    """
    path, reader = find_reader(path, columns)
    if reader == FOLDER:
        if columns is not None and read_setting(columns, "reader") != FOLDER:
            raise ManifestError(
                f"{path} is a folder, which has no columns; leave {columns.name} out or give a CSV"
            )
        return _read_folder(path, seed, mask_columns)
    with saying_path(path), _unnamed(path, hides_paths(columns)):
        return _read(
            lambda: READERS[reader](path, columns),
            columns,
            seed,
            by_id,
            mask_columns,
            known_groups=known_groups,
        )


@contextmanager
def _unnamed(path: Path, is_hidden: bool) -> Iterator[None]:
    """Leave the manifest's name out of what is wrong with it, where names are hidden.

    Raises:
        ManifestError: in place of one that begins with the name.
    """
    try:
        yield
    except ManifestError as error:
        for name in (f"{path}: ", f"{path.name}: "):
            if is_hidden and str(error).startswith(name):
                raise ManifestError(f"{UNNAMED}: {str(error).removeprefix(name)}") from None
        raise


def read_dicoms(files: Sequence[tuple[int, Path]], columns: Path | None = None) -> Manifest:
    """Read DICOM files that are named one by one, wherever they lie.

    Args:
        files: with each the number that messages call it by; none is a folder.
        columns: as for :func:`read_manifest`.

    Raises:
        ManifestError: when none can be used.
    """
    return _read(lambda: dicom_files_table(files), columns, 0)


def _read(
    open_table: Callable[[], AbstractContextManager[Table]], *args: Any, **options: Any
) -> Manifest:
    """Resolve a table; once more, hashed with the key throughout, where DICOM files come late."""
    for is_keyed in (False, True):
        with suppress(LateKeyError), open_table() as table:
            return _read_table(table, *args, is_keyed=is_keyed, **options)
    raise AssertionError("the key was there from the first row on")


def _read_folder(folder: Path, seed: int, mask_folders: Sequence[str] = ()) -> Manifest:
    root = folder.absolute()
    has_parts = (root / "images").is_dir()
    images = _pictures(root / "images", root) if has_parts else _pictures(root, root, deep=False)
    if not images:
        tables = sorted(folder.glob("*.csv"))
        if tables:
            raise ManifestError(f"{folder}: no pictures; did you mean its CSV, {tables[0]}?")
        raise ManifestError(
            f"{folder}: no pictures; put them into {folder / 'images'} and their masks, with the "
            f"same stems, into {folder / 'masks'}; known are {', '.join(sorted(SUFFIXES))}"
        )
    masks = _pictures(root / "masks", root) if has_parts else {}
    for name in mask_folders:
        if not (root / name).is_dir():
            raise ManifestError(f"{folder}: no folder {name!r} with masks beside images")
    others = [_pictures(root / name, root) for name in mask_folders]
    for stem, names in images.items():
        if len(names) > 1:
            raise ManifestError(
                f"{folder}: {names[0]} and {names[1]} have one stem; rename one, or give a CSV"
            )
        for found in (masks, *others):
            if len(found.get(stem, ())) > 1:
                raise ManifestError(
                    f"{folder}: {found[stem][0]} and {found[stem][1]} are both masks of "
                    f"{names[0]}; remove one"
                )
    strays = [name for stem in masks if stem not in images for name in masks[stem]]
    if masks and not masks.keys() & images.keys():
        raise ManifestError(
            f"{folder}: no mask matches an image (the first is {strays[0]}); name a mask like its "
            "image"
        )
    samples = [
        Sample(
            stem,
            names[0],
            root,
            mask=masks.get(stem, [None])[0],
            group=names[0],
            masks=tuple((found[stem][0], None) if stem in found else None for found in others),
        )
        for stem, names in images.items()
    ]
    set_aside = [
        SetAside(name, name, "mask without an image of its stem; rename it or remove it")
        for name in strays
    ]
    samples, odd = without_odd_names(samples)
    set_aside += odd
    manifest = _with_splits(root, samples, [""] * len(samples), set_aside, "", seed)
    return replace(manifest, num_ungrouped=len(samples), name=str(folder))


def _pictures(folder: Path, root: Path, *, deep: bool = True) -> dict[str, list[str]]:
    """Return picture names relative to ``root`` by their path in ``folder`` without suffix."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        is_hidden = path.name.startswith(".")
        # What is no file, a pipe or a link to nowhere, is told when it is opened.
        if path.suffix.lower() in SUFFIXES and not is_hidden and not path.is_dir():
            stem = path.relative_to(folder).with_suffix("").as_posix()
            found[stem].append(path.relative_to(root).as_posix())
    return dict(found)


def without_odd_names(samples: Iterable[Sample]) -> tuple[list[Sample], list[SetAside]]:
    """Set aside what is called by bytes that are no UTF-8, as Linux allows and no text does."""
    kept, odd = [], []
    for sample in samples:
        name = printable(sample.source)
        if name == sample.source:
            kept.append(sample)
        else:
            odd.append(SetAside(name, name, "the file's name is not UTF-8; rename it"))
    return kept, odd


def printable(name: str) -> str:
    """Return a file's name as UTF-8; bytes that are none as they are written in Python."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _read_table(
    table: Table,
    columns: Path | None,
    seed: int,
    by_id: bool = False,
    mask_columns: Sequence[str] = (),
    *,
    is_keyed: bool = False,
    known_groups: Collection[str] | None = None,
) -> Manifest:
    """Resolve a table's rows, one after the other: there may be many."""
    header, root, where = table.header, table.root, table.path
    column_map = map_columns(
        header,
        columns,
        table.name,
        by_id=by_id,
        defaults=table.defaults,
        unkept=table.unkept,
        is_private=known_groups is not None,
    )
    for name in mask_columns:
        if name not in header:
            has = known_columns(header, column_map.hash_paths)
            raise ManifestError(f"{where}: no column {name!r} with masks; it has {has}")
    reader = RowReader(column_map, root, is_keyed=is_keyed, known_groups=known_groups)

    samples: list[Sample] = []
    set_aside: list[SetAside] = []
    # What stands in many rows is kept once.
    shared: dict[Any, Any] = {}
    line_of: dict[str, int] = {}
    lines, lines_aside = array("I"), array("I")
    is_hidden, num_ungrouped = False, 0
    for line, cells in table.rows:
        given_id, row = "", Row(reader, dict(zip(header, cells, strict=True)))
        try:
            given_id = row.value("id")
            row.find_image()
            if not row.image and not (by_id and given_id):
                what = "image and no id" if by_id else "image"
                raise ImageError(f"no {what}; fill the cell or remove the row")
            fields = _fields(row, shared)
            if mask_columns:
                files = [row.cells[column] for column in mask_columns]
                fields["masks"] = tuple(row.resolve(f) if f else None for f in files)
            split = row.value("split")
        except ImageError as error:
            row_id = given_id or f"{table.unit} {line}"
            is_hidden |= row.hides
            reason = f"{table.unit} {line}: {error}" if row.hides else str(error)
            set_aside.append(SetAside(row_id, row.source, reason))
            lines_aside.append(line)
            _claim(line_of, [row_id], line, table)
            continue
        ids = [given_id] if given_id else _derived_ids(fields)
        row_id = _claim(line_of, ids, line, table)
        lines.append(line)
        is_hidden |= row.hides
        num_ungrouped += row.is_ungrouped
        named_line = f"{table.unit} {line}" if row.hides else None
        split = shared.setdefault(split, split)
        samples.append(Sample(row_id, root=root, split=split, line=named_line, **fields))
    splits = [sample.split for sample in samples]
    if not samples and not set_aside:
        raise ManifestError(f"{where}: no rows; expected a header and a row a sample")
    name = UNNAMED if is_hidden else str(where)
    if not samples:
        raise ManifestError(
            f"{name}: none of {len(set_aside)} {table.unit}s can be used; the first: "
            f"{set_aside[0].reason}"
        )
    source_of_split = column_map.fields.get("split")
    rule = ""
    if source_of_split is not None:
        column = source_of_split.column
        rule = f"constant {splits[0]!r}" if column is None else f"column {column!r}"
    manifest = _with_splits(root, samples, splits, set_aside, rule, seed)
    given = {n for n, entry in column_map.fields.items() if entry.column or entry.constant}
    if not any(splits):
        given.discard("split")
    extra, notes, key_mark = column_map.extra, list(table.notes), ""
    of_headers: set[str] = set()
    if reader.num_dicoms:
        of_headers = {"primary_angle", "secondary_angle", "group"} - given
        given |= of_headers
        extra += tuple(name for name in _SPACING if reader.has_spacing and name not in extra)
        if num_mixed := reader.num_mixed_patients:
            notes.append(
                f"{num_mixed} patient IDs stand in some DICOM files with their issuer and in "
                "others without, which makes two groups of each: if these are the same patients, "
                "give groups in a CSV's column"
            )
    if num_ungrouped and (reader.num_dicoms or ROW in header):
        notes.append(
            f"{num_ungrouped} of {len(samples)} samples have no group, and are groups of their "
            "own: pictures of one patient may fall into two splits"
        )
    unlisted = [c for c in column_map.extra if c not in column_map.listed]
    if reader.num_dicoms and is_hidden and unlisted:
        notes.append(
            f"empty beside DICOM files, as they may hold a path: columns {', '.join(unlisted)} "
            "(those that extra in a columns.toml lists are kept)"
        )
    if left_out := column_map.left_out:
        notes.append(
            f"not kept, as they may tell who somebody is: columns {', '.join(left_out)} (those "
            "that extra in a columns.toml lists are kept)"
        )
    if reader.num_with_text and table.unit != "file":
        notes.append(text_note(reader.num_with_text))
    notes_of_key: tuple[str, ...] = ()
    if reader.uses_key:
        key_mark = reader.key.mark
        notes_of_key = (reader.key.note,) if reader.key.is_new else ()
    return replace(
        manifest,
        fields=tuple(sorted(given)),
        header_fields=tuple(sorted(of_headers)),
        extra=extra,
        notes=(*notes, *notes_of_key),
        notes_of_files=(*table.notes, *notes_of_key),
        key_mark=key_mark,
        lines=lines + lines_aside,
        unit=table.unit,
        is_hidden=is_hidden,
        num_ungrouped=num_ungrouped,
        name=name,
    )


@dataclass(frozen=True, slots=True)
class ManifestSample:
    """Some rows of a CSV that is too long to be read.

    Attributes:
        num_rows: rows that it has, blank ones too.
        manifest: of the rows that were taken.
    """

    num_rows: int
    manifest: Manifest


def find_csv(path: Path) -> Path | None:
    """Return the CSV that speaks for a path; None where something else does."""
    path, reader = find_reader(path, None)
    return path if reader == "csv" else None


def count_rows(path: Path) -> int:
    """Count the rows of a CSV below its header, blank ones too, without reading their cells.

    Raises:
        ManifestError: when the file cannot be read.
    """
    num_lines, in_quotes, last = 0, 0, b"\n"
    with saying_path(path), path.open("rb") as file:
        while chunk := file.read(_COUNTED_BYTES):
            last = chunk[-1:]
            if in_quotes or b'"' in chunk:
                # What stands between quotes belongs to a cell: an odd number of them came before.
                values = np.frombuffer(chunk, np.uint8)
                quotes = (np.cumsum(values == ord('"')) + in_quotes) % 2
                num_lines += int(((values == ord("\n")) & (quotes == 0)).sum())
                in_quotes = int(quotes[-1])
            else:
                num_lines += chunk.count(b"\n")
    return max(0, num_lines + (last != b"\n") - 1)


def sample_manifest(
    path: Path, columns: Path | None = None, *, num_samples: int, seed: int = 0
) -> ManifestSample:
    """Read a CSV's header and some of its rows, evenly spread over the file.

    Args:
        path: a CSV.
        columns: as for :func:`read_manifest`.
        num_samples: rows to take.
        seed: as for :func:`read_manifest`.

    Raises:
        ManifestError: as :func:`read_manifest` does, of the rows that are taken.
    """
    num_rows = count_rows(path)
    if num_rows <= num_samples:
        return ManifestSample(num_rows, read_manifest(path, columns, seed=seed))
    is_hidden = hides_paths(columns)
    with saying_path(path), path.open("rb") as file:
        header = file.readline()
        begin, end = file.tell(), path.stat().st_size
        lines = {}
        for number in range(num_samples):
            file.seek(max(begin, begin + (end - begin) * number // num_samples - 1))
            if file.tell() > begin or number:
                file.readline()  # the rest of a row
            lines[file.tell()] = file.readline()
        text = b"".join([header, *(line for _, line in sorted(lines.items()))]).decode("utf-8-sig")
    with _unnamed(path, is_hidden):
        manifest = _read(
            lambda: nullcontext(read_csv_rows(io.StringIO(text, newline=""), path)), columns, seed
        )
    return ManifestSample(num_rows, manifest)


def _fields(row: Row, shared: dict[Any, Any]) -> dict[str, Any]:
    """Resolve one row, all but its id, line and split; without an image its source is empty."""
    source, image_location = row.resolve(row.image) if row.image else ("", None)
    frame, own_group = _frame(row.value("frame")), source
    if frame == CONTRAST or row.is_of_contrast:
        # A picture of its own, whichever frame that is: it is looked for when it is read.
        source += MEMBER_MARK + CONTRAST
        frame = None if frame == CONTRAST else frame
        if image_location is not None:
            image_location = Path(f"{image_location}{MEMBER_MARK}{CONTRAST}")
    mask_text = row.value("mask")
    mask, mask_location = row.resolve(mask_text) if mask_text else (None, None)
    names, cells, facts = row.reader.column_map.extra, row.extra(), row.facts()
    if facts is not None and facts.spacing_mm and _SPACING[0] not in names:
        names, cells = (*names, *_SPACING), (*cells, facts.spacing_mm, facts.spacing_from)
    extra = (names, cells)
    if extra not in shared:
        shared[extra] = dict(zip(names, cells, strict=True))
    fields = {
        "source": source,
        "frame": frame,
        "mask": mask,
        "primary_angle_deg": _angle(row, "primary"),
        "secondary_angle_deg": _angle(row, "secondary"),
        "group": row.group(own_group),
        "extra": shared[extra],
        "image_location": image_location,
        "mask_location": mask_location,
    }
    for name in ("mask", "primary_angle_deg", "secondary_angle_deg", "group"):
        value = fields[name]
        # A sign of zero is kept, though zeros are equal.
        if value != 0:
            fields[name] = shared.setdefault(value, value)
    return fields


def _frame(text: str) -> int | str | None:
    if not text:
        return None
    if text.lower() == CONTRAST:
        return CONTRAST
    try:
        number = float(text)  # tables with gaps write 12 as 12.0
    except ValueError:
        number = -1.0
    if number < 0 or not number.is_integer():
        raise ImageError(
            f"frame {text!r}: expected a whole number from 0, {CONTRAST!r}, or nothing for a still"
        )
    return int(number)


def _angle(row: Row, which: str) -> float | None:
    """Return degrees, or None for an empty cell or a NaN."""
    text = row.value(f"{which}_angle")
    if not text:
        return None
    limit = MAX_ANGLE_DEG[which]
    try:
        angle_deg = float(text)
    except ValueError:
        raise ImageError(
            f"{which} angle {text!r} is not a number; expected degrees in [-{limit}, {limit}], or "
            "nothing when it is unknown"
        ) from None
    if abs(angle_deg) > limit:
        is_of_header = f"{which}_angle" not in row.reader.column_map.fields
        raise ImageError(
            f"{which} angle {text} of the file's header is outside [-{limit}, {limit}] degrees; "
            f"a CSV's column {which}_angle goes before the header: give one with the angle, or "
            "with an empty cell when it is unknown"
            if is_of_header
            else f"{which} angle {text} is outside [-{limit}, {limit}] degrees; correct it, or "
            "empty the cell when it is unknown"
        )
    return None if math.isnan(angle_deg) else angle_deg


def _derived_ids(fields: dict[str, Any]) -> list[str]:
    """Return ids to try for a row without one: image and frame; then the mask's name with them."""
    file, member = split_member(fields["source"])
    plain = PurePosixPath(file).with_suffix("").as_posix()
    if member and member != CONTRAST:
        plain += f"/{member}"
    if fields["frame"] is not None:
        plain += f"#{fields['frame']}"
    elif member == CONTRAST:
        plain += f"#{CONTRAST}"
    mask = fields["mask"]
    return [plain] if mask is None else [plain, f"{plain}@{PurePosixPath(mask).stem}"]


def _claim(line_of: dict[str, int], candidates: Sequence[str], line: int, table: Table) -> str:
    """Return the first id that no earlier row has."""
    for candidate in candidates:
        if candidate not in line_of:
            line_of[candidate] = line
            return candidate
    taken = candidates[-1]
    raise ManifestError(
        f"{table.name}: {table.unit}s {line_of[taken]} and {line} both have the id {taken!r}; make "
        "ids unique, or remove the row that is there twice"
    )


def _with_splits(
    root: Path,
    samples: Sequence[Sample],
    texts: Sequence[str],
    set_aside: Iterable[SetAside],
    where: str,
    seed: int,
) -> Manifest:
    """Give every sample its split: as the manifest says, else by hashing its group."""
    if not any(texts):
        samples = [replace(s, split=_hashed_split(s.group, seed)) for s in samples]
        rule = f"70/15/15 by hash of the group, seed {seed}"
        return Manifest(root, tuple(samples), tuple(set_aside), rule)
    splits = [SPLIT_SYNONYMS.get(text.lower(), text) for text in texts]
    for sample, split in zip(samples, splits, strict=True):
        if split not in SPLITS:
            raise ManifestError(
                f"sample {sample.id!r} has the split {split!r} ({where}); expected train, val or "
                "test in every row; rename values in columns.toml: split = { column = …, values = "
                "{ … } }"
            )
    splits_by_group = defaultdict(set)
    for sample, split in zip(samples, splits, strict=True):
        splits_by_group[sample.group].add(split)
    leaks = tuple(sorted(group for group, found in splits_by_group.items() if len(found) > 1))
    samples = [
        sample if sample.split == split else replace(sample, split=split)
        for sample, split in zip(samples, splits, strict=True)
    ]
    return Manifest(root, tuple(samples), tuple(set_aside), where, leaks)


def _hashed_split(group: str, seed: int) -> str:
    """Return a group's split; it depends on nothing else, so new samples move no old group."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for limit, split in _SPLIT_SHARES if share < limit)
