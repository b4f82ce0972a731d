import numpy as np
import pytest
from scipy import stats

from sam3cache.evaluation.comparing.statistics import PairedDifference, holm, paired_difference
from sam3cache.evaluation.comparing.verdict import SMALL_DICE, judge
from sam3cache.evaluation.statistics import Interval, mean_interval, p_value_of_zero


def patients(num_groups: int, seed: int) -> tuple[np.ndarray, list[str], np.random.Generator]:
    """Draw 1 to 4 images of each of some patients: the patient of each image."""
    rng = np.random.default_rng(seed)
    of_image = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    return of_image, [f"p{i}" for i in of_image], rng


@pytest.mark.parametrize("num_groups", [6, 12, 40])
def test_the_interval_covers_a_known_difference_as_often_as_it_says(num_groups: int) -> None:
    """Half of the spread lies between patients. 500 trials of 95 % have a deviation of 1 %."""
    num_covered = num_claimed = 0
    for trial in range(500):
        of_image, groups, rng = patients(num_groups, trial)
        noise_N = rng.normal(0, 0.03, num_groups)[of_image] + rng.normal(0, 0.03, len(of_image))
        baseline_N = rng.uniform(0.4, 0.9, len(of_image))
        found = paired_difference(baseline_N, baseline_N + 0.02 + noise_N, groups, seed=0)
        assert found.interval is not None
        num_covered += found.interval.low <= 0.02 <= found.interval.high
        nothing = paired_difference(baseline_N, baseline_N + noise_N, groups, seed=0)
        assert nothing.p_value is not None
        num_claimed += nothing.p_value < 0.05
    assert 0.92 <= num_covered / 500 <= 0.975
    assert 0.025 <= num_claimed / 500 <= 0.08


@pytest.mark.parametrize("num_groups", [3, 10])
def test_a_p_value_below_5_percent_is_an_interval_without_0(num_groups: int) -> None:
    num_agreeing, num_claimed = 0, 0
    for trial in range(200):
        of_image, groups, rng = patients(num_groups, trial)
        values_N = rng.normal(0.2 / num_groups, 0.03, num_groups)[of_image] + rng.normal(
            0, 0.02, len(of_image)
        )
        interval = mean_interval(values_N, groups, seed=0)
        p_value = p_value_of_zero(values_N, groups, seed=0)
        assert interval is not None
        assert p_value is not None
        claimed = interval.low > 0 or interval.high < 0
        num_claimed += claimed
        num_agreeing += claimed == (p_value < 0.05)
    # But for those that end within one draw of 0.
    assert num_agreeing >= 198
    assert 50 < num_claimed < 150


def test_copies_of_a_patients_images_make_nothing_surer() -> None:
    values_N = np.random.default_rng(2).normal(0.01, 0.03, 12)
    names = [f"p{i}" for i in range(12)]
    once = p_value_of_zero(values_N, names, seed=3)
    tenfold = p_value_of_zero(np.repeat(values_N, 10), list(np.repeat(names, 10)), seed=3)
    singly = p_value_of_zero(np.repeat(values_N, 10), [str(i) for i in range(120)], seed=3)
    assert once is not None
    assert tenfold == pytest.approx(once)
    assert singly is not None
    assert singly < 0.5 * once


def test_identical_values_differ_by_exactly_nothing() -> None:
    dice_N = np.array([0.3, np.nan, 0.7, 0.9, 0.2, 0.4, 0.8])
    found = paired_difference(dice_N, dice_N.copy(), list("abcdefg"), seed=0)
    assert (found.num_images, found.num_groups) == (6, 6)
    assert (found.mean, found.median, found.interval) == (0.0, 0.0, Interval(0.0, 0.0))
    assert (found.num_better, found.num_worse, found.p_value) == (0, 0, 1.0)
    assert judge("b", "a", found) == (
        "equal",
        "b and a are equal: the same Dice on all 6 images of 6 groups.",
    )


def test_the_rounding_of_a_mean_over_seeds_is_no_difference() -> None:
    dice_N = np.array([0.1, 0.7])
    mean_N = (dice_N + dice_N + dice_N) / 3
    assert (mean_N != dice_N).any()
    assert paired_difference(dice_N, mean_N, ["a", "b"], seed=0).mean == 0.0


def test_images_count_where_both_have_a_value_and_a_distance_is_better_when_lower() -> None:
    nan = np.nan
    first_N, second_N = np.array([4.0, 2.0, nan, 1.0, 5.0]), np.array([3.0, 3.0, 9.0, nan, 1.0])
    found = paired_difference(first_N, second_N, list("abcde"), seed=0, lower_is_better=True)
    assert (found.num_images, found.num_better, found.num_worse) == (3, 2, 1)
    assert (found.baseline, found.other) == pytest.approx((11 / 3, 7 / 3))
    assert (found.mean, found.median) == pytest.approx((-4 / 3, -1))


