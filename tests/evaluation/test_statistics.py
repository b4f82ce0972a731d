import numpy as np
import pytest

from sam3cache.evaluation import Interval, Summary, mean_interval, summarise
from sam3cache.evaluation.statistics import p_value_of_zero


def test_a_summary_states_the_sample_deviation_and_leaves_out_what_has_no_value() -> None:
    summary = summarise([0.2, None, 0.4, 0.9], ["a", "b", "b", "c"], seed=0)
    assert summary.num_values == 3
    assert summary.mean == pytest.approx(0.5)
    assert summary.std == pytest.approx(0.36055512754)  # sqrt(((.3)^2 + (.1)^2 + (.4)^2) / 2)
    assert summary.median == pytest.approx(0.4)
    assert (summary.minimum, summary.maximum) == (0.2, 0.9)
    # Of so few groups Student's, by hand: sums 0.2, 0.4 and 0.9, an image each.
    assert summary.interval is not None
    half_width = 4.302652729911 * 0.36055512754 / 3**0.5
    assert summary.interval.low == pytest.approx(0.5 - half_width)
    assert summary.interval.high == pytest.approx(0.5 + half_width)
    within = summarise([0.2, None, 0.4, 0.9], ["a", "b", "b", "c"], 0, (0.0, 1.0))
    assert within.interval == Interval(0.0, 1.0)


@pytest.mark.parametrize("values", [[], [None, None]])
def test_nothing_to_summarise_gives_no_numbers(values: list[float | None]) -> None:
    assert summarise(values, ["a"] * len(values), seed=0) == Summary(0)


def test_one_value_has_neither_deviation_nor_interval() -> None:
    assert summarise([0.5], ["a"], seed=0) == Summary(1, 0.5, None, 0.5, None, 0.5, 0.5)


def test_the_interval_is_that_of_the_normal_law_for_many_independent_values() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.1, size=400)
    interval = mean_interval(values, [str(i) for i in range(400)], seed=0)
    assert interval is not None
    half_width = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.15 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.15 * half_width)


@pytest.mark.parametrize(
    "sizes", [(20, 1), (40, 2, 2, 2), (30, *7 * (2,)), (1, 2, 3, 4, 1, 2, 3, 4)]
)
def test_the_interval_holds_the_mean_where_one_patient_has_most_images(
    sizes: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(0)
    groups = [str(g) for g, size in enumerate(sizes) for _ in range(size)]
    held = claimed = 0
    for _ in range(600):
        of_patient = np.repeat(rng.normal(0, 1, len(sizes)), sizes)
        values = of_patient + rng.normal(0, 1, len(groups))
        interval, p = mean_interval(values, groups, seed=0), p_value_of_zero(values, groups, seed=0)
        assert interval is not None
        assert p is not None
        held += interval.low <= 0 <= interval.high
        claimed += p < 0.05
    # Three standard deviations of 600 draws below 95 %.
    assert held / 600 > 0.923
    assert claimed / 600 < 0.077


def test_copies_of_a_patients_image_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(2).uniform(size=12)
    patients = [f"p{i}" for i in range(12)]
    single = mean_interval(values, patients, seed=3)
    tenfold = mean_interval(np.repeat(values, 10), list(np.repeat(patients, 10)), seed=3)
    ungrouped = mean_interval(np.repeat(values, 10), [str(i) for i in range(120)], seed=3)
    assert single is not None
    assert tenfold is not None
    assert ungrouped is not None
    assert (tenfold.low, tenfold.high) == pytest.approx((single.low, single.high))
    assert ungrouped.high - ungrouped.low < 0.5 * (single.high - single.low)


def test_a_seed_gives_the_same_interval_again_and_another_seed_another() -> None:
    values, groups = np.random.default_rng(3).uniform(size=12), list("abcdefghijkl")
    first = mean_interval(values, groups, seed=0)
    assert first == mean_interval(values, groups, seed=0)
    assert first != mean_interval(values, groups, seed=1)


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        ([0.3, 0.5], ["a", "a"], None),
        ([0.3, 0.3, 0.3], ["a", "b", "b"], Interval(0.3, 0.3)),
        # means 0.3 and 0.4, of two and of one image
        ([0.1, 0.5, 0.4], ["a", "a", "b"], 12.7062047364 * 0.1 / 2**0.5 * (4 / 9 + 1 / 9) ** 0.5),
    ],
)
def test_the_interval_of_few_groups(
    values: list[float], groups: list[str], expected: Interval | float | None
) -> None:
    interval = mean_interval(np.array(values), groups, seed=0)
    if not isinstance(expected, float):
        assert interval == expected
        return
    assert interval is not None
    mean = sum(values) / len(values)
    assert (mean - interval.low, interval.high - mean) == pytest.approx((expected, expected))
