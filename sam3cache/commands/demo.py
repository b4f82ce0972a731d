"""``sam3cache demo``: the whole road on artificial angiograms, in minutes and on any machine."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sam3cache.commands.progress import Stages, format_duration
from sam3cache.errors import ConfigError

if TYPE_CHECKING:
    from sam3cache.evaluation import EvalResult
    from sam3cache.training import TrainResult

MIN_DICE = 0.65
"""Mean Dice of the test split that a demo has to reach; less means that something is broken."""

DICE_MISSED_EXIT_CODE = 5

WHAT_IT_IS = (
    "Synthetic pictures, and features of sam3-mini, a miniature pretrained on such pictures: this "
    "shows that the road works, not how good SAM 3 is."
)


@dataclass(frozen=True, slots=True)
class _Size:
    """How much a demo does.

    Attributes:
        num_images: phantoms; of seven patients five go to train.
        epochs: of the training.
        batch_size: of the training.
        duration: in words, on two cores.
    """

    num_images: int
    epochs: int
    batch_size: int
    duration: str


_FULL = _Size(num_images=56, epochs=8, batch_size=4, duration="about three minutes")
_QUICK = _Size(num_images=14, epochs=3, batch_size=4, duration="under a minute")

# A narrower stem than the default's, for haste.
_HEAD_OPTIONS: dict[str, Any] = {"width": 16}


@click.command()
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--quick", is_flag=True, help="Fewer pictures and epochs: under a minute, not three.")
@click.option("--seed", default=0, show_default=True, help="Of pictures, weights and order.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, or cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
def demo(out: Path | None, quick: bool, seed: int, device: str, as_json: bool) -> None:
    """Walk the whole road: draw angiograms, extract features, train a head, measure it.

    Needs no data, no weights, no GPU and no network. OUT is a folder to create [default:
    sam3cache-demo, or the next free sam3cache-demo-2, -3 …]; it gets the pictures, the feature
    store, the checkpoint and a page to look at. The pictures are synthetic and the backbone is
    sam3-mini, a miniature of SAM 3's own classes pretrained on such pictures: it shows that the
    road works, not how good SAM 3 is.

    The head is the default one with a narrower stem (width=16), for haste. The exit code is 5 when
    it does not reach Dice 0.65 on patients it has not seen: then something is broken.

    \b
    Examples:
      sam3cache demo
      sam3cache demo look --quick
    """  # noqa: D301 - \b is click's mark for lines to keep as they are
    from sam3cache.runtime import pick_device

    size = _QUICK if quick else _FULL
    if out is None:
        out = _next_free(Path("sam3cache-demo"))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} is not an empty folder; name one that does not exist yet, such as "
            f"{_next_free(out.resolve())}"
        )
    device = pick_device(device)
    click.echo(f"{WHAT_IT_IS} Time on two cores: {size.duration}.", err=True)
    started_s = time.monotonic()
    trained, measured = _walk(out, size, seed, device)
    dice = next(iter(measured.classes.values()))["dice"].mean
    reached = dice is not None and dice >= MIN_DICE
    elapsed_s = time.monotonic() - started_s
    summary = {
        "what_it_is": WHAT_IT_IS,
        "dice": dice,
        "min_dice": MIN_DICE,
        "reached": reached,
        "num_test_images": measured.num_images,
        "num_train_images": trained.num_train,
        "seed": seed,
        "store": (out / "features" / "demo.zarr").as_posix(),
        "checkpoint": trained.best_checkpoint.as_posix(),
        "page": None if measured.page is None else measured.page.as_posix(),
        "elapsed_s": elapsed_s,
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(out, summary, measured, size)
    if not reached:
        click.echo(
            f"sam3cache: error: the demo reached Dice {dice or 0:.3f}, expected at least "
            f"{MIN_DICE}; run `sam3cache doctor` to see what is broken",
            err=True,
        )
        raise click.exceptions.Exit(DICE_MISSED_EXIT_CODE)


def _next_free(folder: Path) -> Path:
    """Return a folder, or where that exists the first of folder-2, folder-3 … that does not."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _walk(out: Path, size: _Size, seed: int, device: str) -> tuple[TrainResult, EvalResult]:
    """Go the four stages, showing how far each is."""
    from sam3cache.evaluation import EvalConfig, evaluate
    from sam3cache.extract import ExtractConfig, extract
    from sam3cache.images.phantom import make_phantoms
    from sam3cache.training import TrainConfig, train

    store = out / "features" / "demo.zarr"
    with ExitStack() as stack:
        stages = Stages(stack)
        manifest = make_phantoms(
            out / "phantoms",
            size.num_images,
            seed,
            # A patient each: for what interval and verdict on the angles take, patients count.
            views_per_patient=1,
            report=lambda num_done, num_total: _show(stages, "1/4 Drawing", num_done, num_total),
        )
        extract(
            ExtractConfig(manifest, store, backbone="sam3-mini", devices=(device,)),
            lambda state: (
                _show(stages, "2/4 Extracting", state.num_done, state.num_total)
                if state.stage == "extracting"
                else None
            ),
        )
        trained = train(
            TrainConfig(
                store=str(store),
                name="demo",
                output=str(out / "checkpoints"),
                head_options=_HEAD_OPTIONS,
                epochs=size.epochs,
                batch_size=size.batch_size,
                seed=seed,
                device=device,
            ),
            lambda state: (
                _show(stages, "3/4 Training", state.num_done, state.num_total)
                if state.stage == "train"
                else None
            ),
        )
        measured = evaluate(
            EvalConfig(store, trained.run_dir, device=device, seed=seed, output=out / "report"),
            lambda num_done, num_total: _show(stages, "4/4 Measuring", num_done, num_total),
        )
    return trained, measured


