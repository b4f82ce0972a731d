"""Options that several commands have, with the same name, default and help in each."""

from __future__ import annotations

from pathlib import Path

import click

DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."
)
BATCH_SIZE = click.option(
    "--batch-size", default=16, show_default=True, help="Images a forward pass."
)
HEAD = click.option(
    "--head",
    help="Your own head as package.module:Class; a checkpoint never makes us import one unasked.",
)
OVERLAY = click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Folder of labels and annotations kept beside the store.",
)
ALLOW_UNSEALED = click.option(
    "--allow-unsealed", is_flag=True, help="Use what an unfinished extraction has written so far."
)
