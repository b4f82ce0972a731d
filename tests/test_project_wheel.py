"""The wheel holds the whole package and nothing else, and runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sam3cache

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
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert held == modules | {"sam3cache/py.typed"}


def test_the_wheel_carries_our_licence_and_version(wheel: Path) -> None:
    dist_info = f"sam3cache-{sam3cache.__version__}.dist-info"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{dist_info}/licenses/LICENSE", f"{dist_info}/licenses/NOTICE"} <= held


def test_the_installed_wheel_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    # -P keeps the working directory off the path; PYTHONPATH comes before an editable install.
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import sam3cache; print(sam3cache.__file__)")).is_relative_to(installed)
    assert run("-m", "sam3cache", "--version").split() == ["sam3cache", sam3cache.__version__]
    assert "Usage: sam3cache phantom" in run("-m", "sam3cache", "phantom", "--help")
