"""Which sample goes into which row: what a manifest asks for against what a store holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from sam3cache.errors import ImageError
from sam3cache.features import BLOCK_ROWS, AnnotationRow, LabelRow, SampleRow
from sam3cache.images import ImageInfo, pixel_hash, probe, read_image, read_mask
from sam3cache.records import Sample, SetAside

_NUM_PROBE_THREADS = 8
_CHUNK = 128
"""Samples that a thread takes at a time: handing them out singly takes longer than looking."""

_HERE = Path()
_NO_MASK = LabelRow(0)

_FileKey = str | tuple[str, int]
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample of the manifest and what its files say without being decoded.

    Attributes:
        sample: from the manifest; a bare one where the manifest itself set it aside.
        info: None when the sample is set aside.
        mask: the mask's file, with any row; None without a mask.
        reason: why it is set aside, else empty.
    """

    sample: Sample
    info: ImageInfo | None
    mask: LabelRow | None = None
    reason: str = ""


@dataclass(frozen=True)
class RowPlan:
    """The tables that the store shall have, and the samples behind the rows to compute.

    Attributes:
        rows: the whole table, tombstones too, in row order.
        annotations: of every row that is not a tombstone.
        owners: by row, for rows that are pending or ok, the sample behind it.
        num_kept: rows that held features before and hold them on.
        num_changed: samples that got a new row although the store knows their file.
        num_removed: rows that became tombstones.
        num_renamed: rows whose picture was found in another file than before.
        num_moved: samples that were in the training split and are no longer.
    """

    rows: tuple[SampleRow, ...]
    annotations: tuple[AnnotationRow, ...]
    owners: Mapping[int, Wanted]
    num_kept: int
    num_changed: int
    num_removed: int
    num_renamed: int = 0
    num_moved: int = 0

    @property
    def masks(self) -> Mapping[int, LabelRow]:
        """By row, the file each mask shall have come from, for rows that are pending or ok."""
        return _Masks(self.owners)


class _Masks(Mapping[int, LabelRow]):
    """The masks of wanted samples, made as they are asked for."""

    def __init__(self, owners: Mapping[int, Wanted]) -> None:
        self._owners = owners

    def __getitem__(self, row: int) -> LabelRow:
        mask = self._owners[row].mask or _NO_MASK
        return mask if mask.row == row else replace(mask, row=row)

    def __iter__(self) -> Iterator[int]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


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
        # One number where, as nearly always, a file has one row: lists would take most of memory.
        self._positions: dict[_FileKey, int | list[int]] = {}
        for position, row in enumerate(rows):
            key = _file_key(row.source, row.frame)
            other = self._positions.setdefault(key, position)
            if isinstance(other, list):
                other.append(position)
            elif other != position:
                self._positions[key] = [other, position]

    def positions(self, sample: Sample) -> Sequence[int]:
        """Return where in the table the rows of a sample's file, and frame, are."""
        found = self._positions.get(_file_key(sample.source, sample.frame), ())
        return (found,) if isinstance(found, int) else found

    def recall(self, sample: Sample) -> Wanted | None:
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
            mask = None
            if sample.mask_path is not None:
                mask = self._masks.get(row.row)
                if (
                    mask is None
                    or mask.source != sample.mask
                    or not _is_unchanged(sample.mask_path, mask.size_bytes, mask.mtime_ns)
                ):
                    return None
            info = ImageInfo(
                row.height_px,
                row.width_px,
                row.num_channels,
                None if mask is None else mask.height_px,
                None if mask is None else mask.width_px,
                row.size_bytes,
                row.mtime_ns,
            )
            return Wanted(sample, info, mask)
        return None


