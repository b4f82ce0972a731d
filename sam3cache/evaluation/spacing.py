"""How large a pixel is, from an annotation: then distances are told in millimetres, too."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sam3cache.features import StoredSample

SPACING_COLUMNS = ("spacing_mm", "pixel_spacing_mm", "pixel_spacing")
"""Annotations that are taken for the spacing of the picture's pixels, the first that is there."""


def spacing_of(sample: StoredSample) -> tuple[float, float] | None:
    r"""Return the height and width of a picture's pixel in millimetres.

    One number, or two as DICOM has them, the rows' first: "0.3", "0.3\0.3", "0.3, 0.3".

    Returns:
        None where no column has one, or what it has is not one or two positive numbers.
    """
    text = spacing_text(sample)
    parts = [part for part in re.split(r"[\s,;x×\\/\[\]()]+", text) if part]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        return None
    if not 1 <= len(numbers) <= 2 or not all(n > 0 and math.isfinite(n) for n in numbers):
        return None
    return numbers[0], numbers[-1]


def spacing_text(sample: StoredSample) -> str:
    """Return what an annotation says of the spacing, "" where there is none."""
    return next((t for name in SPACING_COLUMNS if (t := sample.extra.get(name, "").strip())), "")


def spacing_of_mask(
    sample: StoredSample, mask_size_px: tuple[int, int]
) -> tuple[float, float] | None:
    """Return the height and width of a pixel of a mask's own grid, which covers the picture."""
    spacing = spacing_of(sample)
    if spacing is None:
        return None
    return (
        spacing[0] * sample.height_px / mask_size_px[0],
        spacing[1] * sample.width_px / mask_size_px[1],
    )


def num_unreadable(samples: Sequence[StoredSample]) -> int:
    """Count the samples whose spacing is given, but is none."""
    return sum(bool(spacing_text(s)) and spacing_of(s) is None for s in samples)
