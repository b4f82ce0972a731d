"""What commands have in common that work on stores in folders and on object stores."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from sam3cache.commands.progress import Bar, progress
from sam3cache.runtime import size_text

if TYPE_CHECKING:
    from sam3cache.features import Fetching, Place


def store_place(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> Place | None:
    """Read what names a store; the callback of an option or argument."""
    from sam3cache.features import place_of

    return None if text is None else place_of(text)


def show_fetching(stack: ExitStack) -> None:
    """Show what is fetched from an object store, until ``stack`` is left."""
    from sam3cache.features import watch_fetching

    bars = stack.enter_context(ExitStack())
    bar: Bar | None = None

    def show(state: Fetching) -> None:
        nonlocal bar
        if bar is None:
            there = (
                f"; {size_text(state.num_bytes_there)} are there" if state.num_bytes_there else ""
            )
            click.echo(
                f"Fetching {size_text(state.num_bytes_total)} of {state.store} into "
                f"{state.folder}{there}",
                err=True,
            )
            bar = bars.enter_context(progress("Fetching", unit="MB"))
        bar.report(round(state.num_bytes / 1e6), round(state.num_bytes_total / 1e6))
        if state.num_bytes == state.num_bytes_total:
            bars.close()
            bar = None

    stack.enter_context(watch_fetching(show))
