"""``sam3cache check``: what is wrong with a manifest, before anything is paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sam3cache.commands.printing import names_of
from sam3cache.commands.progress import progress

if TYPE_CHECKING:
    from sam3cache.checking import CheckResult

_JSON_FILE = "check.json"


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--columns",
    type=click.Path(path_type=Path),
    help="TOML file that says which column of the CSV is what (docs/data.md).",
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the split, if the manifest has none."
)
@click.option(
    "--masks",
    metavar="COLUMNS",
    help="Columns of the CSV with the masks, or folders beside images/, as for `store labels set`. "
    "[default: mask, or masks/]",
)
@click.option(
    "--classes",
    default="foreground",
    show_default=True,
    help="What the masks are of, as for `store labels set`: lad,rca or lad=1,rca=2 or a file.",
)
@click.option(
    "--by",
    metavar="COLUMNS",
    help="Other columns whose values to count as classes, such as cass_segment.",
)
@click.option(
    "--min-samples",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Warn of a class with fewer samples in a split.",
)
@click.option(
    "--allow-leak",
    is_flag=True,
    help="Only warn of groups and pictures that are in several splits.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for check.html, a page with pictures of what was found, and check.json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def check(
    manifest: Path,
    columns: Path | None,
    seed: int,
    masks: str | None,
    classes: str,
    by: str | None,
    min_samples: int,
    allow_leak: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Look at every image and mask of MANIFEST, before a GPU is paid for.

    Finds files that cannot be read, masks that are empty, full or lie beside what they mark, view
    angles that are missing, out of range or constant, duplicates, groups (patients) in two splits,
    classes of few samples, and splits that differ. docs/check.md says how each is found. MANIFEST
    is what extract takes; nothing is written but what -o asks for.

    \b
    Exit codes:
      0  nothing to mend (there may be notes)
      1  errors: samples cannot be used, or splits leak; or MANIFEST cannot be read at all
      2  something in the command is wrong
      3  warnings: what is likely to be a mistake

    \b
    Examples:
      sam3cache check angio.csv --columns columns.toml -o check
      sam3cache check phantoms --masks branches --classes phantoms/classes.json --min-samples 10
      sam3cache check angio.csv --columns columns.toml --by cass_segment --json
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.checking import CheckConfig, write_page
    from sam3cache.checking import check as run
    from sam3cache.images import parse_classes
    from sam3cache.runtime import set_num_threads, write_atomic

    config = CheckConfig(
        manifest=manifest,
        columns=columns,
        seed=seed,
        classes=parse_classes(classes),
        mask_columns=tuple(names_of("--masks", masks) or ()),
        by=tuple(names_of("--by", by) or ()),
        min_samples=min_samples,
        allow_leak=allow_leak,
    )
    set_num_threads(1)  # Samples are looked at side by side.
    with progress("Checking", unit="images") as bar:
        result = run(config, bar.report)
    text = json.dumps(result.as_json(), indent=2)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    # First, so that a folder that cannot be written costs nobody what was found.
    if as_json:
        click.echo(text)
    else:
        _print(result)
    if output is not None:
        page = write_page(result, config.classes, output)
        write_atomic(output / _JSON_FILE, f"{text}\n".encode())
        click.echo(f"Look at it: {page}", err=as_json)
    raise click.exceptions.Exit(result.exit_code)


def _print(result: CheckResult) -> None:
    from sam3cache.checking import count_by_severity

    splits = ", ".join(f"{name} {counts['num_samples']}" for name, counts in result.splits.items())
    num_with_mask, num_with_angles = (
        sum(counts[what] for counts in result.splits.values())
        for what in ("num_with_mask", "num_with_angles")
    )
    click.echo(
        f"{result.manifest}: {result.num_samples} samples, {result.num_usable} can be used "
        f"({splits}); {num_with_mask} with a mask, {num_with_angles} with both view angles; "
        f"looked at in {result.elapsed_s:.1f} s."
    )
    for finding in result.findings:
        click.echo(str(finding))
    numbers = ", ".join(
        f"{number} {severity}{'' if number == 1 else 's'}"
        for severity, number in count_by_severity(result.findings).items()
    )
    click.echo(f"Found: {numbers}.")
