"""``sam3cache eval``: what a trained head is worth, and what it makes of angles and features."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.defaults import only_run, only_store, require_order
from sam3cache.commands.options import ALLOW_UNSEALED, BATCH_SIZE, DEVICE, HEAD, OVERLAY
from sam3cache.commands.places import show_fetching, store_place
from sam3cache.commands.printing import plain_console, table
from sam3cache.commands.progress import Stages

if TYPE_CHECKING:
    from rich.table import Table

    from sam3cache.evaluation import AngleUse, EvalResult, FeatureUse, Summary
    from sam3cache.features import Place


@click.command("eval")
@click.argument("store", callback=store_place, required=False)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test", "all"]),
    default="test",
    show_default=True,
    help="Images to measure on.",
)
@click.option(
    "--threshold",
    help="Probability from which a pixel counts as mask; auto: that of the highest mean Dice on "
    "the validation split. [default: the checkpoint's, mostly 0.5]",
)
@click.option(
    "--label-set", help="Masks to compare with. [default: those that the head was trained on]"
)
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help="Also give results by an annotation, such as vessel_pattern; may be given several times.",
)
@OVERLAY
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the results. [default: CHECKPOINT/eval-SPLIT]",
)
@HEAD
@DEVICE
@BATCH_SIZE
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap and of the shuffles.")
@click.option(
    "--angles-check/--no-angles-check",
    default=True,
    show_default=True,
    help="Predict with shuffled and constant angles, too: does the head use them?",
)
@click.option(
    "--features-check/--no-features-check",
    default=True,
    show_default=True,
    help="Predict with features of other images, too: does the head use them?",
)
@click.option(
    "--page/--no-page",
    default=True,
    show_default=True,
    help="Also write report.html, a page to look at: pictures, contours, curves.",
)
@ALLOW_UNSEALED
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def eval_(
    store: Place | None,
    checkpoint: Path | None,
    split: Any,
    threshold: str | None,
    label_set: str | None,
    by: tuple[str, ...],
    overlay: Path | None,
    output: Path | None,
    head: str | None,
    device: str,
    batch_size: int,
    seed: int,
    angles_check: bool,
    features_check: bool,
    page: bool,
    allow_unsealed: bool,
    as_json: bool,
) -> None:
    """Measure the head of CHECKPOINT on the images of STORE.

    CHECKPOINT is a run's folder, whose best checkpoint is taken, or that of one checkpoint. STORE
    may be another than the head was trained on, if its features were made the same way. Both may
    be left out where checkpoints/ and features/ hold just one.

    Dice, IoU, precision, recall, clDice, Hausdorff 95 and the average surface distance are taken
    image by image and class by class, on the mask's own grid, and written to per_image.csv; their
    means, with 95% intervals over groups (patients), to summary.json: in all, by class, by view
    region and by annotation. report.html shows them in any browser. docs/evaluation.md
    defines each.

    \b
    Examples:
      sam3cache eval features/angio.zarr checkpoints/first
      sam3cache eval features/angio.zarr checkpoints/first --threshold auto --by vessel_pattern
      sam3cache eval features/other.zarr checkpoints/first --split all -o other-hospital
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.evaluation import EvalConfig, evaluate
    from sam3cache.runtime import pick_device

    store, checkpoint = store or only_store(), checkpoint or only_run()
    if isinstance(store, Path):
        require_order(store, checkpoint)
    config = EvalConfig(
        store=store,
        checkpoint=checkpoint,
        split=split,
        threshold=_threshold(threshold),
        batch_size=batch_size,
        device=pick_device(device),
        seed=seed,
        label_set=label_set,
        overlay=overlay,
        output=output,
        head=head,
        allow_unsealed=allow_unsealed,
        check_angles=angles_check,
        check_features=features_check,
        by=by,
        page=page,
    )
    # The checks predict each image several times more, which its rate would hide.
    title = "Evaluating and checking" if angles_check or features_check else "Evaluating"
    with ExitStack() as stack:
        show_fetching(stack)
        stages = Stages(stack)

        def report(num_done: int, num_total: int) -> None:
            stages.show(title, num_done, num_total)

        result = evaluate(config, report)
    if as_json:
        click.echo(json.dumps(result.record(), indent=2, allow_nan=False))
    else:
        _print(result, config.store)


def _threshold(text: str | None) -> Any:
    """Return a threshold as it was given: a number, "auto", or None.

    Raises:
        ConfigError: it is none of these.
    """
    from sam3cache.errors import ConfigError

    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"threshold {text!r}: expected a probability, or auto") from None


