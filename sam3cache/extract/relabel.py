"""Labels and annotations of a store, set anew from a manifest; features stay as they are.

Shape legend: M planes, H height, W width of a mask.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError, ImageError, ManifestError, StoreError
from sam3cache.extract.config import LABEL_SET
from sam3cache.extract.matching import match_samples
from sam3cache.features import (
    AnnotationRow,
    FeatureStore,
    LabelRow,
    LabelSetSpec,
    StoredSample,
    block_of,
    classes_of_samples,
    count_classes,
    make_overlay,
    open_store,
    open_to_change,
    put_label_set,
    read_receipts,
    remove_label_set,
    replace_annotations,
    require_label_set_name,
    staging_of,
    store_lock,
    write_label_block,
)
from sam3cache.features.files import sha256_of_json
from sam3cache.features.summary import groups_in_several_splits
from sam3cache.groups import part_of_groups, values_to_share
from sam3cache.images import FOREGROUND, ClassTable, Manifest, key_path, read_labels, read_manifest
from sam3cache.records import CONTRAST, MEMBER_MARK, SPLITS, Sample, SetAside
from sam3cache.runtime import write_atomic

Report = Callable[[int, int], None]
"""Called with samples done and samples in all."""

MaskFiles = tuple[Sample | None, ...]
"""A sample with each of its masks in turn; None for one that it lacks."""

FileState = tuple[int, int]
"""Size in bytes and time of change in ns."""

CLASS = "class"
"""Stands for the classes that a sample's mask shows, where splits are to share them evenly."""

ANNOTATIONS = ("split", "group", "primary_angle", "secondary_angle")
"""What a manifest may say of a sample, beside columns of its own."""

_REQUEST_FILE = "request.json"
_NUM_THREADS = 8
_MAX_NAMED = 3
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class LabelsConfig:
    """Which masks to set.

    Attributes:
        store: the store's folder.
        name: of the label set; one that is there is replaced.
        manifest: a CSV or folder, as for an extraction; a CSV may have ids and masks alone.
        columns: TOML file that maps the CSV's columns to fields, or None.
        classes: what the masks are of; :func:`sam3cache.images.parse_classes` reads them from text.
        mask_columns: columns of the CSV with the masks, in place of the field ``mask``, or folders
            in place of ``masks/``; several are the planes of as many classes.
        overlay: folder to keep the labels in, beside the store; None: the store itself.
    """

    store: Path
    name: str
    manifest: Path
    columns: Path | None = None
    classes: ClassTable = FOREGROUND
    mask_columns: tuple[str, ...] = ()
    overlay: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        require_label_set_name(self.name)
        names, num_columns = self.classes.names, len(self.mask_columns)
        if self.name == LABEL_SET and len(names) > 1:
            raise ConfigError(
                f"label set {self.name} is of foreground and background, as `sam3cache extract` "
                f"writes it; choose another name for masks of {', '.join(names)}"
            )
        if not all(self.mask_columns) or num_columns != len(set(self.mask_columns)):
            raise ConfigError(
                f"columns of masks {','.join(self.mask_columns)}: expected names, each once"
            )
        if num_columns > 1 and (self.classes.numbers is not None or num_columns != len(names)):
            raise ConfigError(
                f"{num_columns} columns of masks for the classes {', '.join(names)}; expected one "
                "column with class numbers or planes, or a class without a number for each column"
            )


@dataclass(frozen=True, slots=True)
class LabelsResult:
    """What has been set.

    Attributes:
        store: the store, or the overlay, that holds the labels.
        label_set: name.
        num_samples: samples of the store.
        num_matched: of them, those that the manifest speaks of.
        num_with_mask: of them, those that have a mask now.
        num_unmatched_rows: rows of the manifest that no sample of the store belongs to.
        unmatched: ids of the first of them.
        absent_classes: where there are several, those that no mask shows.
        set_aside: rows and masks that could not be used, and why.
    """

    store: Path
    label_set: str
    num_samples: int
    num_matched: int
    num_with_mask: int
    num_unmatched_rows: int
    unmatched: tuple[str, ...]
    absent_classes: tuple[str, ...]
    set_aside: tuple[SetAside, ...]


