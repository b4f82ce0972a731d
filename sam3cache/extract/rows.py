"""Which sample goes into which row: what a manifest asks for against what a store holds.

Either may hold many samples, so rows and what files say are kept by column, and made into objects
as they are asked for.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from sam3cache.errors import ImageError, ManifestError
from sam3cache.extract.config import FATAL_REASON
from sam3cache.features import (
    BLOCK_ROWS,
    AnnotationRow,
    LabelRow,
    LazySequence,
    SampleRow,
    num_replaced,
)
from sam3cache.images import ImageInfo, pixel_hash, probe, read_image, read_mask
from sam3cache.records import Sample, SetAside
from sam3cache.variants import variant_id

_QUICK_LOOK_S = 2e-4
_NUM_PROBE_THREADS = 8
_CHUNK = 128
"""Samples that a thread takes at a time: handing them out singly takes longer than looking."""

_HERE = Path()
_NO_MASK = LabelRow(0)
_NOBODY = -1

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample of the manifest and what its files say without being decoded.

    Attributes:
        sample: from the manifest; a bare one where the manifest itself set it aside.
        info: None when the sample is set aside.
        mask: the mask's file, with row 0; None without a mask.
        reason: why it is set aside, else empty.
    """

    sample: Sample
    info: ImageInfo | None
    mask: LabelRow | None = None
    reason: str = ""


