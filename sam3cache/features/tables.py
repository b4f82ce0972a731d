"""The Parquet tables of a store: who is in which row, and what is known of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sam3cache.errors import CorruptStoreError
from sam3cache.features.lazy import LazySequence
from sam3cache.features.places import Place, write_atomic
from sam3cache.records import CONTRAST, MEMBER_MARK

Status = Literal["pending", "ok", "aside", "removed"]

SAMPLES_FILE = "samples.parquet"
ANNOTATIONS_FILE = "annotations.parquet"
LABEL_ROWS_FILE = "rows.parquet"
EXTRA_PREFIX = "extra."

Row = TypeVar("Row")

# Lines that are made into objects together, and how many such parts of a table are remembered.
_CHUNK_ROWS, _NUM_CHUNKS = 512, 16
_BATCH_ROWS = 4096
_NUM_SHARED = 4096

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
VARIANT_COLUMN = _SAMPLES_SCHEMA.get_field_index("variant")
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


def num_replaced(removed: Sequence[SampleRow], living: Iterable[tuple[str, str]]) -> int:
    """Count tombstones whose sample lives on in another row: it was changed, or mended.

    Its id tells. A row that never held features may have had no id of its own: of such a one, the
    only living row of the same file is taken for the same sample.

    Args:
        removed: rows that are tombstones, or become them.
        living: id and source of every other row.
    """
    ids = {row.id for row in removed}
    files = {_file_of(row.source) for row in removed if row.source and not row.pixel_sha256}
    living_ids: set[str] = set()
    num_living: Counter[str] = Counter()
    for sample_id, source in living:
        if sample_id in ids:
            living_ids.add(sample_id)
        if files and _file_of(source) in files:
            num_living[_file_of(source)] += 1
    return sum(
        row.id in living_ids or (not row.pixel_sha256 and num_living[_file_of(row.source)] == 1)
        for row in removed
    )


def _file_of(source: str) -> str:
    """Return a source without the frame that is looked for, which may not have been known yet."""
    return source.removesuffix(MEMBER_MARK + CONTRAST)


class Rows(LazySequence[Row]):
    """The lines of a table, made into objects as they are asked for: a tenth of their memory.

    Lines near one another are made together, so go through them in order where you can.
    """

    def __init__(self, columns: Sequence[pa.Array], make: Callable[..., Row]) -> None:
        """Take the columns, in the order of ``make``'s arguments."""
        self._columns, self._num_rows = columns, len(columns[0])
        self._make = make
        self._chunk = lru_cache(_NUM_CHUNKS)(self._make_chunk)

    def __len__(self) -> int:
        return self._num_rows

    def item(self, place: int) -> Row:
        """Return a line."""
        return self._chunk(place // _CHUNK_ROWS)[place % _CHUNK_ROWS]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _CHUNK_ROWS):
            yield from self._chunk(start // _CHUNK_ROWS)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(ours == theirs for ours, theirs in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def single(self, index: int) -> Row:
        """Return a line that is not near the last one; slower than going through them in order."""
        return self._make(*(column[index].as_py() for column in self._columns))

    def _make_chunk(self, number: int) -> list[Row]:
        columns = (c.slice(number * _CHUNK_ROWS, _CHUNK_ROWS).to_pylist() for c in self._columns)
        return list(map(self._make, *columns))

    def num_known(self, number: int) -> int:
        """Return how many lines have a value in a column."""
        return len(self) - int(self._columns[number].null_count)

    def column(self, number: int) -> NDArray[Any]:
        """Return a column of numbers without gaps, or of texts as objects."""
        values: NDArray[Any] = self._columns[number].to_numpy(zero_copy_only=False)
        return values


def write_samples(root: Place, rows: Iterable[SampleRow]) -> None:
    """Replace samples.parquet."""
    _write(root / SAMPLES_FILE, _table(rows, _SAMPLES_SCHEMA))


def read_samples(root: Place) -> list[SampleRow]:
    """Read samples.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return list(scan_samples(root))


def scan_samples(root: Place) -> Rows[SampleRow]:
    """Read samples.parquet in row order, to be made into objects when asked for.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return Rows(_values(_read(root / SAMPLES_FILE, _SAMPLES_SCHEMA), _SAMPLES_SCHEMA), SampleRow)


def write_annotations(root: Place, rows: Iterable[AnnotationRow]) -> None:
    """Replace annotations.parquet; every name in any row's ``extra`` becomes a column."""
    names = sorted({name for row in rows for name in row.extra})
    _write(root / ANNOTATIONS_FILE, _table(rows, _ANNOTATIONS_SCHEMA, names))


def read_annotations(root: Place) -> list[AnnotationRow]:
    """Read annotations.parquet in row order.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return list(scan_annotations(root))


def scan_annotations(root: Place) -> Iterator[AnnotationRow]:
    """Go through annotations.parquet in row order, without ever holding the whole of it.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    path = root / ANNOTATIONS_FILE
    shared: dict[tuple[str | None, ...], Mapping[str, str]] = {}
    for batch in _batches(path, _ANNOTATIONS_SCHEMA):
        names = [name for name in batch.schema.names if name.startswith(EXTRA_PREFIX)]
        keys = [name.removeprefix(EXTRA_PREFIX) for name in names]
        columns = (batch.column(name).to_pylist() for name in (*_ANNOTATIONS_SCHEMA.names, *names))
        for row, id_, split, group, primary, secondary, *texts in zip(*columns, strict=True):
            others = tuple(texts)
            extra = shared.get(others)
            if extra is None:
                extra = {k: text for k, text in zip(keys, others, strict=True) if text is not None}
                # Other columns tend to hold a few values over and over.
                if len(shared) < _NUM_SHARED:
                    shared[others] = extra
            yield AnnotationRow(row, id_, split, group, primary, secondary, extra)


def write_label_rows(folder: Place, rows: Iterable[LabelRow]) -> None:
    """Replace a label set's rows.parquet; the rows are in row order."""
    _write(folder / LABEL_ROWS_FILE, _table(rows, _LABEL_ROWS_SCHEMA))


def read_label_rows(folder: Place) -> dict[int, LabelRow]:
    """Read a label set's rows.parquet, by row.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    return {row.row: row for row in scan_label_rows(folder)}


def scan_label_rows(folder: Place) -> Rows[LabelRow]:
    """Read a label set's rows.parquet in row order, to be made into objects when asked for.

    Raises:
        CorruptStoreError: when the table cannot be read.
    """
    table = _read(folder / LABEL_ROWS_FILE, _LABEL_ROWS_SCHEMA)
    return Rows(_values(table, _LABEL_ROWS_SCHEMA), LabelRow)


def _table(rows: Iterable[Any], schema: pa.Schema, extra: Sequence[str] = ()) -> pa.Table:
    """Return a table of rows, some at a time: there may be more of them than fit as objects."""
    schema = pa.schema([*schema, *((EXTRA_PREFIX + name, pa.string()) for name in extra)])
    num_fixed = len(schema) - len(extra)
    batches = []
    for chunk in _chunks(rows):
        columns = [
            pa.array([getattr(row, field.name) for row in chunk], field.type)
            for field in list(schema)[:num_fixed]
        ]
        columns += [pa.array([row.extra.get(name) for row in chunk], pa.string()) for name in extra]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk


def _values(table: pa.Table, schema: pa.Schema) -> list[pa.Array]:
    """Return the columns in the schema's order, which is that of the row classes' fields."""
    return [_whole(table[name]) for name in schema.names]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _write(path: Place, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    # The seal hashes the tables; until there is one, a page's own checksum finds damage.
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomic(path, memoryview(sink.getvalue()))
    pa.default_memory_pool().release_unused()


def _read(path: Place, schema: pa.Schema) -> pa.Table:
    """Read a table that has the columns of ``schema``, and beside them only ``extra.`` ones."""
    with _opened(path, schema) as file:
        # In this thread alone: one of Arrow's own that lets go of our bytes while the program ends
        # asks for Python's lock, and the process aborts (pq.read_table keeps such threads).
        table = file.read(use_threads=False)
        table.validate(full=True)
    # Arrow would keep what decoding took, several times the table, for later.
    pa.default_memory_pool().release_unused()
    return table


def _batches(path: Place, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read such a table some lines at a time."""
    with _opened(path, schema) as file:
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            batch.validate(full=True)
            yield batch


@contextmanager
def _opened(path: Place, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    """Open a table and check its columns; what Arrow finds wrong with it is ours to say."""
    # Through bytes: a memory-mapped table could not be replaced on Windows while it is open.
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path, "it is missing") from None
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            fixed = [f for f in file.schema_arrow if not f.name.startswith(EXTRA_PREFIX)]
            if not pa.schema(fixed).equals(schema):
                raise _unreadable(path, "its columns are not those of such a table")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow says of most damage that it could not be read from disk: OSError.
        raise _unreadable(path, str(error).partition("\n")[0]) from None


def _unreadable(path: Place, reason: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} cannot be read ({reason}); run `sam3cache store verify --repair` on the store, "
        "restore the file, or extract into a new store"
    )