def set_labels(
    config: LabelsConfig, report: Report = lambda num_done, num_total: None
) -> LabelsResult:
    """Set a label set of a store from the masks of a manifest.

    Masks are decoded beside the old ones, which serve readers until all are there. Killed and
    called again, it goes on; if a mask's file has changed meanwhile, from the start.

    Args:
        config: what to set.
        report: called often, from this thread.

    Raises:
        ManifestError: when the manifest is unusable, matches no sample, or has no usable mask.
        StoreError: when the store cannot be used, or not be written.
    """
    with _writable(config.overlay or config.store):
        store, root = _open(config.store, config.overlay)
        seal = store.seal if config.overlay is None else open_to_change(root).seal
        manifest = read_manifest(
            config.manifest,
            config.columns,
            by_id=True,
            mask_columns=config.mask_columns,
            known_groups=_known_groups(store),
        )
        matched = match_samples(
            store.samples, manifest.samples, manifest=manifest.name, store=config.store
        )
        if not any(any(sample.each_mask()) for sample in matched.values()):
            column = ", ".join(config.mask_columns) or "mask"
            raise ManifestError(
                f"{manifest.name}: none of the {len(matched)} rows that match a sample has a "
                f"mask; fill the column {column!r}, or name another with --masks"
            )
        staging = staging_of(root, config.name)
        with store_lock(staging.parent, timeout_s=0):
            asides = _stage(config, store, matched, staging, report)
            num_with_mask = sum(
                fact["present"] for r in read_receipts(staging).values() for fact in r.facts
            )
            if not num_with_mask:
                shutil.rmtree(staging)
                raise ManifestError(
                    f"{manifest.name}: none of its masks can be used, the first because: "
                    f"{asides[0].reason}; correct the masks, or what --classes and --masks say of "
                    "them. The labels are as they were"
                )
            classes = config.classes
            used = {sample.id for sample in matched.values()}
            unmatched = [sample.id for sample in manifest.samples if sample.id not in used]
            put_label_set(root, config.name, classes.names, seal, task=classes.task)
    return LabelsResult(
        store=root,
        label_set=config.name,
        num_samples=len(store.samples),
        num_matched=len(matched),
        num_with_mask=num_with_mask,
        num_unmatched_rows=len(unmatched),
        unmatched=tuple(unmatched[:_MAX_NAMED]),
        absent_classes=_absent_classes(config),
        set_aside=(*manifest.set_aside, *asides),
    )


def _absent_classes(config: LabelsConfig) -> tuple[str, ...]:
    """Return classes that no mask shows: mostly, their numbers are not those of the files."""
    if len(config.classes.names) == 1:
        return ()
    counts = count_classes(open_store(config.store, overlay=config.overlay), config.name)
    return tuple(count.name for count in counts if not any(count.num_samples.values()))


def remove_labels(store: Path, name: str, overlay: Path | None = None) -> None:
    """Remove a label set from a store or, if one is given, from its overlay.

    Raises:
        MissingSampleError: when there is none of this name.
        StoreError: when the store cannot be used, or not be written.
    """
    root = overlay or store
    with _writable(root):
        remove_label_set(root, name)


def _open(path: Path, overlay: Path | None) -> tuple[FeatureStore, Path]:
    """Open a store to change it or, given an overlay, to change that; return also which."""
    if overlay is None:
        return open_to_change(path), path
    store = open_store(path)
    make_overlay(overlay, store)
    open_to_change(overlay)
    return store, overlay


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    """Say of a read-only place what can be done instead."""
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY or isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{root} cannot be written ({error.strerror}); keep labels and annotations beside the "
            "store, by --overlay and a folder that can"
        ) from None


