"""``sam3cache extract``: the first pass over the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sam3cache.commands.interrupts import signals_interrupt, stopped_by
from sam3cache.commands.places import store_place
from sam3cache.commands.printing import warn_of_samples
from sam3cache.commands.progress import Stages
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.extract import ExtractConfig, ExtractProgress, ExtractResult, TimeShares
    from sam3cache.extract.forecast import Forecast
    from sam3cache.features import Place

SET_ASIDE_EXIT_CODE = 3
UNSEALED_EXIT_CODE = 4


# What extract and plan both take, the manifest apart; in the order of --help.
_OPTIONS = (
    click.option(
        "-o",
        "--output",
        callback=store_place,
        metavar="PATH",
        help="The store to write or go on with, a folder or s3://bucket/NAME.zarr. [default: "
        "features/MANIFEST'S NAME.zarr]",
    ),
    click.option(
        "--columns",
        type=click.Path(path_type=Path),
        help="TOML file that says which column of the CSV is what (docs/data.md).",
    ),
    click.option(
        "--levels",
        default="fpn_72,image_1008",
        show_default=True,
        help="What to store: some of trunk_72, fpn_72, fpn_144, fpn_288, image_1008; "
        "those of the tower in other bits with .int8, .r7, .r5 or .bf16 behind, as fpn_72.int8.",
    ),
    click.option(
        "--backbone",
        default="sam3",
        show_default=True,
        help="sam3, sam3.1, or sam3-mini: the same classes in small, to try things out.",
    ),
    click.option(
        "--weights",
        help="Checkpoint file or hub repository; 'random' for tests. [default: the backbone's own]",
    ),
    click.option(
        "--devices",
        default="all",
        show_default=True,
        help="A worker process each: all, cpu, cpu:2, or CUDA devices as 0,1.",
    ),
    click.option(
        "--batch-size",
        default="auto",
        show_default=True,
        help="Images a forward pass, 1 to 16; auto is the store's, else on CUDA what a short "
        "measurement finds and 1 on a CPU. Where memory runs out, it is halved.",
    ),
    click.option(
        "--numeric-path",
        type=click.Choice(["auto", "fp32", "bf16", "bf16+compile"]),
        default="auto",
        show_default=True,
        help="Arithmetic of the tower; auto is bf16 on CUDA and fp32 on a CPU. bf16+compile is for "
        "long extractions on a GPU: torch.compile first takes a minute or two.",
    ),
    click.option(
        "--resize",
        type=click.Choice(["letterbox", "squash"]),
        default="letterbox",
        show_default=True,
        help="Keep the aspect ratio and pad, or squash to the square as SAM 3's processor does.",
    ),
    click.option(
        "--variants",
        help="Changed views of the training samples to store as well: some of hflip, vflip, rotN, "
        "gammaX, zoomX, as hflip,rot10,gamma; or none. [default: the store's; else none]",
    ),
)


def extraction_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what is extracted, and how."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def make_config(
    manifest: Path,
    *,
    output: Place | None,
    columns: Path | None,
    levels: str,
    backbone: str,
    weights: str | None,
    devices: str,
    batch_size: str | None,
    numeric_path: Literal["auto", "fp32", "bf16", "bf16+compile"],
    resize: str,
    variants: str | None,
    seed: int | None = None,
    engine: str = "local",
    strict: bool = False,
) -> ExtractConfig:
    """Return what the options say."""
    from sam3cache.extract import ExtractConfig
    from sam3cache.runtime import parse_devices

    if engine == "ray":
        from sam3cache.extract.ray_engine import cluster_devices

        names = cluster_devices(devices)
    else:
        names = parse_devices(devices)
    return ExtractConfig(
        manifest=manifest,
        output=output or Path("features") / f"{manifest.resolve().stem}.zarr",
        columns=columns,
        levels=tuple(name.strip() for name in levels.split(",") if name.strip()),
        backbone=backbone,
        weights=weights,
        devices=tuple(names),
        batch_size=_parse_batch_size(batch_size),
        resize_mode="squash" if resize == "squash" else "letterbox",
        numeric_path=numeric_path,
        seed=seed,
        variants=None if variants is None else _names_of_variants(variants),
        engine="ray" if engine == "ray" else "local",
        strict=strict,
    )


def _parse_batch_size(text: str | None) -> int | None:
    if text is None or text == "auto":
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--batch-size {text!r}: expected auto, or a number from 1 to 16")
    return int(text)


def _names_of_variants(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@extraction_options
@click.option(
    "--seed",
    type=int,
    help="Of the split, if the manifest has none. [default: the store's; else 0]",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where the workers are: on this machine, or on the nodes of a Ray cluster, whose devices "
    "--devices then means (docs/clusters.md).",
)
@click.option(
    "--strict",
    is_flag=True,
    help="End with an error at the first sample that cannot be used, before anything is computed, "
    "rather than set it aside.",
)
@click.option(
    "--alone",
    is_flag=True,
    help="This process has the store to itself, whatever torchrun, srun or an array of SLURM jobs "
    "says of others: for an array whose elements make a store each.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def extract(
    manifest: Path, seed: int | None, engine: str, alone: bool, as_json: bool, **options: Any
) -> None:
    """Run SAM 3's vision tower once over the images of MANIFEST and store its features.

    MANIFEST is a table with a row a sample (CSV, Parquet), a file that holds many (HDF5, .npz,
    COCO), or a folder: of pictures in images/ and perhaps masks/, or of DICOM files (docs/data.md).
    Samples that cannot be used are listed, and the exit code is then 3; it is 4 when another
    process is still at work on the store.

    Stop it at any time: the same command goes on where it was. Ctrl-C, SIGTERM and SIGUSR1 (as
    SLURM's --signal=USR1@60 sends) end it within seconds, with exit code 130, 143 and 138.

    Beyond one machine, torchrun and srun start this same command several times: each process takes
    its own devices and blocks, and the last one seals the store (docs/clusters.md).

    \b
    Examples:
      sam3cache extract phantoms --backbone sam3-mini
      sam3cache extract angio.csv --columns columns.toml -o features/angio.zarr
      sam3cache extract angio.csv --variants hflip,rot10,rot-10,gamma
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract import extract as run
    from sam3cache.runtime import find_rank

    rank = find_rank()
    if alone:
        # Of the devices and cores of its machine it still has no more than its own part.
        rank = replace(rank, number=0, num_processes=1)
    config = replace(make_config(manifest, seed=seed, engine=engine, **options), rank=rank)
    try:
        with signals_interrupt(), ExitStack() as stack:
            if rank.number:
                result = run(config)  # One of them shows how far all of them are.
            else:
                result = run(config, partial(show_stage, Stages(stack)), _announce, _warn)
    except KeyboardInterrupt as interrupt:
        raise stopped_by(
            interrupt,
            f"every finished block of {config.output} is kept: run the same command again to go on",
        ) from None
    others_seal = not result.sealed and rank.num_processes > 1
    if not others_seal:
        warn_of_samples(result.set_aside, result.leaks, result.num_moved)
    if as_json:
        click.echo(json.dumps(_as_json(result), indent=2))
    elif others_seal:
        click.echo(
            f"{result.store}: process {rank.number + 1} of {rank.num_processes} is done: "
            f"{result.num_computed} images computed in {result.elapsed_s:.1f} s; others are at "
            "work on the store, and the last one seals it."
        )
    else:
        _print_summary(result)
    if others_seal:
        return
    if not result.sealed:
        raise click.exceptions.Exit(UNSEALED_EXIT_CODE)
    if result.set_aside:
        # What only pixels tell has come out meanwhile.
        raise click.exceptions.Exit(1 if config.strict else SET_ASIDE_EXIT_CODE)


def _announce(forecast: Forecast) -> None:
    """Say what is going to be written, if anything is."""
    from sam3cache.runtime import size_text

    if forecast.num_to_compute:
        parts = ", ".join(f"{item.name} {size_text(item.size_bytes)}" for item in forecast.items)
        of_variants = 0 if forecast.variants is None else forecast.variants.num_to_compute
        variants = f" ({of_variants} of them variants)" if of_variants else ""
        click.echo(
            f"{forecast.num_to_compute} images to compute{variants}, about "
            f"{size_text(forecast.size_bytes)} to write in {forecast.num_files} files ({parts})"
            + (
                "."
                if forecast.free_bytes is None
                else f"; {size_text(forecast.free_bytes)} are free."
            ),
            err=True,
        )


def _warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


def show_stage(stages: Stages, state: ExtractProgress) -> None:
    """Show how far an extraction, or the planning of one, is."""
    bar = stages.show(state.stage.capitalize(), state.num_done, state.num_total)
    bar.rows(
        (worker.name, f"{worker.memory_bytes / 1e9:.1f} GB, {_shares_text(worker.time_shares)}")
        for worker in state.workers.values()
    )


def _shares_text(shares: TimeShares) -> str:
    """Say what workers spend their time on; what bounds them has the largest share."""
    return (
        f"{shares.tower:.0%} in the tower, {shares.images:.0%} waiting for images, "
        f"{shares.writing:.0%} for writing"
    )


def _print_summary(result: ExtractResult) -> None:
    state = "sealed" if result.sealed else "not sealed yet: another process is at work on it"
    changes = [
        f"{number} {what}"
        for number, what in (
            (result.num_computed, f"computed in {result.elapsed_s:.1f} s"),
            (result.num_kept, "kept" + _renamed(result.num_renamed)),
            (result.num_relabelled, "with another mask"),
            (result.num_unmasked, "without the mask they had"),
            (result.num_reannotated, "with new annotations"),
            (result.num_replaced, "replaced, being changed or mended"),
            (result.num_removed - result.num_replaced, "no longer in the manifest"),
            (len(result.set_aside), "set aside"),
        )
        if number
    ]
    variants = f" and {result.num_variants} variants" if result.num_variants else ""
    click.echo(
        f"{result.store}: {result.num_samples} samples{variants}, {state}; {', '.join(changes)}."
    )
    if result.time_shares is not None:
        click.echo(f"Time of the workers: {_shares_text(result.time_shares)}.")
    click.echo(f"Splits: {result.split_rule}.")
    if result.sealed:
        _print_what_it_is_good_for(result)


def _renamed(num_renamed: int) -> str:
    return f" ({num_renamed} renamed)" if num_renamed else ""


def _print_what_it_is_good_for(result: ExtractResult) -> None:
    """Say what can be learned from a store: a folder too deep leaves all masks behind."""
    from sam3cache.features import open_store
    from sam3cache.heads import HEADS, fitting_heads

    kept = ""
    if result.num_with_mask and not result.are_masks_of_manifest:
        kept = " (as they had: the manifest names none)"
    click.echo(
        f"{result.num_with_mask} have a mask{kept}, {result.num_with_angles} both view angles."
    )
    if not result.num_with_mask:
        click.echo(
            "Without masks nothing can be trained: give a manifest that names them, or a folder "
            "with images/ and masks/ (docs/data.md), and run the same command again."
        )
        return
    path = result.store
    fitting = fitting_heads(open_store(path).served_levels)
    if fitting:
        head = "" if fitting[0] == next(iter(HEADS)) else f" --head {fitting[0]}"
        click.echo(f"Next: sam3cache train {path.as_posix()}{head} --name {path.stem}")


def _as_json(result: ExtractResult) -> dict[str, Any]:
    return {**asdict(result), "store": result.store.as_posix()}
