"""Changing a feature store: its description, its blocks, its seal.

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import NumericError
from sam3cache.features.files import sweep_temporaries
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import (
    BLOCK_ROWS,
    LABEL_TILE_PX,
    LabelSetSpec,
    LevelSpec,
    ShardGrid,
    group_metadata,
)
from sam3cache.features.locks import BlockClaims
from sam3cache.features.places import Place, file_sizes, write_atomic
from sam3cache.features.precision import Encoded, encode
from sam3cache.features.receipts import (
    CHANGE_FILE,
    FORMAT_VERSION,
    SAMPLES_ITEM,
    SEAL_COPY,
    Facts,
    Receipt,
    ReceiptKey,
    ReceiptsOnDemand,
    ShardRecord,
    break_seal,
    finish_sealing,
    is_sealed,
    scan_receipts,
    write_receipt,
    write_seal,
)
from sam3cache.features.shards import crc32c, encode_shard
from sam3cache.features.store import (
    RowsWithFacts,
    read_description,
    read_level_spec,
    scan_label_facts,
)
from sam3cache.features.tables import (
    ANNOTATIONS_FILE,
    LABEL_ROWS_FILE,
    SAMPLES_FILE,
    AnnotationRow,
    LabelRow,
    SampleRow,
    scan_annotations,
    scan_samples,
    write_annotations,
    write_label_rows,
    write_samples,
)
from sam3cache.runtime import TEMPORARY_SUFFIX

GROUP_FILE = "zarr.json"

# No writer leaves a file that it writes alone for as long.
_STRAY_AGE_S = 60.0


def foreign_files(root: Place) -> list[Place]:
    """Return what a folder holds that a crash of ours, before a store was described, cannot leave.

    Nothing where a store is described already.
    """
    if (root / GROUP_FILE).exists():
        return []
    ours = {".lock", ".holder.json", "levels", "labels", "claims", "receipts"}
    ours |= {SAMPLES_FILE, ANNOTATIONS_FILE}
    return [
        path for path in root.iterdir() if path.name not in ours and path.suffix != TEMPORARY_SUFFIX
    ]


def block_of(row: int) -> int:
    """Return the block that a row lies in."""
    return row // BLOCK_ROWS


def num_blocks_of(rows: Sequence[SampleRow]) -> int:
    """Return how many blocks a table spans, of rows in their order."""
    return 1 + block_of(rows[-1].row) if rows else 0


def describe_store(
    root: Place,
    *,
    settings: Mapping[str, Any],
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_sets: Mapping[str, LabelSetSpec],
    samples: Sequence[SampleRow],
    annotations: Sequence[AnnotationRow],
) -> None:
    """Create a store, or change what an existing one describes; hold :func:`store_lock`.

    The seal is broken first and the group's zarr.json written last, so that a crash in between
    leaves an unsealed store (or no store yet) that the same call mends. Features stay as they are.

    Args:
        root: the store's folder.
        settings: provenance, JSON values only.
        levels: every level, old ones too, by name.
        label_sets: every label set by name.
        samples: the whole table, in row order.
        annotations: the whole table, in row order.
    """
    break_seal(root)
    metadata = metadata_files(settings, levels, label_sets, num_blocks_of(samples))
    for name, content in metadata.items():
        if name != GROUP_FILE:
            write_atomic(root / name, content)
    write_samples(root, samples)
    write_annotations(root, annotations)
    write_atomic(root / GROUP_FILE, metadata[GROUP_FILE])


def is_described(
    root: Place,
    *,
    settings: Mapping[str, Any],
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_sets: Mapping[str, LabelSetSpec],
    samples: Sequence[SampleRow],
    annotations: Sequence[AnnotationRow],
    tables_are_current: bool | None = None,
) -> bool:
    """Return whether :func:`describe_store` with the same arguments would change nothing.

    Facts that receipts hold count as if they were in the table. Whoever has compared the tables
    says so with ``tables_are_current``; they are read otherwise.
    """
    metadata = metadata_files(settings, levels, label_sets, num_blocks_of(samples))
    if not all((root / name).exists() for name in (*metadata, SAMPLES_FILE, ANNOTATIONS_FILE)):
        return False
    if any((root / name).read_bytes() != content for name, content in metadata.items()):
        return False
    if tables_are_current is None:
        rows = RowsWithFacts(scan_samples(root), scan_receipts(root))
        stored, given = (list(rows), list(scan_annotations(root))), (samples, annotations)
        return stored == (list(given[0]), list(given[1]))
    return tables_are_current


def note_setting(root: Place, name: str, value: Any) -> None:
    """Correct a setting of a store that is being worked on; hold :func:`store_lock`.

    Args:
        root: the store's folder.
        name: of the setting.
        value: JSON values only.
    """
    description = read_description(root)
    description["settings"][name] = value
    write_atomic(root / GROUP_FILE, group_metadata(description))


def metadata_files(
    settings: Mapping[str, Any],
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_sets: Mapping[str, LabelSetSpec],
    num_blocks: int,
) -> dict[str, bytes]:
    """Return every zarr.json of a store by its path below the store."""
    num_rows = num_blocks * BLOCK_ROWS
    description = {
        "format_version": FORMAT_VERSION,
        "block_rows": BLOCK_ROWS,
        "num_blocks": num_blocks,
        "settings": dict(settings),
        "levels": {
            name: {
                "fingerprint": dict(fingerprint.fields),
                "digest": fingerprint.digest,
                "samples_per_shard": spec.samples_per_shard,
            }
            for name, (spec, fingerprint) in levels.items()
        },
        "label_sets": sorted(label_sets),
    }
    files = {
        GROUP_FILE: group_metadata(description),
        f"levels/{GROUP_FILE}": group_metadata({}),
        f"labels/{GROUP_FILE}": group_metadata({}),
    }
    for spec, _ in levels.values():
        files |= spec.metadata_files(num_rows)
    for label_set in label_sets.values():
        files[f"labels/{label_set.name}/{GROUP_FILE}"] = group_metadata(label_set.attributes)
        grid = label_set.grid
        files[f"{grid.folder}/{GROUP_FILE}"] = grid.metadata(num_rows, label_set.shape)
    return files


def write_level_block(
    root: Place,
    spec: LevelSpec,
    digest: str,
    block: int,
    features: Mapping[int, NDArray[Any] | Encoded],
) -> Receipt:
    """Write one level of one block, then its receipt.

    Args:
        root: the store's folder.
        spec: the level.
        digest: of the level's fingerprint.
        block: number of the block.
        features: by row, (C, H, W): uint8, or finite floats that are stored in the level's
            precision; or what :meth:`FeatureStore.read_stored` gave, which is kept bit by bit.
            Only rows of the block.

    Raises:
        NumericError: when a value is not finite, or too large for the precision; nothing of the
            block is written then.
        OSError: when the disk is full or read-only.
    """
    encoded = {row: _encoded(spec, row, values) for row, values in features.items()}
    shards: dict[int, dict[int, NDArray[Any]]] = {}
    scales: dict[int, NDArray[Any]] = {}
    for row, stored in encoded.items():
        assert block_of(row) == block, (row, block)
        shard, position = divmod(row, spec.samples_per_shard)
        shards.setdefault(shard, {})[position] = stored.data_CHW
        if stored.scale_C is not None:
            scales[row % BLOCK_ROWS] = stored.scale_C
    _take_back(root, spec.item, block, [spec.grid.key((shard,)) for shard in shards])
    records = [
        _write_shard(root, spec.grid, (shard,), chunks) for shard, chunks in sorted(shards.items())
    ]
    if scales and spec.scale_grid is not None:
        records.append(_write_shard(root, spec.scale_grid, (block,), scales))
    receipt = Receipt(spec.item, block, tuple(sorted(features)), digest, tuple(records))
    write_receipt(root, receipt)
    return receipt


def _encoded(spec: LevelSpec, row: int, values: NDArray[Any] | Encoded) -> Encoded:
    if isinstance(values, Encoded):
        return values
    # Values beyond float16 overflow on the way to it, which is said below rather than by numpy.
    with np.errstate(over="ignore"):
        kept = (
            values if spec.precision in ("uint8", "bf16") else values.astype(np.float16, copy=False)
        )
    if spec.precision != "uint8" and not np.isfinite(kept).all():
        overflows = bool(np.isfinite(values).all())
        wide = f"store the level as {spec.base}.bf16, whose range is float32's"
        advice = (
            wide
            if overflows
            else "the weights or the numeric path are wrong rather than the image; try "
            "--numeric-path fp32, or check the weights' file"
        )
        if values.dtype == np.float16:
            # As it came from the device, where what is beyond float16 has become infinite.
            advice += f"; or they are beyond float16's ±65504: {wide}"
        what = "beyond float16's ±65504" if overflows else "that are NaN or infinite"
        raise NumericError(f"level {spec.name} of row {row} has values {what}: {advice}")
    return encode(spec.precision, kept)


def write_label_block(
    root: Place,
    spec: LabelSetSpec,
    block: int,
    masks: Mapping[int, NDArray[np.uint8] | None],
    sources: Mapping[int, LabelRow],
) -> Receipt:
    """Write one label set of one block, then its receipt.

    Args:
        root: the store's folder.
        spec: the label set.
        block: number of the block.
        masks: by row, (K, H, W) uint8 on the mask's own grid, or None for a row without one.
        sources: by row, where the mask came from; sizes are taken from ``masks``.

    Raises:
        OSError: when the disk is full or read-only.
    """
    tiles: dict[tuple[int, int, int, int], dict[int, NDArray[Any]]] = {}
    lines = []
    for row, mask in sorted(masks.items()):
        height_px, width_px = (0, 0) if mask is None else mask.shape[1:]
        lines.append(
            replace(
                sources[row],
                row=row,
                height_px=height_px,
                width_px=width_px,
                present=mask is not None,
            )
        )
        if mask is None:
            continue
        for k in range(spec.num_planes):
            for y in range(0, height_px, LABEL_TILE_PX):
                for x in range(0, width_px, LABEL_TILE_PX):
                    tile = np.zeros(spec.grid.inner[1:], dtype=np.uint8)
                    part = mask[k, y : y + LABEL_TILE_PX, x : x + LABEL_TILE_PX]
                    tile[0, : part.shape[0], : part.shape[1]] = part
                    index = (block, k, y // LABEL_TILE_PX, x // LABEL_TILE_PX)
                    tiles.setdefault(index, {})[row % BLOCK_ROWS] = tile
    _take_back(root, spec.item, block, [spec.grid.key(index) for index in tiles])
    records = [
        _write_shard(root, spec.grid, index, chunks) for index, chunks in sorted(tiles.items())
    ]
    receipt = label_receipt(spec, block, lines, records)
    write_receipt(root, receipt)
    return receipt


def label_receipt(
    spec: LabelSetSpec, block: int, lines: Iterable[LabelRow], shards: Iterable[ShardRecord]
) -> Receipt:
    """Return the receipt of a label set's block: a line a row, and the files of its masks."""
    ordered = sorted(lines, key=lambda line: line.row)
    rows = tuple(line.row for line in ordered)
    return Receipt(spec.item, block, rows, "", tuple(shards), Facts.of(map(asdict, ordered)))


