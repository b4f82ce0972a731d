"""Groups are shared out whole, evenly, and always alike."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3cache.groups import part_of_groups

SHARES = (0.7, 0.15, 0.15)


def members(num_groups, seed, *, largest=6):
    """Samples of groups of several sizes, with a value of their group and one of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for group in range(num_groups):
        pattern = ("pattern", ("left", "right", "balanced")[min(2, int(rng.exponential(1.0)))])
        for _ in range(rng.integers(1, largest + 1)):
            view = ("view", int(rng.integers(0, 4)))
            made.append((f"g{group}", (pattern, view)))
    return made


def counts(made, parts):
    """By value, None for all, samples by part."""
    found = defaultdict(Counter)
    for group, values in made:
        for value in (None, *values):
            found[value][parts[group]] += 1
    return found


@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    values=st.lists(st.sampled_from("abc"), min_size=60, max_size=60),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_group_is_in_one_part_whatever_the_order_of_samples(groups, values, seed):
    made = [(f"g{g}", (("x", value),)) for g, value in zip(groups, values, strict=False)]
    parts = part_of_groups(made, SHARES, seed)
    assert parts.keys() == {group for group, _ in made}
    assert set(parts.values()) <= {0, 1, 2}
    assert part_of_groups(made[::-1], SHARES, seed) == parts


@given(seed=st.integers(0, 10_000), num_groups=st.integers(60, 120))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_parts_have_their_shares_of_all_and_of_each_value(seed, num_groups):
    made = members(num_groups, seed)
    for value, by_part in counts(made, part_of_groups(made, SHARES, seed)).items():
        for part, share in enumerate(SHARES):
            # Groups are of up to six samples.
            assert abs(by_part[part] - share * by_part.total()) <= (3 if value is None else 6)


def test_it_is_evener_than_chance():
    made = members(100, 3)
    names = sorted({group for group, _ in made})

    def unevenness(parts):
        return sum(
            (by_part[part] - share * by_part.total()) ** 2
            for by_part in counts(made, parts).values()
            for part, share in enumerate(SHARES)
        )

    by_chance = [
        unevenness(dict(zip(names, rng.choice(3, len(names), p=SHARES), strict=True)))
        for rng in map(np.random.default_rng, range(20))
    ]
    assert unevenness(part_of_groups(made, SHARES, 0)) < min(by_chance) / 20


def test_another_seed_is_another_division():
    made = [(f"g{i}", ()) for i in range(40)]
    assert part_of_groups(made, SHARES, 0) != part_of_groups(made, SHARES, 1)
    assert Counter(part_of_groups(made, SHARES, 1).values()) == {0: 28, 1: 6, 2: 6}


@pytest.mark.parametrize("num_values", [1, 40])
def test_rare_values_do_not_all_end_in_the_largest_part(num_values):
    made = [(f"g{i}", (("rare", i % num_values),)) for i in range(40)]
    assert Counter(part_of_groups(made, SHARES, 0).values()) == {0: 28, 1: 6, 2: 6}
