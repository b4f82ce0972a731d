"""``sam3cache store verify``: is a store as it was written, and would it be made so again?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sam3cache.commands.places import store_place
from sam3cache.commands.progress import Bar, format_duration, progress
from sam3cache.errors import ConfigError
from sam3cache.runtime import size_text

if TYPE_CHECKING:
    from sam3cache.extract.recompute import RecomputeResult
    from sam3cache.features import Finding, Place, RepairResult, VerifyResult

Status = Literal["sound", "damaged", "unfinished", "drift", "repaired"]

EXIT_CODES: dict[Status, int] = {
    "sound": 0,
    "damaged": 10,
    "unfinished": 11,
    "drift": 12,
    "repaired": 13,
}

_NUM_SHOWN = 20
_NUM_ROWS_SHOWN = 4
_HASH_DIGITS = 12


@click.command()
@click.argument("store", callback=store_place)
@click.option(
    "--sample",
    default="100%",
    show_default=True,
    help="Share of the blocks whose every byte is read; all the rest is checked in full anyway.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is chosen at random.")
@click.option(
    "--repair",
    is_flag=True,
    help="Mend what has a second copy, and remove what else is broken: extract rebuilds just that.",
)
@click.option(
    "--recompute",
    "num_recompute",
    type=int,
    metavar="K",
    help="Compute K random samples again and compare; needs --from.",
)
@click.option(
    "--from",
    "manifest",
    type=click.Path(path_type=Path),
    help="With --recompute: the manifest, or folder, that the store was made from.",
)
@click.option(
    "--columns",
    type=click.Path(path_type=Path),
    help="With --recompute: as for extract.",
)
@click.option("--backbone", help="With --recompute. [default: the one the store was made with]")
@click.option("--weights", help="With --recompute. [default: those the store was made with]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="With --recompute: auto, cpu, or a CUDA device as cuda:1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON on stdout.")
def verify(
    store: Place,
    sample: str,
    seed: int,
    repair: bool,
    num_recompute: int | None,
    manifest: Path | None,
    columns: Path | None,
    backbone: str | None,
    weights: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Compare STORE with its seal, receipts and checksums, to the last byte.

    Looked at are the seal and its hashes, receipts, metadata, tables, and the shards: names, sizes,
    indexes, checksums, rows, shapes, and whether values are finite. Files that nothing names are
    told, too. Nothing is written unless --repair is given.

    --recompute tells whether the same images still give the same features: that finds other
    weights, preprocessing, library versions or arithmetic, and images that have changed.

    \b
    Exit codes:
      0   sound and sealed (after --repair: mended, nothing more to do)
      10  damaged (after --repair: beyond repair, and left as it is)
      11  sound as far as it goes, but extraction has not finished
      12  sound, but computing again gives something else, or an image has changed
      13  repaired: run the same `sam3cache extract` again, which rebuilds what was removed
      1, 2  it could not be verified (no store, no access), or an option cannot be used

    \b
    Examples:
      sam3cache store verify features/angio.zarr
      sam3cache store verify features/angio.zarr --sample 5%
      sam3cache store verify features/angio.zarr --recompute 5 --from angio.csv
      sam3cache store verify features/angio.zarr --repair
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.features import ObjectPath, repair_store, verify_store

    share = _share(sample)
    if (num_recompute is None) != (manifest is None):
        raise ConfigError(
            "--recompute K and --from MANIFEST go together: K samples are computed from its images"
        )
    if num_recompute is not None and repair:
        raise ConfigError("--repair and --recompute: give one, and the other in a second run")
    if repair and isinstance(store, ObjectPath):
        raise ConfigError(
            f"{store}: --repair works on a folder alone; copy the store (aws s3 sync {store} "
            f"{store.name}), repair the copy, and let the same extraction mend it"
        )
    repaired: RepairResult | None = None
    computed: RecomputeResult | None = None
    with progress("Reading", unit="MB") as bar:
        if repair and isinstance(store, Path):
            repaired = repair_store(store, share, seed, _in_megabytes(bar))
            found = repaired.found
        else:
            found = verify_store(store, share, seed, _in_megabytes(bar))
    if num_recompute is not None and manifest is not None and not found.damage:
        from sam3cache.extract.recompute import RecomputeConfig, recompute
        from sam3cache.runtime import pick_device

        config = RecomputeConfig(
            store=store,
            manifest=manifest,
            num_samples=num_recompute,
            columns=columns,
            seed=seed,
            backbone=backbone,
            weights=weights,
            device=pick_device(device),
        )
        with progress("Computing again", unit="images") as bar:
            computed = recompute(config, bar.report)
    status = _status(found, repaired, computed)
    if as_json:
        click.echo(json.dumps(_as_json(status, found, repaired, computed), indent=2))
    else:
        for line in _lines(status, found, repaired, computed):
            click.echo(line)
        if num_recompute is not None and computed is None:
            click.echo("Nothing was computed again: the store is damaged.")
    if EXIT_CODES[status]:
        raise click.exceptions.Exit(EXIT_CODES[status])


def _share(text: str) -> float:
    """Read "5%"."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = 0.0
    if not percent or rest or not 0 < share <= 1:
        raise ConfigError(
            f"--sample {text}: expected a percentage of the blocks, above 0% and at most 100%, "
            "such as 5%"
        )
    return share


