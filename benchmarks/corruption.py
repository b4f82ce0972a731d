"""Is damage ever silent? A store is damaged in a thousand ways, verified, and read to the end.

A small store is written: every kind of codec (raw float16, int8 with scales, bf16, pictures), three
blocks, two label sets, one of several classes. Then, one at a time and undone again, bytes are
flipped in what shards hold, in their indexes, in receipts (of the sealed store, and of one that is
being worked on), in tables and in metadata; and files are truncated, emptied, deleted, or swapped
with one of their kind. Each time the store is verified, and all of it is read through the package
and compared with what was written.

Exits with 1 when a bound is missed:

- no damage is silent: `sam3cache store verify` finds all of it;
- reading never gives another value than was written: it raises, or the value is right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from reporting import Bound, Machine, Report, duration

from sam3cache.errors import Sam3CacheError
from sam3cache.features import (
    BLOCK_ROWS,
    AnnotationRow,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    describe_store,
    open_store,
    seal_store,
    store_lock,
    verify_store,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

NUM_FLIPS, NUM_FILES = 1000, 200
NUM_SAMPLES = 36
LEVELS = {
    "fpn_72": (4, 24, 24),
    "fpn_72.int8": (4, 24, 24),
    "fpn_72.bf16": (4, 24, 24),
    "image_1008": (1, 96, 96),
}
LABEL_SETS = {"mask": ("vessel",), "parts": ("trunk", "branch")}
FLIPPED = ("data", "index", "receipts", "single receipts", "tables", "metadata")
BROKEN = ("truncated", "emptied", "deleted", "swapped")

Outcome = Literal["raised", "right", "wrong", "crashed"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Damage, verify, read, count, print, and return the exit status."""
    options = parse_options(arguments)
    num_flips = options.flips or (120 if options.quick else NUM_FLIPS)
    num_files = options.files or (40 if options.quick else NUM_FILES)
    machine = Machine("cpu")
    started_s = time.monotonic()
    rng = np.random.default_rng(options.seed)
    tallies = {kind: Tally() for kind in (*FLIPPED, *BROKEN)}
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
        sealed = Target(write_store(Path(folder) / "sealed.zarr", seal=True))
        at_work = Target(write_store(Path(folder) / "at-work.zarr", seal=False))
        for kind, number in (
            *((kind, share(num_flips, FLIPPED, kind)) for kind in FLIPPED),
            *((kind, share(num_files, BROKEN, kind)) for kind in BROKEN),
        ):
            print(f"{kind}: {number}", flush=True)
            target = at_work if kind == "single receipts" else sealed
            for _ in range(number):
                with target.damaged(kind, rng) as what:
                    tallies[kind].add(what, target)
    return report(options, machine, tallies, time.monotonic() - started_s).publish(options.json)


def share(total: int, kinds: Sequence[str], kind: str) -> int:
    """Divide damages among kinds, the rest to the first ones."""
    return total // len(kinds) + (kinds.index(kind) < total % len(kinds))


