import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from store_builder import build_store

from sam3cache.errors import ConfigError, NotAStoreError, StoreBusyError, StoreError
from sam3cache.features import (
    AnnotationRow,
    LabelRow,
    open_store,
    read_annotations,
    read_samples,
    repair_store,
    seal_store,
    store_lock,
    verify_store,
    write_label_block,
    write_level_block,
)
from sam3cache.features.files import canonical_json, sha256_of_json
from sam3cache.features.receipts import break_seal, fold_receipts, read_receipts
from sam3cache.features.tables import write_annotations
from sam3cache.features.writer import finish_seal

SHAPES = {"fpn_72": (4, 12, 12), "fpn_72.int8": (4, 12, 12), "image_1008": (1, 48, 48)}
LEVEL_SHARD = "levels/fpn_72/c/1/0/0/0"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build_store(
        tmp_path_factory.mktemp("sound") / "x.zarr", num_samples=20, level_shapes=SHAPES
    )


@pytest.fixture
def store(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "x.zarr"))


def flip(path, offset=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 1
    path.write_bytes(data)


def seal_again(store, change):
    """Change what a seal says, and give it the hash of that: a writer's mistake, no damage."""
    path = store / "complete.json"
    content = json.loads(path.read_bytes())
    change(content)
    content["seal"] = sha256_of_json({k: v for k, v in content.items() if k != "seal"})
    for each in (path, store / "receipts/sealed.json"):
        each.write_bytes(canonical_json(content))


def receipt_in(content, item, block):
    return next(r for r in content["receipts"] if (r["item"], r["block"]) == (item, block))


def test_a_sound_store_has_nothing_to_tell(sound):
    seen = []
    result = verify_store(sound, report=lambda done, total: seen.append((done, total)))
    assert result.findings == ()
    assert result.sealed
    assert result.num_samples == 20
    # Two blocks: three levels, scales of one, and masks.
    assert (result.num_shards, result.num_shards_read) == (10, 10)
    shards = [p for p in sound.rglob("*") if p.is_file() and "c" in p.relative_to(sound).parts]
    assert result.num_bytes == sum(path.stat().st_size for path in shards)
    assert seen[-1] == (result.num_bytes, result.num_bytes)
    assert result.num_files == len(
        [p for p in sound.rglob("*") if p.is_file() and p.parent.name != "claims"]
    )


@pytest.mark.parametrize(
    ("name", "damage", "kind", "block", "rows"),
    [
        (LEVEL_SHARD, lambda p: flip(p, 1160 * 2), "checksum", 1, (18,)),
        (LEVEL_SHARD, lambda p: flip(p, -30), "checksum", 1, (16, 17, 18, 19)),
        (LEVEL_SHARD, lambda p: p.write_bytes(p.read_bytes()[:-1]), "size", 1, (16, 17, 18, 19)),
        (LEVEL_SHARD, lambda p: p.unlink(), "missing", 1, (16, 17, 18, 19)),
        ("levels/fpn_72.int8.scale/c/0/0", lambda p: flip(p, 3), "checksum", 0, (0,)),
        ("levels/image_1008/c/1/0/0/0", lambda p: flip(p, 40), "checksum", 1, (16,)),
        ("labels/mask/masks/c/1/0/0/0", lambda p: flip(p, 20), "checksum", 1, (16,)),
        ("zarr.json", flip, "metadata", None, ()),
        ("zarr.json", lambda p: p.write_bytes(b""), "metadata", None, ()),
        ("levels/fpn_72/zarr.json", flip, "metadata", None, ()),
        ("labels/mask/zarr.json", lambda p: p.unlink(), "metadata", None, ()),
        ("levels/zarr.json", lambda p: p.write_bytes(b"[" * 10_000), "metadata", None, ()),
        ("samples.parquet", flip, "table", None, ()),
        ("annotations.parquet", lambda p: p.unlink(), "table", None, ()),
        ("labels/mask/rows.parquet", lambda p: p.write_bytes(b"PAR1"), "table", None, ()),
        ("complete.json", lambda p: flip(p, 5), "seal", None, ()),
        ("complete.json", lambda p: p.unlink(), "seal", None, ()),
        ("receipts/sealed.json", flip, "seal", None, ()),
        ("receipts/sealed.json", lambda p: p.unlink(), "seal", None, ()),
    ],
)
def test_damage_is_told_with_what_it_concerns(store, name, damage, kind, block, rows):
    damage(store / name)
    found = verify_store(store).damage
    assert [(f.kind, f.path, f.block, f.rows) for f in found] == [(kind, name, block, rows)]


def test_a_shard_in_the_place_of_another_of_the_same_size_is_found(tmp_path):
    store = build_store(tmp_path / "x.zarr", num_samples=32, level_shapes={"fpn_72": (4, 12, 12)})
    first, second = (store / f"levels/fpn_72/c/{block}/0/0/0" for block in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    assert len(data[0]) == len(data[1])
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    found = verify_store(store).damage
    assert [(f.kind, f.block, len(f.rows)) for f in found] == [
        ("checksum", 0, 16),
        ("checksum", 1, 16),
    ]


def test_the_search_does_not_end_at_the_first_finding(store):
    for name in (LEVEL_SHARD, "levels/image_1008/c/0/0/0/0", "labels/zarr.json", "samples.parquet"):
        (store / name).unlink()
    found = verify_store(store).damage
    assert {f.path for f in found} == {
        LEVEL_SHARD,
        "levels/image_1008/c/0/0/0/0",
        "labels/zarr.json",
        "samples.parquet",
    }


def move_row(content):
    receipt_in(content, "levels.fpn_72", 1)["rows"][-1] = 21


def other_digest(content):
    receipt_in(content, "levels.fpn_72", 1)["digest"] = "0" * 64


def other_shard(content):
    receipt_in(content, "levels.fpn_72", 1)["shards"][0][0] = "levels/fpn_72/c/0/0/0/0"


def other_block(content):
    receipt_in(content, "levels.fpn_72", 1)["block"] = 7


def unknown_item(content):
    receipt_in(content, "levels.fpn_72", 1)["item"] = "levels.fpn_9"


def other_mask_size(content):
    receipt_in(content, "labels.mask", 1)["facts"]["height_px"][0] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_row, "not those of its rows|other rows than|checksums of"),
        (other_digest, "digest is not that of the level's fingerprint"),
        (other_shard, "files that it names are not those of its rows"),
        (other_block, "there are blocks 0 to 1"),
        (unknown_item, "there is no such level"),
        (other_mask_size, "differs from rows.parquet"),
        (lambda c: c["receipts"].pop(0), "no receipt vouches"),
        (lambda c: c["hashes"].pop("samples.parquet"), "no hash of samples.parquet"),
    ],
)
def test_a_receipt_that_cannot_be_right_is_found_though_the_seal_is(store, change, message):
    seal_again(store, change)
    found = verify_store(store).damage
    assert any(re.search(message, finding.message) for finding in found), found


