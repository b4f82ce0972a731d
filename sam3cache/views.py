"""View angles as cardiologists speak of them."""

from __future__ import annotations

import math


def format_view(primary_angle_deg: float, secondary_angle_deg: float) -> str:
    """Write a view as cardiologists do: "LAO 30.0 CAU 25.0"."""
    primary = f"{'LAO' if primary_angle_deg >= 0 else 'RAO'} {abs(primary_angle_deg):.1f}"
    secondary = f"{'CRA' if secondary_angle_deg >= 0 else 'CAU'} {abs(secondary_angle_deg):.1f}"
    return f"{primary} {secondary}"


def view_region(primary_angle_deg: float | None, secondary_angle_deg: float | None) -> str:
    """Return the quarter that a view is of, "LAO cranial" or the like; "" where it is unknown.

    An angle of 0 counts as LAO and as cranial; None and NaN are unknown.
    """
    if primary_angle_deg is None or secondary_angle_deg is None:
        return ""
    if math.isnan(primary_angle_deg) or math.isnan(secondary_angle_deg):
        return ""
    side = "LAO" if primary_angle_deg >= 0 else "RAO"
    return f"{side} {'cranial' if secondary_angle_deg >= 0 else 'caudal'}"
