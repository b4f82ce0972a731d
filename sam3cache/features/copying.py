"""Copying samples of stores into a new one, a block at a time: subset and merge.

Whatever can be read like a store can be copied (:class:`RowReader`): import takes samples from an
HDF5 file in the same way, and repack moves a store's own. A copy that was killed leaves an unsealed
store, which the same call goes on with.

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError, FingerprintError, StoreError, UnsealedStoreError
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import LabelSetSpec, LevelSpec
from sam3cache.features.locks import store_lock
from sam3cache.features.places import Place
from sam3cache.features.precision import Encoded
from sam3cache.features.receipts import is_sealed, read_receipts
from sam3cache.features.store import (
    FeatureStore,
    interrupted_change,
    merge_sample_facts,
    open_store,
)
from sam3cache.features.tables import (
    AnnotationRow,
    LabelRow,
    SampleRow,
    read_samples,
)
from sam3cache.features.writer import (
    GROUP_FILE,
    block_of,
    describe_store,
    finish_seal,
    foreign_files,
    is_described,
    missing_items,
    seal_store,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

Report = Callable[[int, int], None]
"""Called with the number of samples done, and of all."""

_FIELDS = ("id", "source", "frame", "split", "group", "primary_angle_deg", "secondary_angle_deg")


class RowReader(Protocol):
    """What samples can be copied from; a :class:`FeatureStore` is one."""

    @property
    def label_sets(self) -> Mapping[str, LabelSetSpec]:
        """Label sets by name."""

    def read_stored(self, level: str, row: int) -> Encoded:
        """Return one sample of a level as it is stored, checked."""

    def read_mask(self, row: int, label_set: str) -> NDArray[np.uint8] | None:
        """Return a sample's mask (K, H, W) on its own grid, or None when it has none."""

    def label_rows(self, label_set: str) -> Mapping[int, LabelRow]:
        """Return, by row, the sizes and sources of a label set's masks."""


@dataclass(frozen=True, slots=True)
class CopiedRow:
    """A sample and the place that it is copied from.

    Attributes:
        reader: what holds it now.
        row: its row there.
        sample: its line of samples.parquet in the new store, with status "ok".
        note: its line of annotations.parquet there.
    """

    reader: RowReader
    row: int
    sample: SampleRow
    note: AnnotationRow


@dataclass(frozen=True)
class CopyPlan:
    """A store to be made of copied samples.

    Attributes:
        settings: provenance of the new store.
        levels: by name.
        label_sets: by name.
        rows: in row order.
    """

    settings: Mapping[str, Any]
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]]
    label_sets: Mapping[str, LabelSetSpec]
    rows: tuple[CopiedRow, ...]


@dataclass(frozen=True)
class CopyResult:
    """What a copy has made.

    Attributes:
        store: the new store.
        num_samples: in it.
        num_copied: of them and their variants, by this call; an earlier one that was stopped
            copied the others.
        levels: names.
        label_sets: names.
        size_bytes: of the files of its levels and labels.
        num_left_behind: samples that the sources had set aside: there is nothing of them to copy.
        num_variants: changed views of the samples, which are not counted among them.
        warnings: a line each.
        elapsed_s: of the call.
    """

    store: Path
    num_samples: int
    num_copied: int
    levels: tuple[str, ...]
    label_sets: tuple[str, ...]
    size_bytes: int
    num_left_behind: int = 0
    num_variants: int = 0
    warnings: tuple[str, ...] = ()
    elapsed_s: float = 0.0


def subset(
    source: Path,
    output: Path,
    *,
    splits: Sequence[str] = (),
    ids: Sequence[str] | None = None,
    where: Sequence[tuple[str, str]] = (),
    levels: Sequence[str] | None = None,
    label_sets: Sequence[str] | None = None,
    overlay: Path | None = None,
    report: Report = lambda num_done, num_total: None,
) -> CopyResult:
    """Copy some samples of a store into a new one, and the variants that training has of them.

    Args:
        source: a sealed store; it is only read.
        output: the new store's folder.
        splits: only samples of these; of all when empty.
        ids: only samples with these ids.
        where: only samples with these values, name and value as text; several values of one name
            are alternatives.
        levels: names; all unless given.
        label_sets: names; all unless given.
        overlay: labels and annotations kept beside the store, which go before its own.
        report: called with samples done and in all.

    Raises:
        ConfigError: when a name or value is not in the store, or nothing is left.
        StoreError: when ``source`` cannot be read, or ``output`` holds something else.
    """
    start_s = time.monotonic()
    store = open_sealed(source, overlay=overlay)
    rows = _select(store, splits, ids, where)
    plan = CopyPlan(
        settings=_settings([store]),
        levels=_levels([store], levels),
        label_sets=_label_sets([store], label_sets),
        rows=tuple(_copied(store, row, number) for number, row in enumerate(rows)),
    )
    num_copied = copy_into(output, plan, report)
    return replace(
        _result(output, plan, num_copied),
        num_left_behind=0 if ids is not None else len(store.set_aside),
        elapsed_s=time.monotonic() - start_s,
    )