@pytest.mark.parametrize(("values", "groups"), [([], []), ([0.5], ["a"]), ([0.3, 0.5], ["a", "a"])])
def test_one_group_or_none_has_no_interval(values: list[float], groups: list[str]) -> None:
    other_N = np.array(values)
    found = paired_difference(np.zeros(len(values)), other_N, groups, seed=0)
    assert (found.interval, found.p_value) == (None, None)
    assert found.mean == (pytest.approx(np.mean(values)) if values else None)
    assert judge("b", "a", found)[0] == "undecided"


def test_p_values_do_not_end_where_draws_do() -> None:
    """All of a dozen heads that are better on every patient shall be found so."""
    values_N = 0.1 + 0.01 * np.random.default_rng(0).standard_normal(8)
    groups = [str(number) for number in range(8)]
    p_value = p_value_of_zero(values_N, groups, seed=0)
    assert p_value is not None
    student = stats.ttest_1samp(values_N, 0.0).pvalue
    assert p_value == pytest.approx(student, rel=1.0)
    assert max(p for p in holm([p_value] * 12) if p is not None) < 1e-4
    # Of identical differences there is no spread to judge by.
    assert p_value_of_zero(np.full(8, 0.1), groups, seed=0) == pytest.approx(0.0, abs=1e-12)
    # And three patients are few, whatever they say.
    few = p_value_of_zero(np.array([0.05, 0.1, 0.2]), ["a", "b", "c"], seed=0)
    assert few is not None
    assert 0.05 < few < 0.2


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.04], [0.04]),
        # 4 x 0.005, 3 x 0.01, then 2 x 0.03, and what is below that is raised to it.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.7, 0.6], [1.0, 1.0]),
        ([0.02, None, 0.03], [0.04, None, 0.04]),
    ],
)
def test_holms_correction(p_values: list[float | None], corrected: list[float | None]) -> None:
    assert holm(p_values) == pytest.approx(corrected)


def difference(mean: float, low: float, high: float, num_groups: int = 40) -> PairedDifference:
    return PairedDifference(
        num_images=111,
        num_groups=num_groups,
        baseline=0.7,
        other=0.7 + mean,
        mean=mean,
        interval=Interval(low, high),
        p_value=0.02,
        num_better=78,
        num_worse=30,
    )


OVER = "over 111 images of 40 groups; 78 images better, 30 worse"


@pytest.mark.parametrize(
    ("found", "verdict", "sentence"),
    [
        (
            difference(0.013, 0.004, 0.022),
            "better",
            f"B is better than A: +0.013 Dice (95% interval 0.004 to 0.022) {OVER}.",
        ),
        (
            difference(-0.013, -0.022, -0.004),
            "worse",
            f"B is worse than A: -0.013 Dice (95% interval -0.022 to -0.004) {OVER}.",
        ),
        (
            difference(0.005, 0.002, 0.008),
            "better",
            f"B is better than A, by less than 0.01: +0.005 Dice (95% interval 0.002 to 0.008) "
            f"{OVER}.",
        ),
        (
            difference(0.001, -0.004, 0.006),
            "alike",
            f"B and A are alike, within 0.01: +0.001 Dice (95% interval -0.004 to 0.006) {OVER}.",
        ),
        (
            difference(0.003, -0.004, 0.012),
            "undecided",
            "Whether B is better than A cannot be told: +0.003 Dice (95% interval -0.004 to 0.012) "
            f"{OVER}.",
        ),
        (
            difference(0.1, 0.05, 0.15, num_groups=5),
            "undecided",
            "Whether B is better than A cannot be told from 5 groups, at least 6 are needed: "
            "+0.100 Dice over 111 images of 5 groups; 78 images better, 30 worse.",
        ),
        (
            PairedDifference(0),
            "undecided",
            "B and A have no image in common that both have Dice of.",
        ),
    ],
)
def test_one_sentence_says_what_it_comes_to(
    found: PairedDifference, verdict: str, sentence: str
) -> None:
    assert judge("B", "A", found) == (verdict, sentence)


def test_of_several_comparisons_the_corrected_p_value_decides() -> None:
    found = difference(0.013, 0.001, 0.025)
    told = f"+0.013 Dice (95% interval 0.001 to 0.025) {OVER}"
    assert judge("B", "A", found, p_corrected=0.03, num_comparisons=2) == (
        "better",
        f"B is better than A: {told}; p = 0.030 after Holm's correction for 2 comparisons.",
    )
    assert judge("B", "A", found, p_corrected=0.08, num_comparisons=4) == (
        "undecided",
        "Whether B is better than A cannot be told after the correction for 4 comparisons: "
        f"{told}; p = 0.080 after Holm's correction for 4 comparisons.",
    )
    assert SMALL_DICE == 0.01
