"""``sam3cache store annotations split``: new splits of a store, as a user asks for them."""

import json
from collections import Counter, defaultdict

import pytest
from store_builder import build_store

from sam3cache.features import open_store

SMALL = {"fpn_72": (4, 6, 6)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """80 samples of 40 groups, of two classes in turn, with views of all four regions."""
    root = tmp_path_factory.mktemp("made") / "angio.zarr"
    build_store(root, num_samples=80, level_shapes=SMALL, classes=("lad", "rca"), task="multiclass")
    return root


@pytest.fixture
def overlay(made, tmp_path):
    """A folder that keeps what a test sets, so that the store serves the next."""
    return tmp_path / "overlay"


def splits_of(store, overlay):
    return {s.id: s.split for s in open_store(store, overlay=overlay).samples}


def test_splits_are_of_whole_groups_and_as_even_as_they_say(made, overlay, invoke):
    result = invoke(
        *("store", "annotations", "split", made, "--val", 0.2, "--test", 0.1),
        *("--by", "vessel,view", "--overlay", overlay, "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    samples = open_store(made, overlay=overlay).samples
    of_group = defaultdict(set)
    for sample in samples:
        of_group[sample.group].add(sample.split)
    assert {len(splits) for splits in of_group.values()} == {1}
    assert told["num_samples"] == Counter(sample.split for sample in samples)
    assert told["num_samples"] == {"train": 56, "val": 16, "test": 8}
    for vessel, counts in told["num_by_value"]["vessel"].items():
        assert counts == Counter(s.split for s in samples if s.extra["vessel"] == vessel)
        assert counts == {"train": 28, "val": 8, "test": 4}
    assert sum(sum(counts.values()) for counts in told["num_by_value"]["view"].values()) == 80
    assert f"warning: {told['num_moved']} samples were in the training split" in result.stderr


def test_the_same_seed_gives_the_same_splits_and_a_table_tells_them(made, tmp_path, invoke):
    ask = ("store", "annotations", "split", made, "--by", "class")
    first = invoke(*ask, "--overlay", tmp_path / "a")
    again = invoke(*ask, "--overlay", tmp_path / "b")
    other = invoke(*ask, "--overlay", tmp_path / "c", "--seed", 1)
    assert first.exit_code == again.exit_code == other.exit_code == 0, first.output
    assert splits_of(made, tmp_path / "a") == splits_of(made, tmp_path / "b")
    assert splits_of(made, tmp_path / "a") != splits_of(made, tmp_path / "c")
    rows = [line.split() for line in first.stdout.splitlines()]
    assert ["asked", "for", "70.0%", "15.0%", "15.0%"] in rows
    assert ["samples", "56", "(70.0%)", "12", "(15.0%)", "12", "(15.0%)"] in rows
    assert [row[:2] for row in rows if row[:1] == ["class"]] == [["class", "lad"], ["class", "rca"]]


def test_old_splits_are_put_back_from_what_was_shown(made, overlay, invoke, tmp_path):
    shown = invoke("store", "annotations", "show", made)
    (tmp_path / "before.csv").write_text(shown.stdout, encoding="utf-8")
    before = splits_of(made, None)
    ask = ("store", "annotations", "split", made, "--overlay", overlay)
    assert invoke(*ask).exit_code == 0
    assert splits_of(made, overlay) != before
    back = invoke(
        *("store", "annotations", "set", made, "--from", tmp_path / "before.csv"),
        *("--only", "split", "--overlay", overlay),
    )
    assert back.exit_code == 0, back.output
    assert splits_of(made, overlay) == before


def test_a_share_of_nothing_leaves_a_split_empty(made, overlay, invoke):
    ask = ("store", "annotations", "split", made, "--test", 0, "--overlay", overlay)
    assert invoke(*ask).exit_code == 0
    assert set(splits_of(made, overlay).values()) == {"train", "val"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--val 0.6 --test 0.5", "shares of 0.6 for val and 0.5 for test"),
        ("--val 0 --test 0", "shares of 0 for val and 0 for test"),
        ("--val -0.1", "shares of -0.1 for val"),
        ("--val nan", "shares of nan for val"),
        ("--val 0.001", "a share of 0.001 for val is less than a group: 80 samples are in 40"),
        ("--by phase", "no sample has the annotation 'phase' to stratify by; expected one of ves"),
        ("--by vessel,vessel", "names one twice"),
        ("--by class --label-set other", "has no label set other; it has mask"),
    ],
)
def test_impossible_asks_are_refused_in_one_line(made, overlay, invoke, options, expected):
    result = invoke("store", "annotations", "split", made, "--overlay", overlay, *options.split())
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.strip().splitlines()
    assert expected in line


def test_too_few_groups_are_refused(tmp_path, invoke):
    store = build_store(tmp_path / "two.zarr", num_samples=4, level_shapes=SMALL)
    result = invoke("store", "annotations", "split", store)
    assert result.exit_code == 2
    assert "has 2 groups for 3 splits" in result.stderr