def merge(
    sources: Sequence[Path],
    output: Path,
    *,
    levels: Sequence[str] | None = None,
    label_sets: Sequence[str] | None = None,
    prefix: bool = False,
    report: Report = lambda num_done, num_total: None,
) -> CopyResult:
    """Copy all samples of several stores into a new one, in the order of the stores.

    A group of one name is taken as the same patient in all stores, so that it is never split; with
    ``prefix`` ids and groups bear the name of their store, and are then all different.

    Args:
        sources: sealed stores; they are only read.
        output: the new store's folder.
        levels: names; those of all stores unless given.
        label_sets: names; those of any store unless given.
        prefix: put the store's name and "-" before every id and group.
        report: called with samples done and in all.

    Raises:
        ConfigError: when a name is in no store, or fewer than two stores are given.
        FingerprintError: when a level was not made in the same way everywhere.
        StoreError: when ids clash, a level is not in all stores, or ``output`` holds something
            else.
    """
    start_s = time.monotonic()
    if len({path.resolve() for path in sources}) < max(2, len(sources)):
        raise ConfigError(
            f"{', '.join(map(str, sources))}: a merge takes two stores or more, each of them once"
        )
    stores = [open_sealed(path) for path in sources]
    plan = CopyPlan(
        settings=_settings(stores),
        levels=_levels(stores, levels),
        label_sets=_label_sets(stores, label_sets),
        rows=_merged_rows(stores, prefix),
    )
    num_copied = copy_into(output, plan, report)
    return replace(
        _result(output, plan, num_copied),
        num_left_behind=sum(len(store.set_aside) for store in stores),
        warnings=(*_twins(plan.rows), *_shared_groups(plan.rows)),
        elapsed_s=time.monotonic() - start_s,
    )


def open_sealed(path: Path, *, overlay: Path | None = None) -> FeatureStore:
    """Open a store to copy from, which has to be finished.

    Args:
        path: the store's folder.
        overlay: labels and annotations kept beside it, which go before its own.

    Raises:
        NotAStoreError: when ``path`` holds no feature store.
        UnsealedStoreError: when extraction, or a change, has not finished.
        CorruptStoreError: when metadata or tables are not what the store was sealed with.
        StoreError: when the format is newer, or the overlay is of other pictures.
    """
    store = open_store(path, allow_unsealed=True, overlay=overlay)
    if not store.sealed:
        change = interrupted_change(path) or "its extraction"
        raise UnsealedStoreError(
            f"{path} is not sealed: {change} has not finished; run that command again first"
        )
    return store


def copy_into(output: Path, plan: CopyPlan, report: Report) -> int:
    """Make a store of copied samples, or go on with one that the same plan has begun.

    Args:
        output: the new store's folder.
        plan: what it shall hold.
        report: called with samples done and in all.

    Returns:
        Number of samples that were copied now; the others had been before.

    Raises:
        StoreError: when ``output`` holds something else.
        CorruptStoreError: when bytes that are read are not those that were written.
        OSError: when the disk is full or read-only; what is copied is kept.
    """
    _refuse_other_content(output)
    pending = [replace(row.sample, status="pending") for row in plan.rows]
    sources = {name: _label_sources(plan.rows, name) for name in plan.label_sets}
    with store_lock(output):
        table = pending
        sealed = is_sealed(output)
        if (output / GROUP_FILE).exists():
            if sealed:
                open_store(output)  # Refuses what was changed or damaged since.
            table = _begun(output, plan, pending)
        missing = missing_items(
            table, read_receipts(output), output, levels=plan.levels, label_sources=sources
        )
        if sealed and not missing:
            finish_seal(output)
            report(len(plan.rows), len(plan.rows))
            return 0
        _describe(output, plan, table)
        blocks: dict[int, list[CopiedRow]] = {block: [] for block in missing}
        for row in plan.rows:
            if block_of(row.sample.row) in blocks:
                blocks[block_of(row.sample.row)].append(row)
        num_to_copy = sum(map(len, blocks.values()))
        num_done = len(plan.rows) - num_to_copy
        report(num_done, len(plan.rows))
        for block, rows in sorted(blocks.items()):
            copy_block(
                output,
                block,
                rows,
                levels=plan.levels,
                label_sets=plan.label_sets,
                items=missing[block],
            )
            num_done += len(rows)
            report(num_done, len(plan.rows))
        seal_store(output)
    return num_to_copy


