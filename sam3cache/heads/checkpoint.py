"""A trained head on disk: a folder of ``model.safetensors`` and ``checkpoint.json``.

The record of what was trained, on which features and how, stands in the header of
``model.safetensors``, so that one rename commits weights and record together and a crash leaves
the checkpoint before or the one after, never half of each. ``checkpoint.json`` is the same record
for people and for other tools.

Reading imports and runs nothing that a checkpoint names: the heads of this package are looked up
in ``HEADS``, and a user's own head has to be named again by whoever loads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import sam3cache
from sam3cache.errors import CheckpointError, FingerprintError, HeadError
from sam3cache.heads.head import Head
from sam3cache.heads.registry import HEADS, build_head
from sam3cache.runtime import write_atomic
from sam3cache.tasks import Task

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
RECORD_FILE = "checkpoint.json"

BEST, LAST = CHECKPOINTS = ("best", "last")
"""Folders of a run: its best epoch's checkpoint, and its last one's."""

STATE_FILE = "training.safetensors"
"""In ``last``: what training goes on from."""

METRICS_FILE = "metrics.jsonl"
"""Of a run: a line an epoch."""

LOG_FOLDER = "tensorboard"
"""Of a run: made as it begins."""

TO_REPLACE = ".to-replace"
"""In the folder of a run that ``train --overwrite`` is to replace, until its successor begins."""

_HEADER_KEY = "checkpoint"


@dataclass(frozen=True)
class CheckpointInfo:
    """Everything a checkpoint records beside its weights; all of it plain JSON values.

    Attributes:
        head: name in ``HEADS``, or "package.module:Class".
        head_options: keyword arguments that the head was built with.
        num_classes: K, planes of logits; see ``tasks.num_outputs``.
        levels: by level that the head reads: ``shape`` [C, H, W], ``digest`` and ``fields`` of its
            fingerprint.
        label_set: label set of the store that was learned.
        epoch: epochs trained, from 1.
        metrics: of the validation split after that epoch.
        settings: the training's configuration.
        trained_on: by "images" and "groups", ``short_hash`` of the pixels' hash and of the name of
            each that was learned from, sorted, one space between; empty if that was not recorded.
        data: which samples, labels and annotations of the store were used, by their hashes; see
            ``features.DataRecord``. Empty if that was not recorded.
        seed: of weights, order and dropout.
        threshold: probability from which a pixel counts as mask, of the task "multilabel".
        task: what the head was asked; see ``sam3cache.tasks``.
        classes: names of the label set's classes in order; empty if that was not recorded.
        weights_sha256: of names and bytes of the weights; filled in by writing.
        sam3cache_version: version that wrote it.
        torch_version: version that trained it.
        format_version: of this record.
    """

    head: str
    head_options: Mapping[str, Any]
    num_classes: int
    levels: Mapping[str, Mapping[str, Any]]
    label_set: str
    epoch: int
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained_on: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    threshold: float = 0.5
    task: Task = "multilabel"
    classes: tuple[str, ...] = ()
    weights_sha256: str = ""
    sam3cache_version: str = sam3cache.__version__
    torch_version: str = str(torch.__version__)
    format_version: int = FORMAT_VERSION


def save_checkpoint(folder: Path, head: nn.Module, info: CheckpointInfo) -> CheckpointInfo:
    """Write a checkpoint, atomically replacing one that is there.

    Returns:
        The record as written, ``weights_sha256`` filled in.
    """
    weights = untied(head.state_dict())
    info = dataclasses.replace(info, weights_sha256=_weights_sha256(weights))
    record = dataclasses.asdict(info)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / MODEL_FILE, save(weights, {_HEADER_KEY: json.dumps(record)}))
    write_atomic(folder / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())
    return info


def read_record(path: Path) -> CheckpointInfo:
    """Read what a checkpoint says of itself, without its weights.

    Raises:
        CheckpointError: no checkpoint is there, or it is corrupt or of an unknown version.
    """
    metadata, _ = _read(path, weights=False)
    return _parse_record(path, metadata)


def load_checkpoint(
    path: Path, *, head: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Head, CheckpointInfo]:
    """Rebuild a trained head.

    Args:
        path: the checkpoint's folder.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        device: where the head goes.

    Returns:
        The head in evaluation mode, and its record.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt, of an unknown version, or of a head
            that is not named or does not fit its weights.
    """
    metadata, weights = _read(path, weights=True)
    info = _parse_record(path, metadata)
    if _weights_sha256(weights) != info.weights_sha256:
        raise CheckpointError(
            f"the weights in {path / MODEL_FILE} are not those its record describes (sha256 "
            f"differs from {info.weights_sha256[:12]}); restore the file, or train again"
        )
    shapes = {level: tuple(entry["shape"]) for level, entry in info.levels.items()}
    try:
        rebuilt = build_head(
            _trusted_name(path, info, head), shapes, info.head_options, num_classes=info.num_classes
        )
    except HeadError as error:
        raise CheckpointError(f"the head of {path} cannot be rebuilt: {error}") from error
    _check_shapes(path, info.head, rebuilt.state_dict(), weights)
    rebuilt.load_state_dict(weights)
    return rebuilt.to(device).eval(), info


def check_fingerprints(
    checkpoint_levels: Mapping[str, Mapping[str, Any]],
    store_levels: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuse features that were made differently from those a head was trained on.

    Args:
        checkpoint_levels: ``CheckpointInfo.levels``.
        store_levels: by level of the store, ``digest`` and ``fields`` of its fingerprint.

    Raises:
        FingerprintError: a level is missing, or was made differently; every differing field is
            given as old → new.
    """
    for level, trained in checkpoint_levels.items():
        if level not in store_levels:
            raise FingerprintError(
                f"the head reads level {level}, which is not among the store's levels "
                f"({', '.join(store_levels) or 'none'}); extract it into the store"
            )
        stored = store_levels[level]
        if trained["digest"] == stored["digest"]:
            continue
        old, new = trained["fields"], stored["fields"]
        differences = [
            f"{name} {old.get(name, 'absent')} → {new.get(name, 'absent')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        raise FingerprintError(
            f"level {level} was made differently from the features the head was trained on: "
            f"{'; '.join(differences)}; use a store extracted with the old values, or train again"
        )


