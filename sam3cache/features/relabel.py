"""Changing what a store says of its samples, labels and annotations, without touching a feature.

A change is prepared beside what it replaces, and put in place while the store is locked: a kill
leaves what was there before, or a store that is not sealed and names the change. The same change
made again completes it. Masks of two versions of a set never stand in one set.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3cache.errors import (
    ConfigError,
    MissingSampleError,
    StoreBusyError,
    UnsealedStoreError,
)
from sam3cache.features.files import canonical_json
from sam3cache.features.levels import BLOCK_ROWS, LabelSetSpec, group_metadata
from sam3cache.features.locks import require_idle, store_lock
from sam3cache.features.receipts import (
    CHANGE_FILE,
    FORMAT_VERSION,
    LABEL_CHANGE,
    OVERLAY_OF,
    break_seal,
    fold_receipts,
    is_sealed,
    read_receipts,
)
from sam3cache.features.store import (
    FeatureStore,
    interrupted_change,
    open_overlay,
    open_store,
    read_description,
)
from sam3cache.features.tables import AnnotationRow, LabelRow, write_annotations
from sam3cache.features.writer import GROUP_FILE, missing_items, seal_store
from sam3cache.runtime import write_atomic
from sam3cache.tasks import Task

STAGING_FOLDER = "claims/labels"
"""Where masks are written before they are put in place, below the store."""

# A set's name becomes a folder's, on every system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def require_label_set_name(name: str) -> None:
    """Refuse a name that cannot be a folder's.

    Raises:
        ConfigError: naming it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"label set {name!r}: expected letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit; choose another name"
        )


def open_to_change(root: Path) -> FeatureStore:
    """Open a store or overlay whose labels or annotations are to be changed.

    One that is not sealed is accepted if a change like ours was interrupted and no feature is
    missing.

    Raises:
        NotAStoreError: when there is none.
        UnsealedStoreError: when extraction has not finished.
        CorruptStoreError: when it is not what it was sealed with.
    """
    is_overlay = OVERLAY_OF in read_description(root)["settings"]
    open_it = open_overlay if is_overlay else open_store
    if is_sealed(root):
        return open_it(root)
    store = open_it(root, allow_unsealed=True)
    levels = {name: (spec, store.fingerprint(name)) for name, spec in store.levels.items()}
    if not interrupted_change(root) or missing_items(
        store.sample_rows, store.receipts, root, levels=levels, label_sources={}
    ):
        raise UnsealedStoreError(
            f"{root} is not sealed: its extraction has not finished; run the same "
            "`sam3cache extract` again first"
        )
    return store


@contextmanager
def changing(root: Path, change: str, seal: str | None = None) -> Iterator[FeatureStore]:
    """Unseal a store for a change of its labels or annotations, and seal it anew; locks it.

    Args:
        root: the store, or an overlay.
        change: what to call it, should it be interrupted.
        seal: of the store that the change was made for; None where it depends on none.

    Yields:
        The store as it was before.

    Raises:
        UnsealedStoreError: when extraction, or a change of labels, has not finished.
        StoreBusyError: when another process holds the store, or has changed it meanwhile.
        OSError: when it cannot be written; it then stays unsealed if the change had begun.
    """
    with store_lock(root):
        require_idle(root)
        store = open_to_change(root)
        if seal is not None and store.seal != seal:
            raise StoreBusyError(
                f"{root} was changed by another process meanwhile; run the same command again"
            )
        before = "" if store.sealed else interrupted_change(root)
        # One of labels has taken the old set away: only one of that set may seal the store.
        if before.startswith(LABEL_CHANGE) and before.split()[-1] != change.split()[-1]:
            raise UnsealedStoreError(
                f"{root} is not sealed: {before} was interrupted; run that command again first"
            )
        (root / CHANGE_FILE).parent.mkdir(exist_ok=True)
        write_atomic(root / CHANGE_FILE, canonical_json({"change": change}))
        break_seal(root)
        yield store
        seal_store(root)


def replace_annotations(root: Path, rows: Sequence[AnnotationRow], seal: str | None = None) -> None:
    """Replace a store's annotations, or an overlay's.

    Args:
        root: the store, or an overlay.
        rows: the whole table, in row order.
        seal: of what the rows were made for.

    Raises:
        UnsealedStoreError: when extraction has not finished.
        StoreBusyError: when another process holds the store.
        OSError: when it cannot be written.
    """
    with changing(root, "a change of its annotations", seal):
        _describe(root, read_description(root))
        write_annotations(root, rows)


def staging_of(root: Path, name: str) -> Path:
    """Return the folder that the masks of a set are written below before they are in place."""
    return root / STAGING_FOLDER / name


