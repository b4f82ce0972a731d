"""``sam3cache predict``: a trained head on new images."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.extract import SET_ASIDE_EXIT_CODE
from sam3cache.commands.options import DEVICE, HEAD
from sam3cache.commands.printing import warn_of_samples
from sam3cache.commands.progress import Stages
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.inference import ExportResult, PredictResult


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the results; made if needed."
)
@click.option(
    "--columns",
    type=click.Path(path_type=Path),
    help="TOML file that says which column of a CSV is what (docs/data.md).",
)
@click.option(
    "--primary-angle", type=float, help="LAO positive, in degrees, of images without a manifest."
)
@click.option("--secondary-angle", type=float, help="Cranial positive, likewise.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="A feature store: images whose pixels it knows need no tower, nor angles if it has them.",
)
@click.option(
    "--coco", type=click.Path(path_type=Path), help="Also write COCO JSON (run lengths) here."
)
@click.option("--overlay", is_flag=True, help="Also draw the masks' contours on the pictures.")
@click.option(
    "--probabilities",
    type=click.Choice(["npy", "png"]),
    help="Also write probabilities: float32, or PNG of 16 bits.",
)
@click.option(
    "--threshold",
    type=float,
    help="Probability from which a pixel counts as mask, for example the one that `sam3cache eval "
    "--threshold auto` chose. [default: the checkpoint's, mostly 0.5]",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Write the head as a .pt2 of torch.export; then IMAGES may be left out.",
)
@HEAD
@click.option("--backbone", help="sam3, sam3.1 or sam3-mini. [default: what the features are of]")
@click.option(
    "--weights", help="Checkpoint file or hub repository of it. [default: the backbone's own]"
)
@DEVICE
@click.option(
    "--batch-size", type=int, help="Images a forward pass. [default: 8 on CUDA, 1 on a CPU]"
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there already.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")
def predict(
    checkpoint: Path,
    images: tuple[str, ...],
    output: Path | None,
    primary_angle: float | None,
    secondary_angle: float | None,
    threshold: float | None,
    export: Path | None,
    head: str | None,
    device: str,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Predict masks of IMAGES with the head of CHECKPOINT.

    CHECKPOINT is a run's folder, whose best checkpoint is taken, or that of one checkpoint. IMAGES
    are files, folders, CSV manifests (with angles) or patterns such as "new/*.png". The tower runs
    over each image, unless a store has the same pixels.

    Masks are PNGs in OUTPUT/masks: 0 and 255 for one class, a folder a class for several labels,
    class numbers where each pixel has one class. predictions.csv lists them. An image that cannot
    be used is listed, and the exit code is then 3.

    \b
    Examples:
      sam3cache predict checkpoints/first new.png --primary-angle 30 -o new
      sam3cache predict checkpoints/first angio.csv --store features/angio.zarr -o out --overlay
      sam3cache predict checkpoints/first --export head.pt2
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    if not images and export is None:
        raise ConfigError(
            "no images are named; give files, folders, a pattern or a manifest, or --export FILE"
        )
    if images and output is None:
        raise ConfigError("no folder for the masks is named; give one by -o")

    from sam3cache.inference import PredictConfig, export_head, predict_images
    from sam3cache.runtime import pick_device

    device = pick_device(device)
    config = None
    if images:
        assert output is not None
        config = PredictConfig(
            checkpoint,
            images,
            output,
            primary_angle_deg=primary_angle,
            secondary_angle_deg=secondary_angle,
            threshold=threshold,
            head=head,
            device=device,
            overwrite=overwrite,
            **options,
        )
    exported = None
    if export is not None:
        exported = export_head(
            checkpoint,
            export,
            head=head,
            threshold=threshold,
            device=device,
            overwrite=overwrite,
        )
    result = None
    if config is not None:
        with ExitStack() as stack:
            stages = Stages(stack)

            def report(num_done: int, num_total: int) -> None:
                stages.show("Predicting", num_done, num_total)

            result = predict_images(config, report)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        warn_of_samples(result.set_aside)
        if result.num_lacking_angles:
            click.echo(
                f"warning: {result.num_lacking_angles} of {result.num_images} images lack a view "
                "angle, which this head reads; give --primary-angle and --secondary-angle, or a "
                "CSV with the angles of each image",
                err=True,
            )
    if as_json:
        summary = {} if result is None else result.record()
        if exported is not None:
            summary["export"] = {**exported.record, "path": exported.path.as_posix()}
        click.echo(json.dumps(summary, indent=2, allow_nan=False))
    else:
        _print(result, exported)
    if result is not None and result.set_aside:
        raise click.exceptions.Exit(SET_ASIDE_EXIT_CODE)


def _print(result: PredictResult | None, exported: ExportResult | None) -> None:
    if exported is not None:
        click.echo(
            f"{exported.path.as_posix()}: the head, as torch.export has it; logits differ by at "
            f"most {exported.max_abs_difference:.2g}. How to use it: "
            f"{exported.record_path.as_posix()}"
        )
    if result is None:
        return
    aside = f", {len(result.set_aside)} set aside" if result.set_aside else ""
    click.echo(
        f"{result.output.as_posix()}: masks of {result.num_images} images{aside}, in "
        f"{result.elapsed_s:.1f} s."
    )
    if not result.num_images:
        return
    if result.threshold is not None:
        click.echo(f"Threshold: a probability of {result.threshold:g}.")
    if result.num_from_store or result.num_from_tower:
        click.echo(
            f"Features: {result.num_from_store} from the store, {result.num_from_tower} by the "
            "tower."
        )
    else:
        click.echo("Features: none, as the head reads the pictures alone.")
    if result.num_angles_from_store:
        click.echo(f"View angles: {result.num_angles_from_store} from the store.")
    if result.coco is not None:
        click.echo(f"COCO: {result.coco.as_posix()}")
