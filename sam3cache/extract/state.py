"""What a store says of itself at one moment, read once however often it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sam3cache.errors import StoreError
from sam3cache.extract.rows import StoredRows
from sam3cache.features import (
    AnnotationRow,
    FeatureStore,
    LabelRow,
    Place,
    ReceiptsOnDemand,
    RowsWithFacts,
    SampleRow,
    is_sealed,
    label_rows_of,
    open_store,
    read_description,
    scan_annotations,
    scan_receipts,
    scan_samples,
    stamp,
)

_MAX_READS = 3
_STATED_IN = (
    "zarr.json",
    "samples.parquet",
    "annotations.parquet",
    "complete.json",
    "receipts/folded.json",
)


@dataclass(frozen=True)
class StoreState:
    """The tables and receipts of a store, as they were when :meth:`read` was called.

    Attributes:
        root: the store's folder.
        description: what its zarr.json says; None when there is no store yet.
        opened: the store, where it is sealed; None while it is being worked on.
        receipts: what is done.
        rows: the whole table of samples, with the receipts' facts merged in.
        label_set: the label set whose masks are looked at.
        stamp: changes whenever a file changes that this was read from.
    """

    root: Place
    description: dict[str, Any] | None
    opened: FeatureStore | None
    receipts: ReceiptsOnDemand
    rows: Sequence[SampleRow]
    label_set: str
    stamp: frozenset[tuple[object, ...]]

    @classmethod
    def read(cls, root: Place, label_set: str) -> StoreState:
        """Read a store, or the absence of one.

        Raises:
            CorruptStoreError: when a table or receipt cannot be read, or a sealed store is not as
                it was sealed.
            NotAStoreError: when zarr.json is not ours.
        """
        for _ in range(_MAX_READS):
            # The stamp first: what changes while we read shows at the next look.
            before = _stamp(root)
            try:
                return cls._read(root, label_set, before)
            except StoreError:
                # Another launch may have sealed the store, or begun on it, between two reads.
                if before == _stamp(root):
                    raise
        return cls._read(root, label_set, _stamp(root))

    @classmethod
    def _read(cls, root: Place, label_set: str, stamp: frozenset[tuple[object, ...]]) -> StoreState:
        if not (root / "zarr.json").exists():
            return cls(root, None, None, ReceiptsOnDemand.none(), (), label_set, stamp)
        description = read_description(root)
        if is_sealed(root):
            # Refuses a store whose metadata or tables were changed behind our back.
            opened = open_store(root)
            rows = opened.sample_rows
            return cls(root, description, opened, opened.receipts, rows, label_set, stamp)
        receipts = scan_receipts(root)
        rows = RowsWithFacts(scan_samples(root), receipts)
        return cls(root, description, None, receipts, rows, label_set, stamp)

    @property
    def sealed(self) -> bool:
        """Whether the store is complete."""
        return self.opened is not None

    @property
    def is_current(self) -> bool:
        """Whether the store is still as it was read."""
        return self.stamp == _stamp(self.root)

    @property
    def is_described_so(self) -> bool:
        """Whether the store is as it was read, but for blocks that may have been done meanwhile."""
        stated = {part for part in self.stamp if part[0] in _STATED_IN}
        return stated == stamp(self.root, _STATED_IN)

    @cached_property
    def masks(self) -> Mapping[int, LabelRow]:
        """By row, the file that each stored mask came from."""
        if self.description is None or self.label_set not in self.description["label_sets"]:
            return {}
        if self.opened is not None:
            return self.opened.label_rows(self.label_set)
        return label_rows_of(self.label_set, self.receipts)

    @cached_property
    def stored(self) -> StoredRows:
        """The table, to be searched by file."""
        return StoredRows(self.rows, self.masks)

    def annotations(self) -> Iterable[AnnotationRow]:
        """Go through what may be corrected, of every row that is not a tombstone, in row order."""
        return () if self.description is None else scan_annotations(self.root)

    def redescribed(self, rows: Sequence[SampleRow]) -> StoreState:
        """Return the state of the store once its description has been written anew.

        Args:
            rows: the table that was written.
        """
        description = read_description(self.root)
        return replace(
            self,
            description=description,
            opened=None,
            rows=rows,
            stamp=_stamp(self.root),
        )


def _stamp(root: Place) -> frozenset[tuple[object, ...]]:
    # A receipt is replaced as a whole: names and times tell.
    return stamp(root, _STATED_IN, "receipts/*/*.json")
