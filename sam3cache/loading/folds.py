"""Cross-validation: groups shared out among folds, so that no group is on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from sam3cache import groups
from sam3cache.errors import ConfigError
from sam3cache.features import StoredSample


def fold_of_groups(
    samples: Sequence[StoredSample], num_folds: int, seed: int = 0, stratify: str | None = None
) -> dict[str, int]:
    """Share the groups of some samples out among folds of nearly equal size.

    Args:
        samples: of which the groups are; without variants.
        num_folds: 2 or more.
        seed: of the division.
        stratify: annotation whose values the folds shall have in equal shares, "view" for the view
            region; or several of them with commas between.

    Returns:
        By group, its fold, from 0.

    Raises:
        ConfigError: there are fewer groups than folds, or no sample has the annotation.
    """
    num_groups = len({sample.group for sample in samples})
    if num_groups < num_folds:
        raise ConfigError(
            f"{num_folds} folds need as many groups, of which there are {num_groups}; take fewer "
            "folds, or check the groups (patients) in the manifest"
        )
    columns = [] if stratify is None else [name.strip() for name in stratify.split(",")]
    values = groups.values_to_share(samples, columns)
    members = [(sample.group, own) for sample, own in zip(samples, values, strict=True)]
    if len(columns) > 1:
        return groups.part_of_groups(members, [1 / num_folds] * num_folds, seed)
    return groups.fold_of_groups(members, num_folds, seed)
