"""``sam3cache store annotations``: splits, groups, angles and other columns, corrected."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.extract import SET_ASIDE_EXIT_CODE
from sam3cache.commands.printing import (
    echo_json,
    names_of,
    plain_console,
    table,
    warn_of_samples,
)

if TYPE_CHECKING:
    from sam3cache.extract.relabel import SplitResult
    from sam3cache.features import FeatureStore, StoredSample

_STORE = click.argument("store", type=click.Path(path_type=Path))
_OVERLAY = click.option(
    "--overlay",
    type=click.Path(path_type=Path),
    help="Folder that keeps annotations beside a store that is not to be written.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


@click.group("annotations")
def annotations_() -> None:
    """Correct splits, groups, angles and other columns, without touching a feature.

    \b
    Examples:
      sam3cache store annotations split features/angio.zarr --by vessel_pattern,view
      sam3cache store annotations show features/angio.zarr > angio.csv    (to edit)
      sam3cache store annotations set features/angio.zarr --from angio.csv
    """  # noqa: D301 - \b is click's mark for lines to keep as they are


@annotations_.command("set")
@_STORE
@click.option(
    "--from",
    "manifest",
    type=click.Path(path_type=Path),
    required=True,
    help="CSV with a column id or image, and those to correct.",
)
@click.option(
    "--columns",
    type=click.Path(path_type=Path),
    help="TOML file that says which column of the CSV is what (docs/data.md).",
)
@click.option("--only", default="", help="Set these alone, such as split,group.")
@_OVERLAY
@_JSON
def set_(
    store: Path,
    manifest: Path,
    columns: Path | None,
    only: str,
    overlay: Path | None,
    as_json: bool,
) -> None:
    """Set annotations of STORE as a CSV has them: split, group, angles, any other column.

    Rows belong to samples by their id, else by image and frame. Columns that the CSV lacks, and
    samples that it does not name, stay as they are. A row that cannot be used is listed, and the
    exit code is then 3. `sam3cache extract` run again takes all annotations from its own manifest.

    \b
    Examples:
      sam3cache store annotations set features/angio.zarr --from corrected.csv
      sam3cache store annotations set features/angio.zarr --from folds.csv --only split
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.relabel import AnnotationsConfig, set_annotations

    result = set_annotations(
        AnnotationsConfig(
            store=store,
            manifest=manifest,
            columns=columns,
            only=tuple(name.strip() for name in only.split(",") if name.strip()),
            overlay=overlay,
        )
    )
    warn_of_samples(result.set_aside, result.leaks, result.num_moved)
    if as_json:
        echo_json(result)
    else:
        changes = ", ".join(f"{name} of {num}" for name, num in result.num_changed.items() if num)
        click.echo(
            f"{result.store.as_posix()}: {result.num_matched} of {result.num_samples} samples are "
            f"in {manifest.name}; changed: {changes or 'nothing'}."
        )
    if result.set_aside:
        raise click.exceptions.Exit(SET_ASIDE_EXIT_CODE)


@annotations_.command("split")
@_STORE
@click.option("--val", default=0.15, show_default=True, help="Share of the validation split.")
@click.option("--test", default=0.15, show_default=True, help="Share of the test split.")
@click.option(
    "--by",
    metavar="COLUMNS",
    help="What the splits shall have in even shares, such as vessel_pattern,view: annotations; "
    "view, for LAO or RAO and cranial or caudal; class, for the classes that masks show.",
)
@click.option(
    "--label-set", default="mask", show_default=True, help="Masks that --by class is about."
)
@click.option("--seed", default=0, show_default=True, help="Same seed, same splits.")
@_OVERLAY
@_JSON
def split(
    store: Path,
    val: float,
    test: float,
    by: str | None,
    label_set: str,
    seed: int,
    overlay: Path | None,
    as_json: bool,
) -> None:
    """Divide the samples of STORE into train, val and test anew, by whole groups (patients).

    The old splits are replaced: `annotations show` keeps them in a CSV, which `annotations set
    --only split` puts back. `sam3cache extract` run again takes splits from its own manifest.

    \b
    Examples:
      sam3cache store annotations split features/angio.zarr --by vessel_pattern,view
      sam3cache store annotations split features/angio.zarr --val 0.2 --test 0 --seed 1
      sam3cache store annotations split features/x.zarr --by class --label-set branches
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.relabel import SplitConfig, split_annotations

    result = split_annotations(
        SplitConfig(
            store=store,
            val=val,
            test=test,
            by=tuple(names_of("--by", by) or ()),
            label_set=label_set,
            seed=seed,
            overlay=overlay,
        )
    )
    warn_of_samples((), (), result.num_moved)
    if as_json:
        click.echo(json.dumps(_split_as_json(result), indent=2))
    else:
        _print_split(result)


def _split_as_json(result: SplitResult) -> dict[str, Any]:
    by_column: dict[str, dict[str, Any]] = {}
    for (column, value), counts in result.num_by_value.items():
        by_column.setdefault(column, {})[value] = dict(counts)
    return {
        "store": result.store.as_posix(),
        "shares": dict(result.shares),
        "num_samples": dict(result.num_samples),
        "num_groups": dict(result.num_groups),
        "num_by_value": by_column,
        "num_changed": result.num_changed,
        "num_moved": result.num_moved,
    }


def _print_split(result: SplitResult) -> None:
    """Say how even the splits are: what was asked for, then each value's own shares."""
    made = table("", *result.shares)
    made.add_row("asked for", *(f"{share:.1%}" for share in result.shares.values()))
    rows = {"samples": result.num_samples, "groups": result.num_groups} | {
        f"{column} {value or '(empty)'}": counts
        for (column, value), counts in result.num_by_value.items()
    }
    for name, counts in rows.items():
        num_all = sum(counts.values())
        cells = [f"{counts.get(s, 0)} ({counts.get(s, 0) / num_all:.1%})" for s in result.shares]
        made.add_row(name, *cells)
    plain_console().print(made)
    click.echo(
        f"{result.store.as_posix()}: {result.num_changed} of "
        f"{sum(result.num_samples.values())} samples are in another split than before."
    )