def _stage(
    config: LabelsConfig,
    store: FeatureStore,
    matched: Mapping[int, Sample],
    staging: Path,
    report: Report,
) -> list[SetAside]:
    """Decode every mask into the staging folder, a block at a time; return those that cannot be."""
    # Of the array's size, a block's files do not depend.
    spec = LabelSetSpec(config.name, config.classes.names, 1, 1, config.classes.task)
    blocks: dict[int, list[StoredSample]] = defaultdict(list)
    for sample in store.samples:
        blocks[block_of(sample.row)].append(sample)
    # Variants have lines, too, and no masks: theirs are made of their samples'.
    rows: dict[int, list[int]] = defaultdict(list)
    for row in store.every_row:
        rows[block_of(row)].append(row)
    states = {row: tuple(map(_state, _files(sample))) for row, sample in matched.items()}
    lines = {row: _mask_line(row, matched, states) for row in store.every_row}
    _begin(staging, _request(config, store, matched, states))
    done = read_receipts(staging)
    asides: list[SetAside] = []
    num_done = 0
    report(num_done, len(store.samples))
    with ThreadPoolExecutor(_NUM_THREADS, "sam3cache-masks") as pool:
        for block, numbers in sorted(rows.items()):
            members = blocks[block]
            receipt = done.get((spec.item, block))
            if not (
                receipt is not None
                # One without rows was taken back.
                and len(receipt.rows) == len(numbers)
                and receipt.is_done(staging)
                # A mask that was bad is tried again, to be listed again.
                and all(f["present"] == bool(lines[f["row"]].source) for f in receipt.facts)
            ):
                files = [_files(matched.get(s.row)) for s in members]
                decoded = pool.map(_decode, members, files, repeat(config.classes))
                masks: dict[int, NDArray[np.uint8] | None] = dict.fromkeys(numbers)
                for sample, mask in zip(members, decoded, strict=True):
                    if isinstance(mask, ImageError):
                        asides.append(SetAside(sample.id, lines[sample.row].source, str(mask)))
                    masks[sample.row] = None if isinstance(mask, ImageError) else mask
                # Without names: who hides paths from a store would not want them here. And a file
                # that gave no mask is not where one came from.
                origins = {
                    row: LabelRow(row) if mask is None else replace(lines[row], source="")
                    for row, mask in masks.items()
                }
                write_label_block(staging, spec, block, masks, origins)
            num_done += len(members)
            report(num_done, len(store.samples))
    return asides


def _decode(
    stored: StoredSample, files: MaskFiles, classes: ClassTable
) -> NDArray[np.uint8] | ImageError | None:
    """Return a mask (M, H, W), None where there is none, or why it cannot be used."""
    # The store's frame: a manifest by ids need not name it.
    files = tuple(None if file is None else replace(file, frame=stored.frame) for file in files)
    try:
        return read_labels(files, classes, (stored.height_px, stored.width_px))
    except ImageError as error:
        return error


def _files(given: Sample | None) -> MaskFiles:
    return () if given is None else given.each_mask()


def _state(file: Sample | None) -> FileState | None:
    """Return size and time of a mask's file; None for one that is not there."""
    if file is None or file.mask_path is None:
        return None
    try:
        stat = file.mask_path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _mask_line(
    row: int, matched: Mapping[int, Sample], states: Mapping[int, tuple[FileState | None, ...]]
) -> LabelRow:
    """Return where a row's mask comes from; of several files, all their names and bytes."""
    found = [state for state in states.get(row, ()) if state is not None]
    return LabelRow(
        row,
        source=", ".join(str(file.mask) for file in _files(matched.get(row)) if file is not None),
        size_bytes=sum(size_bytes for size_bytes, _ in found),
        mtime_ns=max((mtime_ns for _, mtime_ns in found), default=0),
    )


def _request(
    config: LabelsConfig,
    store: FeatureStore,
    matched: Mapping[int, Sample],
    states: Mapping[int, tuple[FileState | None, ...]],
) -> str:
    """Return a hash of all that the staged masks depend on."""
    lines: list[Any] = []
    for sample in store.samples:
        paths = [
            "" if file is None or file.mask_path is None else os.fspath(file.mask_path.absolute())
            for file in _files(matched.get(sample.row))
        ]
        lines.append([sample.row, sample.pixel_sha256, paths, states.get(sample.row)])
    return sha256_of_json([config.name, config.classes.identity, lines])