def copy_block(
    root: Path,
    block: int,
    rows: Sequence[CopiedRow],
    *,
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_sets: Mapping[str, LabelSetSpec],
    items: frozenset[str] | None = None,
) -> None:
    """Write one block of copied samples: levels and labels, then the facts that say they are there.

    Args:
        root: the store that is written.
        block: number of the block.
        rows: of the block.
        levels: of the store.
        label_sets: of the store.
        items: names, as in receipts, of what is still to be written; everything unless given.

    Raises:
        CorruptStoreError: when bytes that are read are not those that were written.
        OSError: when the disk is full or read-only.
    """
    for name, (spec, fingerprint) in levels.items():
        if items is None or spec.item in items:
            features = {
                row.sample.row: _of_shape(row.reader.read_stored(name, row.row), spec)
                for row in rows
            }
            write_level_block(root, spec, fingerprint.digest, block, features)
    for name, label_set in label_sets.items():
        if items is None or label_set.item in items:
            sources = _label_sources(rows, name)
            masks = {
                row.sample.row: row.reader.read_mask(row.row, name)
                if sources[row.sample.row].present
                else None
                for row in rows
            }
            write_label_block(root, label_set, block, masks, sources)
    write_sample_facts(root, block, [row.sample for row in rows])


def parse_where(text: str) -> tuple[str, str]:
    """Return name and value of "NAME=VALUE".

    Raises:
        ConfigError: when there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--where {text!r}: expected NAME=VALUE, such as group=patient7")
    return name.strip(), value.strip()


def _of_shape(values: Encoded, spec: LevelSpec) -> Encoded:
    """Repeat a grey picture where the level has colour, as extraction does."""
    if values.data_CHW.shape == spec.shape:
        return values
    return Encoded(np.broadcast_to(values.data_CHW, spec.shape), values.scale_C)


def _label_sources(rows: Sequence[CopiedRow], label_set: str) -> dict[int, LabelRow]:
    """Return, by row of the new store, where each mask came from; not present without one."""
    known: dict[int, Mapping[int, LabelRow]] = {}
    sources = {}
    for row in rows:
        lines = known.get(id(row.reader))
        if lines is None:
            has_set = label_set in row.reader.label_sets
            lines = known[id(row.reader)] = row.reader.label_rows(label_set) if has_set else {}
        sources[row.sample.row] = replace(lines.get(row.row, LabelRow(0)), row=row.sample.row)
    return sources


def _refuse_other_content(output: Path) -> None:
    """Refuse a target that holds anything but a store or what a killed copy left of one."""
    for folder in output.resolve().parents:
        if (folder / GROUP_FILE).exists():
            raise StoreError(
                f"{output} lies inside the store {folder.name}; give -o a folder beside it"
            )
    if output.exists() and not output.is_dir():
        raise StoreError(f"{output} is a file; give -o a new folder, such as features/NEW.zarr")
    foreign = foreign_files(output) if output.exists() else []
    if foreign:
        raise StoreError(
            f"{output} is not empty and not a feature store ({foreign[0].name} is in it); give -o "
            "a new folder, such as features/NEW.zarr"
        )


def _begun(output: Path, plan: CopyPlan, pending: list[SampleRow]) -> list[SampleRow]:
    """Return the table of a target that this very plan has begun; refuse any other."""
    table = merge_sample_facts(read_samples(output), read_receipts(output))
    same_rows = [replace(row, status="pending") for row in table] == pending
    if not same_rows or not is_described(output, **_description(plan), samples=table):
        raise StoreError(
            f"{output} exists and is not what this command makes of its sources as they are now; "
            "give -o another folder, or delete that one"
        )
    return table


def _describe(output: Path, plan: CopyPlan, table: Sequence[SampleRow]) -> None:
    describe_store(output, **_description(plan), samples=table)


def _description(plan: CopyPlan) -> dict[str, Any]:
    return {
        "settings": plan.settings,
        "levels": plan.levels,
        "label_sets": plan.label_sets,
        "annotations": [row.note for row in plan.rows],
    }


def _result(output: Path, plan: CopyPlan, num_copied: int) -> CopyResult:
    receipts = read_receipts(output).values()
    num_variants = sum(row.sample.variant is not None for row in plan.rows)
    return CopyResult(
        store=output,
        num_samples=len(plan.rows) - num_variants,
        num_variants=num_variants,
        num_copied=num_copied,
        levels=tuple(plan.levels),
        label_sets=tuple(plan.label_sets),
        size_bytes=sum(shard.size_bytes for receipt in receipts for shard in receipt.shards),
    )


def _settings(stores: Sequence[FeatureStore]) -> dict[str, Any]:
    """Return the first store's settings, and under ``copied_from`` every source's own."""
    settings = {name: value for name, value in stores[0].settings.items() if name != "copied_from"}
    settings["copied_from"] = [
        {
            # Not its folder, which may tell more than a store should.
            "store": store.path.name,
            "seal": store.seal,
            "settings": store.settings,
            **({} if store.overlay is None else {"overlay_seal": store.overlay.seal}),
        }
        for store in stores
    ]
    return settings


def _copied(store: FeatureStore, row: SampleRow, number: int, prefix: str = "") -> CopiedRow:
    note = store.annotations[row.row]
    return CopiedRow(
        reader=store,
        row=row.row,
        sample=replace(
            row,
            row=number,
            id=prefix + row.id,
            base_id=None if row.base_id is None else prefix + row.base_id,
        ),
        note=replace(
            note,
            row=number,
            id=prefix + note.id,
            group=prefix + note.group if note.group else "",
        ),
    )


def _usable(store: FeatureStore) -> list[SampleRow]:
    """Return the samples that can be used, in row order; variants are not among them."""
    return [row for row in store.sample_rows if row.status == "ok" and row.variant is None]


def _with_variants(store: FeatureStore, rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Return samples and the variants that training has of them, in row order."""
    chosen = {row.row for row in rows}
    chosen |= {variant.row for variant in store.variants if variant.base_row in chosen}
    return [row for row in store.sample_rows if row.row in chosen]


