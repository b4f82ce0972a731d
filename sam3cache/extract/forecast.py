"""What an extraction will write and how long it will take, before it begins.

Raw levels take exactly what the format says. What compresses (pictures, masks, rounded levels) is
estimated from a few samples that are encoded for it, and the time from a short run of the real
workers (:mod:`sam3cache.extract.pilot`).

Shape legend: C channels, H height, W width, K planes of a mask.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sam3cache import runtime
from sam3cache.errors import ImageError, NoSpaceError
from sam3cache.extract.config import IMAGE_LEVEL, ExtractConfig
from sam3cache.extract.job import Job
from sam3cache.extract.levels import Levels, is_of_tower
from sam3cache.features import BLOCK_ROWS, LabelSetSpec, LevelSpec, ObjectPath, Place
from sam3cache.features.levels import LABEL_TILE_PX, ShardGrid
from sam3cache.features.shards import encode_shard
from sam3cache.geometry import ResizeMode
from sam3cache.images import letterbox_image, read_image, read_mask
from sam3cache.records import Sample
from sam3cache.runtime import size_text

T = TypeVar("T")

TABLES = "tables, receipts"
NUM_ENCODED = 16
"""Samples that are encoded to learn what pictures and masks take."""

_CRC_BYTES = 4
_INDEX_BYTES = 16
_PACKED_SHARE = {"r7": 0.75, "r5": 0.6, "uint8": 1.0}
"""Of its raw bytes, what a level takes that has not been encoded; measured on SAM 3's features."""

_BYTES_A_ROW, _BYTES_A_RECEIPT = 550, 350
"""Of tables and receipts, as measured; they are a thousandth of what lies beside them."""

_MAX_CHOICES = 3


@dataclass(frozen=True, slots=True)
class ItemForecast:
    """What one level, the masks or the tables will take.

    Attributes:
        name: of the level, "masks", or :data:`TABLES`.
        num_samples: rows that are to be written.
        num_files: files that are to be written.
        size_bytes: of them together.
        is_exact: whether the format says so, rather than samples that were encoded.
    """

    name: str
    num_samples: int
    num_files: int
    size_bytes: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class TimeForecast:
    """How long it will take, from a short run of the real workers.

    Attributes:
        check_s: to look at the files.
        start_s: until the workers are at work.
        images_per_s: of all workers together, decoding and writing included.
        tower_images_per_s: of the towers alone, all together.
        decode_images_per_s: of one thread.
        write_bytes_per_s: what the disk takes, flushed.
        num_measured: images that the run put through the tower.
        batch_size: images a forward pass of the run, as an extraction would choose it.
        total_s: of the whole extraction.
    """

    check_s: float
    start_s: float
    images_per_s: float
    tower_images_per_s: float
    decode_images_per_s: float
    write_bytes_per_s: float
    num_measured: int
    batch_size: int
    total_s: float


@dataclass(frozen=True, slots=True)
class VariantForecast:
    """What the variants of training samples take, of all that an extraction does.

    Attributes:
        names: of the variants.
        num_samples: rows of variants that the store shall have.
        num_to_compute: of them, those that lack a level.
        size_bytes: that are to be written for them.
    """

    names: tuple[str, ...]
    num_samples: int
    num_to_compute: int
    size_bytes: int


@dataclass(frozen=True)
class Packed:
    """Bytes a sample of what compresses, by its name, where some samples were encoded.

    Attributes:
        by_item: bytes a sample of a level; for "masks", bytes a mask.
        num_encoded: samples that were.
    """

    by_item: Mapping[str, float] = field(default_factory=dict)
    num_encoded: int = 0

    def having(self, bytes_an_image: Mapping[str, float], levels: Levels) -> Packed:
        """Return this with what the tower's compressed levels took in a short run."""
        measured = {
            name: size
            for name, size in bytes_an_image.items()
            if is_of_tower(name) and levels[name][0].grid.codec != "raw"
        }
        return replace(self, by_item={**measured, **self.by_item})


