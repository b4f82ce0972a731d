"""What an evaluation's page shows beside pictures: plots, and features as colours.

Shape legend: C channels, N tokens, S side of a level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.evaluation.statistics import Summary
from sam3cache.geometry import Letterbox
from sam3cache.pages import ACCENT, INK, MANY_DOTS, MUTED, WIDE_PX, frame, lay_out_views, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sam3cache.evaluation.comparing.statistics import Differences

_ROW_PX = 96


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


def strip_svg(name: str, dice: Sequence[float], summary: Summary, width_px: int) -> str:
    """Plot a dot an image along an axis of Dice, with the mean and its interval.

    Args:
        name: begins the ids in the SVG, so that those of several do not meet on one page.
        dice: by image, those that have one.
        summary: of them.
        width_px: ``WIDE_PX`` or ``NARROW_PX``.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(frame(width_px, 96, left=14, right=14, bottom=26, top=22))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.set_xlim(-0.012, 1.012)
        axes.set_ylim(-1, 1)
        axes.set_xticks(np.linspace(0, 1, 11 if width_px == WIDE_PX else 6))
        if summary.interval is not None:
            axes.axvspan(summary.interval.low, summary.interval.high, color=ACCENT, alpha=0.14)
        values, offsets = _swarm(dice, 9 / width_px)
        axes.scatter(
            values,
            offsets,
            s=46,
            color=INK,
            alpha=0.55,
            linewidths=0,
            clip_on=False,
            rasterized=len(dice) > MANY_DOTS,
        )
        if summary.mean is not None:
            axes.axvline(summary.mean, color=ACCENT, linewidth=2)
            # Inside the plot, also where the mean lies at one of its ends.
            side = "left" if summary.mean < 0.1 else "right" if summary.mean > 0.9 else "center"
            axes.text(
                *(summary.mean, 1.06, f"mean {summary.mean:.3f}"),
                ha=side,
                va="bottom",
                color=ACCENT,
                fontweight="bold",
            )

    return svg(name, (width_px, 96), draw)


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
        axes = figure.add_axes(frame(width_px, height_px, left=52, right=96, bottom=46, top=12))
        angles_N2 = np.asarray(angles_deg, dtype=np.float64)
        primary, secondary = angles_N2.T
        lay_out_views(axes, angles_N2, 1.2)
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
            rasterized=len(dice) > MANY_DOTS,
            zorder=3,  # above what is written of the quarters: no image is hidden
        )
        for region, text in regions.items():
            x = 0.985 if region.startswith("LAO") else 0.015
            y = 0.97 if region.endswith("cranial") else 0.03
            axes.text(
                *(x, y, f"{region}\n{text}"),
                transform=axes.transAxes,
                ha="right" if x > 0.5 else "left",
                va="top" if y > 0.5 else "bottom",
                color=ACCENT,
                fontweight="bold",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
                zorder=2,
            )
        left, bottom, width, height = frame(
            *(width_px, height_px), left=width_px - 80, right=66, bottom=46, top=12
        )
        bar = figure.colorbar(dots, cax=figure.add_axes((left, bottom, width, height)))
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        bar.set_label("Dice", color=MUTED)

    return svg(name, (width_px, height_px), draw)


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
            left, bottom, width, height = frame(*panel_px, left=48, right=16, bottom=44, top=34)
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
                color=INK,
                linewidth=1.8,
                marker="o" if len(known) <= 40 else None,
                markersize=3.5,
            )
            axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=14)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8 if is_wide else 6))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            margin = max(0.5, 0.03 * (epochs[-1] - epochs[0]))
            axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
            marked = dict(known).get(evaluated_epoch)
            if marked is not None:
                axes.axvline(evaluated_epoch, color=ACCENT, linewidth=1.2, dashes=(4, 3))
                axes.plot([evaluated_epoch], [marked], "o", color=ACCENT, markersize=8)
                # Opposite the title, not at the line: in early epochs the two would meet.
                axes.set_title(
                    f"epoch {evaluated_epoch}: {marked:.3f}",
                    loc="right",
                    fontsize=12.5,
                    fontweight="bold",
                    color=ACCENT,
                    pad=14,
                )

    return svg(name, (width_px, panel_px[1] * num_rows), draw)


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
                frame(*(width_px, height_px), left=14, right=14, bottom=below_px, top=above_px)
            )
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-1, 1)
            axes.locator_params(axis="x", nbins=9 if width_px == WIDE_PX else 5)
            axes.axvline(0, color=MUTED, linewidth=1)
            interval, mean = row.summary.interval, row.summary.mean
            if interval is not None:
                axes.axvspan(interval.low, interval.high, color=ACCENT, alpha=0.18)
            dots, offsets = _swarm((values_N / (2 * reach)).tolist(), 9 / width_px)
            axes.scatter(
                dots * 2 * reach,
                offsets,
                s=40,
                color=INK,
                alpha=0.5,
                linewidths=0,
                clip_on=False,
                rasterized=len(dots) > MANY_DOTS,
            )
            if mean is not None:
                axes.axvline(mean, color=ACCENT, linewidth=2)
            told = "nothing to compare" if mean is None else f"mean {mean:+.3f}"
            # The plot's font has no other letters, and no text here is a formula.
            title = row.name.encode("ascii", "replace").decode()
            for text, at, side, colour in (
                (title, 0.0, "left", INK),
                (told, 1.0, "right", ACCENT),
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

    return svg(name, (width_px, height_px), draw)
