"""A manifest, checked: every sample is looked at once, then all of them together."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3cache.checking.findings import EXIT_CODES, Finding, gravest_first
from sam3cache.checking.look import Look, look_at
from sam3cache.checking.rules import (
    Limits,
    Looked,
    class_counts,
    findings_of,
    view_counts,
)
from sam3cache.checking.shift import Shift
from sam3cache.errors import ConfigError
from sam3cache.images import FOREGROUND, ClassTable, read_manifest
from sam3cache.records import SPLITS, Sample, SetAside
from sam3cache.runtime import num_cpu_cores

Report = Callable[[int, int], None]
"""Called with samples done and samples in all."""

_MAX_THREADS = 16
_AHEAD = 4  # Samples a thread that may wait to be taken over: a bound of memory.


@dataclass(frozen=True)
class CheckConfig:
    """What to check, and what for.

    Attributes:
        manifest: as for an extraction.
        columns: TOML file that maps the manifest's columns to fields, or None.
        seed: of the split, if the manifest has none.
        classes: what the masks are of.
        mask_columns: columns with the masks, in place of the field ``mask``; several are the planes
            of as many classes.
        by: other columns, of whose values samples are counted as of classes.
        min_samples: of a class, in each split.
        allow_leak: whether groups and pictures may be in several splits; they are warned of then.
    """

    manifest: Path
    columns: Path | None = None
    seed: int = 0
    classes: ClassTable = FOREGROUND
    mask_columns: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    min_samples: int = 5
    allow_leak: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without touching a file.

        Raises:
            ConfigError: when a value cannot be used.
        """
        num_columns, names = len(self.mask_columns), self.classes.names
        if num_columns > 1 and (self.classes.numbers is not None or num_columns != len(names)):
            raise ConfigError(
                f"{num_columns} columns of masks for the classes {', '.join(names)}; expected one "
                "column with class numbers or planes, or a class without a number for each column"
            )


@dataclass(frozen=True)
class CheckResult:
    """What was found.

    Attributes:
        manifest: its name, without its folder; where names of files are hidden, none.
        num_samples: rows of the manifest, those that cannot be used too.
        num_usable: samples that an extraction would take.
        split_rule: where the splits come from.
        splits: by split, of the samples that can be used: samples, groups, those with a mask, those
            with both view angles.
        sizes: samples by height, width and channels, the most frequent first.
        classes: by class, and by value of the columns asked for, samples by split.
        views: samples by view region; "" where it is unknown.
        findings: the gravest first.
        elapsed_s: seconds that it took.
        samples: of the manifest, to show them; not part of what is written.
        shifts: by id, where masks fit clearly better; likewise.
        notes: what is to be told of the manifest, a sentence each; likewise.
    """

    manifest: str
    num_samples: int
    num_usable: int
    split_rule: str
    splits: dict[str, dict[str, int]]
    sizes: dict[str, int]
    classes: dict[str, dict[str, int]]
    views: dict[str, int]
    findings: tuple[Finding, ...]
    elapsed_s: float
    samples: Sequence[Sample] = field(repr=False, default=())
    shifts: Mapping[str, Shift] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what is written, as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # Notes may name a path of this machine.
        del fields["samples"], fields["shifts"], fields["notes"]
        return fields | {
            "exit_code": self.exit_code,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    @property
    def exit_code(self) -> int:
        """What the program ends with: 0, or as the gravest finding says."""
        return EXIT_CODES[self.findings[0].severity] if self.findings else 0


def check(config: CheckConfig, report: Report = lambda num_done, num_total: None) -> CheckResult:
    """Look at every sample of a manifest, and at all of them together.

    Nothing is written. Of a sample, some numbers are kept, so that memory grows by about a kilobyte
    a sample.

    Args:
        config: what to check.
        report: called after each sample, from this thread.

    Raises:
        ManifestError: the manifest as a whole cannot be used.
        ConfigError: a column that is asked for is not there.
    """
    started_s = time.perf_counter()
    manifest = read_manifest(
        config.manifest, config.columns, seed=config.seed, mask_columns=config.mask_columns
    )
    for column in config.by:
        if column not in manifest.extra:
            raise ConfigError(
                f"--by {column}: no such column is kept of {manifest.name}; "
                f"expected one of {', '.join(manifest.extra) or 'none: no other column is kept'}"
            )
    looked: list[Looked] = []
    problems: list[SetAside] = []
    for num_done, (sample, look) in enumerate(_look_at_all(manifest.samples, config.classes), 1):
        if isinstance(look, Look):
            looked.append(Looked(sample, look))
        else:
            problems.append(SetAside(sample.id, sample.source, look))
        report(num_done, len(manifest.samples))
    names = config.classes.names
    limits = Limits(config.min_samples, config.allow_leak)
    return CheckResult(
        # Where files' names are hidden, that of their folder or list may be one of them.
        manifest="manifest"
        if manifest.is_hidden
        else config.manifest.name or config.manifest.resolve().name,
        num_samples=len(manifest.samples) + len(manifest.set_aside),
        num_usable=len(looked),
        split_rule=manifest.split_rule,
        splits=_by_split(looked),
        sizes=_sizes(looked),
        classes={
            name: {split: counts[split] for split in SPLITS}
            for name, counts in class_counts(looked, names, config.by).items()
        },
        views=view_counts(looked),
        findings=gravest_first(findings_of(manifest, looked, problems, names, config.by, limits)),
        elapsed_s=time.perf_counter() - started_s,
        samples=manifest.samples,
        shifts={
            item.sample.id: shift
            for item in looked
            if (shift := item.look.shift) is not None and shift.is_clear
        },
        notes=manifest.notes,
    )


def _look_at_all(
    samples: Sequence[Sample], table: ClassTable
) -> Iterator[tuple[Sample, Look | str]]:
    """Look at samples by several threads, and yield them in order."""
    # Twice the cores: a thread that waits for the disk or for another's lock keeps none busy.
    num_threads = min(_MAX_THREADS, 2 * num_cpu_cores())
    waiting: deque[tuple[Sample, Future[Look | str]]] = deque()
    pool = ThreadPoolExecutor(num_threads, "sam3cache-check")
    try:
        for sample in samples:
            waiting.append((sample, pool.submit(look_at, sample, table)))
            if len(waiting) >= _AHEAD * num_threads:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        while waiting:
            oldest, future = waiting.popleft()
            yield oldest, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _by_split(looked: Sequence[Looked]) -> dict[str, dict[str, int]]:
    found = {}
    for split in SPLITS:
        members = [item for item in looked if item.sample.split == split]
        found[split] = {
            "num_samples": len(members),
            "num_groups": len({item.sample.group for item in members}),
            "num_with_mask": sum(item.look.mask_size_px is not None for item in members),
            "num_with_angles": sum(
                None not in (item.sample.primary_angle_deg, item.sample.secondary_angle_deg)
                for item in members
            ),
        }
    return found


def _sizes(looked: Sequence[Looked]) -> dict[str, int]:
    counts = Counter(
        f"{item.look.height_px} x {item.look.width_px} {item.look.pixel_type}"
        + (" colour" if item.look.num_channels == 3 else "")
        for item in looked
    )
    return dict(counts.most_common())
