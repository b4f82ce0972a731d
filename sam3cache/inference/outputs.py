"""What is written of a prediction: masks, contours on the picture, probabilities.

Shape legend: C classes, H height, W width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from sam3cache.images.writing import png_bytes
from sam3cache.inference.names import folder_names
from sam3cache.runtime import write_atomic
from sam3cache.tasks import Task

ProbabilityFormat = Literal["npy", "png"]

MASKS, OVERLAYS, PROBABILITIES = "masks", "overlays", "probabilities"
LEGEND_FILE = "legend.svg"

COLOURS = (
    (255, 109, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
    (213, 94, 0),
)
"""Of contours, by class; they differ for every kind of colour vision (Okabe and Ito)."""

_PIXELS_A_LINE = 700
"""Longest side of a picture for each pixel that its contours are wide."""


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Where the prediction of one image goes.

    Attributes:
        masks: one file, or of several labels one a class.
        overlay: None where none is wanted.
        probabilities: none, one .npy, or a PNG a class.
    """

    masks: tuple[Path, ...]
    overlay: Path | None
    probabilities: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file."""
        overlay = () if self.overlay is None else (self.overlay,)
        return (*self.masks, *overlay, *self.probabilities)


@dataclass(frozen=True)
class OutputLayout:
    """Where predictions go, and in which form.

    Attributes:
        folder: that holds all of them.
        task: what the head was asked.
        classes: names of what is predicted, in order.
        overlay: whether contours on the picture are wanted.
        probabilities: their format, or None for none.
    """

    folder: Path
    task: Task
    classes: tuple[str, ...]
    overlay: bool = False
    probabilities: ProbabilityFormat | None = None

    @property
    def legend(self) -> Path | None:
        """Where the legend of the overlays goes; None where there is nothing to tell apart."""
        is_needed = self.overlay and len(self.classes) > 1
        return self.folder / LEGEND_FILE if is_needed else None

    def files(self, name: str) -> OutputFiles:
        """Return the files of an image, by its name from ``names.output_names``."""
        one_mask = self.task == "multiclass" or len(self.classes) == 1
        probabilities: tuple[Path, ...] = ()
        if self.probabilities == "npy":
            probabilities = (self.folder / PROBABILITIES / f"{name}.npy",)
        elif self.probabilities == "png":
            probabilities = self._by_class(PROBABILITIES, name, len(self.classes) == 1)
        return OutputFiles(
            self._by_class(MASKS, name, one_mask),
            self.folder / OVERLAYS / f"{name}.png" if self.overlay else None,
            probabilities,
        )

    def _by_class(self, kind: str, name: str, in_one: bool) -> tuple[Path, ...]:
        folder = self.folder / kind
        if in_one:
            return (folder / f"{name}.png",)
        return tuple(folder / part / f"{name}.png" for part in folder_names(self.classes))

    def write(
        self,
        files: OutputFiles,
        mask_CHW: NDArray[np.bool_],
        probability_CHW: NDArray[np.float32],
        pixels_HWC: NDArray[np.uint8],
    ) -> None:
        """Write the prediction of one image, each file whole or not at all.

        Args:
            files: from :meth:`files`.
            mask_CHW: which pixels are of each class.
            probability_CHW: of each class, in [0, 1].
            pixels_HWC: uint8 (H, W, 1 or 3), the image.
        """
        if self.task == "multiclass":
            planes = [class_numbers(mask_CHW)]
        else:
            planes = [mask_HW.astype(np.uint8) * 255 for mask_HW in mask_CHW]
        for path, plane_HW in zip(files.masks, planes, strict=True):
            write_atomic(path, png_bytes(plane_HW))
        if files.overlay is not None:
            write_atomic(files.overlay, png_bytes(draw_outlines(pixels_HWC, mask_CHW)))
        if self.probabilities == "npy":
            file = io.BytesIO()
            np.save(file, probability_CHW)
            write_atomic(files.probabilities[0], file.getbuffer())
        elif self.probabilities == "png":
            for path, probability_HW in zip(files.probabilities, probability_CHW, strict=True):
                values_HW = np.rint(probability_HW * np.float32(65535)).astype(np.uint16)
                write_atomic(path, png_bytes(values_HW))


def class_numbers(mask_CHW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return class numbers, uint8 (H, W): 0 for none, 1 to C; a pixel is of one class at most."""
    numbers_HW = np.zeros(mask_CHW.shape[1:], np.uint8)
    for number, mask_HW in enumerate(mask_CHW, start=1):
        numbers_HW[mask_HW] = number
    return numbers_HW


def class_colours(num_classes: int) -> list[tuple[int, int, int]]:
    """Return a colour for each class: those of ``COLOURS``, then paler and paler ones."""
    num_turns = math.ceil(num_classes / len(COLOURS))
    colours = []
    for number in range(num_classes):
        turn, place = divmod(number, len(COLOURS))
        whiteness = 0.75 * turn / num_turns
        red, green, blue = (round(v + (255 - v) * whiteness) for v in COLOURS[place])
        colours.append((red, green, blue))
    return colours


def legend_svg(classes: Sequence[str]) -> str:
    """Return a picture of which colour is which class; SVG, as it has letters of any script."""
    line_px, font_px = 24, 14
    width_px = 2 * line_px + font_px * max(map(len, classes))
    height_px = line_px * len(classes)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="{height_px}" '
        f'font-family="sans-serif" font-size="{font_px}">',
        f'<rect width="{width_px}" height="{height_px}" fill="#ffffff"/>',
    ]
    for number, (name, colour) in enumerate(zip(classes, class_colours(len(classes)), strict=True)):
        top_px = number * line_px
        lines += [
            f'<rect x="4" y="{top_px + 4}" width="16" height="16" fill="#{bytes(colour).hex()}"/>',
            f'<text x="{line_px + 4}" y="{top_px + 17}">{escape(name)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def draw_outlines(pixels_HWC: NDArray[np.uint8], mask_CHW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Draw the borders of masks on their picture: just outside, so that thin vessels stay to see.

    Args:
        pixels_HWC: uint8 (H, W, 1 or 3).
        mask_CHW: a plane a class.

    Returns:
        uint8 (H, W, 3).
    """
    height_px, width_px = pixels_HWC.shape[:2]
    drawn_HW3 = np.broadcast_to(pixels_HWC, (height_px, width_px, 3)).copy()
    line_px = max(1, round(max(height_px, width_px) / _PIXELS_A_LINE))
    for mask_HW, colour in zip(mask_CHW, class_colours(len(mask_CHW)), strict=True):
        drawn_HW3[_grown(mask_HW, line_px) & ~mask_HW] = colour
    return drawn_HW3


def _grown(mask_HW: NDArray[np.bool_], num_pixels: int) -> NDArray[np.bool_]:
    """Return a mask and all that is within so many pixels of it, along rows and columns."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (num_pixels, num_pixels)
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(mask_HW, padding), 2 * num_pixels + 1, axis=axis
        )
        mask_HW = np.asarray(windows.any(axis=-1))
    return mask_HW
