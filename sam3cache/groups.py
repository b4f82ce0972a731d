"""Groups shared out among parts, folds or splits, so that no group is on two sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from sam3cache.errors import ConfigError
from sam3cache.views import view_region

VIEW = "view"
"""Stands for the view region, where no annotation has that name."""

Member = tuple[str, tuple[Hashable, ...]]
"""A sample: its group, and the values that the parts shall have in even shares."""

# Mostly three rounds are enough. Of many groups fewer partners are tried, so that it takes seconds.
_MAX_ROUNDS, _MAX_PARTNERS, _MAX_SWAPS = 20, 32, 100_000


class Annotated(Protocol):
    """A sample, of a manifest or of a store."""

    @property
    def primary_angle_deg(self) -> float | None:
        """LAO positive; None or NaN when unknown."""

    @property
    def secondary_angle_deg(self) -> float | None:
        """Cranial positive; None or NaN when unknown."""

    @property
    def extra(self) -> Mapping[str, str]:
        """Other columns."""


def values_to_share(
    samples: Sequence[Annotated], columns: Sequence[str]
) -> list[tuple[tuple[str, str], ...]]:
    """Return, by sample, its column and value for each column that parts shall share evenly.

    Args:
        samples: all that are to be shared out.
        columns: other columns, or ``VIEW``; a sample may lack a value, which is then "".

    Raises:
        ConfigError: a column that no sample has.
    """
    there = {name for sample in samples for name in sample.extra}
    for name in columns:
        if name not in {*there, VIEW}:
            raise ConfigError(
                f"no sample has the annotation {name!r} to stratify by; expected one of "
                f"{', '.join(sorted({*there, VIEW}))}"
            )

    def value(sample: Annotated, column: str) -> str:
        if column in there:
            return sample.extra.get(column, "")
        return view_region(sample.primary_angle_deg, sample.secondary_angle_deg)

    return [tuple((name, value(sample, name)) for name in columns) for sample in samples]


def fold_of_groups(members: Iterable[Member], num_folds: int, seed: int) -> dict[str, int]:
    """Share groups out among folds of nearly equal size.

    The largest groups come first, each to the fold that is then the least full: first of the
    group's own values, then of samples at all. That is good for values of one kind.

    Folds are not written down but found again when a head is evaluated, so neither this nor
    :func:`part_of_groups` may ever divide otherwise.

    Args:
        members: the samples.
        num_folds: 2 or more.
        seed: groups of one size are taken in an order that it makes.

    Returns:
        By group, its fold, from 0.
    """
    sizes, values = _count(members)
    held: list[Counter[Hashable]] = [Counter() for _ in range(num_folds)]
    num_held = [0] * num_folds
    folds = {}
    for group in _largest_first(sizes, seed):
        own = values[group]

        def fullness(fold: int, own: Counter[Hashable] = own) -> tuple[int, int]:
            return sum(num * held[fold][value] for value, num in own.items()), num_held[fold]

        fold = min(range(num_folds), key=fullness)
        folds[group] = fold
        held[fold] += own
        num_held[fold] += sizes[group]
    return folds


def part_of_groups(members: Iterable[Member], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Share groups out among parts of given shares.

    What is made small is the sum, over all samples and over those of each value, of the squared
    differences between the samples that a part holds and its share of them. The largest groups come
    first, each to where it adds least; then groups are moved, and some pairs change places, as long
    as the sum falls. That need not be the best division there is, which takes too long to find.

    Args:
        members: the samples.
        shares: of the parts, adding up to 1.
        seed: groups of one size are taken in an order that it makes.

    Returns:
        By group, its part, from 0. A part may be empty.
    """
    sizes, values = _count(members)
    # That it is a sample is one value more, which every sample has.
    counts = {group: values[group] + Counter({None: size}) for group, size in sizes.items()}
    in_all: Counter[Hashable] = Counter()
    for own in counts.values():
        in_all.update(own)
    # By part and value, how many samples a part holds beyond its share.
    beyond = [{value: -share * num for value, num in in_all.items()} for share in shares]
    parts: dict[str, int] = {}

    def put(group: str) -> bool:
        """Put a group where it adds least to the sum; return whether that is somewhere new."""
        own, old = counts[group], parts.get(group)
        if old is not None:
            for value, num in own.items():
                beyond[old][value] -= num
        # Of (beyond + num)² - beyond², what differs between parts; rounded, so that the order in
        # which samples came decides no tie.
        added = [
            round(sum(num * excess[value] for value, num in own.items()), 6) for excess in beyond
        ]
        part = min(range(len(shares)), key=added.__getitem__)
        if old is not None and added[part] == added[old]:
            part = old
        for value, num in own.items():
            beyond[part][value] += num
        parts[group] = part
        return part != old

    def swap(first: str, second: str) -> bool:
        """Let two groups change places if that lessens the sum; return whether it did."""
        one, other = beyond[parts[first]], beyond[parts[second]]
        differences = Counter(counts[first])
        differences.subtract(counts[second])
        added = sum(num * (other[value] - one[value] + num) for value, num in differences.items())
        if one is other or round(added, 6) >= 0:
            return False
        for value, num in differences.items():
            one[value] -= num
            other[value] += num
        parts[first], parts[second] = parts[second], parts[first]
        return True

    order = _largest_first(sizes, seed)
    rng = np.random.default_rng(seed)
    num_partners = min(_MAX_PARTNERS, 1 + _MAX_SWAPS // len(order)) if order else 0
    for _ in range(1 + _MAX_ROUNDS):
        num_changes = sum(put(group) for group in order)
        for group in order:
            for place in rng.integers(len(order), size=num_partners):
                num_changes += swap(group, order[place])
        if not num_changes:
            break
    return parts


def _count(
    members: Iterable[Member],
) -> tuple[Counter[str], dict[str, Counter[Hashable]]]:
    """Return, by group, its samples and how many of them have each value."""
    sizes: Counter[str] = Counter()
    values: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for group, own in members:
        sizes[group] += 1
        values[group].update(own)
    return sizes, values


def _largest_first(sizes: Mapping[str, int], seed: int) -> list[str]:
    names = sorted(sizes)
    mixed = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    return sorted(mixed, key=lambda name: -sizes[name])
