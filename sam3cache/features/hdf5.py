"""A store as one HDF5 file, to hand it on, and back; docs/hdf5.md lays the file out.

Shape legend: N samples, C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import (
    CorruptStoreError,
    MissingSampleError,
    NotAStoreError,
    StoreError,
)
from sam3cache.features.copying import CopiedRow, CopyPlan, CopyResult, Report, copy_into
from sam3cache.features.files import canonical_json
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import LabelSetSpec, LevelSpec
from sam3cache.features.places import place_of
from sam3cache.features.precision import Encoded, decode, in_words
from sam3cache.features.receipts import read_receipts
from sam3cache.features.store import FeatureStore
from sam3cache.features.tables import AnnotationRow, LabelRow, SampleRow
from sam3cache.records import SPLITS
from sam3cache.runtime import TEMPORARY_SUFFIX, replace_file
from sam3cache.tasks import Task

HDF5_VERSION = 1
"""Of the layout; docs/hdf5.md says what changed."""

# What HDF5 1.10 (2016) reads. Older bounds have no checksums over the file's own structure.
_LIBVER = ("v110", "v110")
_GZIP_LEVEL = 4
_TABLE_CHUNK = 4096
_STILL = -1

_SAMPLE_TEXTS = ("id", "source", "pixel_sha256", "base_id", "variant")
_SAMPLE_NUMBERS = ("height_px", "width_px", "num_channels", "size_bytes", "mtime_ns")
_LABEL_NUMBERS = ("height_px", "width_px", "size_bytes", "mtime_ns")


@dataclass(frozen=True)
class ExportResult:
    """What an export has written.

    Attributes:
        file: the HDF5 file.
        num_samples: in it, variants among them.
        levels: names.
        label_sets: names.
        size_bytes: of the file.
        num_left_behind: samples that the store had set aside: there is nothing of them to write.
        elapsed_s: of the call.
    """

    file: Path
    num_samples: int
    levels: tuple[str, ...]
    label_sets: tuple[str, ...]
    size_bytes: int
    num_left_behind: int
    elapsed_s: float


def export_hdf5(
    store: FeatureStore,
    path: Path,
    report: Report = lambda num_done, num_total: None,
) -> ExportResult:
    """Write a store's usable samples, in row order, as one HDF5 file.

    The file is written under another name first: under its own it is whole.

    Args:
        store: what to write.
        path: the new file.
        report: called with samples done and in all.

    Raises:
        StoreError: when ``path`` exists, or the store has no usable sample.
        CorruptStoreError: when bytes that are read are not those that were written.
        OSError: when the disk is full or read-only; no file stays then.
    """
    start_s = time.monotonic()
    place_of(path)  # Refuses what is no file.
    if path.exists():
        raise StoreError(f"{path} exists; give -o another file, or delete that one")
    rows = [row for row in store.sample_rows if row.status == "ok"]
    if not rows:
        raise StoreError(f"{store.path} has no usable sample; there is nothing to export")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with _Output(temporary) as output:
            with h5py.File(output, "w", libver=_LIBVER) as file:
                _write_header(file, store, len(rows))
                _write_tables(file, rows, [store.annotations[row.row] for row in rows])
                _write_arrays(file, store, rows, output, report)
            output.finish()
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ExportResult(
        file=path,
        num_samples=len(rows),
        levels=tuple(store.levels),
        label_sets=tuple(store.label_sets),
        size_bytes=path.stat().st_size,
        num_left_behind=len(store.set_aside),
        elapsed_s=time.monotonic() - start_s,
    )


def import_hdf5(
    path: Path,
    root: Path,
    report: Report = lambda num_done, num_total: None,
) -> CopyResult:
    """Make a sealed store of what :func:`export_hdf5` wrote; the same call resumes a stopped one.

    Args:
        path: the HDF5 file; it is only read.
        root: the new store's folder.
        report: called with samples done and in all.

    Raises:
        NotAStoreError: when ``path`` is no file, or not one of ours.
        CorruptStoreError: when it is damaged, or a part is missing or of another shape.
        StoreError: when its layout is newer than this code, or ``root`` holds something else.
        OSError: when the disk is full or read-only; what is copied is kept.
    """
    start_s = time.monotonic()
    with Hdf5Samples(path) as reader:
        plan = reader.plan()
        num_copied = copy_into(root, plan, report)
    shards = (shard for receipt in read_receipts(root).values() for shard in receipt.shards)
    num_variants = sum(row.sample.variant is not None for row in plan.rows)
    return CopyResult(
        store=root,
        num_samples=len(plan.rows) - num_variants,
        num_variants=num_variants,
        num_copied=num_copied,
        levels=tuple(plan.levels),
        label_sets=tuple(plan.label_sets),
        size_bytes=sum(shard.size_bytes for shard in shards),
        elapsed_s=time.monotonic() - start_s,
    )


class _Output(io.FileIO):
    """The file that HDF5 writes to; it keeps the first error to itself, for :meth:`check` to raise.

    HDF5 cannot leave a file whose writing fails: it tries again when it is closed, and ends the
    process. So it is told that all is well, and asked for no more.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._path = path
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or remember why not."""
        view = memoryview(data).cast("B")
        num_written = 0
        while num_written < len(view) and self._error is None:
            try:
                num_written += super().write(view[num_written:]) or 0
            except OSError as error:
                self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the file's size, or remember why not."""
        if self._error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self._error = error
        return size or 0

    def check(self) -> None:
        """Raise what went wrong, naming the file."""
        if self._error is not None:
            error = self._error
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def finish(self) -> None:
        """Make what was written durable."""
        self.check()
        os.fsync(self.fileno())