def _show(stages: Stages, title: str, num_done: int, num_total: int) -> None:
    stages.show(title, num_done, num_total)


def _print_summary(out: Path, summary: dict[str, Any], measured: EvalResult, size: _Size) -> None:
    """Print what was reached, where it lies, and what to try next."""
    dice = "–" if summary["dice"] is None else f"{summary['dice']:.3f}"
    click.echo(
        f"\nDice {dice} on {summary['num_test_images']} synthetic angiograms, each of a patient "
        f"unseen in training, after {format_duration(summary['elapsed_s'])}."
    )
    if measured.angle_use is not None:
        click.echo(measured.angle_use.sentence)
    click.echo(WHAT_IT_IS)
    click.echo(f"\nStore:      {summary['store']}")
    click.echo(f"Checkpoint: {summary['checkpoint']}")
    click.echo(f"Page:       {summary['page']}  (open it in a browser)")
    click.echo("\nThe store stays; each further head costs a training alone. Try, for example,")
    store, runs = _quoted(summary["store"]), _quoted((out / "checkpoints").as_posix())
    train = f"sam3cache train {store} -o {runs} --epochs {size.epochs} --batch-size 4"
    width = " ".join(f"--head-option {name}={value}" for name, value in _HEAD_OPTIONS.items())
    for remark, name, options in (
        (
            f"a 1x1 convolution on the features, the floor to compare Dice {dice} with:",
            "floor",
            "--head linear",
        ),
        (
            "the demo's head without the features, to see what they are worth:",
            "no-features",
            f"{width} --head-option use_features=false",
        ),
    ):
        run = _quoted((out / "checkpoints" / name).as_posix())
        click.echo(f"\n{remark}\n  {train} --name {name} {options}")
        click.echo(f"  sam3cache eval {store} {run}")
    click.echo(
        "\nSAM 3 itself on your own images (a folder with images/ and masks/; its weights are "
        "gated: accept the licence at https://huggingface.co/facebook/sam3):"
    )
    click.echo("  sam3cache extract YOUR_FOLDER --weights sam3.pt")


def _quoted(path: str) -> str:
    """Return a path as a word of a command line, on Windows, too."""
    return f'"{path}"' if " " in path else path