def write_sample_facts(root: Place, block: int, rows: Sequence[SampleRow]) -> Receipt:
    """Write what decoding found out about a block's rows: the receipt of the item "samples"."""
    facts = Facts.of(
        {
            "row": row.row,
            "status": row.status,
            "reason": row.reason,
            "height_px": row.height_px,
            "width_px": row.width_px,
            "num_channels": row.num_channels,
            "size_bytes": row.size_bytes,
            "mtime_ns": row.mtime_ns,
            "pixel_sha256": row.pixel_sha256,
        }
        for row in rows
    )
    ok = tuple(row.row for row in rows if row.status == "ok")
    receipt = Receipt(SAMPLES_ITEM, block, ok, "", (), facts)
    write_receipt(root, receipt)
    return receipt


def missing_items(
    rows: Sequence[SampleRow],
    receipts: Mapping[ReceiptKey, Receipt],
    root: Place,
    *,
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_sources: Mapping[str, Mapping[int, LabelRow]],
) -> dict[int, frozenset[str]]:
    """Return, by block, the items that are still to be written; finished blocks are absent.

    Args:
        rows: in row order; pending and ok ones count; facts need not be merged in.
        receipts: of the blocks that ``rows`` lie in.
        root: the store's folder, whose files' sizes are compared.
        levels: every level.
        label_sources: by label set and row, the mask file that the labels must have come from.
    """
    missing: dict[int, frozenset[str]] = {}
    merged = RowsWithFacts(rows, receipts)
    sizes = file_sizes(root) if receipts and len(rows) > BLOCK_ROWS else None
    for block, found in groupby(merged, key=lambda row: block_of(row.row)):
        members = [row for row in found if row.status in ("pending", "ok")]
        if not members:
            continue
        items = {
            spec.item
            for spec, fingerprint in levels.values()
            if not _level_done(
                receipts.get((spec.item, block)), members, fingerprint.digest, root, sizes
            )
        }
        for name, sources in label_sources.items():
            receipt = receipts.get((f"labels.{name}", block))
            if not _labels_done(receipt, members, sources, root, sizes):
                items.add(f"labels.{name}")
        if any(row.status == "pending" for row in members):
            items.add(SAMPLES_ITEM)
        if items:
            missing[block] = frozenset(items)
    return missing


