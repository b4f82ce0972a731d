"""A store on an object store: what is left when the server is killed, and how fast it is read.

``sam3cache extract`` writes a store of small pictures by SAM 3's tower in miniature to moto's S3
server, a process on loopback, which is killed (SIGKILL; on Windows TerminateProcess) again and
again while it does, and started anew after up to LONGEST_PAUSE_S with all that it had answered.
The extraction is started once, and gets no help. In the end levels/ and labels/ must be the same,
byte for byte, as those of a store that the same command writes to a folder.

Then the samples of level fpn_72 are read in random order: from a folder, through a local copy that
is empty at first, through the copy once it is there, and by range without a copy. Over loopback and
from a server written to be right rather than fast, these rates tell what our own part costs, and
nothing of any network.

Exits with 1 when the stores differ, when the extraction failed or had to be started again, when a
value was read that is not the folder's, or when a local copy is read at less than MIN_COPY_SHARE of
the folder's rate.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
from pictures import write_pictures
from reporting import ROOT, Bound, Machine, Report, significant

from sam3cache.features import ObjectPath, open_store, verify_store
from sam3cache.features.mirror import CACHE_VARIABLE
from sam3cache.features.places import files_below
from sam3cache.features.receipts import FOLDED_FILE, SEAL_COPY, SEAL_FILE

if TYPE_CHECKING:
    from sam3cache.features import FeatureStore, Place

sys.path.insert(0, str(ROOT / "tests"))
from s3_server import S3Server, running_server

NUM_KILLS, NUM_IMAGES = 30, 240
QUICK_KILLS, QUICK_IMAGES = 3, 48
LONGEST_PAUSE_S = 2.0
MIN_COPY_SHARE = 0.9
ROUNDS, QUICK_ROUNDS = 5, 2
PATIENCE_S = 3600.0
LEVEL = "fpn_72"
BUCKET = "features"


def command(pictures: Path, store: str) -> list[str]:
    """Return the command that extracts pictures into a store."""
    return [
        *(sys.executable, "-m", "sam3cache", "extract", str(pictures), "-o", store),
        *("--backbone", "sam3-mini", "--levels", f"{LEVEL},image_1008"),
        *("--devices", "cpu:2", "--json"),
    ]


def num_written(server: S3Server) -> int:
    """Return how many shards and receipts have reached the server, each counted once.

    Leases are renewed however far the extraction is, and what a kill cuts off comes again.
    """
    puts = {line for line in server.requests() if line.startswith("PUT ")}
    return sum("/c/" in line or "/receipts/" in line for line in puts)


def extract_among_kills(
    pictures: Path, store: str, server: S3Server, num_kills: int, num_puts: int, folder: Path
) -> tuple[int, int, float, str]:
    """Extract onto the server, killing it evenly over the requests that it takes to do so.

    Args:
        pictures: to extract.
        store: its URL.
        server: runs at the beginning, and at the end.
        num_kills: how often to kill it.
        num_puts: requests that an extraction makes at least.
        folder: for what the extraction prints.

    Returns:
        Kills while it ran, its exit code, its seconds, and what it printed that is no progress.
    """
    chance = random.Random(0)
    output = folder / "extract.txt"
    begun_s = time.monotonic()
    num_killed = 0
    with output.open("wb") as file:
        process = subprocess.Popen(
            command(pictures, store),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, **server.environment},
        )
    try:
        while process.poll() is None and time.monotonic() - begun_s < PATIENCE_S:
            due = 1 + num_killed * num_puts / num_kills
            if num_killed < num_kills and num_written(server) >= due:
                # Anywhere within the next requests, or between them.
                time.sleep(chance.uniform(0.0, 0.1))
                if process.poll() is None:
                    server.kill()
                    num_killed += 1
                    time.sleep(chance.uniform(0.0, LONGEST_PAUSE_S))
                    server.start()
            time.sleep(0.02)
    finally:
        process.kill()
    exit_code = process.wait()
    text = output.read_text(encoding="utf-8")
    progress = ("Checking: ", "Extracting: ")
    told = [line for line in text.splitlines() if not line.startswith(progress)]
    return num_killed, exit_code, time.monotonic() - begun_s, "\n".join(told)


def differences(one: Place, other: Place) -> list[str]:
    """Name the files below levels/ and labels/ that two stores do not share."""

    def names(root: Place) -> set[str]:
        below = files_below(root, leave_out="claims")
        return {name for name in below if name.startswith(("levels/", "labels/"))}

    both = names(one) & names(other)
    found = {name for name in both if (one / name).read_bytes() != (other / name).read_bytes()}
    return sorted(found | (names(one) ^ names(other)))


def unseal(root: ObjectPath) -> None:
    """Make a store one that has no seal, and so no local copy; all of it is there."""
    (root / FOLDED_FILE).write_bytes((root / SEAL_FILE).read_bytes())
    (root / SEAL_FILE).unlink()
    (root / SEAL_COPY).unlink()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for the length of the ``with``."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Reading:
    """Reads all samples of a store in random order, and compares them with the folder's."""

    def __init__(self, reference: Path) -> None:
        self._reference = open_store(reference)
        self._chance = random.Random(1)
        self.rates: dict[str, list[float]] = {}
        self.num_wrong = 0

    def take(self, name: str, opened: Callable[[], FeatureStore]) -> None:
        """Open a store, read it, and note the images a second, fetching included."""
        rows = [sample.row for sample in self._reference.samples]
        self._chance.shuffle(rows)
        out = np.empty_like(self._reference.read(LEVEL, rows[0]))
        store = opened()
        begun_s = time.perf_counter()
        store.fetch(rows, [LEVEL], None)
        elapsed_s = time.perf_counter() - begun_s
        for row in rows:
            # What is compared meanwhile is not in the time.
            out.fill(np.nan)
            begun_s = time.perf_counter()
            store.read_into(LEVEL, row, out)
            elapsed_s += time.perf_counter() - begun_s
            self.num_wrong += not np.array_equal(out, self._reference.read(LEVEL, row))
        self.rates.setdefault(name, []).append(len(rows) / elapsed_s)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Kill, compare, read."""
    machine = Machine("cpu")
    pictures = write_pictures(folder / "pictures", options.images)
    reference = folder / "reference.zarr"
    subprocess.run(command(pictures, str(reference)), check=True, capture_output=True)
    store = ObjectPath(f"s3://{BUCKET}/angio.zarr")
    # Of each block: a shard and a receipt of two levels and the masks, and a receipt of its facts.
    num_puts = 7 * -(-options.images // 16)
    (folder / "server").mkdir()
    with running_server(folder / "server") as server, environment(server.environment):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        num_killed, exit_code, elapsed_s, told = extract_among_kills(
            pictures, str(store), server, options.kills, num_puts, folder
        )
        different = differences(store, reference)
        findings = verify_store(store).findings
        reading = Reading(reference)
        for turn in range(options.rounds):
            with environment({CACHE_VARIABLE: str(folder / f"cache-{turn}")}):
                reading.take("a folder", lambda: open_store(reference))
                reading.take("`s3://`, local copy empty", lambda: open_store(store))
                reading.take("`s3://`, local copy there", lambda: open_store(store))
            shutil.rmtree(folder / f"cache-{turn}")
        unseal(store)
        reading.take("`s3://`, by range, no copy", lambda: open_store(store, allow_unsealed=True))
    return _report(
        options, machine, reading, (num_killed, exit_code, elapsed_s, told), different, findings
    )


def _report(
    options: argparse.Namespace,
    machine: Machine,
    reading: Reading,
    run: tuple[int, int, float, str],
    different: Sequence[str],
    findings: Sequence[Any],
) -> Report:
    num_killed, exit_code, elapsed_s, told = run
    rates = {name: median(found) for name, found in reading.rates.items()}
    folder_rate = rates["a folder"]
    share = rates["`s3://`, local copy there"] / folder_rate
    notes = [
        f"The server was killed {num_killed} times during one extraction of {options.images} "
        f"images ({elapsed_s:.0f} s): {len(different)} files below levels/ and labels/ differ "
        f"from those in a folder, and `store verify` has {len(findings)} findings.",
        "Rates: every sample once, in random order, by one thread, checksums included; moto's "
        "server, over loopback.",
    ]
    if exit_code:
        notes.append(f"The extraction ended with {exit_code}: {told}")
    return Report(
        program="objects",
        columns=("level `fpn_72` read from", "images/s", "of the folder's"),
        rows=[
            (name, significant(rate), significant(rate / folder_rate))
            for name, rate in rates.items()
        ],
        notes=notes,
        bounds=[
            Bound("files that differ from the folder's: 0", len(different), not different),
            Bound("findings of verify: 0", len(findings), not findings),
            Bound("the extraction ends by itself with 0", exit_code, exit_code == 0),
            Bound(f"kills while it runs: {options.kills}", num_killed, num_killed == options.kills),
            Bound("wrong values read: 0", reading.num_wrong, not reading.num_wrong),
            Bound(
                f"a local copy is read at {MIN_COPY_SHARE} of the folder's rate or more",
                share,
                share >= MIN_COPY_SHARE,
            ),
        ],
        figures={"images_per_s": reading.rates, "elapsed_s": elapsed_s, "kills": num_killed},
        settings={"images": options.images, "kills": options.kills, "rounds": options.rounds},
        machine=machine.fields(),
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Example: python benchmarks/objects.py --json benchmarks/results",
    )
    parser.add_argument("--kills", type=int, help=f"how many; {NUM_KILLS} unless --quick")
    parser.add_argument("--images", type=int, help=f"how many; {NUM_IMAGES} unless --quick")
    parser.add_argument("--quick", action="store_true", help="under a minute, instead of some")
    parser.add_argument("--workdir", type=Path, help="folder for the stores, 4 GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    options = parser.parse_args(arguments)
    options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.kills is None:
        options.kills = QUICK_KILLS if options.quick else NUM_KILLS
    if options.images is None:
        options.images = QUICK_IMAGES if options.quick else NUM_IMAGES
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program."""
    options = parse_options(arguments)
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        report = measure(options, Path(folder))
    return report.publish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())