def _write_header(file: h5py.File, store: FeatureStore, num_samples: int) -> None:
    file.attrs["sam3cache_hdf5_version"] = HDF5_VERSION
    file.attrs["num_samples"] = num_samples
    file.attrs["settings"] = _json(store.settings)
    file.attrs["about"] = np.bytes_(
        b"Features of SAM 3's vision tower, by sam3cache. Sample i is levels/NAME[i], samples/id[i]"
        b", annotations/split[i], labels/SET/masks[i, :, :height_px[i], :width_px[i]]."
    )


def _json(value: Any) -> np.bytes_:
    """Return JSON as text of fixed length: HDF5 keeps other text where no checksum covers it."""
    return np.bytes_(canonical_json(value))


def _write_tables(
    file: h5py.File, rows: Sequence[SampleRow], notes: Sequence[AnnotationRow]
) -> None:
    samples = file.create_group("samples")
    for name in _SAMPLE_TEXTS:
        _write_texts(samples, name, [getattr(row, name) or "" for row in rows])
    for name in _SAMPLE_NUMBERS:
        _write_numbers(samples, name, np.array([getattr(row, name) for row in rows], np.int64))
    frames = [_STILL if row.frame is None else row.frame for row in rows]
    _write_numbers(samples, "frame", np.array(frames, np.int64))
    annotations = file.create_group("annotations")
    for name in ("split", "group"):
        _write_texts(annotations, name, [getattr(note, name) for note in notes])
    for name in ("primary_angle_deg", "secondary_angle_deg"):
        # None becomes NaN.
        _write_numbers(annotations, name, np.array([getattr(n, name) for n in notes], np.float64))
    extra = annotations.create_group("extra")
    known = annotations.create_group("extra_known")
    for name in sorted({name for note in notes for name in note.extra}):
        _write_texts(extra, _member(name), [note.extra.get(name, "") for note in notes])
        extra[_member(name)].attrs["name"] = np.bytes_(name.encode("utf-8"))
        is_known = np.array([name in note.extra for note in notes])
        if not is_known.all():
            _write_numbers(known, _member(name), is_known)


def _member(column: str) -> str:
    """Return the name that a column has in HDF5, where "/" parts names and "." is the group."""
    name = column.replace("%", "%25").replace("/", "%2F")
    return {"": "%", ".": "%2E"}.get(name, name)


def _write_texts(group: h5py.Group, name: str, texts: Sequence[str]) -> None:
    encoded = [text.encode("utf-8") for text in texts]
    # Of fixed length: HDF5's checksums do not cover text of any other.
    dtype = h5py.string_dtype("utf-8", max(1, *map(len, encoded)))
    if any(b"\0" in text for text in encoded):
        raise StoreError(f"{name} of a sample has a NUL character, which HDF5 has no text for")
    _write_numbers(group, name, np.array(encoded, dtype=f"S{dtype.itemsize}").astype(dtype))


