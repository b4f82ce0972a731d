"""Reading a store, against the same samples in other formats and through other readers.

A store of 521 samples of `fpn_72` (2.65 MB each) is written by sam3cache, and its samples once more
as one .npy file and as one HDF5 file with a chunk a sample; zarr-python, zarrs and tensorstore read
the very arrays that sam3cache wrote. Everybody reads the same random batches in turn, into one
buffer where the reader can. "Cold" is after the operating system has dropped the files from its
cache, which programs can ask of Linux alone.

Exits with 1 when a bound is missed:

- random batches from the cache of the system, each sample having been checked against its checksum
  when it was first read: at least MEMMAP_SHARE of the speed of a .npy memmap, which checks nothing
  (what checking all of them anew leaves of it is told below the table);
- with every sample checked in every round (the store is opened anew for it): at least ZARR_RATIO
  times the speed of zarr-python's best loop;
- random batches from the disk: at least COLD_SHARE of the fastest of memmap, zarrs, tensorstore
  and h5py;
- all samples into RAM within LOAD_RATIO times what reading the same bytes from a plain file into
  memory takes, cold and warm;
- a stream in random order into a consumer that does nothing, from the disk: at least STREAM_SHARE
  of the disk's rate, which is that of plain reads of the same bytes of the same files, in random
  order too, by as many threads, and checked by nobody. (What the disk gives to who reads one file
  in order is shown as well.)
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import tensorstore
import zarr
from numpy.typing import NDArray
from reporting import Bound, Machine, Report, significant
from zarr.core.buffer.cpu import NDBuffer

from sam3cache.features import (
    BLOCK_ROWS,
    AnnotationRow,
    FeatureStore,
    Fingerprint,
    LevelSpec,
    SampleRow,
    describe_store,
    open_store,
    seal_store,
    store_lock,
    write_level_block,
    write_sample_facts,
)
from sam3cache.loading import CachedSamples
from sam3cache.loading.cached import NUM_READERS

LEVEL = LevelSpec("fpn_72", (256, 72, 72))
CRC_BYTES = 4
NUM_SAMPLES, BATCH, STREAM_BATCH = 521, 32, 16
ROUNDS, QUICK_ROUNDS = 9, 5

MEMMAP_SHARE, ZARR_RATIO, COLD_SHARE, LOAD_RATIO, STREAM_SHARE = 0.5, 2.0, 0.8, 2.0, 0.9

MEMMAP, CHECKED, REUSED = ".npy memmap", "sam3cache, all checked", "sam3cache, checked before"
ZARR, ZARR_THREADS = "zarr-python, a sample a call", "zarr-python, the same by threads"
ZARRS, TENSORSTORE, H5PY = "zarrs", "tensorstore", "h5py, a chunk a sample"
PLAIN, RAM, DISK, STREAM = "plain file to RAM", "sam3cache to RAM", "plain pieces", "stream"
IN_ORDER = "plain file in order"

Rows = NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    num_samples = options.samples or (64 if options.quick else NUM_SAMPLES)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    machine = Machine("cpu")
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as name:
        folder = Path(name)
        print(f"Writing {num_samples} samples, four times over", flush=True)
        write_store(folder / "x.zarr", num_samples)
        write_others(folder, open_store(folder / "x.zarr"))
        with ThreadPoolExecutor(NUM_READERS) as threads:
            readers = readers_of(folder, threads)
            check_equal(readers, num_samples)
            print("Random batches", flush=True)
            warm = random_batches(readers, num_samples, rounds, cold=False)
            can_drop = hasattr(os, "posix_fadvise")
            cold = random_batches(readers, num_samples, rounds, cold=True) if can_drop else {}
            print("All samples", flush=True)
            warm |= whole_store(folder, threads, rounds, cold=False)
            if can_drop:
                cold |= whole_store(folder, threads, rounds, cold=True)
    return report(options, machine, num_samples, warm, cold).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64 samples, in under a minute")
    parser.add_argument("--samples", type=int, metavar="N", help=f"samples [{NUM_SAMPLES}]")
    parser.add_argument(
        "--workdir", type=Path, help="where some 4.2 GB lie meanwhile [temporary files]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result; a folder names it itself"
    )
    return parser.parse_args(arguments)


@dataclass
class Reader:
    """One way to read a batch.

    Attributes:
        begin: opens what a round needs, which is not timed; returns what reads a batch, given its
            rows and a buffer, and returns its values.
        files: that it reads, by which the system's cache is dropped.
    """

    begin: Callable[[], Callable[[Rows, NDArray[np.float16]], Any]]
    files: Sequence[Path] = field(default_factory=list)


def readers_of(folder: Path, threads: ThreadPoolExecutor) -> dict[str, Reader]:
    """Return all contestants."""
    shards = sorted(path for path in (folder / "x.zarr").rglob("*") if path.is_file())
    array = folder / "x.zarr" / "levels" / LEVEL.name
    reused = open_store(folder / "x.zarr")

    def memmap() -> Callable[[Rows, NDArray[np.float16]], Any]:
        mapped = np.load(folder / "x.npy", mmap_mode="r")
        return lambda rows, out: np.take(mapped, rows, axis=0, out=out, mode="clip")

    def ours(store: FeatureStore) -> Callable[[Rows, NDArray[np.float16]], Any]:
        def read(rows: Rows, out: NDArray[np.float16]) -> None:
            def read_share(first: int) -> None:
                for position in range(first, len(rows), NUM_READERS):
                    store.read_into(LEVEL.name, int(rows[position]), out[position])

            list(threads.map(read_share, range(NUM_READERS)))

        return read

    def zarr_loop(pipeline: str, in_threads: bool = False) -> Callable[..., Any]:
        def begin() -> Callable[[Rows, NDArray[np.float16]], Any]:
            with zarr.config.set({"codec_pipeline.path": pipeline}):
                opened = zarr.open_array(array, mode="r")

            def read(rows: Rows, out: NDArray[np.float16]) -> None:
                num_shares = NUM_READERS if in_threads else 1

                def read_share(first: int) -> None:
                    for position in range(first, len(rows), num_shares):
                        row = int(rows[position])
                        buffer = NDBuffer.from_numpy_array(out[position : position + 1])
                        opened.get_basic_selection(slice(row, row + 1), out=buffer)

                list((threads.map if in_threads else map)(read_share, range(num_shares)))

            return read

        return begin

    def through_tensorstore() -> Callable[[Rows, NDArray[np.float16]], Any]:
        opened = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}, open=True
        ).result()

        def read(rows: Rows, out: NDArray[np.float16]) -> None:
            # All at once: it reads them side by side.
            reads = [
                tensorstore.array(out[position]).write(opened[int(row)])
                for position, row in enumerate(rows)
            ]
            for future in reads:
                future.result()

        return read

    def hdf5() -> Callable[[Rows, NDArray[np.float16]], Any]:
        dataset = h5py.File(folder / "x.h5", "r")[LEVEL.name]

        def read(rows: Rows, out: NDArray[np.float16]) -> None:
            for position, row in enumerate(rows):
                dataset.read_direct(out, np.s_[int(row)], np.s_[position])

        return read

    python = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    return {
        MEMMAP: Reader(memmap, [folder / "x.npy"]),
        CHECKED: Reader(lambda: ours(open_store(folder / "x.zarr")), shards),
        REUSED: Reader(lambda: ours(reused), shards),
        ZARR: Reader(zarr_loop(python), shards),
        ZARR_THREADS: Reader(zarr_loop(python, in_threads=True), shards),
        ZARRS: Reader(zarr_loop("zarrs.ZarrsCodecPipeline"), shards),
        TENSORSTORE: Reader(through_tensorstore, shards),
        H5PY: Reader(hdf5, [folder / "x.h5"]),
    }


def check_equal(readers: Mapping[str, Reader], num_samples: int) -> None:
    """Make sure that everybody reads the same values, and everything once for the cache."""
    expected = np.empty((BATCH, *LEVEL.shape), np.float16)
    out = np.empty_like(expected)
    for begin in range(0, num_samples, BATCH):
        rows = np.arange(begin, min(begin + BATCH, num_samples))
        out[:] = np.nan
        for i, reader in enumerate(readers.values()):
            target = out if i else expected
            reader.begin()(rows, target[: len(rows)])
            assert np.array_equal(target[: len(rows)], expected[: len(rows)])


def random_batches(
    readers: Mapping[str, Reader], num_samples: int, rounds: int, *, cold: bool
) -> dict[str, list[float]]:
    """Time everybody on the same batches, in an order that rotates.

    Returns:
        By reader, GB a second of every round; a first round, to warm up, is left out.
    """
    rng = np.random.default_rng(1)
    out = np.zeros((min(BATCH, num_samples), *LEVEL.shape), np.float16)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for turn in range(rounds + 1):
        rows = rng.choice(num_samples, len(out), replace=False)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if cold:
                drop(readers[name].files)
            read = readers[name].begin()
            started_s = time.perf_counter()
            read(rows, out)
            elapsed_s = time.perf_counter() - started_s
            if turn:
                rates[name].append(out.nbytes / 1e9 / elapsed_s)
    return rates


def whole_store(
    folder: Path, threads: ThreadPoolExecutor, rounds: int, *, cold: bool
) -> dict[str, list[float]]:
    """Time what reads every sample once, in an order that rotates; GB a second of every round."""
    plain = folder / "x.npy"
    shards = sorted((folder / "x.zarr" / "levels").rglob("c/**/[0-9]*"))
    shards = [path for path in shards if path.is_file()]
    num_bytes = plain.stat().st_size

    def to_memory() -> Any:
        return np.fromfile(plain, dtype=np.uint8)

    def in_order() -> None:
        buffer = bytearray(8_000_000)
        with plain.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def pieces() -> None:
        chunks = [
            (folder / "x.zarr" / LEVEL.grid.key((shard,)), position)
            for shard, position in (
                divmod(row, LEVEL.samples_per_shard)
                for row in np.random.default_rng(0).permutation(num_bytes // LEVEL.sample_bytes)
            )
        ]
        buffers = np.zeros((NUM_READERS, LEVEL.sample_bytes), np.uint8)

        def read_share(first: int) -> None:
            for path, position in chunks[first::NUM_READERS]:
                with path.open("rb", buffering=0) as file:
                    file.seek(int(position) * (LEVEL.sample_bytes + CRC_BYTES))
                    file.readinto(buffers[first].data)

        list(threads.map(read_share, range(NUM_READERS)))

    def samples(store: FeatureStore, residency: Any) -> CachedSamples:
        rows = [sample.row for sample in store.samples]
        return CachedSamples(store, rows, (LEVEL.name,), residency=residency)

    def stream(store: FeatureStore) -> Callable[[], None]:
        streamed = samples(store, "stream")
        return lambda: idle(streamed)

    # Each is begun, which is not timed, with a store in which nothing has been checked yet.
    contestants: dict[str, tuple[Callable[[FeatureStore], Callable[[], Any]], Sequence[Path]]] = {
        PLAIN: (lambda store: to_memory, [plain]),
        RAM: (lambda store: lambda: samples(store, "ram"), shards),
        IN_ORDER: (lambda store: in_order, [plain]),
        DISK: (lambda store: pieces, shards),
        STREAM: (stream, shards),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, files = contestants[name]
            run = begin(open_store(folder / "x.zarr"))
            if cold:
                drop(files)
            started_s = time.perf_counter()
            held = run()
            elapsed_s = time.perf_counter() - started_s
            if name == RAM:
                assert held.loaded_bytes == held.resident_bytes, "loaded by another process"
                assert "shared" in held.placement or not Path("/dev/shm").exists()
            del held, run  # frees what it holds, which is not timed
            if turn:
                rates[name].append(num_bytes / 1e9 / elapsed_s)
    return rates


def idle(samples: CachedSamples) -> None:
    """Consume a stream in random order, and do nothing with it."""
    for _ in samples.iterate(STREAM_BATCH, shuffle=True):
        pass


def drop(files: Sequence[Path]) -> None:
    """Ask the system to forget what it has cached of files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def report(
    options: argparse.Namespace,
    machine: Machine,
    num_samples: int,
    warm: Mapping[str, list[float]],
    cold: Mapping[str, list[float]],
) -> Report:
    """Say what was measured, and check the bounds."""

    def ratio(rates: Mapping[str, list[float]], of: str, to: Sequence[str]) -> float:
        return median(rates[of]) / max(median(rates[name]) for name in to)

    bounds = []

    def bound(claim: str, value: float, holds: bool) -> None:
        bounds.append(Bound(claim, value, holds))

    memmap = ratio(warm, REUSED, [MEMMAP])
    claim = f"random batches, checked when first read: at least {MEMMAP_SHARE:g} of a memmap"
    bound(claim, memmap, memmap >= MEMMAP_SHARE)
    python = ratio(warm, CHECKED, [ZARR, ZARR_THREADS])
    claim = f"every sample checked: at least {ZARR_RATIO:g} times zarr-python's best loop"
    bound(claim, python, python >= ZARR_RATIO)
    load = 1 / ratio(warm, RAM, [PLAIN])
    claim = f"all samples into RAM within {LOAD_RATIO:g} times a plain file, warm"
    bound(claim, load, load <= LOAD_RATIO)
    if cold:
        best = ratio(cold, CHECKED, [MEMMAP, ZARRS, TENSORSTORE, H5PY])
        claim = f"random batches from the disk: at least {COLD_SHARE:g} of the best of the others"
        bound(claim, best, best >= COLD_SHARE)
        load = 1 / ratio(cold, RAM, [PLAIN])
        claim = f"all samples into RAM within {LOAD_RATIO:g} times a plain file, from the disk"
        bound(claim, load, load <= LOAD_RATIO)
        stream = ratio(cold, STREAM, [DISK])
        claim = f"a stream from the disk: at least {STREAM_SHARE:g} of its rate"
        bound(claim, stream, stream >= STREAM_SHARE)

    headings = {
        MEMMAP: f"{BATCH} random samples: .npy memmap, which checks nothing",
        CHECKED: "sam3cache, every sample checked",
        REUSED: "sam3cache, checked when first read, earlier",
        PLAIN: f"all {num_samples} samples: a plain file into memory",
        RAM: "sam3cache into RAM, checked and shared by all processes",
        IN_ORDER: "a plain file in order, kept nowhere",
        DISK: "the store's samples in random order, plainly read, kept nowhere",
        STREAM: "sam3cache streamed in random order to an idle consumer",
    }
    rows = [
        (
            headings.get(name, name),
            significant(median(warm[name])),
            significant(median(cold[name])) if cold else "",
        )
        for name in warm
    ]
    return Report(
        program="store",
        columns=("`fpn_72`, 2.65 MB a sample", "warm, GB/s", "cold, GB/s"),
        rows=rows,
        notes=[
            f"Medians of {len(warm[MEMMAP])} rounds in rotating order, the same rows for all; "
            f"sam3cache reads by {NUM_READERS} threads. With every sample checked anew it gives "
            f"{significant(ratio(warm, CHECKED, [MEMMAP]))} of the memmap's speed; where each was "
            f"checked when it was first read, {significant(memmap)}."
        ],
        bounds=bounds,
        figures={"warm_gb_per_s": dict(warm), "cold_gb_per_s": dict(cold)},
        settings={"num_samples": num_samples, "batch_size": BATCH, "num_readers": NUM_READERS},
        machine=machine.fields(),
    )


