"""Cross-validation: groups shared out among parts, so that no group is on both sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from sam3cache.errors import ConfigError
from sam3cache.features import StoredSample


def fold_of_groups(
    samples: Sequence[StoredSample], num_folds: int, seed: int = 0, stratify: str | None = None
) -> dict[str, int]:
    """Share the groups of some samples out among folds of nearly equal size.

    The largest groups come first, each to the fold that is then the least full: first of the
    group's own values of ``stratify``, where that is given, then of samples at all.

    Args:
        samples: of which the groups are; without variants.
        num_folds: 2 or more.
        seed: groups of one size are taken in an order that it makes.
        stratify: annotation whose values the folds shall have in equal shares.

    Returns:
        By group, its fold, from 0.

    Raises:
        ConfigError: there are fewer groups than folds, or no sample has the annotation.
    """
    sizes = Counter(sample.group for sample in samples)
    if len(sizes) < num_folds:
        raise ConfigError(
            f"{num_folds} folds need as many groups, of which there are {len(sizes)}; take fewer "
            "folds, or check the groups (patients) in the manifest"
        )
    values: dict[str, Counter[str]] = defaultdict(Counter)
    if stratify is not None:
        if not any(stratify in sample.extra for sample in samples):
            there = ", ".join(sorted({name for sample in samples for name in sample.extra}))
            raise ConfigError(
                f"no sample has the annotation {stratify!r} to stratify by; expected one of "
                f"{there or 'none: there are no annotations'}"
            )
        for sample in samples:
            values[sample.group][sample.extra.get(stratify, "")] += 1
    names = sorted(sizes)
    mixed = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held: list[Counter[str]] = [Counter() for _ in range(num_folds)]
    num_held = [0] * num_folds
    folds = {}
    for group in sorted(mixed, key=lambda name: -sizes[name]):
        own = values[group]

        def fullness(fold: int, own: Counter[str] = own) -> tuple[int, int]:
            return sum(num * held[fold][value] for value, num in own.items()), num_held[fold]

        fold = min(range(num_folds), key=fullness)
        folds[group] = fold
        held[fold] += own
        num_held[fold] += sizes[group]
    return folds