def _begin(staging: Path, request: str) -> None:
    """Keep what a killed run of the same request has staged, and nothing else."""
    file = staging / _REQUEST_FILE
    if file.exists() and file.read_text(encoding="utf-8") == request:
        return
    if staging.exists():
        # Its name first: what is half deleted must not be taken for half done.
        file.unlink(missing_ok=True)
        shutil.rmtree(staging)
    write_atomic(file, request.encode())


@dataclass(frozen=True)
class AnnotationsConfig:
    """Which annotations to set.

    Attributes:
        store: the store's folder.
        manifest: a CSV, as for an extraction; ids will do in place of images.
        columns: TOML file that maps the CSV's columns to fields, or None.
        only: names of what to set: of ``ANNOTATIONS``, or other columns; empty: all that the CSV
            has.
        overlay: folder to keep the annotations in, beside the store; None: the store itself.
    """

    store: Path
    manifest: Path
    columns: Path | None = None
    only: tuple[str, ...] = ()
    overlay: Path | None = None


@dataclass(frozen=True, slots=True)
class AnnotationsResult:
    """What has been set.

    Attributes:
        store: the store, or the overlay, that holds the annotations.
        num_samples: samples of the store.
        num_matched: of them, those that the manifest speaks of.
        num_changed: by annotation that was set, samples that it has changed of.
        num_moved: samples that were in the training split and are no longer.
        leaks: groups that are in more than one split now.
        set_aside: rows that could not be used, and why; their samples are as they were.
    """

    store: Path
    num_samples: int
    num_matched: int
    num_changed: Mapping[str, int]
    num_moved: int
    leaks: tuple[str, ...]
    set_aside: tuple[SetAside, ...]


def set_annotations(config: AnnotationsConfig) -> AnnotationsResult:
    """Correct splits, groups, angles and other columns of a store from a CSV.

    What the CSV has no column for, and samples that it does not name, stay as they are.

    Args:
        config: what to set.

    Raises:
        ManifestError: when the CSV is unusable, matches no sample or has nothing to set.
        ConfigError: when ``only`` names what it does not have.
        StoreError: when the store cannot be used, or not be written.
    """
    with _writable(config.overlay or config.store):
        _open(config.store, config.overlay)
        store = _view(config.store, config.overlay)
        manifest = read_manifest(
            config.manifest, config.columns, by_id=True, known_groups=_known_groups(store)
        )
        fields = _fields(config, manifest)
        if "group" in fields:
            _require_key(store, manifest, config)
        matched = match_samples(
            store.samples, manifest.samples, manifest=manifest.name, store=config.store
        )
        stored = {sample.row: sample for sample in store.samples}
        before = store.annotations
        after = dict(before)
        num_changed = dict.fromkeys(fields, 0)
        for row, given in matched.items():
            after[row] = _corrected(before[row], given, stored[row], fields)
            for name in fields:
                num_changed[name] += _value(before[row], name) != _value(after[row], name)
        root = _write(config, store, after)
    return AnnotationsResult(
        store=root,
        num_samples=len(store.samples),
        num_matched=len(matched),
        num_changed=num_changed,
        num_moved=sum(before[row].split == "train" != after[row].split for row in matched),
        leaks=tuple(groups_in_several_splits([after[row] for row in stored])),
        set_aside=manifest.set_aside,
    )


@dataclass(frozen=True)
class SplitConfig:
    """How to divide a store's samples anew.

    Attributes:
        store: the store's folder.
        val: share of the samples for the validation split.
        test: share for the test split; what is left is for training.
        by: what the splits shall have in even shares: annotations, "view" for the view region,
            "class" for the classes that masks show.
        label_set: whose masks "class" is about.
        seed: of the division.
        overlay: folder to keep the annotations in, beside the store; None: the store itself.
    """

    store: Path
    val: float = 0.15
    test: float = 0.15
    by: tuple[str, ...] = ()
    label_set: str = LABEL_SET
    seed: int = 0
    overlay: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if not (self.val >= 0 and self.test >= 0 and 0 < self.val + self.test < 1):
            raise ConfigError(
                f"shares of {self.val:g} for val and {self.test:g} for test; expected shares of at "
                "least 0 that leave something for training, such as 0.15 and 0.15"
            )
        if len(set(self.by)) != len(self.by):
            raise ConfigError(f"--by {','.join(self.by)} names one twice; name each once")


