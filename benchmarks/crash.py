"""What is left of a store whose extraction is killed, again and again, and what a full disk does.

Real ``sam3cache extract`` processes write stores of small pictures, with one to three workers, and
one or two launches at once. At random moments a worker or a launch is killed (SIGKILL; on Windows
TerminateProcess), the command is run again, and so on until the store is sealed: while it starts,
while blocks are written, while the store is sealed, while its tower computes.

A black box beside the store remembers what must be there: every receipt seen, and size, time of
change and SHA-256 of every file that a receipt names. In the end the store must be the same, byte
for byte, as one whose extraction nobody disturbed.

- lost: receipts seen once and gone later, or files that they name;
- corrupt: files that differ from their receipt, from what they were, or from the undisturbed store;
- computed twice: files written again although a receipt named them, and images that a run computed
  beyond those that lacked something when it began;
- blocks redone: blocks that a process had claimed, and that were not finished when it had ended.

Then, on Linux as root, the disk: at NUM_FILL_LEVELS levels of free space an extraction fills a
small file system until it stops, and once on one that turns read-only. It must end with one line
that says so, keep what was finished, and go on once there is space.

A kill is not a power failure: the operating system lives on, and writes what was handed to it.

Exits with 1 when anything was lost, corrupt or computed twice, when a killed process cost more
than two blocks (one in the tower, and one being written), when the workers of a killed launch lived
on for WORKER_END_S, or a launch that nobody killed failed or showed a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import crc32c
import psutil
from pictures import write_pictures
from reporting import Bound, Machine, Report, significant

BLOCK_ROWS = 16
NUM_KILLS, QUICK_KILLS = 200, 3
NUM_FILL_LEVELS, QUICK_FILL_LEVELS = 20, 1
# Those that are still importing learn of it when they have done so: long on a busy machine.
WORKER_END_S = 30.0
PATIENCE_S = 300.0
POLL_S = 0.01


@dataclass(frozen=True)
class Scene:
    """What is extracted, by how many, and how often they are killed before it is sealed."""

    name: str
    levels: str
    num_images: int
    workers: Sequence[int]
    num_launches: int
    num_kills: int


PICTURES = "image_1008"
TOWER = "image_1008,fpn_72"
SCENES = (
    Scene("pictures", PICTURES, 480, (1, 2, 3), 1, 8),
    Scene("pictures, two launches", PICTURES, 480, (1, 2), 2, 10),
    # The same number of workers always: threads a worker are part of what bit-identical means.
    Scene("sam3-mini's tower", TOWER, 48, (2,), 1, 5),
    Scene("sam3-mini's tower, two launches", TOWER, 48, (2,), 2, 5),
)
# By turn; without the tower a process spends most of its life at writing, where kills may hurt.
ORDER = (0, 1, 0, 1, 2, 0, 1, 0, 1, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, check, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine("cpu")
    chance = random.Random(options.seed)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(dir=options.workdir, prefix="sam3cache-") as folder:
        workshop = Workshop(Path(folder), small=options.quick)
        turn = 0
        while (num_kills := sum(t.num_kills for t in tallies.values())) < options.kills:
            scene = SCENES[ORDER[turn % len(ORDER)]]
            turn += 1
            tally = tallies.setdefault(scene.name, Tally())
            play(scene, workshop, tally, chance, options.kills - num_kills)
            print(f"turn {turn}, {scene.name}: {tally}", flush=True)
        disk = fill_disks(workshop, options.fill_levels)
    return report(options, machine, tallies, disk).publish(options.json)


@dataclass
class Tally:
    """What the kills of one scene came to."""

    num_kills: int = 0
    num_parents: int = 0
    num_processes: int = 0
    num_rounds: int = 0
    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    most_redone: int = 0
    end_s: list[float] = field(default_factory=list)
    moments: dict[str, int] = field(default_factory=dict)
    stray_bytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.num_kills} kills of {self.num_processes} processes, {len(self.lost)} lost, "
            f"{len(self.corrupt)} corrupt, {len(self.twice)} twice, {sum(self.redone)} redone, "
            f"{len(self.failed)} failed; {self.moments}"
        )


class Workshop:
    """Pictures to extract, and the undisturbed stores to compare with."""

    def __init__(self, folder: Path, *, small: bool) -> None:
        self.folder = folder
        self._small = small
        self._references: dict[tuple[str, int], Path] = {}

    def num_images(self, scene: Scene) -> int:
        """Return how many images a scene has: fewer when it must be quick."""
        return min(scene.num_images, 96) if self._small else scene.num_images

    def pictures(self, num_images: int) -> Path:
        """Return a folder with pictures of several shapes, masks and a manifest."""
        folder = self.folder / f"pictures-{num_images}"
        if folder.exists():
            return folder
        splits = ("train", "train", "val", "test")
        return write_pictures(folder, num_images, seed=num_images, splits=splits)

    def command(self, store: Path, levels: str, num_images: int, num_workers: int) -> list[str]:
        """Return the command that extracts into ``store``."""
        return [
            *(sys.executable, "-m", "sam3cache", "extract"),
            *(str(self.pictures(num_images)), "-o", str(store), "--levels", levels),
            *("--backbone", "sam3-mini", "--devices", f"cpu:{num_workers}", "--json"),
        ]

    def reference(self, levels: str, num_images: int, num_workers: int) -> Path:
        """Return the store that the same command writes when nobody disturbs it."""
        key = (levels, num_images)
        if key not in self._references:
            store = self.folder / f"reference-{len(self._references)}.zarr"
            command = self.command(store, levels, num_images, num_workers)
            subprocess.run(command, check=True, capture_output=True)
            self._references[key] = store
        return self._references[key]


class BlackBox:
    """Remembers, outside of a store, what its receipts said was done, and the files they named.

    It reads the store by docs/format.md alone.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._receipts: dict[tuple[str, int], dict[str, Any]] = {}
        self._files: dict[str, tuple[int, str]] = {}
        self._read: set[tuple[Path, int]] = set()
        self.lost: set[str] = set()
        self.corrupt: set[str] = set()
        self.twice: set[str] = set()

    def look(self) -> None:
        """Take in what is new; processes may be at work meanwhile."""
        for receipt in self._current(known=False).values():
            self._take(receipt)

    def done(self) -> dict[str, set[int]]:
        """Return the blocks that are done, by item."""
        done: dict[str, set[int]] = {}
        for item, block in self._receipts:
            done.setdefault(item, set()).add(block)
        return done

    def check(self, *, hashes: bool) -> None:
        """Compare all that was ever taken in with what is there now; nobody may be at work.

        Args:
            hashes: read every file again, rather than its time of change alone.
        """
        self.look()
        current = self._current(known=True)
        for key in self._receipts.keys() - current.keys():
            self.lost.add(f"receipt of {key[0]}, block {key[1]}")
        for receipt in current.values():
            self._take(receipt)
        for name, (mtime_ns, digest) in self._files.items():
            try:
                found_ns = (self._store / name).stat().st_mtime_ns
            except FileNotFoundError:
                self.lost.add(name)
                continue
            if found_ns != mtime_ns:
                self.twice.add(name)
            if (hashes or found_ns != mtime_ns) and _sha256(self._store / name) != digest:
                self.corrupt.add(name)

    def _take(self, receipt: dict[str, Any]) -> None:
        key = (receipt["item"], receipt["block"])
        if self._receipts.get(key, receipt) != receipt:
            self.twice.add(f"receipt of {key[0]}, block {key[1]}")
        if key in self._receipts:
            return
        self._receipts[key] = receipt
        for name, size_bytes, checksum, *_ in receipt["shards"]:
            path = self._store / name
            if not path.exists():
                self.lost.add(name)
                continue
            mtime_ns, data = path.stat().st_mtime_ns, path.read_bytes()
            if (len(data), crc32c.crc32c(data)) != (size_bytes, checksum):
                self.corrupt.add(name)
            self._files[name] = (mtime_ns, hashlib.sha256(data).hexdigest())

    def _current(self, *, known: bool) -> dict[tuple[str, int], dict[str, Any]]:
        """Read the receipts, single or folded; a single one is the newer.

        Args:
            known: also those that were read before.
        """
        found: dict[tuple[str, int], dict[str, Any]] = {}
        single = list((self._store / "receipts").glob("*/*.json"))
        # In this order: a seal is in place before single receipts go, and folded by renaming.
        for path in (*single, self._store / "complete.json", self._store / "receipts/folded.json"):
            try:
                version = (path, path.stat().st_mtime_ns)
                if not known and version in self._read:
                    continue
                content = json.loads(path.read_bytes())
            except FileNotFoundError:
                continue
            self._read.add(version)
            for receipt in content.get("receipts", [content]):
                receipt.pop("sha256", None)  # of the others, in single ones alone
                if receipt["rows"]:  # else it takes an older one back
                    found.setdefault((receipt["item"], receipt["block"]), receipt)
        return found