@dataclass(frozen=True)
class Forecast:
    """What an extraction will do.

    Attributes:
        store: the store's folder.
        num_samples: samples of the manifest that can be used, as far as headers tell.
        num_new: of them, those that the store has never seen.
        num_changed: those whose picture, or whose file, is another than the store's.
        num_kept: those whose row stays.
        num_renamed: of these, those that were found in another file than before.
        num_to_compute: those that lack a level, kept ones too.
        num_set_aside: samples that cannot be used.
        num_removed: rows that become tombstones.
        variants: changed views of training samples, which are counted nowhere else but in
            ``num_to_compute``, ``num_removed`` and ``items``; None without any.
        items: what is to be written.
        free_bytes: at the target; None where that is unknown, as of an object store.
        num_looked_at: of how many samples the figures come, if not of all.
        packed: what compressed samples take.
        choices: by what to pass to --levels, the bytes that it would take.
        time: None where it was not measured.
        why_no_time: why it could not be, if it was to be.
    """

    store: Place
    num_samples: int
    num_new: int
    num_changed: int
    num_kept: int
    num_renamed: int
    num_to_compute: int
    num_set_aside: int
    num_removed: int
    items: tuple[ItemForecast, ...]
    free_bytes: int | None
    num_looked_at: int | None = None
    packed: Packed = Packed()
    choices: Mapping[str, int] = field(default_factory=dict)
    variants: VariantForecast | None = None
    time: TimeForecast | None = None
    why_no_time: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes that are to be written."""
        return sum(item.size_bytes for item in self.items)

    @property
    def num_files(self) -> int:
        """Files that are to be written."""
        return sum(item.num_files for item in self.items)

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it, as far as that is known."""
        return self.free_bytes is None or self.size_bytes <= self.free_bytes

    def require_space(self) -> None:
        """Refuse what does not fit, and say what would.

        Raises:
            NoSpaceError: when the disk has less room than is needed.
        """
        if self.fits or self.free_bytes is None:
            return
        fitting = [
            f"--levels {names} takes {size_text(size)}"
            for names, size in sorted(self.choices.items(), key=lambda choice: -choice[1])
            if size <= self.free_bytes
        ]
        parts = ", ".join(f"{item.name} {size_text(item.size_bytes)}" for item in self.items)
        nothing = "no choice of levels fits; " if self.choices else ""
        instead = f"{' or '.join(fitting[:_MAX_CHOICES])}; else " if fitting else nothing
        raise NoSpaceError(
            f"{self.store} would take {size_text(self.size_bytes)} ({parts}), and "
            f"{size_text(self.free_bytes)} are free there: {instead}free some space, or give -o a "
            "folder on another disk"
        )


def free_bytes_at(path: Place) -> int | None:
    """Return the free space of the disk that a path is on, or will be; None of an object store."""
    if isinstance(path, ObjectPath):
        return None
    return shutil.disk_usage(runtime.existing_folder(path)).free


def forecast_level(
    spec: LevelSpec,
    rows: Sequence[int],
    packed: Packed = Packed(),
) -> ItemForecast:
    """Return what some rows of a level will take.

    Args:
        spec: the level.
        rows: that are to be written; a range is not gone through.
        packed: what compressed samples take.
    """
    size_bytes = num_files = 0
    is_exact = True
    for grid in spec.grids:
        num_shards = _num_shards(rows, grid.num_inner)
        raw_bytes = int(np.prod(grid.inner)) * np.dtype(grid.dtype).itemsize + _CRC_BYTES
        sample_bytes: float = raw_bytes
        if grid.codec != "raw":
            is_exact = False
            sample_bytes = packed.by_item.get(
                spec.name, raw_bytes * _PACKED_SHARE.get(spec.precision, 1.0)
            )
        size_bytes += round(len(rows) * sample_bytes) + num_shards * _index_bytes(grid)
        num_files += num_shards
    return ItemForecast(spec.name, len(rows), num_files, size_bytes, is_exact)


def forecast_masks(
    label_set: LabelSetSpec, rows: Sequence[int], num_masks: int, packed: Packed
) -> ItemForecast:
    """Return what the masks of some rows will take.

    Args:
        label_set: the set.
        rows: that are to be written.
        num_masks: of them, those that have a mask.
        packed: what a mask takes.
    """
    _, height_px, width_px = label_set.shape
    tiles = label_set.num_planes * _num_tiles(height_px) * _num_tiles(width_px)
    num_shards = _num_shards(rows, BLOCK_ROWS) * tiles
    # A blank tile takes about 60 bytes, an outline in it some thousand.
    mask_bytes = packed.by_item.get("masks", 2000.0)
    size_bytes = round(num_masks * mask_bytes) + num_shards * _index_bytes(label_set.grid)
    return ItemForecast("masks", len(rows), num_shards, size_bytes, is_exact=False)


