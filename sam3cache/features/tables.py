"""The Parquet tables of a store: who is in which row, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sam3cache.errors import CorruptStoreError
from sam3cache.runtime import write_atomic

Status = Literal["pending", "ok", "aside", "removed"]

SAMPLES_FILE = "samples.parquet"
ANNOTATIONS_FILE = "annotations.parquet"
LABEL_ROWS_FILE = "rows.parquet"
EXTRA_PREFIX = "extra."

_SAMPLES_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("frame", pa.int64()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("num_channels", pa.int32()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("pixel_sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("base_id", pa.string()),
        ("variant", pa.string()),
    ]
)
_ANNOTATIONS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("primary_angle_deg", pa.float64()),
        ("secondary_angle_deg", pa.float64()),
    ]
)
_LABEL_ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("present", pa.bool_()),
        ("source", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One line of samples.parquet; docs/format.md says what each column means."""

    row: int
    id: str
    source: str
    frame: int | None = None
    height_px: int = 0
    width_px: int = 0
    num_channels: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    pixel_sha256: str = ""
    status: Status = "pending"
    reason: str = ""
    base_id: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class AnnotationRow:
    """One line of annotations.parquet: what may be corrected without touching a feature."""

    row: int
    id: str
    split: str
    group: str
    primary_angle_deg: float | None = None
    secondary_angle_deg: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One line of a label set's rows.parquet: a mask's own size and where it came from."""

    row: int
    height_px: int = 0
    width_px: int = 0
    present: bool = False
    source: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0


def write_samples(root: Path, rows: Iterable[SampleRow]) -> None:
    """Replace samples.parquet."""
    _write(root / SAMPLES_FILE, pa.table(_columns(list(rows), _SAMPLES_SCHEMA)))


def read_samples(root: Path) -> list[SampleRow]:
    """Read samples.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    table = _read(root / SAMPLES_FILE, _SAMPLES_SCHEMA)
    return list(map(SampleRow, *_values(table, _SAMPLES_SCHEMA)))


def write_annotations(root: Path, rows: Sequence[AnnotationRow]) -> None:
    """Replace annotations.parquet; every name in any row's ``extra`` becomes a column."""
    names = sorted({name for row in rows for name in row.extra})
    columns = _columns(rows, _ANNOTATIONS_SCHEMA)
    for name in names:
        columns[EXTRA_PREFIX + name] = pa.array([r.extra.get(name) for r in rows], pa.string())
    _write(root / ANNOTATIONS_FILE, pa.table(columns))


def read_annotations(root: Path) -> list[AnnotationRow]:
    """Read annotations.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    table = _read(root / ANNOTATIONS_FILE, _ANNOTATIONS_SCHEMA)
    names = [name for name in table.column_names if name.startswith(EXTRA_PREFIX)]
    keys = [name.removeprefix(EXTRA_PREFIX) for name in names]
    lines = zip(*(table[name].to_pylist() for name in names), strict=True)
    extras: Iterable[dict[str, str]] = (
        {key: text for key, text in zip(keys, line, strict=True) if text is not None}
        for line in lines
    )
    if not names:
        extras = ({} for _ in range(table.num_rows))
    return list(map(AnnotationRow, *_values(table, _ANNOTATIONS_SCHEMA), extras))


def write_label_rows(folder: Path, rows: Iterable[LabelRow]) -> None:
    """Replace a label set's rows.parquet, in row order."""
    # Receipts come in the order in which blocks were done.
    lines = sorted(rows, key=lambda row: row.row)
    _write(folder / LABEL_ROWS_FILE, pa.table(_columns(lines, _LABEL_ROWS_SCHEMA)))


def read_label_rows(folder: Path) -> dict[int, LabelRow]:
    """Read a label set's rows.parquet, by row.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    table = _read(folder / LABEL_ROWS_FILE, _LABEL_ROWS_SCHEMA)
    return {row.row: row for row in map(LabelRow, *_values(table, _LABEL_ROWS_SCHEMA))}


def _columns(rows: Sequence[Any], schema: pa.Schema) -> dict[str, pa.Array]:
    return {
        name: pa.array([getattr(row, name) for row in rows], type_)
        for name, type_ in zip(schema.names, schema.types, strict=True)
    }


def _values(table: pa.Table, schema: pa.Schema) -> list[list[Any]]:
    """Return the columns in the schema's order, which is that of the row classes' fields."""
    return [table[name].to_pylist() for name in schema.names]


def _write(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    # The seal hashes the tables; until there is one, a page's own checksum finds damage.
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomic(path, memoryview(sink.getvalue()))


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table that has the columns of ``schema``, and beside them only ``extra.`` ones."""
    # Through bytes: a memory-mapped table could not be replaced on Windows while it is open.
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path, "it is missing") from None
    try:
        # In this thread alone: one of Arrow's own that lets go of our bytes while the program ends
        # asks for Python's lock, and the process aborts (pq.read_table keeps such threads).
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        table.validate(full=True)
        fixed = [field for field in table.schema if not field.name.startswith(EXTRA_PREFIX)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow says of most damage that it could not be read from disk: OSError.
        raise _unreadable(path, str(error).partition("\n")[0]) from None
    if not pa.schema(fixed).equals(schema):
        raise _unreadable(path, "its columns are not those of such a table")
    return table


def _unreadable(path: Path, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} cannot be read ({reason}); run `sam3cache store verify --repair` on the store, "
        "restore the file, or extract into a new store"
    )
