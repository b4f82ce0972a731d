"""Which frame of a coronary cine shows the most contrast agent.

Vessels that are filled are thin and darker than what is around them. A closing by a square wider
than they are fills them in; what it adds, the black top-hat, is what coronary trees are found by in
Eiho and Qian, "Detection of coronary artery tree using morphological operator", Computers in
Cardiology 1997. The statistic of a frame is the mean of its top-hat; ribs, spine and catheter add
about the same to every frame. The first of equal frames is taken.

Shape legend: H height, W width, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError

SIDE_PX = 256
"""Frames are first averaged over whole blocks of pixels, to at most twice this, against noise."""

SQUARE_PX = 9
"""Side of the square: 5 mm, as wide as a coronary artery, is 6 of 256 pixels that show 20 cm."""


def top_hat_mean(frame_HWC: NDArray[Any]) -> float:
    """Return the statistic of one frame, in the unit of its pixels."""
    from scipy.ndimage import grey_closing

    grey_HW = frame_HWC.astype(np.float32).mean(axis=-1)
    step = max(1, min(grey_HW.shape) // SIDE_PX)
    height, width = (side // step for side in grey_HW.shape)
    blocks = grey_HW[: height * step, : width * step].reshape(height, step, width, step)
    small_HW = blocks.mean(axis=(1, 3))
    closed_HW = grey_closing(small_HW, size=(SQUARE_PX, SQUARE_PX))
    return float((closed_HW - small_HW).mean(dtype=np.float64))


def contrast_frame(frames: Iterable[NDArray[Any]]) -> int:
    """Return the index of the frame with the most contrast agent.

    Args:
        frames: (H, W, C) each, bright where little was absorbed.

    Raises:
        ImageError: when a frame has values that are not finite.
    """
    best, most = 0, -1.0
    for index, frame in enumerate(frames):
        statistic = top_hat_mean(frame)
        if not np.isfinite(statistic):
            raise ImageError(f"frame {index} holds values that are not finite; export it again")
        if statistic > most:
            best, most = index, statistic
    return best
