import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam3cache.evaluation import gain_text, interval_text
from sam3cache.evaluation.angle_use import (
    NUM_SHUFFLES,
    AngleTrial,
    AngleUse,
    judge,
    mean_angles_deg,
    plan_trial,
)
from sam3cache.evaluation.shuffling import derangement

NAN = float("nan")


@given(
    views=st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1),
    seed=st.integers(0, 1000),
)
def test_no_image_keeps_its_view_and_as_few_as_possible_are_left_out(
    views: list[int], seed: int
) -> None:
    _, view_N = np.unique(views, return_inverse=True)
    donor_N = derangement(view_N, np.random.default_rng(seed))
    moved = donor_N >= 0
    assert (view_N[donor_N[moved]] != view_N[moved]).all()
    assert len(set(donor_N[moved])) == moved.sum()
    commonest = np.bincount(view_N).max()
    assert (~moved).sum() == max(0, 2 * commonest - len(views))


def test_different_shuffles_exchange_different_images() -> None:
    rng = np.random.default_rng(0)
    view_N = np.arange(30) // 2
    assert not np.array_equal(derangement(view_N, rng), derangement(view_N, rng))


def test_a_trial_gives_every_known_view_another_and_repeats_by_its_seed() -> None:
    angles = np.array([[10.0, 5.0], [20.0, 5.0], [NAN, NAN], [30.0, 5.0], [30.0, NAN]])
    trial = plan_trial(angles, seed=0)
    assert isinstance(trial, AngleTrial)
    assert trial.shuffled_SN2.shape == (NUM_SHUFFLES, 5, 2)
    known = [0, 1, 3]
    assert np.isnan(trial.shuffled_SN2[:, [2, 4]]).all()
    assert (trial.shuffled_SN2[:, known, 0] != angles[known, 0]).all()
    assert (np.sort(trial.shuffled_SN2[:, known, 0], axis=1) == [10, 20, 30]).all()
    assert trial.constant_2 == pytest.approx([20.0, 5.0], abs=0.2)
    again = plan_trial(angles, seed=0)
    assert isinstance(again, AngleTrial)
    np.testing.assert_array_equal(trial.shuffled_SN2, again.shuffled_SN2)


@pytest.mark.parametrize(
    ("angles", "reason"),
    [
        ([[NAN, NAN], [NAN, NAN]], "no image here has both a mask and known angles"),
        ([[30.0, NAN], [NAN, 4.0]], "no image here has both a mask and known angles"),
        ([[30.0, -25.0], [30.0, -25.0]], "have the same one, LAO 30.0 CAU 25.0"),
    ],
)
def test_angles_that_cannot_be_shuffled_leave_the_question_open(
    angles: list[list[float]], reason: str
) -> None:
    use = plan_trial(np.array(angles), seed=0)
    assert isinstance(use, AngleUse)
    assert use.verdict == "undecided"
    assert "cannot be told" in use.sentence
    assert reason in use.sentence


def test_the_mean_of_angles_is_taken_on_the_circle() -> None:
    mean = mean_angles_deg(np.array([[170.0, 10.0], [-170.0, 30.0]]))
    assert abs(mean[0]) == pytest.approx(180.0)
    assert mean[1] == pytest.approx(20.0)


def judged(
    gain_N: np.ndarray, *, num_groups: int | None = None, max_change: float = 0.3
) -> AngleUse:
    """Judge images whose Dice falls by ``gain_N`` when their angles are shuffled."""
    num_images = len(gain_N)
    true_N = np.full(num_images, 0.7)
    trial = AngleTrial(np.zeros((NUM_SHUFFLES, num_images, 2)), np.array([20.0, -5.0]))
    shuffled_SN = np.stack([true_N - gain_N] * NUM_SHUFFLES)
    groups = [f"g{i % (num_groups or num_images)}" for i in range(num_images)]
    return judge(trial, true_N, shuffled_SN, true_N - 0.01, groups, max_change, seed=0)


