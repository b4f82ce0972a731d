"""Stores of up to 100,000 samples: opening, going on, memory, and planning for 100 million.

For each number of samples a folder of tiny pictures is written, with a manifest, and the store that
an extraction of them leaves (pictures on the padded square and masks, all alike; written without
flushing, as that is not what is measured). A second store of as many samples has a small feature
level, to train from. Then, each in a process of its own:

- open: ``open_store``, and by itself the list of its samples;
- resume: ``extract`` with the unchanged manifest, of the sealed store;
- resume unsealed: the same where a kill came before the seal;
- extract: the same where a kill came before the last block, which a worker computes;
- train: an epoch of the linear head, streaming, for as long as TRAIN_LIMIT_S.

Memory is the most that a process held resident; its slope is taken between numbers of samples.
Last, a manifest of very many rows is planned. Exits with 1 when a bound is missed:

- opening takes under OPEN_S, resuming under RESUME_S at the largest number;
- memory grows by less than SLOPE_BYTES a sample, of extraction and of training;
- planning for the longest manifest takes under PLAN_S.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from reporting import Bound, Machine, Report, duration, measure_apart, significant

from sam3cache.extract import ExtractConfig
from sam3cache.extract.job import Job, plan_job, read_request
from sam3cache.extract.state import StoreState
from sam3cache.features import (
    BLOCK_ROWS,
    Fingerprint,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    block_of,
    describe_store,
    seal_store,
    store_lock,
)
from sam3cache.features.receipts import (
    SAMPLES_ITEM,
    Facts,
    Receipt,
    ReceiptKey,
    ShardRecord,
    break_seal,
    fold_receipts,
    read_receipts,
)
from sam3cache.features.shards import crc32c, encode_shard
from sam3cache.images import pixel_hash
from sam3cache.runtime import peak_memory_bytes

NUMBERS, QUICK_NUMBERS = (2_000, 20_000, 100_000), (1_024, 4_096)
PLANNED, QUICK_PLANNED = 100_000_000, 1_000_000
OPEN_S, RESUME_S, PLAN_S = 1.0, 10.0, 60.0
SLOPE_BYTES = 1_000
TRAIN_LIMIT_S = 20.0
PICTURE_PX, MASK_PX, GREY = 16, 16, 128
SMALL_LEVEL = (4, 8, 8)
_CHUNK_ROWS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    if options.measure is not None:
        kind, folder = options.measure
        print(json.dumps(MEASURES[kind](Path(folder))))
        return 0
    numbers = options.samples or (QUICK_NUMBERS if options.quick else NUMBERS)
    machine = Machine("cpu")
    found: dict[int, dict[str, dict[str, float]]] = {}
    for num in numbers:
        with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
            print(f"Writing stores of {num:,} samples", flush=True)
            write_all(Path(folder), num)
            found[num] = {}
            for kind in MEASURES:
                if kind == "plan":
                    continue
                print(f"  {kind}", flush=True)
                found[num][kind] = measured(kind, Path(folder))
    num_planned = options.planned or (QUICK_PLANNED if options.quick else PLANNED)
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
        num_planned = write_long_manifest(Path(folder), num_planned)
        print(f"Planning {num_planned:,} rows", flush=True)
        planned = measured("plan", Path(folder))

    kinds = [kind for kind in MEASURES if kind != "plan"]
    rows = []
    for num in numbers:
        cells = [f"{found[num][kind]['elapsed_s']:.2f} s" for kind in kinds if kind != "train"]
        cells += [f"{found[num][kind]['peak_bytes'] / 1e6:.0f} MB" for kind in kinds[1:]]
        rows.append((f"{num:,}", *cells))
    largest = found[numbers[-1]]
    bounds = [
        Bound(
            f"opening {numbers[-1]:,} samples takes under {OPEN_S:g} s",
            largest["open"]["elapsed_s"],
            largest["open"]["elapsed_s"] < OPEN_S,
        )
    ]
    for kind in ("resume", "resume unsealed"):
        seconds = largest[kind]["elapsed_s"]
        claim = f"{kind}: {numbers[-1]:,} samples take under {RESUME_S:g} s"
        bounds.append(Bound(claim, seconds, seconds < RESUME_S))
    slopes = {}
    for kind in kinds[1:]:
        slope = slope_bytes([(num, found[num][kind]["peak_bytes"]) for num in numbers[-2:]])
        slopes[kind] = slope
        claim = f"memory of {kind} grows by less than {SLOPE_BYTES:,} bytes a sample"
        bounds.append(Bound(claim, slope, slope < SLOPE_BYTES))
    claim = f"planning {num_planned:,} rows takes under {PLAN_S:g} s"
    bounds.append(Bound(claim, planned["elapsed_s"], planned["elapsed_s"] < PLAN_S))
    return Report(
        program="scale",
        columns=(
            "samples",
            *(kind for kind in kinds if kind != "train"),
            *(f"{kind}: memory" for kind in kinds[1:]),
        ),
        rows=rows,
        notes=[
            f"The list of the largest store's samples takes another "
            f"{significant(largest['open']['samples_s'])} s.",
            "Memory grows, a sample, by "
            + ", ".join(f"{slope:.0f} bytes ({kind})" for kind, slope in slopes.items())
            + f", from {numbers[-2]:,} to {numbers[-1]:,} samples.",
            f"A manifest of {num_planned:,} rows ({planned['size_bytes'] / 1e9:.1f} GB) is planned "
            f"in {duration(planned['elapsed_s'])}, with {planned['peak_bytes'] / 1e6:.0f} MB.",
        ],
        bounds=bounds,
        figures={"by_samples": {str(n): f for n, f in found.items()}, "plan": planned},
        settings={"samples": list(numbers), "planned": num_planned},
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few samples, in under a minute")
    parser.add_argument("--samples", type=int, nargs="+", metavar="N", help="numbers of samples")
    parser.add_argument("--planned", type=int, metavar="N", help="rows of the manifest to plan")
    parser.add_argument("--workdir", type=Path, help="where files lie meanwhile [temporary files]")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def slope_bytes(points: Sequence[tuple[int, float]]) -> float:
    """Return bytes a sample between the first and the last of (samples, bytes)."""
    (few, few_bytes), (many, many_bytes) = points[0], points[-1]
    return (many_bytes - few_bytes) / (many - few)


def measured(kind: str, folder: Path) -> dict[str, float]:
    """Measure in a process of its own."""
    return measure_apart(__file__, kind, str(folder))


def measure_open(folder: Path) -> dict[str, float]:
    """Open the store, and list its samples."""
    from sam3cache.features import open_store

    begun_s = time.perf_counter()
    store = open_store(folder / "x.zarr")
    opened_s = time.perf_counter()
    assert len(store.samples) > 0
    listed_s = time.perf_counter()
    return {
        "elapsed_s": opened_s - begun_s,
        "samples_s": listed_s - opened_s,
        "peak_bytes": peak_memory_bytes(),
    }


def measure_resume(folder: Path) -> dict[str, float]:
    """Extract an unchanged manifest."""
    from sam3cache.extract import extract

    begun_s = time.perf_counter()
    result = extract(config_of(folder))
    assert result.num_computed == 0, result
    assert result.sealed
    return {"elapsed_s": time.perf_counter() - begun_s, "peak_bytes": peak_memory_bytes()}


def measure_resume_unsealed(folder: Path) -> dict[str, float]:
    """Extract an unchanged manifest after a kill that came before the seal."""
    break_seal(folder / "x.zarr")
    return measure_resume(folder)


def measure_extract(folder: Path) -> dict[str, float]:
    """Extract after a kill that came before the last block; a worker's start is counted."""
    from sam3cache.extract import extract

    store = folder / "x.zarr"
    break_seal(store)
    receipts = dict(read_receipts(store))
    del receipts["levels.image_1008", max(block for _, block in receipts)]
    fold_receipts(store, receipts)
    del receipts
    begun_s = time.perf_counter()
    result = extract(config_of(folder))
    assert result.num_computed == BLOCK_ROWS, result
    assert result.sealed
    return {"elapsed_s": time.perf_counter() - begun_s, "peak_bytes": peak_memory_bytes()}


