import errno
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

import sam3cache
from sam3cache.commands import COMMANDS, LazyGroup
from sam3cache.errors import ConfigError, FingerprintError, NotAStoreError

HEAVY = {"torch", "torchvision", "numpy", "zarr", "sam3", "pyarrow", "PIL", "monai", "tensorboard"}


def run_raising(error: BaseException, *args: str) -> Result:
    """Run the group with a command that fails as told."""

    @click.command()
    def failing() -> None:
        raise error

    class Failing(LazyGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return failing

    group = Failing(
        "sam3cache", params=[click.Option(["--debug"], is_flag=True)], callback=lambda debug: None
    )
    return CliRunner().invoke(group, [*args, "failing"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (ConfigError("batch size 0: expected 1 to 16"), 2, "batch size 0: expected 1 to 16"),
        (NotAStoreError("features/a.zarr holds no store"), 1, "features/a.zarr holds no store"),
        (FingerprintError("differs:\n  level\n  size"), 1, "differs: level size"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "features/a.zarr"),
            1,
            "features/a.zarr: No space left on device; free some space, or write to another disk",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "features"),
            1,
            "features: Permission denied; check the permissions of the path, or choose another",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            1,
            "Read-only file system; write to a path that is not mounted read-only",
        ),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    error: BaseException, exit_code: int, line: str
) -> None:
    done = run_raising(error)
    assert done.exit_code == exit_code
    assert done.stderr == f"sam3cache: error: {line}\n"
    assert done.stdout == ""


def test_debug_shows_where_a_failure_came_from() -> None:
    done = run_raising(ConfigError("no"), "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "ConfigError: no" in done.stderr


@pytest.mark.parametrize("error", [KeyError("bug"), FileNotFoundError(errno.ENOENT, "gone", "x")])
def test_a_bug_is_not_dressed_up(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_raising(error)


def test_the_help_shows_the_road_and_every_command(invoke: Callable[..., Result]) -> None:
    done = invoke("--help")
    assert done.exit_code == 0
    for name, text in COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout
    assert done.stdout.index("sam3cache phantom") < done.stdout.index("sam3cache eval")


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    program = (
        "import sys\n"
        "from sam3cache.commands import main\n"
        f"main({args!r}, standalone_mode=False)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8"
    )
    assert "Usage:" in done.stdout
    assert done.stderr == "[]\n"


def test_an_unknown_command_is_refused(invoke: Callable[..., Result]) -> None:
    done = invoke("extrude")
    assert done.exit_code == 2
    assert "No such command 'extrude'" in done.stderr


def test_the_console_program_tells_its_version(
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"sam3cache {sam3cache.__version__}\n")
