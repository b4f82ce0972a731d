"""The README is walked as it stands: every command in it is run, on less where it saves time."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from angiography import write_data
from click.testing import CliRunner
from worker_thread import one_process

from sam3cache.commands import COMMANDS, main

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
# The same work wherever it is done: test_project_wheel.py runs the one, from a wheel, in an empty
# folder, and test_doctor.py the other.
RUN_ELSEWHERE = {"sam3cache demo", "sam3cache doctor"}
SMALL_HEAD = {"embedding_dim": 16, "width": 8, "context_width": 8}
LINES = [line for kind, body in FENCES if kind == "bash" for line in body.splitlines() if line]


def smaller(line: str) -> list[str]:
    """Return a line's words, with less to do and a backbone that needs no weights."""
    line = re.sub(r"--num \d+", "--num 9", line)
    line = re.sub(r"--seeds \d+", "--seeds 2", line)
    if " train " in line:
        line = re.sub(r"--epochs \d+", "", line) + " --epochs 1 --loss-size 126"
        if "--head" not in line:
            line += "".join(f" --head-option {name}={size}" for name, size in SMALL_HEAD.items())
    if re.search(" (extract|plan) ", line) and "--backbone" not in line:
        line += " --backbone sam3-mini"
    if " plan " in line:
        line += " --no-time"
    return shlex.split(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    write_data(root).rename(root / "angio.csv")
    shutil.copy(REPOSITORY / "examples" / "angiography_columns.toml", root / "columns.toml")
    return root


@pytest.mark.parametrize("line", [line for line in LINES if line not in RUN_ELSEWHERE])
def test_every_command_of_the_readme_runs(place, line, monkeypatch):
    program, *arguments = smaller(line)
    assert program == "sam3cache"
    monkeypatch.chdir(place)
    with one_process():
        result = CliRunner().invoke(main, arguments)
    # One sample of the angiography group's has an impossible angle: exit code 3, as promised.
    expected = 3 if "extract angio.csv" in line else 0
    assert result.exit_code == expected, result.output


def test_the_readme_walks_every_command():
    assert {line.split()[1] for line in LINES} == set(COMMANDS)


def test_commands_that_are_not_run_here_are_those_of_installing_alone():
    others = [line for kind, body in FENCES if kind != "bash" for line in body.splitlines()]
    allowed = re.compile(
        r"make (demo|test|check)|python -m venv|\.venv[/\\]\w+[/\\](pip|python)( |$)"
    )
    assert [line for line in others if not allowed.match(line)] == []


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_every_link_leads_somewhere(link):
    assert (REPOSITORY / link).exists()
