import itertools
import math
from collections import Counter
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from sam3cache.errors import ConfigError, InputSizeError
from sam3cache.geometry import INPUT_SIZE_PX, PATCH_PX, Letterbox
from sam3cache.records import IGNORE_LABEL

MODES = ("letterbox", "squash")
SIZES = [
    (800, 600),
    (512, 768),
    (1024, 1024),
    (640, 480),
    (1, 1),
    (1, 3000),
    (1008, 1008),
    (1016, 1016),
]


def ramp(letterbox, side, slope_y=0.75, slope_x=-0.5):
    """A (1, side, side) plane that is linear in the position on the input, in input pixels."""
    stride_px = letterbox.size_px / side
    position_px = (torch.arange(side, dtype=torch.float64) + 0.5) * stride_px
    return (slope_y * position_px[:, None] + slope_x * position_px[None, :])[None]


def test_the_token_grid_fits_the_input():
    assert INPUT_SIZE_PX % PATCH_PX == 0
    assert INPUT_SIZE_PX // PATCH_PX == 72


@pytest.mark.parametrize(
    ("size", "content"),
    [
        ((800, 600), (1008, 756)),
        ((512, 768), (672, 1008)),
        ((640, 480), (1008, 756)),
        ((1, 1), (1008, 1008)),
        ((1, 3000), (1, 1008)),
        ((1008, 1008), (1008, 1008)),
        ((1016, 1016), (1008, 1008)),
        ((1000, 333), (1008, 336)),
    ],
)
def test_the_longest_side_fills_the_square(size, content):
    letterbox = Letterbox.fit(*size)
    assert (letterbox.content_height_px, letterbox.content_width_px) == content


@pytest.mark.parametrize("size", SIZES)
def test_squash_fills_the_square(size):
    letterbox = Letterbox.fit(*size, "squash")
    assert (letterbox.content_height_px, letterbox.content_width_px) == (1008, 1008)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_known_points_survive_the_way_there_and_back(size, mode):
    height, width = size
    letterbox = Letterbox.fit(height, width, mode)
    points = np.array(
        [
            [0, 0],
            [-0.5, -0.5],
            [width - 1, height - 1],
            [width - 0.5, height - 0.5],
            [(width - 1) / 2, (height - 1) / 2],
            [width / 3, height / 7],
        ]
    )
    there = letterbox.points_to_input(points)
    assert np.abs(letterbox.points_to_source(there) - points).max() < 1e-9
    corners = [
        [-0.5, -0.5],
        [letterbox.content_width_px - 0.5, letterbox.content_height_px - 0.5],
    ]
    assert np.allclose(there[[1, 3]], corners, rtol=0, atol=1e-9)


def test_points_land_where_they_are_known_to():
    letterbox = Letterbox.fit(504, 252)  # exactly doubled, to 1008 x 504
    assert letterbox.points_to_input(np.array([[0, 0], [10, 100]])).tolist() == [
        [0.5, 0.5],
        [20.5, 200.5],
    ]


@hypothesis.given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    mode=st.sampled_from(MODES),
    fraction=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_point_of_any_picture_survives_the_way_there_and_back(height, width, mode, fraction):
    letterbox = Letterbox.fit(height, width, mode)
    points = np.array([[fraction[0] * width - 0.5, fraction[1] * height - 0.5]])
    there = letterbox.points_to_input(points)
    assert np.abs(letterbox.points_to_source(there) - points).max() < 1e-9
    assert (there <= [letterbox.content_width_px, letterbox.content_height_px]).all()


