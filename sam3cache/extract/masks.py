"""What becomes of a store's masks when a manifest names others, or has no say in them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from sam3cache.extract.config import LABEL_SET
from sam3cache.extract.rows import RowPlan
from sam3cache.extract.state import StoreState
from sam3cache.features import (
    LabelRow,
    LabelSetSpec,
    Place,
    Receipt,
    ReceiptKey,
    SampleRow,
    block_of,
)
from sam3cache.features.receipts import masks_in, write_receipt
from sam3cache.features.writer import label_receipt

_NO_MASK = 0


def changed_masks(state: StoreState, plan: RowPlan) -> array[int]:
    """Return the rows whose stored mask comes from another file, or another state of it, than now.

    Args:
        state: of the store.
        plan: what the manifest asks for.
    """
    masks = plan.masks
    changed = array("q")
    for stored in state.masks.values():
        mask = masks.get(stored.row)
        if mask is not None:
            now = (mask.source, mask.size_bytes, mask.mtime_ns)
            if (stored.source, stored.size_bytes, stored.mtime_ns) != now:
                changed.append(stored.row)
    return changed


def hash_masks(receipts: Mapping[ReceiptKey, Receipt], rows: Iterable[int]) -> array[int]:
    """Return a number for each row's mask, which tells it from others of this process; 0 for none.

    Nothing is decoded: receipts know sizes and checksums.

    Args:
        receipts: of the store.
        rows: in ascending order.
    """
    hashes = array("q")
    for block, members in groupby(rows, key=block_of):
        masks = masks_in(receipts.get((f"labels.{LABEL_SET}", block)))
        hashes.extend(hash(masks[row]) or 1 if row in masks else _NO_MASK for row in members)
    return hashes


def num_new_masks(before: Sequence[int], after: Sequence[int]) -> int:
    """Count the masks that are others than they were, given what :func:`hash_masks` returned."""
    return sum(new not in (old, _NO_MASK) for old, new in zip(before, after, strict=True))


def complete_label_sets(
    root: Place,
    label_sets: Iterable[LabelSetSpec],
    rows: Iterable[SampleRow],
    receipts: Mapping[ReceiptKey, Receipt],
) -> bool:
    """Note of every sample that no receipt of a label set speaks of that it has no mask there.

    Hold :func:`store_lock`.

    Args:
        root: the store's folder.
        label_sets: to be completed.
        rows: of the store, in row order, with the receipts' facts merged in.
        receipts: of the store.

    Returns:
        Whether any receipt has been written.

    Raises:
        OSError: when the disk is full or read-only.
    """
    specs = list(label_sets)
    has_written = False
    for block, found in groupby(rows, key=lambda row: block_of(row.row)):
        ok = {row.row for row in found if row.status == "ok"}
        for spec in specs:
            receipt = receipts.get((spec.item, block))
            lacking = ok.difference(() if receipt is None else receipt.rows)
            if lacking:
                lines = [LabelRow(**fact) for fact in receipt.facts] if receipt else []
                lines += map(LabelRow, lacking)
                shards = () if receipt is None else receipt.shards
                write_receipt(root, label_receipt(spec, block, lines, shards))
                has_written = True
    return has_written
