import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from sam3cache import pages
from sam3cache.evaluation import figures
from sam3cache.evaluation.cases import choose_cases
from sam3cache.evaluation.statistics import summarise
from sam3cache.geometry import Letterbox
from sam3cache.pages import PREDICTED_COLOUR, TRUE_COLOUR


def rgb(hexadecimal: str) -> list[int]:
    return [int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5)]


def test_lines_have_their_full_colour_on_the_border_and_leave_the_rest_alone() -> None:
    rng = np.random.default_rng(0)
    picture_HW1 = rng.integers(0, 256, (1008, 504, 1), dtype=np.uint8)
    mask_1HW = np.zeros((1, 252, 126), dtype=np.uint8)
    mask_1HW[0, 50:100, 20:60] = 1
    predicted_1HW = np.roll(mask_1HW, 100, axis=1) == 1
    drawn_HW3 = pages.draw_contours(picture_HW1, (1008, 504), mask_1HW, predicted_1HW)
    # Four pixels of the picture a pixel of the mask.
    assert drawn_HW3[4 * 75, 4 * 20].tolist() == rgb(TRUE_COLOUR)
    assert drawn_HW3[4 * 100, 4 * 40].tolist() == rgb(TRUE_COLOUR)
    assert drawn_HW3[4 * 175, 4 * 60].tolist() == rgb(PREDICTED_COLOUR)
    assert drawn_HW3[4 * 150, 4 * 40].tolist() == rgb(PREDICTED_COLOUR)
    changed_HW = (drawn_HW3 != picture_HW1).any(axis=-1)
    assert not changed_HW[4 * 51 : 4 * 99, 4 * 22 : 4 * 58].any()
    assert not changed_HW[: 4 * 48].any()
    assert not changed_HW[:, 4 * 63 :].any()


def test_a_mask_up_to_the_edge_is_closed_along_it_and_an_empty_one_draws_nothing() -> None:
    full_1HW, empty_1HW = np.ones((1, 9, 9), np.uint8), np.zeros((1, 9, 9), np.uint8)
    drawn_HW3 = pages.draw_contours(None, (90, 90), full_1HW, empty_1HW == 1)
    assert drawn_HW3[0, 45].tolist() == drawn_HW3[45, 89].tolist() == rgb(TRUE_COLOUR)
    assert len(np.unique(drawn_HW3[5:85, 5:85])) == 1
    drawn_HW3 = pages.draw_contours(None, (90, 90), empty_1HW, empty_1HW == 1)
    assert len(np.unique(drawn_HW3)) == 1


def test_what_does_not_count_is_greyed_and_has_no_border() -> None:
    mask_1HW = np.zeros((1, 10, 10), np.uint8)
    mask_1HW[0, :, 5:] = 255
    drawn_HW3 = pages.draw_contours(None, (100, 100), mask_1HW, mask_1HW == 255)
    assert np.unique(drawn_HW3[:, :50]).tolist() == [pages._GROUND]
    (grey,) = np.unique(drawn_HW3[:, 50:])
    assert grey < pages._GROUND - 20


