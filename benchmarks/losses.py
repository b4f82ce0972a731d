"""What each loss costs: forward and backward of an image, against a step of the default head.

Each loss of `sam3cache train --loss` in turn, on logits as the default head gives them (stride 4),
masks of phantoms' size and shape, of one class and of NUM_CLASSES that exclude each other, on grids
of 1008 px (the default) and 252 px; and the default head itself, forward and backward, without a
loss.

Exits with 1 when a bound is missed: on the smaller grid no loss of one class takes longer than the
head does, so that none makes a training more than twice as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from reporting import Bound, Machine, Report, alternate, significant
from torch import Tensor

from sam3cache.heads import Head, build_head
from sam3cache.records import Batch
from sam3cache.runtime import pick_device
from sam3cache.tasks import Task, num_outputs
from sam3cache.training import build_loss
from sam3cache.training.loss import LOSSES

HEAD = "film-detail"
LEVEL_SHAPES = {"fpn_72": (256, 72, 72), "image_1008": (1, 1008, 1008)}
LOGITS_PX = 252
SIZES_PX = (1008, 252)
NUM_CLASSES = 15
BATCH = 2
VESSEL_PX = 12
"""Width of a vessel on the grid of 1008 px, and a twentieth of the distance to the next."""

Key = tuple[str, Task, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    machine = Machine(device)
    sizes_px = SIZES_PX[-1:] if options.quick else SIZES_PX
    tasks: tuple[Task, ...] = ("multilabel",) if options.quick else ("multilabel", "multiclass")
    steps: dict[Key, Callable[[], object]] = {}
    for task in tasks:
        for name in LOSSES:
            if name != {"multilabel": "dice-ce", "multiclass": "dice-bce"}[task]:
                for size_px in sizes_px:
                    # Fifteen planes at full size are what docs/heads.md advises against.
                    if task == "multilabel" or size_px == SIZES_PX[-1]:
                        steps[name, task, size_px] = loss_step(name, task, size_px, device)
    head = build_head(HEAD, LEVEL_SHAPES).to(device)
    contestants = {"/".join(map(str, key)): step for key, step in steps.items()}
    seconds = alternate(
        1 if options.quick else options.rounds,
        {**contestants, HEAD: partial(head_step, head, batch_of(device))},
    )
    ms = {name: 1000 * median(of) / BATCH for name, of in seconds.items()}

    def cell(name: str, task: Task, size_px: int) -> str:
        value = ms.get(f"{name}/{task}/{size_px}")
        return "" if value is None else significant(value)

    columns = [(t, s) for t in tasks for s in sizes_px if t == "multilabel" or s == SIZES_PX[-1]]
    titles = {"multilabel": "one class", "multiclass": f"{NUM_CLASSES} classes"}
    rows = [(f"`{name}`", *(cell(name, *column) for column in columns)) for name in LOSSES]
    rows.append((f"`{HEAD}` itself", significant(ms[HEAD]), *[""] * (len(columns) - 1)))
    bounds = []
    for name in LOSSES:
        value = ms.get(f"{name}/multilabel/{SIZES_PX[-1]}")
        if value is not None:
            claim = f"{name} at {SIZES_PX[-1]} px takes no longer than the default head"
            bounds.append(Bound(claim, value / ms[HEAD], value <= ms[HEAD]))
    return Report(
        program="losses",
        columns=("ms an image", *(f"{titles[task]}, {size_px} px" for task, size_px in columns)),
        rows=rows,
        notes=["Forward and backward, float32; medians of turns in alternation."],
        bounds=bounds,
        figures={"seconds_per_batch": seconds, "batch": BATCH},
        settings={"quick": options.quick, "rounds": options.rounds},
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="252 px and one class alone")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each [5]")
    parser.add_argument("--device", default="auto", help="auto, cpu, or a CUDA device [auto]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser.parse_args(arguments)


def loss_step(name: str, task: Task, size_px: int, device: str) -> Callable[[], object]:
    """Return a step of one loss: forward and backward of a batch."""
    num_classes = 1 if task == "multilabel" else NUM_CLASSES
    num_planes = num_outputs(task, num_classes)
    generator = torch.Generator().manual_seed(0)
    logits_BKHW = torch.randn(BATCH, num_planes, LOGITS_PX, LOGITS_PX, generator=generator)
    logits_BKHW = logits_BKHW.to(device).requires_grad_()
    target_BMTT = vessels(size_px, num_classes).to(device)
    loss_of = build_loss(name, task)

    def step() -> None:
        logits_BKHW.grad = None
        loss = loss_of(logits_BKHW, target_BMTT)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for a GPU

    return step


def vessels(size_px: int, num_classes: int) -> Tensor:
    """Draw slanted stripes as wide as vessels, uint8 (B, 1, T, T), of each class in turn."""
    side = torch.arange(size_px) * (1008 // size_px)
    along_TT = side[:, None] // 3 + side[None]
    period_px = 20 * VESSEL_PX
    number_TT = along_TT // period_px % num_classes + 1
    mask_TT = torch.where(along_TT % period_px < VESSEL_PX, number_TT, 0).to(torch.uint8)
    return mask_TT.expand(BATCH, 1, size_px, size_px).contiguous()


def batch_of(device: str) -> Batch:
    """Return a batch as the default head takes it, of noise."""
    return Batch(
        levels={
            "fpn_72": torch.randn(BATCH, *LEVEL_SHAPES["fpn_72"]).half().to(device),
            "image_1008": torch.randint(
                256, (BATCH, *LEVEL_SHAPES["image_1008"]), dtype=torch.uint8, device=device
            ),
        },
        angles_B2=torch.zeros(BATCH, 2, device=device),
        content_B2=torch.full((BATCH, 2), 1008, device=device),
    )


def head_step(head: Head, batch: Batch) -> None:
    """Go forward and backward through a head."""
    head.zero_grad()
    total: Tensor = head(batch).float().square().mean()
    total.backward()  # type: ignore[no-untyped-call]
    total.item()


if __name__ == "__main__":
    raise SystemExit(main())
