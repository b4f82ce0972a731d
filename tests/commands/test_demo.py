"""``sam3cache demo`` where it stops early; test_project_wheel.py walks a whole one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from worker_thread import one_process

from sam3cache.commands import demo as demo_module
from sam3cache.commands.demo import DICE_MISSED_EXIT_CODE, WHAT_IT_IS
from sam3cache.features import open_store
from sam3cache.heads.checkpoint import read_record

Invoke = Callable[..., Result]


def test_a_folder_in_use_is_refused_before_anything_is_drawn(invoke: Invoke, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    result = invoke("demo", tmp_path)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line == (
        f"sam3cache: error: {tmp_path} is not an empty folder; name one that does not exist yet, "
        f"such as {tmp_path}-2"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_demo_that_does_not_find_the_vessels_says_so_and_leaves_all_it_made(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Too little to learn from: one epoch, a step of them all.
    small = demo_module._Size(num_images=6, epochs=1, batch_size=6, duration="no time")
    monkeypatch.setattr(demo_module, "_QUICK", small)
    out = tmp_path / "demo"
    with one_process():
        result = invoke("demo", out, "--quick", "--device", "cpu", "--json")
    assert result.exit_code == DICE_MISSED_EXIT_CODE, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == f"{WHAT_IT_IS} Time on two cores: no time."
    assert "expected at least 0.65; run `sam3cache doctor`" in lines[-1]
    stages = [line.partition(":")[0] for line in lines[1:-1]]
    assert list(dict.fromkeys(stages)) == [
        "1/4 Drawing",
        "2/4 Extracting",
        "3/4 Training",
        "4/4 Measuring",
    ]
    summary = json.loads(result.stdout)
    assert summary["what_it_is"] == WHAT_IT_IS
    assert summary["reached"] is False
    assert summary["num_test_images"] == 1
    store = open_store(summary["store"])
    assert len(store.samples) == 6
    record = read_record(Path(summary["checkpoint"]))
    assert record.head == "film-detail"
    page = Path(summary["page"]).read_text(encoding="utf-8")
    assert "synthetic" in page
    assert "not how good SAM 3 is" in page


def test_unless_named_a_demo_goes_into_the_next_free_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = Path("sam3cache-demo")
    assert demo_module._next_free(folder) == folder
    folder.mkdir()
    Path("sam3cache-demo-2").mkdir()
    assert demo_module._next_free(folder) == Path("sam3cache-demo-3")
