"""``sam3cache store import``: a store from an HDF5 file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sam3cache.commands.printing import print_copy
from sam3cache.commands.progress import Stages


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The new store. [default: features/FILE'S NAME.zarr]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def import_(file: Path, output: Path | None, as_json: bool) -> None:
    """Make a store of FILE, which `sam3cache store export` wrote.

    Features, masks, annotations and fingerprints come back bit by bit, each checked on the way.
    Stop it at any time: the same command goes on where it was.

    \b
    Example:
      sam3cache store import angio.h5 -o features/angio.zarr
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.hdf5 import import_hdf5

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Importing", num_done, num_total)

        result = import_hdf5(file, output or Path("features") / f"{file.stem}.zarr", report)
    print_copy(result, as_json)
