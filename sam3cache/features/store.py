"""Reading a feature store.

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import (
    CorruptStoreError,
    MissingSampleError,
    NotAStoreError,
    StoreError,
    UnsealedStoreError,
)
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import (
    BLOCK_ROWS,
    LABEL_TILE_PX,
    LabelSetSpec,
    LevelSpec,
    ShardGrid,
)
from sam3cache.features.receipts import (
    SAMPLES_ITEM,
    Receipt,
    ReceiptKey,
    check_seal,
    is_sealed,
    read_receipts,
)
from sam3cache.features.shards import ShardReader
from sam3cache.features.tables import (
    AnnotationRow,
    LabelRow,
    SampleRow,
    read_annotations,
    read_label_rows,
    read_samples,
)
from sam3cache.records import SetAside

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample whose features are in the store.

    Attributes:
        row: its row in every level.
        id: from the manifest.
        source: path of the image relative to the manifest's folder.
        frame: index into a cine, or None for a still.
        height_px: of the picture.
        width_px: of the picture.
        pixel_sha256: of the decoded 8-bit pixels.
        primary_angle_deg: LAO positive; NaN when unknown.
        secondary_angle_deg: cranial positive; NaN when unknown.
        split: "train", "val" or "test".
        group: samples of one group are never in two splits.
        extra: the manifest's other columns.
    """

    row: int
    id: str
    source: str
    frame: int | None
    height_px: int
    width_px: int
    pixel_sha256: str
    primary_angle_deg: float
    secondary_angle_deg: float
    split: str
    group: str
    extra: Mapping[str, str] = field(default_factory=dict)


def open_store(path: str | Path, *, allow_unsealed: bool = False) -> FeatureStore:
    """Open a store for reading and check its seal.

    Args:
        path: the store's folder.
        allow_unsealed: read what an unfinished extraction has committed so far.

    Raises:
        NotAStoreError: when ``path`` holds no feature store.
        UnsealedStoreError: when extraction has not finished, unless ``allow_unsealed``.
        CorruptStoreError: when the metadata or tables are not what the store was sealed with.
        StoreError: when the store's format is newer than this reader.
    """
    root = Path(path)
    description = read_description(root)
    sealed = is_sealed(root)
    if not sealed and not allow_unsealed:
        raise UnsealedStoreError(
            f"{root} is not sealed: its extraction has not finished; run the same "
            "`sam3cache extract` again, or pass --allow-unsealed to use what is there"
        )
    receipts = check_seal(root) if sealed else read_receipts(root)
    return FeatureStore(root, description, receipts, sealed=sealed)


