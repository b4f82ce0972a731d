"""Tests what every head must obey: for whoever writes one.

    from sam3cache.testing import check_head

    def test_my_head() -> None:
        print(check_head(MyHead))

A rule that is broken raises ``HeadError`` with one line that says which; what is no rule, but good
to know, is in the report.

Shape legend: B batch, C channels, H height, W width, K planes of logits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam3cache.errors import CheckpointError, HeadError
from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.heads import (
    HEADS,
    CheckpointInfo,
    PartSize,
    build_head,
    describe_head,
    load_checkpoint,
    save_checkpoint,
)
from sam3cache.heads.head import LevelShapes
from sam3cache.heads.registry import find_head, mistakes_of, one_line
from sam3cache.records import Batch

SMALL_SHAPES: Mapping[str, tuple[int, int, int]] = {
    "fpn_72": (256, 12, 12),
    "fpn_144": (256, 24, 24),
    "fpn_288": (256, 48, 48),
    "trunk_72": (1024, 12, 12),
    "image_1008": (1, 168, 168),
}
"""SAM 3's levels on grids of a sixth, so that a check takes seconds."""

# Steps of training before gradients and views are judged: what begins as zeros lets none through.
_NUM_STEPS = 3


@dataclass(frozen=True)
class HeadReport:
    """What ``check_head`` found out about a head that obeys the rules.

    Attributes:
        head: its name, as ``--head`` takes it.
        needs: the levels that it reads.
        logits_shape: (K, H, W) for the shapes that it was checked on.
        parts: parameters and arithmetic by part, for these shapes; see ``heads.describe_head``.
        angle_effect: mean change of a pixel's probability when the view's angles are mirrored,
            after a few steps of training on noise; 0 for a head that does not read them.
        bf16_error: largest change of a logit under bfloat16 autocast, against the largest logit.
        uses_batch_statistics: a normalisation over the batch makes what a sample gives in training
            depend on those beside it, and on the size of the (micro-)batch.
    """

    head: str
    needs: tuple[str, ...]
    logits_shape: tuple[int, int, int]
    parts: Mapping[str, PartSize]
    angle_effect: float
    bf16_error: float
    uses_batch_statistics: bool

    @property
    def uses_angles(self) -> bool:
        """Whether angles change the output at all."""
        return self.angle_effect > 1e-6

    def __str__(self) -> str:
        """Return the report in a few lines."""
        total = self.parts["total"]
        effect = (
            f"change a probability by {self.angle_effect:.1e}" if self.uses_angles else "unused"
        )
        lines = [
            f"{self.head}: reads {', '.join(self.needs)}; logits {self.logits_shape}",
            f"{total.parameters:,} parameters, {total.gflop:.2f} GFLOP an image at these shapes",
            f"angles: {effect}; bfloat16: logits within {self.bf16_error:.1%}",
        ]
        if self.uses_batch_statistics:
            lines.append("in training, a sample's logits depend on the others (batch statistics)")
        return "\n".join(lines)


def check_head(
    head: str | type[nn.Module],
    *,
    level_shapes: LevelShapes = SMALL_SHAPES,
    num_classes: int = 2,
    options: Mapping[str, Any] | None = None,
    batch_sizes: tuple[int, ...] = (1, 2, 5),
    seed: int = 0,
) -> HeadReport:
    """Test that a head obeys what training, evaluation and checkpoints rely on.

    It is built, run and trained for a few steps on noise, on the CPU: logits have their shape for
    every batch size; a sample's do not depend on the others; the same seed gives the same head
    and the same logits; what it is given stays as it was; an unknown angle (NaN) and bfloat16
    autocast give finite logits and gradients; every parameter gets a gradient; and a checkpoint
    gives back the same head.

    Args:
        head: the class, or its name as ``--head`` takes it.
        level_shapes: (C, H, W) of the levels at hand.
        num_classes: K, planes of logits.
        options: keyword arguments of the head's own.
        batch_sizes: B to run it with.
        seed: of its weights and of the noise.

    Returns:
        What was found out beside.

    Raises:
        HeadError: a rule is broken; the message says which, and what to do.
    """
    name = head if isinstance(head, str) else _name_of(head)
    find_head(name)
    options = dict(options or {})
    try:
        json.dumps(options)
    except TypeError as error:
        raise HeadError(
            f"head {name} has options that are no plain JSON values ({one_line(error)}), and a "
            "checkpoint could not rebuild it; take numbers, text, lists and dictionaries"
        ) from error
    with torch.random.fork_rng(devices=[]):
        return _Check(name, level_shapes, num_classes, options, batch_sizes, seed).run()


