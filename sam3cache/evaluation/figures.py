"""What an evaluation's page shows: contours, colours of features, plots; and how they are encoded.

Shape legend: C channels, H height, W width, K mask planes, N tokens, S side of a level.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.statistics import Summary
from sam3cache.geometry import INPUT_SIZE_PX, Letterbox
from sam3cache.records import IGNORE_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sam3cache.evaluation.comparing.statistics import Differences

TRUE_COLOUR = "#4cc3ff"
PREDICTED_COLOUR = "#ff6d00"
"""Blue and orange differ for every kind of colour vision, and these two in brightness as well."""

PICTURE_BYTES = 240_000
"""Most bytes of one picture, so that a page of seven stays below 3 MB in base64."""

WIDE_PX, NARROW_PX = 1000, 400
"""Widths that plots are drawn for: a screen's and a phone's, since scaling makes text too small."""

_JPEG_QUALITIES = (88, 80, 70, 60, 45, 30, 15)
_HALO_COLOUR = "#10161d"
_GROUND = 236
_IGNORED_GREY = 150
_ROW_PX = 96
_DPI = 64  # A power of two: a figure of n / 64 inches has n pixels, without rounding.

_INK, _MUTED, _LINE, _ACCENT = "#1b2530", "#5c6875", "#d5dbe1", "#0b6aa8"
_MANY_DOTS = 1000
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # Text stays text: it takes the page's font, and can be searched.
    "font.family": ["DejaVu Sans"],  # Comes with matplotlib: no search through the system's fonts.
    "font.size": 12.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf0",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


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


def feature_colours(
    feature_CSS: NDArray[Any], letterbox: Letterbox, size_px: tuple[int, int]
) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """Show an image's features as colours: the first three principal components of its tokens.

    Tokens of the padding take no part. Each component is scaled by its 1st and 99th percentile to
    0 to 255, of red, green and blue in turn. The sign of a component, which means nothing, is
    that which makes its largest weight positive, so that the same features have the same colours.

    Args:
        feature_CSS: of one image, on the padded square.
        letterbox: how the image lies there.
        size_px: height and width to show it in, a token being a block of one colour.

    Returns:
        uint8 (H, W, 3), and the share of the variance of each component there is, at most three.
    """
    side = feature_CSS.shape[-1]
    extents = [
        content_px * side / letterbox.size_px
        for content_px in (letterbox.content_height_px, letterbox.content_width_px)
    ]
    # Tokens whose centre is picture; the rest of a border token's colour comes from padding.
    num_rows, num_columns = (max(1, math.ceil(extent - 0.5)) for extent in extents)
    tokens_NC = feature_CSS[:, :num_rows, :num_columns].reshape(len(feature_CSS), -1).T
    centred_NC = tokens_NC.astype(np.float64)
    centred_NC -= centred_NC.mean(axis=0)
    variances, axes_CC = np.linalg.eigh(centred_NC.T @ centred_NC)
    total = float(variances.clip(min=0).sum())
    colours_N3 = np.full((len(centred_NC), 3), 128.0)
    shares = []
    for k in range(min(3, len(variances))):
        share = max(0.0, float(variances[-1 - k])) / total if total > 0 else 0.0
        shares.append(share)
        axis_C = axes_CC[:, -1 - k]
        axis_C = axis_C * np.sign(axis_C[np.abs(axis_C).argmax()])
        component_N = centred_NC @ axis_C
        low, high = np.percentile(component_N, (1, 99))
        if share > 1e-9 and high > low:
            colours_N3[:, k] = 255 * np.clip((component_N - low) / (high - low), 0, 1)
    tokens_HW3 = np.rint(colours_N3).astype(np.uint8).reshape(num_rows, num_columns, 3)
    row_H, column_W = (
        # A token that is cut by the picture's edge is shown cut; where the last one's centre is
        # padding, the one before stands for it.
        np.minimum(((np.arange(num_px) + 0.5) * extent / num_px).astype(np.intp), num - 1)
        for num_px, extent, num in zip(size_px, extents, (num_rows, num_columns), strict=True)
    )
    return tokens_HW3[row_H][:, column_W], tuple(shares)


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


def strip_svg(name: str, dice: Sequence[float], summary: Summary, width_px: int) -> str:
    """Plot a dot an image along an axis of Dice, with the mean and its interval.

    Args:
        name: begins the ids in the SVG, so that those of several do not meet on one page.
        dice: by image, those that have one.
        summary: of them.
        width_px: ``WIDE_PX`` or ``NARROW_PX``.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(_frame(width_px, 96, left=14, right=14, bottom=26, top=22))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.set_xlim(-0.012, 1.012)
        axes.set_ylim(-1, 1)
        axes.set_xticks(np.linspace(0, 1, 11 if width_px == WIDE_PX else 6))
        if summary.interval is not None:
            axes.axvspan(summary.interval.low, summary.interval.high, color=_ACCENT, alpha=0.14)
        values, offsets = _swarm(dice, 9 / width_px)
        axes.scatter(
            values,
            offsets,
            s=46,
            color=_INK,
            alpha=0.55,
            linewidths=0,
            clip_on=False,
            rasterized=len(dice) > _MANY_DOTS,
        )
        if summary.mean is not None:
            axes.axvline(summary.mean, color=_ACCENT, linewidth=2)
            # Inside the plot, also where the mean lies at one of its ends.
            side = "left" if summary.mean < 0.1 else "right" if summary.mean > 0.9 else "center"
            axes.text(
                *(summary.mean, 1.06, f"mean {summary.mean:.3f}"),
                ha=side,
                va="bottom",
                color=_ACCENT,
                fontweight="bold",
            )

    return _svg(name, (width_px, 96), draw)


