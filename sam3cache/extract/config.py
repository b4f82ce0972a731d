"""What an extraction is asked to do, and what it reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sam3cache.errors import ConfigError
from sam3cache.features import BLOCK_ROWS, Place, place_of
from sam3cache.records import SetAside
from sam3cache.runtime import Rank
from sam3cache.variants import parse_variants

IMAGE_LEVEL = "image_1008"
DEFAULT_LEVELS = ("fpn_72", IMAGE_LEVEL)
LABEL_SET = "mask"

FATAL_REASON = "ends the process that reads it"
"""Part of why a row is set aside that killed its workers: its picture is not looked at again."""


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction.

    Attributes:
        manifest: a CSV, or a folder with images/ and perhaps masks/.
        output: the store's folder, or its URL as ``s3://bucket/angio.zarr``.
        columns: TOML file that maps the CSV's columns to fields, or None.
        levels: names of the levels to write; those that a store has already are kept up too.
        backbone: "sam3", "sam3.1" or "sam3-mini".
        weights: a checkpoint, a hub repository, "random", or None for the backbone's own.
        devices: torch device names, a worker process each; "cpu" may stand there several times.
        batch_size: images a forward pass, at most a block; None: the store's, else 8 on CUDA, 1 on
            a CPU.
        resize_mode: "letterbox" or "squash".
        numeric_path: "fp32", "bf16", "bf16+compile", or "auto": the store's, else bf16 where every
            device is CUDA.
        seed: of the split, where the manifest has none; None: the store's, else 0.
        variants: names of changed views that training samples are stored in as well; None: the
            store's, else none.
        engine: "local" for a pool of processes on this machine, or "ray" for those of a cluster.
        rank: of this process among those that are to share the work from the start.
        strict: whether a sample that cannot be used ends the extraction, in place of being set
            aside.
    """

    manifest: Path
    output: Place
    columns: Path | None = None
    levels: tuple[str, ...] = DEFAULT_LEVELS
    backbone: str = "sam3"
    weights: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    batch_size: int | None = None
    resize_mode: Literal["letterbox", "squash"] = "letterbox"
    numeric_path: Literal["auto", "fp32", "bf16", "bf16+compile"] = "auto"
    seed: int | None = None
    variants: tuple[str, ...] | None = None
    engine: Literal["local", "ray"] = "local"
    rank: Rank = field(default_factory=Rank)
    strict: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        if not self.levels:
            raise ConfigError(f"no levels given; expected some, such as {','.join(DEFAULT_LEVELS)}")
        if len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"levels {','.join(self.levels)}: one is named twice; name it once")
        if self.batch_size is not None and not 1 <= self.batch_size <= BLOCK_ROWS:
            raise ConfigError(
                f"batch size {self.batch_size} is outside 1 to {BLOCK_ROWS}: a batch never crosses "
                f"a block of {BLOCK_ROWS} samples"
            )
        if self.variants is not None:
            object.__setattr__(self, "variants", parse_variants(self.variants))
        object.__setattr__(self, "output", place_of(self.output))
        if self.engine == "ray":
            # Its nodes begin in folders of their own.
            object.__setattr__(self, "manifest", self.manifest.absolute())
            object.__setattr__(self, "output", self.output.absolute())
            if self.weights is not None and Path(self.weights).exists():
                object.__setattr__(self, "weights", str(Path(self.weights).absolute()))
        if not self.devices:
            raise ConfigError("no devices given; expected some, such as cpu or cuda:0")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What one worker was doing when it last reported.

    Attributes:
        name: of its device, with a number where several workers share it.
        num_images: images that it has put through the tower.
        num_written: images that it has written.
        memory_bytes: device memory reserved by the worker; on a CPU, memory resident.
        batch_size: images a forward pass; less than the store's once memory was too small for that.
        elapsed_s: since it had its tower.
        images_s: of that, time with nothing to do for the tower but to wait for pictures.
        tower_s: time that the tower was at work.
        writing_s: time with nothing to do for the tower until a block had been written.
    """

    name: str
    num_images: int
    num_written: int
    memory_bytes: int
    batch_size: int
    elapsed_s: float
    images_s: float
    tower_s: float
    writing_s: float

    @property
    def time_shares(self) -> TimeShares:
        """What it spent its time on."""
        return TimeShares.of([self])


@dataclass(frozen=True, slots=True)
class TimeShares:
    """What workers spend their time on, as shares of it; what bounds an extraction is the largest.

    Attributes:
        images: waiting for pictures to be read, decoded and resized, 0 to 1.
        tower: with the tower at work, 0 to 1.
        writing: waiting for finished blocks to be written, 0 to 1.
    """

    images: float
    tower: float
    writing: float

    @classmethod
    def of(cls, workers: Collection[WorkerStatus]) -> TimeShares:
        """Return the shares of all workers together."""
        elapsed_s = max(1e-9, sum(worker.elapsed_s for worker in workers))
        spent_s = (
            sum(worker.images_s for worker in workers),
            sum(worker.tower_s for worker in workers),
            sum(worker.writing_s for worker in workers),
        )
        return cls(*(min(1.0, seconds / elapsed_s) for seconds in spent_s))


@dataclass(frozen=True, slots=True)
class ExtractProgress:
    """How far an extraction is.

    Attributes:
        stage: "checking" while files are looked at; "comparing" while pictures are decoded that
            may be those of a row; "measuring" during a short run of the workers; "extracting" while
            they run.
        num_done: images done in this stage.
        num_total: images of this stage.
        workers: by worker number; empty before they report.
    """

    stage: Literal["checking", "comparing", "measuring", "extracting"]
    num_done: int
    num_total: int
    workers: Mapping[int, WorkerStatus]


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What an extraction has done.

    Attributes:
        store: the store's folder.
        sealed: whether the store is complete; not so while another process works on it.
        num_samples: samples that can be used; their variants are counted apart.
        num_computed: images whose features this run computed, variants too.
        num_relabelled: images that this run gave another mask, their features being as they were.
        num_unmasked: images that this run took the mask from, as the manifest names none for them.
        num_reannotated: samples that this run gave another split, group, angle or other column.
        num_kept: images that were there before, variants too.
        num_renamed: of these, images that were found in another file than before.
        num_removed: rows that this run turned into tombstones.
        num_replaced: of these, rows whose sample was changed or mended and has another row now.
        num_moved: samples that this run took out of the training split.
        num_with_mask: samples that can be used and have a mask.
        are_masks_of_manifest: whether the manifest names any mask; else those of the store stay.
        num_with_angles: samples that can be used and whose view angles are both known.
        num_variants: changed views of training samples that can be used.
        set_aside: samples that could not be used, and why.
        leaks: groups that the manifest puts into more than one split.
        split_rule: where the splits come from, in words.
        elapsed_s: of the whole run.
        batch_size: images a forward pass, as the store records it.
        time_shares: what the workers spent their time on; None where there was nothing to do.
    """

    store: Place
    sealed: bool
    num_samples: int
    num_computed: int
    num_relabelled: int
    num_unmasked: int
    num_reannotated: int
    num_kept: int
    num_renamed: int
    num_removed: int
    num_replaced: int
    num_moved: int
    num_with_mask: int
    are_masks_of_manifest: bool
    num_with_angles: int
    num_variants: int
    set_aside: tuple[SetAside, ...]
    leaks: tuple[str, ...]
    split_rule: str
    elapsed_s: float
    batch_size: int
    time_shares: TimeShares | None