def test_values_that_are_not_finite_are_found_though_their_checksum_is_right(store):
    opened = open_store(store)
    spec, digest = opened.levels["fpn_72"], opened.fingerprint("fpn_72").digest
    values = {row: opened.read_stored("fpn_72", row) for row in range(16, 20)}
    values[17].data_CHW[1, 2, 3] = np.inf
    break_seal(store)
    write_level_block(store, spec, digest, 1, values)
    with store_lock(store):
        seal_store(store)
    (finding,) = verify_store(store).damage
    assert (finding.kind, finding.rows) == ("content", (17,))
    assert "infinite" in finding.message


def test_values_of_masks_are_looked_at(store):
    opened = open_store(store)
    spec = opened.label_sets["mask"]
    masks = {row: opened.read_mask(row) for row in range(16, 20)}
    sources = {row: LabelRow(row, source=f"masks/{row}.png") for row in masks}
    break_seal(store)
    write_label_block(store, spec, 1, masks, sources)
    with store_lock(store):
        seal_store(store)
    assert verify_store(store).damage == ()
    # A row that loses its mask in the table alone.
    seal_again(
        store,
        lambda content: receipt_in(content, "labels.mask", 1)["facts"]["present"].__setitem__(
            0, False
        ),
    )
    assert {f.kind for f in verify_store(store).damage} == {"receipt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda notes: notes[1:], "lacks samples"),
        (lambda notes: notes[::-1], "not ascending"),
        (lambda notes: [*notes, AnnotationRow(40, "s40", "train", "g")], "has rows that"),
        (lambda notes: [*notes[:-1], AnnotationRow(19, "s7", "train", "g")], "other ids"),
        (lambda notes: [*notes[:-1], AnnotationRow(19, "s19", "often", "g")], "has splits"),
        (
            lambda notes: [*notes[:-1], AnnotationRow(19, "s19", "val", "g", float("inf"))],
            "angles that are not finite",
        ),
    ],
)
def test_tables_that_contradict_each_other_are_found(store, change, message):
    break_seal(store)
    write_annotations(store, change(read_annotations(store)))
    with store_lock(store):
        seal_store(store)
    (finding,) = verify_store(store).damage
    assert (finding.kind, finding.path) == ("table", "annotations.parquet")
    assert message in finding.message