@annotations_.command("list")
@_STORE
@_OVERLAY
@_JSON
def list_(store: Path, overlay: Path | None, as_json: bool) -> None:
    """List the annotations of STORE, with counts.

    \b
    Example:
      sam3cache store annotations list features/angio.zarr
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features import open_store

    counts = _counts(open_store(store, overlay=overlay))
    if as_json:
        click.echo(json.dumps(counts, indent=2))
        return
    for name, entry in counts.items():
        values = ", ".join(f"{value} {num}" for value, num in entry.get("counts", {}).items())
        distinct = f", {entry['num_distinct']} different" if "num_distinct" in entry else ""
        detail = f" ({values})" if values else ""
        click.echo(f"{name}: {entry['num_known']} known{distinct}{detail}")


_MAX_VALUES_COUNTED = 10


def _counts(store: FeatureStore) -> dict[str, Any]:
    samples = store.samples
    extra = sorted({name for sample in samples for name in sample.extra})
    texts = {"split": [s.split for s in samples], "group": [s.group for s in samples]}
    texts |= {name: [s.extra.get(name, "") for s in samples] for name in extra}
    angles = {
        "primary_angle": [s.primary_angle_deg for s in samples],
        "secondary_angle": [s.secondary_angle_deg for s in samples],
    }
    counts: dict[str, Any] = {}
    for name, values in texts.items():
        number = Counter(value for value in values if value)
        counts[name] = {"num_known": number.total(), "num_distinct": len(number)}
        if len(number) <= _MAX_VALUES_COUNTED:
            counts[name]["counts"] = dict(sorted(number.items()))
    for name, degrees in angles.items():
        counts[name] = {"num_known": sum(not math.isnan(value) for value in degrees)}
    return counts


@annotations_.command("show")
@_STORE
@_OVERLAY
@_JSON
def show(store: Path, overlay: Path | None, as_json: bool) -> None:
    """Print the annotations of STORE as a CSV, which `annotations set` takes back.

    \b
    Example:
      sam3cache store annotations show features/angio.zarr > angio.csv
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features import open_store

    samples = open_store(store, overlay=overlay).samples
    extra = sorted({name for sample in samples for name in sample.extra})
    lines = [_line(sample, extra) for sample in samples]
    if as_json:
        click.echo(json.dumps(lines, indent=2))
        return
    text = io.StringIO()
    fields = ["id", "split", "group", "primary_angle", "secondary_angle", *extra]
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    click.echo(text.getvalue(), nl=False)


def _line(sample: StoredSample, extra: list[str]) -> dict[str, Any]:
    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "id": sample.id,
        "split": sample.split,
        "group": sample.group,
        "primary_angle": known(sample.primary_angle_deg),
        "secondary_angle": known(sample.secondary_angle_deg),
        **{name: sample.extra.get(name, "") for name in extra},
    }


@annotations_.command("remove")
@_STORE
@click.argument("column")
@_OVERLAY
def remove(store: Path, column: str, overlay: Path | None) -> None:
    """Remove one of STORE's other columns.

    \b
    Example:
      sam3cache store annotations remove features/angio.zarr phase
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.relabel import remove_annotation

    num_values = remove_annotation(store, column, overlay)
    click.echo(
        f"{(overlay or store).as_posix()}: column {column} is removed; {num_values} samples had a "
        "value in it."
    )
