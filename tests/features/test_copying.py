"""Subset, merge and repack: copies are bit-identical, and a crash at any point loses nothing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image
from store_builder import build_store
from worker_thread import one_process

from sam3cache.errors import (
    ConfigError,
    CorruptStoreError,
    FingerprintError,
    StoreError,
    UnsealedStoreError,
)
from sam3cache.features import (
    AnnotationRow,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    describe_store,
    open_store,
    read_samples,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.features.copying import merge, subset
from sam3cache.features.receipts import break_seal
from sam3cache.features.repacking import dead_space, repack
from sam3cache.features.repair import repair_store
from sam3cache.features.verify import verify_store

SMALL = {"fpn_72": (4, 6, 6), "image_1008": (1, 8, 8)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A store of three blocks, with a sample without mask and angles."""
    root = tmp_path_factory.mktemp("base") / "base.zarr"
    return build_store(root, num_samples=40, level_shapes=SMALL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A store of two blocks and one level, quickly copied."""
    root = tmp_path_factory.mktemp("tiny") / "tiny.zarr"
    return build_store(root, num_samples=20, level_shapes={"fpn_72": (1, 2, 2)})


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy.zarr")


def contents(root, *, allow_unsealed=False):
    """All that a store holds of its usable samples, by id, read through their checksums."""
    store = open_store(root, allow_unsealed=allow_unsealed)
    held = {}
    for line in store.sample_rows:
        if line.status != "ok":
            continue
        stored = {name: store.read_stored(name, line.row) for name in store.levels}
        masks = {name: store.read_mask(line.row, name) for name in store.label_sets}
        held[line.id] = (
            {
                name: (
                    values.data_CHW.tobytes(),
                    None if values.scale_C is None else values.scale_C.tobytes(),
                )
                for name, values in stored.items()
            },
            {
                name: None if mask is None else (mask.shape, mask.tobytes())
                for name, mask in masks.items()
            },
            {
                name: replace(store.label_rows(name).get(line.row, LabelRow(0)), row=0)
                for name in store.label_sets
            },
            replace(line, row=0),
            replace(store.annotations[line.row], row=0),
        )
    return held


def files_of(root):
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.name not in (".lock", ".holder.json")
    )


def change_table(root, change):
    """Describe a store anew with another table of samples, and seal it."""
    store = open_store(root)
    rows = [change(row) for row in store.sample_rows]
    gone = {row.row for row in rows if row.status == "removed"}
    with store_lock(root):
        describe_store(
            root,
            settings=store.settings,
            levels={n: (spec, store.fingerprint(n)) for n, spec in store.levels.items()},
            label_sets=store.label_sets,
            samples=rows,
            annotations=[note for row, note in store.annotations.items() if row not in gone],
        )
        seal_store(root)


def remove(root, gone):
    """Make tombstones, as extraction does of what is no longer in the manifest."""

    def change(row):
        return replace(row, status="removed", reason="test") if row.row in gone else row

    change_table(root, change)


# ---------------------------------------------------------------------------- subset


def test_a_subset_holds_its_samples_bit_by_bit_and_leaves_the_source_alone(base, tmp_path):
    before = {name: (base / name).stat().st_mtime_ns for name in files_of(base)}
    seen = []
    result = subset(
        base, tmp_path / "x.zarr", splits=("train", "val"), report=lambda *n: seen.append(n)
    )
    whole, part = contents(base), contents(tmp_path / "x.zarr")
    assert part == {name: held for name, held in whole.items() if held[4].split != "test"}
    assert (result.num_samples, result.num_copied) == (len(part), len(part))
    store = open_store(tmp_path / "x.zarr")
    assert [sample.row for sample in store.samples] == list(range(len(part)))
    assert store.fingerprint("fpn_72") == open_store(base).fingerprint("fpn_72")
    assert store.settings["copied_from"][0]["store"] == "base.zarr"
    assert seen[0] == (0, len(part))
    assert seen[-1] == (len(part), len(part))
    assert {name: (base / name).stat().st_mtime_ns for name in files_of(base)} == before


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"ids": ["s7", "s3", "s3"]}, {"s3", "s7"}),
        ({"where": [("group", "g1")]}, {"s2", "s3"}),
        ({"where": [("group", "g1"), ("group", "g4")]}, {"s2", "s3", "s8", "s9"}),
        ({"where": [("vessel", "LAD"), ("group", "g1")]}, {"s3"}),
        ({"where": [("primary_angle_deg", "-60.0")]}, {"s0"}),
        ({"where": [("primary_angle_deg", "")]}, {"s39"}),
        ({"splits": ["val"], "where": [("group", "g0")]}, {"s1"}),
    ],
)
def test_samples_are_chosen_by_split_id_and_value(base, tmp_path, choice, expected):
    subset(base, tmp_path / "x.zarr", levels=["fpn_72"], label_sets=[], **choice)
    store = open_store(tmp_path / "x.zarr")
    assert {sample.id for sample in store.samples} == expected
    assert (list(store.levels), store.label_sets) == (["fpn_72"], {})


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"splits": ["tset"]}, "split 'tset'; it has: test, train, val"),
        ({"ids": ["s1", "x", "y"]}, "no sample 'x' and 1 more; its ids are such as s0"),
        ({"ids": []}, "no sample of"),
        ({"where": [("vesel", "LAD")]}, "no column 'vesel' to choose by; it has id, source"),
        ({"where": [("vessel", "LCX")]}, "has vessel 'LCX'; it has: LAD, RCA"),
        ({"where": [("group", "g0"), ("vessel", "LAD")], "splits": ["train"]}, "ask for less"),
        ({"levels": ["fpn_73"]}, "level 'fpn_73' is not in"),
        ({"levels": []}, "no level is left"),
        ({"label_sets": ["calcium"]}, "label set 'calcium' is not in"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused_with_what_there_is(base, tmp_path, choice, words):
    with pytest.raises(ConfigError) as caught:
        subset(base, tmp_path / "x.zarr", **choice)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.zarr").exists()


def test_the_same_subset_again_changes_nothing_and_another_one_is_refused(base, tmp_path):
    subset(base, tmp_path / "x.zarr", splits=["val"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x.zarr").rglob("*.*")}
    assert subset(base, tmp_path / "x.zarr", splits=["val"]).num_copied == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(StoreError, match="exists and is not what this command makes"):
        subset(base, tmp_path / "x.zarr", splits=["test"])
    with pytest.raises(StoreError, match="exists and is not what this command makes"):
        subset(base, base, splits=["test"])
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match="is a file"):
        subset(base, tmp_path / "file")
    with pytest.raises(StoreError, match=r"not a feature store \(.* is in it\)"):
        subset(base, tmp_path)


def test_a_damaged_source_stops_the_copy_by_name_and_what_was_copied_counts(copy, tmp_path):
    shard = copy / "levels/fpn_72/c/2/0/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(CorruptStoreError, match="levels/fpn_72/c/2/0/0/0"):
        subset(copy, tmp_path / "x.zarr")
    assert not open_store(tmp_path / "x.zarr", allow_unsealed=True).sealed
    assert len(contents(tmp_path / "x.zarr", allow_unsealed=True)) == 32
    shard.write_bytes(whole)
    assert subset(copy, tmp_path / "x.zarr").num_copied == 8
    assert contents(tmp_path / "x.zarr") == contents(copy)


@pytest.fixture
def no_flush(monkeypatch):
    """Spare the disk's time: what is tested here is the order of operations."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


class PowerCut(BaseException):
    """Nothing reaches the disk any more."""


def with_power_cut(monkeypatch, num_operations, action):
    """Run ``action`` on a disk on which only so many files can be replaced, deleted or removed.

    Returns:
        Whether the power went out before the end.
    """
    left = num_operations

    def limited(operation):
        def run(*arguments, **options):
            nonlocal left
            if left <= 0:
                raise PowerCut
            left -= 1
            return operation(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, limited(getattr(os, name)))
        try:
            action()
        except PowerCut:
            return True
    return False


def test_a_copy_that_dies_after_any_operation_is_completed_by_the_same_command(
    tiny, tmp_path, monkeypatch, no_flush
):
    expected = contents(tiny)
    num_operations, died = 0, True
    while died:
        root = tmp_path / f"{num_operations}.zarr"
        died = with_power_cut(monkeypatch, num_operations, lambda root=root: subset(tiny, root))
        again = subset(tiny, root)
        assert contents(root) == expected
        assert not list(root.rglob("*.partial"))
        if not died:
            assert again.num_copied == 0
        shutil.rmtree(root)
        num_operations += 1
    assert num_operations > 25


# ---------------------------------------------------------------------------- merge


def test_a_merge_holds_every_sample_of_its_stores(tmp_path):
    first = build_store(tmp_path / "a.zarr", num_samples=18, level_shapes=SMALL)
    second = build_store(
        tmp_path / "b.zarr", num_samples=7, level_shapes=SMALL, seed=1, mask_height_px=60
    )
    result = merge([first, second], tmp_path / "x.zarr", prefix=True)
    held = contents(tmp_path / "x.zarr")
    expected = {
        f"{root.stem}-{name}": (
            *values[:3],
            replace(values[3], id=f"{root.stem}-{name}"),
            replace(values[4], id=f"{root.stem}-{name}", group=f"{root.stem}-{values[4].group}"),
        )
        for root in (first, second)
        for name, values in contents(root).items()
    }
    assert held == expected
    assert (result.num_samples, result.warnings) == (25, ())
    store = open_store(tmp_path / "x.zarr")
    assert store.label_sets["mask"].height_px == 60
    assert [entry["store"] for entry in store.settings["copied_from"]] == ["a.zarr", "b.zarr"]


def rename(root, prefix, *, split=None):
    """Give a store's samples other ids and groups."""
    store = open_store(root)
    with store_lock(root):
        describe_store(
            root,
            settings=store.settings,
            levels={n: (spec, store.fingerprint(n)) for n, spec in store.levels.items()},
            label_sets=store.label_sets,
            samples=[replace(row, id=prefix + row.id) for row in store.sample_rows],
            annotations=[
                replace(note, id=prefix + note.id, split=split or note.split)
                for note in store.annotations.values()
            ],
        )
        seal_store(root)
    return root


def test_the_same_pictures_and_groups_in_two_stores_are_told_and_leaks_among_them(tmp_path):
    first = build_store(tmp_path / "a.zarr", level_shapes=SMALL, splits=("train",))
    twin = rename(build_store(tmp_path / "b.zarr", level_shapes=SMALL, splits=("train",)), "b")
    same = merge([first, twin], tmp_path / "x.zarr").warnings
    assert same == (
        "6 pictures are in more than one of the stores, such as s0 and bs0: they are copied as "
        "often",
        "3 groups are in more than one of the stores, such as g0: they are taken as the same "
        "patients; pass --prefix if they are not",
    )
    rename(twin, "", split="test")
    leaks = merge([first, twin], tmp_path / "y.zarr").warnings
    assert len(leaks) == 4
    assert leaks[1].startswith(
        "6 of these pictures are in more than one split, such as s0 in train and bs0 in test"
    )
    assert leaks[3].startswith("3 of these groups are in more than one split, such as g0 in test, ")
    only_pictures = merge([first, twin], tmp_path / "z.zarr", prefix=True).warnings
    assert [line[:10] for line in only_pictures] == ["6 pictures", "6 of these"]


def test_grey_pictures_are_repeated_where_another_store_has_colour(tmp_path):
    grey = build_store(tmp_path / "grey.zarr", level_shapes={"image_1008": (1, 8, 8)})
    colour = build_store(tmp_path / "rgb.zarr", level_shapes={"image_1008": (3, 8, 8)}, seed=1)
    for root, num_channels in ((grey, 1), (colour, 3)):
        set_fingerprint(root, "image_1008", num_channels=num_channels)
    merge([grey, colour], tmp_path / "x.zarr", prefix=True)
    store = open_store(tmp_path / "x.zarr")
    assert store.fingerprint("image_1008").fields["num_channels"] == 3
    for sample in store.samples:
        name, identity = sample.id.split("-")
        source = open_store(tmp_path / f"{name}.zarr")
        (row,) = [s.row for s in source.samples if s.id == identity]
        expected = np.broadcast_to(source.read("image_1008", row), (3, 8, 8))
        assert np.array_equal(store.read("image_1008", sample.row), expected)


def set_fingerprint(root, level, **fields):
    """Rebuild a store's blocks as if its level had been made with other fields."""
    store = open_store(root)
    fingerprint = Fingerprint({**store.fingerprint(level).fields, **fields})
    with store_lock(root):
        describe_store(
            root,
            settings=store.settings,
            levels={level: (store.levels[level], fingerprint)},
            label_sets=store.label_sets,
            samples=store.sample_rows,
            annotations=list(store.annotations.values()),
        )
        values = {s.row: store.read_stored(level, s.row) for s in store.samples}
        write_level_block(root, store.levels[level], fingerprint.digest, 0, values)
        seal_store(root)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Stores that do not fit each other, each in its own way."""
    root = tmp_path_factory.mktemp("others")
    build_store(root / "a.zarr", level_shapes=SMALL)
    build_store(root / "same-ids.zarr", level_shapes=SMALL, seed=1)
    build_store(root / "weights.zarr", level_shapes=SMALL, weights="new")
    build_store(root / "shape.zarr", level_shapes={**SMALL, "fpn_72": (4, 6, 8)})
    build_store(root / "less.zarr", level_shapes={"fpn_72": (4, 6, 6)})
    build_store(root / "other.zarr", level_shapes={"fpn_144": (4, 6, 6)})
    build_store(root / "unsealed.zarr", level_shapes=SMALL, seal=False)
    build_store(root / "deep" / "a.zarr", level_shapes=SMALL, seed=2)
    classes = build_store(root / "classes.zarr", level_shapes=SMALL, seed=3)
    store = open_store(classes)
    with store_lock(classes):
        describe_store(
            classes,
            settings=store.settings,
            levels={n: (spec, store.fingerprint(n)) for n, spec in store.levels.items()},
            label_sets={"mask": replace(store.label_sets["mask"], classes=("stent",))},
            samples=store.sample_rows,
            annotations=list(store.annotations.values()),
        )
        seal_store(classes)
    return root


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        (["a", "same-ids"], {}, StoreError, "sample 's0' is in"),
        (["a", "same-ids"], {}, StoreError, "--prefix to put"),
        (["a", "weights"], {}, FingerprintError, "weights_sha256: test → new"),
        (["weights", "a"], {}, FingerprintError, "weights_sha256: new → test"),
        (["a", "weights"], {}, FingerprintError, "others/weights.zarr"),
        (["a", "weights"], {}, FingerprintError, "leave the level out with --levels image_1008"),
        (["a", "shape"], {}, FingerprintError, "its shapes differ"),
        (["a", "less"], {}, StoreError, "less.zarr has no level image_1008"),
        (["less", "a"], {}, StoreError, "leave it out with --levels fpn_72"),
        (["less", "other"], {}, StoreError, "no level is in all of the stores"),
        (["a", "less"], {"levels": ["fpn_73"]}, ConfigError, "level 'fpn_73' is not in"),
        (["a", "unsealed"], {}, UnsealedStoreError, "unsealed.zarr is not sealed"),
        (["a", "nowhere"], {}, StoreError, "nowhere.zarr does not exist"),
        (["a", "a"], {}, ConfigError, "each of them once"),
        (["a"], {}, ConfigError, "two stores or more"),
        (["a", "deep/a"], {"prefix": True}, ConfigError, "same name|called 'a'"),
        (["a", "classes"], {"prefix": True}, StoreError, "classes vessel in"),
    ],
)
def test_stores_that_do_not_fit_are_refused_with_what_to_do(
    others, tmp_path, names, options, error, words
):
    with pytest.raises(error) as caught:
        merge([others / f"{name}.zarr" for name in names], tmp_path / "x.zarr", **options)
    message = str(caught.value).replace(str(others), "others")
    assert any(word in message for word in words.split("|")), message
    assert "\n" not in message
    assert not (tmp_path / "x.zarr").exists()


def test_what_does_not_fit_can_be_left_out(others, tmp_path):
    merge(
        [others / "a.zarr", others / "less.zarr"],
        tmp_path / "x.zarr",
        levels=["fpn_72"],
        label_sets=[],
        prefix=True,
    )
    assert len(contents(tmp_path / "x.zarr")) == 12


# ---------------------------------------------------------------------------- precisions


def precise_store(root, num_samples=3):
    """A store with a level of every precision, and two label sets, one of two planes."""
    names = ("fpn_72", "fpn_72.bf16", "fpn_72.r7", "fpn_72.int8", "fpn_72.r5")
    levels = {n: (LevelSpec(n, (4, 6, 6)), Fingerprint({"level": n})) for n in names}
    sets = {
        "mask": LabelSetSpec("mask", ("vessel",), 20, 30),
        "parts": LabelSetSpec("parts", ("artery", "catheter"), 1100, 40),
    }
    rows = [SampleRow(i, f"s{i}", f"{i}.png", i or None, 9, 9, 1, 5, 6) for i in range(num_samples)]
    with store_lock(root):
        describe_store(
            root,
            settings={"backbone": "test", "größe": 1},
            levels=levels,
            label_sets=sets,
            samples=rows,
            annotations=[
                AnnotationRow(i, f"s{i}", "train", "", None, 3.5, {"a/b%": "ü"} if i else {})
                for i in range(num_samples)
            ],
        )
    rng = np.random.default_rng(0)
    values = {i: rng.normal(size=(4, 6, 6)).astype(np.float32) for i in range(num_samples)}
    for spec, fingerprint in levels.values():
        write_level_block(root, spec, fingerprint.digest, 0, values)
    sources = {i: LabelRow(i, source=f"m{i}.png", size_bytes=7, mtime_ns=8) for i in values}
    for name, label_set in sets.items():
        masks = {
            i: rng.integers(0, 2, (label_set.num_planes, 10 + i, 20), dtype=np.uint8)
            for i in values
        }
        if name == "parts":
            masks[0] = rng.integers(0, 2, label_set.shape, dtype=np.uint8)
            masks[1] = None
        write_label_block(root, label_set, 0, masks, sources)
    write_sample_facts(root, 0, [replace(r, status="ok", pixel_sha256=f"{r.row}") for r in rows])
    with store_lock(root):
        seal_store(root)
    return root


def test_every_precision_and_label_set_is_copied_as_it_is_stored(tmp_path):
    source = precise_store(tmp_path / "a.zarr")
    subset(source, tmp_path / "x.zarr", ids=["s2", "s0", "s1"])
    assert contents(tmp_path / "x.zarr") == contents(source)
    shards = [name for name in files_of(source) if "/c/" in name]
    assert any(".int8.scale/c/" in name for name in shards)
    for name in shards:
        assert (tmp_path / "x.zarr" / name).read_bytes() == (source / name).read_bytes()


# ---------------------------------------------------------------------------- repack


def test_repack_leaves_a_store_without_dead_samples_as_it_is(copy):
    before = {name: (copy / name).stat().st_mtime_ns for name in files_of(copy)}
    result = repack(copy)
    assert (result.num_moved, result.num_dropped, result.num_strays) == (0, 0, 0)
    assert result.freed_bytes == 0
    assert {name: (copy / name).stat().st_mtime_ns for name in files_of(copy)} == before


def test_repack_gives_back_the_space_of_what_is_gone(copy):
    # Block 0 loses some, block 1 all; block 2 is not full.
    gone = {1, 5, *range(16, 32)}
    remove(copy, gone)
    expected = contents(copy)
    assert len(expected) == 22
    assert dead_space(open_store(copy)).num_samples == 18
    before_bytes = sum((copy / name).stat().st_size for name in files_of(copy) if "/c/" in name)
    result = repack(copy)
    assert contents(copy) == expected
    after_bytes = sum((copy / name).stat().st_size for name in files_of(copy) if "/c/" in name)
    assert (result.num_dropped, result.num_moved) == (18, 14)
    assert result.freed_bytes == before_bytes - after_bytes > 0
    assert result.size_bytes == after_bytes
    store = open_store(copy)
    assert dead_space(store) == type(dead_space(store))(0, 0)
    # Old rows are given to nobody else, and leave neither files nor folders.
    assert {s.row for s in store.samples} == {*range(32, 40), *range(48, 62)}
    assert not (copy / "levels/fpn_72/c/0").exists()
    assert repack(copy).num_moved == 0


def test_repack_moves_every_precision_and_label_set_as_it_is_stored(tmp_path):
    root = precise_store(tmp_path / "a.zarr")
    remove(root, {1})
    expected = contents(root)
    assert repack(root).num_moved == 2
    assert contents(root) == expected
    assert verify_store(root).findings == ()


def test_a_row_that_was_given_once_is_not_given_again(copy):
    remove(copy, set(range(32, 40)))
    repack(copy)
    rows = open_store(copy).sample_rows
    assert (rows[-1].row, rows[-1].status, rows[-1].pixel_sha256) == (39, "removed", "")
    assert [row.row for row in rows[:-1]] == list(range(32))
    assert repack(copy).num_dropped == 0


def test_samples_set_aside_keep_their_line_and_lose_their_features(copy):
    def change(row):
        return replace(row, status="aside", reason="bad mask") if row.row == 3 else row

    change_table(copy, change)
    expected = contents(copy)
    assert repack(copy).num_dropped == 1
    assert contents(copy) == expected
    (aside,) = open_store(copy).set_aside
    assert (aside.id, aside.reason) == ("s3", "bad mask")


def test_many_blocks_of_few_samples_become_one(tmp_path):
    root = build_store(tmp_path / "x.zarr", num_samples=16 * 16, level_shapes={"fpn_72": (1, 2, 2)})
    remove(root, {row for row in range(256) if row % 16})
    repack(root)
    # What sixteen additions of one sample each leave: every block holds one.
    store = open_store(root)
    assert len({sample.row // 16 for sample in store.samples}) == 1
    expected = contents(root)
    apart = tmp_path / "apart.zarr"
    spread(root, apart)
    assert dead_space(open_store(apart)).num_samples == 0
    num_files = len(files_of(apart))
    result = repack(apart)
    assert (result.num_moved, result.num_dropped) == (16, 0)
    assert contents(apart) == expected
    assert len(files_of(apart)) == num_files - 2 * 15


def spread(source, root):
    """Write a store anew with every sample in a block of its own."""
    store = open_store(source)
    lines = {line.row: line for line in store.sample_rows if line.status == "ok"}
    spec, fingerprint = store.levels["fpn_72"], store.fingerprint("fpn_72")
    numbered = list(enumerate(lines.values()))
    with store_lock(root):
        describe_store(
            root,
            settings=store.settings,
            levels={"fpn_72": (spec, fingerprint)},
            label_sets=store.label_sets,
            samples=[replace(line, row=16 * block) for block, line in numbered],
            annotations=[
                replace(store.annotations[line.row], row=16 * block) for block, line in numbered
            ],
        )
        for block, line in numbered:
            values = {16 * block: store.read_stored("fpn_72", line.row)}
            write_level_block(root, spec, fingerprint.digest, block, values)
            mask = store.read_mask(line.row)
            note = replace(store.label_rows("mask")[line.row], row=16 * block)
            write_label_block(
                root, store.label_sets["mask"], block, {16 * block: mask}, {16 * block: note}
            )
            write_sample_facts(root, block, [replace(line, row=16 * block)])
        seal_store(root)


def test_files_that_nothing_names_are_deleted_and_others_kept(copy):
    (copy / "levels/fpn_72/c/7/0/0").mkdir(parents=True)
    (copy / "levels/fpn_72/c/7/0/0/0").write_bytes(b"x" * 100)
    (copy / "levels/fpn_72/c/0/0/0/.0.12345678.partial").write_bytes(b"x" * 10)
    (copy / ".samples.parquet.12345678.partial").write_bytes(b"x")
    (copy / "receipts/samples").mkdir(parents=True, exist_ok=True)
    (copy / "receipts/samples/00000009.json").write_text("{}", encoding="utf-8")
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    expected = contents(copy)
    result = repack(copy)
    assert (result.num_strays, result.freed_bytes) == (4, 113)
    assert contents(copy) == expected
    assert (copy / "notes.txt").exists()
    assert not (copy / "levels/fpn_72/c/7").exists()


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_repack_dies_after_any_operation_and_loses_nothing(
    tiny, tmp_path, monkeypatch, no_flush, step
):
    prepared = shutil.copytree(tiny, tmp_path / "prepared.zarr")
    # Block 0 loses some, block 1 all.
    remove(prepared, {0, 2, *range(16, 20)})
    expected = contents(prepared)
    num_operations, died = 0, True
    while died:
        root = shutil.copytree(prepared, tmp_path / f"{num_operations}.zarr")
        died = with_power_cut(monkeypatch, num_operations, lambda root=root: repack(root))
        assert contents(root, allow_unsealed=True) == expected
        if num_operations % 2:
            repair_store(root)
        again = repack(root)
        assert contents(root) == expected
        assert dead_space(open_store(root)).num_samples == 0
        named = {s.key for r in open_store(root).receipts.values() for s in r.shards}
        assert {name for name in files_of(root) if "/c/" in name} == named
        assert verify_store(root).findings == ()
        assert not list(root.rglob("*.partial"))
        if not died:
            assert (again.num_moved, again.num_strays) == (0, 0)
        shutil.rmtree(root)
        num_operations += step
    assert num_operations > 60


def test_a_store_that_is_being_extracted_is_not_repacked(base, copy, tmp_path):
    break_seal(copy)
    shutil.rmtree(copy / "levels/fpn_72/c/1")
    with pytest.raises(UnsealedStoreError, match="extraction has not finished"):
        repack(copy)
    with pytest.raises(StoreError, match="does not exist"):
        repack(tmp_path / "nowhere.zarr")
    assert not (tmp_path / "nowhere.zarr").exists()


# ---------------------------------------------------------------------------- with extraction


def run(folder, output):
    from sam3cache.extract import ExtractConfig, extract

    with one_process():
        return extract(ExtractConfig(folder, output, levels=("image_1008",), backbone="sam3-mini"))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Six pictures, extracted; then one changed and one taken out, and extracted again."""
    folder = write_images(tmp_path_factory.mktemp("pictures") / "pictures", num_images=6)
    store = folder.parent / "x.zarr"
    run(folder, store)
    Image.fromarray(np.full((96, 128), 200, np.uint8)).save(folder / "images/00.png")
    manifest = folder / "manifest.csv"
    lines = manifest.read_text(encoding="utf-8").splitlines()
    manifest.write_text("\n".join(line for line in lines if "s02" not in line), encoding="utf-8")
    result = run(folder, store)
    assert (result.num_computed, result.num_removed) == (1, 2)
    return folder.parent


def test_extraction_after_a_repack_computes_nothing(extracted, tmp_path):
    place = shutil.copytree(extracted, tmp_path / "copy")
    expected = contents(place / "x.zarr")
    result = repack(place / "x.zarr")
    assert (result.num_dropped, result.num_moved) == (2, 5)
    assert contents(place / "x.zarr") == expected
    again = run(place / "pictures", place / "x.zarr")
    assert (again.num_computed, again.num_relabelled, again.num_kept) == (0, 0, 5)
    assert again.sealed


def test_extraction_completes_a_repack_that_died(extracted, tmp_path, monkeypatch, no_flush):
    expected = contents(extracted / "x.zarr")
    num_operations, died = 0, True
    while died:
        place = shutil.copytree(extracted, tmp_path / str(num_operations))
        root = place / "x.zarr"
        died = with_power_cut(monkeypatch, num_operations, lambda root=root: repack(root))
        result = run(place / "pictures", root)
        assert (result.num_computed, result.num_relabelled) == (0, 0)
        assert contents(root) == expected
        assert {finding.kind for finding in verify_store(root).findings} <= {"stray"}
        repack(root)
        assert contents(root) == expected
        assert dead_space(open_store(root)).num_samples == 0
        shutil.rmtree(place)
        num_operations += 3


def test_a_sample_added_after_a_repack_that_died_gets_features_of_its_own(
    extracted, tmp_path, monkeypatch
):
    """The blocks that the dead repack had begun to write must not pass for those of new samples."""
    place = shutil.copytree(extracted, tmp_path / "copy")
    root = place / "x.zarr"
    assert with_power_cut(monkeypatch, 13, lambda: repack(root))
    assert list((root / "receipts").glob("levels.*/*.json"))
    assert read_samples(root)[-1].status == "removed"
    Image.fromarray(np.full((96, 96), 77, np.uint8)).save(place / "pictures/images/new.png")
    with (place / "pictures/manifest.csv").open("a", encoding="utf-8") as file:
        file.write("\nnew,images/new.png,,0,0,train,new\n")
    assert run(place / "pictures", root).num_computed == 1
    store = open_store(root)
    (new,) = [sample for sample in store.samples if sample.id == "new"]
    assert (store.read("image_1008", new.row)[0, :900, :900] == 77).all()


def test_extraction_on_a_subset_with_its_part_of_the_manifest_computes_nothing(extracted, tmp_path):
    place = shutil.copytree(extracted, tmp_path / "copy")
    subset(place / "x.zarr", place / "y.zarr", splits=["train"])
    manifest = place / "pictures/manifest.csv"
    lines = manifest.read_text(encoding="utf-8").splitlines()
    part = [line for line in lines[1:] if ",train," in line]
    manifest.write_text("\n".join([lines[0], *part]), encoding="utf-8")
    result = run(place / "pictures", place / "y.zarr")
    assert (result.num_computed, result.num_kept) == (0, len(part))
    assert Path(place / "y.zarr/complete.json").exists()