class WantedSamples(LazySequence[Wanted]):
    """What a manifest asks for, in its order; numbers are kept by column."""

    def __init__(self, samples: Sequence[Sample], set_aside: Sequence[SetAside] = ()) -> None:
        """Take the samples, and those that the manifest itself had to set aside."""
        root = samples[0].root if samples else _HERE
        bare = [Sample(id=aside.id, source=aside.source, root=root) for aside in set_aside]
        self.samples: Sequence[Sample] = [*samples, *bare] if bare else samples
        num = len(self.samples)
        self._reasons = {len(samples) + i: aside.reason for i, aside in enumerate(set_aside)}
        self._height_px, self._width_px, self._num_channels = (_zeros("i", num) for _ in range(3))
        # A mask's height is -1 where there is none.
        self._mask_height_px, self._mask_width_px = (_zeros("i", num) for _ in range(2))
        self._size_bytes, self._mtime_ns = (_zeros("q", num) for _ in range(2))
        self._mask_bytes, self._mask_mtime_ns = (_zeros("q", num) for _ in range(2))
        # Where in which table a sample was recalled from, or -1.
        self._places = array("i", [_NOBODY]) * num
        self._places_in: Sequence[SampleRow] = ()
        self.num_originals = num
        """Variants come behind so many samples."""

    def with_variants(self, names: Sequence[str]) -> WantedSamples:
        """Return this with variants behind it, of the usable training samples; not yet looked at.

        Raises:
            ManifestError: when a sample has the id that a variant would get.
        """
        variants = [
            replace(
                sample,
                id=variant_id(sample.id, name),
                mask=None,
                mask_location=None,
                masks=(),
                variant=name,
                base_id=sample.id,
            )
            for index, sample in enumerate(self.samples)
            if sample.split == "train" and self.is_usable(index)
            for name in names
        ]
        taken = {sample.id for sample in self.samples} if variants else set()
        if clash := next((variant for variant in variants if variant.id in taken), None):
            raise ManifestError(
                f"sample id {clash.id!r} is that of variant {clash.variant} of {clash.base_id!r}; "
                "give the sample another id, or leave the variant out"
            )
        extended = copy(self)
        extended.samples = [*self.samples, *variants]
        zeros = _zeros("q", len(variants))
        for column in ("_height_px", "_width_px", "_num_channels", "_mask_width_px"):
            setattr(extended, column, getattr(self, column) + array("i", zeros))
        for column in ("_size_bytes", "_mtime_ns", "_mask_bytes", "_mask_mtime_ns"):
            setattr(extended, column, getattr(self, column) + zeros)
        nothing = array("i", [_NOBODY]) * len(variants)
        extended._mask_height_px = self._mask_height_px + nothing
        extended._places = self._places + nothing
        return extended

    def is_variant(self, index: int) -> bool:
        """Return whether a sample is a variant of another."""
        return index >= self.num_originals

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, place: int) -> Wanted:
        """Return a sample with what is known of its files."""
        sample = self.samples[place]
        if place in self._reasons:
            return Wanted(sample, None, reason=self._reasons[place])
        has_mask = self._mask_height_px[place] >= 0
        info = ImageInfo(
            self._height_px[place],
            self._width_px[place],
            self._num_channels[place],
            self._mask_height_px[place] if has_mask else None,
            self._mask_width_px[place] if has_mask else None,
            self._size_bytes[place],
            self._mtime_ns[place],
        )
        return Wanted(sample, info, self.mask(place, 0) if has_mask else None)

    def mask(self, index: int, row: int) -> LabelRow:
        """Return the file of a sample's mask, as that of a row."""
        if index in self._reasons or self._mask_height_px[index] < 0:
            return LabelRow(row)
        return LabelRow(
            row,
            self._mask_height_px[index],
            self._mask_width_px[index],
            True,
            self.samples[index].mask or "",
            self._mask_bytes[index],
            self._mask_mtime_ns[index],
        )

    def take(
        self, index: int, info: ImageInfo, mask_bytes: int = 0, mask_mtime_ns: int = 0
    ) -> None:
        """Note what a sample's files say."""
        self._height_px[index], self._width_px[index] = info.height_px, info.width_px
        self._num_channels[index] = info.num_channels
        has_mask = info.mask_height_px is not None
        self._mask_height_px[index] = (info.mask_height_px or 0) if has_mask else -1
        self._mask_width_px[index] = info.mask_width_px or 0
        self._size_bytes[index], self._mtime_ns[index] = info.size_bytes, info.mtime_ns
        self._mask_bytes[index], self._mask_mtime_ns[index] = mask_bytes, mask_mtime_ns

    def recall(self, index: int, recalled: Recalled, rows: Sequence[SampleRow]) -> None:
        """Note what a store's table recorded of a sample's files, which are as they were then."""
        self.take(index, recalled.info, recalled.mask_bytes, recalled.mask_mtime_ns)
        self._places[index] = recalled.position
        self._places_in = rows

    def place(self, index: int, rows: Sequence[SampleRow]) -> int:
        """Return where in a table a sample was recalled from, or -1."""
        return self._places[index] if rows is self._places_in else _NOBODY

    @property
    def not_recalled(self) -> Sequence[int]:
        """Indices of usable samples whose files are new, or other than a store recorded."""
        return [
            index
            for index, place in enumerate(self._places)
            if place == _NOBODY and index not in self._reasons
        ]

    @property
    def largest_mask_px(self) -> tuple[int, int]:
        """Height and width that hold every mask; at most 0 without any."""
        usable = [index for index in range(len(self)) if index not in self._reasons]
        return (
            max((self._mask_height_px[index] for index in usable), default=0),
            max((self._mask_width_px[index] for index in usable), default=0),
        )

    def set_aside(self, index: int, reason: str) -> None:
        """Note why a sample cannot be used."""
        self._reasons[index] = reason

    def is_usable(self, index: int) -> bool:
        """Return whether a sample can be used, as far as headers tell."""
        return index not in self._reasons

    @property
    def num_usable(self) -> int:
        """Samples that can be used, without their variants."""
        num_aside = sum(not self.is_variant(index) for index in self._reasons)
        return self.num_originals - num_aside

    @property
    def num_channels(self) -> int:
        """Channels that a level of these pictures has: 3 if any has colour."""
        return max(self._num_channels, default=1)

    def fit_channels(self, num_channels: int, reason: str) -> WantedSamples:
        """Return this with pictures of more channels set aside; ``{}`` stands for their file."""
        if self.num_channels <= num_channels:
            return self
        fitted = copy(self)
        fitted._reasons = dict(self._reasons)
        for index, channels in enumerate(self._num_channels):
            if channels > num_channels:
                fitted.set_aside(index, reason.format(self.samples[index].source))
        return fitted


