"""From a head's name to the head, with every way that can go wrong said in one line.

Shape legend: B batch, K mask planes, H height, W width.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sam3cache.errors import HeadError, UnknownHeadError
from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.heads.film_conv import FilmConv
from sam3cache.heads.film_detail import FilmDetail
from sam3cache.heads.film_pyramid import FilmPyramid
from sam3cache.heads.head import Head, LevelShapes, count_parameters
from sam3cache.heads.linear import Linear
from sam3cache.records import Batch

HEADS: dict[str, type[Head]] = {
    "film-detail": FilmDetail,
    "film-conv": FilmConv,
    "film-pyramid": FilmPyramid,
    "linear": Linear,
}
"""The heads that come with the package, by the name that ``--head`` takes; the first is default."""


# What a head of ours fails by for an option of the wrong kind, or features that it does not fit.
_MISTAKES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)


def mistakes_of(name: str) -> tuple[type[Exception], ...]:
    """Return what a head may fail by and be told of in one line: of somebody's own, anything."""
    return _MISTAKES if name in HEADS else (Exception,)


def build_head(
    name: str,
    level_shapes: LevelShapes,
    options: Mapping[str, Any] | None = None,
    *,
    num_classes: int = 1,
) -> Head:
    """Build a head for features of given shapes, and try it on one blank sample.

    Args:
        name: a key of ``HEADS``, or "package.module:Class" (found from the working directory too).
        level_shapes: (C, H, W) of every level at hand.
        options: keyword arguments of the head's own, plain JSON values.
        num_classes: K, planes of the masks.

    Returns:
        The head, in training mode, on the CPU.

    Raises:
        HeadError: the name is unknown, the class cannot be imported or is no head, an option or a
            level is missing, or the head does not fit the features.
    """
    head_class = find_head(name)
    options = dict(options or {})
    needs = _levels_read(head_class, options)
    if missing := [level for level in needs if level not in level_shapes]:
        fitting = [fits for fits in fitting_heads(level_shapes) if fits != name]
        raise HeadError(
            f"head {name} needs {', '.join(missing)}, which is not among the store's levels "
            f"({', '.join(level_shapes) or 'none'}); run `sam3cache extract` with "
            f"--levels {','.join([*level_shapes, *missing])}"
            + (f", or take --head {' or '.join(fitting)}" if fitting else "")
        )
    _check_options(name, head_class, options)
    try:
        head = head_class(level_shapes, num_classes=num_classes, **options)
    except HeadError:
        raise
    except mistakes_of(name) as error:
        raise UnknownHeadError(
            f"head {name} cannot be built with options {options}: {one_line(error)}; correct the "
            "options, or the class's __init__(level_shapes, *, num_classes, ...)"
        ) from error
    _try_on_blank(name, head, level_shapes, num_classes)
    return head


def fitting_heads(levels: Iterable[str]) -> list[str]:
    """Return the names in ``HEADS`` of those that some levels are enough for, in that order."""
    present = set(levels)
    return [name for name, head in HEADS.items() if set(head.needs) <= present]


def find_head(name: str) -> Callable[..., Head]:
    """Return the class that a name stands for, importing a user's own.

    Raises:
        HeadError: the name is unknown, or its class cannot be imported or is no head.
    """
    if name in HEADS:
        return HEADS[name]
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise UnknownHeadError(
            f"no head is named {name!r}; take one of {', '.join(HEADS)}, or name your own as "
            "package.module:Class"
        )
    # As `python -m` would: a user's heads usually lie beside their data, not in site-packages.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        head_class = getattr(importlib.import_module(module_name), class_name)
    except mistakes_of(name) as error:
        raise UnknownHeadError(
            f"head {name} cannot be imported: {one_line(error)}; expected a class {class_name} "
            f"in a module {module_name} on PYTHONPATH or in {here}"
        ) from error
    is_module = inspect.isclass(head_class) and issubclass(head_class, nn.Module)
    needs = getattr(head_class, "needs", None)
    if not is_module or not isinstance(needs, tuple) or not needs:
        raise UnknownHeadError(
            f"{name} is no head: expected a torch.nn.Module class with `needs`, a tuple of the "
            "levels it reads such as ('fpn_72',); derive it from sam3cache.heads.Head"
        )
    return cast(Callable[..., Head], head_class)


def _levels_read(head_class: Callable[..., Head], options: Mapping[str, Any]) -> tuple[str, ...]:
    # A user's own head need not be derived from ours.
    levels_read = getattr(head_class, "levels_read", None)
    needs = head_class.needs if levels_read is None else levels_read(options)  # type: ignore[attr-defined]
    return cast(tuple[str, ...], needs)