def measure_train(folder: Path) -> dict[str, float]:
    """Train from the small level, streaming; memory counts once every table is in use."""
    from sam3cache.training import Progress, TrainConfig, train

    class EnoughError(Exception):
        """The time is up."""

    begun_s = time.perf_counter()

    def watch(progress: Progress) -> None:
        if time.perf_counter() - begun_s > TRAIN_LIMIT_S:
            raise EnoughError

    config = TrainConfig(
        store=str(folder / "small.zarr"),
        name="scale",
        head="linear",
        output=str(folder),
        device="cpu",
        residency="stream",
        epochs=1,
        batch_size=256,
        loss_size_px=16,
    )
    with suppress(EnoughError):
        train(config, watch)
    return {"elapsed_s": time.perf_counter() - begun_s, "peak_bytes": peak_memory_bytes()}


def measure_plan(folder: Path) -> dict[str, float]:
    """Plan a manifest that is too long to be read."""
    from sam3cache.errors import NoSpaceError
    from sam3cache.extract.plan import plan

    begun_s = time.perf_counter()
    with suppress(NoSpaceError):  # which is known as late as all the rest
        plan(replace(config_of(folder), output=folder / "new.zarr"), measure=False)
    elapsed_s = time.perf_counter() - begun_s
    return {
        "elapsed_s": elapsed_s,
        "peak_bytes": peak_memory_bytes(),
        "size_bytes": (folder / "manifest.csv").stat().st_size,
    }


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "open": measure_open,
    "resume": measure_resume,
    "resume unsealed": measure_resume_unsealed,
    "extract": measure_extract,
    "train": measure_train,
    "plan": measure_plan,
}


