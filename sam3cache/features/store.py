"""Reading a feature store.

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

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
from sam3cache.features.lazy import LazySequence
from sam3cache.features.levels import (
    BLOCK_ROWS,
    LABEL_TILE_PX,
    LabelSetSpec,
    LevelSpec,
    ShardGrid,
)
from sam3cache.features.mirror import Mirror
from sam3cache.features.objects import ObjectPath
from sam3cache.features.places import Place, place_of
from sam3cache.features.precision import (
    FEATURE_PRECISIONS,
    Encoded,
    Precision,
    decode,
    value_dtype,
)
from sam3cache.features.receipts import (
    CHANGE_FILE,
    FORMAT_VERSION,
    OVERLAY_OF,
    SAMPLES_ITEM,
    Receipt,
    ReceiptKey,
    ReceiptsOnDemand,
    ShardRecord,
    check_seal,
    is_sealed,
    scan_receipts,
)
from sam3cache.features.shards import ShardReader
from sam3cache.features.tables import (
    ANNOTATIONS_FILE,
    VARIANT_COLUMN,
    AnnotationRow,
    LabelRow,
    Rows,
    SampleRow,
    scan_annotations,
    scan_label_rows,
    scan_samples,
)
from sam3cache.records import SetAside
from sam3cache.tasks import Task
from sam3cache.variants import Variant


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
        variant: of a changed view of a sample, its name, such as "hflip"; else empty.
        base_row: of such a view, the row of the sample, whose labels it has.
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
    variant: str = ""
    base_row: int | None = None


def open_store(
    path: str | Place, *, allow_unsealed: bool = False, overlay: str | Place | None = None
) -> FeatureStore:
    """Open a store for reading and check its seal. Nothing is written or locked.

    Args:
        path: the store's folder, or its URL as ``s3://bucket/angio.zarr``: then it is read by way
            of a local copy (:mod:`sam3cache.features.mirror`), or as it is while it is not sealed.
        allow_unsealed: read what an unfinished extraction has committed so far.
        overlay: folder of labels and annotations kept beside the store, which go before its own.

    Raises:
        NotAStoreError: when ``path`` holds no feature store.
        UnsealedStoreError: when extraction has not finished, unless ``allow_unsealed``.
        CorruptStoreError: when the metadata or tables are not what the store was sealed with.
        StoreError: when the store's format is newer than this reader, ``path`` is an overlay, or
            the overlay is of other pictures.
    """
    root = place_of(path)
    mirror = None
    if isinstance(root, ObjectPath):
        root.require_reachable()
        mirror = Mirror.of(root)
    folder = root if mirror is None else mirror.folder
    description = read_description(folder)
    if OVERLAY_OF in description["settings"]:
        raise StoreError(
            f"{root} is an overlay, labels and annotations without features; give the store that "
            f"it was made for, and --overlay {root}"
        )
    seal, receipts = _seal_and_receipts(folder, allow_unsealed)
    laid_over = (
        None if overlay is None else open_overlay(place_of(overlay), allow_unsealed=allow_unsealed)
    )
    store = FeatureStore(root, description, receipts, seal=seal, overlay=laid_over, mirror=mirror)
    if laid_over is not None:
        _require_same_pictures(store, laid_over)
    return store


def open_overlay(root: Place, *, allow_unsealed: bool = False) -> FeatureStore:
    """Open the labels and annotations of an overlay alone, without the store that they are for.

    Raises:
        NotAStoreError: when it holds none.
        StoreError: when it is a store of its own.
        UnsealedStoreError: when a change of it was interrupted, unless ``allow_unsealed``.
        CorruptStoreError: when it is not what it was sealed with.
    """
    description = read_description(root)
    if OVERLAY_OF not in description["settings"]:
        raise StoreError(
            f"{root} is a feature store of its own, not an overlay; give a folder that "
            "`sam3cache store labels set` or `annotations set` made with --overlay"
        )
    seal, receipts = _seal_and_receipts(root, allow_unsealed)
    return FeatureStore(root, description, receipts, seal=seal)


def _seal_and_receipts(root: Place, allow_unsealed: bool) -> tuple[str, ReceiptsOnDemand]:
    """Return the hash that the seal states, empty without a seal, and the receipts."""
    if is_sealed(root):
        return check_seal(root)
    if not allow_unsealed:
        raise UnsealedStoreError(_why_unsealed(root))
    return "", scan_receipts(root)


def _why_unsealed(root: Place) -> str:
    change = interrupted_change(root)
    if change:
        return f"{root} is not sealed: {change} was interrupted; run the same command again"
    return (
        f"{root} is not sealed: its extraction, or what copied it, has not finished; run the same "
        "command again, or pass --allow-unsealed to use what is there"
    )


def interrupted_change(root: Place) -> str:
    """Return which change of labels or annotations a store is unsealed for; empty if for none."""
    try:
        return str(json.loads((root / CHANGE_FILE).read_bytes())["change"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return ""


def _require_same_pictures(store: FeatureStore, overlay: FeatureStore) -> None:
    """Refuse an overlay whose rows are not those of the store."""
    if overlay.settings[OVERLAY_OF] == store.seal:
        return
    present = {row.row: row for row in store.sample_rows}
    for row in overlay.sample_rows:
        here = present.get(row.row)
        if here is None or (here.id, here.pixel_sha256) != (row.id, row.pixel_sha256):
            now = "holds none" if here is None else f"holds {here.id}"
            raise StoreError(
                f"overlay {overlay.path} is not of {store.path}: row {row.row} was {row.id} when "
                f"it was made, and the store {now}, or other pixels; give the store that it was "
                "made for, or make an overlay in another folder"
            )


_DESCRIBED = {"num_blocks": int, "settings": dict, "levels": dict, "label_sets": list}


def read_description(root: Place) -> dict[str, Any]:
    """Return what the group's zarr.json says of the store.

    Raises:
        NotAStoreError: when there is no such file, or it is not ours.
        StoreError: when the format is newer than this code.
    """
    path = place_of(root) / "zarr.json"
    try:
        description = json.loads(path.read_bytes())["attributes"]["sam3cache"]
        version = int(description["format_version"])
        if version <= FORMAT_VERSION:
            for name, kind in _DESCRIBED.items():
                if not isinstance(description[name], kind):
                    raise TypeError(name)
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


def fingerprints_in(description: Mapping[str, Any], root: Place) -> dict[str, Fingerprint]:
    """Return the fingerprint of every level that a store's description names.

    Raises:
        CorruptStoreError: when one is none; ``root`` is named.
    """
    try:
        return {
            name: Fingerprint(dict(level["fingerprint"]))
            for name, level in description["levels"].items()
        }
    except (KeyError, TypeError, ValueError):
        raise CorruptStoreError(
            f"{root / 'zarr.json'} does not say how its levels were made; run `sam3cache store "
            "verify --repair` on the store, or restore the file"
        ) from None


class FeatureStore:
    """A store opened for reading; safe to use from several threads.

    Attributes:
        path: the store's folder or URL.
        seal: hash over all that the seal held when it was opened; empty without one.
        sealed: whether its extraction has finished.
        overlay: labels and annotations that go before the store's own; mostly None.
        settings: provenance: backbone, batch size, device model, versions, resize mode.
        levels: by name.
        label_sets: by name, with those of the overlay.
    """

    def __init__(
        self,
        path: Place,
        description: Mapping[str, Any],
        receipts: ReceiptsOnDemand,
        *,
        seal: str,
        overlay: FeatureStore | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path = path
        self._mirror = mirror
        # Where its files are read.
        self.folder: Place = path if mirror is None else mirror.folder
        self.seal = seal
        self.sealed = bool(seal)
        self.overlay = overlay
        self.settings: dict[str, Any] = dict(description["settings"])
        self._fingerprints = fingerprints_in(description, path)
        self.levels = {name: read_level_spec(self.folder, name) for name in description["levels"]}
        self.label_sets = {
            name: read_label_set_spec(self.folder, name) for name in description["label_sets"]
        }
        if overlay is not None:
            self.label_sets |= overlay.label_sets
        self._places = {name: _Place(spec) for name, spec in self.levels.items()}
        self._served = _served_by_default(self.levels)
        self._receipts = receipts
        self._readers: dict[tuple[str, tuple[int, ...]], ShardReader] = {}
        self._readers_lock = threading.Lock()

    @property
    def served_levels(self) -> Mapping[str, LevelSpec]:
        """By the name that a head may ask for, the stored level that it gets.

        A level is served by its own name and, where it was chosen or is the most exact that the
        store has of it, by the name of what it is of: ``fpn_72.int8`` serves ``fpn_72``.
        """
        return {name: self.levels[stored] for name, stored in self._served.items()}

    def serve(self, precision: Precision) -> None:
        """Serve the levels that are stored in a precision by the names of what they are of.

        Raises:
            MissingSampleError: when no level is stored so.
        """
        chosen = {
            spec.base: name for name, spec in self.levels.items() if spec.precision == precision
        }
        if not chosen:
            raise MissingSampleError(
                f"{self.path} has no level in precision {precision}; it has "
                f"{', '.join(self.levels)}"
            )
        self._served |= chosen

    def serve_digests(self, digests: Mapping[str, str]) -> None:
        """Serve each level as it was made, where the store has it so: what a checkpoint asks for.

        Args:
            digests: by name, the digest of the fingerprint that is wanted.
        """
        for name, digest in digests.items():
            for stored, spec in self.levels.items():
                if spec.base == name and self._fingerprints[stored].digest == digest:
                    self._served[name] = stored

    @property
    def receipts(self) -> ReceiptsOnDemand:
        """What is done, by item and block."""
        return self._receipts

    @cached_property
    def sample_rows(self) -> Sequence[SampleRow]:
        """Every line of samples.parquet, tombstones too, with what the receipts add to it.

        Each is made when it is asked for: go through them in order where you can.
        """
        return self._scan_rows()

    def _scan_rows(self) -> Sequence[SampleRow]:
        rows = scan_samples(self.folder)
        # A seal's facts are in the table already.
        return rows if self.sealed else RowsWithFacts(rows, self._receipts)

    @cached_property
    def annotations(self) -> dict[int, AnnotationRow]:
        """annotations.parquet by row; rows of the overlay go before."""
        notes = {row.row: row for row in scan_annotations(self.folder)}
        return notes if self.overlay is None else notes | self.overlay.annotations

    @cached_property
    def samples(self) -> tuple[StoredSample, ...]:
        """Samples that can be used, in row order; their variants are not among them."""
        # Groups and splits are few; equal texts share their memory.
        shared: dict[str, str] = {}
        return tuple(
            _stored(row, note, shared)
            for row, note in self._annotated()
            if row.status == "ok" and row.variant is None
        )

    @cached_property
    def variants(self) -> tuple[StoredSample, ...]:
        """Changed views of training samples, in row order, for training alone.

        Each has its sample's split, group and other columns, and its view angles as the view
        changes them. Views of samples that cannot be used, or are not in the training split, are
        left out, whatever is stored of them.
        """
        lines = self._variant_rows()
        if not lines:
            return ()
        bases = {sample.id: sample for sample in self.samples if sample.split == "train"}
        return tuple(_variant_of(bases[row.base_id], row) for row in lines if row.base_id in bases)

    @property
    def every_row(self) -> tuple[int, ...]:
        """Rows that hold something, ascending: samples that can be used, and all variants."""
        rows = [sample.row for sample in self.samples]
        return tuple(sorted([*rows, *(row.row for row in self._variant_rows())]))

    def _variant_rows(self) -> list[SampleRow]:
        # Of a store without variants no line has to be made.
        if not scan_samples(self.folder).num_known(VARIANT_COLUMN):
            return []
        return [row for row in self._scan_rows() if row.status == "ok" and row.variant is not None]

    @cached_property
    def _variant_by_row(self) -> Mapping[int, StoredSample]:
        return {variant.row: variant for variant in self.variants}

    def _annotated(self) -> Iterator[tuple[SampleRow, AnnotationRow]]:
        """Go through rows that have annotations, without keeping either table as objects."""
        over = {} if self.overlay is None else self.overlay.annotations
        # Both tables are in row order, and tombstones are in the first alone.
        notes = scan_annotations(self.folder)
        note = next(notes, None)
        for row in self._scan_rows():
            while note is not None and note.row < row.row:
                note = next(notes, None)
            if note is not None and note.row == row.row:
                yield row, over.get(row.row, note)
            elif row.status == "ok":
                raise CorruptStoreError(
                    f"{self.path / ANNOTATIONS_FILE} says nothing of row {row.row} ({row.id}); run "
                    "`sam3cache store verify --repair` on the store"
                )

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """Samples that could not be used, and why."""
        return tuple(
            SetAside(r.id, r.source, r.reason)
            for r in self.sample_rows
            if r.status == "aside" and r.variant is None
        )

    def fingerprint(self, level: str) -> Fingerprint:
        """Return what a level's values depend on.

        Raises:
            MissingSampleError: when the store has no such level.
        """
        return self._fingerprints[self._stored_name(level)]

    def fetch(self, rows: Iterable[int], levels: Sequence[str], label_set: str | None) -> None:
        """Bring near at once what will be read, of a store that lies on an object store.

        Without it, what is read is fetched at that moment. :func:`watch_fetching` tells how far it
        is.

        Args:
            rows: of the samples.
            levels: names of the levels.
            label_set: name of the masks' set; None without masks.

        Raises:
            MissingSampleError: when the store has no such level.
            NoSpaceError: when there is no room for it.
            CorruptStoreError: when a shard is not what was written.
            StoreError: when the object store refuses us or does not answer.
        """
        if self._mirror is None:
            return
        specs = [self.levels[self._own_or_served(level)] for level in levels]
        grids = [(spec.item, grid) for spec in specs for grid in spec.grids]
        wanted: dict[str, ShardRecord] = {}
        for row in rows:
            for item, grid in grids:
                record = self._record(item, row, grid.key((row // grid.num_inner,)))
                wanted[record.key] = record
            if label_set is not None and self.holder_of(label_set) is self:
                variant = self._variant_by_row.get(row)
                base_row = row if variant is None else variant.base_row
                assert base_row is not None
                masks = self._receipts.get((f"labels.{label_set}", base_row // BLOCK_ROWS))
                wanted |= {record.key: record for record in (masks.shards if masks else ())}
        self._mirror.fetch_all(list(wanted.values()))

    def read(self, level: str, row: int) -> NDArray[Any]:
        """Return one sample of a level, checked against its checksum.

        Returns:
            (C, H, W): uint8 for pictures, float32 for levels in bf16, float16 for all others.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self.levels[self._stored_name(level)]
        out = np.empty(spec.shape, dtype=value_dtype(spec.precision))
        self.read_into(level, row, out)
        return out

    def read_into(self, level: str, row: int, out: NDArray[Any]) -> None:
        """Read one sample of a level straight into ``out``.

        Args:
            level: name of the level.
            row: row of the sample.
            out: C-contiguous, of the shape and dtype that :meth:`read` returns.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self.levels[self._stored_name(level)]
        assert out.dtype == np.dtype(value_dtype(spec.precision)), (out.dtype, spec.precision)
        if spec.precision in ("int8", "bf16"):
            decode(spec.precision, self.read_stored(spec.name, row), out)
        else:
            self.read_stored_into(spec.name, row, Encoded(out))

    def read_stored(self, level: str, row: int) -> Encoded:
        """Return one sample of a level as it is stored; see :mod:`sam3cache.features.precision`.

        A stored level is meant by its own name, whatever is served by it.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self.levels[self._own_or_served(level)]
        scale_C = None
        if spec.scale_grid is not None:
            scale_C = np.empty(spec.shape[0], dtype=np.float32)
        encoded = Encoded(np.empty(spec.shape, dtype=spec.dtype), scale_C)
        self.read_stored_into(level, row, encoded)
        return encoded

    def read_stored_into(self, level: str, row: int, out: Encoded) -> None:
        """Read one sample of a level as it is stored into the arrays of ``out``.

        Args:
            level: name of the level.
            row: row of the sample.
            out: C-contiguous arrays of the level's shape and stored dtype; scales for int8 alone.

        Raises:
            MissingSampleError: when the store has no such level, or no such row in it.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        place = self._places[self._own_or_served(level)]
        assert out.data_CHW.shape == place.shape, (out.data_CHW.shape, place.shape)
        assert out.data_CHW.flags.c_contiguous
        self._require_row(place.item, row)
        shard, position = divmod(row, place.samples_per_shard)
        self._read_chunk(place.item, row, place.grid, (shard,), position, out.data_CHW)
        if place.scale_grid is not None:
            assert out.scale_C is not None
            block, position = divmod(row, BLOCK_ROWS)
            self._read_chunk(place.item, row, place.scale_grid, (block,), position, out.scale_C)

    def read_mask(self, row: int, label_set: str = "mask") -> NDArray[np.uint8] | None:
        """Return a sample's mask on its own grid, or None when it has none.

        A sample that came into the store after the label set has none in it. A variant's is its
        sample's, changed as its picture is.

        Returns:
            (K, H, W) uint8; 255 is to be ignored.

        Raises:
            MissingSampleError: when the store has no such label set or row.
            CorruptStoreError: when the bytes on disk are not those that were written.
        """
        spec = self._require_label_set(label_set)
        variant = self._variant_by_row.get(row)
        if variant is not None:
            assert variant.base_row is not None
            mask_KHW = self.read_mask(variant.base_row, label_set)
            if mask_KHW is None:
                return None
            size_px = (variant.height_px, variant.width_px)
            return Variant.parse(variant.variant).mask(mask_KHW, *size_px)
        line = self.label_rows(label_set).get(row)
        if line is None and not (0 <= row < len(self._is_usable) and self._is_usable[row]):
            raise MissingSampleError(
                f"{self.path} has no sample in row {row}; rows with status ok in samples.parquet "
                "are what it holds"
            )
        if line is None or not line.present:
            return None
        return self.holder_of(label_set)._read_planes(spec, line)

    def _read_planes(self, spec: LabelSetSpec, line: LabelRow) -> NDArray[np.uint8]:
        row = line.row
        out = np.empty((spec.num_planes, line.height_px, line.width_px), dtype=np.uint8)
        tile = np.empty(spec.grid.inner[1:], dtype=np.uint8)
        block, position = divmod(row, BLOCK_ROWS)
        for k in range(spec.num_planes):
            for y in range(0, line.height_px, LABEL_TILE_PX):
                for x in range(0, line.width_px, LABEL_TILE_PX):
                    index = (block, k, y // LABEL_TILE_PX, x // LABEL_TILE_PX)
                    self._read_chunk(spec.item, row, spec.grid, index, position, tile)
                    part = out[k, y : y + LABEL_TILE_PX, x : x + LABEL_TILE_PX]
                    part[...] = tile[0, : part.shape[0], : part.shape[1]]
        return out

    def has_mask(self, row: int, label_set: str = "mask") -> bool:
        """Return whether a sample has a mask (an empty mask is one).

        Raises:
            MissingSampleError: when the store has no such label set.
        """
        self._require_label_set(label_set)
        variant = self._variant_by_row.get(row)
        if variant is not None and variant.base_row is not None:
            row = variant.base_row
        line = self.label_rows(label_set).get(row)
        return line is not None and line.present

    def holder_of(self, label_set: str) -> FeatureStore:
        """Return where a label set lies: in the overlay, if that has one of its name, or here."""
        if self.overlay is not None and label_set in self.overlay.label_sets:
            return self.overlay
        return self

    def label_rows(self, label_set: str) -> Mapping[int, LabelRow]:
        """Return, by row, the sizes and sources of a label set's masks."""
        holder = self.holder_of(label_set)
        if holder is not self:
            return holder.label_rows(label_set)
        if label_set not in self._label_rows:
            if self.sealed:
                lines = scan_label_rows(self.folder / "labels" / label_set)
                self._label_rows[label_set] = LabelRowsOnDemand(lines)
            else:
                self._label_rows[label_set] = label_rows_of(label_set, self._receipts)
        return self._label_rows[label_set]

    @cached_property
    def _is_usable(self) -> bytearray:
        """By row, whether a sample can be used."""
        flags = bytearray()
        for row in self._scan_rows():
            flags.extend(bytes(row.row - len(flags)))
            flags.append(row.status == "ok")
        return flags

    @cached_property
    def _label_rows(self) -> dict[str, Mapping[int, LabelRow]]:
        return {}

    def _own_or_served(self, level: str) -> str:
        return level if level in self.levels else self._stored_name(level)

    def _stored_name(self, level: str) -> str:
        name = self._served.get(level)
        if name is None:
            raise MissingSampleError(
                f"{self.path} has no level {level}; it has {', '.join(self.levels)}. Add it with "
                f"`sam3cache extract MANIFEST -o {self.path} --levels "
                f"{','.join([*self.levels, level])}`"
            )
        return name

    def _require_label_set(self, name: str) -> LabelSetSpec:
        if name not in self.label_sets:
            known = ", ".join(self.label_sets) or "none"
            raise MissingSampleError(
                f"{self.path} has no label set {name} (it has: {known}); set it with "
                f"`sam3cache store labels set {self.path} {name} --from MANIFEST`"
            )
        return self.label_sets[name]

    def _require_row(self, item: str, row: int) -> Receipt:
        receipt = self._receipts.get((item, row // BLOCK_ROWS))
        if receipt is None or row not in receipt.rows:
            raise MissingSampleError(
                f"{self.path} holds no {item} for row {row}; rows with status ok in "
                "samples.parquet are what it holds"
            )
        return receipt

    def _read_chunk(
        self,
        item: str,
        row: int,
        grid: ShardGrid,
        index: tuple[int, ...],
        position: int,
        out: NDArray[Any],
    ) -> None:
        try:
            self._reader(item, row, grid, index).read_into(position, out)
        except CorruptStoreError:
            if self._mirror is None:
                raise
            # Damaged since it was fetched: once more from where it came from.
            self._mirror.forget(self._record(item, row, grid.key(index)))
            with self._readers_lock:
                self._readers.pop((grid.folder, index), None)
            self._reader(item, row, grid, index).read_into(position, out)

    def _reader(self, item: str, row: int, grid: ShardGrid, index: tuple[int, ...]) -> ShardReader:
        reader = self._readers.get((grid.folder, index))
        if reader is None:
            key = grid.key(index)
            record = self._record(item, row, key)
            path = self.folder / key if self._mirror is None else self._mirror.fetch(record)
            reader = ShardReader.open(path, grid, record.size_bytes, record.chunk_crc32c)
            with self._readers_lock:
                self._readers[grid.folder, index] = reader
        return reader

    def _record(self, item: str, row: int, key: str) -> ShardRecord:
        shards = self._require_row(item, row).shards
        record = next((shard for shard in shards if shard.key == key), None)
        if record is None:
            raise CorruptStoreError(
                f"{self.path / key} has no receipt; run `sam3cache extract` again"
            )
        return record


class _Place:
    """Where a level's samples lie: worked out once, as it is needed for every sample read."""

    def __init__(self, spec: LevelSpec) -> None:
        self.shape = spec.shape
        self.item = spec.item
        self.samples_per_shard = spec.samples_per_shard
        self.grid = spec.grid
        self.scale_grid = spec.scale_grid


def _served_by_default(levels: Mapping[str, LevelSpec]) -> dict[str, str]:
    """Return, by the name that may be asked for, the stored level: the most exact there is."""
    served: dict[str, str] = {}
    for precision in reversed(FEATURE_PRECISIONS):
        served |= {s.base: name for name, s in levels.items() if s.precision == precision}
    return served | {name: name for name in levels}


def merge_sample_facts(
    rows: Sequence[SampleRow], receipts: Mapping[ReceiptKey, Receipt]
) -> list[SampleRow]:
    """Return samples.parquet's lines with what the receipts of finished blocks know of them.

    A pending row takes all facts. One that was ok and has been set aside since (its mask was
    replaced by one that cannot be read) takes that.
    """
    return list(RowsWithFacts(rows, receipts))


class RowsWithFacts(LazySequence[SampleRow]):
    """What :func:`merge_sample_facts` returns, a row at a time as it is asked for."""

    def __init__(self, rows: Sequence[SampleRow], receipts: Mapping[ReceiptKey, Receipt]) -> None:
        self._rows, self._receipts = rows, receipts
        self._latest: tuple[int, dict[str, list[Any]]] = -1, {}

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, place: int) -> SampleRow:
        """Return a row."""
        return self._merged(self._rows[place])

    def __iter__(self) -> Iterator[SampleRow]:
        return map(self._merged, self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _merged(self, row: SampleRow) -> SampleRow:
        if row.status not in ("pending", "ok"):
            return row
        block = row.row // BLOCK_ROWS
        known, facts = self._latest
        # Rows come block by block. In one piece: several threads may ask.
        if known != block:
            receipt = self._receipts.get((SAMPLES_ITEM, block))
            facts = receipt.facts.columns if receipt is not None else {}
            self._latest = block, facts
        # Of most stores no row is touched: what is looked at for each is little.
        if not facts or (row.status == "ok" and "aside" not in facts["status"]):
            return row
        return _with_facts(row, facts)


def _with_facts(row: SampleRow, facts: Mapping[str, Sequence[Any]]) -> SampleRow:
    if row.row not in facts["row"]:
        return row
    at = facts["row"].index(row.row)
    if row.status == "pending":
        return replace(row, **{name: column[at] for name, column in facts.items()})
    if facts["status"][at] == "aside":
        return replace(row, status="aside", reason=facts["reason"][at])
    return row


def label_rows_of(label_set: str, receipts: Mapping[ReceiptKey, Receipt]) -> Mapping[int, LabelRow]:
    """Return, by row and in row order, what the receipts know of a label set's masks."""
    return _LabelFacts(label_set, receipts)


class _LabelFacts(Mapping[int, LabelRow]):
    """What :func:`label_rows_of` returns, each line made when it is asked for."""

    def __init__(self, label_set: str, receipts: Mapping[ReceiptKey, Receipt]) -> None:
        self._item, self._label_set, self._receipts = f"labels.{label_set}", label_set, receipts

    def __getitem__(self, row: int) -> LabelRow:
        receipt = self._receipts[self._item, row // BLOCK_ROWS]
        rows = receipt.facts.columns.get("row", [])
        if row not in rows:
            raise KeyError(row)
        return LabelRow(**receipt.facts.item(rows.index(row)))

    def __iter__(self) -> Iterator[int]:
        return (line.row for line in scan_label_facts(self._label_set, self._receipts))

    def __len__(self) -> int:
        return sum(
            len(self._receipts[item, block].facts)
            for item, block in self._receipts
            if item == self._item
        )

    def values(self) -> ValuesView[LabelRow]:
        """Return the lines in row order; faster than asking for one after the other."""
        return _LinesOfFacts(self)


class _LinesOfFacts(ValuesView[LabelRow]):
    def __init__(self, mapping: _LabelFacts) -> None:
        super().__init__(mapping)
        self._of = mapping._label_set, mapping._receipts

    def __iter__(self) -> Iterator[LabelRow]:
        return scan_label_facts(*self._of)


def scan_label_facts(label_set: str, receipts: Mapping[ReceiptKey, Receipt]) -> Iterator[LabelRow]:
    """Go through what the receipts know of a label set's masks, in row order."""
    item = f"labels.{label_set}"
    for block in sorted(block for name, block in receipts if name == item):
        facts = receipts[item, block].facts
        yield from sorted((LabelRow(**fact) for fact in facts), key=lambda line: line.row)


class LabelRowsOnDemand(Mapping[int, LabelRow]):
    """A label set's rows.parquet by row, each line made when it is asked for."""

    def __init__(self, lines: Rows[LabelRow]) -> None:
        self._lines = lines
        self._rows = lines.column(0)

    def __getitem__(self, row: int) -> LabelRow:
        position = int(np.searchsorted(self._rows, row))
        if position == len(self._rows) or self._rows[position] != row:
            raise KeyError(row)
        return self._lines.single(position)

    def __iter__(self) -> Iterator[int]:
        return (line.row for line in self._lines)

    def values(self) -> ValuesView[LabelRow]:
        """Return the lines in row order; faster than asking for one after the other."""
        return _Lines(self)

    def __len__(self) -> int:
        return len(self._lines)


class _Lines(ValuesView[LabelRow]):
    def __init__(self, mapping: LabelRowsOnDemand) -> None:
        super().__init__(mapping)
        self._lines = mapping._lines

    def __iter__(self) -> Iterator[LabelRow]:
        return iter(self._lines)


def read_label_set_spec(root: Place, name: str) -> LabelSetSpec:
    """Return a label set's planes and size.

    Raises:
        CorruptStoreError: when its metadata cannot be read.
    """
    path = root / "labels" / name / "zarr.json"
    group = _load_metadata(path)
    array = _load_metadata(root / "labels" / name / "masks" / "zarr.json")
    try:
        attributes = group["attributes"]["sam3cache"]
        classes, task = tuple(attributes["classes"]), attributes.get("task", "multilabel")
        if task not in get_args(Task):
            raise ValueError(task)
        return LabelSetSpec(name, classes, int(array["shape"][2]), int(array["shape"][3]), task)
    except (LookupError, TypeError, ValueError):
        raise CorruptStoreError(
            f"{path} does not describe a label set; restore it, or set the labels again"
        ) from None


def read_level_spec(root: Place, name: str) -> LevelSpec:
    """Return a level's shape and dtype.

    Raises:
        CorruptStoreError: when its metadata cannot be read.
    """
    path = root / "levels" / name / "zarr.json"
    array = _load_metadata(path)
    try:
        _, c, h, w = array["shape"]
        return LevelSpec(name, (int(c), int(h), int(w)), array["data_type"])
    except (KeyError, TypeError, ValueError):
        raise CorruptStoreError(
            f"{path} does not describe a level; restore it, or extract into a new store"
        ) from None


def _load_metadata(path: Place) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        return value
    except (FileNotFoundError, ValueError):
        raise CorruptStoreError(
            f"{path} is missing or not JSON; restore it, or extract into a new store"
        ) from None


def _stored(row: SampleRow, note: AnnotationRow, shared: dict[str, str]) -> StoredSample:
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
        split=shared.setdefault(note.split, note.split),
        group=shared.setdefault(note.group, note.group),
        extra=note.extra,
    )


def _variant_of(base: StoredSample, row: SampleRow) -> StoredSample:
    """Return a variant with what its sample says of it."""
    assert row.variant is not None
    primary_deg, secondary_deg = Variant.parse(row.variant).angles(
        base.primary_angle_deg, base.secondary_angle_deg
    )
    return replace(
        base,
        row=row.row,
        id=row.id,
        pixel_sha256=row.pixel_sha256,
        primary_angle_deg=primary_deg,
        secondary_angle_deg=secondary_deg,
        variant=row.variant,
        base_row=base.row,
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