def _level_done(
    receipt: Receipt | None,
    members: Sequence[SampleRow],
    digest: str,
    root: Place,
    sizes: Mapping[str, int] | None,
) -> bool:
    return (
        receipt is not None
        and receipt.digest == digest
        and {row.row for row in members if row.status == "ok"} <= set(receipt.rows)
        and receipt.is_done(root, sizes)
    )


def _labels_done(
    receipt: Receipt | None,
    members: Sequence[SampleRow],
    sources: Mapping[int, LabelRow],
    root: Place,
    sizes: Mapping[str, int] | None,
) -> bool:
    # One without rows was taken back, or has nothing to say of pending rows.
    if receipt is None or not receipt.rows or not receipt.is_done(root, sizes):
        return False
    facts = receipt.facts.columns
    files = zip(facts["source"], facts["size_bytes"], facts["mtime_ns"], strict=True)
    written = dict(zip(facts["row"], files, strict=True))
    for row in members:
        if row.status == "ok":
            source = sources[row.row]
            wanted = (source.source, source.size_bytes, source.mtime_ns)
            if written.get(row.row) != wanted:
                return False
    return True


def seal_store(
    root: Place,
    receipts: ReceiptsOnDemand | None = None,
    rows: Sequence[SampleRow] | None = None,
) -> None:
    """Fold facts into the tables and write the seal; hold :func:`store_lock` meanwhile.

    The caller has made sure that nothing is missing (:func:`missing_items`).

    Args:
        root: the store's folder.
        receipts: all of them, for a caller who has just read them.
        rows: the table of samples, likewise, with the receipts' facts in it.

    Raises:
        OSError: when the disk is full or read-only; the store stays unsealed and loses nothing.
    """
    description = read_description(root)
    items = {SAMPLES_ITEM, *(f"levels.{name}" for name in description["levels"])}
    items |= {f"labels.{name}" for name in description["label_sets"]}
    # What the description no longer names was being removed.
    kept = (receipts or scan_receipts(root)).only(items)
    write_samples(root, RowsWithFacts(scan_samples(root), kept) if rows is None else rows)
    hashed = ["zarr.json", "levels/zarr.json", "labels/zarr.json", SAMPLES_FILE, ANNOTATIONS_FILE]
    for name in description["levels"]:
        hashed += [f"{grid.folder}/zarr.json" for grid in read_level_spec(root, name).grids]
    for name in description["label_sets"]:
        folder = root / "labels" / name
        write_label_rows(folder, scan_label_facts(name, kept))
        hashed += [
            f"labels/{name}/{file}" for file in ("zarr.json", "masks/zarr.json", LABEL_ROWS_FILE)
        ]
    write_seal(root, kept, hashed)
    (root / CHANGE_FILE).unlink(missing_ok=True)
    _sweep(root)