def is_to_be_replaced(run_dir: Path) -> bool:
    """Return whether a run is there that ``train --overwrite`` is still to replace."""
    return (run_dir / TO_REPLACE).exists()


def short_hash(text: str) -> str:
    """Return 16 hexadecimal digits of a text's SHA-256: short, and no group's name can be read."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU with memory of their own each, as safetensors wants them.

    Weights that two layers share are so written twice; the head that they are loaded into shares
    them again.
    """
    plain, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.numel() and own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def read_metadata(path: Path) -> dict[str, str]:
    """Read a safetensors file's header alone.

    Raises:
        CheckpointError: the file is missing or is no safetensors file.
    """
    return _open_tensors(path, with_tensors=False)[0]


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file's header and tensors.

    Raises:
        CheckpointError: the file is missing or is no safetensors file.
    """
    return _open_tensors(path, with_tensors=True)


def _read(path: Path, *, weights: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not (path / MODEL_FILE).is_file():
        runs = sorted(file.parts[-3] for file in path.glob(f"*/best/{MODEL_FILE}"))
        if runs:
            raise CheckpointError(
                f"{path} is no checkpoint, but a folder of runs ({', '.join(runs[:5])}"
                f"{', …' if len(runs) > 5 else ''}); give one of them, such as {path / runs[0]}"
            )
        raise CheckpointError(
            f"no checkpoint at {path}: expected a folder with {MODEL_FILE}, such as "
            "checkpoints/RUN/best; `sam3cache train` writes one"
        )
    return _open_tensors(path / MODEL_FILE, with_tensors=weights)


def _open_tensors(path: Path, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if with_tensors else []
            # clone(): the tensors would map the file, which Windows then refuses to replace.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); restore the file, or train "
            "again"
        ) from error


def _parse_record(path: Path, metadata: Mapping[str, str]) -> CheckpointInfo:
    try:
        record = json.loads(metadata[_HEADER_KEY])
        version = record["format_version"]
        if version == FORMAT_VERSION:
            # JSON has lists alone; a checkpoint written before version 0.2 names no classes.
            return CheckpointInfo(**{**record, "classes": tuple(record.get("classes", ()))})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path / MODEL_FILE} has no record of a trained head in its header; expected one "
            "written by `sam3cache train`"
        ) from error
    raise CheckpointError(
        f"{path} is of checkpoint format {version!r}; this sam3cache reads {FORMAT_VERSION}; "
        "install the sam3cache that wrote it"
    )


def _trusted_name(path: Path, info: CheckpointInfo, named: str | None) -> str:
    """Return the head to build: from ``HEADS``, or what the caller, not the file, names."""
    if info.head in HEADS:
        if named not in (None, info.head):
            raise CheckpointError(
                f"{path} is a checkpoint of head {info.head}, not of {named}; leave --head out"
            )
        return info.head
    if named is None:
        raise CheckpointError(
            f"{path} is a checkpoint of the head {info.head!r}, which is not part of sam3cache "
            "and is not imported unasked; if you trust it, name it again with --head"
        )
    if named != info.head:
        raise CheckpointError(
            f"{path} is a checkpoint of head {info.head!r}, not of {named!r}; name that one"
        )
    return named


def _check_shapes(
    path: Path, name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    def shape(weights: Mapping[str, Tensor], key: str) -> str:
        return str(tuple(weights[key].shape)) if key in weights else "absent"

    differences = [
        f"{key} {shape(found, key)} where the head has {shape(expected, key)}"
        for key in sorted({*expected, *found})
        if shape(expected, key) != shape(found, key)
    ]
    if differences:
        rest = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"the weights in {path} do not fit head {name}: {differences[0]}{rest}; the head's "
            "code has changed since: restore it, or train again"
        )


def _weights_sha256(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
