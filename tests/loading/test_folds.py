"""Folds divide groups, not images, evenly and always alike."""

from collections import Counter
from dataclasses import replace

import pytest

from sam3cache.errors import ConfigError
from sam3cache.features import StoredSample
from sam3cache.loading.folds import fold_of_groups


def samples(sizes: list[int], **extra: list[str]) -> list[StoredSample]:
    """Images of groups of some sizes; ``extra`` has by annotation a value a group."""
    made = []
    for group, size in enumerate(sizes):
        for _ in range(size):
            notes = {name: values[group] for name, values in extra.items()}
            row = len(made)
            made.append(
                StoredSample(
                    row, f"s{row}", "x.png", None, 9, 9, "", 0, 0, "train", f"g{group}", notes
                )
            )
    return made


def test_folds_are_nearly_equal_and_each_group_is_in_one() -> None:
    own = samples([9, 1, 1, 5, 4, 4, 3, 2, 2, 2, 1, 1])
    folds = fold_of_groups(own, 5)
    assert folds.keys() == {f"g{i}" for i in range(12)}
    counts = Counter(folds[sample.group] for sample in own)
    assert sorted(counts.values()) == [6, 6, 7, 7, 9]  # no fold can be smaller than a group


def test_folds_depend_on_their_seed_alone() -> None:
    own = samples([1] * 20)
    assert fold_of_groups(own, 5, 3) == fold_of_groups(own[::-1], 5, 3)
    assert fold_of_groups(own, 5, 3) != fold_of_groups(own, 5, 4)


def test_an_annotation_is_shared_out_evenly() -> None:
    own = samples([1] * 20, vessel=["LAD"] * 5 + ["RCA"] * 15)
    for seed in range(5):
        folds = fold_of_groups(own, 5, seed, "vessel")
        of_lad = Counter(folds[sample.group] for sample in own[:5])
        assert of_lad == dict.fromkeys(range(5), 1)
        assert set(Counter(folds.values()).values()) == {4}


def test_view_regions_and_several_annotations_are_shared_out_evenly() -> None:
    own = samples([1] * 24, vessel=["LAD", "RCA"] * 12)
    views = [(-30.0, 20.0), (30.0, 20.0), (30.0, -20.0)]
    own = [
        replace(s, primary_angle_deg=views[i // 2 % 3][0], secondary_angle_deg=views[i // 2 % 3][1])
        for i, s in enumerate(own)
    ]
    folds = fold_of_groups(own, 4, 0, "vessel, view")
    for members in (own[::2], [s for s in own if s.secondary_angle_deg < 0]):
        counts = Counter(folds[sample.group] for sample in members)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_folds_are_those_of_earlier_versions() -> None:
    # Evaluation finds them again for runs that were trained long ago.
    own = samples([3, 1, 2, 2, 1, 1], vessel=["a", "b", "a", "b", "a", "b"])
    earlier = {"g0": 0, "g1": 0, "g2": 1, "g3": 1, "g4": 1, "g5": 0}
    assert fold_of_groups(own, 2, 5, "vessel") == earlier


@pytest.mark.parametrize(
    ("num_folds", "stratify", "expected"),
    [
        (4, None, r"4 folds need as many groups, of which there are 3; take fewer"),
        (2, "side", r"no sample has the annotation 'side' .*; expected one of vessel"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    num_folds: int, stratify: str | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        fold_of_groups(samples([2, 2, 2], vessel=["a", "b", "c"]), num_folds, 0, stratify)
