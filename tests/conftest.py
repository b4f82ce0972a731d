"""What all tests share: when to skip, how many threads, and two ways to call the program."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

# Before torch is imported, and inherited by the processes that tests start. Two halves of the suite
# with two threads each wait for each other on two cores, and burn both while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SKIPPED_UNLESS_SELECTED = {
    "full_size": "full-size tower: minutes and 5 GB; select with -m full_size",
    "long": "real processes killed many times, whole demos: minutes in all; select with -m long",
}

LONGEST = (
    "test_loop.py",
    "test_together.py",
    "test_readme.py",
    "test_extract_tower.py",
    "test_extract_faults.py",
    "test_benchmarks.py",
    "test_inference.py",
)

RunCli = Callable[..., subprocess.CompletedProcess[str]]
Invoke = Callable[..., Result]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this selection is not for, and say why; begin with what is long."""
    # Where files are shared out among processes, none shall start its longest at the end.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for marker, reason in SKIPPED_UNLESS_SELECTED.items():
        if marker not in config.option.markexpr:
            skip = pytest.mark.skip(reason=reason)
            for item in items:
                if marker in item.keywords:
                    item.add_marker(skip)
    needs_gpu = [item for item in items if "gpu" in item.keywords]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """Run the program in a process of its own, in ``tmp_path``."""

    def run(*args: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sam3cache", *map(str, args)],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout_s,
        )

    return run


@pytest.fixture
def invoke() -> Invoke:
    """Run the program inside this process, which is quicker; an unforeseen exception is raised."""

    def run(*args: str | Path) -> Result:
        from sam3cache.commands import main

        return CliRunner().invoke(main, [*map(str, args)], catch_exceptions=False)

    return run
