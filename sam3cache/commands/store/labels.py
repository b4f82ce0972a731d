"""``sam3cache store labels``: sets of masks, set, listed, counted and removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sam3cache.commands.extract import SET_ASIDE_EXIT_CODE
from sam3cache.commands.printing import (
    classes_text,
    echo_json,
    names_of,
    plain_console,
    table,
    warn_of_samples,
)
from sam3cache.commands.progress import Stages

if TYPE_CHECKING:
    from sam3cache.features import ClassCount, LabelSetSummary

_STORE = click.argument("store", type=click.Path(path_type=Path))
_OVERLAY = click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Folder that keeps labels beside a store that is not to be written.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


@click.group()
def labels() -> None:
    """Set, list, count or remove sets of masks, without touching a feature.

    A store may hold several sets beside "mask", the one that `sam3cache extract` writes: other
    annotators, other structures. Train on one by `sam3cache train --label-set NAME`.

    \b
    Examples:
      sam3cache store labels set features/angio.zarr reader2 --from reader2.csv
      sam3cache store labels list features/angio.zarr
    """  # noqa: D301 - \b is click's mark for lines to keep as they are


@labels.command("set")
@_STORE
@click.argument("name")
@click.option(
    "--from",
    "manifest",
    type=click.Path(path_type=Path),
    required=True,
    help="CSV or folder with the masks; a CSV may have the columns id and mask alone.",
)
@click.option(
    "--columns",
    type=click.Path(path_type=Path),
    help="TOML file that says which column of the CSV is what (docs/data.md).",
)
@click.option(
    "--masks",
    metavar="COLUMNS",
    help="Columns of the CSV with the masks, or folders beside images/: one, or lad_mask,rca_mask "
    "for a mask a class. [default: mask, or masks/]",
)
@click.option(
    "--classes",
    default="foreground",
    show_default=True,
    help="What the masks are of: names (planes of yes and no), as lad,rca; names with the class "
    "numbers in the files, as lad=1,rca=2; or a .json or .toml file with such numbers.",
)
@_OVERLAY
@_JSON
def set_(
    store: Path,
    name: str,
    manifest: Path,
    columns: Path | None,
    masks: str | None,
    classes: str,
    overlay: Path | None,
    as_json: bool,
) -> None:
    """Make the masks of a manifest the label set NAME of STORE.

    Rows belong to samples by their id, else by image and frame. A set that is there is replaced as
    a whole, and serves until the new one is complete. Masks that cannot be used are listed, their
    samples have none, and the exit code is then 3. Interrupted, the same command goes on.

    Masks are foreground and background, unless --classes says more (docs/labels.md).

    \b
    Examples:
      sam3cache store labels set features/angio.zarr reader2 --from reader2.csv
      sam3cache store labels set features/x.zarr parts --from x.csv --classes lad=1,lcx=2
      sam3cache store labels set features/x.zarr parts --from x.csv --masks a,b --classes lad,lcx
      sam3cache store labels set /data/angio.zarr mask --from mended.csv --overlay my-labels
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.relabel import LabelsConfig, set_labels
    from sam3cache.images import parse_classes

    config = LabelsConfig(
        store=store,
        name=name,
        manifest=manifest,
        columns=columns,
        classes=parse_classes(classes),
        mask_columns=tuple(names_of("--masks", masks) or ()),
        overlay=overlay,
    )
    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Reading masks", num_done, num_total)

        result = set_labels(config, report)
    warn_of_samples(result.set_aside)
    if as_json:
        echo_json(result)
    else:
        click.echo(
            f"{result.store.as_posix()}: label set {name} holds masks of {result.num_with_mask} of "
            f"{result.num_samples} samples; {result.num_matched} are in {manifest.name}, "
            f"{result.num_samples - result.num_with_mask} have no mask in the set."
        )
        if result.num_unmatched_rows:
            more = ", …" if result.num_unmatched_rows > len(result.unmatched) else ""
            click.echo(
                f"Of no sample of the store: {result.num_unmatched_rows} rows of {manifest.name} "
                f"({', '.join(result.unmatched)}{more})."
            )
        if result.absent_classes:
            click.echo(
                f"warning: no mask shows {', '.join(result.absent_classes)}; check that --classes "
                "gives the numbers that the files have (255 is ignored unless it is named).",
                err=True,
            )
        beside = f" --overlay {overlay.as_posix()}" if overlay else ""
        click.echo(f"Next: sam3cache train {store.as_posix()} --label-set {name}{beside}")
    if result.set_aside:
        raise click.exceptions.Exit(SET_ASIDE_EXIT_CODE)


@labels.command("list")
@_STORE
@_OVERLAY
@_JSON
def list_(store: Path, overlay: Path | None, as_json: bool) -> None:
    """List the label sets of STORE, and how many samples have a mask in each.

    \b
    Example:
      sam3cache store labels list features/angio.zarr
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features import open_store, summarise_label_sets

    summaries = summarise_label_sets(open_store(store, overlay=overlay))
    if as_json:
        click.echo(json.dumps([asdict(summary) for summary in summaries], indent=2))
    elif not summaries:
        click.echo(f"{store.as_posix()} has no label sets.")
    for summary in () if as_json else summaries:
        click.echo(_line(summary))


def _line(summary: LabelSetSummary) -> str:
    where = " (in the overlay)" if summary.in_overlay else ""
    return (
        f"{summary.name}{where}: {classes_text(summary.classes, summary.task)}; "
        f"{summary.num_with_mask} samples with a mask, {summary.num_without_mask} without; "
        f"up to {summary.height_px} x {summary.width_px} px; {summary.size_bytes / 1e6:.1f} MB"
    )


@labels.command("show")
@_STORE
@click.argument("name")
@_OVERLAY
@_JSON
def show(store: Path, name: str, overlay: Path | None, as_json: bool) -> None:
    """Count the samples and pixels of each class of the label set NAME, by split.

    It reads every mask of the set. What too few training samples show cannot be learned, and what
    no other sample shows cannot be measured.

    \b
    Example:
      sam3cache store labels show features/phantoms.zarr branches
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features import count_classes, open_store

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Counting", num_done, num_total)

        counts = count_classes(open_store(store, overlay=overlay), name, report)
    if as_json:
        click.echo(json.dumps([asdict(count) for count in counts], indent=2))
    else:
        _print_counts(counts)


def _print_counts(counts: Sequence[ClassCount]) -> None:

    splits = tuple(counts[0].num_samples)
    made = table("class", *(f"{split} samples" for split in splits), "% of train pixels")
    for count in counts:
        share = count.num_pixels["train"] / max(count.num_counted["train"], 1)
        made.add_row(
            count.name, *(str(count.num_samples[split]) for split in splits), f"{share:.3%}"[:-1]
        )
    plain_console().print(made)
    for split in splits:
        absent = [count.name for count in counts if not count.num_samples[split]]
        if absent:
            click.echo(f"No sample of {split} shows {', '.join(absent)}.")


@labels.command("remove")
@_STORE
@click.argument("name")
@_OVERLAY
def remove(store: Path, name: str, overlay: Path | None) -> None:
    """Remove the label set NAME from STORE, or from its overlay.

    `sam3cache extract` writes the set "mask" again if its manifest has masks.

    \b
    Example:
      sam3cache store labels remove features/angio.zarr reader2
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.relabel import remove_labels

    remove_labels(store, name, overlay)
    click.echo(f"{(overlay or store).as_posix()}: label set {name} is removed.")