@dataclass(frozen=True, slots=True)
class SplitResult:
    """What has become of a store's splits.

    Attributes:
        store: the store, or the overlay, that holds the annotations.
        shares: by split, the share that was asked for.
        num_samples: by split.
        num_groups: by split.
        num_by_value: by what was to be shared evenly and its value ("view", "LAO cranial"),
            samples by split.
        num_changed: samples that are in another split than before.
        num_moved: of them, those that were in the training split and are no longer.
    """

    store: Path
    shares: Mapping[str, float]
    num_samples: Mapping[str, int]
    num_groups: Mapping[str, int]
    num_by_value: Mapping[tuple[str, str], Mapping[str, int]]
    num_changed: int
    num_moved: int


def split_annotations(config: SplitConfig) -> SplitResult:
    """Divide a store's samples into splits anew, by whole groups.

    The same store, shares and seed give the same splits.

    Args:
        config: how.

    Raises:
        ConfigError: when there are too few groups, or an annotation is not there.
        MissingSampleError: when there is no such label set.
        StoreError: when the store cannot be used, or not be written.
    """
    shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    wanted = [split for split in SPLITS if shares[split] > 0]
    with _writable(config.overlay or config.store):
        _open(config.store, config.overlay)
        store = _view(config.store, config.overlay)
        num_groups = len({sample.group for sample in store.samples})
        if num_groups < len(wanted):
            raise ConfigError(
                f"{config.store} has {num_groups} groups for {len(wanted)} splits, and no group "
                "may be in two; check the groups (patients), or ask for fewer splits"
            )
        values = _values_to_share(store, config)
        members = [(s.group, own) for s, own in zip(store.samples, values, strict=True)]
        parts = part_of_groups(members, [shares[split] for split in wanted], config.seed)
        split_of = {group: wanted[part] for group, part in parts.items()}
        for split in wanted:
            if split not in split_of.values():
                raise ConfigError(
                    f"a share of {shares[split]:g} for {split} is less than a group: "
                    f"{len(store.samples)} samples are in {num_groups} groups; ask for more"
                )
        before = store.annotations
        # What has been set aside goes with its group: mended, it must not lie across.
        after = {
            row: replace(note, split=split_of.get(note.group, note.split))
            for row, note in before.items()
        }
        root = _write(config, store, after)
    rows = [sample.row for sample in store.samples]
    num_by_value: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for group, own in members:
        for value in own:
            num_by_value[value][split_of[group]] += 1
    return SplitResult(
        store=root,
        shares=shares,
        num_samples=Counter(after[row].split for row in rows),
        num_groups=Counter(split_of.values()),
        num_by_value={value: num_by_value[value] for value in sorted(num_by_value)},
        num_changed=sum(before[row].split != after[row].split for row in rows),
        num_moved=sum(before[row].split == "train" != after[row].split for row in rows),
    )


def _values_to_share(store: FeatureStore, config: SplitConfig) -> list[tuple[tuple[str, str], ...]]:
    """Return, by sample, the values that splits shall have in even shares."""
    named = [name for name in config.by if name != CLASS]
    values = values_to_share(store.samples, named)
    if CLASS not in config.by:
        return values
    names = classes_of_samples(store, config.label_set)
    return [
        (*own, *((CLASS, name) for name in names[sample.row]))
        for sample, own in zip(store.samples, values, strict=True)
    ]


