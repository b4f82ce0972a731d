import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from sam3cache import runtime
from sam3cache.errors import ConfigError

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.mark.parametrize(
    ("text", "devices"),
    [("cpu", ["cpu"]), (" CPU ", ["cpu"]), ("cpu:1", ["cpu"]), ("cpu:3", ["cpu", "cpu", "cpu"])],
)
def test_cpu_workers_are_counted_out(text: str, devices: list[str]) -> None:
    assert runtime.parse_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not known"),
        ("gpu", "not known"),
        ("cuda", "not known"),
        ("0,cpu", "not known"),
        ("-1", "not known"),
        ("0;1", "not known"),
        ("cpu:0", "how many CPU workers"),
        ("cpu:two", "how many CPU workers"),
        ("99", "cuda:99 is not there"),
        ("cuda:99", "cuda:99 is not there"),
        ("²", "not known"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        runtime.parse_devices(text)


@NO_CUDA
def test_without_cuda_all_is_the_cpu() -> None:
    assert runtime.parse_devices("all") == ["cpu"]
    assert runtime.pick_device() == "cpu"


@NO_CUDA
def test_without_cuda_the_refusal_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="use cpu, or run `sam3cache doctor`"):
        runtime.pick_device("cuda")


@pytest.mark.gpu
def test_with_cuda_all_is_every_device() -> None:
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert runtime.parse_devices("all") == devices
    assert runtime.parse_devices(",".join(devices)) == devices
    assert runtime.pick_device() == runtime.pick_device("cuda") == runtime.pick_device("0")
    with pytest.raises(ConfigError, match="named twice"):
        runtime.parse_devices("0,cuda:0")
    memory = runtime.device_memory("cuda:0")
    assert 0 < memory.free_bytes <= memory.total_bytes


@pytest.mark.parametrize("text", ["cpu:2", "all"])
def test_one_device_is_one(text: str) -> None:
    with pytest.raises(ConfigError, match="names several"):
        runtime.pick_device(text)


def test_the_cpu_has_the_memory_of_the_machine_or_of_its_container() -> None:
    memory = runtime.device_memory("cpu")
    assert memory.name
    assert memory.total_bytes <= psutil.virtual_memory().total
    assert 0 < memory.free_bytes < memory.total_bytes


# Files of a control group: limit, use, and cached files that make room when memory is wanted.
V2 = ("memory.max", "memory.current", "anon 1\ninactive_file {}\nactive_file 20\n")
V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "inactive_file 3\ntotal_inactive_file {}\ntotal_active_file 20\n",
)


@pytest.mark.parametrize(
    ("listing", "groups", "expected"),
    [
        ("0::/a/b\n", {"a/b": (V2, "1000", 400, 0)}, [(1000, 620)]),
        ("0::/a/b\n", {"a/b": (V2, "1000", 400, 150)}, [(1000, 770)]),
        ("0::/a/b\n", {"a/b": (V2, "max", 400, 0)}, []),
        (
            "0::/a/b\n",
            {"a/b": (V2, "max", 400, 0), "a": (V2, "700", 500, 0)},
            [(700, 220)],
        ),
        ("0::/docker/abc\n", {"": (V2, "800", 950, 0)}, [(800, 0)]),
        ("0::/../outside\n", {"": (V2, "800", 300, 0)}, [(800, 520)]),
        ("0::/\n", {"": (V2, "800", 300, 0)}, [(800, 520)]),
        ("0::/\n", {}, []),
        ("", {}, []),
        ("0::/a\n", {"unified/a": (V2, "800", 300, 0)}, [(800, 520)]),
        (
            "4:memory:/job/1\n3:cpuset:/\n0::/\n",
            {"memory/job/1": (V1, "2000", 500, 100), "memory": (V1, "9000", 6000, 0)},
            [(2000, 1620), (9000, 3020)],
        ),
        ("9:name=systemd:/memory\n", {"memory": (V1, "1", 0, 0)}, []),
        ("4:memory:/of/the/host\n", {"memory": (V1, "2000", 500, 0)}, [(2000, 1520)]),
    ],
)
def test_a_control_group_grants_what_is_left_of_its_limit(
    tmp_path: Path,
    listing: str,
    groups: dict[str, tuple[tuple[str, str, str], str, int, int]],
    expected: list[tuple[int, int]],
) -> None:
    for path, (names, limit, used_bytes, cache_bytes) in groups.items():
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n", encoding="utf-8")
        (folder / names[1]).write_text(f"{used_bytes}\n", encoding="utf-8")
        (folder / "memory.stat").write_text(names[2].format(cache_bytes), encoding="utf-8")
    assert runtime.cgroup_memory(listing, tmp_path / "cgroup") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has control groups")
