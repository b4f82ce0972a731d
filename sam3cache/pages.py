"""What pages to look at are made of: a template, plots, pictures with contours.

Such a page is one file that needs no other and no network. Everything that names something of the
user's goes through its template, which escapes it.

Shape legend: C channels, H height, W width, K mask planes.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.geometry import INPUT_SIZE_PX
from sam3cache.records import IGNORE_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOUR = "#4cc3ff"
PREDICTED_COLOUR = "#ff6d00"
"""Blue and orange differ for every kind of colour vision, and these two in brightness as well."""

PICTURE_BYTES = 240_000
"""Most bytes of one picture, so that a page of seven stays below 3 MB in base64."""

WIDE_PX, NARROW_PX = 1000, 400
"""Widths that plots are drawn for: a screen's and a phone's, since scaling makes text too small."""

INK, MUTED, ACCENT = "#1b2530", "#5c6875", "#0b6aa8"
MANY_DOTS = 1000
"""From here on dots are one picture within a plot, as each would take a line of text."""

_LINE = "#d5dbe1"
_JPEG_QUALITIES = (88, 80, 70, 60, 45, 30, 15)
_HALO_COLOUR = "#10161d"
_GROUND = 236
_IGNORED_GREY = 150
_DPI = 64  # A power of two: a figure of n / 64 inches has n pixels, without rounding.

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # Text stays text: it takes the page's font, and can be searched.
    "font.family": ["DejaVu Sans"],  # Comes with matplotlib: no search through the system's fonts.
    "font.size": 12.5,
    "text.color": INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf0",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def fill_in(package: str, template: str, **values: Any) -> str:
    """Return a page: the template of that name in a package, with its values escaped."""
    from jinja2 import Environment, StrictUndefined

    text = text_of(package, template)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(values)


def text_of(package: str, name: str) -> str:
    """Return a text file that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def draw_contours(
    picture_HWC: NDArray[np.uint8] | None,
    size_px: tuple[int, int],
    mask_KHW: NDArray[np.uint8],
    predicted_KHW: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Draw the borders of masks: of the true one wide, of the predicted one thin and above it.

    A border runs between the pixels of the mask's own grid, so that nothing is smoothed.

    Args:
        picture_HWC: (H, W, 1 or 3) to draw on; None for a plain ground.
        size_px: height and width of the result; those of the picture if there is one.
        mask_KHW: on any grid that covers the picture; what does not count (255) becomes grey.
        predicted_KHW: on the same grid.

    Returns:
        uint8 (H, W, 3).
    """
    height_px, width_px = size_px
    if picture_HWC is None:
        picture_HWC = np.full((height_px, width_px, 1), _GROUND, dtype=np.uint8)
    assert picture_HWC.shape[:2] == size_px
    base_HW3 = np.broadcast_to(picture_HWC, (height_px, width_px, 3)).astype(np.float32)
    ignored_HW = (mask_KHW == IGNORE_LABEL).all(axis=0)
    if ignored_HW.any():
        row_H = _nearest(height_px, ignored_HW.shape[0])
        column_W = _nearest(width_px, ignored_HW.shape[1])
        base_HW3[ignored_HW[row_H][:, column_W]] *= 0.4
        base_HW3[ignored_HW[row_H][:, column_W]] += 0.6 * _IGNORED_GREY
    lines_HW4 = _lines(size_px, mask_KHW == 1, predicted_KHW & (mask_KHW != IGNORE_LABEL))
    opacity_HW1 = lines_HW4[..., 3:].astype(np.float32) / 255
    drawn_HW3 = base_HW3 + opacity_HW1 * (lines_HW4[..., :3] - base_HW3)
    return np.rint(drawn_HW3).astype(np.uint8)


def _nearest(num_pixels: int, num_cells: int) -> NDArray[np.intp]:
    """Return the cell in which the centre of each pixel lies."""
    return np.asarray((np.arange(num_pixels) + 0.5) * num_cells / num_pixels).astype(np.intp)


def _lines(
    size_px: tuple[int, int], true_KHW: NDArray[np.bool_], predicted_KHW: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return the contours alone, RGBA (H, W, 4) on nothing."""
    with _matplotlib():
        from matplotlib.figure import Figure

        height_px, width_px = size_px
        figure = Figure(figsize=(width_px / _DPI, height_px / _DPI), dpi=_DPI, frameon=False)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        # Beside the layers below: a limit that follows the data would move the picture.
        axes.autoscale(False)
        axes.set_xlim(0, width_px)
        axes.set_ylim(height_px, 0)
        # Wide enough to be seen where a phone shows the picture at a third of its size.
        unit_px = max(0.75, max(size_px) / INPUT_SIZE_PX)
        true_px, predicted_px, halo_px = 5.0 * unit_px, 2.4 * unit_px, 1.0 * unit_px
        # Halos first: that of a prediction shall not darken the true mask's line beneath it.
        for planes_KHW, colour, line_px, opacity in (
            (true_KHW, _HALO_COLOUR, true_px + halo_px, 0.4),
            (predicted_KHW, _HALO_COLOUR, predicted_px + halo_px, 0.4),
            (true_KHW, TRUE_COLOUR, true_px, 1.0),
            (predicted_KHW, PREDICTED_COLOUR, predicted_px, 1.0),
        ):
            for plane_HW in planes_KHW:
                if plane_HW.any():
                    _contour(axes, size_px, plane_HW, colour, line_px, opacity)
        file = io.BytesIO()
        figure.savefig(file, format="rgba", dpi=_DPI, transparent=True)
    return np.frombuffer(file.getvalue(), dtype=np.uint8).reshape(height_px, width_px, 4)


def _contour(
    axes: Axes,
    size_px: tuple[int, int],
    plane_HW: NDArray[np.bool_],
    colour: str,
    line_px: float,
    opacity: float,
) -> None:
    """Draw the border of one plane; at the picture's edge it is closed along the edge."""
    height_px, width_px = size_px
    padded_HW = np.pad(plane_HW, 1).astype(np.float32)
    y_H, x_W = (
        (np.arange(-1, num_cells + 1) + 0.5) * side_px / num_cells
        for num_cells, side_px in zip(plane_HW.shape, (height_px, width_px), strict=True)
    )
    axes.contour(
        x_W, y_H, padded_HW, [0.5], colors=[colour], linewidths=[line_px * 72 / _DPI], alpha=opacity
    )


def resized(picture_HWC: NDArray[np.uint8], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a picture (H, W, C) in another size; the same where it has that size."""
    if picture_HWC.shape[:2] == size_px:
        return picture_HWC
    from PIL import Image

    image = Image.fromarray(_channels_as_pillow_has_them(picture_HWC))
    image = image.resize((size_px[1], size_px[0]), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*size_px, -1)


def jpeg_uri(picture_HWC: NDArray[np.uint8]) -> str:
    """Encode a picture (H, W, 1 or 3) as a data: URI of at most ``PICTURE_BYTES``, or nearly."""
    from PIL import Image

    image = Image.fromarray(_channels_as_pillow_has_them(picture_HWC))
    data = b""
    for quality in _JPEG_QUALITIES:
        file = io.BytesIO()
        # Colours at full resolution: at half of it the contours would blur.
        image.save(file, "JPEG", quality=quality, subsampling=0)
        data = file.getvalue()
        if len(data) <= PICTURE_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def png_uri(picture_HWC: NDArray[np.uint8]) -> str:
    """Encode a picture (H, W, 1 or 3) of few colours or even areas, exactly, as a data: URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_channels_as_pillow_has_them(picture_HWC)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _channels_as_pillow_has_them(picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return picture_HWC[..., 0] if picture_HWC.shape[-1] == 1 else picture_HWC


def frame(
    width_px: float, height_px: float, *, left: int, right: int, bottom: int, top: int
) -> tuple[float, float, float, float]:
    """Return the axes' place in a figure, from margins in pixels."""
    return (
        left / width_px,
        bottom / height_px,
        1 - (left + right) / width_px,
        1 - (bottom + top) / height_px,
    )


def lay_out_views(axes: Axes, angles_N2: NDArray[np.float64], margin: float) -> None:
    """Prepare axes for view angles: LAO at the right, cranial at the top, zero in the middle.

    Args:
        axes: empty.
        angles_N2: degrees, primary and secondary, of all views that will be drawn.
        margin: how much further the axes reach than the largest angle, as a factor.
    """
    x_limit, y_limit = (
        max(least, float(np.abs(column_N).max()) * margin)
        for least, column_N in zip((60.0, 45.0), angles_N2.T, strict=True)
    )
    axes.set_xlim(-x_limit, x_limit)
    axes.set_ylim(-y_limit, y_limit)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_xlabel("RAO  ←  primary angle, degrees  →  LAO")
    axes.set_ylabel("caudal  ←  secondary  →  cranial")


def svg(name: str, size_px: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Return a plot as an <svg> element, the same bytes for the same plot.

    A point of the figure is a pixel of the page, at the width that it is drawn for.

    Args:
        name: begins the ids in the SVG, so that those of several do not meet on one page.
        size_px: width and height.
        draw: given the empty figure, in the pages' style.
    """
    with _matplotlib():
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure = Figure(figsize=(size_px[0] / 72, size_px[1] / 72))
            draw(figure)
            file = io.StringIO()
            absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=absent)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The page scales it; and several on one page must not share ids.
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Let matplotlib draw in our style, whatever the user's own, and in silence.

    It tells of a font cache that it builds and of a configuration that it cannot write in its
    log, which lands on the terminal of whoever has set up none.
    """
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from matplotlib import style

        with style.context(["default", _STYLE]):
            yield
    finally:
        log.setLevel(level)