@pytest.mark.parametrize(
    ("fit", "error", "words"),
    [
        ((0, 5), InputSizeError, "0 x 5"),
        ((5, 0), InputSizeError, "5 x 0"),
        ((5, 5, "stretch"), ConfigError, "stretch"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(fit, error, words):
    with pytest.raises(error, match=words):
        Letterbox.fit(*fit)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [72, 288, 252, 1008])
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1016, 1016), (512, 512)),
        ((1016, 1016), (1016, 1016)),
        ((800, 600), (800, 600)),
        ((512, 768), (256, 384)),
        ((640, 480), (1300, 975)),
        ((999, 500), (333, 167)),
    ],
)
def test_a_ramp_comes_back_exactly_on_any_grid(size, grid, side, mode):
    letterbox = Letterbox.fit(*size, mode)
    out = letterbox.logits_to_grid(ramp(letterbox, side), *grid)[0]
    assert out.shape == grid

    # Where a pixel's centre of the grid lies on the input, from the definition alone.
    y_px = (
        (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0] * letterbox.content_height_px
    )
    x_px = (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1] * letterbox.content_width_px
    expected = 0.75 * y_px[:, None] - 0.5 * x_px[None, :]
    half_px = 0.5 * letterbox.size_px / side
    interior_y = (y_px > half_px) & (y_px < letterbox.content_height_px - 2 * half_px)
    interior_x = (x_px > half_px) & (x_px < letterbox.content_width_px - 2 * half_px)
    assert interior_y.sum() > grid[0] // 2
    inside = (out - expected)[interior_y][:, interior_x]
    assert inside.abs().max() < 1e-9


def test_logits_agree_with_torch_where_the_content_is_whole_cells():
    letterbox = Letterbox.fit(504, 252)
    logits = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(0)).double()
    ours = letterbox.logits_to_grid(logits, 400, 200)
    theirs = torch.nn.functional.interpolate(
        logits[..., :36], size=(400, 200), mode="bilinear", align_corners=False
    )
    assert ours.shape == (2, 3, 400, 200)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(500, 1000), (333, 1000), (1, 3000), (700, 512)])
def test_padding_never_reaches_the_picture(size):
    letterbox = Letterbox.fit(*size)
    logits = torch.zeros(1, 72, 72)
    cell_px = letterbox.size_px / 72
    centre_px = (torch.arange(72) + 0.5) * cell_px
    padded_y, padded_x = (
        centre_px > letterbox.content_height_px,
        centre_px > letterbox.content_width_px,
    )
    padded_y[0] = padded_x[0] = False  # a picture thinner than half a cell keeps the first
    logits[:, padded_y] = 1e6
    logits[:, :, padded_x] = 1e6
    assert letterbox.logits_to_grid(logits, *size).abs().max() == 0


def test_gradients_flow_to_the_picture_and_not_to_the_padding():
    letterbox = Letterbox.fit(252, 504)
    logits = torch.zeros(1, 72, 72, requires_grad=True)
    letterbox.logits_to_grid(logits, 252, 504).sum().backward()
    assert (logits.grad[:, :36] > 0).all()
    assert (logits.grad[:, 36:] == 0).all()
    assert logits.grad.sum().item() == pytest.approx(252 * 504, rel=1e-5)


def test_half_logits_are_interpolated_in_single_precision():
    letterbox = Letterbox.fit(100, 100)
    assert letterbox.logits_to_grid(torch.zeros(1, 4, 4).bfloat16(), 7, 7).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 72, 71), (72,), (1, 0, 0)])
def test_logits_that_are_not_on_a_square_are_refused(shape):
    with pytest.raises(InputSizeError, match="square"):
        Letterbox.fit(8, 8).logits_to_grid(torch.zeros(shape), 8, 8)


def disc(height, width, num_planes=1):
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    mask = ((y - 0.45) ** 2 + (x - 0.6) ** 2 < 0.3**2).to(torch.uint8)
    return mask.expand(num_planes, -1, -1)


def dice(a, b):
    return 2.0 * (a & b).sum().item() / (a.sum() + b.sum()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [252, 288, 504])
@pytest.mark.parametrize(
    ("size", "grid"), [((1016, 1016), (512, 512)), ((800, 600), (800, 600)), ((512, 768), (64, 96))]
)
def test_a_mask_survives_the_way_to_its_target_and_back(size, grid, target, mode):
    letterbox = Letterbox.fit(*size, mode)
    mask = disc(*grid, num_planes=2)
    target_KTT = letterbox.mask_to_target(mask, target)
    assert target_KTT.dtype == torch.uint8
    assert target_KTT.shape == (2, target, target)
    back = letterbox.logits_to_grid((target_KTT == 1).float(), *grid) >= 0.5
    assert dice(back, mask.bool()) > 0.98


def test_padding_of_a_target_is_ignored_and_nothing_else_is():
    letterbox = Letterbox.fit(500, 1000)
    target = letterbox.mask_to_target(torch.ones(1, 100, 200, dtype=torch.uint8), 72)
    assert (target[:, :36] == 1).all()
    assert (target[:, 36:] == 255).all()


