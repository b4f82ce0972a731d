"""SAM 3's vision tower: frozen, exact about its input, and only as much of it as is asked for.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3cache.backbone.hub import find_weights
from sam3cache.backbone.spec import (
    LEVELS,
    POSITIONS,
    NumericPath,
    TowerSpec,
    check_levels,
    find_numeric_path,
    find_spec,
)
from sam3cache.backbone.weights import read_and_hash
from sam3cache.errors import ConfigError, InputSizeError


class Tower(nn.Module):
    """SAM 3's vision tower as a function from pixels to features.

    It cannot be trained or made to: no parameter takes a gradient, ``train()`` is without effect,
    and nothing inside depends on the mode. Conversions of device or dtype keep its rotary
    encoding in float32. Outputs are ordinary tensors, not inference tensors, so that a head can
    be trained on them.

    Attributes:
        spec: what the tower is made of.
        levels: the levels it computes; weights of others are not kept.
        weights_sha256: hash of the weights as loaded; see ``weights.read_and_hash``.
        numeric_path: as loaded, "fp32" (TF32 and autocast off), "bf16" (weights, activations and
            output in bfloat16) or "bf16+compile" (the same through ``torch.compile``, which rounds
            to bfloat16 less often on the way).
    """

    def __init__(
        self,
        spec: TowerSpec,
        trunk: nn.Module,
        necks: Mapping[str, nn.Module],
        *,
        levels: Sequence[str],
        weights_sha256: str,
        numeric_path: NumericPath,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.levels = tuple(levels)
        self.weights_sha256 = weights_sha256
        self.numeric_path = numeric_path
        self.trunk = trunk
        self.necks = nn.ModuleDict(necks)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked: a frozen tower has no other."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Compute the features of a batch.

        Pixels are normalised here to (x / 255 - 0.5) / 0.5, as SAM 3's image processor does.

        Args:
            image_BCHW: uint8 (B, 1 or 3, size, size) on any device, grey or RGB; size is
                ``spec.size_px``.

        Returns:
            By level, (B, C, H, W) of ``spec.level_shape``, contiguous, float32 or on the bf16
            path bfloat16, on the tower's device.

        Raises:
            InputSizeError: the batch is not of that type or shape. Other sizes would be cropped,
                or meet the rotary encoding of another grid, without complaint.
            ConfigError: the path is a compiled one, and torch cannot compile here.
        """
        self._check_input(image_BCHW)
        weight = next(self.trunk.parameters())
        pixels_BCHW = image_BCHW.to(weight.device).float().div_(255).sub_(0.5).div_(0.5)
        pixels_BCHW = pixels_BCHW.to(weight.dtype).expand(-1, 3, -1, -1)
        compiling = _say_what_keeps_from_compiling() if self.trunk.compiles else nullcontext()
        with tf32(False), torch.autocast(weight.device.type, enabled=False), compiling:
            trunk_BCHW = self.trunk(pixels_BCHW)[-1]
            features = {level: neck(trunk_BCHW) for level, neck in self.necks.items()}
        features["trunk_72"] = trunk_BCHW
        return {level: features[level].contiguous() for level in self.levels}

    def _check_input(self, image_BCHW: Tensor) -> None:
        size = self.spec.size_px
        shape = tuple(image_BCHW.shape)
        if (
            image_BCHW.dtype != torch.uint8
            or len(shape) != 4
            or shape[0] < 1
            or shape[1] not in (1, 3)
            or shape[2:] != (size, size)
        ):
            raise InputSizeError(
                f"a batch of {image_BCHW.dtype} {shape}: expected uint8 (B, 1 or 3, {size}, "
                f"{size}); resize and pad to {size} px first (images.letterbox_image)"
            )


def weights_sha256(backbone: str | TowerSpec, weights: str | Path | None = None) -> str:
    """Return the hash that ``load_tower`` would give its tower, without building it.

    Args:
        backbone: a name in ``BACKBONES``, or a spec.
        weights: as for ``load_tower``.

    Returns:
        64 hexadecimal digits, after "random:" when ``weights`` is "random".

    Raises:
        ConfigError: the backbone is unknown.
        WeightsError: there are no such weights, or they are not of this backbone.
    """
    hasher = hashlib.sha256()
    for _ in read_and_hash(find_weights(find_spec(backbone), weights), hasher):
        pass
    return _hash_text(hasher, weights)


