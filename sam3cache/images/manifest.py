"""What the user has: a CSV or a folder, resolved into samples."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images.columns import (
    ColumnMap,
    RowReader,
    is_absolute,
    map_columns,
)
from sam3cache.images.files import SUFFIXES
from sam3cache.records import SPLITS, Sample, SetAside

MAX_ANGLE_DEG = {"primary": 180, "secondary": 90}
"""DICOM PS3.3, C.8.7.5.1.2: Positioner Primary and Secondary Angle."""

SPLIT_SYNONYMS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "validation", "validate", "valid", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
}

_COUNTED_BYTES = 1 << 24

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
        extra: other columns that it gives.
    """

    root: Path
    samples: tuple[Sample, ...]
    set_aside: tuple[SetAside, ...]
    split_rule: str
    leaks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("image", "mask")
    extra: tuple[str, ...] = ()


def read_manifest(
    path: Path,
    columns: Path | None = None,
    *,
    seed: int = 0,
    by_id: bool = False,
    mask_columns: Sequence[str] = (),
) -> Manifest:
    """Read a CSV, or a folder with ``images/`` and ``masks/`` matched by their stems.

    No picture is opened; ``probe`` does that.

    Args:
        path: a CSV (comma, semicolon or tab) with a header; a folder with a ``manifest.csv``, which
            then speaks for it; or a folder of pictures.
        columns: a ``columns.toml`` that says which column is what.
        seed: of the split by groups, where the manifest has none.
        by_id: whether a row may have an id in place of an image, for samples that a store has
            already; its ``source`` is then empty.
        mask_columns: columns of a CSV, or folders beside ``images/``, whose files each sample's
            ``masks`` shall name.

    Raises:
        ManifestError: the manifest as a whole cannot be used; nothing is set aside for that.
    """
    if path.is_dir() and (path / "manifest.csv").is_file():
        path = path / "manifest.csv"
    if path.is_dir():
        if columns is not None:
            raise ManifestError(
                f"{path} is a folder, which has no columns; leave {columns.name} out or give a CSV"
            )
        return _read_folder(path, seed, mask_columns)
    return _read_csv(path, columns, seed, by_id, mask_columns)


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
    return _with_splits(root, samples, [""] * len(samples), set_aside, "", seed)