def _print(result: EvalResult, store: Place) -> None:
    """Print the tables and the sentences, for people."""
    from sam3cache.evaluation import MEAN_OVER_CLASSES, over_text

    console = plain_console()
    console.print(
        f"{result.head}, epoch {result.epoch} ({result.checkpoint}) on {store}, "
        f"split {result.split}"
    )
    console.print(over_text(result.num_images, result.num_groups))
    console.print(result.threshold_choice.sentence)
    if result.threshold_choice.source == "auto":
        console.print(
            f"New images have it by: sam3cache predict {result.checkpoint} IMAGES -o OUT "
            f"--threshold {result.threshold:g}" + (f" --head {result.head}" * (":" in result.head))
        )
    for notice in result.notices:
        console.print(f"Note: {notice}")
    if len(result.classes) == 1:
        console.print(_metrics_table(next(iter(result.classes)), result.overall))
    else:
        console.print(_metrics_table("all classes", result.overall))
        console.print(MEAN_OVER_CLASSES)
        num_with = {name: result.num_images_with(name) for name in result.classes}
        console.print(_short_table("class", result.classes.items(), result.unit, num_with))
        console.print("Have it: images whose mask has the class; marked elsewhere it is Dice 0.")
    for column, values in result.strata.items():
        parts = ((value or "unknown", stratum.overall) for value, stratum in values.items())
        console.print(_short_table(column, parts, result.unit))
    if result.angle_use is not None:
        console.print(result.angle_use.sentence)
        if result.angle_use.true_minus_shuffled is not None:
            console.print(_angles_table(result.angle_use))
            console.print(
                f"{over_text(result.angle_use.num_images, result.angle_use.num_groups)} "
                "compared; the constant angles are the mean on the circle of these images'; "
                "shuffling changes probabilities by up to "
                f"{result.angle_use.max_probability_change:.2g}"
            )
    if result.feature_use is not None:
        console.print(result.feature_use.sentence)
        if result.feature_use.parts:
            console.print(_features_table(result.feature_use))
    console.print(f"Written: {result.output.as_posix()}/per_image.csv and summary.json")
    if result.page is not None:
        console.print(f"Page: {result.page.as_posix()}")


def _metrics_table(name: str, summaries: Mapping[str, Summary]) -> Table:
    from sam3cache.evaluation import METRICS, interval_text, number_text

    rows = table(name, "images", "mean", "std", "median", "95% interval", "min", "max")
    for metric, s in summaries.items():
        if metric.endswith("_mm") and not s.num_values:
            continue
        rows.add_row(
            METRICS[metric],
            str(s.num_values),
            number_text(s.mean),
            number_text(s.std),
            number_text(s.median),
            interval_text(s.interval),
            number_text(s.minimum),
            number_text(s.maximum),
        )
    return rows


def _short_table(
    by: str,
    parts: Iterable[tuple[str, Mapping[str, Summary]]],
    unit: str,
    num_with: Mapping[str, int] | None = None,
) -> Table:
    """Return a line a part of the images: Dice with its interval, and two means more.

    Args:
        by: what the parts are.
        parts: name and summaries of each.
        unit: of distances.
        num_with: of classes, the images that have each.
    """
    from sam3cache.evaluation import METRICS, interval_text, number_text

    distance = f"hd95_{unit}"
    counts = ("images", "have it") if num_with else ("images",)
    rows = table(
        by, *counts, "Dice", "95% interval", "median", METRICS["cldice"], METRICS[distance]
    )
    # Eight columns in the 80 of a narrow terminal.
    rows.collapse_padding = True
    for name, summaries in parts:
        dice = summaries["dice"]
        rows.add_row(
            name,
            str(dice.num_values),
            *((str(num_with[name]),) if num_with else ()),
            number_text(dice.mean),
            interval_text(dice.interval),
            number_text(dice.median),
            number_text(summaries["cldice"].mean),
            number_text(summaries[distance].mean, 1),
        )
    return rows


def _features_table(use: FeatureUse) -> Table:
    from sam3cache.evaluation import gain_text, interval_text, number_text

    rows = table("levels", "Dice", "own gain", "95% interval")
    rows.add_row("the image's own", number_text(use.dice_true, 4), "", "")
    for part in use.parts:
        gain = part.true_minus_shuffled
        if gain is not None:
            rows.add_row(
                f"{', '.join(part.levels)} of another",
                number_text(part.dice_shuffled, 4),
                gain_text(gain.mean, 4),
                interval_text(gain.interval, 4),
            )
    return rows


def _angles_table(use: AngleUse) -> Table:
    from sam3cache.evaluation import gain_text, interval_text, number_text
    from sam3cache.views import format_view

    assert use.constant_angles_deg is not None
    rows = table("angles", "Dice", "true gains", "95% interval")
    rows.add_row("true", number_text(use.dice_true, 4), "", "")
    for name, dice, gain in (
        (f"shuffled ({use.num_shuffles} times)", use.dice_shuffled, use.true_minus_shuffled),
        (
            f"constant mean ({format_view(*use.constant_angles_deg)})",
            use.dice_constant,
            use.true_minus_constant,
        ),
    ):
        assert gain is not None
        rows.add_row(
            name, number_text(dice, 4), gain_text(gain.mean, 4), interval_text(gain.interval, 4)
        )
    return rows