def _select(
    store: FeatureStore,
    splits: Sequence[str],
    ids: Sequence[str] | None,
    where: Sequence[tuple[str, str]],
) -> list[SampleRow]:
    """Return the samples that are asked for and their variants, in row order."""
    rows = _usable(store)
    values_of = {row.row: _values(row, store.annotations[row.row]) for row in rows}
    known = [*_FIELDS, *sorted({name for values in values_of.values() for name in values})]
    known = list(dict.fromkeys(known))
    if ids is not None:
        _require_ids(store, ids)
        chosen_ids = set(ids)
        rows = [row for row in rows if row.id in chosen_ids]
    wanted: dict[str, set[str]] = defaultdict(set)
    for name, value in where:
        if name not in known:
            raise ConfigError(
                f"{store.path} has no column {name!r} to choose by; it has {', '.join(known)}"
            )
        wanted[name].add(value)
    for split in splits:
        wanted["split"].add(split)
    for name, values in wanted.items():
        found = {of_row.get(name, "") for of_row in values_of.values()}
        for value in sorted(values):
            if not any(_same(name, value, other) for other in found):
                some = ", ".join(sorted(found)[:5]) + (", …" if len(found) > 5 else "")
                raise ConfigError(
                    f"no usable sample of {store.path} has {name} {value!r}; it has: {some}"
                )
        rows = [
            row
            for row in rows
            if any(_same(name, value, values_of[row.row].get(name, "")) for value in values)
        ]
    if not rows:
        raise ConfigError(
            f"no sample of {store.path} is all that is asked for; ask for less, and see "
            f"`sam3cache store info {store.path}` for what is there"
        )
    return _with_variants(store, rows)


def _require_ids(store: FeatureStore, ids: Sequence[str]) -> None:
    usable = {row.id for row in _usable(store)}
    unknown = [name for name in dict.fromkeys(ids) if name not in usable]
    if not unknown:
        return
    reasons = {aside.id: aside.reason for aside in store.set_aside}
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    if unknown[0] in reasons:
        raise ConfigError(
            f"sample {unknown[0]!r}{more} of {store.path} cannot be copied: it was set aside "
            f"({reasons[unknown[0]]}); take it off the list"
        )
    some = ", ".join(sorted(usable)[:3])
    raise ConfigError(
        f"{store.path} has no sample {unknown[0]!r}{more}; its ids are such as {some}"
    )


