"""``sam3cache train``: a head on stored features."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.defaults import only_store
from sam3cache.commands.places import show_fetching, store_place
from sam3cache.commands.printing import plain_console
from sam3cache.commands.progress import Stages, format_duration
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.features import Place
    from sam3cache.training import Outlook, Progress, RunOutcome, TrainConfig, TrainResult
    from sam3cache.training.pool import PoolProgress

SET_ASIDE_EXIT_CODE = 3
"""Of many runs some have failed; the others are done."""

_MAX_NAMED = 4
"""Classes that a warning names."""

FAR_TOO_LOW = 0.01
"""A validation Dice below which something is the matter."""

_GROUPS = {
    "What to train": (
        "head",
        "head_options",
        "label_set",
        "overlay",
        "feature_precision",
        "loss",
        "loss_size_px",
        "bce_weight",
        "augment",
        "variants",
    ),
    "How": (
        "epochs",
        "batch_size",
        "micro_batch",
        "learning_rate",
        "ema",
        "patience",
        "seed",
        "others",
    ),
    "Many runs": ("experiments_file", "seeds", "folds"),
    "Where it runs": ("device", "precision", "compile", "residency"),
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
@click.argument("store", callback=store_place, required=False)
@click.option(
    "--head",
    default="film-detail",
    show_default=True,
    help="film-detail, film-conv, film-pyramid, linear, or your own as package.module:Class.",
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
    "--loss",
    help="dice-bce, dice-ce, focal, dice-focal, cldice or boundary (docs/heads.md). [default: "
    "dice-bce for masks of yes and no, dice-ce for class numbers]",
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
@click.option(
    "--augment",
    metavar="NAMES",
    default="",
    callback=lambda ctx, parameter, text: tuple(filter(None, text.split(","))),
    help="Change batches at random: some of crop,photometric,noise,channel-dropout.",
)
@click.option(
    "--variants",
    default="all",
    show_default=True,
    help="Stored variants of training images to draw from: all, none, or names as hflip,rot10.",
)
@click.option("--epochs", default=30, show_default=True, help="Passes over the training split.")
@click.option("--batch-size", default=16, show_default=True, help="Samples a step.")
@click.option(
    "--micro-batch",
    default="auto",
    show_default=True,
    callback=lambda ctx, parameter, text: _parse_micro_batch(text),
    help="Samples that go through the head at once; the step stays that of the whole batch. auto "
    "is what fits in the device's memory.",
)
@click.option(
    "--lr",
    "learning_rate",
    type=float,
    help="Of AdamW at the first step; a cosine takes it towards 0. [default: the head's own]",
)
@click.option(
    "--ema",
    default=0.0,
    metavar="DECAY",
    help="Validate and keep a moving average of the weights, such as 0.99. [default: 0, none]",
)
@click.option(
    "--patience",
    type=int,
    metavar="EPOCHS",
    help="End after so many epochs without a better validation Dice. [default: never]",
)
@click.option(
    "--seed", default=0, show_default=True, help="Of weights, order, augmentation and dropout."
)
@click.option(
    "--set",
    "others",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other setting of TrainConfig, such as weight_decay=0.05, warmup_epochs=1, "
    "lr_scaling=sqrt, class_weights=[1,2], order_seed=0, save_minutes=1; may be repeated.",
)
@click.option(
    "--experiments",
    "experiments_file",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Train all [[experiment]] tables of a file (docs/experiments.md); what they leave out is "
    "as said here.",
)
@click.option("--seeds", default=1, show_default=True, help="Runs of each, a seed apart.")
@click.option(
    "--folds",
    default=0,
    help="Cross-validate over so many parts of train and val, by group; test is left alone.",
)
@click.option(
    "--device",
    "--devices",
    default="auto",
    show_default=True,
    help="auto, cpu, or a CUDA device as cuda:1; for many runs also all, cpu:2 or cuda:0,cuda:1, "
    "a process each.",
)
@click.option("--compile", is_flag=True, help="Let torch compile the head, where it can.")
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
@click.option("--resume", is_flag=True, help="Go on where the run was last saved.")
@click.option("--overwrite", is_flag=True, help="Replace a run of this name.")
@click.option("--allow-unsealed", is_flag=True, help="Train on an unfinished extraction.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def train(
    store: Place | None,
    head_options: tuple[str, ...],
    others: tuple[str, ...],
    experiments_file: Path | None,
    seeds: int,
    folds: int,
    name: str | None,
    output: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a head on STORE's training split, keeping the best by validation Dice.

    STORE is what `sam3cache extract` wrote; it may be left out if features/ holds just one.
    Checkpoints go to checkpoints/NAME/best and checkpoints/NAME/last, the course of the training
    to metrics.jsonl and, for TensorBoard, to tensorboard/ beside them. Ctrl-C, SIGTERM and SIGUSR1
    (as SLURM's --signal=USR1@60 sends) end a run after its present step, with exit code 130, 143
    and 138; it goes on with --resume.

    With --experiments, --seeds or --folds there are many runs, each in checkpoints/NAME/RUN and
    just as if it were alone; their table is also in checkpoints/NAME/summary.json. A run that
    fails is set aside, and the command ends with exit code 3.

    \b
    Examples:
      sam3cache train features/angio.zarr --name first
      sam3cache train features/angio.zarr --name first --resume    (same options as before)
      sam3cache train features/angio.zarr --experiments heads.toml --seeds 3 --devices all
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.training import TrainConfig, read_experiments
    from sam3cache.training import train as run
    from sam3cache.training.stopping import stop_on_signals

    if name is None:
        name = settings["head"].replace(":", ".")
        name = name if experiments_file is None else experiments_file.stem
    settings |= _parse_others(others, settings)
    config = TrainConfig(
        store=str(store or only_store()),
        name=name,
        head_options=dict(_parse_option("--head-option", option) for option in head_options),
        output=str(output),
        **settings,
    )
    if experiments_file is not None or seeds != 1 or folds:
        inside = replace(config, output=str(output / name))
        experiments = [inside]
        if experiments_file is not None:
            experiments = read_experiments(experiments_file, inside)
        _train_many(experiments, seeds, folds, as_json)
        return
    with stop_on_signals() as stop, ExitStack() as stack:
        show_fetching(stack)
        result = run(config, _Announced(config, Stages(stack)), stop)
    if as_json:
        click.echo(json.dumps(_as_json(result), indent=2))
    else:
        _print_summary(result, config)


def _train_many(experiments: list[TrainConfig], seeds: int, folds: int, as_json: bool) -> None:
    """Train every run of some experiments, and say how they compare."""
    from sam3cache.runtime import parse_devices
    from sam3cache.training import plan_runs, run_experiments
    from sam3cache.training.stopping import stop_on_signals
    from sam3cache.training.summary import as_json as to_json

    runs = plan_runs(experiments, seeds=seeds, folds=folds)
    device = experiments[0].device.strip().lower()
    devices = parse_devices({"auto": "all", "cuda": "cuda:0"}.get(device, device))
    with stop_on_signals() as stop, ExitStack() as stack:
        show = partial(_show_many, Stages(stack))
        outcomes = run_experiments(runs, devices, show, stop, _announce_many)
    if as_json:
        click.echo(json.dumps(to_json(outcomes), indent=2))
    else:
        _print_many(outcomes, experiments)
    if any(outcome.status != "done" for outcome in outcomes):
        raise click.exceptions.Exit(SET_ASIDE_EXIT_CODE)


def _show_many(stages: Stages, state: PoolProgress) -> None:
    note = f"{state.num_ended}/{state.num_runs} runs ended"
    bar = stages.show("Training", state.num_images, state.num_total, note)
    bar.rows(state.devices.items())


def _print_many(outcomes: list[RunOutcome], experiments: list[TrainConfig]) -> None:
    from rich.table import Table

    from sam3cache.features import place_of
    from sam3cache.training.summary import summarize

    table = Table(box=None, pad_edge=False)
    table.add_column("Experiment")
    # Dice of other masks cannot be compared.
    label_sets = {config.name: config.label_set for config in experiments}
    are_several = len(set(label_sets.values())) > 1
    if are_several:
        table.add_column("Label set")
    for heading in ("Runs", "Val Dice", "Best epoch", "Parameters", "Time a run"):
        table.add_column(heading, justify="right")
    for summary in summarize(outcomes):
        spread = "" if summary.dice_std is None else f" ± {summary.dice_std:.4f}"
        table.add_row(
            summary.name,
            *([label_sets[summary.name]] if are_several else []),
            f"{summary.num_done}/{summary.num_runs}",
            "-" if summary.dice_mean is None else f"{summary.dice_mean:.4f}{spread}",
            "-" if summary.best_epoch_mean is None else f"{summary.best_epoch_mean:.1f}",
            "-" if summary.parameters is None else f"{summary.parameters:,}",
            "-" if summary.elapsed_s_mean is None else format_duration(summary.elapsed_s_mean),
        )
    plain_console().print(table)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        click.echo(f"Set aside, {len(failed)} of {len(outcomes)} runs:")
    for outcome in failed:
        click.echo(f"  {outcome.name}: {outcome.error}")
    folder = Path(experiments[0].output)
    click.echo(f"Runs: {folder.as_posix()}/NAME; summary: {(folder / 'summary.json').as_posix()}")
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    names = {outcome.experiment for outcome in done}
    own = [config for config in experiments if config.name in names]
    if len(own) > 1:
        options = f" --store {place_of(own[0].store).as_posix()}{_options_to_evaluate(own)}"
        click.echo(f"Next: sam3cache compare {folder.as_posix()}{options}")
    elif own:
        store, run = place_of(own[0].store).as_posix(), (folder / done[0].name).as_posix()
        click.echo(f"Next: sam3cache eval {store} {run}{_options_to_evaluate(own)}")


def _parse_micro_batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError(f"--micro-batch {text!r}: expected auto or a number, such as 4")
    return int(text)


def _parse_others(texts: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """Read what --set gives: settings that have no option of their own."""
    from sam3cache.training import TrainConfig

    own = {*settings, "store", "name", "head_options", "output", "folds", "fold"}
    known = [field.name for field in fields(TrainConfig) if field.name not in own]
    given = dict(_parse_option("--set", text) for text in texts)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--set {name}: no such setting; expected one of {', '.join(known)}, or an option "
                "of its own (--help)"
            )
    return given


class _Announced:
    """Shows a training's progress; at its beginning, what it learns from.

    Only then: a training that is refused has nothing to announce.
    """

    def __init__(self, config: TrainConfig, stages: Stages) -> None:
        self._config, self._stages = config, stages
        self._is_announced = False

    def __call__(self, state: Progress) -> None:
        if not self._is_announced:
            self._is_announced = True
            outlook = _look_ahead(self._config)
            samples = _samples_text(
                outlook.num_train, outlook.num_variants, outlook.num_variants_left_out
            )
            click.echo(
                f"Training {self._config.head} on {samples}; validation on {outlook.num_val}.",
                err=True,
            )
            _warn_of_classes(self._config, outlook)
        _show(self._stages, state)


def _announce_many(configs: list[TrainConfig]) -> None:
    """Say what runs learn from, once for those that learn from the same."""
    first_of: dict[tuple[str, str], TrainConfig] = {}
    for config in configs:
        first_of.setdefault((config.label_set, config.variants), config)
    # All first: what cannot be trained is refused before anything is said.
    outlooks = [(config, _look_ahead(config)) for config in first_of.values()]
    for config, outlook in outlooks:
        fold = f" in fold {config.fold}" if config.folds else ""
        samples = _samples_text(
            outlook.num_train, outlook.num_variants, outlook.num_variants_left_out
        )
        click.echo(
            f"Training on {samples}{fold}, label set {config.label_set}; validation on "
            f"{outlook.num_val}.",
            err=True,
        )
        _warn_of_classes(config, outlook)


def _look_ahead(config: TrainConfig) -> Outlook:
    from sam3cache.training import look_ahead

    with ExitStack() as stack:
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show("Counting classes", num_done, num_total)

        return look_ahead(config, report)


def _samples_text(num_samples: int, num_variants: int, num_left_out: int = 0) -> str:
    if not num_variants:
        left_out = f", and none of {num_left_out} stored variants of them" if num_left_out else ""
        return f"{num_samples} samples{left_out}"
    return (
        f"{num_samples} samples and {num_variants} variants of them (--variants none leaves them "
        "out)"
    )


def _warn_of_classes(config: TrainConfig, outlook: Outlook) -> None:
    """Say of which classes validation cannot speak, and which cannot be learned."""
    never = set(outlook.not_trained) & set(outlook.not_validated)
    if config.folds:
        # What one fold lacks another has.
        absent = {"train or val": [name for name in outlook.not_trained if name in never]}
    else:
        absent = {"train": list(outlook.not_trained), "val": list(outlook.not_validated)}
    said = [
        f"no image of {split} shows {len(names)} of {outlook.num_classes} classes "
        f"({', '.join(names[:_MAX_NAMED])}{', …' if len(names) > _MAX_NAMED else ''})"
        for split, names in absent.items()
        if names
    ]
    if not said:
        return
    if config.folds:
        advice = "check what --classes said of the masks"
    else:
        advice = (
            "try `sam3cache store annotations split STORE --by class --label-set "
            f"{config.label_set}` (docs/labels.md), or --folds"
        )
    click.echo(
        f"warning: {'; '.join(said)}. What train lacks cannot be learned, what val lacks has no "
        f"say in which epoch is kept; {advice}.",
        err=True,
    )


def _show(stages: Stages, state: Progress) -> None:
    note = None
    if state.loss is not None:
        best = "" if state.best_dice is None else f", best val Dice {state.best_dice:.4f}"
        note = f"epoch {state.epoch}, loss {state.loss:.4f}{best}"
        if state.num_validated is not None:
            note += f", validated {state.num_validated}/{state.num_to_validate}"
    title = "Loading" if state.stage == "load" else "Training"
    stages.show(title, state.num_done, state.num_total, note)


def _parse_option(option: str, text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where the value is JSON, or else text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        example = "embedding_dim=128" if option == "--head-option" else "weight_decay=0.05"
        raise ConfigError(f"{option} {text!r}: expected NAME=VALUE, such as {example}")
    if value in ("True", "False"):  # as Python writes them
        value = value.lower()
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _by_part(result: TrainResult) -> str:
    """Return what each part of the head costs, if there are several."""
    parts = [
        f"{name} {result.parameters[name]:,} and {gflop:.1f}"
        for name, gflop in result.gflop_by_part.items()
        if name != "total"
    ]
    return f" ({'; '.join(parts)})" if len(parts) > 1 else ""


def _print_summary(result: TrainResult, config: TrainConfig) -> None:
    from sam3cache.evaluation import notices_of_features
    from sam3cache.features import open_store, place_of
    from sam3cache.heads.checkpoint import read_record

    early = " (ended early)" if result.stopped_early else ""
    speed = ""
    if result.images_per_s is not None:
        speed = f" with validation, {result.images_per_s:.1f} images/s without"
    click.echo(
        f"Best validation Dice {result.best_dice:.4f} in epoch {result.best_epoch} of "
        f"{result.epochs}{early}, over {result.num_val} images; trained on "
        f"{_samples_text(result.num_train, result.num_variants)} in "
        f"{format_duration(result.elapsed_s)}{speed}."
    )
    click.echo(
        f"Samples: {result.placement} ({result.resident_bytes / 1e9:.2f} GB held, ready after "
        f"{result.load_s:.1f} s)."
    )
    click.echo(
        f"Head: {result.parameters['total']:,} parameters, {result.gflop:.1f} GFLOP an image"
        f"{_by_part(result)}."
    )
    if result.best_dice < FAR_TOO_LOW:
        steps = result.epochs * math.ceil(result.num_train / config.batch_size)
        click.echo(
            f"Note: a Dice near 0 mostly means too few steps, here {steps}: give more --epochs, a "
            "smaller --batch-size or a higher --lr; or look whether masks and pictures belong "
            "together."
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
    place, run_dir = place_of(config.store).as_posix(), result.run_dir.as_posix()
    click.echo(f"Next: sam3cache eval {place} {run_dir}{_options_to_evaluate([config])}")


def _options_to_evaluate(configs: Sequence[TrainConfig]) -> str:
    """Return what has to be said again of runs that are evaluated."""
    # A user's own head is imported only when it is named.
    heads = dict.fromkeys(config.head for config in configs if ":" in config.head)
    overlays = dict.fromkeys(config.overlay for config in configs if config.overlay is not None)
    options = [f" --head {head}" for head in heads]
    return "".join([*options, *(f" --overlay {Path(o).as_posix()}" for o in overlays)])


def _as_json(result: TrainResult) -> dict[str, Any]:
    return {
        **asdict(result),
        "run_dir": result.run_dir.as_posix(),
        "best_checkpoint": result.best_checkpoint.as_posix(),
    }