def _file_key(source: str, frame: int | None) -> _FileKey:
    return source if frame is None else (source, frame)


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
    set_aside: Iterable[SetAside],
    report: Report,
    stored: StoredRows | None = None,
) -> list[Wanted]:
    """Look at every file's header; what cannot be read is set aside.

    Args:
        samples: of the manifest.
        set_aside: what the manifest itself had to set aside.
        report: called with samples done and in all.
        stored: rows whose files need no look while their size and time are as recorded.
    """
    stored = stored or StoredRows(())

    def look(chunk: Sequence[Sample]) -> list[Wanted]:
        return [_probe_one(sample, stored) for sample in chunk]

    wanted: list[Wanted] = []
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        for found in pool.map(look, _chunks(samples)):
            wanted += found
            report(len(wanted), len(samples))
    for aside in set_aside:
        bare = Sample(id=aside.id, source=aside.source, root=samples[0].root if samples else _HERE)
        wanted.append(Wanted(bare, None, reason=aside.reason))
    return wanted


def _chunks(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    # Few samples are shared out singly, so that every thread has some.
    size = min(_CHUNK, max(1, len(samples) // (4 * _NUM_PROBE_THREADS)))
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _probe_one(sample: Sample, stored: StoredRows) -> Wanted:
    try:
        recalled = stored.recall(sample)
    except OSError:
        recalled = None  # What is wrong with the file, a look at it says better.
    if recalled is not None:
        return recalled
    try:
        info = probe(sample)
        mask = None
        if sample.mask_path is not None and sample.mask is not None:
            stat = sample.mask_path.stat()
            mask = LabelRow(
                0,
                height_px=info.mask_height_px or 0,
                width_px=info.mask_width_px or 0,
                present=True,
                source=sample.mask,
                size_bytes=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
            )
        return Wanted(sample, info, mask)
    except ImageError as error:
        return Wanted(sample, None, reason=str(error))
    except OSError as error:
        return Wanted(sample, None, reason=f"{sample.mask}: {error.strerror}")


def hash_changed(stored: StoredRows, wanted: Sequence[Wanted], report: Report) -> PixelHashes:
    """Decode, on several threads, the files whose pixels decide which row they belong to.

    These are files whose times differ from what the store recorded; then files that the store does
    not know, where it has a row of that shape that nobody else wants.

    Args:
        stored: the store's table.
        wanted: what the manifest asks for.
        report: called with samples done and in all.
    """
    hashes = PixelHashes()
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        num_done = 0

        def decode(samples: Sequence[Sample]) -> None:
            nonlocal num_done
            num_total = num_done + len(samples)
            for _ in pool.map(hashes.of, samples):
                num_done += 1
                report(num_done, num_total)

        decode([item.sample for item in wanted if _has_changed(item, stored)])
        matching = _match_files(stored, wanted, hashes)
        orphans = _orphans(stored, matching)
        decode([item.sample for item in matching.fresh if _shape(item.info) in orphans])
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


def plan_rows(
    stored: StoredRows,
    wanted: Sequence[Wanted],
    hashes: PixelHashes | None = None,
    old_splits: Mapping[int, str] = MappingProxyType({}),
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
        old_splits: by row, the split that a sample is in now.
    """
    hashes = hashes or PixelHashes()
    matching = _match_files(stored, wanted, hashes)
    num_renamed = _match_pixels(stored, matching, hashes)

    table: list[SampleRow] = []
    owners: dict[int, Wanted] = {}
    annotations: list[AnnotationRow] = []
    num_removed = num_kept = num_moved = 0

    def add(row: SampleRow, item: Wanted) -> None:
        nonlocal num_moved
        table.append(row)
        annotations.append(_annotation(row.row, item))
        num_moved += old_splits.get(row.row) == "train" != item.sample.split
        if row.status in ("pending", "ok"):
            owners[row.row] = item

    for old, kept, item in zip(stored.rows, matching.kept, matching.owner, strict=True):
        if kept is not None and item is not None:
            num_kept += kept.status == "ok"
            add(kept, item)
        elif old.status == "removed":
            table.append(old)
        else:
            num_removed += 1
            # A row that was never ok loses its hash, without which it does not come back.
            table.append(
                replace(
                    old,
                    status="removed",
                    reason="no longer in the manifest, or changed",
                    pixel_sha256=old.pixel_sha256 if old.status == "ok" else "",
                )
            )
    last_row = max((row.row for row in stored.rows), default=-1)
    next_row = -(-(1 + last_row) // BLOCK_ROWS) * BLOCK_ROWS
    for number, item in enumerate(matching.fresh, next_row):
        add(_new_row(number, item), item)
    return RowPlan(
        rows=tuple(table),
        annotations=tuple(annotations),
        owners=owners,
        num_kept=num_kept,
        num_changed=sum(
            item.info is not None and len(stored.positions(item.sample)) > 0
            for item in matching.fresh
        ),
        num_removed=num_removed,
        num_renamed=num_renamed,
        num_moved=num_moved,
    )


@dataclass(slots=True)
class _Matching:
    """Which rows stay, by position in the store's table.

    Attributes:
        kept: the row as it shall stand, or None.
        owner: the sample that it belongs to, or None.
        fresh: samples without a row.
    """

    kept: list[SampleRow | None]
    owner: list[Wanted | None]
    fresh: list[Wanted]


def _match_files(stored: StoredRows, wanted: Sequence[Wanted], hashes: PixelHashes) -> _Matching:
    """Find the rows that were made from the very files that are wanted."""
    matching = _Matching([None] * len(stored.rows), [None] * len(stored.rows), [])
    for item in wanted:
        free = [i for i in stored.positions(item.sample) if matching.kept[i] is None]
        position, row = _find_row(item, free, stored.rows, hashes)
        if row is None:
            matching.fresh.append(item)
        else:
            matching.kept[position], matching.owner[position] = row, item
    return matching


def _match_pixels(stored: StoredRows, matching: _Matching, hashes: PixelHashes) -> int:
    """Give samples without a row those that nobody wants, by their pixels; return how many."""
    orphans = _orphans(stored, matching)
    by_pixels: dict[str, list[int]] = {}
    for positions in orphans.values():
        for position in positions:
            by_pixels.setdefault(stored.rows[position].pixel_sha256, []).append(position)
    for positions in by_pixels.values():
        positions.sort(key=lambda i: (stored.rows[i].status != "ok", i))
    num_renamed = 0
    # A sample of a row's own id goes first, whichever copy of the picture it names.
    for only_own_id in (True, False):
        fresh: list[Wanted] = []
        for item in matching.fresh:
            found: int | None = None
            if item.info is not None and _shape(item.info) in orphans:
                free = by_pixels.get(hashes.of(item.sample) or "", [])
                own = [i for i in free if stored.rows[i].id == item.sample.id]
                found = next(iter(own if only_own_id else free), None)
            if item.info is None or found is None:
                fresh.append(item)
                continue
            by_pixels[stored.rows[found].pixel_sha256].remove(found)
            matching.kept[found] = _taken_over(stored.rows[found], item, item.info)
            matching.owner[found] = item
            num_renamed += 1
        matching.fresh = fresh
    return num_renamed


_Shape = tuple[int, int, int]


def _shape(picture: ImageInfo | SampleRow | None) -> _Shape | None:
    if picture is None:
        return None
    return (picture.height_px, picture.width_px, picture.num_channels)


def _orphans(stored: StoredRows, matching: _Matching) -> dict[_Shape | None, list[int]]:
    """Return, by shape of the picture, the rows that hold features and that nobody wants."""
    orphans: dict[_Shape | None, list[int]] = {}
    for position, row in enumerate(stored.rows):
        if matching.kept[position] is None and row.status in ("ok", "removed") and row.pixel_sha256:
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
            # Set aside when it was decoded: only a decode can tell whether it has been mended.
            if hashes.of(item.sample) is None:
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
