"""One sample, looked at: its headers, then its pixels and masks, decoded once.

Shape legend: M planes, H height, W width of a mask; C channels of a picture.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam3cache.checking.shift import Shift, best_shift
from sam3cache.errors import ImageError
from sam3cache.images import (
    ClassTable,
    pixel_hash,
    probe,
    read_image_and_type,
    read_labels,
)
from sam3cache.records import IGNORE_LABEL, Sample

_DIGEST_CHARS = 32  # Half of it: 100,000 pictures have no two alike by chance.


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a sample.

    Attributes:
        height_px: height of the picture.
        width_px: width of the picture.
        num_channels: 1 or 3.
        pixel_type: in which its file stores it, such as "uint8".
        grey_levels: between its darkest and its brightest value, of 255, in the channel of most.
        digest: of the pixels as the tower gets to see them.
        mask_size_px: height and width of its mask's own grid; None without a mask.
        marked_share: share of the mask that is marked, of what counts; None without a mask, and
            where nothing counts.
        orientations: tags by which picture and mask were turned upright, 1 where one was not; None
            without a mask.
        classes: indices of the classes that its mask shows.
        shift: where its mask fits best; None where that cannot be told.
    """

    height_px: int
    width_px: int
    num_channels: int
    pixel_type: str
    grey_levels: int
    digest: str
    mask_size_px: tuple[int, int] | None
    marked_share: float | None
    orientations: tuple[int, int] | None
    classes: tuple[int, ...]
    shift: Shift | None


def look_at(sample: Sample, table: ClassTable) -> Look | str:
    """Look at a sample, and return what is kept of it, or why it cannot be used.

    Args:
        sample: to be read.
        table: what its masks are of.
    """
    try:
        info = probe(sample)
        picture_HWC, pixel_type = read_image_and_type(sample)
        size_px = (info.height_px, info.width_px)
        labels_MHW = read_labels(sample.each_mask(), table, size_px)
    except ImageError as error:
        return str(error)
    marked_share, shift = None, None
    if labels_MHW is not None:
        marked_HW = marked(labels_MHW)
        num_counted = int((labels_MHW != IGNORE_LABEL).any(axis=0).sum())
        marked_share = int(marked_HW.sum()) / num_counted if num_counted else None
        shift = best_shift(picture_HWC, marked_HW)
    return Look(
        info.height_px,
        info.width_px,
        info.num_channels,
        sys.intern(str(pixel_type)),
        int(np.ptp(picture_HWC, axis=(0, 1)).max()),
        pixel_hash(picture_HWC)[:_DIGEST_CHARS],
        None if labels_MHW is None else labels_MHW.shape[1:],
        marked_share,
        None if labels_MHW is None else (info.orientation, info.mask_orientation or 1),
        () if labels_MHW is None else _classes(labels_MHW, table),
        shift,
    )


def marked(labels_MHW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where a mask is of any class, bool (H, W)."""
    of_any_HW: NDArray[np.bool_] = ((labels_MHW > 0) & (labels_MHW != IGNORE_LABEL)).any(axis=0)
    return of_any_HW


def _classes(labels_MHW: NDArray[np.uint8], table: ClassTable) -> tuple[int, ...]:
    if table.task == "multilabel" and len(labels_MHW) == len(table.names):
        return tuple(k for k, plane_HW in enumerate(labels_MHW) if (plane_HW == 1).any())
    there = np.flatnonzero(np.bincount(labels_MHW.ravel(), minlength=256))
    return tuple(int(number) - 1 for number in there if 0 < number < IGNORE_LABEL)
