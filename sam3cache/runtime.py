"""The machine a command runs on: its devices, memory, threads, files and installed versions.

And the place of this process among those that a launcher has started on it and on others.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from sam3cache.errors import ConfigError

TEMPORARY_SUFFIX = ".partial"
REPORTED_PACKAGES = ("sam3cache", "sam3", "torch", "torchvision", "zarr", "numpy")

_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))]
)

_DISK_PIECE_BYTES = 32 * 2**20

_CGROUP_LISTING, _CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FILE_CACHES = ("active", "inactive")

# Windows refuses to replace a file that a reader or a virus scanner has open at that moment.
_REPLACE_PATIENCE_S = 5.0 if os.name == "nt" else 0.0
_REPLACE_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device is called, and its memory.

    Attributes:
        name: as its driver calls it.
        total_bytes: all memory of the device; for the CPU, of the machine, or what a container or
            a scheduler grants of it.
        free_bytes: what could be allocated now, by any process.
    """

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Rank:
    """The place of a process among those that a launcher has started with one command.

    Attributes:
        number: among all of them, from 0.
        num_processes: how many they are, on every machine together.
        local_number: among those on this machine, from 0.
        num_local: how many they are on this machine.
        has_own_devices: whether the launcher shows each process no devices but its own.
        num_cores: logical cores that the launcher grants the process; None where it does not say.
    """

    number: int = 0
    num_processes: int = 1
    local_number: int = 0
    num_local: int = 1
    has_own_devices: bool = False
    num_cores: int | None = None

    def own_devices(self, devices: Sequence[str]) -> list[str]:
        """Share devices out among the processes of this machine, at least one each."""
        if self.has_own_devices:
            return list(devices)
        own = devices[self.local_number :: self.num_local]
        return list(own or devices[self.local_number % max(1, len(devices)) :][:1])


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """Return the place that torchrun, srun or an array of SLURM jobs gives this process.

    What a launcher in the job script starts counts within its element of an array. A job script
    by itself, outside srun, is one process, however many tasks its job may have.

    Args:
        environment: variables as those launchers set them.

    Raises:
        ConfigError: when a variable is no number, or the rank is not below the number of processes.
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        number, num_processes = _rank_of(environment, "RANK", "WORLD_SIZE")
        local_number, num_local = 0, 1
        if {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= environment.keys():
            local_number, num_local = _rank_of(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank = Rank(number, num_processes, local_number, num_local)
    # Only srun says how many tasks its step has; SLURM_NTASKS is there in the job script, too.
    elif {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        number, num_processes = _rank_of(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        num_local = _num_tasks_of_node(environment)
        num_cores = _number(environment, "SLURM_CPUS_PER_TASK", 0)
        if not num_cores and (on_node := _number(environment, "SLURM_CPUS_ON_NODE", 0)):
            num_cores = max(1, on_node // num_local)
        rank = Rank(
            number,
            num_processes,
            _number(environment, "SLURM_LOCALID", 0),
            num_local,
            "SLURM_GPUS_PER_TASK" in environment,
            num_cores or None,
        )
    else:
        rank = Rank()
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        first, last, step, num_elements = (
            _number(environment, f"SLURM_ARRAY_TASK_{name}", default)
            for name, default in (("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
        )
        place, rest = divmod(_number(environment, "SLURM_ARRAY_TASK_ID", first) - first, step)
        # Of a list such as 1,3,7 nobody tells which places there are: each is on its own.
        if not rest and (last - first) // step + 1 == num_elements:
            rank = replace(
                rank,
                number=place * rank.num_processes + rank.number,
                num_processes=num_elements * rank.num_processes,
            )
    return rank


def _rank_of(environment: Mapping[str, str], number: str, total: str) -> tuple[int, int]:
    rank, num_processes = _number(environment, number, 0), _number(environment, total, 1)
    if rank >= num_processes:
        raise ConfigError(
            f"{number}={rank} is not below {total}={num_processes}: what launched this process "
            "sets both; unset both to run it alone"
        )
    return rank, num_processes


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not _is_index(text):
        raise ConfigError(
            f"{name}={text!r} is no number, as what launches several processes sets it: unset it "
            "to run this one alone"
        )
    return int(text)


def _num_tasks_of_node(environment: Mapping[str, str]) -> int:
    """Read how many tasks a step has on this node from a list by node, such as "2(x3),1"."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text, re.ASCII):
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not as srun sets it: 2(x3),1")
    counts: list[int] = []
    for num_tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(num_tasks)] * int(times or 1)
    return counts[min(_number(environment, "SLURM_NODEID", 0), len(counts) - 1)]