def _pictures(folder: Path, root: Path, *, deep: bool = True) -> dict[str, list[str]]:
    """Return picture names relative to ``root`` by their path in ``folder`` without suffix."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        is_hidden = path.name.startswith(".")
        if path.suffix.lower() in SUFFIXES and not is_hidden and path.is_file():
            stem = path.relative_to(folder).with_suffix("").as_posix()
            found[stem].append(path.relative_to(root).as_posix())
    return dict(found)


def _read_csv(
    path: Path,
    columns: Path | None,
    seed: int,
    by_id: bool,
    mask_columns: Sequence[str] = (),
) -> Manifest:
    # The reader of CSV splits lines itself, as a quoted cell may hold some.
    with _saying_path(path), path.open(encoding="utf-8-sig", newline="") as file:
        return _read_lines(file, path, columns, seed, by_id, mask_columns)


def _read_lines(
    lines: Iterable[str],
    path: Path,
    columns: Path | None,
    seed: int,
    by_id: bool,
    mask_columns: Sequence[str] = (),
) -> Manifest:
    """Resolve a CSV's lines, one after the other: the whole text may be large."""
    header, rows = _read_rows(lines, path)
    column_map = map_columns(header, columns, path.name, by_id=by_id)
    for name in mask_columns:
        if name not in header:
            raise ManifestError(
                f"{path}: no column {name!r} with masks; it has {', '.join(header)}"
            )
    root = path.parent.absolute()
    reader = RowReader(column_map, root)

    samples: list[Sample] = []
    set_aside: list[SetAside] = []
    # What stands in many rows is kept once.
    shared: dict[Any, Any] = {}
    line_of: dict[str, int] = {}
    for line, cells in rows:
        row = dict(zip(header, cells, strict=True))
        source = given_id = ""
        try:
            given_id = reader.value(row, "id")
            image = reader.value(row, "image")
            if image:
                source, _ = reader.resolve(image)
            elif not (by_id and given_id):
                what = "image and no id" if by_id else "image"
                raise ImageError(f"no {what}; fill the cell or remove the row")
            fields = _fields(reader, row, column_map, shared)
            if mask_columns:
                files = [row[column] for column in mask_columns]
                fields["masks"] = tuple(reader.resolve(f) if f else None for f in files)
            split = reader.value(row, "split")
        except ImageError as error:
            row_id = given_id or f"line {line}"
            reason = f"line {line}: {error}" if column_map.hash_paths else str(error)
            set_aside.append(SetAside(row_id, source, reason))
            _claim(line_of, [row_id], line, path.name)
            continue
        ids = [given_id] if given_id else _derived_ids(fields)
        row_id = _claim(line_of, ids, line, path.name)
        named_line = line if column_map.hash_paths else None
        split = shared.setdefault(split, split)
        samples.append(Sample(row_id, root=root, split=split, line=named_line, **fields))
    splits = [sample.split for sample in samples]
    if not samples and not set_aside:
        raise ManifestError(f"{path}: no rows; expected a header and a row a sample")
    if not samples:
        raise ManifestError(
            f"{path}: none of its {len(set_aside)} rows can be used; the first: "
            f"{set_aside[0].reason}"
        )
    source_of_split = column_map.fields.get("split")
    where = ""
    if source_of_split is not None:
        column = source_of_split.column
        where = f"constant {splits[0]!r}" if column is None else f"column {column!r}"
    manifest = _with_splits(root, samples, splits, set_aside, where, seed)
    given = {n for n, entry in column_map.fields.items() if entry.column or entry.constant}
    if not any(splits):
        given.discard("split")
    return replace(manifest, fields=tuple(sorted(given)), extra=column_map.extra)


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
    """Return the CSV that speaks for a path; None for a folder of pictures."""
    if path.is_dir():
        return path / "manifest.csv" if (path / "manifest.csv").is_file() else None
    return path