def test_files_that_nothing_names_are_notes(store):
    (store / "levels/fpn_72/c/9").mkdir()
    (store / "levels/fpn_72/c/9/0").write_bytes(b"left over")
    result = verify_store(store)
    assert result.damage == ()
    assert [(f.kind, f.path) for f in result.findings] == [("stray", "levels/fpn_72/c/9/0")]


def test_what_is_still_to_be_done_is_no_damage(tmp_path):
    store = build_store(tmp_path / "x.zarr", num_samples=20, level_shapes=SHAPES, seal=False)
    assert verify_store(store).findings == ()
    for item in ("levels.fpn_72", "samples"):
        (store / f"receipts/{item}/00000001.json").unlink()
    result = verify_store(store)
    assert not result.sealed
    assert result.damage == ()
    # The files of that block are named by nothing as long as it is not done.
    assert [f.kind for f in result.findings] == ["unfinished", "stray"]


@pytest.mark.parametrize("item", ["levels.fpn_72", "labels.mask", "samples"])
def test_every_byte_of_a_single_receipt_counts(tmp_path, item):
    store = build_store(tmp_path / "x.zarr", num_samples=20, level_shapes=SHAPES, seal=False)
    path = store / f"receipts/{item}/00000001.json"
    data = path.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(data), 20):
        damaged = bytearray(data)
        damaged[offset] ^= 2
        path.write_bytes(damaged)
        assert any(f.path.endswith("00000001.json") for f in verify_store(store).damage), offset


def test_a_share_of_the_blocks_is_read_and_all_of_the_structure(store):
    flip(store / LEVEL_SHARD, 10)
    (store / "levels/image_1008/c/1/0/0/0").unlink()
    shares = [verify_store(store, 0.5, seed=seed) for seed in range(6)]
    assert {result.num_shards_read for result in shares} == {5}
    assert all(any(f.kind == "missing" for f in result.damage) for result in shares)
    # One of two blocks, by chance the damaged one or the other.
    assert {len(result.damage) for result in shares} == {1, 2}
    again = verify_store(store, 0.5, seed=3)
    assert again.findings == shares[3].findings


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(sound, share):
    with pytest.raises(ConfigError, match="expected above 0"):
        verify_store(sound, share)


def test_what_is_no_store_and_a_newer_format_are_refused(store, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError):
        verify_store(tmp_path / "empty")
    with pytest.raises(NotAStoreError):
        verify_store(tmp_path / "nowhere")
    break_seal(store)
    path = store / "zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["sam3cache"]["format_version"] = 99
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StoreError, match="format version 99"):
        verify_store(store)


def test_damage_of_a_store_that_changes_meanwhile_is_not_believed(store):
    flip(store / LEVEL_SHARD)

    def change(num_done, num_total):
        os.utime(store / "complete.json")

    with pytest.raises(StoreBusyError, match="changed by another process"):
        verify_store(store, report=change)


def test_a_seal_that_lost_a_byte_takes_no_proven_block_with_it(store):
    path = store / "complete.json"
    data = path.read_bytes()
    record = json.loads(data)
    crc = str(receipt_in(record, "levels.fpn_72", 1)["shards"][0][3][0]).encode()
    offset = data.index(crc)
    damaged = bytearray(data)
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    (store / "receipts/sealed.json").unlink()
    found = verify_store(store).damage
    assert [(f.kind, f.item, f.block) for f in found] == [
        ("seal", "", None),
        ("checksum", "levels.fpn_72", 1),
    ]
    repaired = repair_store(store, 0.1)
    assert repaired.dropped == (("levels.fpn_72", 1),)
    assert len(read_receipts(store)) == len(record["receipts"]) - 1