def _in_megabytes(bar: Bar) -> Any:
    def report(num_done: int, num_total: int) -> None:
        bar.report(round(num_done / 1e6), round(num_total / 1e6))

    return report


def _status(
    found: VerifyResult, repaired: RepairResult | None, computed: RecomputeResult | None
) -> Status:
    if found.damage and repaired is not None and not repaired.lost:
        return "sound" if repaired.sealed else "repaired"
    if found.damage:
        return "damaged"
    if computed is not None and (computed.has_drift or computed.changed_images):
        return "drift"
    return "sound" if found.sealed else "unfinished"


def _lines(
    status: Status,
    found: VerifyResult,
    repaired: RepairResult | None,
    computed: RecomputeResult | None,
) -> Iterator[str]:
    """Say what was found, a line each, and what to do next."""
    yield from _finding_lines(found.damage)
    unfinished = [finding for finding in found.findings if finding.kind == "unfinished"]
    strays = [finding for finding in found.findings if finding.kind == "stray"]
    yield from _finding_lines(unfinished)
    if strays:
        yield (
            f"note: named by nothing: {strays[0].path}{_others_text(len(strays) - 1)}; "
            "what sam3cache left there `sam3cache store repack` deletes, the rest may go"
        )
    if computed is not None:
        yield from _computed_lines(computed)
    if repaired is not None:
        yield from _repaired_lines(repaired)
    num_findings = len(found.damage)
    state = {
        "sound": "sound and sealed",
        "damaged": f"DAMAGED, {num_findings} finding{'' if num_findings == 1 else 's'}",
        "unfinished": "sound, but extraction has not finished",
        "drift": "sound, but not what would be computed now",
        "repaired": "repaired, and no longer sealed",
    }[status]
    if status == "sound" and repaired is not None and found.damage:
        state = "mended: sound and sealed"
    yield (
        f"{found.store}: {state}; {found.num_samples} samples, {found.num_files} files, "
        f"{found.num_shards_read} of {found.num_shards} shards read "
        f"({size_text(found.num_bytes)}) in {format_duration(found.elapsed_s)}."
    )
    yield from _advice(status, found, repaired)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    shown = findings[:_NUM_SHOWN]
    kind_width = max((len(finding.kind) for finding in shown), default=0)
    path_width = max((len(finding.path) for finding in shown), default=0)
    for finding in shown:
        block = "" if finding.block is None else f"block {finding.block}"
        line = f"{finding.kind:<{kind_width}}  {finding.path:<{path_width}}  {block:<9}"
        yield f"{line}  {finding.message}{_rows_text(finding.rows)}"
    rest = Counter(finding.kind for finding in findings[_NUM_SHOWN:])
    if rest:
        counts = ", ".join(f"{number} {kind}" for kind, number in rest.most_common())
        yield f"… and {sum(rest.values())} more ({counts}); --json lists all"