@dataclass
class Launch:
    """A running ``sam3cache extract``."""

    process: psutil.Popen
    output: Path
    started_s: float
    num_workers_killed: int = 0
    killed: bool = False

    @classmethod
    def start(cls, command: Sequence[str], output: Path) -> Launch:
        """Start the command; what it prints goes to ``output``."""
        with output.open("wb") as out, output.with_suffix(".err").open("wb") as err:
            process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        return cls(process, output, time.monotonic())

    def runs(self) -> bool:
        """Return whether it has not ended yet."""
        return self.process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes, those that are still starting too."""
        try:
            children = self.process.children()
            return [child for child in children if _is_worker(child)]
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return int(self.process.wait(PATIENCE_S))

    def complaint(self) -> str:
        """Return what it wrote to stderr, without progress."""
        text = self.output.with_suffix(".err").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not re.match(r"(Check|Extract)ing: ", line)]
        return "\n".join(lines)


def play(
    scene: Scene, workshop: Workshop, tally: Tally, chance: random.Random, max_kills: int
) -> None:
    """Extract one store, killing as often as the scene says, and check what became of it."""
    tally.num_rounds += 1
    num_images = workshop.num_images(scene)
    num_blocks = -(-num_images // BLOCK_ROWS)
    num_items = len(scene.levels.split(",")) + 2
    reference = workshop.reference(scene.levels, num_images, scene.workers[-1])
    folder = Path(tempfile.mkdtemp(dir=workshop.folder, prefix="round-"))
    store = folder / "x.zarr"
    box = BlackBox(store)
    launches: list[Launch] = []
    num_kills = 0
    num_launched = 0

    def command() -> list[str]:
        return workshop.command(store, scene.levels, num_images, chance.choice(scene.workers))

    def is_sealed() -> bool:
        return (store / "complete.json").exists()

    def num_done() -> int:
        return sum(map(len, box.done().values()))

    def has_done(num_wanted: int) -> bool:
        return num_done() >= min(num_wanted, num_items * num_blocks)

    def living_workers() -> list[psutil.Process]:
        return [worker for launch in launches for worker in launch.workers()]

    try:
        while num_kills < min(scene.num_kills, max_kills) and not is_sealed():
            for launch in [launch for launch in launches if not launch.runs()]:
                launches.remove(launch)
                judge(launch, tally)
            while len(launches) < scene.num_launches:
                launches.append(Launch.start(command(), folder / f"{num_launched}.json"))
                num_launched += 1
            wants_parent = chance.random() < 0.4
            moment = chance.choices(("starting", "computing", "writing"), (0.2, 0.3, 0.5))[0]
            if num_kills == scene.num_kills - 1:
                moment = "sealing"
            if moment == "starting":
                wait_for(lambda: False, launches, box, chance.uniform(0.0, 4.0))
            elif moment == "computing":
                wait_for(lambda: any(map(held_blocks, living_workers())), launches, box)
                time.sleep(chance.uniform(0.0, 1.0))
            elif moment == "writing":
                num_wanted = 1 + num_done()
                wait_for(partial(has_done, num_wanted), launches, box)
                time.sleep(chance.uniform(0.0, 0.1))
            else:
                # Only a parent seals, and does so within some tens of milliseconds.
                wants_parent = True
                wait_for(partial(has_done, num_items * num_blocks), launches, box)
                time.sleep(chance.uniform(0.0, 0.1))
            living = [launch for launch in launches if launch.runs()]
            if not living:
                continue
            launch = chance.choice(living)
            if wants_parent:
                kill_parent(launch, box, num_blocks, tally)
            if wants_parent or kill_worker(launch, box, num_blocks, tally, chance):
                num_kills += 1
                tally.num_kills += 1
                tally.moments[moment] = tally.moments.get(moment, 0) + 1
                if not any(launch.runs() for launch in launches):
                    box.check(hashes=False)
                    tally.stray_bytes = max(tally.stray_bytes, stray_bytes(store))
        for launch in launches:
            launch.wait()
            judge(launch, tally)
    except BaseException:
        for launch in launches:
            launch.process.kill()
        raise
    finish(command(), folder, store, box, tally, num_images, scene)
    tally.lost += sorted(box.lost)
    tally.corrupt += sorted(box.corrupt | differences(reference, store))
    tally.twice += sorted(box.twice)
    if not tally.lost + tally.corrupt + tally.twice + tally.failed:
        _remove(folder)


def finish(
    command: Sequence[str],
    folder: Path,
    store: Path,
    box: BlackBox,
    tally: Tally,
    num_images: int,
    scene: Scene,
) -> None:
    """Run the command until it says that all is done: once, since nobody disturbs it now."""
    box.check(hashes=False)
    done = box.done()
    level_items = [f"levels.{name}" for name in scene.levels.split(",")]
    num_lacking = sum(
        min(BLOCK_ROWS, num_images - BLOCK_ROWS * block)
        for block in range(-(-num_images // BLOCK_ROWS))
        if any(block not in done.get(item, set()) for item in level_items)
    )
    launch = Launch.start(command, folder / "last.json")
    launch.wait()
    judge(launch, tally)
    box.check(hashes=True)
    try:
        result = json.loads(launch.output.read_bytes())
    except ValueError:
        return  # It failed, and was judged.
    if not result["sealed"] or result["num_samples"] != num_images:
        tally.lost.append(f"the last run left {result['num_samples']} samples, {store}")
    if result["num_computed"] != num_lacking:
        tally.twice.append(f"{result['num_computed']} images computed, {num_lacking} lacking")


def wait_for(
    happened: Callable[[], bool],
    launches: Sequence[Launch],
    box: BlackBox,
    timeout_s: float = PATIENCE_S,
) -> None:
    """Watch a store until something happens, every launch has ended, or time is up."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and any(launch.runs() for launch in launches):
        box.look()
        if happened():
            return
        time.sleep(POLL_S)