def finish_seal(root: Place) -> None:
    """Tidy up behind a seal whose writer was killed before it had; hold :func:`store_lock`."""
    if not is_sealed(root):
        return
    if any((root / "claims").glob("*.lock")) or not (root / SEAL_COPY).exists():
        finish_sealing(root)
        _sweep(root)


def _sweep(root: Place) -> None:
    sweep_temporaries(root)
    # Last: as long as they are there, something may be left to tidy up.
    BlockClaims(root).sweep()


def _take_back(root: Place, item: str, block: int, keys: Sequence[str]) -> None:
    """Unsay a receipt before files that it may name are replaced.

    A kill between the first of them and the new receipt would leave an old one that vouches for
    bytes of the new, which may well have the size it states.
    """
    if any((root / key).is_file() for key in keys):
        write_receipt(root, Receipt(item, block, ()))


def _write_shard(
    root: Place,
    grid: ShardGrid,
    index: tuple[int, ...],
    chunks: Mapping[int, NDArray[Any]],
) -> ShardRecord:
    shard = encode_shard(grid, chunks)
    key = grid.key(index)
    path = root / key
    # Killed writers' temporaries, which many a kill would fill the disk with. Nobody else writes
    # this shard now; but where files cannot be locked, somebody may.
    if isinstance(path, Path):
        for stray in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            with suppress(FileNotFoundError):
                if time.time() - stray.stat().st_mtime > _STRAY_AGE_S:
                    stray.unlink()
    write_atomic(path, shard.data)
    return ShardRecord(key, len(shard.data), crc32c(shard.data), shard.chunk_crc32c)
