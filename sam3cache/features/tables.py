"""The Parquet tables of a store: who is in which row, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    _write(root / SAMPLES_FILE, pa.Table.from_pylist([asdict(r) for r in rows], _SAMPLES_SCHEMA))


def read_samples(root: Path) -> list[SampleRow]:
    """Read samples.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return [SampleRow(**line) for line in _read(root / SAMPLES_FILE)]


def write_annotations(root: Path, rows: Sequence[AnnotationRow]) -> None:
    """Replace annotations.parquet; every name in any row's ``extra`` becomes a column."""
    names = sorted({name for row in rows for name in row.extra})
    columns: dict[str, pa.Array] = {
        "row": pa.array([r.row for r in rows], pa.int64()),
        "id": pa.array([r.id for r in rows], pa.string()),
        "split": pa.array([r.split for r in rows], pa.string()),
        "group": pa.array([r.group for r in rows], pa.string()),
        "primary_angle_deg": pa.array([r.primary_angle_deg for r in rows], pa.float64()),
        "secondary_angle_deg": pa.array([r.secondary_angle_deg for r in rows], pa.float64()),
    }
    for name in names:
        columns[EXTRA_PREFIX + name] = pa.array([r.extra.get(name) for r in rows], pa.string())
    _write(root / ANNOTATIONS_FILE, pa.table(columns))


def read_annotations(root: Path) -> list[AnnotationRow]:
    """Read annotations.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    rows = []
    for line in _read(root / ANNOTATIONS_FILE):
        extra = {
            name.removeprefix(EXTRA_PREFIX): line.pop(name)
            for name in list(line)
            if name.startswith(EXTRA_PREFIX)
        }
        rows.append(AnnotationRow(**line, extra={k: v for k, v in extra.items() if v is not None}))
    return rows


def write_label_rows(folder: Path, rows: Iterable[LabelRow]) -> None:
    """Replace a label set's rows.parquet."""
    table = pa.Table.from_pylist([asdict(r) for r in rows], _LABEL_ROWS_SCHEMA)
    _write(folder / LABEL_ROWS_FILE, table)


def read_label_rows(folder: Path) -> dict[int, LabelRow]:
    """Read a label set's rows.parquet, by row.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return {line["row"]: LabelRow(**line) for line in _read(folder / LABEL_ROWS_FILE)}


def _write(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, memoryview(sink.getvalue()))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # Through bytes: a memory-mapped table could not be replaced on Windows while it is open.
        # In this thread alone: one of Arrow's own that lets go of our bytes while the program ends
        # asks for Python's lock, and the process aborts (pq.read_table keeps such threads).
        with pq.ParquetFile(pa.BufferReader(path.read_bytes())) as file:
            table = file.read(use_threads=False)
        lines: list[dict[str, Any]] = table.to_pylist()
        return lines
    except (FileNotFoundError, pa.ArrowException) as error:
        raise CorruptStoreError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); restore it, or extract into a "
            "new store"
        ) from None
