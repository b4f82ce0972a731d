"""From an image's pixels to the square that the tower takes.

Shape legend: C channels (1 grey, 3 RGB), H height, W width, S side of the square.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from sam3cache.geometry import INPUT_SIZE_PX, Letterbox, ResizeMode

PREPROCESSING_VERSION = 1
"""Raised whenever the same file would give other pixels on the square."""

PAD_VALUE = 0
"""Padding takes part in SAM 3's attention, so its value is part of what features are."""


def letterbox_image(
    pixels_HWC: NDArray[np.uint8], mode: ResizeMode = "letterbox"
) -> tuple[torch.Tensor, Letterbox]:
    """Lay an image on the square input, as SAM 3's own processor resizes: uint8, antialiased.

    This is the operation behind torchvision's ``Resize``, without the seconds that importing
    torchvision takes. On processors without AVX2 torchvision resizes in float32 instead, so there
    a pixel may differ from SAM 3's processor by one step of 255.

    Args:
        pixels_HWC: uint8 (H, W, 1) or (H, W, 3).
        mode: "letterbox" keeps the aspect ratio and pads bottom and right; "squash" does neither.

    Returns:
        The square, uint8 (C, S, S) with S = 1008, and where the image lies on it.
    """
    height_px, width_px, num_channels = pixels_HWC.shape
    letterbox = Letterbox.fit(height_px, width_px, mode)
    (content_CHW,) = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)[None],
        (letterbox.content_height_px, letterbox.content_width_px),
        mode="bilinear",
        antialias=True,
    )
    square_CSS = torch.full((num_channels, INPUT_SIZE_PX, INPUT_SIZE_PX), PAD_VALUE).to(torch.uint8)
    square_CSS[:, : letterbox.content_height_px, : letterbox.content_width_px] = content_CHW
    return square_CSS, letterbox


def preprocessing_fields(mode: ResizeMode) -> dict[str, str | int | float]:
    """Return what belongs in a fingerprint: all that decides the square's pixels."""
    return {
        "preprocessing_version": PREPROCESSING_VERSION,
        "resize_mode": mode,
        "size_px": INPUT_SIZE_PX,
        "pad_value": PAD_VALUE,
        "interpolation": "bilinear antialiased uint8",
        # A DICOM file's own window goes first. There were no such files when this was worded, and
        # another wording would make every store of before another one.
        "intensity_rule": "8 bit as is, else file percentiles 0.5-99.5",
    }


def pixel_hash(pixels_HWC: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's shape, type and values, as hex."""
    digest = hashlib.sha256(f"{pixels_HWC.shape} {pixels_HWC.dtype.str}\n".encode())
    digest.update(np.ascontiguousarray(pixels_HWC).data)
    return digest.hexdigest()
