"""A tower's weights from a checkpoint or a seed, checked, hashed, and read a tensor at a time."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam3cache.backbone.spec import BACKBONES, POSITIONS, TowerSpec
from sam3cache.errors import WeightsError

_SEED = 3
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Weights(Protocol):
    """Where a tower's weights come from."""

    @property
    def origin(self) -> str:
        """A file's path, or in words how they are made."""

    def names(self) -> list[str]:
        """Return the names of ``TowerSpec.weight_shapes()``, sorted."""

    def read(self, name: str) -> Tensor:
        """Return one weight on the CPU in float32, of the spec's shape."""


def read_and_hash(weights: Weights, hasher: hashlib._Hash) -> Iterator[tuple[str, Tensor]]:
    """Read every weight once, in sorted order, feeding a hash of what the features depend on.

    The hash covers name, dtype, shape and bytes of all levels' weights in float32. What cannot
    alter a feature is left out (rotations, the class token's position, the unused fourth neck
    level), so the same model has the same hash in every layout.

    Raises:
        WeightsError: a weight holds NaN or infinity.
    """
    for name in weights.names():
        tensor = weights.read(name).contiguous()
        # NaN and infinity survive a sum, and a sum is far cheaper than isfinite().all().
        if not math.isfinite(tensor.sum(dtype=torch.float64).item()):
            raise WeightsError(
                f"{weights.origin}: {name} holds NaN or infinity, and weights are finite; "
                "fetch the file again"
            )
        hasher.update(f"{name}|float32|{tuple(tensor.shape)}|".encode())
        hasher.update(tensor.numpy().data)
        yield name, tensor