def _values(row: SampleRow, note: AnnotationRow) -> dict[str, str]:
    """Return what a sample can be chosen by, as text."""
    return {
        **note.extra,
        "id": row.id,
        "source": row.source,
        "frame": "" if row.frame is None else str(row.frame),
        "split": note.split,
        "group": note.group,
        "primary_angle_deg": _number_text(note.primary_angle_deg),
        "secondary_angle_deg": _number_text(note.secondary_angle_deg),
    }


def _number_text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _same(name: str, wanted: str, found: str) -> bool:
    if wanted != found and name in ("primary_angle_deg", "secondary_angle_deg"):
        try:
            return float(wanted) == float(found)
        except ValueError:
            return False
    return wanted == found


def _levels(
    stores: Sequence[FeatureStore], names: Sequence[str] | None
) -> dict[str, tuple[LevelSpec, Fingerprint]]:
    """Return the levels asked for, each the same in all stores."""
    everywhere = list(dict.fromkeys(name for store in stores for name in store.levels))
    if names is not None:
        _require_known(stores, "level", names, everywhere)
    chosen = everywhere if names is None else list(dict.fromkeys(names))
    if not chosen:
        raise ConfigError("no level is left to copy; name one with --levels")
    common = [name for name in everywhere if all(name in store.levels for store in stores)]
    for name in chosen:
        for store in stores:
            if name not in store.levels:
                raise StoreError(
                    f"{store.path} has no level {name}, which {_holder(stores, name)} has: add it "
                    f"by `sam3cache extract`, or leave it out with --levels {','.join(common)}"
                    if common
                    else f"{store.path} has no level {name}, and no level is in all of the stores"
                )
    return {name: _common_level(stores, name, common) for name in chosen}


def _holder(stores: Sequence[FeatureStore], level: str) -> Place:
    return next(store.path for store in stores if level in store.levels)


def _common_level(
    stores: Sequence[FeatureStore], name: str, common: Sequence[str]
) -> tuple[LevelSpec, Fingerprint]:
    """Return a level that all stores have made in the same way.

    Pictures may be grey in one store and have colour in another: extraction repeats grey ones where
    any has colour, and so does a merge.
    """
    widest = max(stores, key=lambda store: store.levels[name].shape[0])
    spec, fingerprint = widest.levels[name], widest.fingerprint(name)
    others = ",".join(other for other in common if other != name)
    for store in stores:
        fields = dict(store.fingerprint(name).fields)
        num_channels = store.levels[name].shape[0]
        if spec.precision == "uint8" and num_channels == 1 and "num_channels" in fields:
            fields["num_channels"] = fingerprint.fields.get("num_channels", num_channels)
        # Told in the order in which the stores are named.
        first, second = (widest, store) if stores.index(widest) == 0 else (store, widest)
        differences = first.fingerprint(name).differences(second.fingerprint(name))
        fits = store.levels[name].shape[1:] == spec.shape[1:] and num_channels in (
            spec.shape[0],
            1 if spec.precision == "uint8" else spec.shape[0],
        )
        if Fingerprint(fields).digest != fingerprint.digest or not fits:
            raise FingerprintError(
                f"level {name} was made differently in {first.path} and {second.path}: "
                f"{'; '.join(differences) or 'its shapes differ'}. Extract one of them again in "
                "the other's way"
                + (f", or leave the level out with --levels {others}" if others else "")
            )
    return spec, fingerprint


def _label_sets(
    stores: Sequence[FeatureStore], names: Sequence[str] | None
) -> dict[str, LabelSetSpec]:
    """Return the label sets asked for, large enough for the masks of all stores."""
    anywhere = list(dict.fromkeys(name for store in stores for name in store.label_sets))
    if names is not None:
        _require_known(stores, "label set", names, anywhere)
    specs = {}
    for name in anywhere if names is None else dict.fromkeys(names):
        holders = [store for store in stores if name in store.label_sets]
        first = holders[0].label_sets[name]
        for store in holders:
            classes, task = store.label_sets[name].classes, store.label_sets[name].task
            if task != first.task:
                raise StoreError(
                    f"label set {name} is {first.task} in {holders[0].path} and {task} in "
                    f"{store.path}; make them the same with `sam3cache store labels`, or name the "
                    "sets to keep with --label-sets ('none' for no masks)"
                )
            if classes != first.classes:
                raise StoreError(
                    f"label set {name} has the classes {', '.join(first.classes)} in "
                    f"{holders[0].path} and {', '.join(classes)} in {store.path}; make them the "
                    f"same with `sam3cache store labels`, or name the sets to keep with "
                    "--label-sets ('none' for no masks)"
                )
        specs[name] = replace(
            first,
            height_px=max(store.label_sets[name].height_px for store in holders),
            width_px=max(store.label_sets[name].width_px for store in holders),
        )
    return specs