def _swarm(
    values: Sequence[float], bin_width: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Set dots apart that would lie upon each other: by bin, in turn above and below the axis."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    bins = np.floor(ordered / bin_width)
    _, first, counts = np.unique(bins, return_index=True, return_counts=True)
    rank = np.arange(len(ordered)) - np.repeat(first, counts)
    steps = (rank + 1) // 2 * np.where(rank % 2, 1, -1)
    return ordered, steps * min(0.34, 0.86 / max(1, int(np.abs(steps).max(initial=0))))


def view_map_svg(
    name: str,
    angles_deg: Sequence[tuple[float, float]],
    dice: Sequence[float],
    regions: Mapping[str, str],
    width_px: int,
) -> str:
    """Plot a dot an image at its view, coloured by its Dice, in the four view regions.

    Args:
        name: begins the ids in the SVG.
        angles_deg: by image, primary (LAO positive) and secondary angle (cranial positive).
        dice: by image.
        regions: by region that has a mean ("LAO cranial"), what to write of it.
        width_px: ``WIDE_PX`` or ``NARROW_PX``.
    """
    is_wide = width_px == WIDE_PX
    height_px = 420 if is_wide else 380

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(_frame(width_px, height_px, left=52, right=96, bottom=46, top=12))
        primary, secondary = np.asarray(angles_deg, dtype=np.float64).T
        x_limit, y_limit = (
            max(least, float(np.abs(values).max()) * 1.2)
            for least, values in ((60.0, primary), (45.0, secondary))
        )
        axes.set_xlim(-x_limit, x_limit)
        axes.set_ylim(-y_limit, y_limit)
        axes.axhline(0, color=_MUTED, linewidth=1)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set_xlabel("RAO − primary angle, degrees + LAO")
        axes.set_ylabel("caudal − secondary + cranial")
        dots = axes.scatter(
            primary,
            secondary,
            c=np.asarray(dice),
            cmap="viridis",
            vmin=0,
            vmax=1,
            s=64,
            linewidths=0.6,
            edgecolors="white",
            rasterized=len(dice) > _MANY_DOTS,
        )
        for region, text in regions.items():
            x = 0.985 if region.startswith("LAO") else 0.015
            y = 0.97 if region.endswith("cranial") else 0.03
            axes.text(
                *(x, y, f"{region}\n{text}"),
                transform=axes.transAxes,
                ha="right" if x > 0.5 else "left",
                va="top" if y > 0.5 else "bottom",
                color=_ACCENT,
                fontweight="bold",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
            )
        left, bottom, width, height = _frame(
            *(width_px, height_px), left=width_px - 80, right=66, bottom=46, top=12
        )
        bar = figure.colorbar(dots, cax=figure.add_axes((left, bottom, width, height)))
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        bar.set_label("Dice", color=_MUTED)

    return _svg(name, (width_px, height_px), draw)


def curves_svg(
    name: str,
    epochs: Sequence[int],
    loss: Sequence[float | None],
    val_dice: Sequence[float | None],
    evaluated_epoch: int,
    width_px: int,
) -> str:
    """Plot the training loss, and the validation Dice where it is known, epoch by epoch.

    Args:
        name: begins the ids in the SVG.
        epochs: ascending.
        loss: of the training split, by epoch.
        val_dice: of the validation split, by epoch.
        evaluated_epoch: of the checkpoint; marked.
        width_px: ``WIDE_PX`` sets the two side by side, ``NARROW_PX`` one above the other.
    """
    curves = [
        (title, values)
        for title, values in (("Training loss", loss), ("Validation Dice", val_dice))
        if any(value is not None for value in values)
    ]
    is_wide = width_px == WIDE_PX
    panel_px = (width_px / 2 if is_wide and len(curves) > 1 else width_px, 250)
    num_rows = 1 if is_wide else len(curves)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        for k, (title, values) in enumerate(curves):
            row, column = (0, k) if is_wide else (k, 0)
            left, bottom, width, height = _frame(*panel_px, left=48, right=16, bottom=44, top=34)
            axes = figure.add_axes(
                (
                    (column + left) * panel_px[0] / width_px,
                    (num_rows - 1 - row + bottom) / num_rows,
                    width * panel_px[0] / width_px,
                    height / num_rows,
                )
            )
            known = [(e, v) for e, v in zip(epochs, values, strict=True) if v is not None]
            axes.plot(
                *zip(*known, strict=True),
                color=_INK,
                linewidth=1.8,
                marker="o" if len(known) <= 40 else None,
                markersize=3.5,
            )
            axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=14)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if is_wide else 6))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            margin = max(0.5, 0.03 * (epochs[-1] - epochs[0]))
            axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
            marked = dict(known).get(evaluated_epoch)
            if marked is not None:
                axes.axvline(evaluated_epoch, color=_ACCENT, linewidth=1.2, dashes=(4, 3))
                axes.plot([evaluated_epoch], [marked], "o", color=_ACCENT, markersize=8)
                # Opposite the title, not at the line: in early epochs the two would meet.
                axes.set_title(
                    f"epoch {evaluated_epoch}: {marked:.3f}",
                    loc="right",
                    fontsize=12.5,
                    fontweight="bold",
                    color=_ACCENT,
                    pad=14,
                )

    return _svg(name, (width_px, panel_px[1] * num_rows), draw)


