"""``sam3cache store merge``: the samples of several stores as one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sam3cache.commands.printing import label_sets_of, names_of, print_copy
from sam3cache.commands.progress import Stages


@click.command()
@click.argument("stores", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The new store."
)
@click.option("--levels", help="Only these levels, as fpn_72. [default: all; all must have them]")
@click.option("--label-sets", help="Only these sets of masks, or 'none'. [default: all]")
@click.option(
    "--prefix",
    is_flag=True,
    help="Put each store's name and '-' before its ids and groups, where they clash.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def merge(
    stores: tuple[Path, ...],
    output: Path,
    levels: str | None,
    label_sets: str | None,
    prefix: bool,
    as_json: bool,
) -> None:
    """Copy all samples of STORES into a new store, bit by bit.

    Levels must have been made in the same way: equal fingerprints. Grey pictures are repeated to
    three channels where another store has colour, as extraction does. Ids must differ. A group of
    one name is the same patient in all stores, unless --prefix tells them apart. Pictures that are
    in two stores are counted, and a warning says if they are in different splits.

    \b
    Examples:
      sam3cache store merge features/a.zarr features/b.zarr -o features/both.zarr
      sam3cache store merge features/*.zarr -o all.zarr --levels fpn_72 --prefix
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.copying import merge as run

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Copying", num_done, num_total)

        result = run(
            stores,
            output,
            levels=names_of("--levels", levels),
            label_sets=label_sets_of(label_sets),
            prefix=prefix,
            report=report,
        )
    print_copy(result, as_json)