@dataclass
class Tally:
    """What came of one kind of damage.

    Attributes:
        outcomes: of reading everything.
        num_found: by verify.
        silent: what verify did not find.
        wrong: what made reading give another value, or crash.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    num_found: int = 0
    silent: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_tried(self) -> int:
        """Damages of this kind."""
        return self.outcomes.total()

    def add(self, what: str, target: Target) -> None:
        """Verify and read a damaged store."""
        outcome = target.read_outcome()
        self.outcomes[outcome] += 1
        if outcome in ("wrong", "crashed"):
            self.wrong.append(f"{what}: {outcome}")
        try:
            found = bool(verify_store(target.root).damage)
        except Exception as error:  # noqa: BLE001 - counted and named: it is looked for here
            found = False
            what = f"{what}: {type(error).__name__}"
        self.num_found += found
        if not found:
            self.silent.append(what)


class Target:
    """A store to be damaged, and what it held before."""

    def __init__(self, root: Path) -> None:
        assert not verify_store(root).findings, "the store is sound to begin with"
        self.root = root
        self.before = read_everything(root)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        names = {path: path.relative_to(root).as_posix() for path in files}
        self.shards = [path for path in files if "/c/" in names[path]]
        self.metadata = [path for path in files if path.name == "zarr.json"]
        self.tables = [path for path in files if path.suffix == ".parquet"]
        self.receipts = [path for path in files if path.name == "complete.json"]
        self.receipts += [path for path in files if names[path].startswith("receipts/")]
        self.all = [*self.shards, *self.metadata, *self.tables, *self.receipts]

    def read_outcome(self) -> Outcome:
        """Read everything through the package."""
        try:
            values = read_everything(self.root)
        except Sam3CacheError:
            return "raised"
        except Exception:  # noqa: BLE001 - counted: it is looked for here
            return "crashed"
        return "right" if values == self.before else "wrong"

    @contextmanager
    def damaged(self, kind: str, rng: np.random.Generator) -> Iterator[str]:
        """Damage a file as ``kind`` says, and undo it; yields what was done."""
        path, other = self._pick(kind, rng), None
        kept = {path: path.read_bytes()}
        what = f"{kind} {path.relative_to(self.root).as_posix()}"
        if kind == "swapped":
            other = self._pick_other(path, rng)
            kept[other] = other.read_bytes()
            path.write_bytes(kept[other])
            other.write_bytes(kept[path])
            what += f" with {other.relative_to(self.root).as_posix()}"
        elif kind == "deleted":
            path.unlink()
        elif kind == "emptied":
            path.write_bytes(b"")
        elif kind == "truncated":
            path.write_bytes(kept[path][: rng.integers(1, len(kept[path]))])
        else:
            data = bytearray(kept[path])
            offset = self._offset(kind, len(data), rng)
            bit = int(rng.integers(8))
            data[offset] ^= 1 << bit
            path.write_bytes(data)
            what += f" byte {offset} bit {bit}"
        try:
            yield what
        finally:
            for file, content in kept.items():
                file.write_bytes(content)

    def _pick(self, kind: str, rng: np.random.Generator) -> Path:
        files = {
            "data": self.shards,
            "index": self.shards,
            "tables": self.tables,
            "metadata": self.metadata,
            "receipts": self.receipts,
            "single receipts": self.receipts,
        }.get(kind, self.all)
        if kind == "swapped":
            files = [path for path in files if self._others(path)]
        return files[rng.integers(len(files))]

    def _others(self, path: Path) -> list[Path]:
        """Return files that a shard, table or zarr.json may be swapped with: of other content."""
        for files in (self.shards, self.metadata, self.tables):
            if path in files:
                own = path.read_bytes()
                return [file for file in files if file.read_bytes() != own]
        return []

    def _pick_other(self, path: Path, rng: np.random.Generator) -> Path:
        others = self._others(path)
        # The hardest to notice: another file of the very same size.
        alike = [file for file in others if file.stat().st_size == path.stat().st_size]
        chosen = alike or others
        return chosen[rng.integers(len(chosen))]

    @staticmethod
    def _offset(kind: str, size_bytes: int, rng: np.random.Generator) -> int:
        if kind not in ("data", "index"):
            return int(rng.integers(size_bytes))
        # Shards this small hold a whole block.
        index_bytes = 16 * BLOCK_ROWS + 4
        if kind == "index":
            return size_bytes - 1 - int(rng.integers(index_bytes))
        return int(rng.integers(size_bytes - index_bytes))


def read_everything(root: Path) -> dict[str, Any]:
    """Return all that a store tells whoever reads it through the package, comparable by ``==``."""
    store = open_store(root, allow_unsealed=root.stem == "at-work")
    values: dict[str, Any] = {
        "samples": [repr(sample) for sample in store.samples],
        "set aside": list(store.set_aside),
        "settings": store.settings,
        "levels": dict(store.levels),
        "label sets": dict(store.label_sets),
        "fingerprints": {name: dict(store.fingerprint(name).fields) for name in store.levels},
    }
    for sample in store.samples:
        for level in store.levels:
            values[f"{level} {sample.row}"] = store.read(level, sample.row).tobytes()
        for name in store.label_sets:
            mask = store.read_mask(sample.row, name)
            values[f"{name} {sample.row}"] = None if mask is None else (mask.shape, mask.tobytes())
    return values


def write_store(path: Path, *, seal: bool) -> Path:
    """Write the store through the functions that extraction uses."""
    rng = np.random.default_rng(0)
    levels = {
        name: (
            LevelSpec(name, shape),
            Fingerprint({"level": name, "weights_sha256": "none: synthetic features"}),
        )
        for name, shape in LEVELS.items()
    }
    label_sets = {name: LabelSetSpec(name, names, 64, 48) for name, names in LABEL_SETS.items()}
    samples = [
        SampleRow(row, f"s{row}", f"images/{row}.png", None, 96, 80, 1, 100 + row, 7, "0" * 64)
        for row in range(NUM_SAMPLES)
    ]
    annotations = [
        AnnotationRow(
            row,
            f"s{row}",
            ("train", "val", "test")[row % 3],
            f"g{row // 2}",
            float(row - 20),
            None if row % 5 == 0 else float(20 - row),
            {"vessel": "LAD" if row % 2 else "RCA"},
        )
        for row in range(NUM_SAMPLES)
    ]
    with store_lock(path):
        describe_store(
            path,
            settings={"backbone": "none: synthetic features"},
            levels=levels,
            label_sets=label_sets,
            samples=samples,
            annotations=annotations,
        )
    for begin in range(0, NUM_SAMPLES, BLOCK_ROWS):
        block, rows = begin // BLOCK_ROWS, samples[begin : begin + BLOCK_ROWS]
        for spec, fingerprint in levels.values():
            write_level_block(
                path,
                spec,
                fingerprint.digest,
                block,
                {row.row: draw_values(spec, rng) for row in rows},
            )
        for label_set in label_sets.values():
            masks = {
                row.row: rng.integers(0, 2, (label_set.num_planes, 64 - row.row, 48), np.uint8)
                if row.row % 7
                else None
                for row in rows
            }
            sources = {row.row: LabelRow(row.row, source=f"masks/{row.row}.png") for row in rows}
            write_label_block(path, label_set, block, masks, sources)
        write_sample_facts(path, block, [replace(row, status="ok") for row in rows])
    if seal:
        with store_lock(path):
            seal_store(path)
    return path


def draw_values(spec: LevelSpec, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return noise of a level's shape and kind."""
    if spec.dtype == "uint8":
        return rng.integers(0, 256, spec.shape, np.uint8)
    return rng.standard_normal(spec.shape, np.float32).astype(np.float16)


