"""What a run needs to go on after its last finished epoch as if it had never stopped.

One file, ``last/training.safetensors``, replaced in one step when an epoch is finished: weights,
optimizer, random number generators, and in its header everything that is not a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sam3cache.errors import CheckpointError
from sam3cache.heads.checkpoint import read_tensors
from sam3cache.runtime import write_atomic

STATE_FILE = "training.safetensors"
_HEADER_KEY = "training"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an epoch; plain JSON values.

    Attributes:
        settings: of the run.
        levels: fingerprints of the levels it reads, as in its checkpoints.
        epoch: epochs finished.
        best_epoch: epoch of the best validation Dice.
        best_dice: that Dice.
        elapsed_s: time spent on training and validation.
        scaler: state of the gradient scaler, empty without one.
    """

    settings: Mapping[str, Any]
    levels: Mapping[str, Mapping[str, Any]]
    epoch: int = 0
    best_epoch: int = 0
    best_dice: float = -1.0
    elapsed_s: float = 0.0
    scaler: Mapping[str, Any] = field(default_factory=dict)


def save_state(
    path: Path, state: RunState, head: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write the state of a run, atomically replacing the one before."""
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    device = next(head.parameters()).device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(plain, {_HEADER_KEY: json.dumps(asdict(state))}))


def read_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read the state of a run and its tensors.

    Raises:
        CheckpointError: the file is damaged or not one of ours.
    """
    metadata, tensors = read_tensors(path)
    try:
        return RunState(**json.loads(metadata[_HEADER_KEY])), tensors
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} does not hold the state of a run; start again with --overwrite"
        ) from error


def restore(
    tensors: Mapping[str, Tensor], head: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a saved state's tensors back where they were.

    Raises:
        CheckpointError: they do not fit the head.
    """
    weights, moments = {}, dict[int, dict[str, Tensor]]()
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "head":
            weights[rest] = tensor
        elif part == "optimizer":
            index, _, key = rest.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the run's last weights do not fit the head ({str(error).splitlines()[0]}); its code "
            "has changed: restore it, or start again with --overwrite"
        ) from error
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random.cpu"])
    device = next(head.parameters()).device
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