@dataclass(frozen=True, slots=True)
class SeededWeights:
    """Weights from a fixed seed, the same on every machine and whatever the global random state.

    They are uniform with variance 1 / fan-in, so that signals keep their scale from layer to
    layer. Only exact arithmetic is used (24-bit integers, one rounding), hence the same bits
    everywhere; each tensor has its own stream, hence any order of reading.
    """

    spec: TowerSpec

    @property
    def origin(self) -> str:
        """How these weights are made."""
        return f"seeded weights of {self.spec.name}"

    def names(self) -> list[str]:
        """Return the weights' names, sorted."""
        return sorted(self.spec.weight_shapes())

    def read(self, name: str) -> Tensor:
        """Return one weight, float32."""
        shape = self.spec.weight_shapes()[name]
        if len(shape) == 1:
            is_scale = name.endswith(".weight")
            return torch.ones(shape) if is_scale else torch.zeros(shape)
        if name == POSITIONS:
            variance = 0.02**2
        elif "dconv" in name:  # (in, out, 2, 2) of stride 2: an output sees one tap
            variance = 1 / shape[0]
        else:
            variance = 1 / math.prod(shape[1:])
        digest = hashlib.sha256(f"{_SEED}|{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        uniform = torch.rand(shape, generator=generator) * 2 - 1
        return uniform * math.sqrt(3 * variance)


@dataclass(frozen=True, slots=True)
class FileWeights:
    """Weights of a checkpoint, left on disk until read.

    Attributes:
        origin: the file's path.
        parts: by weight, the file's tensors that make it up when concatenated.
    """

    origin: str
    parts: Mapping[str, tuple[Tensor, ...]]

    def names(self) -> list[str]:
        """Return the weights' names, sorted."""
        return sorted(self.parts)

    def read(self, name: str) -> Tensor:
        """Return one weight, float32."""
        tensors = self.parts[name]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).float()


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a family of checkpoints names the tower's weights.

    Attributes:
        prefixes: what may stand before the names, most specific first.
        anchor: a name that tells this layout.
        names: the file's names for one of ours; several are concatenated.
        ignored: names that the features do not depend on.
        has_class_position: whether the positions begin with the class token's.
    """

    prefixes: tuple[str, ...]
    anchor: str
    names: Callable[[str], tuple[str, ...]]
    ignored: re.Pattern[str]
    has_class_position: bool


_TRANSFORMERS_NAMES = (
    (r"trunk\.pos_embed", "backbone.embeddings.position_embeddings"),
    (r"trunk\.patch_embed\.proj", "backbone.embeddings.patch_embeddings.projection"),
    (r"trunk\.ln_pre", "backbone.layer_norm"),
    (r"trunk\.blocks\.(\d+)\.norm([12])", r"backbone.layers.\1.layer_norm\2"),
    (r"trunk\.blocks\.(\d+)\.attn\.proj", r"backbone.layers.\1.attention.o_proj"),
    (r"trunk\.blocks\.(\d+)\.attn\.qkv", r"backbone.layers.\1.attention.{}_proj"),
    (r"trunk\.blocks\.(\d+)\.mlp", r"backbone.layers.\1.mlp"),
    (r"convs\.(\d)\.dconv_2x2_1", r"neck.fpn_layers.\1.scale_layers.2"),
    (r"convs\.(\d)\.dconv_2x2(?:_0)?", r"neck.fpn_layers.\1.scale_layers.0"),
    (r"convs\.(\d)\.conv_1x1", r"neck.fpn_layers.\1.proj1"),
    (r"convs\.(\d)\.conv_3x3", r"neck.fpn_layers.\1.proj2"),
)


def _transformers_names(name: str) -> tuple[str, ...]:
    for pattern, replacement in _TRANSFORMERS_NAMES:
        theirs, num_replaced = re.subn(rf"^{pattern}(?![^.])", replacement, name)
        if num_replaced:
            # sam3 keeps query, key and value as thirds of one matrix.
            return tuple(theirs.format(x) for x in "qkv") if "{}" in theirs else (theirs,)
    raise AssertionError(name)


_LAYOUTS = (
    _Layout(
        prefixes=("detector.backbone.vision_backbone.", "backbone.vision_backbone.", ""),
        anchor="trunk.patch_embed.proj.weight",
        names=lambda name: (name,),
        # Rotations are computed; SAM 3 and 3.1 hold further necks for their trackers.
        ignored=re.compile(r".*\.freqs_cis$|(sam2|interactive|propagation)_convs\."),
        has_class_position=True,
    ),
    _Layout(
        prefixes=("detector_model.vision_encoder.", "vision_encoder.", ""),
        anchor="backbone.embeddings.patch_embeddings.projection.weight",
        names=_transformers_names,
        ignored=re.compile(r"(?!)"),
        has_class_position=False,
    ),
)


def read_checkpoint(path: Path, spec: TowerSpec) -> FileWeights:
    """Open a checkpoint of SAM 3 and check it against a spec, reading none of its weights yet.

    The layout is told by the tensors' names, whatever the file's: that of the ``sam3`` package
    (``sam3.pt``, ``sam3.1_multiplex.pt``), that of transformers (``model.safetensors``), or the
    tower of either alone, in torch's format or safetensors.

    Raises:
        WeightsError: the file is absent, damaged, no checkpoint, or not of this backbone.
    """
    tensors = _read_tensors(path)
    found = _select_tower(tensors)
    if found is None:
        raise WeightsError(
            f"{path}: none of its {len(tensors)} tensors belongs to SAM 3's vision tower "
            f"(expected {_LAYOUTS[0].prefixes[0]}* or {_LAYOUTS[1].prefixes[0]}*); "
            "give sam3.pt, sam3.1_multiplex.pt or model.safetensors"
        )
    layout, tower = found
    if difference := _difference(layout, tower, spec):
        fitting = [
            name for name, other in BACKBONES.items() if not _difference(layout, tower, other)
        ]
        advice = (
            f"they fit backbone {' or '.join(fitting)}, choose that"
            if fitting
            else "choose another file"
        )
        raise WeightsError(f"{path}: not the weights of {spec.name}: {difference}; {advice}")
    return FileWeights(
        origin=str(path),
        parts={
            name: tuple(tower[theirs] for theirs in layout.names(name))
            for name in spec.weight_shapes()
        },
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a file's tensors into memory, by name; their bytes stay on disk until touched."""
    if path.is_dir():
        raise WeightsError(f"{path}: a folder, expected a checkpoint file; name the file inside it")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; check the path of the weights") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    try:
        if is_zip:
            content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            # Training code keeps the state dict under "model"; sam3 accepts that as well.
            if isinstance(content, dict) and isinstance(content.get("model"), dict):
                content = content["model"]
        else:
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise WeightsError(
            f"{path}: not a readable checkpoint, or only part of one ({reason}); "
            "expected torch's zip format or safetensors, fetch the file again"
        ) from None
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}, expected a dict of tensors; "
            "give a checkpoint of SAM 3"
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _select_tower(tensors: Mapping[str, Tensor]) -> tuple[_Layout, dict[str, Tensor]] | None:
    """Tell the layout and return the tower's tensors without prefix, or None without a tower."""
    for layout in _LAYOUTS:
        for prefix in layout.prefixes:
            if prefix + layout.anchor not in tensors:
                continue
            tower = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            tower = {
                name: tensor for name, tensor in tower.items() if not layout.ignored.match(name)
            }
            if layout.has_class_position and POSITIONS in tower and tower[POSITIONS].ndim == 3:
                tower[POSITIONS] = tower[POSITIONS][:, 1:]
            return layout, tower
    return None


def _difference(layout: _Layout, tower: Mapping[str, Tensor], spec: TowerSpec) -> str:
    """Say in what a checkpoint's tower differs from a spec; empty when it fits."""
    shapes = spec.weight_shapes()
    fourth = {
        theirs
        for part in ("conv_1x1.weight", "conv_1x1.bias", "conv_3x3.weight", "conv_3x3.bias")
        for theirs in layout.names(f"convs.3.{part}")
    }
    expected = {theirs for name in shapes for theirs in layout.names(name)}
    if missing := sorted(expected - tower.keys()):
        return f"{len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}"
    if unexpected := sorted(tower.keys() - expected - fourth):
        return f"{len(unexpected)} tensors are unexpected, such as {unexpected[0]}"
    for name, shape in shapes.items():
        tensors = [tower[theirs] for theirs in layout.names(name)]
        rows, *rest = shape
        part_shape = (rows // len(tensors), *rest)
        for theirs, tensor in zip(layout.names(name), tensors, strict=True):
            if tuple(tensor.shape) != part_shape:
                return f"{theirs} is {tuple(tensor.shape)}, expected {part_shape}"
            if tensor.dtype not in _DTYPES:
                return f"{theirs} is {tensor.dtype}, expected float32, float16 or bfloat16"
    num_neck_levels = 4 if fourth <= tower.keys() else 3
    if num_neck_levels not in spec.neck_levels_on_file:
        return f"{num_neck_levels} neck levels, expected {spec.neck_levels_on_file[0]}"
    return ""