def _write_numbers(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    group.create_dataset(
        name,
        data=values,
        chunks=(min(len(values), _TABLE_CHUNK),),
        compression="gzip",
        compression_opts=_GZIP_LEVEL,
        fletcher32=True,
    )


def _write_arrays(
    file: h5py.File,
    store: FeatureStore,
    rows: Sequence[SampleRow],
    output: _Output,
    report: Report,
) -> None:
    """Create the datasets of levels and masks, then fill them a sample at a time."""
    levels = file.create_group("levels")
    for name, spec in store.levels.items():
        dataset = _create_array(levels, name, spec.dtype, (len(rows), *spec.shape), spec)
        fingerprint = store.fingerprint(name)
        dataset.attrs["fingerprint"] = _json(dict(fingerprint.fields))
        dataset.attrs["digest"] = np.bytes_(fingerprint.digest)
        dataset.attrs["precision"] = np.bytes_(in_words(spec.precision))
        if spec.scale_grid is not None:
            _create_array(levels, f"{name}.scale", "float32", (len(rows), spec.shape[0]), spec)
    labels = file.create_group("labels")
    for name, label_set in store.label_sets.items():
        group = labels.create_group(name)
        group.attrs["classes"] = _json(list(label_set.classes))
        group.attrs["task"] = np.bytes_(label_set.task)
        _write_label_table(group, store, name, rows)
        _create_array(group, "masks", "uint8", (len(rows), *label_set.shape), None)
    output.check()
    report(0, len(rows))
    for number, row in enumerate(rows):
        for name in store.levels:
            stored = store.read_stored(name, row.row)
            levels[name][number] = stored.data_CHW
            if stored.scale_C is not None:
                levels[f"{name}.scale"][number] = stored.scale_C
        for name in store.label_sets:
            line = store.label_rows(name).get(row.row)
            mask = store.read_mask(row.row, name) if line is not None and line.present else None
            if mask is not None:
                labels[name]["masks"][number, :, : mask.shape[1], : mask.shape[2]] = mask
        output.check()
        report(number + 1, len(rows))


def _create_array(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...], spec: LevelSpec | None
) -> h5py.Dataset:
    """Create a dataset whose chunk is one sample; all but raw features is compressed."""
    is_raw = spec is not None and spec.grid.codec == "raw"
    return group.create_dataset(
        name,
        shape,
        dtype,
        chunks=(1, *shape[1:]),
        compression=None if is_raw else "gzip",
        compression_opts=None if is_raw else _GZIP_LEVEL,
        shuffle=not is_raw,
        fletcher32=True,
    )


def _write_label_table(
    group: h5py.Group, store: FeatureStore, label_set: str, rows: Sequence[SampleRow]
) -> None:
    table = store.label_rows(label_set)
    lines = [table.get(row.row, LabelRow(row.row)) for row in rows]
    _write_texts(group, "source", [line.source for line in lines])
    _write_numbers(group, "present", np.array([line.present for line in lines]))
    for name in _LABEL_NUMBERS:
        _write_numbers(group, name, np.array([getattr(line, name) for line in lines], np.int64))