def kill_worker(
    launch: Launch, box: BlackBox, num_blocks: int, tally: Tally, chance: random.Random
) -> bool:
    """Kill a worker of a launch, and count the block that it was at; False if there was none."""
    workers = launch.workers()
    if not workers:
        return False
    worker = chance.choice(workers)
    try:
        # It stands still while we look what it holds, and is killed in that moment of its life.
        worker.suspend()
        held = held_blocks(worker)
        box.look()
        redone = held & unfinished(box, num_blocks)
        worker.kill()
    except psutil.NoSuchProcess:
        return False
    launch.num_workers_killed += 1
    tally.num_processes += 1
    tally.redone.append(len(redone))
    tally.most_redone = max(tally.most_redone, len(redone))
    return True


def kill_parent(launch: Launch, box: BlackBox, num_blocks: int, tally: Tally) -> None:
    """Kill a launch, wait for its workers to end by themselves, count what they were at."""
    workers = launch.workers()
    held: dict[int, set[int]] = {worker.pid: set() for worker in workers}
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            # They stand still until it is dead: they would be gone before we have looked.
            worker.suspend()
            held[worker.pid] = held_blocks(worker)
    launch.process.kill()
    launch.killed = True
    killed_s = time.monotonic()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.resume()
    while living := [worker for worker in workers if worker.is_running()]:
        for worker in living:
            with suppress(psutil.NoSuchProcess):
                held[worker.pid] |= held_blocks(worker)
        if time.monotonic() - killed_s > PATIENCE_S:
            raise TimeoutError(f"workers {living} outlived their parent by {PATIENCE_S} s")
    launch.wait()
    tally.end_s.append(time.monotonic() - killed_s)
    box.look()
    left = unfinished(box, num_blocks)
    redone = [len(blocks & left) for blocks in held.values()]
    tally.num_parents += 1
    tally.num_processes += 1 + len(workers)
    tally.redone.append(sum(redone))
    tally.most_redone = max([tally.most_redone, *redone])


