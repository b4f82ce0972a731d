"""``sam3cache store export``: a store as one HDF5 file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sam3cache.commands.printing import echo_json
from sam3cache.commands.progress import Stages
from sam3cache.runtime import size_text


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The new file. [default: STORE's name with .h5, beside it]",
)
@click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Labels and annotations kept beside the store; they go before its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def export(store: Path, output: Path | None, overlay: Path | None, as_json: bool) -> None:
    """Write STORE as one HDF5 file, to hand it on.

    A dataset a level with a chunk a sample, masks, tables, fingerprints and settings along, all
    with checksums: h5py alone reads it (docs/hdf5.md), and `sam3cache store import` makes a store
    of it again. To export a part, make a subset first.

    \b
    Examples:
      sam3cache store export features/angio.zarr
      sam3cache store export features/angio.zarr -o to-hand-on/angio.h5
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.copying import open_sealed
    from sam3cache.features.hdf5 import export_hdf5

    opened = open_sealed(store, overlay=overlay)
    named = store if store.name else store.resolve()  # "." has no name
    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Exporting", num_done, num_total)

        result = export_hdf5(opened, output or named.with_suffix(".h5"), report)
    if as_json:
        echo_json(result)
        return
    masks = f", masks {', '.join(result.label_sets)}" if result.label_sets else ", no masks"
    click.echo(f"{result.file}: {result.num_samples} samples, {size_text(result.size_bytes)}.")
    click.echo(f"Levels {', '.join(result.levels)}{masks}; in {result.elapsed_s:.1f} s.")
    if result.num_left_behind:
        click.echo(f"{result.num_left_behind} samples were set aside, and stayed behind.")