def config_of(folder: Path) -> ExtractConfig:
    """Return what the stores were extracted with."""
    return ExtractConfig(
        folder / "manifest.csv", folder / "x.zarr", levels=("image_1008",), backbone="sam3-mini"
    )


def write_all(folder: Path, num_samples: int) -> None:
    """Write pictures, a manifest, the store that comes of them, and one with a small level."""
    write_pictures(folder, num_samples)
    # What an extraction would do, so that it finds nothing to be done.
    config = config_of(folder)
    state = StoreState.read(config.output, "mask")
    job = plan_job(read_request(config, state, lambda progress: None), state)
    write_picture_store(job)
    write_small_store(folder / "small.zarr", job)


def write_pictures(folder: Path, num_samples: int) -> None:
    """Write grey squares, a mask that serves them all, and a manifest."""
    (folder / "images").mkdir()
    np.save(folder / "0.npy", np.full((PICTURE_PX, PICTURE_PX), GREY, np.uint8))
    content = (folder / "0.npy").read_bytes()
    np.save(folder / "mask.npy", np.eye(MASK_PX, dtype=np.uint8))
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        file.write("id,image,mask,primary_angle,secondary_angle,split,group,phase\n")
        for i in range(num_samples):
            name = f"images/{i:06}.npy"
            (folder / name).write_bytes(content)
            split = "val" if i < BLOCK_ROWS else "train"
            file.write(f"s{i:06},{name},mask.npy,{i % 90},{i % 45},{split},p{i // 8},diastole\n")


def write_picture_store(job: Job) -> None:
    """Write what an extraction leaves."""
    root = job.state.root
    spec, fingerprint = job.levels["image_1008"]
    assert job.label_set is not None
    digest = pixel_hash(np.full((PICTURE_PX, PICTURE_PX, 1), GREY, np.uint8))
    rows = [replace(row, status="ok", pixel_sha256=digest) for row in job.plan.rows]
    with store_lock(root):
        describe_store(
            root,
            settings=job.settings,
            levels=job.levels,
            label_sets=job.label_sets,
            samples=rows,
            annotations=job.plan.annotations,
        )
        square_CHW = np.zeros(spec.shape, np.uint8)
        write_blocks(root, rows, spec, fingerprint, square_CHW, job.label_set, job.plan.masks)
        seal_store(root)


