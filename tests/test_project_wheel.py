"""The wheel holds the whole package and nothing else, and runs without the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest

import sam3cache
from sam3cache.commands import main
from sam3cache.commands.demo import MIN_DICE, WHAT_IT_IS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sam3cache"


def pip(*args: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing of it lands in the checkout."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "cli.py"):
        shutil.copy(ROOT / name, checkout)
    # The traps of the root: folders that setuptools would take for packages.
    for name in ("features", "checkpoints", "tests"):
        (checkout / name).mkdir()
        (checkout / name / "stray.py").touch()
    shutil.copytree(PACKAGE, checkout / "sam3cache", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".", cwd=checkout)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", site, wheel, cwd=site)
    return site


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".jinja", ".css", ".safetensors", ".json"}
    }
    assert "sam3cache/evaluation/report.html.jinja" in ours
    assert held == ours | {"sam3cache/py.typed"}


def test_the_wheel_carries_our_licence_and_version(wheel: Path) -> None:
    dist_info = f"sam3cache-{sam3cache.__version__}.dist-info"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{dist_info}/licenses/LICENSE", f"{dist_info}/licenses/NOTICE"} <= held


Run = Callable[..., str]


def without_network() -> list[str]:
    """Words before a command that take its network away; none where the system has no such way."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    words = [unshare, "--net", "--map-root-user"]
    works = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if works else []


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run Python on the installed wheel, in an empty folder."""
    # -P keeps the working directory off the path; PYTHONPATH comes before an editable install.
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def run(*args: str, before: Sequence[str] = ()) -> str:
        done = subprocess.run(
            [*before, sys.executable, *args],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_installed_wheel_runs_outside_the_checkout(installed: Path, run: Run) -> None:
    assert Path(run("-c", "import sam3cache; print(sam3cache.__file__)")).is_relative_to(installed)
    assert run("-m", "sam3cache", "--version").split() == ["sam3cache", sam3cache.__version__]
    assert "Usage: sam3cache phantom" in run("-m", "sam3cache", "phantom", "--help")


@pytest.mark.long
def test_the_demo_runs_from_the_wheel_in_an_empty_folder_without_a_network(
    run: Run, tmp_path: Path
) -> None:
    output = run(
        *("-m", "sam3cache", "demo", "a demo", "--quick", "--device", "cpu"),
        before=without_network(),
    )
    dice = re.search(r"^Dice (\d\.\d+) on \d+ synthetic angiograms", output, re.MULTILINE)
    assert dice is not None, output
    assert float(dice[1]) >= MIN_DICE == 0.65
    assert WHAT_IT_IS in output
    places = dict(re.findall(r"^(Store|Checkpoint|Page): +(.*?)(?:  \(|$)", output, re.MULTILINE))
    assert places.keys() == {"Store", "Checkpoint", "Page"}
    assert all((tmp_path / place).exists() for place in places.values())
    assert [path.name for path in tmp_path.iterdir()] == ["a demo"]
    page = (tmp_path / places["Page"]).read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    assert "not how good SAM 3 is" in page

    commands = re.findall(r"^  sam3cache (.*)$", output, re.MULTILINE)
    assert [line.split()[0] for line in commands] == [
        *("train", "eval", "train", "eval", "extract")
    ]
    for line in commands:
        name, *arguments = shlex.split(line)
        # Parsed, not run: an option that is not there would end this.
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, arguments)