def test_a_picture_thinner_than_half_a_cell_still_has_a_target():
    target = Letterbox.fit(1, 3000).mask_to_target(torch.ones(1, 1, 3000, dtype=torch.uint8), 72)
    assert (target[:, 0] == 1).all()
    assert (target[:, 1:] == 255).all()


def test_a_target_cell_counts_from_half_its_area():
    mask = torch.tensor([[[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]]).to(torch.uint8)
    target = Letterbox.fit(4, 4).mask_to_target(mask, 2)
    assert target.tolist() == [[[1, 0], [1, 0]]]


def test_a_finer_target_repeats_the_masks_pixels():
    mask = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8)
    target = Letterbox.fit(2, 2).mask_to_target(mask, 6)
    assert torch.equal(target, mask.repeat_interleave(3, 1).repeat_interleave(3, 2))


def test_classes_and_ignored_pixels_keep_the_label_that_covers_most():
    mask = torch.tensor(
        [[[3, 3, 255, 255], [3, 1, 255, 0], [2, 2, 0, 0], [1, 0, 0, 7]]], dtype=torch.uint8
    )
    assert Letterbox.fit(4, 4).mask_to_target(mask, 2).tolist() == [[[3, 255], [2, 0]]]


def test_class_numbers_of_a_target_are_those_at_the_centres_of_its_cells():
    mask = torch.tensor([[[1, 9, 3], [255, 0, 2]]], dtype=torch.uint8)
    letterbox = Letterbox.fit(200, 300)
    finer = letterbox.numbers_to_target(mask, 6)
    assert torch.equal(finer[:, :4], mask.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert (finer[:, 4:] == 255).all()
    generator = torch.Generator().manual_seed(1)
    many = torch.randint(0, 20, (1, 50, 75), generator=generator, dtype=torch.uint8)
    # Five pixels a cell: the third is at its centre.
    assert torch.equal(letterbox.numbers_to_target(many, 15)[:, :10], many[:, 2::5, 2::5])


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (999, 1000)])
def test_every_cell_with_a_picture_has_a_class_number(size):
    mask = torch.full((1, *size), 7, dtype=torch.uint8)
    letterbox = Letterbox.fit(*size)
    target = letterbox.numbers_to_target(mask, 72)
    assert torch.equal(target, letterbox.mask_to_target(mask, 72))


def test_a_target_agrees_with_torchs_area_average_on_whole_factors():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(3, 336, 336, generator=generator) > 0.55).to(torch.uint8)
    area = torch.nn.functional.avg_pool2d(mask.double(), 4)
    target = Letterbox.fit(336, 336).mask_to_target(mask, 84)
    assert torch.equal(target, (area >= 0.5).to(torch.uint8))


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize(
    ("size", "grid", "target"),
    [((90, 61), (90, 61), 84), ((61, 90), (33, 47), 56), ((50, 50), (110, 130), 28)],
)
def test_a_target_cell_has_the_label_of_the_largest_exact_area(size, grid, target, num_labels):
    generator = torch.Generator().manual_seed(num_labels)
    mask = torch.randint(0, num_labels, (1, *grid), generator=generator, dtype=torch.uint8)
    letterbox = Letterbox.fit(*size)
    found = letterbox.mask_to_target(mask, target)[0]

    def shares(content_px, num_pixels):
        extent = Fraction(content_px * target, letterbox.size_px)
        edges = [min(i * num_pixels / extent, Fraction(num_pixels)) for i in range(target + 1)]
        for begin, end in itertools.pairwise(edges[: math.ceil(extent - Fraction(1, 2)) + 1]):
            pixels = range(math.floor(begin), math.ceil(end))
            yield {i: min(end, Fraction(i + 1)) - max(begin, Fraction(i)) for i in pixels}

    num_checked = 0
    for row, rows in enumerate(shares(letterbox.content_height_px, grid[0])):
        for column, columns in enumerate(shares(letterbox.content_width_px, grid[1])):
            areas = Counter()
            for (y, height), (x, width) in itertools.product(rows.items(), columns.items()):
                areas[int(mask[0, y, x])] += height * width
            assert found[row, column] == max(areas, key=lambda label: (areas[label], label))
            num_checked += 1
    assert num_checked == (found != IGNORE_LABEL).sum()
