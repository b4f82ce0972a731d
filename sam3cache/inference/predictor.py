"""A trained head on new images: through the tower, as the head's features were made.

Shape legend: C channels, H height, W width, K mask planes, S side of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3cache.backbone import BACKBONES, Tower, load_tower
from sam3cache.errors import CheckpointError, FingerprintError, ImageError
from sam3cache.evaluation import checkpoint_folder
from sam3cache.features.precision import Precision, decode, encode, from_words, split_name
from sam3cache.geometry import Letterbox, ResizeMode
from sam3cache.heads import CheckpointInfo, Head, load_checkpoint
from sam3cache.images import letterbox_image, preprocessing_fields, read_image
from sam3cache.records import Batch, Sample

IMAGE_LEVEL = "image_1008"


class Predictor:
    """A head and the tower that made its features; ``load`` makes one.

    Attributes:
        head: in evaluation mode.
        info: what its checkpoint records.
        tower: None where the head reads nothing but the image.
        resize_mode: how images are laid on the square.
        device: where both run.
    """

    def __init__(
        self,
        head: Head,
        info: CheckpointInfo,
        tower: Tower | None,
        resize_mode: ResizeMode,
        device: str,
    ) -> None:
        self.head = head
        self.info = info
        self.tower = tower
        self.resize_mode = resize_mode
        self.device = device

    def predict(
        self,
        image: str | Path | NDArray[np.uint8],
        primary_angle_deg: float = math.nan,
        secondary_angle_deg: float = math.nan,
    ) -> NDArray[np.float32]:
        """Predict the masks of one image.

        Args:
            image: a file, or pixels uint8 (H, W), (H, W, 1) or (H, W, 3).
            primary_angle_deg: LAO positive, in [-180, 180]; NaN when unknown.
            secondary_angle_deg: cranial positive, in [-90, 90]; NaN when unknown.

        Returns:
            Probabilities float32 (K, H, W) on the image's own grid; ``info.threshold`` is where a
            mask begins.

        Raises:
            ImageError: the file cannot be read, or the array is no such image.
        """
        pixels_HWC = _pixels(image)
        batch, letterbox = self.batch(pixels_HWC, primary_angle_deg, secondary_angle_deg)
        with torch.inference_mode():
            logits_KSS = self.head(batch)[0]
            logits_KHW = letterbox.logits_to_grid(logits_KSS, *pixels_HWC.shape[:2])
        probability_KHW: NDArray[np.float32] = logits_KHW.sigmoid().cpu().numpy()
        return probability_KHW

    def batch(
        self, pixels_HWC: NDArray[np.uint8], primary_angle_deg: float, secondary_angle_deg: float
    ) -> tuple[Batch, Letterbox]:
        """Compute what the head reads of one image.

        Args:
            pixels_HWC: uint8 (H, W, 1) or (H, W, 3).
            primary_angle_deg: as for ``predict``.
            secondary_angle_deg: as for ``predict``.

        Returns:
            A batch of one, and where the image lies in it. Features are as the tower gives them
            (float32, or bfloat16 on that path, without the rounding to float16 of a store), or what
            a store keeps of them if the head was trained on fewer bits.
        """
        square_CSS, letterbox = letterbox_image(pixels_HWC, self.resize_mode)
        levels: dict[str, Tensor] = {}
        if self.tower is not None:
            made = self.tower(square_CSS[None])
            for level, entry in self.info.levels.items():
                if level != IMAGE_LEVEL:
                    precision = from_words(str(entry["fields"].get("precision")))
                    levels[level] = _as_kept(precision, made[split_name(level)[0]])
        if IMAGE_LEVEL in self.info.levels:
            num_channels = self.info.levels[IMAGE_LEVEL]["shape"][0]
            levels[IMAGE_LEVEL] = square_CSS.expand(num_channels, -1, -1)[None].to(self.device)
        batch = Batch(
            levels={level: levels[level] for level in self.info.levels},
            angles_B2=torch.tensor([[primary_angle_deg, secondary_angle_deg]], device=self.device),
            content_B2=torch.tensor(
                [[letterbox.content_height_px, letterbox.content_width_px]], device=self.device
            ),
        )
        return batch, letterbox


def load(
    checkpoint: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    head: str | None = None,
    device: str = "cpu",
) -> Predictor:
    """Load a trained head, and the tower as its features were made with it.

    Args:
        checkpoint: a run's folder, whose best checkpoint is taken, or that of one checkpoint.
        backbone: a name in ``BACKBONES``; None: the first of the recorded architecture.
        weights: as for ``backbone.load_tower``.
        head: the user's own head, as "package.module:Class", if the checkpoint is of one.
        device: where to run.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit.
        WeightsError: there are no such weights, or they are not of this backbone.
        FingerprintError: with these weights, or with this version's way of preparing images, the
            features would not be those that the head was trained on.
    """
    folder = checkpoint_folder(Path(checkpoint))
    trained, info = load_checkpoint(folder, head=head, device=device)
    fields: dict[str, Any] = {}
    for entry in info.levels.values():
        fields |= entry["fields"]
    of_tower = tuple(
        dict.fromkeys(split_name(level)[0] for level in info.levels if level != IMAGE_LEVEL)
    )
    resize_mode = cast(ResizeMode, fields.get("preprocessing.resize_mode", "letterbox"))
    here: dict[str, Any] = {
        f"preprocessing.{name}": value for name, value in preprocessing_fields(resize_mode).items()
    }
    tower = None
    if of_tower:
        tower = load_tower(
            backbone or _backbone_of(folder, fields),
            weights=weights,
            levels=of_tower,
            device=device,
            numeric_path=fields.get("numeric_path", "fp32"),
        )
        here["weights_sha256"] = tower.weights_sha256
        here |= {f"architecture.{k}": v for k, v in tower.spec.architecture_fields().items()}
    differences = [
        f"{name} {fields.get(name, 'absent')} → {value}"
        for name, value in here.items()
        if fields.get(name) != value
    ]
    if differences:
        raise FingerprintError(
            f"features made here would not be those that the head of {folder} was trained on: "
            f"{'; '.join(differences)}; give the backbone and weights that the store was extracted "
            "with, or extract and train again"
        )
    return Predictor(trained, info, tower, resize_mode, device)


def _as_kept(precision: Precision, feature_BCHW: Tensor) -> Tensor:
    """Return features as a store gives them that keeps them in fewer bits than float16."""
    if precision in ("float16", "bf16"):
        return feature_BCHW
    kept = [
        decode(precision, encode(precision, feature_CHW.float().cpu().numpy()))
        for feature_CHW in feature_BCHW
    ]
    return torch.from_numpy(np.stack(kept)).to(feature_BCHW)


def _backbone_of(folder: Path, fields: Mapping[str, Any]) -> str:
    recorded = {
        name.removeprefix("architecture."): value
        for name, value in fields.items()
        if name.startswith("architecture.")
    }
    for name, spec in BACKBONES.items():
        if spec.architecture_fields() == recorded:
            return name
    raise CheckpointError(
        f"the features of {folder} were made by a tower that is none of {', '.join(BACKBONES)}; "
        "evaluate on a store instead, by `sam3cache eval`"
    )


def _pixels(image: str | Path | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        path = Path(image)
        return read_image(Sample(id=path.stem, source=path.name, root=path.parent))
    pixels_HWC = image[..., None] if image.ndim == 2 else image
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3):
        raise ImageError(
            f"an array of {image.dtype} {image.shape}: expected uint8 (H, W), (H, W, 1) or "
            "(H, W, 3); scale other intensities to 8 bits first, or give the file"
        )
    return pixels_HWC