def put_label_set(
    root: Path,
    name: str,
    classes: tuple[str, ...],
    seal: str | None = None,
    *,
    task: Task = "multilabel",
) -> None:
    """Make what was written below :func:`staging_of` the store's label set of a name.

    The description loses the old set first and gains the new one last. Between the two the store
    is not sealed and has no set of this name.

    Args:
        root: the store, or an overlay.
        name: of the set; an old one is replaced.
        classes: names by plane, or of the class numbers from 1 on.
        seal: of the store whose rows were labelled.
        task: what the set is of.

    Raises:
        UnsealedStoreError: when extraction has not finished.
        StoreBusyError: when another process holds the store, or has changed it meanwhile.
        OSError: when it cannot be written.
    """
    staging = staging_of(root, name)
    staged = read_receipts(staging)
    lines = [LabelRow(**fact) for receipt in staged.values() for fact in receipt.facts]
    spec = LabelSetSpec(
        name,
        classes,
        max((line.height_px for line in lines), default=1) or 1,
        max((line.width_px for line in lines), default=1) or 1,
        task,
    )
    with changing(root, f"{LABEL_CHANGE} set {name}`", seal):
        _forget(root, name)
        masks = root / spec.grid.folder
        masks.parent.mkdir(parents=True, exist_ok=True)
        if (staging / spec.grid.folder).exists():
            (staging / spec.grid.folder).rename(masks)
        fold_receipts(root, read_receipts(root) | staged)
        description = read_description(root)
        num_rows = description["num_blocks"] * BLOCK_ROWS
        content = spec.grid.metadata(num_rows, spec.shape)
        write_atomic(masks / GROUP_FILE, content)
        write_atomic(masks.parent / GROUP_FILE, group_metadata(spec.attributes))
        description["label_sets"] = sorted([*description["label_sets"], name])
        _describe(root, description)
    shutil.rmtree(staging)


def remove_label_set(root: Path, name: str) -> None:
    """Remove a label set, or what an interrupted change left of it.

    Raises:
        MissingSampleError: when the store has none of this name.
        UnsealedStoreError: when extraction has not finished.
        StoreBusyError: when another process holds the store.
        OSError: when it cannot be written.
    """
    require_label_set_name(name)
    store = open_to_change(root)
    leftovers = [staging_of(root, name), root / "labels" / name]
    if name not in store.label_sets and not any(path.exists() for path in leftovers):
        raise MissingSampleError(
            f"{root} has no label set {name}; it has {', '.join(store.label_sets) or 'none'}"
        )
    with changing(root, f"{LABEL_CHANGE} remove {name}`"):
        _forget(root, name)
    shutil.rmtree(staging_of(root, name), ignore_errors=True)


def _forget(root: Path, name: str) -> None:
    """Take a label set out of the description, then its receipts, then its masks."""
    description = read_description(root)
    description["label_sets"] = [other for other in description["label_sets"] if other != name]
    _describe(root, description)
    receipts = read_receipts(root)
    fold_receipts(root, {k: r for k, r in receipts.items() if k[0] != f"labels.{name}"})
    folder = root / "labels" / name
    if folder.exists():
        shutil.rmtree(folder)


def _describe(root: Path, description: dict[str, Any]) -> None:
    # Receipts are written as this version does.
    content = group_metadata(description | {"format_version": FORMAT_VERSION})
    if (root / GROUP_FILE).read_bytes() != content:
        write_atomic(root / GROUP_FILE, content)


@dataclass(frozen=True, slots=True)
class LabelSetSummary:
    """What a label set holds.

    Attributes:
        name: of the set.
        classes: names by plane, or of the class numbers from 1 on.
        num_with_mask: samples of the store that have a mask in it, an empty one too.
        num_without_mask: samples of the store that have none.
        height_px: of the highest mask.
        width_px: of the widest.
        size_bytes: of its files.
        in_overlay: whether it lies in the overlay rather than in the store.
        task: whether masks are planes of 0 and 1, or class numbers.
    """

    name: str
    classes: tuple[str, ...]
    num_with_mask: int
    num_without_mask: int
    height_px: int
    width_px: int
    size_bytes: int
    in_overlay: bool
    task: Task


def summarise_label_sets(store: FeatureStore) -> tuple[LabelSetSummary, ...]:
    """Say what each label set of a store holds, those of its overlay too."""
    summaries = []
    for name, spec in sorted(store.label_sets.items()):
        holder = store.holder_of(name)
        num_with_mask = sum(store.has_mask(sample.row, name) for sample in store.samples)
        summaries.append(
            LabelSetSummary(
                name,
                spec.classes,
                num_with_mask,
                len(store.samples) - num_with_mask,
                spec.height_px,
                spec.width_px,
                sum(
                    shard.size_bytes
                    for (item, _), receipt in holder.receipts.items()
                    if item == spec.item
                    for shard in receipt.shards
                ),
                holder is not store,
                spec.task,
            )
        )
    return tuple(summaries)