def count_rows(path: Path) -> int:
    """Count the rows of a CSV below its header, blank ones too, without reading their cells.

    Raises:
        ManifestError: when the file cannot be read.
    """
    num_lines, in_quotes, last = 0, 0, b"\n"
    with _saying_path(path), path.open("rb") as file:
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
        return ManifestSample(num_rows, _read_csv(path, columns, seed, by_id=False))
    with _saying_path(path), path.open("rb") as file:
        header = file.readline()
        begin, end = file.tell(), path.stat().st_size
        lines = {}
        for number in range(num_samples):
            file.seek(max(begin, begin + (end - begin) * number // num_samples - 1))
            if file.tell() > begin or number:
                file.readline()  # the rest of a row
            lines[file.tell()] = file.readline()
        text = b"".join([header, *(line for _, line in sorted(lines.items()))]).decode("utf-8-sig")
    manifest = _read_lines(io.StringIO(text, newline=""), path, columns, seed, by_id=False)
    return ManifestSample(num_rows, manifest)


@contextmanager
def _saying_path(path: Path) -> Iterator[None]:
    """Turn what a system says of a file into what is wrong with a manifest."""
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file or folder; check the path") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise ManifestError(
            f"{path}: not UTF-8 text{_where_not_utf8(path)}; expected a CSV; save it as 'CSV UTF-8'"
        ) from None


def _where_not_utf8(path: Path) -> str:
    """Say which byte is no UTF-8: read by parts, a decoder tells its place in the part."""
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f" (byte {error.start})"
    return ""


def _read_rows(
    lines: Iterable[str], path: Path
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return the header, and (line, cells) of the rows that are not blank."""
    lines = iter(lines)
    first_line = next(lines, "")
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.reader(chain([first_line], lines), delimiter=delimiter)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if not any(cells):
                    continue
                if any(cells[len(header) :]):
                    raise ManifestError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells under "
                        f"{len(header)} columns; quote cells that contain {delimiter!r}"
                    )
                cells += [""] * (len(header) - len(cells))
                yield reader.line_num, cells[: len(header)]
        except csv.Error as error:
            raise ManifestError(f"{path}: line {reader.line_num} is not CSV ({error})") from None

    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ManifestError(f"{path}: line {reader.line_num} is not CSV ({error})") from None
    if not any(header):
        raise ManifestError(f"{path}: no rows; expected a header and a row a sample")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ManifestError(f"{path}: two columns are called {twice[0]!r}; rename one")
    return header, rows()


def _fields(
    reader: RowReader, row: dict[str, str], column_map: ColumnMap, shared: dict[Any, Any]
) -> dict[str, Any]:
    """Resolve one row, all but its id, line and split; without an image its source is empty."""
    image = reader.value(row, "image")
    source, image_location = reader.resolve(image) if image else ("", None)
    mask_text = reader.value(row, "mask")
    mask, mask_location = reader.resolve(mask_text) if mask_text else (None, None)
    group = reader.value(row, "group") or source
    others = tuple(_portable(row[column], reader) for column in column_map.extra)
    if others not in shared:
        shared[others] = dict(zip(column_map.extra, others, strict=True))
    fields = {
        "source": source,
        "frame": _frame(reader.value(row, "frame")),
        "mask": mask,
        "primary_angle_deg": _angle("primary", reader.value(row, "primary_angle")),
        "secondary_angle_deg": _angle("secondary", reader.value(row, "secondary_angle")),
        "group": group,
        "extra": shared[others],
        "image_location": image_location,
        "mask_location": mask_location,
    }
    for name in ("mask", "primary_angle_deg", "secondary_angle_deg", "group"):
        value = fields[name]
        # A sign of zero is kept, though zeros are equal.
        if value != 0:
            fields[name] = shared.setdefault(value, value)
    return fields


def _portable(cell: str, reader: RowReader) -> str:
    """Keep other columns as they are, but for paths of this machine."""
    return reader.resolve(cell)[0] if is_absolute(cell) else cell


def _frame(text: str) -> int | None:
    if not text:
        return None
    try:
        number = float(text)  # tables with gaps write 12 as 12.0
    except ValueError:
        number = -1.0
    if number < 0 or not number.is_integer():
        raise ImageError(f"frame {text!r}: expected a whole number from 0, or nothing for a still")
    return int(number)


def _angle(which: str, text: str) -> float | None:
    """Return degrees, or None for an empty cell."""
    if not text:
        return None
    limit = MAX_ANGLE_DEG[which]
    try:
        angle_deg = float(text)
    except ValueError:
        angle_deg = float("nan")
    if angle_deg != angle_deg:
        raise ImageError(
            f"{which} angle {text!r} is not a number; expected degrees in [-{limit}, {limit}], or "
            "nothing when it is unknown"
        )
    if abs(angle_deg) > limit:
        raise ImageError(
            f"{which} angle {text} is outside [-{limit}, {limit}] degrees; correct it, or empty "
            "the cell when it is unknown"
        )
    return angle_deg


def _derived_ids(fields: dict[str, Any]) -> list[str]:
    """Return ids to try for a row without one: image and frame; then the mask's name with them."""
    plain = PurePosixPath(fields["source"]).with_suffix("").as_posix()
    if fields["frame"] is not None:
        plain += f"#{fields['frame']}"
    mask = fields["mask"]
    return [plain] if mask is None else [plain, f"{plain}@{PurePosixPath(mask).stem}"]


def _claim(line_of: dict[str, int], candidates: Sequence[str], line: int, manifest: str) -> str:
    """Return the first id that no earlier row has."""
    for candidate in candidates:
        if candidate not in line_of:
            line_of[candidate] = line
            return candidate
    taken = candidates[-1]
    raise ManifestError(
        f"{manifest}: lines {line_of[taken]} and {line} both have the id {taken!r}; make ids "
        "unique, or remove the row that is there twice"
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