NOISE = np.random.default_rng(0).standard_normal(40)
NOISE -= NOISE.mean()
SAME = np.full(40, 0.03)


@pytest.mark.parametrize(
    ("gain_N", "num_groups", "max_change", "verdict", "words"),
    [
        (0.03 + 0.01 * NOISE, None, 0.3, "used", "true angles give 0.0300 higher Dice"),
        (0.01 * NOISE - 0.03, None, 0.3, "harmful", "to its harm: true angles give 0.0300 lower"),
        (0 * NOISE, None, 0.0, "unused", "all its outputs stay the same"),
        (0 * NOISE, None, 1e-7, "unused", "all its outputs stay the same"),
        (0.001 * NOISE, None, 0.3, "negligible", "hardly uses the view angle"),
        (0.001 + 0.001 * NOISE, None, 0.3, "negligible", "true angles change Dice by +0.0010"),
        (0.1 * NOISE, None, 0.3, "undecided", "cannot be told"),
        (SAME, 6, 0.3, "used", "(95% interval 0.0300 to 0.0300)"),
        (SAME, 5, 0.3, "undecided", "cannot be told from 5 groups of images, at least 6"),
        (SAME, 1, 0.3, "undecided", "cannot be told from 1 group of images"),
    ],
)
def test_the_verdict_follows_from_the_interval(
    gain_N: np.ndarray, num_groups: int | None, max_change: float, verdict: str, words: str
) -> None:
    use = judged(gain_N, num_groups=num_groups, max_change=max_change)
    assert use.verdict == verdict, use.sentence
    assert words in use.sentence


def test_a_head_that_finds_nothing_is_not_said_to_ignore_the_angle() -> None:
    nothing_N = np.zeros(10)
    trial = AngleTrial(np.zeros((2, 10, 2)), np.zeros(2))
    groups = [f"g{i}" for i in range(10)]
    use = judge(trial, nothing_N, np.stack([nothing_N] * 2), nothing_N, groups, 0.01, seed=0)
    assert use.verdict == "undecided"
    assert "cannot be told: it finds next to nothing" in use.sentence


def test_the_figures_are_paired_means_over_what_can_be_compared() -> None:
    trial = AngleTrial(np.zeros((2, 4, 2)), np.array([20.0, -5.0]))
    true_N = np.array([0.8, 0.6, NAN, 0.9])  # the third has an empty mask
    shuffled_SN = np.array([[0.7, NAN, NAN, NAN], [0.5, 0.2, NAN, NAN]])
    use = judge(trial, true_N, shuffled_SN, true_N - 0.05, ["a", "b", "c", "d"], 0.5, seed=0)
    assert (use.num_images, use.num_groups) == (2, 2)
    assert use.dice_true == pytest.approx(0.7)
    assert use.dice_shuffled == pytest.approx((0.6 + 0.2) / 2)
    assert use.dice_constant == pytest.approx(0.65)
    assert use.true_minus_shuffled is not None
    assert use.true_minus_shuffled.mean == pytest.approx((0.2 + 0.4) / 2)
    assert use.true_minus_constant is not None
    assert use.true_minus_constant.mean == pytest.approx(0.05)
    assert use.constant_angles_deg == (20.0, -5.0)


def test_what_rounds_to_nothing_has_no_sign_of_its_own() -> None:
    use = judged(np.full(40, -1e-6), num_groups=2)
    assert "change Dice by +0.0000" in use.sentence
    assert use.true_minus_shuffled is not None
    assert gain_text(use.true_minus_shuffled.mean, 4) == "+0.0000"
    assert interval_text(use.true_minus_shuffled.interval, 4) == "0.0000 to 0.0000"


def test_masks_that_are_all_empty_leave_the_question_open() -> None:
    trial = AngleTrial(np.zeros((2, 1, 2)), np.zeros(2))
    nothing = np.full(1, NAN)
    use = judge(trial, nothing, np.stack([nothing] * 2), nothing, ["a"], 0.0, seed=0)
    assert use.verdict == "undecided"
    assert "mask that is not empty" in use.sentence
