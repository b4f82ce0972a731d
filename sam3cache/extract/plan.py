"""Which sample goes into which row: what a manifest asks for against what a store holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from sam3cache.errors import ImageError
from sam3cache.features import BLOCK_ROWS, AnnotationRow, LabelRow, SampleRow
from sam3cache.images import ImageInfo, pixel_hash, probe, read_image, read_mask
from sam3cache.records import Sample, SetAside

_NUM_PROBE_THREADS = 8
_HERE = Path()


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


@dataclass(frozen=True)
class RowPlan:
    """The tables that the store shall have, and the samples behind the rows to compute.

    Attributes:
        rows: the whole table, tombstones too, in row order.
        annotations: of every row that is not a tombstone.
        samples: by row, for rows that are pending or ok.
        masks: by row, the file each mask shall have come from, for the same rows.
        num_removed: rows that became tombstones.
        num_moved: samples that were in the training split and are no longer.
    """

    rows: tuple[SampleRow, ...]
    annotations: tuple[AnnotationRow, ...]
    samples: dict[int, Sample]
    masks: dict[int, LabelRow]
    num_removed: int
    num_moved: int = 0


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
    report: Callable[[int, int], None],
) -> list[Wanted]:
    """Look at every file's header; what cannot be read is set aside.

    Args:
        samples: of the manifest.
        set_aside: what the manifest itself had to set aside.
        report: called with samples done and in all.
    """
    wanted = []
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        for num_done, item in enumerate(pool.map(_probe_one, samples), 1):
            wanted.append(item)
            report(num_done, len(samples))
    for aside in set_aside:
        bare = Sample(id=aside.id, source=aside.source, root=samples[0].root if samples else _HERE)
        wanted.append(Wanted(bare, None, reason=aside.reason))
    return wanted


def _probe_one(sample: Sample) -> Wanted:
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


def hash_changed(
    existing: Sequence[SampleRow],
    wanted: Sequence[Wanted],
    report: Callable[[int, int], None],
) -> PixelHashes:
    """Decode, on several threads, the files whose times differ from what the store recorded.

    Args:
        existing: the store's table.
        wanted: what the manifest asks for.
        report: called with samples done and in all.
    """
    times: dict[tuple[str, int | None], set[tuple[int, int]]] = {}
    for row in existing:
        times.setdefault((row.source, row.frame), set()).add((row.size_bytes, row.mtime_ns))
    changed = []
    for item in wanted:
        known = times.get((item.sample.source, item.sample.frame))
        if item.info and known and (item.info.size_bytes, item.info.mtime_ns) not in known:
            changed.append(item.sample)
    hashes = PixelHashes()
    with ThreadPoolExecutor(_NUM_PROBE_THREADS) as pool:
        for num_done, _ in enumerate(pool.map(hashes.of, changed), 1):
            report(num_done, len(changed))
    return hashes


def plan_rows(
    existing: Sequence[SampleRow],
    wanted: Sequence[Wanted],
    hashes: PixelHashes | None = None,
    old_splits: Mapping[int, str] = MappingProxyType({}),
) -> RowPlan:
    """Give every wanted sample a row, keeping the rows whose picture has not changed.

    A file whose size and time of change are as recorded is taken as unchanged; else its decoded
    pixels decide. New, changed and mended samples get new rows, from the next block on; rows that
    nobody wants become tombstones, and come back to life when their sample does.

    Args:
        existing: the store's table, with the receipts' facts merged in.
        wanted: what the manifest asks for.
        hashes: of pictures that have been decoded already.
        old_splits: by row, the split that a sample is in now.
    """
    hashes = hashes or PixelHashes()
    by_source: dict[tuple[str, int | None], list[SampleRow]] = {}
    for row in existing:
        by_source.setdefault((row.source, row.frame), []).append(row)

    kept: dict[int, SampleRow] = {}
    owner: dict[int, Wanted] = {}
    fresh: list[Wanted] = []
    for item in wanted:
        candidates = [
            row
            for row in by_source.get((item.sample.source, item.sample.frame), [])
            if row.row not in kept
        ]
        match = _find_row(item, candidates, hashes)
        if match is None:
            fresh.append(item)
        else:
            kept[match.row] = match
            owner[match.row] = item

    table = []
    num_removed = 0
    for row in existing:
        if row.row in kept:
            table.append(kept[row.row])
        elif row.status == "removed":
            table.append(row)
        else:
            num_removed += 1
            # A row that was never ok loses its hash, without which it does not come back.
            table.append(
                replace(
                    row,
                    status="removed",
                    reason="no longer in the manifest, or changed",
                    pixel_sha256=row.pixel_sha256 if row.status == "ok" else "",
                )
            )
    next_row = -(-(1 + max((row.row for row in existing), default=-1)) // BLOCK_ROWS) * BLOCK_ROWS
    for number, item in enumerate(fresh, next_row):
        table.append(_new_row(number, item))
        owner[number] = item
    live = {row.row for row in table if row.status in ("pending", "ok")}
    return RowPlan(
        rows=tuple(table),
        annotations=tuple(
            _annotation(row.row, owner[row.row]) for row in table if row.row in owner
        ),
        samples={row: owner[row].sample for row in sorted(live)},
        masks={row: replace(owner[row].mask or LabelRow(0), row=row) for row in sorted(live)},
        num_removed=num_removed,
        num_moved=sum(
            old_splits.get(row) == "train" != item.sample.split for row, item in owner.items()
        ),
    )


def _find_row(item: Wanted, candidates: list[SampleRow], hashes: PixelHashes) -> SampleRow | None:
    """Return the row that already holds this sample, as it shall stand in the table, or None."""
    # Rows of this id first, then living ones, then the newest.
    ranked = sorted(
        candidates,
        key=lambda row: (row.id != item.sample.id, row.status == "removed", -row.row),
    )
    for row in ranked:
        if item.info is None:
            if row.status == "aside" and row.reason == item.reason:
                return replace(row, id=item.sample.id)
            continue
        unchanged = (row.size_bytes, row.mtime_ns) == (item.info.size_bytes, item.info.mtime_ns)
        if row.status == "aside":
            # Set aside when it was decoded: only a decode can tell whether it has been mended.
            if hashes.of(item.sample) is None:
                return replace(row, id=item.sample.id)
            continue
        if row.status == "removed" and not row.pixel_sha256:
            continue
        if not unchanged and (not row.pixel_sha256 or hashes.of(item.sample) != row.pixel_sha256):
            continue
        return replace(
            row,
            id=item.sample.id,
            status="ok" if row.status == "removed" else row.status,
            reason="",
            size_bytes=item.info.size_bytes,
            mtime_ns=item.info.mtime_ns,
        )
    return None


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
