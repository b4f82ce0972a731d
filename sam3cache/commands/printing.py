"""What commands share: lists in options, tables, and what is said of samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.errors import ConfigError
from sam3cache.runtime import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sam3cache.features.copying import CopyResult
    from sam3cache.records import SetAside


def names_of(option: str, text: str | None) -> list[str] | None:
    """Return the names of a comma-separated option; None when it was not given.

    Raises:
        ConfigError: when it names nothing.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option} {text!r} names nothing; write names with commas between them")
    return names


def label_sets_of(text: str | None) -> list[str] | None:
    """Return the names of ``--label-sets``, of which "none" means no masks at all."""
    names = names_of("--label-sets", text)
    return [] if names == ["none"] else names


def classes_text(classes: Sequence[str], task: str, num_shown: int | None = None) -> str:
    """Name the classes of a label set, with their numbers if it has some; or the first of them."""
    names = list(classes)
    if task == "multiclass":
        names = [f"{number} {name}" for number, name in enumerate(classes, 1)]
    if num_shown is None or len(names) <= num_shown:
        return ", ".join(names)
    return f"{', '.join(names[:num_shown])}, … ({len(names)} in all)"


def plain_console() -> Console:
    """Return a console for results: a path or sentence is one line, for whoever copies or greps it.

    Where nobody looks at a screen, tables are as wide as their numbers.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, markup=False, soft_wrap=True, width=width)


def table(*columns: str) -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def warn_of_samples(
    set_aside: Iterable[SetAside], leaks: Iterable[str] = (), num_moved: int = 0
) -> None:
    """List on stderr what could not be used, and what splits do to figures.

    Args:
        set_aside: samples, or rows, that could not be used.
        leaks: groups that are in more than one split.
        num_moved: samples that were in the training split and are no longer.
    """
    for aside in set_aside:
        click.echo(f"set aside: {aside.id} ({aside.source}): {aside.bare_reason}", err=True)
    for group in leaks:
        click.echo(f"warning: group {group} is in more than one split", err=True)
    if num_moved:
        click.echo(
            f"warning: {num_moved} samples were in the training split and are no longer; "
            "heads trained until now have seen them",
            err=True,
        )


def echo_json(result: Any) -> None:
    """Print a result's fields as JSON, with paths as text."""
    fields = {
        name: value.as_posix() if isinstance(value, Path) else value
        for name, value in asdict(result).items()
    }
    click.echo(json.dumps(fields, indent=2))


def print_copy(result: CopyResult, as_json: bool) -> None:
    """Say what a copy has made, with its warnings on stderr."""
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        echo_json(result)
        return
    earlier = result.num_samples + result.num_variants - result.num_copied
    copied = f"copied in {result.elapsed_s:.1f} s"
    if not result.num_copied:
        copied = "all of them there already"
    elif earlier:
        copied = f"{result.num_copied} {copied}, {earlier} before"
    masks = f", masks {', '.join(result.label_sets)}" if result.label_sets else ", no masks"
    variants = f" and {result.num_variants} variants" if result.num_variants else ""
    click.echo(f"{result.store}: {result.num_samples} samples{variants}, sealed; {copied}.")
    click.echo(f"Levels {', '.join(result.levels)}{masks}: {size_text(result.size_bytes)}.")
    if result.num_left_behind:
        click.echo(
            f"{result.num_left_behind} samples were set aside, and stayed behind: there is nothing "
            "of them to copy."
        )