def write_store(path: Path, num_samples: int) -> None:
    """Write a sealed store of noise, in which every sample differs from every other."""
    fingerprint = Fingerprint({"level": LEVEL.name, "weights_sha256": "none: synthetic features"})
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((BLOCK_ROWS, *LEVEL.shape), np.float32).astype(np.float16)
    samples = [
        SampleRow(row, f"s{row}", f"{row}.png", None, 1008, 1008, 1, status="ok")
        for row in range(num_samples)
    ]
    annotations = [
        AnnotationRow(row, f"s{row}", "train", f"g{row}", None, None) for row in range(num_samples)
    ]
    with store_lock(path):
        describe_store(
            path,
            settings={"backbone": "none: synthetic features"},
            levels={LEVEL.name: (LEVEL, fingerprint)},
            label_sets={},
            samples=samples,
            annotations=annotations,
        )
    for begin in range(0, num_samples, BLOCK_ROWS):
        own = samples[begin : begin + BLOCK_ROWS]
        for sample in own:
            noise[sample.row - begin, 0, 0, 0] = sample.row
        values = {sample.row: noise[sample.row - begin] for sample in own}
        write_level_block(path, LEVEL, fingerprint.digest, begin // BLOCK_ROWS, values)
        write_sample_facts(path, begin // BLOCK_ROWS, own)
    with store_lock(path):
        seal_store(path)


def write_others(folder: Path, store: FeatureStore) -> None:
    """Write the store's samples as .npy and as HDF5, and everything to the disk."""
    shape = (len(store.samples), *LEVEL.shape)
    npy = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float16, shape=shape)
    with h5py.File(folder / "x.h5", "w") as file:
        dataset = file.create_dataset(
            LEVEL.name, shape, np.float16, chunks=(1, *LEVEL.shape), fletcher32=False
        )
        for position, sample in enumerate(store.samples):
            npy[position] = dataset[position] = store.read(LEVEL.name, sample.row)
    npy.flush()
    for path in (folder / "x.npy", folder / "x.h5"):
        with path.open("r+b") as written:
            os.fsync(written.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
