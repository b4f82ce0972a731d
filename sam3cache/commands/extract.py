"""``sam3cache extract``: the first pass over the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.printing import warn_of_samples
from sam3cache.commands.progress import Stages
from sam3cache.errors import StoppedError

if TYPE_CHECKING:
    from sam3cache.extract import ExtractConfig, ExtractProgress, ExtractResult
    from sam3cache.extract.forecast import Forecast

SET_ASIDE_EXIT_CODE = 3
UNSEALED_EXIT_CODE = 4


# What extract and plan both take, the manifest apart; in the order of --help.
_OPTIONS = (
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="The store to write or go on with. [default: features/MANIFEST'S NAME.zarr]",
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
        type=int,
        help="Images a forward pass, 1 to 16. [default: the store's; else 8 on CUDA, 1 on a CPU]",
    ),
    click.option(
        "--numeric-path",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Arithmetic of the tower; auto is bf16 on CUDA and fp32 on a CPU.",
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
    output: Path | None,
    columns: Path | None,
    levels: str,
    backbone: str,
    weights: str | None,
    devices: str,
    batch_size: int | None,
    numeric_path: str,
    resize: str,
    variants: str | None,
    seed: int | None = None,
) -> ExtractConfig:
    """Return what the options say."""
    from sam3cache.extract import ExtractConfig
    from sam3cache.runtime import parse_devices

    return ExtractConfig(
        manifest=manifest,
        output=output or Path("features") / f"{manifest.resolve().stem}.zarr",
        columns=columns,
        levels=tuple(name.strip() for name in levels.split(",") if name.strip()),
        backbone=backbone,
        weights=weights,
        devices=tuple(parse_devices(devices)),
        batch_size=batch_size,
        resize_mode="squash" if resize == "squash" else "letterbox",
        numeric_path="auto"
        if numeric_path == "auto"
        else ("bf16" if numeric_path == "bf16" else "fp32"),
        seed=seed,
        variants=None if variants is None else _names_of_variants(variants),
    )


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
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def extract(manifest: Path, seed: int | None, as_json: bool, **options: Any) -> None:
    """Run SAM 3's vision tower once over the images of MANIFEST and store its features.

    MANIFEST is a CSV with a line a sample, or a folder with images/ and perhaps masks/. Stop it at
    any time: the same command goes on where it was. Samples that cannot be used are listed, and
    the exit code is then 3; it is 4 when another process is still at work on the store.

    \b
    Examples:
      sam3cache extract phantoms --backbone sam3-mini
      sam3cache extract angio.csv --columns columns.toml -o features/angio.zarr
      sam3cache extract angio.csv --variants hflip,rot10,rot-10,gamma
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract import extract as run

    config = make_config(manifest, seed=seed, **options)
    with ExitStack() as stack:
        try:
            result = run(config, partial(show_stage, Stages(stack)), _announce)
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted; every finished block of {config.output} is kept: run the same "
                "command again to go on"
            ) from None
    warn_of_samples(result.set_aside, result.leaks, result.num_moved)
    if as_json:
        click.echo(json.dumps(_as_json(result), indent=2))
    else:
        _print_summary(result)
    if not result.sealed:
        raise click.exceptions.Exit(UNSEALED_EXIT_CODE)
    if result.set_aside:
        raise click.exceptions.Exit(SET_ASIDE_EXIT_CODE)


def _announce(forecast: Forecast) -> None:
    """Say what is going to be written, if anything is."""
    from sam3cache.extract.forecast import in_bytes

    if forecast.num_to_compute:
        parts = ", ".join(f"{item.name} {in_bytes(item.size_bytes)}" for item in forecast.items)
        of_variants = 0 if forecast.variants is None else forecast.variants.num_to_compute
        variants = f" ({of_variants} of them variants)" if of_variants else ""
        click.echo(
            f"{forecast.num_to_compute} images to compute{variants}, about "
            f"{in_bytes(forecast.size_bytes)} to write in {forecast.num_files} files ({parts}); "
            f"{in_bytes(forecast.free_bytes)} are free.",
            err=True,
        )


def show_stage(stages: Stages, state: ExtractProgress) -> None:
    """Show how far an extraction, or the planning of one, is."""
    bar = stages.show(state.stage.capitalize(), state.num_done, state.num_total)
    bar.rows(
        (worker.name, f"{worker.memory_bytes / 1e9:.1f} GB, {worker.use:.0%} in the tower")
        for worker in state.workers.values()
    )


def _print_summary(result: ExtractResult) -> None:
    state = "sealed" if result.sealed else "not sealed yet: another process is at work on it"
    changes = [
        f"{number} {what}"
        for number, what in (
            (result.num_computed, f"computed in {result.elapsed_s:.1f} s"),
            (result.num_kept, "kept" + _renamed(result.num_renamed)),
            (result.num_relabelled, "with a new mask"),
            (result.num_reannotated, "with new annotations"),
            (result.num_removed, "changed, mended or no longer in the manifest"),
            (len(result.set_aside), "set aside"),
        )
        if number
    ]
    variants = f" and {result.num_variants} variants" if result.num_variants else ""
    click.echo(
        f"{result.store}: {result.num_samples} samples{variants}, {state}; {', '.join(changes)}."
    )
    click.echo(f"Splits: {result.split_rule}.")
    if result.sealed:
        _print_what_it_is_good_for(result)


def _renamed(num_renamed: int) -> str:
    return f" ({num_renamed} renamed)" if num_renamed else ""


def _print_what_it_is_good_for(result: ExtractResult) -> None:
    """Say what can be learned from a store: a folder too deep leaves all masks behind."""
    from sam3cache.features import open_store
    from sam3cache.heads import HEADS, fitting_heads

    click.echo(f"{result.num_with_mask} have a mask, {result.num_with_angles} both view angles.")
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