def differences_svg(name: str, rows: Sequence[Differences], width_px: int = WIDE_PX) -> str:
    """Plot the differences of each run to the baseline, all on one axis.

    Args:
        name: begins the ids in the SVG, so that those of several do not meet on one page.
        rows: a run each, from above.
        width_px: ``WIDE_PX`` or ``NARROW_PX``.
    """
    known = [row.values_N[np.isfinite(row.values_N)] for row in rows]
    largest = max((float(np.abs(values_N).max(initial=0)) for values_N in known), default=0.0)
    # Zero in the middle, so that gains and losses are seen for what they are.
    reach = 1.04 * largest if largest > 0 else 0.01
    height_px = 8 + len(rows) * _ROW_PX + 48

    def draw(figure: Figure) -> None:
        for k, (row, values_N) in enumerate(zip(rows, known, strict=True)):
            above_px = 34 + k * _ROW_PX
            below_px = 48 + (len(rows) - 1 - k) * _ROW_PX
            axes = figure.add_axes(
                _frame(*(width_px, height_px), left=14, right=14, bottom=below_px, top=above_px)
            )
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-1, 1)
            axes.locator_params(axis="x", nbins=9 if width_px == WIDE_PX else 5)
            axes.axvline(0, color=_MUTED, linewidth=1)
            interval, mean = row.summary.interval, row.summary.mean
            if interval is not None:
                axes.axvspan(interval.low, interval.high, color=_ACCENT, alpha=0.18)
            dots, offsets = _swarm((values_N / (2 * reach)).tolist(), 9 / width_px)
            axes.scatter(
                dots * 2 * reach,
                offsets,
                s=40,
                color=_INK,
                alpha=0.5,
                linewidths=0,
                clip_on=False,
                rasterized=len(dots) > _MANY_DOTS,
            )
            if mean is not None:
                axes.axvline(mean, color=_ACCENT, linewidth=2)
            told = "nothing to compare" if mean is None else f"mean {mean:+.3f}"
            # The plot's font has no other letters, and no text here is a formula.
            title = row.name.encode("ascii", "replace").decode()
            for text, at, side, colour in (
                (title, 0.0, "left", _INK),
                (told, 1.0, "right", _ACCENT),
            ):
                axes.text(
                    *(at, 1.04, text),
                    transform=axes.transAxes,
                    ha=side,
                    va="bottom",
                    color=colour,
                    fontweight="bold",
                    parse_math=False,
                )
            if k < len(rows) - 1:
                axes.tick_params(labelbottom=False)
            else:
                axes.set_xlabel("difference of Dice to the baseline, better to the right")

    return _svg(name, (width_px, height_px), draw)


def _frame(
    width_px: float, height_px: float, *, left: int, right: int, bottom: int, top: int
) -> tuple[float, float, float, float]:
    """Return the axes' place in a figure, from margins in pixels."""
    return (
        left / width_px,
        bottom / height_px,
        1 - (left + right) / width_px,
        1 - (bottom + top) / height_px,
    )


def _svg(name: str, size_px: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Return a plot as an <svg> element, the same bytes for the same plot.

    A point of the figure is a pixel of the page, at the width that it is drawn for.
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