class Hdf5Samples:
    """An HDF5 file that :func:`export_hdf5` wrote, to copy samples from.

    Attributes:
        path: of the file.
        num_samples: in it.
        levels: by name.
        label_sets: by name.

    Raises:
        NotAStoreError: when ``path`` is no file, or not one of ours.
        CorruptStoreError: when it is damaged, or a part is missing or of another shape.
        StoreError: when its layout is newer than this code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise NotAStoreError(f"{path} {what}; give what `sam3cache store export` wrote")
        if not h5py.is_hdf5(path):
            raise NotAStoreError(
                f"{path} is not an HDF5 file; give what `sam3cache store export` wrote"
            )
        with self._reading("its beginning or its end"):
            self._file = h5py.File(path, "r")
        try:
            self._read_description()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Hdf5Samples:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def plan(self) -> CopyPlan:
        """Return the store that this file describes.

        Raises:
            CorruptStoreError: when a table is damaged, missing or does not make sense.
        """
        samples, notes = self._read_samples(), self._read_annotations()
        return CopyPlan(
            settings=self._settings,
            levels=self.levels,
            label_sets=self.label_sets,
            rows=tuple(
                CopiedRow(self, number, sample, replace(note, id=sample.id))
                for number, (sample, note) in enumerate(zip(samples, notes, strict=True))
            ),
        )

    def read_stored(self, level: str, row: int) -> Encoded:
        """Return one sample of a level as it is stored.

        Raises:
            CorruptStoreError: when its bytes are damaged, or its values are not finite.
        """
        spec, _ = self.levels[level]
        scale_C = None
        with self._reading(f"levels/{level}[{row}]"):
            data_CHW = self._file["levels"][level][row]
            if spec.scale_grid is not None:
                scale_C = self._file["levels"][f"{level}.scale"][row]
        stored = Encoded(data_CHW, scale_C)
        checked = scale_C if scale_C is not None else decode(spec.precision, stored)
        if checked.dtype.kind == "f" and not np.isfinite(checked).all():
            raise CorruptStoreError(
                f"{self.path}: levels/{level}[{row}] has values that are NaN or infinite, which "
                "no store has; export it again"
            )
        return stored

    def read_mask(self, row: int, label_set: str) -> NDArray[np.uint8] | None:
        """Return a sample's mask (K, H, W) on its own grid, or None when it has none.

        Raises:
            MissingSampleError: when the file has no such label set.
            CorruptStoreError: when its bytes are damaged.
        """
        line = self.label_rows(label_set)[row]
        if not line.present:
            return None
        with self._reading(f"labels/{label_set}/masks[{row}]"):
            masks = self._file["labels"][label_set]["masks"]
            mask: NDArray[np.uint8] = masks[row, :, : line.height_px, : line.width_px]
        return mask

    def label_rows(self, label_set: str) -> Mapping[int, LabelRow]:
        """Return, by sample, the sizes and sources of a label set's masks.

        Raises:
            MissingSampleError: when the file has no such label set.
        """
        if label_set not in self._label_tables:
            raise MissingSampleError(f"{self.path} has no label set {label_set}")
        return self._label_tables[label_set]

    @cached_property
    def _label_tables(self) -> dict[str, dict[int, LabelRow]]:
        return {name: self._read_label_table(spec) for name, spec in self.label_sets.items()}

    def _read_description(self) -> None:
        with self._reading("its attributes"):
            version = self._file.attrs.get("sam3cache_hdf5_version")
        if version is None:
            raise NotAStoreError(
                f"{self.path} is an HDF5 file, but not one that `sam3cache store export` wrote; "
                "give one of those"
            )
        with self._reading("its attributes"):
            version = int(version)
        if version > HDF5_VERSION:
            raise StoreError(
                f"{self.path} has layout version {version}, this sam3cache reads up to "
                f"{HDF5_VERSION}; upgrade sam3cache"
            )
        with self._reading("its attributes"):
            self.num_samples = int(self._file.attrs["num_samples"])
            self._settings: dict[str, Any] = json.loads(self._file.attrs["settings"])
            names = [
                name
                for name in self._file["levels"]
                if not (name.endswith(".scale") and name[: -len(".scale")] in self._file["levels"])
            ]
        self._require(isinstance(self._settings, dict), "attribute settings", "no JSON object")
        self._require(bool(names) and self.num_samples > 0, "levels", "empty")
        self.levels = {name: self._read_level(name) for name in names}
        with self._reading("labels"):
            sets = list(self._file["labels"])
        self.label_sets = {name: self._read_label_set(name) for name in sets}

    def _read_level(self, name: str) -> tuple[LevelSpec, Fingerprint]:
        where = f"levels/{name}"
        dataset = self._dataset(where, num_axes=4)
        with self._reading(where):
            c, h, w = (int(length) for length in dataset.shape[1:])
            spec = LevelSpec(name, (c, h, w), str(dataset.dtype))
            fingerprint = Fingerprint(json.loads(dataset.attrs["fingerprint"]))
            digest = dataset.attrs["digest"].decode("ascii")
            fits = digest == fingerprint.digest
        self._require(fits, where, "its fingerprint and digest do not fit each other")
        if spec.scale_grid is not None:
            scales = self._dataset(f"{where}.scale", num_axes=2)
            fits = scales.dtype == np.float32 and scales.shape[1] == c
            self._require(fits, f"{where}.scale", f"not float32 (samples, {c})")
        return spec, fingerprint

    def _read_label_set(self, name: str) -> LabelSetSpec:
        where = f"labels/{name}"
        masks = self._dataset(f"{where}/masks", num_axes=4)
        with self._reading(where):
            classes = tuple(str(c) for c in json.loads(self._file[where].attrs["classes"]))
            # Files of before there were class numbers do not say.
            task = self._file[where].attrs.get("task", np.bytes_("multilabel")).decode("ascii")
            spec = LabelSetSpec(name, classes, int(masks.shape[2]), int(masks.shape[3]), task)
        known = " or ".join(get_args(Task))
        self._require(task in get_args(Task), where, f"its task is {task!r}, not {known}")
        fits = masks.dtype == np.uint8 and masks.shape[1] == spec.num_planes
        self._require(fits, f"{where}/masks", f"not uint8 (samples, {spec.num_planes}, …)")
        return spec

    def _read_label_table(self, spec: LabelSetSpec) -> dict[int, LabelRow]:
        where = f"labels/{spec.name}"
        sources = self._texts(f"{where}/source")
        present = self._column(f"{where}/present", "b")
        numbers = {name: self._column(f"{where}/{name}", "i") for name in _LABEL_NUMBERS}
        heights, widths = numbers["height_px"], numbers["width_px"]
        fits = (heights >= 0) & (heights <= spec.height_px)
        fits &= (widths >= 0) & (widths <= spec.width_px)
        self._require(bool(fits.all()), where, "a mask's size is beyond that of masks")
        return {
            number: LabelRow(
                number,
                present=bool(present[number]),
                source=sources[number],
                **{name: int(values[number]) for name, values in numbers.items()},
            )
            for number in range(self.num_samples)
        }

    def _read_samples(self) -> list[SampleRow]:
        texts = {name: self._texts(f"samples/{name}") for name in _SAMPLE_TEXTS}
        numbers = {name: self._column(f"samples/{name}", "i") for name in _SAMPLE_NUMBERS}
        frames = self._column("samples/frame", "i")
        ids = texts["id"]
        distinct = len(set(ids)) == len(ids) and "" not in ids
        self._require(distinct, "samples/id", "an id is empty or there twice")
        return [
            SampleRow(
                i,
                ids[i],
                texts["source"][i],
                None if frames[i] == _STILL else int(frames[i]),
                height_px=int(numbers["height_px"][i]),
                width_px=int(numbers["width_px"][i]),
                num_channels=int(numbers["num_channels"][i]),
                size_bytes=int(numbers["size_bytes"][i]),
                mtime_ns=int(numbers["mtime_ns"][i]),
                pixel_sha256=texts["pixel_sha256"][i],
                status="ok",
                base_id=texts["base_id"][i] or None,
                variant=texts["variant"][i] or None,
            )
            for i in range(self.num_samples)
        ]

    def _read_annotations(self) -> list[AnnotationRow]:
        splits, groups = self._texts("annotations/split"), self._texts("annotations/group")
        self._require(set(splits) <= set(SPLITS), "annotations/split", f"not all of {SPLITS}")
        primary = self._column("annotations/primary_angle_deg", "f")
        secondary = self._column("annotations/secondary_angle_deg", "f")
        columns: dict[str, list[str | None]] = {}
        with self._reading("annotations"):
            members = list(self._file["annotations/extra"])
            with_gaps = set(self._file["annotations/extra_known"])
        for member in members:
            texts = self._texts(f"annotations/extra/{member}")
            known = np.ones(self.num_samples, bool)
            if member in with_gaps:
                known = self._column(f"annotations/extra_known/{member}", "b")
            with self._reading(f"annotations/extra/{member}"):
                name = self._file["annotations/extra"][member].attrs["name"].decode("utf-8")
            columns[name] = [t if k else None for t, k in zip(texts, known, strict=True)]
        return [
            AnnotationRow(
                i,
                "",
                splits[i],
                groups[i],
                _or_none(primary[i]),
                _or_none(secondary[i]),
                {name: text for name, texts in columns.items() if (text := texts[i]) is not None},
            )
            for i in range(self.num_samples)
        ]

    def _texts(self, where: str) -> list[str]:
        values = self._column(where, "S")
        with self._reading(where):
            return [value.decode("utf-8") for value in values]

    def _column(self, where: str, kind: str) -> NDArray[Any]:
        dataset = self._dataset(where, num_axes=1)
        self._require(dataset.dtype.kind == kind, where, f"of type {dataset.dtype}")
        with self._reading(where):
            values: NDArray[Any] = dataset[:]
        return values

    def _dataset(self, where: str, *, num_axes: int) -> h5py.Dataset:
        with self._reading(where):
            dataset = self._file.get(where)
        if not isinstance(dataset, h5py.Dataset):
            raise self._damage(where, "it is missing")
        shape = dataset.shape
        fits = shape is not None and len(shape) == num_axes and shape[0] == self.num_samples
        self._require(fits, where, f"its shape {shape} is not that of {self.num_samples} samples")
        return dataset

    def _require(self, fits: bool, where: str, what: str) -> None:
        if not fits:
            raise self._damage(where, what)

    @contextmanager
    def _reading(self, where: str) -> Iterator[None]:
        """Turn all that h5py and JSON raise over a damaged file into one error that names it."""
        try:
            yield
        except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            # The message of what is missing is its quoted name.
            reason = "missing or damaged" if isinstance(error, LookupError) else str(error)
            raise self._damage(where, reason.splitlines()[0]) from None

    def _damage(self, where: str, what: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self.path} cannot be used as it is ({where}: {what}); get the file again from where "
            "it was exported"
        )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