def test_colours_of_features_separate_two_regions_and_padding_has_no_part() -> None:
    rng = np.random.default_rng(0)
    letterbox = Letterbox.fit(60, 100)
    feature_CSS = rng.standard_normal((8, 20, 20)) * 0.01
    feature_CSS[:, :, 10:] += np.arange(8)[:, None, None]
    feature_CSS[:, 12:] = 1000 * rng.standard_normal((8, 8, 20))
    colours_HW3, shares = figures.feature_colours(
        feature_CSS.astype(np.float16), letterbox, (60, 100)
    )
    assert colours_HW3.shape == (60, 100, 3)
    left, right = (part.reshape(-1, 3) for part in (colours_HW3[:, :50], colours_HW3[:, 50:]))
    assert left[:, 0].max() < 10
    assert right[:, 0].min() > 245
    assert shares[0] > 0.99
    assert len(shares) == 3
    # Each token is a block of its own, here of 5 x 5 pixels.
    blocks = colours_HW3.reshape(12, 5, 20, 5, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_features_of_few_channels_or_without_variance_have_colours(num_channels: int) -> None:
    letterbox = Letterbox.fit(100, 100)
    even_CSS = np.ones((num_channels, 4, 4), np.float16)
    colours_HW3, shares = figures.feature_colours(even_CSS, letterbox, (8, 8))
    assert np.unique(colours_HW3).tolist() == [128]
    assert shares == (0.0,) * num_channels


def test_a_cut_token_is_shown_cut() -> None:
    # 55 of 100 px are 5.5 of 10 tokens: the sixth's centre lies on the border, and it is left out.
    letterbox = Letterbox.fit(550, 1000, size_px=1000)
    feature_CSS = np.zeros((3, 10, 10), np.float16)
    feature_CSS[0, :3] = 1
    colours_HW3, _ = figures.feature_colours(feature_CSS, letterbox, (55, 100))
    assert np.abs(np.diff(colours_HW3[:, 50, 0].astype(int))).nonzero()[0].tolist() == [29]


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_picture_of_noise_is_encoded_small_enough(num_channels: int) -> None:
    rng = np.random.default_rng(0)
    noise_HWC = rng.integers(0, 256, (1008, 1008, num_channels), dtype=np.uint8)
    data = base64.b64decode(pages.jpeg_uri(noise_HWC).partition(",")[2])
    assert len(data) < 1.1 * pages.PICTURE_BYTES
    assert Image.open(io.BytesIO(data)).size == (1008, 1008)


def test_png_keeps_every_pixel() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = base64.b64decode(pages.png_uri(pixels_HW3).partition(",")[2])
    assert (np.asarray(Image.open(io.BytesIO(data))) == pixels_HW3).all()


def test_the_strip_has_a_dot_an_image_and_names_the_mean() -> None:
    dice = [0.2, 0.4, 0.4, 0.4, 0.9]
    summary = summarise(dice, list("abcde"), 0)
    for width_px in (pages.WIDE_PX, pages.NARROW_PX):
        svg = figures.strip_svg("dice", dice, summary, width_px)
        assert "mean 0.460" in svg
        (collection,) = re.findall(r'<g id="dice-PathCollection_1">(.*?)\n   </g>', svg, re.DOTALL)
        places = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', collection)
        assert len(places) == len(set(places)) == 5
        # Dots of one Dice lie side by side, not upon each other.
        assert len({x for x, _ in places}) == 3


def test_thousands_of_images_make_no_heavier_a_strip() -> None:
    dice = np.random.default_rng(0).random(20_000).tolist()
    svg = figures.strip_svg("dice", dice, summarise(dice, ["a"] * 20_000, 0), pages.WIDE_PX)
    assert len(svg) < 200_000
    assert 'href="data:image/png;base64,' in svg


def test_plots_are_the_same_bytes_each_time_and_know_of_no_other_place() -> None:
    def plot() -> str:
        return figures.curves_svg("c", [1, 2], [0.5, None], [0.1, 0.2], 2, pages.WIDE_PX)

    svg = plot()
    assert svg == plot()
    assert svg.startswith("<svg ")
    assert set(re.findall(r'\bid="(.)-', svg)) <= {"c"}
    assert "date" not in svg.lower()
    assert set(re.findall(r"https?://[^\"' ]+", svg)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


@pytest.mark.parametrize(
    ("dice", "cases"),
    [
        ([], []),
        ([None, None], []),
        ([None, 0.3], [("Only image", 1)]),
        ([0.3, 0.5], [("Best", 1), ("Worst", 0)]),
        ([0.3, None, 0.5, 0.4], [("Best", 2), ("Median", 3), ("Worst", 0)]),
        ([0.1, 0.2, 0.3, 0.4], [("Best", 3), ("Median", 1), ("Worst", 0)]),
        ([1.0, 1.0, 1.0], [("Best", 0), ("Median", 1), ("Worst", 2)]),
    ],
)
def test_the_best_the_median_and_the_worst_are_chosen(
    dice: list[float | None], cases: list[tuple[str, int]]
) -> None:
    assert choose_cases(dice) == cases
