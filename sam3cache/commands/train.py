"""``sam3cache train``: a head on stored features."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.defaults import only_store
from sam3cache.commands.progress import Stages, format_duration
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.training import Progress, TrainConfig, TrainResult

_GROUPS = {
    "What to train": (
        "head",
        "head_options",
        "label_set",
        "overlay",
        "feature_precision",
        "loss_size_px",
        "bce_weight",
    ),
    "How": ("epochs", "batch_size", "learning_rate", "seed"),
    "Where it runs": ("device", "precision", "residency"),
    "The run": ("name", "output", "resume", "overwrite", "allow_unsealed", "as_json"),
}


class _GroupedCommand(click.Command):
    """Shows its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group; those of no group are click's own."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        rest = {option.name: option for option in options}
        groups = {title: [rest.pop(name) for name in names] for title, names in _GROUPS.items()}
        for title, parameters in (*groups.items(), ("Other", list(rest.values()))):
            records = [parameter.get_help_record(ctx) for parameter in parameters]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


@click.command(cls=_GroupedCommand)
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option(
    "--head",
    default="film-detail",
    show_default=True,
    help="film-detail, film-conv, linear, or your own as package.module:Class.",
)
@click.option(
    "--head-option",
    "head_options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An argument of the head's own, such as embedding_dim=128; may be repeated.",
)
@click.option("--label-set", default="mask", show_default=True, help="Masks of the store to learn.")
@click.option("--overlay", help="Folder of labels and annotations kept beside the store.")
@click.option(
    "--feature-precision",
    type=click.Choice(["float16", "bf16", "r7", "int8", "r5"]),
    help="Read levels as they are stored in this precision. [default: the most exact]",
)
@click.option(
    "--loss-size",
    "loss_size_px",
    default=1008,
    show_default=True,
    help="Side of the grid, in pixels, that logits and masks are compared on.",
)
@click.option(
    "--bce-weight",
    default=0.5,
    show_default=True,
    help="Share of cross-entropy in the loss; the rest is Dice (0: Dice alone).",
)
@click.option("--epochs", default=30, show_default=True, help="Passes over the training split.")
@click.option("--batch-size", default=16, show_default=True, help="Samples a step.")
@click.option(
    "--lr",
    "learning_rate",
    type=float,
    help="Of AdamW at the first step; a cosine takes it to 0. [default: the head's own]",
)
@click.option("--seed", default=0, show_default=True, help="Of weights, order and dropout.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, or a CUDA device as cuda:1."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="What the head computes in; auto is half precision on a GPU, fp32 on a CPU.",
)
@click.option(
    "--residency",
    type=click.Choice(["auto", "device", "ram", "stream"]),
    default="auto",
    show_default=True,
    help="Where samples lie: the device's memory, RAM (one copy for all runs of a machine), or the "
    "store, read ahead of their use. auto takes the first that fits; the result says why.",
)
@click.option("--name", help="Of the run: its folder below the output. [default: the head's name]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("checkpoints"),
    show_default=True,
    help="Folder of all runs.",
)
@click.option("--resume", is_flag=True, help="Go on after the run's last finished epoch.")
@click.option("--overwrite", is_flag=True, help="Replace a run of this name.")
@click.option("--allow-unsealed", is_flag=True, help="Train on an unfinished extraction.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def train(
    store: Path | None,
    head_options: tuple[str, ...],
    name: str | None,
    output: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a head on STORE's training split, keeping the best by validation Dice.

    STORE is what `sam3cache extract` wrote; it may be left out if features/ holds just one.
    Checkpoints go to checkpoints/NAME/best and checkpoints/NAME/last, the course of the training
    to metrics.jsonl and, for TensorBoard, to tensorboard/ beside them. An interrupted run goes on
    with --resume.

    \b
    Examples:
      sam3cache train features/angio.zarr --name first
      sam3cache train features/angio.zarr --head linear --name floor
      sam3cache train features/angio.zarr --name first --resume    (same options as before)
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.training import TrainConfig
    from sam3cache.training import train as run

    config = TrainConfig(
        store=str(store or only_store()),
        name=settings["head"].replace(":", ".") if name is None else name,
        head_options=dict(_parse_option(option) for option in head_options),
        output=str(output),
        **settings,
    )
    with ExitStack() as stack:
        result = run(config, partial(_show, Stages(stack)))
    if as_json:
        click.echo(json.dumps(_as_json(result), indent=2))
    else:
        _print_summary(result, config)


def _show(stages: Stages, state: Progress) -> None:
    note = None
    if state.loss is not None:
        best = "" if state.best_dice is None else f", best val Dice {state.best_dice:.4f}"
        note = f"epoch {state.epoch}, loss {state.loss:.4f}{best}"
        if state.num_validated is not None:
            note += f", validated {state.num_validated}/{state.num_to_validate}"
    title = "Loading" if state.stage == "load" else "Training"
    stages.show(title, state.num_done, state.num_total, note)


def _parse_option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where the value is JSON, or else text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--head-option {text!r}: expected NAME=VALUE, such as embedding_dim=128")
    if value in ("True", "False"):  # as Python writes them
        value = value.lower()
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _print_summary(result: TrainResult, config: TrainConfig) -> None:
    from sam3cache.evaluation import notices_of_features
    from sam3cache.features import open_store
    from sam3cache.heads.checkpoint import read_record

    speed = "" if result.images_per_s is None else f", {result.images_per_s:.1f} images/s"
    click.echo(
        f"Best validation Dice {result.best_dice:.4f} in epoch {result.best_epoch} of "
        f"{result.epochs}, over {result.num_val} images; trained on {result.num_train} samples "
        f"in {format_duration(result.elapsed_s)}{speed}."
    )
    click.echo(
        f"Samples: {result.placement} ({result.resident_bytes / 1e9:.2f} GB held, ready after "
        f"{result.load_s:.1f} s)."
    )
    click.echo(
        f"Head: {result.parameters['total']:,} parameters, {result.gflop:.1f} GFLOP an image."
    )
    if result.num_without_mask:
        click.echo(f"{result.num_without_mask} samples without a mask were left out.")
    if result.num_empty_masks:
        click.echo(
            f"{result.num_empty_masks} validation images have an empty mask: they count as Dice 0 "
            "where the head marks anything, else not at all."
        )
    click.echo(f"Checkpoint: {result.best_checkpoint.as_posix()}")
    store = open_store(config.store, allow_unsealed=config.allow_unsealed, overlay=config.overlay)
    for notice in notices_of_features(store, tuple(read_record(result.best_checkpoint).levels)):
        click.echo(f"Note: {notice}")
    run_dir = result.run_dir.as_posix()
    beside = "" if config.overlay is None else f" --overlay {Path(config.overlay).as_posix()}"
    click.echo(f"Next: sam3cache eval {Path(config.store).as_posix()} {run_dir}{beside}")


def _as_json(result: TrainResult) -> dict[str, Any]:
    return {
        **asdict(result),
        "run_dir": result.run_dir.as_posix(),
        "best_checkpoint": result.best_checkpoint.as_posix(),
    }