def forecast_tables(num_rows: int, num_blocks: int, num_items: int) -> ItemForecast:
    """Return what tables and the seal will take.

    Args:
        num_rows: of the whole table.
        num_blocks: that are written.
        num_items: levels and label sets of a block, and its facts.
    """
    size_bytes = num_rows * _BYTES_A_ROW + num_blocks * num_items * _BYTES_A_RECEIPT
    # The group, its two parts, two tables and the seal; by item its description.
    return ItemForecast(TABLES, num_rows, 6 + num_items, size_bytes, is_exact=False)


def _index_bytes(grid: ShardGrid) -> int:
    return _INDEX_BYTES * grid.num_inner + _CRC_BYTES


def _num_tiles(length_px: int) -> int:
    return -(-length_px // LABEL_TILE_PX)


def _num_shards(rows: Sequence[int], num_inner: int) -> int:
    if isinstance(rows, range) and rows.step == 1:
        return rows[-1] // num_inner - rows[0] // num_inner + 1 if rows else 0
    return len({row // num_inner for row in rows})


def encode_some(
    samples: Sequence[Sample],
    levels: Levels,
    resize_mode: ResizeMode,
) -> Packed:
    """Learn what pictures and masks take by encoding a few, spread over the samples.

    Args:
        samples: of which some are taken; what cannot be read is left out.
        levels: of the store; only that of pictures is encoded, for others need the tower.
        resize_mode: "letterbox" or "squash".
    """
    found: dict[str, list[int]] = {}
    num_encoded = 0
    for sample in spread(samples, NUM_ENCODED):
        try:
            if IMAGE_LEVEL in levels:
                spec = levels[IMAGE_LEVEL][0]
                square_CHW = letterbox_image(read_image(sample), resize_mode)[0].numpy()
                picture_CHW = np.broadcast_to(square_CHW, spec.shape)
                found.setdefault(IMAGE_LEVEL, []).append(_encoded_bytes(spec.grid, picture_CHW))
            mask_KHW = read_mask(sample)
        except ImageError:
            continue
        num_encoded += 1
        if mask_KHW is not None:
            found.setdefault("masks", []).append(sum(map(_tile_bytes, _tiles(mask_KHW))))
    by_item = {name: float(np.mean(sizes)) for name, sizes in found.items()}
    return Packed(by_item, num_encoded)


def spread(values: Sequence[T], num: int) -> list[T]:
    """Return some values from the whole length of a sequence."""
    if len(values) <= num:
        return list(values)
    return [values[(2 * i + 1) * len(values) // (2 * num)] for i in range(num)]


def _encoded_bytes(grid: ShardGrid, values: NDArray[np.generic]) -> int:
    return len(encode_shard(grid, {0: values}).data) - _index_bytes(grid)


def _tiles(mask_KHW: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for plane_HW in mask_KHW:
        for y in range(0, plane_HW.shape[0], LABEL_TILE_PX):
            for x in range(0, plane_HW.shape[1], LABEL_TILE_PX):
                tile_1HW = np.zeros((1, LABEL_TILE_PX, LABEL_TILE_PX), np.uint8)
                part = plane_HW[y : y + LABEL_TILE_PX, x : x + LABEL_TILE_PX]
                tile_1HW[0, : part.shape[0], : part.shape[1]] = part
                yield tile_1HW


def _tile_bytes(tile_1HW: NDArray[np.uint8]) -> int:
    return _encoded_bytes(LabelSetSpec("mask", ("",), 1, 1).grid, tile_1HW)


def forecast_job(job: Job, packed: Packed | None = None) -> Forecast:
    """Return what a job will write, without its time.

    Args:
        job: what is to be done.
        packed: what compressed samples take; some are encoded for it unless given.
    """
    plan, owners = job.plan, job.plan.owners
    rows_of: dict[str, array[int]] = {}
    for task in job.tasks:
        numbers = array("q", (row.row for row in task.rows))
        for item in task.items:
            rows_of.setdefault(item, array("q")).extend(numbers)
    if packed is None:
        needed = {spec.item for spec, _ in job.levels.values() if spec.grid.codec != "raw"}
        needed |= set() if job.label_set is None else {job.label_set.item}
        rows = max((rows_of.get(item, array("q")) for item in needed), key=len, default=array("q"))
        packed = encode_some(
            [owners[row].sample for row in spread(rows, NUM_ENCODED)],
            job.levels,
            job.config.resize_mode,
        )
    items = [
        forecast_level(spec, rows_of[spec.item], packed)
        for spec, _ in job.levels.values()
        if spec.item in rows_of
    ]
    if job.label_set is not None and job.label_set.item in rows_of:
        rows = rows_of[job.label_set.item]
        num_masks = sum(owners[row].mask is not None for row in rows)
        items.append(forecast_masks(job.label_set, rows, num_masks, packed))
    if job.tasks or not job.state.sealed:
        num_items = 1 + len(job.levels) + len(job.label_sets)
        items.append(forecast_tables(len(plan.rows), len(job.tasks), num_items))
    stored = {} if job.state.description is None else job.state.description["levels"]
    of_variants = plan.variants
    num_live = plan.num_live - of_variants.num_live
    num_kept = plan.num_kept - of_variants.num_kept
    num_changed = plan.num_changed - of_variants.num_changed
    return Forecast(
        store=job.state.root,
        num_samples=num_live,
        num_new=num_live - num_kept - num_changed,
        num_changed=num_changed,
        num_kept=num_kept,
        num_renamed=plan.num_renamed,
        num_to_compute=job.tasks.num_to_compute(),
        num_set_aside=plan.num_aside,
        num_removed=plan.num_removed,
        items=tuple(items),
        free_bytes=free_bytes_at(job.state.root),
        variants=_forecast_variants(job, rows_of, items),
        packed=packed,
        choices=choices(job.config, stored, job.levels, items, packed),
    )


def _forecast_variants(
    job: Job, rows_of: Mapping[str, Sequence[int]], items: Sequence[ItemForecast]
) -> VariantForecast | None:
    """Return what of a job is for variants; levels by their share of the rows."""
    names = tuple(job.settings.get("variants", ()))
    if not names:
        return None
    to_compute: set[int] = set()
    size_bytes = 0.0
    for item in items:
        if item.name in job.levels:
            rows = rows_of[job.levels[item.name][0].item]
            of_variants = [row for row in rows if job.plan.is_variant(row)]
            to_compute.update(of_variants)
            size_bytes += item.size_bytes * len(of_variants) / len(rows)
    return VariantForecast(names, job.plan.variants.num_live, len(to_compute), round(size_bytes))


def choices(
    config: ExtractConfig,
    stored: Iterable[str],
    levels: Levels,
    items: Sequence[ItemForecast],
    packed: Packed,
) -> dict[str, int]:
    """Return what else could be asked for, and what it would take; smaller than what is asked for.

    Levels that the store has already are kept up whatever is asked for.
    """
    new = {i.name: i for i in items if i.name in config.levels and i.name not in set(stored)}
    kept_bytes = sum(item.size_bytes for item in items if item.name not in new)

    def size_bytes(name: str, precise: str) -> int:
        spec = replace(levels[name][0], name=precise, dtype="")
        return forecast_level(spec, range(new[name].num_samples), packed).size_bytes

    # Each level as it is and in fewer bits: all of them together, then each alone.
    sizes = {}
    for precision in ("", ".r7", ".int8"):
        by_name = {}
        for name in new:
            precise = levels[name][0].base + precision if is_of_tower(name) else name
            by_name[precise if precision else name] = size_bytes(
                name, precise if precision else name
            )
        sizes[",".join(by_name)] = kept_bytes + sum(by_name.values())
        sizes |= {name: kept_bytes + size for name, size in by_name.items()}
    asked_bytes = sum(item.size_bytes for item in items)
    return {names: size for names, size in sizes.items() if names and size < asked_bytes}
