"""Checkpoints: what goes in comes out, and nothing that a file says is run."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_heads import write_head
from safetensors.torch import load_file, save_file

from sam3cache import runtime
from sam3cache.errors import CheckpointError, FingerprintError
from sam3cache.heads import (
    CheckpointInfo,
    build_head,
    check_fingerprints,
    load_checkpoint,
    save_checkpoint,
)
from sam3cache.heads.checkpoint import read_record
from sam3cache.records import Batch
from sam3cache.runtime import write_atomic

SHAPES = {"fpn_72": (8, 6, 6)}
LEVELS = {
    "fpn_72": {
        "shape": [8, 6, 6],
        "digest": "d1",
        "fields": {"weights_sha256": "aaa", "precision": "float16"},
    }
}
INFO = CheckpointInfo(
    head="film-conv",
    head_options={"widths": [6, 4]},
    num_classes=2,
    levels=LEVELS,
    label_set="mask",
    epoch=3,
    metrics={"val_dice": 0.5, "val_loss": None},
    settings={"learning_rate": 1e-4},
    seed=7,
    task="multiclass",
    classes=("LAD",),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Write a checkpoint of a small film-conv."""
    torch.manual_seed(0)
    head = build_head("film-conv", SHAPES, INFO.head_options, num_classes=2)
    save_checkpoint(tmp_path / "best", head, INFO)
    return tmp_path / "best"


def test_a_loaded_head_is_the_saved_one_to_the_bit(saved: Path) -> None:
    torch.manual_seed(0)
    original = build_head("film-conv", SHAPES, INFO.head_options, num_classes=2).eval()
    head, info = load_checkpoint(saved)
    assert dataclasses.replace(info, weights_sha256="") == INFO
    assert not head.training
    batch = Batch({"fpn_72": torch.randn(2, 8, 6, 6)}, torch.zeros(2, 2), torch.full((2, 2), 1008))
    with torch.no_grad():
        assert torch.equal(head(batch), original(batch))


def test_the_json_beside_the_weights_is_the_same_record(saved: Path) -> None:
    record = json.loads((saved / "checkpoint.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(dataclasses.asdict(read_record(saved))))
    assert record["sam3cache_version"]
    assert record["torch_version"] == str(torch.__version__)


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_else(saved: Path) -> None:
    head, info = load_checkpoint(saved)
    save_checkpoint(saved, head, dataclasses.replace(info, epoch=4))
    assert read_record(saved).epoch == 4
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "checkpoint.json"}


def test_a_checkpoint_from_before_there_were_tasks_is_one_of_planes(saved: Path) -> None:
    def forget(record: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        del record["task"], record["classes"]

    rewrite(saved, forget)
    _, info = load_checkpoint(saved)
    assert (info.task, info.classes) == ("multilabel", ())


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Write a checkpoint's weights and header again, changed."""
    record = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    weights = load_file(path / "model.safetensors")
    change(record, weights)
    save_file(weights, path / "model.safetensors", {"checkpoint": json.dumps(record)})


def remove(path: Path) -> None:
    (path / "model.safetensors").unlink()


def cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "model.safetensors").write_bytes(content)


def drop_the_record(path: Path) -> None:
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors")


def break_the_record(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file(weights, path / "model.safetensors", {"checkpoint": "{"})


def from_the_future(path: Path) -> None:
    rewrite(path, lambda record, _: record.update(format_version=99, something_new=1))


def unknown_field(path: Path) -> None:
    rewrite(path, lambda record, _: record.update(surprise=1))


def other_shape(path: Path) -> None:
    rewrite(path, lambda record, _: record["head_options"].update(widths=[6, 5]))


def other_options(path: Path) -> None:
    rewrite(path, lambda record, _: record["head_options"].update(colour="red"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove, r"no checkpoint at .*best: expected a folder with model.safetensors"),
        (cut, r"model.safetensors cannot be read"),
        (empty, r"model.safetensors cannot be read"),
        (flip_a_bit, r"the weights in .* are not those its record describes"),
        (drop_the_record, r"has no record of a trained head"),
        (break_the_record, r"has no record of a trained head"),
        (from_the_future, r"is of checkpoint format 99; this sam3cache reads 1"),
        (unknown_field, r"has no record of a trained head"),
        (other_shape, r"do not fit head film-conv: segmentation.* and 2 more"),
        (other_options, r"cannot be rebuilt: head film-conv has no option colour"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(
    saved: Path, damage: Callable[[Path], None], expected: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


@pytest.fixture
def users_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Write a checkpoint of a head that lies in a module in the working directory."""
    module = f"own_{abs(hash(tmp_path))}"
    source = "from sam3cache.heads.linear import Linear\nclass Net(Linear):\n    pass\n"
    write_head(tmp_path, monkeypatch, module, source)
    name = f"{module}:Net"
    info = dataclasses.replace(INFO, head=name, head_options={})
    save_checkpoint(tmp_path / "own", build_head(name, SHAPES, num_classes=2), info)
    del sys.modules[module]
    return tmp_path / "own", name


def test_a_users_own_head_is_not_imported_unless_named_again(
    users_checkpoint: tuple[Path, str],
) -> None:
    path, name = users_checkpoint
    with pytest.raises(CheckpointError, match=r"not imported unasked; .* with --head"):
        load_checkpoint(path)
    assert name.partition(":")[0] not in sys.modules
    head, info = load_checkpoint(path, head=name)
    assert type(head).__name__ == "Net"
    assert info.head == name


@pytest.mark.parametrize("named", ["linear", "own_else:Net"])
def test_a_checkpoint_is_not_loaded_as_another_head(saved: Path, named: str) -> None:
    with pytest.raises(CheckpointError, match=r"of head film-conv, not of"):
        load_checkpoint(saved, head=named)


def test_features_of_the_same_fingerprint_are_accepted_with_other_levels_beside_them() -> None:
    check_fingerprints(LEVELS, LEVELS | {"fpn_144": {"digest": "other", "fields": {}}})


def test_other_features_are_refused_field_by_field() -> None:
    other = {
        "fpn_72": {
            "digest": "d2",
            "fields": {"weights_sha256": "bbb", "precision": "float16", "mode": "squash"},
        }
    }
    with pytest.raises(
        FingerprintError, match=r"mode absent → squash; weights_sha256 aaa → bbb; use a store"
    ) as caught:
        check_fingerprints(LEVELS, other)
    assert "precision" not in str(caught.value)


def test_a_store_without_the_level_is_refused() -> None:
    with pytest.raises(FingerprintError, match=r"reads level fpn_72.*\(fpn_144\)"):
        check_fingerprints(LEVELS, {"fpn_144": {"digest": "d", "fields": {}}})


def test_a_checkpoint_that_windows_holds_open_for_a_moment_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, refusals = os.replace, [PermissionError(13, "Access is denied")]

    def refuse_once(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_once)
    monkeypatch.setattr(runtime, "_REPLACE_PATIENCE_S", 5.0)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not refusals
