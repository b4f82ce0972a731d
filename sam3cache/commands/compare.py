"""``sam3cache compare``: which of some runs is better, and how sure that is."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.options import ALLOW_UNSEALED, BATCH_SIZE, DEVICE, OVERLAY
from sam3cache.commands.printing import plain_console, table
from sam3cache.commands.progress import Stages

if TYPE_CHECKING:
    from rich.table import Table

    from sam3cache.evaluation import Comparison, PairComparison


@click.command("compare")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    default="test",
    show_default=True,
    help="Images to compare on.",
)
@click.option(
    "--baseline", metavar="NAME", help="Run that the others are compared with. [default: the first]"
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Store to evaluate on and to take pictures from. [default: that of the evaluations]",
)
@OVERLAY
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the results. [default: compare-SPLIT-NAMES beside the baseline]",
)
@click.option(
    "--head",
    "heads",
    multiple=True,
    help="Your own head as package.module:Class; once for each that has to be evaluated or drawn.",
)
@DEVICE
@BATCH_SIZE
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--page/--no-page",
    default=True,
    show_default=True,
    help="Also write report.html: plot, tables, and images with the runs side by side.",
)
@ALLOW_UNSEALED
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON on stdout.")
def compare(
    runs: tuple[Path, ...],
    split: Any,
    baseline: str | None,
    store: Path | None,
    overlay: Path | None,
    output: Path | None,
    heads: tuple[str, ...],
    device: str,
    batch_size: int,
    seed: int,
    page: bool,
    allow_unsealed: bool,
    as_json: bool,
) -> None:
    """Compare RUNS with the first of them, image by image.

    Each is a run's folder, an evaluation's, or a folder of runs. Runs named NAME-seed0, NAME-seed1
    are one experiment, NAME: seeds are averaged image by image, folds put together. NAME alone
    stands for all of them. What was not evaluated on the split yet is evaluated first.

    Differences are paired by image; their 95% intervals come from a bootstrap over groups
    (patients), of few groups from Student's law. With several runs p-values are corrected by Holm's
    method. Only the images that all runs scored count.

    \b
    Examples:
      sam3cache compare checkpoints/film-conv checkpoints/linear
      sam3cache compare checkpoints --baseline linear --split val
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.evaluation import CompareConfig
    from sam3cache.evaluation import compare as compare_runs
    from sam3cache.runtime import pick_device

    config = CompareConfig(
        paths=runs,
        split=split,
        baseline=baseline,
        store=store,
        heads=heads,
        batch_size=batch_size,
        device=pick_device(device),
        seed=seed,
        output=output,
        overlay=overlay,
        allow_unsealed=allow_unsealed,
        page=page,
    )
    with ExitStack() as stack:
        stages = Stages(stack)

        def report(run: str, num_done: int, num_total: int) -> None:
            stages.show(f"Evaluating {run}", num_done, num_total)

        result = compare_runs(config, report)
    if as_json:
        click.echo(json.dumps(result.record(), indent=2, allow_nan=False))
    else:
        _print(result)


def _print(result: Comparison) -> None:
    """Print the tables and the sentences, for people."""
    from sam3cache.evaluation import MEAN_OVER_CLASSES, over_text

    console = plain_console()
    over = over_text(result.num_images, result.num_groups)
    console.print(f"Split {result.split}: {over}, against {result.baseline}")
    for title in ("Label set", "Threshold", "Store"):
        values = dict.fromkeys(v for one in result.experiments for v in one.measured[title])
        console.print(f"{title}: {', '.join(values)}")
    for notice in result.notices:
        console.print(f"Note: {notice}")
    console.print(_runs_table(result))
    if len(result.presence) > 1:
        console.print(MEAN_OVER_CLASSES)
        console.print(_presence_table(result))
    for pair in result.comparisons:
        for name in pair.measures:
            console.print(_measures_table(result, pair, name))
    for pair in result.comparisons:
        console.print(pair.sentence)
    console.print(
        f"Written: {result.output.as_posix()}/differences.csv, differences.svg and comparison.json"
    )
    if result.page is not None:
        console.print(f"Page: {result.page.as_posix()}")


def _runs_table(result: Comparison) -> Table:
    from sam3cache.evaluation import interval_text, number_text

    rows = table("run", "trainings", "Dice", "95% interval", "Dice of each seed")
    for one in result.experiments:
        dice = sorted(value for value in one.dice_of_seeds if value is not None)
        # The page has each; a line of a terminal holds two.
        each = " to ".join(number_text(value) for value in dict.fromkeys([*dice[:1], *dice[-1:]]))
        rows.add_row(
            one.name,
            str(len(one.runs)),
            number_text(one.dice),
            interval_text(one.dice_interval),
            each or "–",
        )
    return rows


def _presence_table(result: Comparison) -> Table:
    """Return a line a class: the images that have it, and who marks it on the others."""
    names = [one.name for one in result.experiments]
    rows = table("class", "have it", "lack it", *(f"marked by {name}" for name in names))
    rows.title = "Images that have a class, that lack it, and that it is marked on all the same"
    rows.title_justify = "left"
    for one in result.presence[1:]:
        marked = (str(one.num_marked[name]) for name in names)
        rows.add_row(one.name, str(one.num_with), str(one.num_without), *marked)
    return rows


def _measures_table(result: Comparison, pair: PairComparison, name: str) -> Table:
    from sam3cache.evaluation import measure_rows

    columns = ("images", "base", "run", "diff.", "95% interval", "better", "worse")
    rows = table("measure", *columns)
    # Not a column's heading: a long name would take the room of the figures.
    rows.title = f"{pair.name} against {result.baseline}"
    if len(result.presence) > 1:
        over_all = name == result.presence[0].name
        rows.title += f", {name}" if over_all else f", {name}: images that have it"
    rows.title_justify = "left"
    # Eight columns in the 80 of a narrow terminal.
    rows.collapse_padding = True
    for _, *cells in measure_rows({name: pair.measures[name]}):
        rows.add_row(*cells)
    return rows
