"""The images that stand for a split on the page: the best, the median and the worst by Dice.

Shape legend: C classes or channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.scores import ImageScore, class_mean
from sam3cache.features import FeatureStore, StoredSample
from sam3cache.geometry import INPUT_SIZE_PX, Letterbox

IMAGE_LEVEL = "image_1008"


@dataclass(frozen=True, slots=True)
class Case:
    """One image with what a head made of it.

    Attributes:
        title: "Best", "Median" or "Worst"; "Only image" where no other has a Dice.
        sample: the image.
        letterbox: how it lies on the padded square.
        scores: by class.
        mask_CHW: uint8, on the mask's own grid; 255 does not count.
        predicted_CHW: bool, on the same grid.
    """

    title: str
    sample: StoredSample
    letterbox: Letterbox
    scores: tuple[ImageScore, ...]
    mask_CHW: NDArray[np.uint8]
    predicted_CHW: NDArray[np.bool_]

    @property
    def dice(self) -> float:
        """Mean over the classes that have one."""
        mean = class_mean(self.scores)
        assert mean is not None
        return mean


def choose_cases(dice: Sequence[float | None]) -> list[tuple[str, int]]:
    """Choose the images to show, none of them twice.

    Args:
        dice: by image.

    Returns:
        Titles and indices, from the best to the worst: three, or as many as have a Dice. Of an
        even number the median is the worse of the middle two; of equals the first is the better.
    """
    known = [(value, index) for index, value in enumerate(dice) if value is not None]
    order = [index for _, index in sorted(known, key=lambda pair: (-pair[0], pair[1]))]
    if not order:
        return []
    if len(order) == 1:
        return [("Only image", order[0])]
    median = [("Median", order[len(order) // 2])] if len(order) > 2 else []
    return [("Best", order[0]), *median, ("Worst", order[-1])]


def shown_size_px(letterbox: Letterbox, size_px: int = INPUT_SIZE_PX) -> tuple[int, int]:
    """Return the height and width to show a picture in, in its own aspect ratio.

    Args:
        letterbox: how it lies on the square, which may have squashed it.
        size_px: of its longest side.
    """
    box = Letterbox.fit(
        letterbox.source_height_px, letterbox.source_width_px, "letterbox", size_px=size_px
    )
    return box.content_height_px, box.content_width_px


def stored_picture(store: FeatureStore, row: int, letterbox: Letterbox) -> NDArray[np.uint8] | None:
    """Return a picture as the store has it, without its padding; None where it keeps none.

    Returns:
        uint8 (H, W, 1 or 3), still squashed if the letterbox says so.
    """
    if IMAGE_LEVEL not in store.levels:
        return None
    square_CSS: NDArray[np.uint8] = store.read(IMAGE_LEVEL, row)
    side_px = square_CSS.shape[-1]
    box = Letterbox.fit(
        letterbox.source_height_px, letterbox.source_width_px, letterbox.mode, size_px=side_px
    )
    content_CHW = square_CSS[:, : box.content_height_px, : box.content_width_px]
    return np.ascontiguousarray(content_CHW.transpose(1, 2, 0))