def load_tower(
    backbone: str | TowerSpec = "sam3",
    *,
    weights: str | Path | None = None,
    levels: Sequence[str] = ("fpn_72",),
    device: str | torch.device = "cpu",
    numeric_path: NumericPath = "fp32",
) -> Tower:
    """Build a tower and load its weights, a tensor at a time, straight onto the device.

    Args:
        backbone: a name in ``BACKBONES``, or a spec.
        weights: a checkpoint's path, a repository on the Hugging Face hub that holds the file
            ``spec.hub_file``, "random" for seeded weights, or None for the backbone's own
            (fetched from the hub; part of this package for ``sam3-mini``).
        levels: what to compute, of ``LEVELS``.
        device: where.
        numeric_path: "fp32", "bf16" for half the memory and several times the speed, or
            "bf16+compile" for yet more of it on a GPU, after a first batch that takes minutes.

    Raises:
        ConfigError: backbone, level or numeric path is unknown, or ``sam3`` cannot be imported.
        WeightsError: there are no such weights, or they are not of this backbone.
    """
    spec = find_spec(backbone)
    check_levels(tuple(levels))
    path = find_numeric_path(numeric_path)
    dtype = torch.float32 if path == "fp32" else torch.bfloat16
    source = find_weights(spec, weights)
    trunk, convs = _import_sam3_modules().build_modules(spec, compiles=path == "bf16+compile")
    necks = {
        level: convs[index] for level in levels if (index := LEVELS[level].neck_index) is not None
    }
    modules = {"trunk.": trunk} | {
        f"convs.{LEVELS[level].neck_index}.": neck for level, neck in necks.items()
    }
    states: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in modules}
    hasher = hashlib.sha256()
    for name, tensor in read_and_hash(source, hasher):
        for prefix, state in states.items():
            if name.startswith(prefix):
                # A copy: the file may be changed or taken away while the tower lives.
                state[name.removeprefix(prefix)] = tensor.to(device, dtype, copy=True)
    # The stock trunk holds a class token's position as well, which it never reads.
    positions = POSITIONS.removeprefix("trunk.")
    states["trunk."][positions] = F.pad(states["trunk."][positions], (0, 0, 1, 0))
    for prefix, module in modules.items():
        module.load_state_dict(states[prefix], strict=True, assign=True)
    return Tower(
        spec,
        trunk,
        necks,
        levels=levels,
        weights_sha256=_hash_text(hasher, weights),
        numeric_path=path,
    ).to(device)


def _hash_text(hasher: hashlib._Hash, weights: str | Path | None) -> str:
    return ("random:" if weights == "random" else "") + hasher.hexdigest()


@contextmanager
def _say_what_keeps_from_compiling() -> Iterator[None]:
    """Turn a failure of ``torch.compile`` into one line.

    Raises:
        ConfigError: torch cannot compile here: mostly a C++ compiler or Triton that is absent.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"torch.compile fails here ({reason}): numeric path bf16+compile needs Triton on a GPU "
            "and a C++ compiler; install them, or use bf16"
        ) from error


@contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Switch TensorFloat-32 on or off (None: as it is), and set it back afterwards.

    PyTorch 2.9 began a new interface and refuses to read the old one once the two disagree. The
    new one can always be read, and writing the old one sets both.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        before = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    else:
        before = matmul.allow_tf32, cudnn.allow_tf32
    if allowed is not None:
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def ignore_warnings_of_sam3() -> None:
    """Keep what importing ``sam3`` warns of out of the output, from now on.

    ``load_tower`` does so for as long as it imports. That is enough where no other thread enters
    or leaves ``warnings.catch_warnings`` meanwhile, which sets the filters of all threads; a
    process in which threads decode images calls this before it starts them.
    """
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    warnings.filterwarnings("ignore", "CUDA is not available or torch_xla", UserWarning)


def _import_sam3_modules() -> ModuleType:
    """Import ``sam3``, which takes seconds, without its side effects.

    Raises:
        ConfigError: the installation is broken.
    """
    try:
        with warnings.catch_warnings(), tf32(None):
            ignore_warnings_of_sam3()
            from sam3cache.backbone import sam3_modules
    # A torchvision of another build fails in each of these ways, depending on the versions.
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the sam3 package cannot be imported ({reason}): expected sam3 0.1.4 with torch and "
            "torchvision of one build; install both from one index (https://pytorch.org)"
        ) from error
    return sam3_modules