def read_description(root: Path) -> dict[str, Any]:
    """Return what the group's zarr.json says of the store.

    Raises:
        NotAStoreError: when there is no such file, or it is not ours.
        StoreError: when the format is newer than this code.
    """
    path = root / "zarr.json"
    try:
        description = json.loads(path.read_bytes())["attributes"]["sam3cache"]
        version = int(description["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a feature store (no zarr.json in it)" if root.exists() else "does not exist"
        raise NotAStoreError(
            f"{root} {what}; give the folder that `sam3cache extract MANIFEST -o FOLDER` wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise NotAStoreError(
            f"{root} is not a feature store of sam3cache (its zarr.json does not describe one); "
            "give the folder that `sam3cache extract -o` wrote"
        ) from None
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{root} has format version {version}, this sam3cache reads up to {FORMAT_VERSION}; "
            "upgrade sam3cache"
        )
    result: dict[str, Any] = description
    return result


class FeatureStore:
    """A store opened for reading; safe to use from several threads.

    Attributes:
        path: the store's folder.
        sealed: whether its extraction has finished.
        settings: provenance: backbone, batch size, device model, versions, resize mode.
        levels: by name.
        label_sets: by name.
    """

    def __init__(
        self,
        path: Path,
        description: Mapping[str, Any],
        receipts: Mapping[ReceiptKey, Receipt],
        *,
        sealed: bool,
    ) -> None:
        self.path = path
        self.sealed = sealed
        self.settings: dict[str, Any] = dict(description["settings"])
        self._fingerprints = {
            name: Fingerprint(level["fingerprint"]) for name, level in description["levels"].items()
        }
        self.levels = {name: _level_spec(path, name) for name in description["levels"]}
        self.label_sets = {
            name: read_label_set_spec(path, name) for name in description["label_sets"]
        }
        self._receipts = receipts
        self._shard_sizes = {
            shard.key: shard.size_bytes for receipt in receipts.values() for shard in receipt.shards
        }
        self._rows_done = {
            item: frozenset(
                row for key, receipt in receipts.items() if key[0] == item for row in receipt.rows
            )
            for item in {key[0] for key in receipts}
        }
        self._readers: dict[str, ShardReader] = {}
        self._readers_lock = threading.Lock()

    @property
    def receipts(self) -> Mapping[ReceiptKey, Receipt]:
        """What is done, by item and block."""
        return self._receipts

    @cached_property
    def sample_rows(self) -> list[SampleRow]:
        """Every line of samples.parquet, tombstones too, with what the receipts add to it."""
        return merge_sample_facts(read_samples(self.path), self._receipts)

    @cached_property
    def annotations(self) -> dict[int, AnnotationRow]:
        """annotations.parquet by row."""
        return {row.row: row for row in read_annotations(self.path)}

    @cached_property
    def samples(self) -> tuple[StoredSample, ...]:
        """Samples that can be used, in row order."""
        return tuple(
            _stored(row, self.annotations[row.row])
            for row in self.sample_rows
            if row.status == "ok"
        )

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """Samples that could not be used, and why."""
        return tuple(
            SetAside(r.id, r.source, r.reason) for r in self.sample_rows if r.status == "aside"
        )

    def fingerprint(self, level: str) -> Fingerprint:
        """Return what a level's values depend on.

        Raises:
            MissingSampleError: when the store has no such level.
        """
        self._require_level(level)
        return self._fingerprints[level]

    def read(self, level: str, row: int) -> NDArray[Any]:
        """Return one sample of a level, checked against its checksum.

        Returns:
            (C, H, W), float16 for features, uint8 for pictures.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        self._require_level(level)
        spec = self.levels[level]
        out = np.empty(spec.shape, dtype=spec.dtype)
        self.read_into(level, row, out)
        return out

    def read_into(self, level: str, row: int, out: NDArray[Any]) -> None:
        """Read one sample of a level straight into ``out``.

        Args:
            level: name of the level.
            row: row of the sample.
            out: C-contiguous, of the level's shape and dtype.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        self._require_level(level)
        spec = self.levels[level]
        assert out.shape == spec.shape, (out.shape, spec.shape)
        assert out.dtype == np.dtype(spec.dtype), (out.dtype, spec.dtype)
        assert out.flags.c_contiguous
        self._require_row(spec.item, row)
        shard, position = divmod(row, spec.samples_per_shard)
        self._reader(spec.grid, (shard, 0, 0, 0)).read_into(position, out)

    def read_mask(self, row: int, label_set: str = "mask") -> NDArray[np.uint8] | None:
        """Return a sample's mask on its own grid, or None when it has none.

        Returns:
            (K, H, W) uint8; 255 is to be ignored.

        Raises:
            MissingSampleError: when the store has no such label set or row.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self._require_label_set(label_set)
        self._require_row(spec.item, row)
        line = self.label_rows(label_set).get(row)
        if line is None or not line.present:
            return None
        out = np.empty((spec.num_planes, line.height_px, line.width_px), dtype=np.uint8)
        tile = np.empty(spec.grid.inner[1:], dtype=np.uint8)
        block, position = divmod(row, BLOCK_ROWS)
        for k in range(spec.num_planes):
            for y in range(0, line.height_px, LABEL_TILE_PX):
                for x in range(0, line.width_px, LABEL_TILE_PX):
                    index = (block, k, y // LABEL_TILE_PX, x // LABEL_TILE_PX)
                    self._reader(spec.grid, index).read_into(position, tile)
                    part = out[k, y : y + LABEL_TILE_PX, x : x + LABEL_TILE_PX]
                    part[...] = tile[0, : part.shape[0], : part.shape[1]]
        return out

    def has_mask(self, row: int, label_set: str = "mask") -> bool:
        """Return whether a sample has a mask (an empty mask is one).

        Raises:
            MissingSampleError: when the store has no such label set.
        """
        self._require_label_set(label_set)
        line = self.label_rows(label_set).get(row)
        return line is not None and line.present

    def label_rows(self, label_set: str) -> dict[int, LabelRow]:
        """Return, by row, the sizes and sources of a label set's masks."""
        if label_set not in self._label_rows:
            if self.sealed:
                self._label_rows[label_set] = read_label_rows(self.path / "labels" / label_set)
            else:
                self._label_rows[label_set] = label_rows_of(label_set, self._receipts)
        return self._label_rows[label_set]

    @cached_property
    def _label_rows(self) -> dict[str, dict[int, LabelRow]]:
        return {}

    def _require_level(self, level: str) -> None:
        if level not in self.levels:
            raise MissingSampleError(
                f"{self.path} has no level {level}; it has {', '.join(self.levels)}. Add it with "
                f"`sam3cache extract MANIFEST -o {self.path} --levels "
                f"{','.join([*self.levels, level])}`"
            )

    def _require_label_set(self, name: str) -> LabelSetSpec:
        if name not in self.label_sets:
            known = ", ".join(self.label_sets) or "none"
            raise MissingSampleError(
                f"{self.path} has no label set {name} (it has: {known}); give masks in the "
                "manifest and run the same `sam3cache extract` again"
            )
        return self.label_sets[name]

    def _require_row(self, item: str, row: int) -> None:
        if row not in self._rows_done.get(item, frozenset()):
            raise MissingSampleError(
                f"{self.path} holds no {item} for row {row}; rows with status ok in "
                "samples.parquet are what it holds"
            )

    def _reader(self, grid: ShardGrid, index: tuple[int, int, int, int]) -> ShardReader:
        key = grid.key(index)
        reader = self._readers.get(key)
        if reader is None:
            size_bytes = self._shard_sizes.get(key)
            if size_bytes is None:
                raise CorruptStoreError(
                    f"{self.path / key} has no receipt; run `sam3cache extract` again"
                )
            reader = ShardReader.open(self.path / key, grid, size_bytes)
            with self._readers_lock:
                self._readers[key] = reader
        return reader


def merge_sample_facts(
    rows: Sequence[SampleRow], receipts: Mapping[ReceiptKey, Receipt]
) -> list[SampleRow]:
    """Return samples.parquet's lines with what the receipts of finished blocks know of them.

    A pending row takes all facts. One that was ok and has been set aside since (its mask was
    replaced by one that cannot be read) takes that.
    """
    facts = {
        fact["row"]: fact
        for (item, _), receipt in receipts.items()
        if item == SAMPLES_ITEM
        for fact in receipt.facts
    }
    merged = []
    for row in rows:
        fact = facts.get(row.row)
        if fact is not None and row.status == "pending":
            row = replace(row, **fact)
        elif fact is not None and row.status == "ok" and fact["status"] == "aside":
            row = replace(row, status="aside", reason=fact["reason"])
        merged.append(row)
    return merged


def label_rows_of(label_set: str, receipts: Mapping[ReceiptKey, Receipt]) -> dict[int, LabelRow]:
    """Return, by row, what the receipts know of a label set's masks."""
    return {
        fact["row"]: LabelRow(**fact)
        for (item, _), receipt in receipts.items()
        if item == f"labels.{label_set}"
        for fact in receipt.facts
    }


def read_label_set_spec(root: Path, name: str) -> LabelSetSpec:
    """Return a label set's planes and size.

    Raises:
        CorruptStoreError: when its metadata cannot be read.
    """
    group = _load_metadata(root / "labels" / name / "zarr.json")
    array = _load_metadata(root / "labels" / name / "masks" / "zarr.json")
    classes = tuple(group["attributes"]["sam3cache"]["classes"])
    return LabelSetSpec(name, classes, array["shape"][2], array["shape"][3])


def _level_spec(root: Path, name: str) -> LevelSpec:
    array = _load_metadata(root / "levels" / name / "zarr.json")
    _, c, h, w = array["shape"]
    return LevelSpec(name, (c, h, w), array["data_type"])


def _load_metadata(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        return value
    except (FileNotFoundError, ValueError):
        raise CorruptStoreError(
            f"{path} is missing or not JSON; restore it, or extract into a new store"
        ) from None


def _stored(row: SampleRow, note: AnnotationRow) -> StoredSample:
    return StoredSample(
        row=row.row,
        id=row.id,
        source=row.source,
        frame=row.frame,
        height_px=row.height_px,
        width_px=row.width_px,
        pixel_sha256=row.pixel_sha256,
        primary_angle_deg=_or_nan(note.primary_angle_deg),
        secondary_angle_deg=_or_nan(note.secondary_angle_deg),
        split=note.split,
        group=note.group,
        extra=note.extra,
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