def write_small_store(root: Path, job: Job) -> None:
    """Write a store of the same samples with a feature level of a kilobyte."""
    spec = LevelSpec("fpn_72", SMALL_LEVEL)
    fingerprint = Fingerprint({"level": "fpn_72", "weights_sha256": "none: synthetic features"})
    assert job.label_set is not None
    digest = pixel_hash(np.full((PICTURE_PX, PICTURE_PX, 1), GREY, np.uint8))
    rows = [replace(row, status="ok", pixel_sha256=digest) for row in job.plan.rows]
    with store_lock(root):
        describe_store(
            root,
            settings={"backbone": "none: synthetic features"},
            levels={"fpn_72": (spec, fingerprint)},
            label_sets=job.label_sets,
            samples=rows,
            annotations=job.plan.annotations,
        )
        feature_CHW = np.ones(spec.shape, np.float16)
        write_blocks(root, rows, spec, fingerprint, feature_CHW, job.label_set, job.plan.masks)
        seal_store(root)


def write_blocks(
    root: Path,
    rows: Sequence[SampleRow],
    spec: LevelSpec,
    fingerprint: Fingerprint,
    value_CHW: np.ndarray,
    label_set: LabelSetSpec,
    masks: Any,
) -> None:
    """Write shards and receipts of equal samples; encoded once, and not flushed."""
    tile_1HW = np.zeros(label_set.grid.inner[1:], np.uint8)
    tile_1HW[0, :MASK_PX, :MASK_PX] = np.eye(MASK_PX)
    level = encode_shard(spec.grid, dict.fromkeys(range(BLOCK_ROWS), value_CHW))
    label = encode_shard(label_set.grid, dict.fromkeys(range(BLOCK_ROWS), tile_1HW))
    files = [
        (spec.item, fingerprint.digest, spec.grid, level, crc32c(level.data)),
        (label_set.item, "", label_set.grid, label, crc32c(label.data)),
    ]
    fields = ("row", "status", "reason", "height_px", "width_px", "num_channels")
    fields += ("size_bytes", "mtime_ns", "pixel_sha256")
    receipts: dict[ReceiptKey, Receipt] = {}
    for start in range(0, len(rows), BLOCK_ROWS):
        block, members = block_of(rows[start].row), rows[start : start + BLOCK_ROWS]
        numbers = tuple(row.row for row in members)
        for item, digest, grid, shard, checksum in files:
            key = grid.key((block,))
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(shard.data)
            record = ShardRecord(key, len(shard.data), checksum, shard.chunk_crc32c)
            facts = Facts({})
            if item == label_set.item:
                facts = Facts.of(asdict(masks[number]) for number in numbers)
            receipts[item, block] = Receipt(item, block, numbers, digest, (record,), facts)
        facts = Facts.of({name: getattr(row, name) for name in fields} for row in members)
        receipts[SAMPLES_ITEM, block] = Receipt(SAMPLES_ITEM, block, numbers, "", (), facts)
    (root / "receipts").mkdir(exist_ok=True)
    fold_receipts(root, receipts)


def write_long_manifest(folder: Path, num_rows: int) -> int:
    """Write a manifest of many rows, fewer if the disk is small; return how many."""
    write_pictures(folder, BLOCK_ROWS)
    lines = (folder / "manifest.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    header, row = lines[0], lines[1]
    num_rows = min(num_rows, shutil.disk_usage(folder).free // 2 // len(row))
    rest = row.partition(",")[2].encode()
    # Written a chunk at a time, whose rows differ in their ids, and from those of other chunks.
    chunk = b"".join(b"chunk-%05d,%b" % (i, rest) for i in range(_CHUNK_ROWS))
    row_bytes = len(chunk) // _CHUNK_ROWS
    with (folder / "manifest.csv").open("wb") as file:
        file.write(header.encode())
        for start in range(0, num_rows, _CHUNK_ROWS):
            named = chunk.replace(b"chunk", b"%05d" % (start // _CHUNK_ROWS))
            file.write(named[: (num_rows - start) * row_bytes])
    return num_rows


if __name__ == "__main__":
    raise SystemExit(main())
