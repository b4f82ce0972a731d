"""Giving back the space of samples that are gone: repack.

Rows are never used twice. Living samples that share a block with dead ones are copied into new
blocks at the end; then the tables point to them; then the seal forgets the old blocks; then their
files are deleted. A crash leaves, at every point, a store that holds all living samples: unsealed
until the seal is in place, which `extract` or another repack completes, and with files to delete
after it, which the next repack does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam3cache.errors import UnsealedStoreError
from sam3cache.features.copying import CopiedRow, Report, copy_block
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import BLOCK_ROWS, LevelSpec
from sam3cache.features.locks import require_idle, store_lock
from sam3cache.features.receipts import FOLDED_FILE, Receipt, fold_receipts, read_receipts
from sam3cache.features.store import (
    FeatureStore,
    interrupted_change,
    open_store,
    read_description,
)
from sam3cache.features.tables import SampleRow, write_samples
from sam3cache.features.writer import block_of, describe_store, num_blocks_of, seal_store
from sam3cache.runtime import TEMPORARY_SUFFIX


@dataclass(frozen=True)
class RepackResult:
    """What a repack has done.

    Attributes:
        store: its folder.
        num_dropped: samples that are gone and whose features are now gone, too.
        num_moved: living samples that were copied into other blocks.
        num_strays: files that nothing named, deleted.
        size_bytes: of the files of levels and labels now.
        freed_bytes: deleted, less what was written anew.
        elapsed_s: of the call.
    """

    store: Path
    num_dropped: int
    num_moved: int
    num_strays: int
    size_bytes: int
    freed_bytes: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class DeadSpace:
    """What a repack would give back.

    Attributes:
        num_samples: that are gone, but whose features or masks are still stored.
        size_bytes: that they take, by their share of the files they are in.
    """

    num_samples: int
    size_bytes: int


def dead_space(store: FeatureStore) -> DeadSpace:
    """Say what a repack of a store would give back, strays aside."""
    live = {row.row for row in store.sample_rows if row.status in ("ok", "pending")}
    dead: set[int] = set()
    size_bytes = 0.0
    for receipt in store.receipts.values():
        if receipt.shards:
            gone = [row for row in receipt.rows if row not in live]
            dead.update(gone)
            stored_bytes = sum(shard.size_bytes for shard in receipt.shards)
            size_bytes += stored_bytes * len(gone) / len(receipt.rows)
    return DeadSpace(len(dead), round(size_bytes))


def repack(root: Path, report: Report = lambda num_done, num_total: None) -> RepackResult:
    """Delete what a store holds of samples that are gone, and files that nothing names.

    Samples that are removed or set aside are gone. Living ones keep their ids, features, masks and
    annotations, bit by bit; some get other rows. A store without dead samples, and without blocks
    that would fit into fewer, is left as it is.

    Args:
        root: the store's folder; nothing else should read it meanwhile.
        report: called with samples moved and to be moved.

    Raises:
        NotAStoreError: when there is no store.
        UnsealedStoreError: when an extraction has not finished.
        StoreBusyError: when another process works on the store.
        CorruptStoreError: when bytes that are read are not those that were written.
        OSError: when the disk is full or read-only; nothing is lost.
    """
    start_s = time.monotonic()
    read_description(root)
    with store_lock(root):
        store = _open_complete(root)
        num_dropped = dead_space(store).num_samples
        freed_bytes = num_moved = 0
        # Blocks that are dead altogether first: they give room to move in, and need none.
        dead_blocks = {block for block, rows in _stored_rows(store).items() if not rows.live}
        if dead_blocks or not store.sealed:
            freed_bytes += _rewrite(root, store, [], dead_blocks)
            store = open_store(root)
        moved_blocks = _blocks_to_move(store)
        if moved_blocks:
            rows = _moved_rows(store, moved_blocks)
            num_moved = len(rows)
            freed_bytes += _rewrite(root, store, rows, moved_blocks, report)
            store = open_store(root)
        strays = list(_strays(root, store))
        freed_bytes += _delete(root, strays)
        size_bytes = sum(s.size_bytes for r in store.receipts.values() for s in r.shards)
    return RepackResult(
        store=root,
        num_dropped=num_dropped,
        num_moved=num_moved,
        num_strays=len(strays),
        size_bytes=size_bytes,
        freed_bytes=freed_bytes,
        elapsed_s=time.monotonic() - start_s,
    )


@dataclass(slots=True)
class _BlockRows:
    """Rows of a block that have something stored: living ones, and others."""

    live: set[int]
    dead: set[int]


def _open_complete(root: Path) -> FeatureStore:
    """Open a store to which nothing is being added.

    One that is unsealed, and yet complete, is what a killed repack leaves.
    """
    require_idle(root)
    store = open_store(root, allow_unsealed=True)
    if store.sealed:
        return store
    change = interrupted_change(root)
    if change:
        raise UnsealedStoreError(
            f"{root} is not sealed: {change} was interrupted; run that command again before "
            "repacking"
        )
    if not _is_complete(store):
        raise UnsealedStoreError(
            f"{root} is not sealed: its extraction has not finished; run the same "
            "`sam3cache extract` again before repacking"
        )
    return store


def _is_complete(store: FeatureStore) -> bool:
    """Return whether every living sample has all levels, and a line in every label set."""
    digests: dict[str, str] = {
        spec.item: store.fingerprint(name).digest for name, spec in store.levels.items()
    }
    digests |= {spec.item: "" for spec in store.label_sets.values()}
    rows_of_block: dict[int, set[int]] = defaultdict(set)
    for row in store.sample_rows:
        if row.status == "pending":
            return False
        if row.status == "ok":
            rows_of_block[block_of(row.row)].add(row.row)
    for block, rows in rows_of_block.items():
        for item, digest in digests.items():
            receipt = store.receipts.get((item, block))
            if receipt is None or receipt.digest != digest or not rows <= set(receipt.rows):
                return False
            if not receipt.is_done(store.path):
                return False
    return True


def _stored_rows(store: FeatureStore) -> dict[int, _BlockRows]:
    """Return, by block, the rows that take space; blocks without any are absent."""
    live = {row.row for row in store.sample_rows if row.status == "ok"}
    blocks: dict[int, _BlockRows] = {}
    for receipt in store.receipts.values():
        if receipt.shards:
            rows = blocks.setdefault(receipt.block, _BlockRows(set(), set()))
            rows.live.update(live.intersection(receipt.rows))
            rows.dead.update(row for row in receipt.rows if row not in live)
    return blocks


def _blocks_to_move(store: FeatureStore) -> set[int]:
    """Return the blocks whose living rows shall move: those with dead ones, and those not full.

    Blocks that are merely not full move only where that leaves fewer blocks.
    """
    blocks = {block: rows for block, rows in _stored_rows(store).items() if rows.live}
    mixed = {block for block, rows in blocks.items() if rows.dead}
    loose = {
        block
        for block, rows in blocks.items()
        if block not in mixed and len(rows.live) < BLOCK_ROWS
    }
    num_mixed = sum(len(blocks[block].live) for block in mixed)
    num_loose = sum(len(blocks[block].live) for block in loose)
    apart = _num_blocks(num_mixed) + len(loose)
    return mixed | loose if _num_blocks(num_mixed + num_loose) < apart else mixed


def _num_blocks(num_rows: int) -> int:
    return -(-num_rows // BLOCK_ROWS)


def _moved_rows(store: FeatureStore, blocks: set[int]) -> list[CopiedRow]:
    """Give new rows, from the next block on, to the living samples of some blocks."""
    first_row = BLOCK_ROWS * max(
        num_blocks_of(store.sample_rows), 1 + max(block for _, block in store.receipts)
    )
    moving = [r for r in store.sample_rows if r.status == "ok" and block_of(r.row) in blocks]
    return [
        CopiedRow(
            store,
            row.row,
            replace(row, row=number),
            replace(store.annotations[row.row], row=number),
        )
        for number, row in enumerate(moving, first_row)
    ]


def _rewrite(
    root: Path,
    store: FeatureStore,
    moved: list[CopiedRow],
    gone_blocks: set[int],
    report: Report = lambda num_done, num_total: None,
) -> int:
    """Copy rows into new blocks, point the tables to them, and drop their old blocks.

    Returns:
        Bytes of the files that were deleted, less those that were written.
    """
    levels: dict[str, tuple[LevelSpec, Fingerprint]] = {
        name: (spec, store.fingerprint(name)) for name, spec in store.levels.items()
    }
    description: dict[str, Any] = {
        "settings": store.settings,
        "levels": levels,
        "label_sets": store.label_sets,
    }
    old_notes = store.annotations
    for name in store.label_sets:
        store.label_rows(name)  # Read now: the seal, and with it their table, is about to go.
    if moved:
        # First the row numbers are taken, by tombstones: after a crash, an extraction must not find
        # features in blocks that it takes for new. The annotations, too, come before the samples
        # that need them.
        taken = [
            SampleRow(row.sample.row, "", "", status="removed", reason="taken by a repack")
            for row in moved
        ]
        describe_store(
            root,
            **description,
            samples=[*store.sample_rows, *taken],
            annotations=[*old_notes.values(), *(row.note for row in moved)],
        )
    blocks: dict[int, list[CopiedRow]] = defaultdict(list)
    for row in moved:
        blocks[block_of(row.sample.row)].append(row)
    num_done = 0
    for block, rows in blocks.items():
        copy_block(root, block, rows, levels=levels, label_sets=store.label_sets)
        num_done += len(rows)
        report(num_done, len(moved))
    # The lines of old rows stay until their annotations are gone: no table has a row too much.
    table = _table_after(store, moved)
    numbers = {sample.row for sample in table if sample.status != "removed"}
    kept_notes = [note for row, note in old_notes.items() if row in numbers]
    describe_store(
        root,
        **description,
        samples=table,
        annotations=[*kept_notes, *(row.note for row in moved)],
    )
    last = table[-1]
    write_samples(root, [row for row in table if row.status != "removed" or row is last])
    kept = {key: r for key, r in read_receipts(root).items() if key[1] not in gone_blocks}
    fold_receipts(root, kept)
    seal_store(root)
    gone = [receipt for (_, block), receipt in store.receipts.items() if block in gone_blocks]
    freed_bytes = _delete(root, _files_of(gone))
    now = open_store(root)
    written = [receipt for (_, block), receipt in now.receipts.items() if block in blocks]
    return freed_bytes - sum(shard.size_bytes for receipt in written for shard in receipt.shards)


def _table_after(store: FeatureStore, moved: list[CopiedRow]) -> list[SampleRow]:
    """Return the table of samples with tombstones for all that is gone or has moved.

    The tombstones have no hash, and so do not come back. One at the highest row that was ever given
    shall stay, if no sample has it: what is added later must not get that number again.
    """
    old_rows = {row.row for row in moved}
    return [
        replace(row, status="removed", reason="its space was given back", pixel_sha256="")
        if row.status == "removed" or row.row in old_rows
        else row
        for row in store.sample_rows
    ] + [row.sample for row in moved]


def _files_of(receipts: Iterable[Receipt]) -> Iterator[str]:
    return (shard.key for receipt in receipts for shard in receipt.shards)


def _strays(root: Path, store: FeatureStore) -> Iterator[str]:
    """Name the files, below a sealed store, that no receipt vouches for."""
    named = set(_files_of(store.receipts.values()))
    for part in ("levels", "labels"):
        for path in (root / part).rglob("*"):
            key = path.relative_to(root).as_posix()
            if "/c/" in key and key not in named and path.is_file():
                yield key
    # Left over where a kill came right after the seal, which holds them all.
    yield from (path.relative_to(root).as_posix() for path in (root / "receipts").glob("*/*.json"))
    if (root / FOLDED_FILE).exists():
        yield FOLDED_FILE
    for path in root.rglob(f".*{TEMPORARY_SUFFIX}"):
        key = path.relative_to(root).as_posix()
        if "/c/" not in key:
            yield key


def _delete(root: Path, keys: Iterable[str]) -> int:
    """Delete files below a store, and the folders that they leave empty; return their bytes."""
    size_bytes = 0
    for key in keys:
        path = root / key
        # On Windows what another process has open cannot be deleted; the next repack does it.
        with suppress(FileNotFoundError, PermissionError):
            file_bytes = path.stat().st_size
            path.unlink()
            size_bytes += file_bytes
        for folder in path.parents[: max(0, len(Path(key).parts) - 3)]:
            try:
                folder.rmdir()
            except OSError:
                break
    return size_bytes
