"""How views are written, and which quarter they are of."""

import pytest

from sam3cache.views import format_view, view_region


@pytest.mark.parametrize(
    ("primary", "secondary", "text"),
    [
        (30.0, 25.0, "LAO 30.0 CRA 25.0"),
        (-30.0, -25.04, "RAO 30.0 CAU 25.0"),
        (0.0, 0.0, "LAO 0.0 CRA 0.0"),
    ],
)
def test_a_view_is_written_as_cardiologists_do(primary: float, secondary: float, text: str) -> None:
    assert format_view(primary, secondary) == text


@pytest.mark.parametrize(
    ("primary", "secondary", "region"),
    [
        (30.0, 25.0, "LAO cranial"),
        (30.0, -25.0, "LAO caudal"),
        (-30.0, 25.0, "RAO cranial"),
        (-30.0, -0.1, "RAO caudal"),
        (0.0, 0.0, "LAO cranial"),
        (None, 25.0, ""),
        (30.0, None, ""),
        (float("nan"), 25.0, ""),
    ],
)
def test_a_view_is_of_one_of_four_regions(
    primary: float | None, secondary: float | None, region: str
) -> None:
    assert view_region(primary, secondary) == region
