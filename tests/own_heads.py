"""Heads of somebody's own: modules in the folder that a test works in."""

import sys
from pathlib import Path

import pytest


def write_head(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    """Write a module of heads, work in its folder, and forget what that adds to the path.

    Args:
        folder: of the test.
        monkeypatch: of the test.
        module: its name; imported modules stay, so that each test takes another.
        source: its code.
    """
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
