"""``sam3cache store``: what looks after a store once it is there, a module a command."""

from __future__ import annotations

import click

from sam3cache.commands import LazyGroup

STORE_COMMANDS = {
    "info": "Say what a store holds: levels, samples, splits, labels, bytes.",
    "verify": "Check every byte; find drift by computing samples again; repair.",
    "labels": "Set, list or remove sets of masks, without touching a feature.",
    "annotations": "Correct splits, groups and angles, without touching a feature.",
    "subset": "Copy some samples into a new store.",
    "merge": "Put the samples of several stores into a new one.",
    "repack": "Give back the space of samples that are gone.",
    "export": "Write a store as one HDF5 file.",
    "import": "Make a store from such a file.",
}
"""By name, the one line that ``sam3cache store --help`` shows."""


@click.group(cls=LazyGroup, texts=STORE_COMMANDS, package=__name__)
def store() -> None:
    """Look after a feature store: none of it computes a feature anew, or loses one.

    \b
    Examples:
      sam3cache store info features/angio.zarr
      sam3cache store verify features/angio.zarr --sample 5%
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
