"""``sam3cache plan``: what an extraction would take, before it begins."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.extract import extraction_options, make_config, show_stage
from sam3cache.commands.progress import Stages, format_duration
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.extract.forecast import Forecast, TimeForecast, VariantForecast

# It is nowhere: what noise takes is planned.
_NO_MANIFEST = Path("noise") / "noise"


@click.command()
@click.argument("manifest", type=click.Path(path_type=Path), required=False)
@extraction_options
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    help="Plan for so many images like those of MANIFEST; without one, for noise.",
)
@click.option("--no-time", is_flag=True, help="Do not run the tower for some seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON on stdout.")
def plan(
    manifest: Path | None, num_images: int | None, no_time: bool, as_json: bool, **options: Any
) -> None:
    """Say what extracting the images of MANIFEST would write, and how long it would take.

    Nothing is changed. The time comes from a short run of the tower, of decoding and of the disk;
    what compresses is estimated from a few images. Ends with an error when it would not fit on the
    disk, below the plan, and says which levels or precisions would.

    \b
    Examples:
      sam3cache plan phantoms --backbone sam3-mini
      sam3cache plan angio.csv --columns columns.toml --levels fpn_72,fpn_144.int8
      sam3cache plan --num-images 1000000 --no-time
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.extract.plan import plan as run

    if manifest is None:
        if num_images is None:
            raise ConfigError("no MANIFEST given; give one, or a number with --num-images")
        manifest = _NO_MANIFEST
    config = make_config(manifest, **options)
    with ExitStack() as stack:
        forecast = run(
            config,
            partial(show_stage, Stages(stack)),
            num_images=num_images,
            measure=not no_time,
        )
    if as_json:
        click.echo(json.dumps(_as_json(forecast), indent=2))
    else:
        _print(forecast)
    forecast.require_space()


def _as_json(forecast: Forecast) -> dict[str, Any]:
    fields = asdict(forecast)
    packed = fields.pop("packed")
    return {
        **fields,
        "store": forecast.store.as_posix(),
        "size_bytes": forecast.size_bytes,
        "num_files": forecast.num_files,
        "fits": forecast.fits,
        "num_encoded": packed["num_encoded"],
    }


def _print(forecast: Forecast) -> None:
    from sam3cache.runtime import size_text

    parts = [
        f"{number:,} {what}"
        for number, what in (
            (forecast.num_new, "new"),
            (forecast.num_changed, "changed"),
            (forecast.num_kept, "kept"),
            (forecast.num_renamed, "of them renamed"),
            (forecast.num_set_aside, "to be set aside"),
            (forecast.num_removed, "rows to be given up"),
        )
        if number
    ]
    variants = forecast.variants
    views = f" and {variants.num_samples:,} variants" if variants is not None else ""
    click.echo(f"{forecast.store}: {forecast.num_samples:,} samples{views}; {', '.join(parts)}.")
    if forecast.num_looked_at is not None:
        click.echo(f"All figures are from {forecast.num_looked_at} samples, evenly spread.")
    if not forecast.items:
        click.echo("Nothing is to be written: the store is complete.")
        return
    lines = [("", "samples", "files", "size")]
    for item in forecast.items:
        about = "" if item.is_exact else "about "
        size = about + size_text(item.size_bytes)
        lines.append((item.name, f"{item.num_samples:,}", f"{item.num_files:,}", size))
    total = size_text(forecast.size_bytes)
    if forecast.free_bytes is not None:
        total += f" of {size_text(forecast.free_bytes)} free"
    lines.append(("in all", "", f"{forecast.num_files:,}", total))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].rjust(widths[1]), line[2].rjust(widths[2])]
        click.echo("  " + "  ".join([*cells, line[3]]))
    if variants is not None and variants.num_to_compute:
        _print_variants(variants, forecast.time)
    if forecast.time is not None:
        _print_time(forecast, forecast.time)
    elif forecast.why_no_time:
        click.echo(f"Time: not measured: {forecast.why_no_time}")


def _print_variants(variants: VariantForecast, time: TimeForecast | None) -> None:
    from sam3cache.runtime import size_text

    takes = f"about {size_text(variants.size_bytes)}"
    if time is not None:
        takes += f" and {format_duration(variants.num_to_compute / time.images_per_s)}"
    click.echo(
        f"Of this for variants ({', '.join(variants.names)}): {variants.num_to_compute:,} rows, "
        f"{takes}."
    )


def _print_time(forecast: Forecast, time: TimeForecast) -> None:
    click.echo(
        f"Time: about {format_duration(time.total_s)}: {forecast.num_to_compute:,} images at "
        f"{time.images_per_s:.3g} images/s, and {time.check_s + time.start_s:.0f} s to begin "
        f"(measured on {time.num_measured} images)."
    )
    tower = f"tower {time.tower_images_per_s:.3g} images/s, " if time.tower_images_per_s else ""
    click.echo(
        f"Alone: {tower}decoding {time.decode_images_per_s:.3g} images/s a thread, "
        f"disk {time.write_bytes_per_s / 1e6:,.0f} MB/s."
    )
