"""``sam3cache store info``: what a store holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.defaults import only_store
from sam3cache.commands.places import store_place
from sam3cache.commands.printing import classes_text, plain_console, table
from sam3cache.runtime import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from sam3cache.features import Place

_NUM_ASIDE_SHOWN = 5
_NUM_CLASSES_SHOWN = 4
_NUM_DIGEST_CHARACTERS = 12


@click.command()
@click.argument("store", callback=store_place, required=False)
@click.option(
    "--overlay",
    callback=store_place,
    metavar="PATH",
    help="Labels and annotations kept beside the store; they go before its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
def info(store: Place | None, overlay: Place | None, as_json: bool) -> None:
    """Say what STORE holds: samples, splits, levels, masks, bytes, and how they were made.

    STORE may be left out where features/ holds just one; it may be unfinished, and it may be
    s3://bucket/NAME.zarr. Nothing in it is written, and no feature is read: `sam3cache store
    verify` does that.

    \b
    Examples:
      sam3cache store info features/angio.zarr
      sam3cache store info features/angio.zarr --json
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features.summary import summarise

    summary = summarise(store or only_store(), overlay=overlay)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:

    console = plain_console()
    for line in _heading(summary):
        console.print(line)
    console.print(_splits_table(summary))
    console.print(_levels_table(summary))
    for line in _making(summary):
        console.print(line)
    if summary["label_sets"]:
        console.print(_labels_table(summary))
    for line in _ending(summary):
        console.print(line)


def _heading(summary: dict[str, Any]) -> Iterator[str]:
    state = "sealed"
    if not summary["sealed"]:
        change = summary["interrupted_change"]
        state = (
            f"NOT SEALED: {change} was interrupted, run that command again"
            if change
            else "NOT SEALED: its making (extraction, copy, import) has not finished, run it again"
        )
    yield f"{summary['store']}: format version {summary['format_version']}, {state}"
    numbers = summary["num_samples"]
    others = [
        f"{number} {words}"
        for number, words in (
            (numbers["pending"], "still to be computed"),
            (numbers["aside"], "set aside"),
            (numbers["replaced"], "replaced"),
            (numbers["removed"] - numbers["replaced"], "gone"),
        )
        if number
    ]
    yield (
        f"{numbers['ok']} samples of {summary['num_groups']} groups"
        + (f" ({', '.join(others)})" if others else "")
        + f", {summary['num_with_both_angles']} with both view angles; "
        + f"{size_text(summary['size_bytes'])}"
    )
    if summary["variants"]:
        counts = ", ".join(f"{name} {count}" for name, count in summary["variants"].items())
        yield f"Variants of training samples: {counts}"


def _splits_table(summary: dict[str, Any]) -> Table:
    made = table("split", "samples", "groups")
    for name, split in summary["splits"].items():
        made.add_row(name, str(split["num_samples"]), str(split["num_groups"]))
    return made


def _levels_table(summary: dict[str, Any]) -> Table:
    made = table("level", "a sample", "stored as", "files", "size", "fingerprint")
    for name, level in summary["levels"].items():
        made.add_row(
            name,
            "×".join(map(str, level["shape"])),
            level["precision"],
            str(level["num_files"]),
            size_text(level["size_bytes"]),
            level["digest"][:_NUM_DIGEST_CHARACTERS],
        )
    return made


def _labels_table(summary: dict[str, Any]) -> Table:
    made = table("masks", "classes", "samples", "files", "size")
    for name, labels in summary["label_sets"].items():
        made.add_row(
            name + (" (overlay)" if labels["in_overlay"] else ""),
            classes_text(labels["classes"], labels["task"], _NUM_CLASSES_SHOWN),
            str(labels["num_masks"]),
            str(labels["num_files"]),
            size_text(labels["size_bytes"]),
        )
    return made


def _making(summary: dict[str, Any]) -> Iterator[str]:
    """Say how the levels were made, levels that were made in one way together."""
    made: dict[str, list[str]] = {}
    for name, level in summary["levels"].items():
        fields = level["fingerprint"]
        parts = []
        if "weights_sha256" in fields:
            weights = str(fields["weights_sha256"])[:_NUM_DIGEST_CHARACTERS]
            parts.append(f"weights {weights}")
        parts += [
            f"{words} {fields[field]}"
            for field, words in (
                ("numeric_path", "numeric path"),
                ("preprocessing.resize_mode", "resize"),
            )
            if field in fields
        ]
        made.setdefault(", ".join(parts) or "nothing recorded", []).append(name)
    settings = summary["settings"]
    backbone = f"backbone {settings.get('backbone', 'unknown')}, "
    for how, names in made.items():
        yield f"{', '.join(names)}: {backbone if 'weights' in how else ''}{how}"
    where = [
        f"{words} {settings[name]}"
        for name, words in (("device", "on"), ("batch_size", "batch size"))
        if name in settings
    ]
    versions = settings.get("environment", {})
    where += [f"{name} {versions[name]}" for name in ("sam3cache", "torch") if name in versions]
    if where:
        yield f"Made {', '.join(where)}"
    sources = [str(entry.get("store")) for entry in settings.get("copied_from", [])]
    if sources:
        yield f"Copied from {', '.join(sources)}"


def _ending(summary: dict[str, Any]) -> Iterator[str]:
    leaks = summary["groups_in_several_splits"]
    if leaks:
        yield f"Note: {len(leaks)} groups are in more than one split, such as {leaks[0]}."
    dead = summary["dead"]
    if dead["num_samples"]:
        yield (
            f"Note: {dead['num_samples']} samples that are gone or replaced still take "
            f"{size_text(dead['size_bytes'])}: `sam3cache store repack {summary['store']}` "
            "gives them back."
        )
    aside = summary["set_aside"]
    for sample in aside[:_NUM_ASIDE_SHOWN]:
        yield f"Set aside: {sample['id']} ({sample['source']}): {sample['reason']}"
    if len(aside) > _NUM_ASIDE_SHOWN:
        yield f"Set aside: {len(aside) - _NUM_ASIDE_SHOWN} more; --json lists all."