def held_blocks(worker: psutil.Process) -> set[int]:
    """Return the blocks whose claim a process holds."""
    try:
        paths = [Path(file.path) for file in worker.open_files()]
    except (psutil.Error, FileNotFoundError):  # it is just ending, or gone
        return set()
    return {int(path.stem) for path in paths if path.parent.name == "claims"}


def unfinished(box: BlackBox, num_blocks: int) -> set[int]:
    """Return the blocks of which some item is not done; facts of the samples come last."""
    return set(range(num_blocks)) - box.done().get("samples", set())


def judge(launch: Launch, tally: Tally) -> None:
    """Note a launch that ended badly although nobody killed it, or showed a traceback."""
    complaint = launch.complaint()
    if "Traceback" in complaint:
        tally.failed.append(complaint)
        return
    # 4: another launch is at work on the rest.
    if launch.process.poll() not in (0, 4) and not launch.killed:
        tally.failed.append(f"exit code {launch.process.poll()}: {complaint}")


def differences(reference: Path, store: Path) -> set[str]:
    """Name the files of two stores that are not the same; locks mean nothing."""
    ours, theirs = _tree(store), _tree(reference)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def _tree(store: Path) -> dict[str, str]:
    return {
        path.relative_to(store).as_posix(): _sha256(path)
        for path in store.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def stray_bytes(store: Path) -> int:
    """Return what temporary files of killed writers take."""
    return sum(path.stat().st_size for path in store.rglob("*.partial"))


@dataclass
class Disk:
    """What full disks came to.

    Attributes:
        skipped: why nothing was tried, or empty.
        lines: what each run said in the end.
        free_bytes: by run, the space it was left.
        num_kept: by run, the blocks finished before space ran out.
    """

    skipped: str = ""
    lines: list[str] = field(default_factory=list)
    free_bytes: list[int] = field(default_factory=list)
    num_kept: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def fill_disks(workshop: Workshop, num_levels: int) -> Disk:
    """Let extractions run out of space at several levels, and once out of permission to write."""
    disk = Disk()
    if num_levels == 0:
        return Disk("not asked for")
    num_images = 96
    reference = workshop.reference(PICTURES, num_images, 2)
    needed_bytes = sum(path.stat().st_size for path in reference.rglob("*"))
    for number in range(num_levels + 1):
        with small_disk(workshop.folder / "disk", 4 * needed_bytes) as (folder, why_not):
            if why_not:
                return Disk(why_not)
            # The last level is just below enough; then comes the disk that turns read-only.
            free_bytes = int(needed_bytes * (number + 0.1) / num_levels)
            turns_read_only = number == num_levels
            run_out(workshop, disk, folder, num_images, None if turns_read_only else free_bytes)
            store = folder / "x.zarr"
            different = sorted(differences(reference, store))
            disk.bad += [f"{disk.lines[-1]}: {name}" for name in different]
    return disk


def run_out(
    workshop: Workshop, disk: Disk, folder: Path, num_images: int, free_bytes: int | None
) -> None:
    """Extract onto a small disk that others fill meanwhile, give way, and extract again."""
    store, ballast = folder / "x.zarr", folder / "ballast"
    box = BlackBox(store)
    if free_bytes is None:
        # A run's lock is open all the time, on a disk that no mount would turn read-only so.
        claims = workshop.folder / "claims"
        claims.mkdir(exist_ok=True)
        store.mkdir(exist_ok=True)
        (store / "claims").symlink_to(claims)
    command = workshop.command(store, PICTURES, num_images, 2)
    launch = Launch.start(command, workshop.folder / "disk.json")
    # Workers are there once it has been decided that everything will fit.
    wait_for(lambda: bool(launch.workers()), [launch], box)
    if free_bytes is None:
        wait_for(lambda: bool(box.done()), [launch], box)
        while _mount("-o", "remount,ro", str(folder)) and launch.runs():
            time.sleep(0.001)  # Refused as long as a file is open for writing.
    else:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, psutil.disk_usage(str(folder)).free - free_bytes)
    status = launch.wait()
    lines = launch.complaint().splitlines() or [""]
    disk.lines.append(lines[-1].replace(str(folder), "…"))
    disk.free_bytes.append(-1 if free_bytes is None else free_bytes)
    expected = "Read-only file system" if free_bytes is None else "No space left on device"
    # Before it: what was forecast.
    told = "sam3cache: error: " in lines[-1] and expected in lines[-1] and str(store) in lines[-1]
    noise = [line for line in lines[:-1] if re.search("error|Traceback|Warning", line)]
    if status != 1 or not told or noise:
        disk.bad.append(f"exit code {status}: " + "\n".join(lines))
    if free_bytes is None:
        _mount("-o", "remount,rw", str(folder))
    else:
        ballast.unlink()
    box.check(hashes=True)
    disk.num_kept.append(len(box.done().get("samples", ())))
    again = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    box.check(hashes=True)
    disk.bad += sorted(box.lost | box.corrupt | box.twice)
    if again.returncode:
        disk.bad.append(f"run again: {again.stderr}")


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[tuple[Path, str]]:
    """Mount a file system in memory; yields its folder, and why it could not be mounted."""
    folder.mkdir(exist_ok=True)
    if sys.platform != "linux":
        yield folder, "only Linux mounts a small disk in memory"
        return
    refused = _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
    if refused:
        yield folder, f"no small disk can be mounted here ({refused})"
        return
    try:
        yield folder, ""
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*options: str) -> str:
    result = subprocess.run(["mount", *options], capture_output=True, text=True, encoding="utf-8")
    return result.stderr.strip() if result.returncode else ""


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in part for part in process.cmdline())
    except psutil.Error:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def report(
    options: argparse.Namespace, machine: Machine, tallies: Mapping[str, Tally], disk: Disk
) -> Report:
    """Lay out what was found."""
    whole = Tally()
    rows = []
    for name, tally in tallies.items():
        rows.append(_row(name, tally))
        for attribute in ("num_kills", "num_parents", "num_processes", "num_rounds"):
            setattr(whole, attribute, getattr(whole, attribute) + getattr(tally, attribute))
        for attribute in ("lost", "corrupt", "twice", "failed", "redone", "end_s"):
            getattr(whole, attribute).extend(getattr(tally, attribute))
        whole.most_redone = max(whole.most_redone, tally.most_redone)
        whole.stray_bytes = max(whole.stray_bytes, tally.stray_bytes)
        for moment, number in tally.moments.items():
            whole.moments[moment] = whole.moments.get(moment, 0) + number
    rows.append(_row("all", whole))
    for kind in ("lost", "corrupt", "twice", "failed"):
        for finding in getattr(whole, kind):
            print(f"{kind}: {finding}", file=sys.stderr)
    for finding in disk.bad:
        print(f"disk: {finding}", file=sys.stderr)
    moments = ", ".join(f"{number} while {name}" for name, number in sorted(whole.moments.items()))
    notes = [
        f"{whole.num_kills} kills ({whole.num_parents} of a launch, whose workers end by "
        f"themselves; {moments}) over {whole.num_rounds} stores. A kill is not a power failure: "
        "what the operating system had taken over still reaches the disk."
    ]
    if disk.skipped:
        notes.append(f"Full disks: {disk.skipped}.")
    else:
        notes.append(
            f"Disks that filled up at {len(disk.lines) - 1} levels, and one that turned read-only: "
            f"{len(disk.bad)} findings; {min(disk.num_kept)} to {max(disk.num_kept)} of 6 blocks "
            "were finished by then, and kept."
        )
    bounds = [
        Bound(f"nothing is {what}", len(found), not found)
        for what, found in (
            ("lost", whole.lost),
            ("corrupt", whole.corrupt),
            ("computed twice", whole.twice),
        )
    ]
    end_s = max(whole.end_s, default=0.0)
    bounds += [
        Bound(
            "a killed process costs at most two blocks", whole.most_redone, whole.most_redone <= 2
        ),
        Bound(
            f"workers end within {WORKER_END_S:g} s of their parent", end_s, end_s <= WORKER_END_S
        ),
        Bound("no launch fails that was not killed", len(whole.failed), not whole.failed),
    ]
    if not disk.skipped:
        claim = "a full disk is told in one line, costs nothing finished, and can be gone on from"
        bounds.append(Bound(claim, len(disk.bad), not disk.bad))
    return Report(
        program="crash",
        columns=(
            "killed while extracting",
            "kills",
            "processes ended",
            "lost",
            "corrupt",
            "computed twice",
            "blocks redone a kill",
        ),
        rows=rows,
        notes=notes,
        bounds=bounds,
        figures={
            "kills_by_moment": whole.moments,
            "blocks_redone": whole.redone,
            "worker_end_s": whole.end_s,
            "stray_bytes": whole.stray_bytes,
            "disk": {
                "free_bytes": disk.free_bytes,
                "blocks_kept": disk.num_kept,
                "lines": disk.lines,
            },
        },
        settings={
            "kills": options.kills,
            "seed": options.seed,
            "scenes": {scene.name: scene.levels for scene in SCENES},
        },
        machine=machine.fields(),
    )


def _row(name: str, tally: Tally) -> Sequence[str]:
    numbers = (tally.num_kills, tally.num_processes)
    found = (len(tally.lost), len(tally.corrupt), len(tally.twice))
    redone = significant(mean(tally.redone)) if tally.redone else ""
    return (name, *map(str, (*numbers, *found)), redone)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Example: python benchmarks/crash.py --json benchmarks/results",
    )
    parser.add_argument("--kills", type=int, help=f"how many; {NUM_KILLS} unless --quick")
    parser.add_argument("--quick", action="store_true", help="under a minute, instead of 20")
    parser.add_argument(
        "--fill-levels",
        type=int,
        help=f"disks to fill; {NUM_FILL_LEVELS} unless --quick. Needs Linux and root",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="folder for the stores, 2 GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    options = parser.parse_args(arguments)
    if options.kills is None:
        options.kills = QUICK_KILLS if options.quick else NUM_KILLS
    if options.fill_levels is None:
        options.fill_levels = QUICK_FILL_LEVELS if options.quick else NUM_FILL_LEVELS
    return options


if __name__ == "__main__":
    raise SystemExit(main())