def parse_devices(text: str, known: str = "all, cpu, cpu:2, or CUDA devices as 0,1") -> list[str]:
    """Resolve what the user wrote into torch device names, a worker each.

    Args:
        text: "all" (every CUDA device, or one CPU worker where there is none; of several processes
            that a launcher has started on this machine, each gets its own), "cpu", "cpu:N" for N
            workers on the CPU, or CUDA devices as "0,1" or "cuda:0,cuda:1".
        known: what is said to be written instead of what is not known.

    Returns:
        "cpu" or "cuda:INDEX" in the order asked for; "cpu" once for each CPU worker.

    Raises:
        ConfigError: the text cannot be read, names a device twice, or one that is not there.
    """
    wanted = text.strip().lower()
    if wanted == "all":
        devices = [f"cuda:{index}" for index in range(num_cuda_devices())]
        return find_rank().own_devices(devices) or ["cpu"]
    if wanted == "cpu":
        return ["cpu"]
    if wanted.startswith("cpu:"):
        num_workers = wanted.removeprefix("cpu:")
        if not _is_index(num_workers) or int(num_workers) < 1:
            raise ConfigError(
                f"device {text!r} does not say how many CPU workers: write cpu:2 for two of them"
            )
        return ["cpu"] * int(num_workers)
    indices = [part.strip().removeprefix("cuda:") for part in wanted.split(",")]
    if not all(map(_is_index, indices)):
        raise ConfigError(f"device {text!r} is not known: write {known}")
    devices = [f"cuda:{int(index)}" for index in indices]
    for device in devices:
        if devices.count(device) > 1:
            raise ConfigError(f"device {device} is named twice in {text!r}: name each device once")
        _require_cuda(device)
    return devices


def pick_device(text: str = "auto") -> str:
    """Resolve the one device that a command runs on.

    Args:
        text: "auto" (the first CUDA device, or the CPU where there is none), "cpu", "cuda", or a
            CUDA device as "1" or "cuda:1".

    Returns:
        "cpu" or "cuda:INDEX".

    Raises:
        ConfigError: the text cannot be read, names several devices, or one that is not there.
    """
    wanted = text.strip().lower()
    if wanted == "auto":
        return parse_devices("all")[0]
    known = "auto, cpu, or a CUDA device as cuda:1"
    devices = parse_devices("cuda:0" if wanted == "cuda" else wanted, known)
    if len(devices) != 1 or wanted == "all":
        raise ConfigError(f"device {text!r} names several: this command runs on one: {known}")
    return devices[0]


def num_cuda_devices() -> int:
    """Count the CUDA devices that the installed torch can use; 0 for a CPU-only build."""
    import torch

    return torch.cuda.device_count()


def device_memory(device: str) -> DeviceMemory:
    """Report a device's name and memory.

    A CUDA device is initialised by the question, which takes some hundred megabytes of it for
    as long as this process lives.

    Args:
        device: "cpu" or "cuda:INDEX", as ``parse_devices`` gives them.
    """
    if device == "cpu":
        import psutil

        memory = psutil.virtual_memory()
        total_bytes, free_bytes = [int(memory.total)], [int(memory.available)]
        if sys.platform == "linux" and _CGROUP_LISTING.exists():
            listing = _CGROUP_LISTING.read_text(encoding="utf-8")
            for limit_bytes, left_bytes in cgroup_memory(listing, _CGROUP_MOUNT):
                total_bytes.append(limit_bytes)
                free_bytes.append(left_bytes)
        return DeviceMemory(cpu_name(), min(total_bytes), min(free_bytes))
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(torch.cuda.get_device_name(device), total, free)


