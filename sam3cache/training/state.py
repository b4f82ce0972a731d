"""What a run needs to go on from its last step that was saved as if it had never stopped.

One file, ``last/training.safetensors``, replaced in one step when an epoch is finished, and within
it now and then: weights, optimizer, random number generators, and in its header everything that is
not a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sam3cache.errors import CheckpointError
from sam3cache.heads.checkpoint import (
    LAST,
    STATE_FILE,
    is_to_be_replaced,
    read_metadata,
    read_tensors,
    untied,
)
from sam3cache.runtime import write_atomic
from sam3cache.training.config import TrainConfig, check_same_run, other_data, variants_text

_HEADER_KEY = "training"


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step; plain JSON values.

    Attributes:
        settings: of the run.
        levels: fingerprints of the levels it reads, as in its checkpoints.
        epoch: epochs finished.
        num_seen: images of the next epoch that it has been trained on already.
        best_epoch: epoch of the best validation Dice.
        best_dice: that Dice.
        elapsed_s: time spent on training and validation.
        train_s: what of it went to training in the next epoch.
        num_averaged: steps that the moving average of the weights has seen.
        micro_batch: samples that go through the head at once.
        scaler: state of the gradient scaler, empty without one.
        masks_sha256: of classes and pixels of the masks it is about; empty where versions before
            recorded none.
    """

    settings: Mapping[str, Any]
    levels: Mapping[str, Mapping[str, Any]]
    epoch: int = 0
    num_seen: int = 0
    best_epoch: int = 0
    best_dice: float = -1.0
    elapsed_s: float = 0.0
    train_s: float = 0.0
    num_averaged: int = 0
    micro_batch: int | None = None
    scaler: Mapping[str, Any] = field(default_factory=dict)
    masks_sha256: str = ""


def save_state(
    path: Path,
    state: RunState,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
) -> None:
    """Write the state of a run, atomically replacing the one before.

    Args:
        path: where to.
        state: what is not a tensor.
        head: weights and buffers.
        optimizer: moments.
        extra: other tensors, by names that ``read_state`` gives them back by.
    """
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors |= {f"extra.{name}": tensor for name, tensor in extra.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    random = RandomState.get(next(head.parameters()).device)
    tensors["random.cpu"] = random.cpu
    if random.cuda is not None:
        tensors["random.cuda"] = random.cuda
    write_atomic(path, save(untied(tensors), {_HEADER_KEY: json.dumps(asdict(state))}))


def read_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read the state of a run and its tensors.

    Raises:
        CheckpointError: the file is damaged or not one of ours.
    """
    metadata, tensors = read_tensors(path)
    return _parse(path, metadata), tensors


def read_record(run_dir: Path) -> RunState | None:
    """Read where the run of a folder stands, without its tensors; None: nothing of it was saved.

    Raises:
        CheckpointError: the file is damaged or not one of ours.
    """
    path = run_dir / LAST / STATE_FILE
    if is_to_be_replaced(run_dir) or not path.exists():
        return None
    return _parse(path, read_metadata(path))


def _parse(path: Path, metadata: Mapping[str, str]) -> RunState:
    try:
        return RunState(**json.loads(metadata[_HEADER_KEY]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} does not hold the state of a run; start again with --overwrite"
        ) from error


def as_begun(config: TrainConfig) -> TrainConfig:
    """Return a run's configuration with the variants that it began with, if it is resumed.

    Variants that have come into the store since are no reason to refuse it.

    Raises:
        CheckpointError: what was saved of the run is damaged.
    """
    if config.variants == "all" and config.resume:
        record = read_record(config.run_dir)
        if record is not None and "variants_used" in record.settings:
            return replace(config, variants=variants_text(record.settings["variants_used"]))
    return config


def check_same(record: RunState, settings: Mapping[str, Any], masks_sha256: str) -> None:
    """Refuse to resume a run with other settings, or on other data, than it began with.

    Args:
        record: of the run.
        settings: the present ones, with those of the data.
        masks_sha256: of the present masks.

    Raises:
        ConfigError: what differs.
    """
    check_same_run(record.settings, settings)
    if record.masks_sha256 not in ("", masks_sha256):
        raise other_data(settings["store"])


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
    device = next(head.parameters()).device
    RandomState(tensors["random.cpu"], tensors.get("random.cuda")).set(device)


def extra_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was saved as ``extra``."""
    prefix = "extra."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True)
class RandomState:
    """Torch's random number generators, as far as a training draws from them.

    Attributes:
        cpu: state of the CPU's.
        cuda: state of a GPU's, if the training runs on one.
    """

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def get(cls, device: torch.device) -> RandomState:
        """Return the present state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda)

    def set(self, device: torch.device) -> None:
        """Go on from this state."""
        torch.set_rng_state(self.cpu)
        if device.type == "cuda" and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