def remove_annotation(store: Path, column: str, overlay: Path | None = None) -> int:
    """Remove one of a store's other columns; return how many samples had a value in it.

    Raises:
        ConfigError: when there is no such column, or it is one that every store has.
        StoreError: when the store cannot be used, or not be written.
    """
    config = AnnotationsConfig(store, Path(), overlay=overlay)
    with _writable(overlay or store):
        _open(store, overlay)
        opened = _view(store, overlay)
        columns = sorted({name for note in opened.annotations.values() for name in note.extra})
        if column in ANNOTATIONS:
            raise ConfigError(
                f"{column} cannot be removed: every store has it; set other values with `sam3cache "
                "store annotations set`, an empty cell for an angle that nobody knows"
            )
        if column not in columns:
            raise ConfigError(
                f"{store} has no column {column!r}; it has {', '.join(columns) or 'none'}"
            )
        num_values = sum(bool(sample.extra.get(column)) for sample in opened.samples)
        without = {
            row: replace(note, extra={k: v for k, v in note.extra.items() if k != column})
            for row, note in opened.annotations.items()
        }
        _write(config, opened, without)
    return num_values


def _view(path: Path, overlay: Path | None) -> FeatureStore:
    """Open a store with its overlay, even where an earlier change of either was interrupted."""
    return open_store(path, allow_unsealed=True, overlay=overlay)


def _write(
    config: AnnotationsConfig | SplitConfig, store: FeatureStore, notes: Mapping[int, AnnotationRow]
) -> Path:
    root = config.overlay or config.store
    held = store if store.overlay is None else store.overlay
    # A change that was interrupted may have left nothing to do but the seal.
    if notes != store.annotations or not held.sealed:
        replace_annotations(root, [notes[row] for row in sorted(notes)], held.seal)
    return root


def _names_key(store: FeatureStore) -> str:
    """Return the mark of the key that a store's names are hashed with; empty without one."""
    return _names_key_of(store.settings)


def _names_key_of(settings: Mapping[str, Any]) -> str:
    # A store that was merged has hashes of all that went into it.
    sources = [source["settings"] for source in settings.get("copied_from", ())]
    found = str(settings.get("names_key", ""))
    return found or next(filter(None, map(_names_key_of, sources)), "")


def _known_groups(store: FeatureStore) -> frozenset[str] | None:
    """Return the groups of a store whose names are hashed with a key, None of another."""
    if not _names_key(store):
        return None
    return frozenset(note.group for note in store.annotations.values())


def _require_key(store: FeatureStore, manifest: Manifest, config: AnnotationsConfig) -> None:
    """Refuse groups that another key gives: a patient's samples would be in two."""
    before, now = _names_key(store), manifest.key_mark
    if before and now and before != now:
        raise StoreError(
            f"{config.store} has its groups from the key {before}, but {key_path()} holds the key "
            f"{now}, by which every patient would be another: put the old key back"
        )


def _fields(config: AnnotationsConfig, manifest: Manifest) -> tuple[str, ...]:
    """Return what is to be set: of the CSV's fields and other columns, those that are asked for."""
    has = [name for name in ANNOTATIONS if name in manifest.fields] + list(manifest.extra)
    if not has:
        raise ManifestError(
            f"{manifest.name} has no annotations; expected a CSV with some of the columns "
            f"{', '.join(ANNOTATIONS)}, or others (for samples of DICOM files, those that extra in "
            "columns.toml lists)"
        )
    if unknown := [name for name in config.only if name not in has]:
        raise ConfigError(f"{manifest.name} has no {unknown[0]!r} to set; it has {', '.join(has)}")
    return config.only or tuple(has)


def _corrected(
    note: AnnotationRow, given: Sample, stored: StoredSample, fields: Sequence[str]
) -> AnnotationRow:
    if "split" in fields:
        note = replace(note, split=given.split)
    if "group" in fields:
        note = replace(
            note, group=given.group or stored.source.removesuffix(MEMBER_MARK + CONTRAST)
        )
    if "primary_angle" in fields:
        note = replace(note, primary_angle_deg=given.primary_angle_deg)
    if "secondary_angle" in fields:
        note = replace(note, secondary_angle_deg=given.secondary_angle_deg)
    extra = {name: given.extra[name] for name in fields if name in given.extra}
    return replace(note, extra={**note.extra, **extra})


def _value(note: AnnotationRow, name: str) -> str | float | None:
    values = {
        "split": note.split,
        "group": note.group,
        "primary_angle": note.primary_angle_deg,
        "secondary_angle": note.secondary_angle_deg,
    }
    return values[name] if name in values else note.extra.get(name, "")