def _zeros(typecode: str, num: int) -> array[int]:
    return array(typecode, [0]) * num


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a store recorded of a sample's files.

    Attributes:
        position: of the row in the store's table.
        info: what the headers said.
        mask_bytes: size of the mask's file; 0 without one.
        mask_mtime_ns: its time.
    """

    position: int
    info: ImageInfo
    mask_bytes: int
    mask_mtime_ns: int


class StoredRows:
    """A store's table, to be searched by the file that a row came from.

    Args:
        rows: the table, with the receipts' facts merged in.
        masks: by row, the file that each stored mask came from.
    """

    def __init__(
        self, rows: Sequence[SampleRow], masks: Mapping[int, LabelRow] = MappingProxyType({})
    ) -> None:
        self.rows = rows
        self._masks = masks
        # Sorted hashes rather than a dict, which would hold every name, and take ten times as much.
        self.numbers = array("q", bytes(8 * len(rows)))
        keys = np.empty(len(rows), np.int64)
        for position, row in enumerate(rows):
            self.numbers[position] = row.row
            keys[position] = _key(row.source, row.frame, row.variant)
        self._positions = np.argsort(keys, kind="stable").astype(np.int32)
        self._keys = keys[self._positions]

    def positions(self, sample: Sample) -> Sequence[int]:
        """Return where in the table the rows of a sample's file, frame and variant are."""
        key = _key_of(sample)
        begin = int(np.searchsorted(self._keys, key))
        found = []
        while begin < len(self._keys) and self._keys[begin] == key:
            position = int(self._positions[begin])
            row = self.rows[position]
            if (row.source, row.frame, row.variant or "") == (
                sample.source,
                sample.frame,
                sample.variant,
            ):
                found.append(position)
            begin += 1
        return found

    def order(self, samples: Sequence[Sample]) -> Sequence[int]:
        """Return in which order to go through samples, so that rows near one another are asked for.

        Samples of one file stay in the order they are in.
        """
        if not len(self._keys):
            return range(len(samples))
        keys = np.fromiter(map(_key_of, samples), np.int64, len(samples))
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        first = np.where(self._keys[at] == keys, self._positions[at], len(self.rows))
        return array("i", np.argsort(first, kind="stable").astype(np.intc).tobytes())

    def recall(self, sample: Sample) -> Recalled | None:
        """Return what a look at a sample's files would find, if sizes and times are as recorded.

        Raises:
            OSError: when a file is not there.
        """
        for position in self.positions(sample):
            row = self.rows[position]
            if row.status not in ("ok", "pending") or not _is_unchanged(
                sample.image_path, row.size_bytes, row.mtime_ns
            ):
                continue
            mask = _NO_MASK
            if sample.mask_path is not None:
                found = self._masks.get(row.row)
                if (
                    found is None
                    or not found.present
                    or found.source != sample.mask
                    or not _is_unchanged(sample.mask_path, found.size_bytes, found.mtime_ns)
                ):
                    return None
                mask = found
            info = ImageInfo(
                row.height_px,
                row.width_px,
                row.num_channels,
                mask.height_px if mask.present else None,
                mask.width_px if mask.present else None,
                row.size_bytes,
                row.mtime_ns,
            )
            return Recalled(position, info, mask.size_bytes, mask.mtime_ns)
        return None


def _key(source: str, frame: int | None, variant: str | None) -> int:
    if variant:
        return hash((source, frame, variant))
    return hash(source if frame is None else (source, frame))


def _key_of(sample: Sample) -> int:
    return _key(sample.source, sample.frame, sample.variant)


def _is_unchanged(path: Path, size_bytes: int, mtime_ns: int) -> bool:
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (size_bytes, mtime_ns)


class PixelHashes:
    """Hashes of decoded pictures, remembered: comparing must not decode anything twice."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def of(self, sample: Sample) -> str | None:
        """Return the hash of a sample's pixels, or None when picture or mask cannot be read."""
        if sample.id not in self._known:
            try:
                digest: str | None = pixel_hash(read_image(sample))
                read_mask(sample)
            except ImageError:
                digest = None
            self._known[sample.id] = digest
        return self._known[sample.id]


