"""``sam3cache phantom``: draw artificial angiograms."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sam3cache.commands.progress import progress


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--num", "num_images", default=48, show_default=True, help="How many images.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same files.")
@click.option("--size", "size_px", default=512, show_default=True, help="Rows and columns, px.")
@click.option(
    "--views-per-patient",
    default=4,
    show_default=True,
    help="Images of one patient; a patient never falls into two splits.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON on stdout.")
def phantom(
    out: Path, num_images: int, seed: int, size_px: int, views_per_patient: int, as_json: bool
) -> None:
    """Draw artificial angiograms with exact masks, to try everything out.

    OUT is a folder to create. It gets images/, masks/ (0 and 255), branches/ (a number for each
    vessel, named in classes.json) and manifest.csv, which extract reads as it is.

    They are drawn, not measured: enough to try the whole road and to see whether a head uses the
    view angles, never evidence about patients.

    \b
    Examples:
      sam3cache phantom phantoms --num 200 --seed 1
      sam3cache extract phantoms --backbone sam3-mini
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.images.phantom import make_phantoms

    with progress("Drawing", total=num_images, unit="images") as bar:
        manifest = make_phantoms(
            out,
            num_images,
            seed,
            size_px=size_px,
            views_per_patient=views_per_patient,
            report=lambda num_done, num_all: bar.update(),
        )
    if as_json:
        made = {"manifest": str(manifest), "num_images": num_images, "seed": seed}
        click.echo(json.dumps(made))
    else:
        click.echo(f"{num_images} images: {manifest}")