def test_the_memory_of_the_cpu_ends_at_the_limit_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "listing").write_text("0::/job\n", encoding="utf-8")
    (tmp_path / "job").mkdir()
    for name, text in (("max", "50000\n"), ("current", "20000\n"), ("stat", "inactive_file 1\n")):
        (tmp_path / "job" / f"memory.{name}").write_text(text, encoding="utf-8")
    monkeypatch.setattr(runtime, "_CGROUP_LISTING", tmp_path / "listing")
    monkeypatch.setattr(runtime, "_CGROUP_MOUNT", tmp_path)
    memory = runtime.device_memory("cpu")
    assert (memory.total_bytes, memory.free_bytes) == (50_000, 30_001)


def test_the_peak_remembers_what_was_given_back() -> None:
    # In a process of its own: what other tests held and gave back may hide a rise in this one.
    code = """
from sam3cache import runtime
before_bytes = runtime.peak_memory_bytes()
block = bytearray(b"x") * 2**28
del block
print(runtime.peak_memory_bytes() - before_bytes)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) >= 2**27


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(before[0])
    os.environ.clear()
    os.environ.update(before[1])


@pytest.mark.usefixtures("_threads")
def test_threads_are_bounded_here_and_in_what_is_started() -> None:
    runtime.set_num_threads(1)
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_the_environment_names_versions_and_leaves_out_what_is_absent() -> None:
    fields = runtime.environment_fields()
    assert set(runtime.REPORTED_PACKAGES) <= set(fields)
    assert fields["torch"] == torch.__version__.partition("+")[0] or "+" in fields["torch"]
    assert runtime.installed_version("no-such-package-at-all") is None


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    return source, target


def test_a_file_takes_the_place_of_another(two_files: tuple[Path, Path]) -> None:
    source, target = two_files
    runtime.replace_file(source, target)
    assert target.read_bytes() == b"new"
    assert not source.exists()


class _Refusals:
    """The operating system as it is on Windows while a file is open: it refuses, then renames."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_refusals: int) -> None:
        self.num_calls, self._num_refusals, self._rename = 0, num_refusals, os.replace
        monkeypatch.setattr(os, "replace", self._replace)

    def _replace(self, source: Path, target: Path) -> None:
        self.num_calls += 1
        if self.num_calls <= self._num_refusals:
            raise PermissionError(13, "Access is denied")
        self._rename(source, target)


def test_a_file_that_is_open_for_a_moment_is_waited_for_on_windows(
    two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_REPLACE_PATIENCE_S", 5.0)
    system = _Refusals(monkeypatch, num_refusals=2)
    runtime.replace_file(*two_files)
    assert system.num_calls == 3
    assert two_files[1].read_bytes() == b"new"


def test_a_file_that_stays_refused_is_not_waited_for_without_end(
    two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_REPLACE_PATIENCE_S", 0.1)
    system = _Refusals(monkeypatch, num_refusals=100)
    with pytest.raises(PermissionError):
        runtime.replace_file(*two_files)
    assert 2 <= system.num_calls < 20


@pytest.mark.skipif(os.name != "nt", reason="only Windows refuses to replace an open file")
def test_windows_replaces_a_file_once_its_reader_has_closed_it(
    two_files: tuple[Path, Path],
) -> None:
    reader = two_files[1].open("rb")
    closing = threading.Timer(0.5, reader.close)
    closing.start()
    runtime.replace_file(*two_files)
    closing.join()
    assert two_files[1].read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="Windows waits")
def test_elsewhere_a_refusal_is_final_at_once(
    two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = _Refusals(monkeypatch, num_refusals=1)
    with pytest.raises(PermissionError):
        runtime.replace_file(*two_files)
    assert system.num_calls == 1


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (400, "400 bytes"),
        (9_340, "9.3 kB"),
        (930_000, "930 kB"),
        (1.94e9, "1.9 GB"),
        (275.4e12, "275 TB"),
        (4e15, "4,000 TB"),
    ],
)
def test_bytes_read_as_people_say_them(size_bytes: float, text: str) -> None:
    assert runtime.size_text(size_bytes) == text
