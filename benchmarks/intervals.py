"""How often intervals and p-values are right, in simulations where the truth is known.

Differences in Dice of one to four images of each of so many patients are drawn: a true mean, a
patient's own deviation and an image's, the two equally large; and, uneven, the same where one of
the patients has MANY images, as a long cine gives. Of each draw are taken

- our interval: a bootstrap of whole patients, expanded percentiles; of few or uneven Student's;
- the bootstrap's usual percentiles, 2.5 and 97.5;
- our interval of the images, as if no two were of one patient;
- our p-value, where the true mean is 0.

An interval of 95% should hold the true mean in 95 of 100 cases, and a p-value be below 0.05 in 5.

Exits with 1 when a bound is missed (not checked with --quick: too few draws):

- our interval holds the true mean in COVERED of all cases; where patients are uneven in at least
  as many as its lower end;
- and our p-value claims a difference that is none in at most MAX_CLAIMED of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from reporting import Bound, Machine, Report

from sam3cache.evaluation.statistics import (
    LEVEL,
    mean_interval,
    p_value_of_zero,
    resampled_means,
)

NUM_GROUPS = (2, 3, 4, 5, 6, 8, 12, 20, 40)
NUM_UNEVEN = (2, 4, 8, 20)
MANY = 40
MEAN, SPREAD = 0.02, 0.03
COVERED = (0.925, 0.97)
MAX_CLAIMED = 0.075

NUM_SEEDS = 20
"""Draws of the bootstrap: many simulations share one, as its numbers take longest to draw."""

COLUMNS = {
    "ours": "ours holds it",
    "usual": "usual percentiles",
    "images": "images drawn singly",
    "claimed": "p below 0.05 where there is nothing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine("cpu")
    shares = {str(num): simulate(num, options.trials) for num in NUM_GROUPS}
    for num in NUM_UNEVEN:
        shares[f"{num}, uneven"] = simulate(num, options.trials, uneven=True)
    bounds = []
    for num, share in shares.items() if not options.quick else ():
        low, high = COVERED[0], 1.0 if "uneven" in num else COVERED[1]
        claim = f"of {num} patients our interval holds the mean in {low:.1%} to {high:.1%}"
        bounds.append(Bound(claim, share["ours"], low <= share["ours"] <= high))
        claim = f"of {num} patients a difference is invented in at most {MAX_CLAIMED:.1%}"
        bounds.append(Bound(claim, share["claimed"], share["claimed"] <= MAX_CLAIMED))
    deviation = (LEVEL * (1 - LEVEL) / options.trials) ** 0.5
    return Report(
        program="intervals",
        columns=("patients", *COLUMNS.values()),
        rows=[(num, *(f"{share[c]:.1%}" for c in COLUMNS)) for num, share in shares.items()],
        notes=[
            f"{options.trials} simulations a line, so that a share of 95% has a standard deviation "
            f"of {deviation:.1%}; one to four images a patient, half of the variance between "
            f"patients; uneven: one of them has {MANY}. Ideal are 95% and, in the last column, 5%."
        ],
        bounds=bounds,
        figures=shares,
        settings={"trials": options.trials, "mean": MEAN, "spread": SPREAD},
        machine=machine.fields(),
    ).publish(options.json)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 simulations a line")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    options = parser.parse_args(arguments)
    options.trials = 100 if options.quick else 4000
    return options


def simulate(num_groups: int, num_trials: int, *, uneven: bool = False) -> dict[str, float]:
    """Return the share of simulations in which each interval holds, and p claims too much."""
    num = dict.fromkeys(COLUMNS, 0)
    rng = np.random.default_rng(num_groups)
    for seed in range(NUM_SEEDS):
        for _ in range(num_trials // NUM_SEEDS):
            noise_N, groups = differences(num_groups, rng, uneven)
            values_N = MEAN + noise_N
            ours = mean_interval(values_N, groups, seed)
            assert ours is not None
            num["ours"] += ours.low <= MEAN <= ours.high
            means_R = resampled_means(values_N, groups, seed)
            low, high = np.quantile(means_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            num["usual"] += low <= MEAN <= high
            p_value = p_value_of_zero(noise_N, groups, seed)
            assert p_value is not None
            num["claimed"] += p_value < 1 - LEVEL
    # Of images there is another number each time, so that each draws anew: fewer will do.
    num_singly = num_trials // 4
    for seed in range(num_singly):
        values_N = MEAN + differences(num_groups, rng, uneven)[0]
        singly = mean_interval(values_N, [str(i) for i in range(len(values_N))], seed)
        assert singly is not None
        num["images"] += singly.low <= MEAN <= singly.high
    trials = dict.fromkeys(COLUMNS, num_trials) | {"images": num_singly}
    return {name: num[name] / trials[name] for name in COLUMNS}


def differences(
    num_groups: int, rng: np.random.Generator, uneven: bool
) -> tuple[NDArray[np.float64], list[str]]:
    """Draw differences about 0 of so many patients' images, and whose each is."""
    num_images_G = rng.integers(1, 5, num_groups)
    if uneven:
        num_images_G[0] = MANY
    group_N = np.repeat(np.arange(num_groups), num_images_G)
    of_patient_N = rng.normal(0, SPREAD, num_groups)[group_N]
    return of_patient_N + rng.normal(0, SPREAD, len(group_N)), [str(g) for g in group_N]


if __name__ == "__main__":
    raise SystemExit(main())