def _others_text(num_others: int) -> str:
    return f" and {num_others} other files" if num_others else ""


def _rows_text(rows: Sequence[int]) -> str:
    if not rows:
        return ""
    some = ", ".join(map(str, rows[:_NUM_ROWS_SHOWN]))
    more = f" and {len(rows) - _NUM_ROWS_SHOWN} more" if len(rows) > _NUM_ROWS_SHOWN else ""
    return f" (row{'s' * (len(rows) > 1)} {some}{more})"


def _computed_lines(computed: RecomputeResult) -> Iterator[str]:
    for name, changes in computed.fingerprint_changes.items():
        yield f"drift: {name} would be made otherwise now: {'; '.join(map(_short, changes))}"
    for sample in computed.samples:
        if sample.image != "same":
            yield f"image {sample.image}: {sample.id} ({sample.source}): {sample.reason}"
        for level in sample.levels:
            verdict = "equal" if level.equal else ("rounding" if level.holds else "DRIFT")
            yield (
                f"{verdict:<8}  {sample.id}  {level.level}  relative error "
                f"{level.relative_error:.2g} (rounding: up to {level.tolerance:.2g}), "
                f"cosine {level.cosine:.6f}"
            )
    for change in computed.environment_changes:
        yield f"note: {change}"


def _short(change: str) -> str:
    """Cut hashes: their beginnings tell them apart."""
    return " ".join(
        f"{word[:_HASH_DIGITS]}…" if len(word) >= 64 else word for word in change.split(" ")
    )


def _repaired_lines(repaired: RepairResult) -> Iterator[str]:
    for path in repaired.mended:
        yield f"mended: {path}"
    for item, block in repaired.dropped[:_NUM_SHOWN]:
        yield f"removed: {item} of block {block}"
    if len(repaired.dropped) > _NUM_SHOWN:
        yield f"… and {len(repaired.dropped) - _NUM_SHOWN} more; --json lists all"
    for sentence in repaired.lost:
        yield f"beyond repair: {sentence}"


def _advice(status: Status, found: VerifyResult, repaired: RepairResult | None) -> Iterator[str]:
    again = "run the same `sam3cache extract` again"
    if status == "damaged" and repaired is None:
        yield (
            f"Next: sam3cache store verify {found.store.as_posix()} --repair removes what is "
            "broken, so that the same extraction rebuilds just that."
        )
    if status == "unfinished":
        yield f"Next: {again}; finished blocks are not computed twice."
    if status == "repaired" and repaired is not None:
        yield f"Next: {again}; it computes {_to_rebuild(repaired)}, and seals the store."
        others = sorted(
            {item for item, _ in repaired.dropped if item.startswith("labels.")} - {"labels.mask"}
        )
        for item in others:
            name = item.partition(".")[2]
            yield f"Then: sam3cache store labels set {name} --from MANIFEST, as masks were removed."
    if status == "drift":
        yield (
            "Next: train on features of one kind alone. Give the weights and versions that the "
            "store was made with, or extract into a new store."
        )


def _to_rebuild(repaired: RepairResult) -> str:
    blocks = {block for item, block in repaired.dropped if item.startswith("levels.")}
    if not blocks:
        return "no feature"
    return f"{len(blocks)} block{'s' * (len(blocks) > 1)}"


def _as_json(
    status: Status,
    found: VerifyResult,
    repaired: RepairResult | None,
    computed: RecomputeResult | None,
) -> dict[str, Any]:
    content = {"status": status, "exit_code": EXIT_CODES[status], **asdict(found)}
    content["store"] = found.store.as_posix()
    content["repair"] = None
    if repaired is not None:
        content["repair"] = {
            name: value for name, value in asdict(repaired).items() if name != "found"
        }
    content["recompute"] = None
    if computed is not None:
        levels_hold = {
            sample.id: {level.level: level.holds for level in sample.levels}
            for sample in computed.samples
        }
        content["recompute"] = {
            **asdict(computed),
            "has_drift": computed.has_drift,
            "holds": levels_hold,
        }
    return content
