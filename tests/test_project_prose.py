"""What the project says of itself stays true, and belongs to no one machine."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import sam3cache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

MACHINE_PATH = re.compile(
    r"(?<![\w.~/:<>-])/(root|home|work|mnt|opt|Users|tmp)/\w|[A-Z]:\\\\?Users"
)
REGISTRY = re.compile(r"index-url|find-links|pythonhosted|\bpypi\.org|download\.pytorch\.org")
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX)\b")


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    binary = {".png", ".jpg", ".tif", ".npy", ".npz", ".safetensors", ".zip", ".dcm"}
    files = [ROOT / name for name in names if Path(name).suffix not in binary]
    return [file for file in files if file.is_file() and file != Path(__file__)]


def lines_of_one_machine(text: str) -> list[str]:
    """Lines that name a machine's own path or a package registry, or that were left to do."""
    patterns = (MACHINE_PATH, REGISTRY, LEFTOVER)
    return [line for line in text.splitlines() if any(p.search(line) for p in patterns)]


def test_no_file_names_a_machines_paths_or_a_registry() -> None:
    found = {
        file.relative_to(ROOT).as_posix(): lines
        for file in tracked_text_files()
        if (lines := lines_of_one_machine(file.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "cd /home/anna/sam3cache",
        "python = '/opt/venv/bin/python'",
        r"C:\Users\anna\data",
        "pip install --extra-index-url https://example.org",
        "# TODO: mend this",
    ],
)
def test_a_line_of_one_machine_is_found(line: str) -> None:
    assert lines_of_one_machine(line) == [line]


@pytest.mark.parametrize(
    "line", ["see docs/work/plan.md", "https://example.org/home/page", "~/opt/x"]
)
def test_an_ordinary_line_is_left_alone(line: str) -> None:
    assert lines_of_one_machine(line) == []


def listed_dependencies(heading: str) -> list[str]:
    section = CONTRIBUTING.split(f"\n{heading}:\n\n")[1].split("\n\n")[0]
    return re.findall(r"^- `([\w-]+)`: \w", section, flags=re.MULTILINE)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=;~! \[]", requirement, maxsplit=1)[0] for requirement in requirements}


@pytest.mark.parametrize(
    ("heading", "requirements"),
    [
        ("To run", PROJECT["dependencies"]),
        ("To develop", PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_every_dependency_says_why_it_is_there(heading: str, requirements: list[str]) -> None:
    assert sorted(listed_dependencies(heading)) == sorted(names(requirements))


# Where a package is imported by another name, by sam3 alone, or not yet (None).
IMPORTED_AS = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "tensorboard": "torch.utils.tensorboard",
    "torchvision": None,
    "triton": None,
    "triton-windows": None,
}


@pytest.mark.parametrize("name", sorted(names(PROJECT["dependencies"])))
def test_every_dependency_is_used(name: str) -> None:
    module = IMPORTED_AS.get(name, name)
    if module is None:
        return
    imports = re.compile(rf"^\s*(import|from) {re.escape(module)}\b", re.MULTILINE)
    package = ROOT / "sam3cache"
    assert any(imports.search(file.read_text(encoding="utf-8")) for file in package.rglob("*.py"))


def test_torch_is_never_capped() -> None:
    torch = [line for line in PROJECT["dependencies"] if line.startswith(("torch>", "torchv"))]
    assert len(torch) == 2
    assert not any(re.search(r"<|~=|==|!=", line) for line in torch)


def test_the_changelog_tells_of_this_version_first() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)[:2] == [
        "Unreleased",
        sam3cache.__version__,
    ]


def test_the_version_is_written_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    pages = sorted((ROOT / page).glob("*.md")) if page == "docs" else [ROOT / page]
    for path in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