def _require_known(
    stores: Sequence[FeatureStore], what: str, names: Sequence[str], known: Sequence[str]
) -> None:
    for name in names:
        if name not in known:
            paths = ", ".join(str(store.path) for store in stores)
            raise ConfigError(
                f"{what} {name!r} is not in {paths}; known: {', '.join(known) or 'none'}"
            )


def _merged_rows(stores: Sequence[FeatureStore], prefix: bool) -> tuple[CopiedRow, ...]:
    names = [f"{store.path.stem}-" if prefix else "" for store in stores]
    if prefix and len(set(names)) < len(names):
        raise ConfigError(
            f"--prefix: two stores are called {names[0][:-1]!r}, so that their name tells ids "
            "apart no better; rename one of the folders"
            if len(set(names)) == 1
            else "--prefix: two of the stores have the same name; rename one of the folders"
        )
    rows: list[CopiedRow] = []
    owners: dict[str, FeatureStore] = {}
    for store, name in zip(stores, names, strict=True):
        for sample in _with_variants(store, _usable(store)):
            row = _copied(store, sample, len(rows), name)
            owner = owners.setdefault(row.sample.id, store)
            if owner is not store:
                raise StoreError(
                    f"sample {row.sample.id!r} is in {owner.path} and in {store.path}; pass "
                    "--prefix to put each store's name before its ids, or copy one store without "
                    "it first (`sam3cache store subset --ids`)"
                )
            rows.append(row)
    if not rows:
        raise StoreError(f"{stores[0].path} and the others hold no usable sample; nothing to merge")
    return tuple(rows)


def _twins(rows: Sequence[CopiedRow]) -> list[str]:
    """Tell of pictures that are in more than one store: they count twice, or leak."""
    by_picture: dict[str, list[CopiedRow]] = defaultdict(list)
    for row in rows:
        if row.sample.pixel_sha256 and row.sample.variant is None:
            by_picture[row.sample.pixel_sha256].append(row)
    twins = [same for same in by_picture.values() if len({id(row.reader) for row in same}) > 1]
    if not twins:
        return []
    first, second = _pair(twins[0])
    lines = [
        f"{len(twins)} pictures are in more than one of the stores, such as {first.sample.id} and "
        f"{second.sample.id}: they are copied as often"
    ]
    leaks = [same for same in twins if len({row.note.split for row in same}) > 1]
    if leaks:
        some = leaks[0]
        other = next(row for row in some if row.note.split != some[0].note.split)
        lines.append(
            f"{len(leaks)} of these pictures are in more than one split, such as "
            f"{some[0].sample.id} in {some[0].note.split} and {other.sample.id} in "
            f"{other.note.split}: a head would be measured on what it was trained on; correct the "
            "splits, or copy one store without them first (`sam3cache store subset`)"
        )
    return lines


def _pair(same: Sequence[CopiedRow]) -> tuple[CopiedRow, CopiedRow]:
    return same[0], next(row for row in same if row.reader is not same[0].reader)


def _shared_groups(rows: Sequence[CopiedRow]) -> list[str]:
    """Tell of groups that several stores name: they are taken as the same patients."""
    by_group: dict[str, list[CopiedRow]] = defaultdict(list)
    for row in rows:
        if row.note.group:
            by_group[row.note.group].append(row)
    shared = {
        group: same for group, same in by_group.items() if len({id(row.reader) for row in same}) > 1
    }
    if not shared:
        return []
    lines = [
        f"{len(shared)} groups are in more than one of the stores, such as {next(iter(shared))}: "
        "they are taken as the same patients; pass --prefix if they are not"
    ]
    leaks = {g: same for g, same in shared.items() if len({row.note.split for row in same}) > 1}
    if leaks:
        group, same = next(iter(leaks.items()))
        splits = ", ".join(sorted({row.note.split for row in same}))
        lines.append(
            f"{len(leaks)} of these groups are in more than one split, such as {group} in "
            f"{splits}: if they are the same patients, a head would be measured on patients that "
            "it was trained on"
        )
    return lines