def report(
    options: argparse.Namespace,
    machine: Machine,
    tallies: dict[str, Tally],
    elapsed_s: float,
) -> Report:
    """Lay out what was counted."""
    rows = [
        (
            f"flipped byte: {kind}" if kind in FLIPPED else f"file {kind}",
            str(tally.num_tried),
            str(tally.num_found),
            str(tally.outcomes["raised"]),
            str(tally.outcomes["right"]),
            str(len(tally.wrong)),
            str(len(tally.silent)),
        )
        for kind, tally in tallies.items()
    ]
    silent = [what for tally in tallies.values() for what in tally.silent]
    wrong = [what for tally in tallies.values() for what in tally.wrong]
    for what in silent:
        print(f"SILENT {what}", file=sys.stderr)
    for what in wrong:
        print(f"WRONG {what}", file=sys.stderr)
    num_tried = sum(tally.num_tried for tally in tallies.values())
    return Report(
        program="corruption",
        columns=(
            "damage",
            "tried",
            "found by verify",
            "reading raises",
            "reads right",
            "reads wrong",
            "silent",
        ),
        rows=rows,
        notes=[
            f"{num_tried} damages, each alone, verified and read to the end in "
            f"{duration(elapsed_s)}. What reads right is damage where nothing is read: a file that "
            "only other libraries need, or what a receipt says beside what reading asks of it.",
        ],
        bounds=[
            Bound("damage that verify does not find: none", len(silent), not silent),
            Bound("values read other than written, or crashes: none", len(wrong), not wrong),
        ],
        figures={
            kind: {
                "tried": tally.num_tried,
                "found": tally.num_found,
                "reading": dict(tally.outcomes),
                "silent": tally.silent,
                "wrong": tally.wrong,
            }
            for kind, tally in tallies.items()
        },
        settings={
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("json", "workdir")
        },
        machine=machine.fields(),
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of it, in under a minute")
    parser.add_argument("--flips", type=int, help=f"bytes to flip, one at a time [{NUM_FLIPS}]")
    parser.add_argument("--files", type=int, help=f"files to break, one at a time [{NUM_FILES}]")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, and how [0]")
    parser.add_argument(
        "--workdir", type=Path, help="where the store is written for the time [the system's own]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result there, or into that folder"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