@pytest.mark.parametrize("name", ["complete.json", "receipts/sealed.json"])
@pytest.mark.parametrize(
    "damage", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
def test_of_a_seal_and_its_copy_either_is_enough(store, sound, name, damage):
    damage(store / name)
    assert [f.path for f in verify_store(store).damage] == [name]
    result = repair_store(store)
    assert (result.mended, result.dropped, result.lost, result.sealed) == ((name,), (), (), True)
    assert (store / name).read_bytes() == (sound / name).read_bytes()
    assert verify_store(store).findings == ()


def test_receipts_outlive_a_seal_that_was_deleted(store, sound):
    (store / "complete.json").unlink()
    assert read_receipts(store) == read_receipts(sound)
    flip(store / LEVEL_SHARD)
    result = repair_store(store)
    assert (result.dropped, result.sealed) == ((("levels.fpn_72", 1),), False)
    kept = {k: r for k, r in read_receipts(sound).items() if k != ("levels.fpn_72", 1)}
    assert read_receipts(store) == kept
    # What was done since is newer than any copy of the old seal.
    shutil.copy(sound / "complete.json", store / "receipts/sealed.json")
    assert read_receipts(store) == kept


def test_a_kill_between_the_seal_and_its_copy_is_made_good(store, sound):
    (store / "receipts/sealed.json").unlink()
    (store / "claims").mkdir(exist_ok=True)
    (store / "claims/00000000.lock").touch()
    with store_lock(store):
        finish_seal(store)
    assert verify_store(store).findings == ()


def test_a_repair_broken_off_is_gone_on_with(store):
    (store / LEVEL_SHARD).write_bytes(b"")
    receipts = dict(read_receipts(store))
    # As a kill leaves it: receipts folded, seal still in place.
    del receipts["levels.fpn_72", 1]
    fold_receipts(store, receipts)
    assert [f.kind for f in verify_store(store).damage] == ["size"]
    result = repair_store(store)
    assert result.dropped == (("levels.fpn_72", 1),)
    assert not (store / LEVEL_SHARD).exists()
    assert not (store / "complete.json").exists()
    assert read_receipts(store) == receipts
    assert [f.kind for f in verify_store(store).findings] == ["unfinished"]
    # Nothing more to do.
    assert repair_store(store).dropped == ()


def test_metadata_is_mended_from_the_seal_and_masks_sizes_from_receipts(store, sound):
    for name in ("zarr.json", "levels/fpn_72/zarr.json", "labels/mask/zarr.json"):
        (store / name).write_bytes(b"{}")
    (store / "labels/mask/rows.parquet").unlink()
    result = repair_store(store)
    assert len(result.mended) == 4
    assert (result.dropped, result.lost, result.sealed) == ((), (), True)
    for name in result.mended:
        assert (store / name).read_bytes() == (sound / name).read_bytes()
    assert verify_store(store).findings == ()


def test_identities_are_put_together_from_receipts_and_annotations(store):
    before = read_samples(store)
    flip(store / "samples.parquet")
    result = repair_store(store)
    assert result.mended == ("samples.parquet",)
    assert not result.sealed
    for old, new in zip(before, read_samples(store), strict=True):
        assert (new.row, new.id, new.pixel_sha256) == (old.row, old.id, old.pixel_sha256)
        assert (new.status, new.source) == ("ok", "")
    assert verify_store(store).damage == ()


def lose_description(store):
    (store / "zarr.json").unlink()
    lose_seal(store)


def lose_seal(store):
    (store / "complete.json").write_bytes(b"")
    (store / "receipts/sealed.json").write_bytes(b"")


def lose_identities(store):
    (store / "samples.parquet").unlink()
    seal_again(
        store,
        lambda content: content.update(
            receipts=[r for r in content["receipts"] if r["item"] != "samples"]
        ),
    )


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        (lose_description, "zarr.json says what the features were made of"),
        (lose_identities, "samples.parquet says whose rows are whose"),
        (lose_seal, "complete.json and with it"),
    ],
)
def test_what_cannot_be_repaired_is_said_and_left_as_it_is(store, lose, message):
    lose(store)
    flip(store / LEVEL_SHARD)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    result = repair_store(store)
    assert any(message in sentence for sentence in result.lost)
    assert (result.mended, result.dropped) == ((), ())
    after = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert {p: d for p, d in after.items() if p.name != ".lock"} == {
        p: d for p, d in before.items() if p.name != ".lock"
    }


def test_a_level_that_looks_broken_everywhere_is_not_deleted_on_a_guess(tmp_path):
    store = build_store(tmp_path / "x.zarr", num_samples=20, level_shapes=SHAPES, seal=False)
    path = store / "levels/fpn_72/zarr.json"
    path.write_text(path.read_text(encoding="utf-8").replace("12", "13"), encoding="utf-8")
    result = repair_store(store)
    assert any("all 2 files of levels/fpn_72" in sentence for sentence in result.lost)
    assert (store / LEVEL_SHARD).exists()


def test_dozens_of_damages_and_none_is_silent(tmp_path):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        program = importlib.import_module("corruption")
    finally:
        sys.path.remove(str(BENCHMARKS))
    options = ("--flips", "24", "--files", "12", "--seed", "7", "--workdir", str(tmp_path))
    assert program.main([*options, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert sum(kind["tried"] for kind in result["figures"].values()) == 36
    assert sum(kind["reading"].get("raised", 0) for kind in result["figures"].values()) > 25
