"""docs/heads.md is kept true: its code runs, and its tables are those of the code."""

import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from store_builder import build_store

from sam3cache.commands import main
from sam3cache.heads import HEADS, build_head, describe_head
from sam3cache.training.loss import LOSSES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = re.findall(r"^    (sam3cache .*)$", DOCUMENT, re.MULTILINE)
FULL = {
    "fpn_72": (256, 72, 72),
    "fpn_144": (256, 144, 144),
    "fpn_288": (256, 288, 288),
    "image_1008": (1, 1008, 1008),
}


def rows(title: str) -> list[list[str]]:
    """The cells of the table whose first column has a title."""
    table = DOCUMENT.split(f"\n| {title} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def keywords(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    only = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "num_classes"]
    return {p.name: p.default for p in only}


def test_its_table_of_heads_is_complete_and_its_sizes_are_right() -> None:
    table = {re.match(r"`([\w-]+)`", row[0])[1]: row for row in rows("head")}  # type: ignore[index]
    assert set(table) == set(HEADS)
    for name, (_, reads, _, parameters, gflop, _) in table.items():
        head = build_head(name, FULL)
        total = describe_head(head, FULL)["total"]
        assert set(re.findall(r"(?:fpn|image)_\d+", reads)) == set(head.needs)
        assert parameters == f"{total.parameters:,}"
        assert gflop == (f"{total.gflop:.1f}" if total.gflop > 1 else f"{total.gflop:.3f}")


def test_its_table_of_options_is_complete() -> None:
    table = {row[0].strip("`"): row for row in rows("option")}
    options = {name: keywords(head) for name, head in HEADS.items()}
    assert set(table) == {option for of_head in options.values() for option in of_head}
    for option, (_, heads, default, _) in table.items():
        having = {name for name in HEADS if option in options[name]}
        told = set(re.findall(r"`([\w-]+)`", heads))
        assert (set(HEADS) - told if heads.startswith("all but") else told) == having
        values = {str(options[name][option]).lower() for name in having}
        assert default.replace("[", "(").replace("]", ")") in values | (
            {"all there are"} if values == {"none"} else set()
        )


def test_its_table_of_losses_is_complete() -> None:
    table = {row[0].strip("`"): row for row in rows("loss")}
    assert [*table] == [*LOSSES]
    for name, row in table.items():
        told = {
            option: float(value) for option, value in re.findall(r"`(\w+)` \(([\d.]+)\)", row[2])
        }
        assert told == keywords(LOSSES[name])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store, and the page's head beside it."""
    shapes = {"fpn_72": (8, 12, 12), "image_1008": (1, 168, 168)}
    build_store(tmp_path / "features/angio.zarr", num_samples=12, level_shapes=shapes)
    (module,) = [block for block in BLOCKS if "class Dilated" in block]
    (tmp_path / "my_heads.py").write_text(module, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_heads", raising=False)
    return tmp_path


def test_its_code_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in BLOCKS:
        exec(compile(block, "docs/heads.md", "exec"), {"__name__": "heads_page"})
    said = capsys.readouterr().out
    assert re.search(r"^total +[\d,]+ +\d+\.\d\d GFLOP$", said, re.MULTILINE)
    assert "my_heads:Dilated: reads fpn_72; logits (2, 12, 12)" in said
    assert "angles: change a probability by" in said


def test_its_commands_run(place: Path) -> None:
    for command in COMMANDS:
        if "--label-set" in command:  # of a set that this store does not have
            continue
        _, *words = shlex.split(command)
        if words[0] == "train":
            words += ["--epochs", "1", "--loss-size", "63"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, f"{command}: {result.output}"
