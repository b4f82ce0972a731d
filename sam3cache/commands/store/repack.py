"""``sam3cache store repack``: give back the space of samples that are gone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sam3cache.commands.printing import echo_json
from sam3cache.commands.progress import Stages
from sam3cache.runtime import size_text


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def repack(store: Path, as_json: bool) -> None:
    """Delete what STORE still holds of samples that are gone, and files that nothing names.

    Gone are samples that are no longer in the manifest, that changed, or that were set aside; they
    do not come back without being computed again. Living samples keep everything, but some move to
    other rows: let nothing else read the store meanwhile, and make overlays of it anew. It needs
    room for the samples that move. Stop it at any time: nothing is lost, and the same command, or
    `sam3cache extract`, completes it.

    \b
    Example:
      sam3cache store repack features/angio.zarr
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.repacking import repack as run

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Moving", num_done, num_total)

        result = run(store, report)
    if as_json:
        echo_json(result)
        return
    if not (result.num_dropped or result.num_moved or result.num_strays):
        click.echo(f"{result.store}: nothing to give back; left as it is.")
        return
    freed = (
        f"{size_text(result.freed_bytes)} given back"
        if result.freed_bytes >= 0
        else f"{size_text(-result.freed_bytes)} more than before"
    )
    click.echo(f"{result.store}: {freed} in {result.elapsed_s:.1f} s.")
    click.echo(
        f"{result.num_dropped} samples that are gone are deleted, {result.num_moved} moved, "
        f"{result.num_strays} stray files deleted; {size_text(result.size_bytes)} are left."
    )