def cgroup_memory(listing: str, mount: Path) -> list[tuple[int, int]]:
    """Report what Linux grants the control groups of a process, whose limits bind it together.

    Both versions are read, and every group up to the root, as each may have a limit. Inside a
    container the listed path is often the host's, and the container's own group is the root. See
    "cgroup-v2" and "cgroup-v1/memory" in the Linux kernel's Admin Guide.

    Args:
        listing: text of /proc/self/cgroup.
        mount: folder that control groups are mounted on.

    Returns:
        By group with a limit: the limit, and what of it is not in use, in bytes. Cached files
        count as not in use, since they make room when memory is wanted.
    """
    memory = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            # Mounted on a folder of its own where version 1 holds the root.
            roots = [mount, mount / "unified"]
            names = ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            roots = [mount / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for root in roots:
            group = root / path.strip("/")
            for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
                memory.append(_group_memory(folder, *names))
    return [entry for entry in memory if entry is not None]


def _group_memory(folder: Path, limit: str, usage: str, prefix: str) -> tuple[int, int] | None:
    try:
        limit_text = (folder / limit).read_text(encoding="utf-8").strip()
        if limit_text == "max":
            return None
        used_bytes = int((folder / usage).read_text(encoding="utf-8"))
        statistics = (folder / "memory.stat").read_text(encoding="utf-8").split()
    except OSError:  # no such group here, or not for our eyes
        return None
    by_name = dict(zip(statistics[::2], statistics[1::2], strict=True))
    limit_bytes = int(limit_text)
    cached_bytes = sum(int(by_name.get(f"{prefix}{kind}_file", 0)) for kind in _FILE_CACHES)
    left_bytes = limit_bytes - used_bytes + cached_bytes
    return limit_bytes, min(max(left_bytes, 0), limit_bytes)


def used_memory_bytes(device: str) -> int:
    """Report what this process holds now: memory of a CUDA device, or resident memory for "cpu"."""
    if device == "cpu":
        import psutil

        return int(psutil.Process().memory_info().rss)
    import torch

    return torch.cuda.memory_reserved(device)


_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, a device's or the machine's.

    Of a device PyTorch says so by a type of its own; of the machine's memory, of pinned memory, and
    of what CUDA's libraries take themselves, by a ``RuntimeError``'s words.
    """
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def spare_memory() -> None:
    """Let Parquet tables take memory of the system's allocator, which gives it back.

    Arrow's own keeps tens of megabytes of what it once had. Of effect until pyarrow is imported,
    here and in processes that are started later; whoever has chosen otherwise is heeded.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def cpu_name() -> str:
    """Name the processor, as its maker does where the system tells."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cpu_cores() -> int:
    """Count the logical cores this process may use: an affinity mask counts, a quota does not.

    Cores are shared with the other processes that a launcher has started on this machine.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    rank = find_rank()
    if rank.num_cores is not None:
        # The mask may be the task's own already, if the launcher binds.
        return min(num_cores, max(1, rank.num_cores))
    return max(1, num_cores // rank.num_local)


def is_device_name(name: str) -> bool:
    """Return whether Windows takes a file's or folder's name for a device, whatever its suffix."""
    return name.partition(".")[0].rstrip().casefold() in _WINDOWS_DEVICES


def peak_memory_bytes() -> int:
    """Report the most memory that this process has held resident since it began.

    Where the system keeps no such record (neither Linux nor Windows), what it holds now.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        for line in status.splitlines():
            # VmHWM rather than getrusage: ru_maxrss starts from the parent's peak.
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


@dataclass(frozen=True, slots=True)
class DiskRates:
    """How fast a disk is, in bytes a second.

    Attributes:
        write: every piece flushed to the disk.
        read: while what was written is still in memory.
    """

    write: float
    read: float


def measure_disk(folder: Path, *, size_bytes: int = 256 * 2**20, limit_s: float = 4.0) -> DiskRates:
    """Write to a disk and read it back; nothing of it stays.

    Args:
        folder: where; it exists.
        size_bytes: how much at most.
        limit_s: how long writing goes on at most.

    Raises:
        OSError: as the operating system has it (disk full, read-only folder).
    """
    piece = os.urandom(min(_DISK_PIECE_BYTES, size_bytes))
    written_bytes = read_bytes = 0
    with tempfile.TemporaryFile(dir=folder) as file:
        start_s = now_s = time.perf_counter()
        while written_bytes < size_bytes and now_s - start_s < limit_s:
            written_bytes += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            now_s = time.perf_counter()
        write_rate = written_bytes / (now_s - start_s)
        file.seek(0)
        start_s = time.perf_counter()
        while block := file.read(_DISK_PIECE_BYTES):
            read_bytes += len(block)
        return DiskRates(write_rate, read_bytes / (time.perf_counter() - start_s))


def size_text(size_bytes: float) -> str:
    """Write a number of bytes for people: 400 bytes, 9.3 MB, 275 TB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            amount = size_bytes / factor
            return f"{amount:.1f} {unit}" if amount < 99.95 else f"{amount:,.0f} {unit}"
    return f"{size_bytes:.0f} bytes"


def existing_folder(path: Path) -> Path:
    """Return the nearest folder, at or above a path, that exists: its disk is where it will be."""
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def set_num_threads(num_threads: int) -> None:
    """Bound the CPU threads of torch in this process, and of what it starts from now on."""
    import torch

    torch.set_num_threads(num_threads)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(num_threads)


def write_atomic(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` so that a crash leaves the old file or the new one, never a part.

    Args:
        path: where to write; its folder is made if it is missing.
        data: the whole content.

    Raises:
        OSError: as the operating system has it (disk full, read-only folder), naming ``path``; no
            temporary stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        for is_last in (False, True):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                replace_file(temporary, path)
                break
            except FileNotFoundError:
                # Somebody has tidied up: where files cannot be locked, nobody tells whose it is.
                if is_last:
                    raise
        _flush_folder(path.parent)
    except BaseException as error:
        # What ails the disk may well forbid this, too; the first failure is the one to tell.
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            # A full disk is noticed by a write, which does not know where it writes.
            error.filename, error.filename2 = str(path), None
        raise


def _flush_folder(folder: Path) -> None:
    """Make a rename durable; POSIX only, as NTFS journals renames and opens no folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file over another in one step; on Windows, wait a while for others to close it.

    Args:
        source: the file to rename.
        target: its new name, whether or not a file has it.

    Raises:
        OSError: as the operating system has it; on Windows a PermissionError comes after 5 s.
    """
    deadline_s = time.monotonic() + _REPLACE_PATIENCE_S
    while True:
        try:
            source.replace(target)
        except PermissionError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_REPLACE_PAUSE_S)
        else:
            return


def environment_fields() -> dict[str, str]:
    """List the versions that matter, to be written into what a command produces.

    Read from the installed metadata, so that nothing heavy is imported. A package that is not
    installed is left out.
    """
    fields = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        version = installed_version(package)
        if version is not None:
            fields[package] = version
    return fields


def installed_version(package: str) -> str | None:
    """Look up a package's installed version without importing it; None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _require_cuda(device: str) -> None:
    present = [f"cuda:{index}" for index in range(num_cuda_devices())]
    if device in present:
        return
    if present:
        raise ConfigError(f"device {device} is not there: this machine offers {', '.join(present)}")
    raise ConfigError(
        f"device {device} is not there: torch sees no CUDA device; "
        "use cpu, or run `sam3cache doctor` to learn why"
    )