def probe_all(
    samples: Sequence[Sample],
    set_aside: Sequence[SetAside],
    report: Report,
    stored: StoredRows | None = None,
    variants: Sequence[str] = (),
) -> WantedSamples:
    """Look at every file's header; what cannot be read is set aside.

    Args:
        samples: of the manifest.
        set_aside: what the manifest itself had to set aside.
        report: called with samples done and in all.
        stored: rows whose files need no look while their size and time are as recorded.
        variants: names of changed views that are wanted of usable training samples as well.

    Raises:
        ManifestError: when a sample has the id that a variant would get.
    """
    stored = stored or StoredRows(())
    wanted = WantedSamples(samples, set_aside)
    _look_at(wanted, samples, 0, report, stored)
    if not variants:
        return wanted
    wanted = wanted.with_variants(variants)
    first = wanted.num_originals
    _look_at(wanted, wanted.samples[first:], first, report, stored)
    return wanted


def _look_at(
    wanted: WantedSamples, samples: Sequence[Sample], first: int, report: Report, stored: StoredRows
) -> None:
    """Look at the files of samples that are those of ``wanted`` from an index on."""
    order = stored.order(samples)
    # Few samples are shared out singly, so that every thread has some.
    size = min(_CHUNK, max(1, len(samples) // (4 * _NUM_PROBE_THREADS)))

    def look(start: int) -> int:
        chunk = order[start : start + size]
        for index in chunk:
            _probe_one(wanted, first + index, stored)
        return len(chunk)

    num_done = 0
    starts = iter(range(0, len(samples), size))
    for start in starts:
        began_s = time.perf_counter()
        num_looked_at = look(start)
        num_done += num_looked_at
        report(num_done, len(samples))
        # Threads take turns at Python's lock, which takes longer than a look at a quick disk.
        if time.perf_counter() - began_s > num_looked_at * _QUICK_LOOK_S:
            break
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        for num_looked_at in pool.map(look, starts):
            num_done += num_looked_at
            report(num_done, len(samples))


def _probe_one(wanted: WantedSamples, index: int, stored: StoredRows) -> None:
    sample = wanted.samples[index]
    try:
        recalled = stored.recall(sample)
    except OSError:
        recalled = None  # What is wrong with the file, a look at it says better.
    if recalled is not None:
        wanted.recall(index, recalled, stored.rows)
        return
    try:
        info = probe(sample)
        if sample.mask_path is None:
            wanted.take(index, info)
        else:
            stat = sample.mask_path.stat()
            wanted.take(index, info, stat.st_size, stat.st_mtime_ns)
    except ImageError as error:
        wanted.set_aside(index, str(error))
    except OSError as error:
        wanted.set_aside(index, f"{sample.mask}: {error.strerror}")


def hash_changed(stored: StoredRows, wanted: WantedSamples, report: Report) -> PixelHashes:
    """Decode, on several threads, the files whose pixels decide which row they belong to.

    These are files whose times differ from what the store recorded; then files that the store does
    not know, where it has a row of that shape that nobody else wants.

    Args:
        stored: the store's table.
        wanted: what the manifest asks for.
        report: called with samples done and in all.
    """
    hashes = PixelHashes()
    unsure = wanted.not_recalled
    if not unsure or not stored.rows:
        return hashes
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        num_done = 0

        def decode(samples: Sequence[Sample]) -> None:
            nonlocal num_done
            num_total = num_done + len(samples)
            for _ in pool.map(hashes.of, samples):
                num_done += 1
                report(num_done, num_total)

        decode([wanted.samples[i] for i in unsure if _has_changed(wanted[i], stored)])
        matching = _match_files(stored, wanted, hashes)
        orphans = _orphans(stored, matching) if matching.fresh else {}
        if orphans:
            fresh = (wanted[index] for index in matching.fresh)
            decode([item.sample for item in fresh if _shape(item.info) in orphans])
    return hashes


def _has_changed(item: Wanted, stored: StoredRows) -> bool:
    positions = stored.positions(item.sample)
    return (
        item.info is not None
        and len(positions) > 0
        and all(
            (stored.rows[i].size_bytes, stored.rows[i].mtime_ns)
            != (item.info.size_bytes, item.info.mtime_ns)
            for i in positions
        )
    )


@dataclass(slots=True)
class _Matching:
    """Which rows stay, by position in the store's table.

    Attributes:
        owner: by position, the index of the sample that the row belongs to, or -1.
        is_live: by position, whether the row stays and is pending or ok.
        num_kept: rows that stay and are ok.
        changed: by position, rows that stay otherwise than they are.
        fresh: indices of samples without a row.
        num_renamed: rows whose picture was found in another file than before.
        num_kept_variants: of the rows that are kept, those of variants.
    """

    owner: array[int]
    is_live: bytearray
    fresh: Sequence[int] = ()
    changed: dict[int, SampleRow] = field(default_factory=dict)
    num_kept: int = 0
    num_renamed: int = 0
    num_kept_variants: int = 0

    def keep(self, position: int, row: SampleRow, index: int) -> None:
        """Give a row, as it shall stand, to a sample."""
        self.owner[position] = index
        self.is_live[position] = row.status in ("pending", "ok")
        self.num_kept += row.status == "ok"
        self.num_kept_variants += row.status == "ok" and row.variant is not None


class PlannedRows(LazySequence[SampleRow]):
    """The table that a store shall have: its own with some rows changed, and new ones behind."""

    def __init__(self, stored: StoredRows, matching: _Matching, wanted: WantedSamples) -> None:
        self._rows, self._changed = stored.rows, matching.changed
        self._wanted, self._fresh = wanted, matching.fresh
        self.numbers = stored.numbers
        last_row = max(self.numbers, default=-1)
        self.next_row = -(-(1 + last_row) // BLOCK_ROWS) * BLOCK_ROWS

    def __len__(self) -> int:
        return len(self._rows) + len(self._fresh)

    def item(self, place: int) -> SampleRow:
        """Return a row."""
        if place < len(self._rows):
            return self._changed.get(place) or self._rows[place]
        offset = place - len(self._rows)
        return _new_row(self.next_row + offset, self._wanted[self._fresh[offset]])

    def position(self, row: int) -> int:
        """Return where in the table a row is.

        Raises:
            KeyError: when it is not there.
        """
        if row >= self.next_row:
            position = len(self._rows) + row - self.next_row
            if position >= len(self):
                raise KeyError(row)
            return position
        # As long as no block has vacant rows before it, a row is where its number says.
        position = row
        if row >= len(self.numbers) or self.numbers[row] != row:
            position = bisect_left(self.numbers, row)
            if position == len(self.numbers) or self.numbers[position] != row:
                raise KeyError(row)
        return position

    def block(self, number: int) -> Iterator[SampleRow]:
        """Go through the rows of a block."""
        begin, end = number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS
        if begin >= self.next_row:
            offset = len(self._rows) - self.next_row
            positions = range(begin + offset, min(end + offset, len(self)))
        else:
            positions = range(bisect_left(self.numbers, begin), bisect_left(self.numbers, end))
        return (self[position] for position in positions)


@dataclass(frozen=True, slots=True)
class VariantCounts:
    """How many rows of variants a plan has.

    Attributes:
        num_live: that are pending or ok.
        num_kept: that hold features already.
        num_changed: that are new although the store knows their sample's file.
        num_removed: that became tombstones.
        num_aside: that cannot be used.
    """

    num_live: int
    num_kept: int
    num_changed: int
    num_removed: int
    num_aside: int


@dataclass(frozen=True)
class RowPlan:
    """The tables that the store shall have, and the samples behind the rows to compute.

    Attributes:
        rows: the whole table, tombstones too, in row order.
        wanted: what the manifest asks for.
        owner: by position in ``rows``, the index in ``wanted`` of the sample behind it, or -1.
        is_live: by position, whether a row is pending or ok.
        num_live: how many are.
        num_kept: rows that held features before and hold them on.
        num_changed: samples that got a new row although the store knows their file.
        num_removed: rows that became tombstones.
        num_replaced: of these, rows whose sample has another row now.
        num_renamed: rows whose picture was found in another file than before.
        variants: of the rows counted so, those of variants.
        is_changed: whether any row is to be other than it is.
    """

    rows: PlannedRows
    wanted: WantedSamples
    owner: array[int]
    is_live: bytearray
    num_live: int
    num_kept: int
    num_changed: int
    num_removed: int
    num_replaced: int
    num_renamed: int
    variants: VariantCounts
    is_changed: bool

    def __iter__(self) -> Iterator[tuple[SampleRow, Wanted]]:
        """Go through the rows that belong to samples, those set aside too."""
        for row, index in zip(self.rows, self.owner, strict=True):
            if index != _NOBODY:
                yield row, self.wanted[index]

    def index(self, row: int) -> int:
        """Return which of the wanted samples is behind a row that is pending or ok.

        Raises:
            KeyError: when none is.
        """
        position = self.rows.position(row)
        if not self.is_live[position]:
            raise KeyError(row)
        return self.owner[position]

    def is_variant(self, row: int) -> bool:
        """Return whether a row belongs to a variant of a sample."""
        index = self.owner[self.rows.position(row)]
        return index != _NOBODY and self.wanted.is_variant(index)

    @property
    def num_aside(self) -> int:
        """Samples that cannot be used, without their variants."""
        num_aside = len(self.owner) - self.owner.count(_NOBODY) - self.num_live
        return num_aside - self.variants.num_aside

    @property
    def annotations(self) -> Iterable[AnnotationRow]:
        """What may be corrected, of every row that is not a tombstone; made anew on every pass."""
        return _Annotations(self)

    @property
    def owners(self) -> Mapping[int, Wanted]:
        """By row, the sample behind it; for rows that are pending or ok."""
        return _Owners(self)

    @property
    def masks(self) -> Mapping[int, LabelRow]:
        """By row, the file each mask shall have come from, for rows that are pending or ok."""
        return _Masks(self)


@dataclass(frozen=True)
class _Annotations(Iterable[AnnotationRow]):
    plan: RowPlan

    def __iter__(self) -> Iterator[AnnotationRow]:
        return (_annotation(row.row, item) for row, item in self.plan)


@dataclass(frozen=True)
class _Owners(Mapping[int, Wanted]):
    plan: RowPlan

    def __getitem__(self, row: int) -> Wanted:
        return self.plan.wanted[self.plan.index(row)]

    def __iter__(self) -> Iterator[int]:
        return (row.row for row, _ in self.plan if row.status in ("pending", "ok"))

    def __len__(self) -> int:
        return self.plan.num_live


@dataclass(frozen=True)
class _Masks(Mapping[int, LabelRow]):
    plan: RowPlan

    def __getitem__(self, row: int) -> LabelRow:
        return self.plan.wanted.mask(self.plan.index(row), row)

    def __iter__(self) -> Iterator[int]:
        return iter(self.plan.owners)

    def __len__(self) -> int:
        return self.plan.num_live


def plan_rows(
    stored: StoredRows, wanted: WantedSamples, hashes: PixelHashes | None = None
) -> RowPlan:
    """Give every wanted sample a row, keeping the rows whose picture has not changed.

    A file whose size and time of change are as recorded is taken as unchanged; else its decoded
    pixels decide. A file that the store does not know takes over a row of the same pixels that
    nobody else wants: it was renamed. New, changed and mended samples get new rows, from the next
    block on; rows that nobody wants become tombstones, and come back to life when their sample
    does.

    Args:
        stored: the store's table.
        wanted: what the manifest asks for.
        hashes: of pictures that have been decoded already.
    """
    hashes = hashes or PixelHashes()
    matching = _match_files(stored, wanted, hashes)
    _match_pixels(stored, wanted, matching, hashes)
    removed = []
    for position, index in enumerate(matching.owner):
        if index != _NOBODY or stored.rows[position].status == "removed":
            continue
        old = stored.rows[position]
        removed.append(old)
        # A row that was never ok loses its hash, without which it does not come back.
        matching.changed[position] = replace(
            old,
            status="removed",
            reason="no longer in the manifest, or changed",
            pixel_sha256=old.pixel_sha256 if old.status == "ok" else "",
        )
    usable = [index for index in matching.fresh if wanted.is_usable(index)]
    changed = [index for index in usable if len(stored.positions(wanted.samples[index])) > 0]
    is_live = matching.is_live + bytes(map(wanted.is_usable, matching.fresh))
    owner = matching.owner + array("i", matching.fresh)
    return RowPlan(
        rows=PlannedRows(stored, matching, wanted),
        wanted=wanted,
        owner=owner,
        is_live=is_live,
        num_live=sum(is_live),
        num_kept=matching.num_kept,
        num_changed=len(changed),
        num_removed=len(removed),
        num_replaced=num_replaced(
            removed, ((sample.id, sample.source) for sample in wanted.samples)
        )
        if removed
        else 0,
        num_renamed=matching.num_renamed,
        variants=_count_variants(stored, matching, wanted, owner, is_live, changed),
        is_changed=bool(matching.changed or matching.fresh),
    )


def _count_variants(
    stored: StoredRows,
    matching: _Matching,
    wanted: WantedSamples,
    owner: array[int],
    is_live: bytearray,
    changed: Sequence[int],
) -> VariantCounts:
    of_variants = [i for i, index in enumerate(owner) if wanted.is_variant(index)]
    num_live = sum(is_live[i] for i in of_variants)
    removed = (
        row
        for i, row in matching.changed.items()
        if owner[i] == _NOBODY and row.variant is not None
    )
    return VariantCounts(
        num_live=num_live,
        num_kept=matching.num_kept_variants,
        num_changed=sum(map(wanted.is_variant, changed)),
        num_removed=sum(1 for _ in removed),
        num_aside=len(of_variants) - num_live,
    )


def _match_files(stored: StoredRows, wanted: WantedSamples, hashes: PixelHashes) -> _Matching:
    """Find the rows that were made from the very files that are wanted."""
    rows = stored.rows
    matching = _Matching(array("i", [_NOBODY]) * len(rows), bytearray(len(rows)))
    owner = matching.owner
    fresh = array("i")
    for index in stored.order(wanted.samples):
        if wanted.is_variant(index) and not wanted.is_usable(index):
            continue  # Its sample is set aside: that is told once.
        place = wanted.place(index, rows)
        if place != _NOBODY and owner[place] == _NOBODY:
            row = rows[place]
            if row.id == wanted.samples[index].id and not row.reason:
                matching.keep(place, row, index)
                continue
        item = wanted[index]
        free = [i for i in stored.positions(item.sample) if owner[i] == _NOBODY]
        position, found = _find_row(item, free, rows, hashes)
        if found is None:
            fresh.append(index)
            continue
        matching.keep(position, found, index)
        if found != rows[position]:
            matching.changed[position] = found
    # New rows come in the manifest's order.
    matching.fresh = array("i", sorted(fresh))
    return matching


def _match_pixels(
    stored: StoredRows, wanted: WantedSamples, matching: _Matching, hashes: PixelHashes
) -> None:
    """Give samples without a row those that nobody wants, by their pixels."""
    orphans = _orphans(stored, matching) if matching.fresh else {}
    if not orphans:
        return
    by_pixels: dict[tuple[str, str], list[int]] = {}
    for positions in orphans.values():
        for position in positions:
            by_pixels.setdefault(_pixels_of(stored.rows[position]), []).append(position)
    for positions in by_pixels.values():
        positions.sort(key=lambda i: (stored.rows[i].status != "ok", i))
    # A sample of a row's own id goes first, whichever copy of the picture it names.
    for only_own_id in (True, False):
        fresh = array("i")
        for index in matching.fresh:
            item = wanted[index]
            found: int | None = None
            if item.info is not None and _shape(item.info) in orphans:
                free = by_pixels.get((hashes.of(item.sample) or "", item.sample.variant), [])
                own = [i for i in free if stored.rows[i].id == item.sample.id]
                found = next(iter(own if only_own_id else free), None)
            if item.info is None or found is None:
                fresh.append(index)
                continue
            by_pixels[_pixels_of(stored.rows[found])].remove(found)
            row = _taken_over(stored.rows[found], item, item.info)
            matching.keep(found, row, index)
            matching.changed[found] = row
            matching.num_renamed += 1
        matching.fresh = fresh


def _pixels_of(row: SampleRow) -> tuple[str, str]:
    """Return what of two rows has to be the same: a symmetric picture is no variant of itself."""
    return row.pixel_sha256, row.variant or ""


_Shape = tuple[int, int, int]


def _shape(picture: ImageInfo | SampleRow | None) -> _Shape | None:
    if picture is None:
        return None
    return (picture.height_px, picture.width_px, picture.num_channels)


def _orphans(stored: StoredRows, matching: _Matching) -> dict[_Shape | None, list[int]]:
    """Return, by shape of the picture, the rows that hold features and that nobody wants."""
    orphans: dict[_Shape | None, list[int]] = {}
    for position, index in enumerate(matching.owner):
        if index == _NOBODY:
            row = stored.rows[position]
            if row.status in ("ok", "removed") and row.pixel_sha256:
                orphans.setdefault(_shape(row), []).append(position)
    return orphans


def _find_row(
    item: Wanted, positions: Sequence[int], rows: Sequence[SampleRow], hashes: PixelHashes
) -> tuple[int, SampleRow | None]:
    """Return the row that already holds this sample, as it shall stand in the table, or None."""
    if len(positions) > 1:
        # Rows of this id first, then living ones, then the newest.
        positions = sorted(
            positions,
            key=lambda i: (
                rows[i].id != item.sample.id,
                rows[i].status == "removed",
                -rows[i].row,
            ),
        )
    for position in positions:
        row = rows[position]
        if item.info is None:
            if row.status == "aside" and row.reason == item.reason:
                return position, replace(row, id=item.sample.id)
            continue
        unchanged = (row.size_bytes, row.mtime_ns) == (item.info.size_bytes, item.info.mtime_ns)
        if row.status == "aside":
            # Set aside when it was decoded: only a decode can tell whether it has been mended, but
            # of one that would end this process, too.
            is_fatal = unchanged and FATAL_REASON in row.reason
            if is_fatal or hashes.of(item.sample) is None:
                return position, replace(row, id=item.sample.id)
            continue
        if row.status == "removed" and not row.pixel_sha256:
            continue
        if not unchanged and (not row.pixel_sha256 or hashes.of(item.sample) != row.pixel_sha256):
            continue
        if unchanged and row.status != "removed" and row.id == item.sample.id and not row.reason:
            return position, row
        return position, _taken_over(row, item, item.info)
    return -1, None


def _taken_over(row: SampleRow, item: Wanted, info: ImageInfo) -> SampleRow:
    """Return a row of the same pixels as it stands once it belongs to a sample."""
    return replace(
        row,
        id=item.sample.id,
        source=item.sample.source,
        frame=item.sample.frame,
        status="ok" if row.status == "removed" else row.status,
        reason="",
        size_bytes=info.size_bytes,
        mtime_ns=info.mtime_ns,
        base_id=item.sample.base_id or None,
    )


def _new_row(number: int, item: Wanted) -> SampleRow:
    sample = item.sample
    if item.info is None:
        return SampleRow(
            number, sample.id, sample.source, sample.frame, status="aside", reason=item.reason
        )
    return SampleRow(
        number,
        sample.id,
        sample.source,
        sample.frame,
        height_px=item.info.height_px,
        width_px=item.info.width_px,
        num_channels=item.info.num_channels,
        size_bytes=item.info.size_bytes,
        mtime_ns=item.info.mtime_ns,
        base_id=sample.base_id or None,
        variant=sample.variant or None,
    )


def _annotation(number: int, item: Wanted) -> AnnotationRow:
    sample = item.sample
    return AnnotationRow(
        row=number,
        id=sample.id,
        split=sample.split,
        group=sample.group,
        primary_angle_deg=sample.primary_angle_deg,
        secondary_angle_deg=sample.secondary_angle_deg,
        extra=sample.extra,
    )


@dataclass(frozen=True, slots=True)
class AnnotationChanges:
    """What a manifest says otherwise than a store.

    Attributes:
        num_changed: stored samples of which something else is said, ids apart.
        num_moved: samples that were in the training split and are no longer.
        are_any: whether the table is to be another.
    """

    num_changed: int
    num_moved: int
    are_any: bool


def compare_annotations(
    old: Iterable[AnnotationRow],
    new: Iterable[AnnotationRow],
    is_variant: Callable[[int], bool] = lambda row: False,
) -> AnnotationChanges:
    """Compare two tables of annotations; both are in row order, and gone through once.

    Args:
        old: the store's.
        new: what it shall be.
        is_variant: whether a row is a variant's, whose line repeats its sample's.
    """
    before = iter(old)
    note = next(before, None)
    num_changed = num_moved = 0
    are_any = False
    for now in new:
        while note is not None and note.row < now.row:
            are_any = True
            note = next(before, None)
        if note is None or note.row != now.row:
            are_any = True
            continue
        if note != now:
            are_any = True
            if is_variant(now.row):
                note = next(before, None)
                continue
            num_changed += replace(note, id=now.id) != now
            num_moved += note.split == "train" != now.split
        note = next(before, None)
    return AnnotationChanges(num_changed, num_moved, are_any or note is not None)