def _check_options(name: str, head_class: Callable[..., Head], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(head_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = [p.name for p in parameters if p.name not in ("level_shapes", "num_classes")]
    if unknown := [option for option in options if option not in accepted]:
        raise UnknownHeadError(
            f"head {name} has no option {', '.join(unknown)}; it takes "
            f"{', '.join(accepted) or 'none'}"
        )


def _try_on_blank(name: str, head: Head, level_shapes: LevelShapes, num_classes: int) -> None:
    """Run the head once, so that a misfit shows before the store is read."""
    batch = _blank(head, level_shapes)
    head.eval()
    try:
        with torch.no_grad():
            logits = head(batch)
    except mistakes_of(name) as error:
        shapes = ", ".join(f"{level} {tuple(level_shapes[level])}" for level in head.needs)
        raise HeadError(
            f"head {name} does not fit the features {shapes}: {one_line(error)}; build its layers "
            "from level_shapes"
        ) from error
    head.train()
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if not isinstance(logits, torch.Tensor) or shape[:2] != (1, num_classes) or logits.ndim != 4:
        raise HeadError(
            f"head {name} returned {shape} for one sample; expected logits of shape "
            f"(1, {num_classes}, H, W)"
        )


class PartSize(NamedTuple):
    """What a part of a head costs.

    Attributes:
        parameters: those that are trained.
        gflop: of a forward pass over one image; see ``forward_gflop``.
    """

    parameters: int
    gflop: float


def describe_head(head: nn.Module, level_shapes: LevelShapes) -> dict[str, PartSize]:
    """Return what each part of a head costs, a part being a direct child of it, and their total.

    Args:
        head: on any device.
        level_shapes: (C, H, W) of every level that it needs.

    Returns:
        By part, in the order of the head's attributes; then "other", where the head has parameters
        or does arithmetic of its own; and last "total".
    """
    children = dict(head.named_children())
    running, started, spent = Counter[str](), Counter[str](), Counter[str]()
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        # A head may call a part's own parts rather than the part: what runs within any of them is
        # the part's.
        for name, child in children.items():

            def begin(*_: object, name: str = name) -> None:
                if not running[name]:
                    started[name] = counter.get_total_flops()
                running[name] += 1

            def end(*_: object, name: str = name) -> None:
                running[name] -= 1
                if not running[name]:
                    spent[name] += counter.get_total_flops() - started[name]

            for module in child.modules():
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
        _run_once(head, level_shapes)
    parameters = count_parameters(head)
    total = PartSize(parameters.pop("total"), counter.get_total_flops() / 1e9)
    parts = {name: PartSize(parameters[name], spent[name] / 1e9) for name in children}
    other = PartSize(
        total.parameters - sum(parameters.values()),
        (counter.get_total_flops() - spent.total()) / 1e9,
    )
    return parts | ({"other": other} if any(other) else {}) | {"total": total}


def forward_gflop(head: nn.Module, level_shapes: LevelShapes) -> float:
    """Count the arithmetic of a head's forward pass over one image, in 10⁹ operations.

    Multiplications and additions of convolutions and matrix products, as PyTorch's own counter
    has them; the rest (norms, activations, interpolation) is a few percent and left out.

    Args:
        head: on any device.
        level_shapes: (C, H, W) of every level that it needs.
    """
    return describe_head(head, level_shapes)["total"].gflop


def _run_once(head: nn.Module, level_shapes: LevelShapes) -> None:
    parameter = next(head.parameters(), None)
    batch = _blank(head, level_shapes, "cpu" if parameter is None else parameter.device)
    was_training = head.training
    head.eval()  # Dropout would draw random numbers, and so change a training that begins.
    with torch.no_grad():
        head(batch)
    head.train(was_training)


def _blank(head: nn.Module, level_shapes: LevelShapes, device: torch.device | str = "cpu") -> Batch:
    """Return one black sample."""
    levels = {
        level: torch.zeros(
            (1, *level_shapes[level]),
            dtype=torch.uint8 if level.startswith("image_") else torch.float16,
            device=device,
        )
        for level in cast(Head, head).needs
    }
    content_12 = torch.full((1, 2), INPUT_SIZE_PX, device=device)
    return Batch(levels, angles_B2=torch.zeros(1, 2, device=device), content_B2=content_12)


def one_line(error: Exception) -> str:
    """Return an exception's type and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
