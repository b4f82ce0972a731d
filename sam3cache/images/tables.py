"""What readers hand over: rows of text cells, whatever they were read from."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from sam3cache.errors import ManifestError, NoManifestError

SPLIT_SYNONYMS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "validation", "validate", "valid", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
}

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Table:
    """A manifest as rows of cells, to be understood as those of a CSV are.

    Attributes:
        path: what it was read from.
        root: folder that its paths are relative to.
        header: names of its columns.
        rows: number and cells of each, as many as columns; numbered as its reader finds them again.
        unit: what these numbers count, as "line".
        defaults: by field, the column it is unless ``columns.toml`` says another.
        unkept: columns that are not kept beside the samples unless asked for.
        notes: what is to be told of it, a sentence each; complete when all rows have been taken.
    """

    path: Path
    root: Path
    header: Sequence[str]
    rows: Iterable[tuple[int, list[str]]]
    unit: str = "row"
    defaults: Mapping[str, str] = field(default_factory=dict)
    unkept: Collection[str] = ()
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.path.name


def cell(value: Any) -> str:
    """Return a value of a binary table as the text of a cell; empty for none, and for NaN."""
    if value is None:
        return ""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return str(value).strip()


@contextmanager
def saying_path(path: Path) -> Iterator[None]:
    """Turn what a system says of a file into what is wrong with a manifest.

    Raises:
        ManifestError: in place of an OSError.
    """
    try:
        yield
    except FileNotFoundError:
        raise NoManifestError(f"{path}: no such file or folder; check the path") from None
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


def read_csv_rows(lines: Iterable[str], path: Path) -> Table:
    """Return a CSV's lines as a table of the rows that are not blank.

    Raises:
        ManifestError: when they are no CSV; of a later line, when that is come to.
    """
    lines = iter(lines)
    first_line = next(lines, "")
    if "\0" in first_line:
        # Not shown: what it is instead may name a person.
        raise ManifestError(
            f"{path}: neither a table nor a container of pictures; expected CSV, Parquet, HDF5, "
            ".npz, COCO or DICOM, or a folder"
        )
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
    return Table(path, path.parent.absolute(), header, rows(), "line")


@contextmanager
def parquet_table(path: Path, columns: Path | None) -> Iterator[Table]:
    """Open a Parquet file whose columns are those of a CSV; lists and the like are left out.

    Raises:
        ManifestError: when it is none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    del columns
    try:
        with parquet.ParquetFile(path) as file:
            kept = [f.name for f in file.schema_arrow if not pa.types.is_nested(f.type)]
            twice = sorted({name for name in kept if kept.count(name) > 1})
            if twice:
                raise ManifestError(f"{path}: two columns are called {twice[0]!r}; rename one")

            def rows() -> Iterator[tuple[int, list[str]]]:
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS, columns=kept):
                    for cells in zip(*(batch[name].to_pylist() for name in kept), strict=True):
                        number += 1
                        yield number, [cell(value) for value in cells]

            yield Table(path, path.parent.absolute(), kept, rows())
    # A time beyond what Python can tell is an OverflowError.
    except (pa.ArrowException, ValueError, ArithmeticError) as error:
        if isinstance(error, ManifestError):
            raise
        reason = " ".join(str(error).split())[:80]
        raise ManifestError(f"{path}: damaged Parquet ({reason}); write it again") from None