class _Check:
    """The rules, one after the other."""

    def __init__(
        self,
        name: str,
        level_shapes: LevelShapes,
        num_classes: int,
        options: Mapping[str, Any],
        batch_sizes: tuple[int, ...],
        seed: int,
    ) -> None:
        self.name, self.level_shapes, self.options = name, level_shapes, options
        self.num_classes, self.batch_sizes, self.seed = num_classes, batch_sizes, seed

    def run(self) -> HeadReport:
        self.head = self.build(self.num_classes)
        self.build(1)
        parts = describe_head(self.head, self.level_shapes)
        logits_shape = self.check_shapes()
        self.check_same_seed()
        self.train_some_steps()
        self.check_gradients()
        self.head.eval()
        self.check_repeatable()
        self.check_independence()
        self.check_unknown_angles()
        bf16_error = self.check_autocast()
        self.check_checkpoint()
        return HeadReport(
            self.name,
            tuple(self.head.needs),
            logits_shape,
            parts,
            self.angle_effect(),
            bf16_error,
            any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.head.modules()),
        )

    def build(self, num_classes: int) -> Any:
        torch.manual_seed(self.seed)
        return build_head(self.name, self.level_shapes, self.options, num_classes=num_classes)

    def check_shapes(self) -> tuple[int, int, int]:
        """Run every batch size; return (K, H, W)."""
        self.head.eval()
        grids = set()
        for num_samples in self.batch_sizes:
            batch = self.batch(num_samples)
            before = {level: x.clone() for level, x in batch.levels.items()}
            logits = self.logits(batch, f"a batch of {num_samples}")
            for level, x in batch.levels.items():
                if not torch.equal(x, before[level]):
                    raise self.broken(
                        f"changes the {level} that it is given",
                        "that is the cache itself; work on a copy, as `x * 2` rather than `x *= 2`",
                    )
            shape = tuple(logits.shape)
            if logits.ndim != 4 or shape[:2] != (num_samples, self.num_classes):
                raise self.broken(
                    f"returned {shape} for a batch of {num_samples}",
                    f"expected logits of shape ({num_samples}, {self.num_classes}, H, W)",
                )
            grids.add(shape[2:])
        if len(grids) > 1:
            raise self.broken(
                f"returned logits on grids of {' and '.join(map(str, sorted(grids)))}",
                "expected the same grid whatever the batch size",
            )
        ((height, width),) = grids
        return self.num_classes, height, width

    def check_same_seed(self) -> None:
        """Build it again."""
        again = self.build(self.num_classes).state_dict()
        for key, value in self.head.state_dict().items():
            if not torch.equal(value, again[key]):
                raise self.broken(
                    f"begins with another {key} although the seed is the same",
                    "draw first weights with torch's own generator, which --seed sets",
                )

    def train_some_steps(self) -> None:
        """Leave the first weights, some of which may be zeros."""
        trained = [p for p in self.head.parameters() if p.requires_grad]
        if not trained:
            raise self.broken("has no parameter to train", "register its layers as attributes")
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        for step in range(_NUM_STEPS):
            optimizer.zero_grad()
            self.backward(self.batch(2, seed=step + 1))
            optimizer.step()

    def check_gradients(self) -> None:
        """See that every parameter takes part, where angles are known and where they are not."""
        self.head.zero_grad()
        self.backward(self.batch(2, seed=8))
        self.backward(self.batch(2, seed=9, unknown=True))
        for key, parameter in self.head.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None or not parameter.grad.any():
                raise self.broken(
                    f"gives {key} no gradient",
                    "the logits do not depend on it: use it in forward, detached from nothing, or "
                    "remove it (or set requires_grad to False)",
                )
            if not parameter.grad.isfinite().all():
                raise self.broken(
                    f"gives {key} a gradient that is not finite",
                    "angles may be unknown: replace NaN before computing with it, as "
                    "sam3cache.heads.ViewEncoder does",
                )

    def check_repeatable(self) -> None:
        """Run the same batch twice."""
        batch = self.batch(2)
        if not torch.equal(self.logits(batch), self.logits(batch)):
            raise self.broken(
                "gives other logits for the same batch in evaluation mode",
                "draw random numbers in training mode alone, as torch.nn.Dropout does",
            )

    def check_independence(self) -> None:
        """Run samples alone and beside others."""
        batch = self.batch(3)
        together = self.logits(batch)
        for i in range(3):
            alone = self.logits(_one_of(batch, i))[0]
            error = _relative_error(alone, together[i])
            if not error < 1e-3:
                raise self.broken(
                    f"gives a sample other logits beside others than alone (by {error:.1%})",
                    "nothing may be computed over the batch: normalise by channels or groups "
                    "(GroupNorm), and keep the batch dimension apart in views and reshapes",
                )

    def check_unknown_angles(self) -> None:
        """Run samples of which one angle is unknown, or both."""
        if not self.logits(self.batch(3, unknown=True)).isfinite().all():
            raise self.broken(
                "gives logits that are not finite where an angle is unknown (NaN)",
                "replace NaN before computing with it, as sam3cache.heads.ViewEncoder does",
            )

    def check_autocast(self) -> float:
        """Run in bfloat16, backwards too; return the largest error."""
        batch = self.batch(2)
        exact = self.logits(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = self.logits(batch, "bfloat16 autocast")
            self.backward(batch, "bfloat16 autocast")
        self.head.eval()
        error = _relative_error(rough, exact)
        if not error < 0.25:
            raise self.broken(
                f"gives logits that bfloat16 autocast changes by {error:.0%}",
                "compute norms and small differences in float32, within "
                "torch.autocast(device_type, enabled=False)",
            )
        return error

    def check_checkpoint(self) -> None:
        """Save it, load it, and run it."""
        levels = {
            level: {"shape": list(self.level_shapes[level]), "digest": "", "fields": {}}
            for level in self.head.needs
        }
        info = CheckpointInfo(self.name, self.options, self.num_classes, levels, "mask", epoch=1)
        named = None if self.name in HEADS else self.name
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), self.head, info)
            try:
                loaded, _ = load_checkpoint(Path(folder), head=named)
            except CheckpointError as error:
                raise self.broken(
                    "is not the same again from its checkpoint",
                    str(error).replace(folder, "it"),
                ) from error
        batch = self.batch(2)
        with torch.no_grad():
            logits = loaded(batch)
        if not torch.equal(logits, self.logits(batch)):
            raise self.broken(
                "gives other logits when loaded from its checkpoint",
                "keep what it computes with in parameters and buffers, not in plain attributes",
            )

    def angle_effect(self) -> float:
        """Return the mean change of probability when angles are mirrored."""
        batch = self.batch(4)
        mirrored = Batch(batch.levels, -batch.angles_B2, batch.content_B2)
        change = self.logits(batch).sigmoid() - self.logits(mirrored).sigmoid()
        return float(change.abs().mean())

    def batch(self, num_samples: int, *, seed: int = 0, unknown: bool = False) -> Batch:
        """Return noise: features, pixels and angles; some angles unknown where asked for."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        levels = {}
        for level in self.head.needs:
            shape = (num_samples, *self.level_shapes[level])
            levels[level] = (
                torch.randint(256, shape, generator=generator).to(torch.uint8)
                if level.startswith("image_")
                else torch.randn(shape, generator=generator).half()
            )
        angles_B2 = torch.rand(num_samples, 2, generator=generator) * 90 - 45
        if unknown:
            angles_B2[0] = torch.nan
            angles_B2[1:, 1] = torch.nan
        return Batch(levels, angles_B2, torch.full((num_samples, 2), INPUT_SIZE_PX))

    def logits(self, batch: Batch, where: str = "a batch of noise") -> Tensor:
        """Return the logits without gradients."""
        with torch.no_grad():
            return self.forward(batch, where).float()

    def backward(self, batch: Batch, where: str = "training") -> None:
        """Add the gradients of a loss against noise."""
        self.head.train()
        logits = self.forward(batch, where).float()
        target = (torch.arange(logits.numel()) % 3 == 0).view(logits.shape).float()
        loss = F.binary_cross_entropy_with_logits(logits, target)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except mistakes_of(self.name) as error:
            raise self.broken(
                f"lets no gradient through in {where}: {one_line(error)}",
                "compute the logits from its parameters, without detach, .data or no_grad",
            ) from error

    def forward(self, batch: Batch, where: str) -> Tensor:
        try:
            logits = self.head(batch)
        except mistakes_of(self.name) as error:
            raise self.broken(
                f"fails on {where}: {one_line(error)}",
                "take shapes and types from the batch and from level_shapes, none for granted",
            ) from error
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise self.broken(f"returned {kind} on {where}", "expected logits, float32")
        return logits

    def broken(self, what: str, remedy: str) -> HeadError:
        return HeadError(f"head {self.name} {what}; {remedy}")


def _name_of(head: type[nn.Module]) -> str:
    """Return what ``--head`` calls a class."""
    for name, registered in HEADS.items():
        if registered is head:
            return name
    qualified = getattr(head, "__qualname__", repr(head))
    if "." in qualified or not isinstance(head, type):
        raise HeadError(
            f"{qualified} is not a class at the top level of a module: --head package.module:Class "
            "and checkpoints could not find it; move it there"
        )
    return f"{head.__module__}:{qualified}"


def _one_of(batch: Batch, i: int) -> Batch:
    levels = {level: x[i : i + 1] for level, x in batch.levels.items()}
    return Batch(levels, batch.angles_B2[i : i + 1], batch.content_B2[i : i + 1])


def _relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest value; NaN where a value is."""
    return float((value - exact).abs().max() / exact.abs().max().clamp(min=1e-6))
