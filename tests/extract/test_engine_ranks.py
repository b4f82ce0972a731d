"""Several processes of one launch: who they are, what each does, and who seals the store."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from equal_stores import require_equal
from picture_folder import write_images
from worker_thread import one_process

from sam3cache import runtime
from sam3cache.errors import ConfigError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract import run as run_module
from sam3cache.extract.sharing import WholeCount, next_blocks
from sam3cache.extract.worker import BlockTask
from sam3cache.features import BlockClaims, SampleRow, is_sealed
from sam3cache.features.locks import locks_work
from sam3cache.runtime import Rank, find_rank

NUM_IMAGES = 50  # Four blocks, the last of two images.

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_CPUS_ON_NODE": "24",
}
ARRAY = {
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_ID": "14",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_MAX": "16",
    "SLURM_ARRAY_TASK_STEP": "2",
}
IN_A_JOB_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(5, 8, 1, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, Rank(5, 8, 0, 1)),
        ({"RANK": "5"}, Rank()),
        (SRUN, Rank(4, 7, 0, 3, num_cores=8)),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "6"}, Rank(4, 7, 0, 3, num_cores=6)),
        (
            {**SRUN, "SLURM_GPUS_PER_TASK": "2"},
            Rank(4, 7, 0, 3, has_own_devices=True, num_cores=8),
        ),
        (IN_A_JOB_SCRIPT, Rank()),
        ({**IN_A_JOB_SCRIPT, **ARRAY}, Rank(2, 4)),
        ({**SRUN, **ARRAY}, Rank(2 * 7 + 4, 4 * 7, 0, 3, num_cores=8)),
        ({**SRUN, **TORCHRUN}, Rank(5, 8, 1, 4)),
        # --array=1,3,7: which of the three this one is cannot be told.
        (
            {
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "7",
            },
            Rank(),
        ),
    ],
)
def test_a_launcher_tells_a_process_its_place(environment: Mapping[str, str], rank: Rank) -> None:
    assert find_rank(environment) == rank


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({**TORCHRUN, "RANK": "one"}, r"RANK='one' is no number"),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8 is not below WORLD_SIZE=8"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, r"SLURM_STEP_TASKS_PER_NODE='many'"),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "all"}, r"SLURM_CPUS_PER_TASK='all' is no number"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment: Mapping[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_rank(environment)


@pytest.mark.parametrize(
    ("rank", "num_devices", "own"),
    [
        (Rank(), 2, [0, 1]),
        (Rank(1, 2, 0, 1), 2, [0, 1]),
        (Rank(1, 4, 1, 4), 4, [1]),
        (Rank(1, 2, 1, 2), 4, [1, 3]),
        (Rank(3, 4, 3, 4), 2, [1]),
        (Rank(3, 4, 3, 4, has_own_devices=True), 1, [0]),
        (Rank(1, 2, 1, 2), 0, []),
    ],
)
def test_the_devices_of_a_machine_are_shared_out(
    rank: Rank, num_devices: int, own: list[int]
) -> None:
    devices = [f"cuda:{index}" for index in range(num_devices)]
    assert rank.own_devices(devices) == [devices[index] for index in own]


def test_the_cores_of_a_machine_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    num_cores = runtime.num_cpu_cores()
    for name, value in {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert runtime.num_cpu_cores() == max(1, num_cores // 2)
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    for name, value in {**SRUN, "SLURM_CPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert runtime.num_cpu_cores() == 1


def test_blocks_are_shared_out_without_a_word_between_the_processes() -> None:
    blocks = [block for block in range(40) if block % 7]
    ranks = [Rank(number, 3) for number in range(3)]
    shares = [next_blocks(blocks, rank, claims_work=True) for rank in ranks]
    assert sorted(block for share in shares for block in share) == blocks
    assert shares == [next_blocks(blocks, rank, claims_work=False) for rank in ranks]
    # Whoever has done its own helps with those of the others, from different ends.
    left = [block for block in blocks if block % 3 == 1]
    help_of_0, help_of_2 = (next_blocks(left, ranks[number], claims_work=True) for number in (0, 2))
    # All of them, as whoever they belong to may never come.
    assert sorted(help_of_0) == sorted(help_of_2) == left
    assert help_of_0[0] != help_of_2[0]
    assert next_blocks([4], ranks[2], claims_work=True) == [4]
    # Where nothing can be claimed that would be done twice.
    assert next_blocks(left, ranks[0], claims_work=False) == []
    assert next_blocks(blocks, Rank(), claims_work=False) == blocks


def test_what_all_have_done_is_counted_by_receipts(tmp_path: Path) -> None:
    def receipt(item: str, block: int) -> Path:
        return tmp_path / "receipts" / item / f"{block:08d}.json"

    items = frozenset({"samples", "levels.a"})
    row = SampleRow(0, "s", "s.png", None, 1, 1, 1, 1, 1, "", "pending", "", None, None)
    rows = [replace(row, row=number) for number in range(64)]
    tasks = [
        BlockTask(block, items, tuple(rows[16 * block : 16 * block + size]), {}, {})
        for block, size in enumerate((16, 16, 16, 5))
    ]
    for item in items:
        receipt(item, 0).parent.mkdir(parents=True)
    # It is there, and yet the block is to be done: its shard is lost.
    receipt("levels.a", 2).touch()
    count = WholeCount(tmp_path, tasks)
    assert (count.num_rows, count.num_done()) == (37, 0)
    receipt("levels.a", 3).touch()
    receipt("samples", 3).touch()
    receipt("samples", 1).touch()
    assert count.num_done() == 0, "a disk is not looked through again at once"
    count._due_s = 0.0
    assert count.num_done() == 5
    # Sealing takes the receipts away.
    receipt("samples", 3).unlink()
    count._due_s = 0.0
    assert count.num_done() == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("ranks") / "pictures", NUM_IMAGES)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Path]:
    """The store of one process."""
    with one_process():
        yield extract(config(folder, "alone.zarr")).store


def config(folder: Path, name: str) -> ExtractConfig:
    return ExtractConfig(folder, folder.parent / name, levels=("image_1008",), backbone="sam3-mini")


def test_the_last_of_a_launch_seals_and_the_others_say_so(
    folder: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, invoke
) -> None:
    store = folder.parent / "together.zarr"
    arguments = ("extract", folder, "-o", store, "--levels", "image_1008")
    arguments += ("--backbone", "sam3-mini", "--devices", "cpu")
    monkeypatch.setattr(run_module, "_MAX_PAUSES", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    store.mkdir()
    claims = BlockClaims(store)
    with one_process():
        # As if the other were at work on its two blocks.
        with claims.claim(0) as ours, claims.claim(2) as ours_too:
            assert ours
            assert ours_too
            monkeypatch.setenv("RANK", "1")
            second = invoke(*arguments)
        assert (second.exit_code, second.stderr) == (0, "")
        (line,) = second.stdout.splitlines()
        assert line.startswith(f"{store}: process 2 of 2 is done: 18 images computed in ")
        assert line.endswith("; others are at work on the store, and the last one seals it.")
        assert not is_sealed(store)
        monkeypatch.setenv("RANK", "0")
        first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    assert f"{store}: {NUM_IMAGES} samples, sealed; 32 computed in" in first.stdout
    assert "Extracting: 32/32 images" in first.stderr
    require_equal(store, alone)


def test_an_element_of_an_array_can_have_a_store_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke
) -> None:
    folder = write_images(tmp_path / "pictures", num_images=2)
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    arguments = ("extract", folder, "--levels", "image_1008", "-o")
    with one_process():
        shared = invoke(*arguments, tmp_path / "shared.zarr")
        own = invoke(*arguments, tmp_path / "own.zarr", "--alone")
    # The third of four is silent about how far it is; one that is alone is not.
    assert (shared.exit_code, shared.stderr) == (0, "")
    assert own.exit_code == 0
    assert "2 images to compute" in own.stderr
    store = tmp_path / "own.zarr"
    assert is_sealed(store)
    assert f"{store}: 2 samples, sealed" in own.stdout


def test_a_process_does_the_blocks_of_one_that_never_comes(folder: Path, alone: Path) -> None:
    with one_process():
        wanted = replace(config(folder, "deserted.zarr"), rank=Rank(1, 3))
        result = extract(wanted)
    assert (result.sealed, result.num_computed) == (True, NUM_IMAGES)
    require_equal(result.store, alone)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_torchrun_starts_two_that_share_a_store(folder: Path, alone: Path, tmp_path: Path) -> None:
    store = tmp_path / "torchrun.zarr"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "sam3cache", "extract", str(folder), "-o", str(store)]
    done = subprocess.run(
        [*command, "--backbone", "sam3-mini", "--levels", "image_1008"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{NUM_IMAGES} images to compute") == 1, "one of them talks"
    assert f"{store}: {NUM_IMAGES} samples, sealed" in done.stdout
    require_equal(store, alone)


# The program, where flock fails in each of its processes as on a file system without locks.
WITHOUT_LOCKS = """
import ctypes, struct, sys
FLOCK, FAIL, ALLOW = 73, 0x00050000, 0x7FFF0000
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, FAIL | int(sys.argv[1])),
         (0x06, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0, ctypes.get_errno()
exec(sys.argv[2])
"""


def run_without_locks(
    number: int, code: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("calls of the system are forbidden by number, as Linux on x86-64 has them")
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_LOCKS, str(number), code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_noticed(tmp_path: Path, number: int) -> None:
    assert locks_work(tmp_path)
    code = """
from pathlib import Path
from sam3cache.errors import StoreBusyError
from sam3cache.features import BlockClaims, store_lock
store = Path(sys.argv[3])
with store_lock(store):
    claims = BlockClaims(store)
    with claims.claim(3) as ours, claims.at_work():
        print(claims.work, ours, claims.free([3]))
    try:
        with store_lock(store, timeout_s=0.1):
            pass
    except StoreBusyError as error:
        print(error)
with store_lock(store):
    print("free again")
"""
    done = run_without_locks(number, code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, busy, last = done.stdout.splitlines()
    assert (first, last) == ("False True [3]", "free again")
    assert busy.endswith(f"(is it gone? then delete {tmp_path / 'claims' / 'store.held'})")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_without_locks_each_does_its_own_blocks_and_the_last_seals(
    folder: Path, alone: Path
) -> None:
    store = folder.parent / "without_locks.zarr"
    code = "from sam3cache.commands import main; main(sys.argv[3:])"
    arguments = ["extract", str(folder), "-o", str(store), "--levels", "image_1008"]
    arguments += ["--backbone", "sam3-mini", "--devices", "cpu"]
    outputs = []
    for rank in ("1", "0"):
        done = run_without_locks(errno.ENOSYS, code, *arguments, RANK=rank, WORLD_SIZE="2")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "process 2 of 2 is done: 18 images computed" in outputs[0]
    assert "sealed; 32 computed in" in outputs[1]
    require_equal(store, alone)
