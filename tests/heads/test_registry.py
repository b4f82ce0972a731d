"""Heads by name, and the one line for every name or class that cannot be used."""

import sys
from pathlib import Path

import pytest
import torch

from sam3cache.errors import HeadError
from sam3cache.heads import HEADS, build_head
from sam3cache.records import Batch

SHAPES = {"fpn_72": (8, 6, 6), "fpn_144": (4, 12, 12)}

USERS_HEADS = """
import torch
from torch import nn
from sam3cache.heads import Head

class Small(Head):
    needs = ("fpn_144",)
    def __init__(self, level_shapes, *, num_classes=1, width=4):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(level_shapes["fpn_144"][0], width, 1), nn.Conv2d(width, num_classes, 1))
    def forward(self, batch):
        return self.layer(self.feature(batch, "fpn_144"))

class Expects256(nn.Module):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
        self.layer = nn.Conv2d(256, num_classes, 1)
    def forward(self, batch):
        return self.layer(batch.levels["fpn_72"].float())

class OnePlane(nn.Module):
    needs = ("fpn_72",)
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__()
    def forward(self, batch):
        return batch.levels["fpn_72"][:, 0].float()

class Asserts(Small):
    def __init__(self, level_shapes, *, num_classes=1):
        super().__init__(level_shapes, num_classes=num_classes)
        assert num_classes > 5, "many classes"

class Undefined(Small):
    def forward(self, batch):
        return somewhere(batch)

class NoNeeds(nn.Module):
    pass

class NoModule:
    needs = ("fpn_72",)
"""


@pytest.fixture
def users_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module of heads into the working directory; its name is new in every test."""
    name = f"heads_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(USERS_HEADS, encoding="utf-8")
    (tmp_path / f"{name}_broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / f"{name}_asserts.py").write_text("assert not __name__", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("name", HEADS)
def test_every_registered_head_can_be_built_for_any_number_of_channels(name: str) -> None:
    shapes = SHAPES | {"image_1008": (1, 84, 84)}
    assert build_head(name, shapes, num_classes=2).needs[0] == "fpn_72"


def test_a_users_own_head_is_found_in_the_working_directory(users_heads: str) -> None:
    head = build_head(f"{users_heads}:Small", SHAPES, {"width": 7}, num_classes=3)
    assert head.describe() == {"layer": 4 * 7 + 7 + 7 * 3 + 3, "total": 4 * 7 + 7 + 7 * 3 + 3}
    batch = Batch(
        {"fpn_144": torch.zeros(2, 4, 12, 12)}, torch.zeros(2, 2), torch.full((2, 2), 1008)
    )
    assert head(batch).shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "unet",
            {},
            r"no head is named 'unet'; take one of film-detail, film-conv, film-pyramid, linear",
        ),
        (":Net", {}, r"no head is named ':Net'"),
        ("film-conv", {"depth": 3}, r"film-conv has no option depth; it takes embedding_dim"),
        ("film-conv", {"widths": 3}, r"film-conv cannot be built with options \{'widths': 3\}"),
        ("no_such_module:Net", {}, r"no_such_module:Net cannot be imported: ModuleNotFoundError"),
        ("MINE_broken:Net", {}, r"cannot be imported: SyntaxError"),
        ("MINE_asserts:Net", {}, r"cannot be imported: AssertionError"),
        ("MINE:Asserts", {}, r"cannot be built with options \{\}: AssertionError: many classes"),
        ("MINE:Undefined", {}, r"does not fit the features .*: NameError: name 'somewhere'"),
        ("MINE:Nothing", {}, r"cannot be imported: AttributeError"),
        ("MINE:NoNeeds", {}, r"is no head: expected a torch.nn.Module class with `needs`"),
        ("MINE:NoModule", {}, r"is no head"),
        ("MINE:torch", {}, r"is no head"),
        ("MINE:Expects256", {}, r"does not fit the features fpn_72 \(8, 6, 6\): RuntimeError"),
        ("MINE:OnePlane", {}, r"returned \(1, 6, 6\) .* expected logits of shape \(1, 1, H, W\)"),
    ],
)
def test_a_head_that_cannot_be_used_is_refused_in_one_line(
    users_heads: str, name: str, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(HeadError, match=expected) as caught:
        build_head(name.replace("MINE", users_heads), SHAPES, options)
    assert "\n" not in str(caught.value)


def test_a_level_that_is_not_there_is_named_with_what_to_extract() -> None:
    with pytest.raises(HeadError, match=r"needs fpn_72.*\(fpn_144\).*--levels fpn_144,fpn_72"):
        build_head("linear", {"fpn_144": (4, 12, 12)})


def test_building_leaves_the_head_in_training_mode() -> None:
    assert build_head("film-conv", SHAPES).training
