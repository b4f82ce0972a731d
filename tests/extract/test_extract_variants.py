"""Changed views of training samples as rows of their own: what is stored, and what follows."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import ConfigError, ManifestError, MissingSampleError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.extract.plan import plan
from sam3cache.extract.relabel import AnnotationsConfig, LabelsConfig, set_annotations, set_labels
from sam3cache.features import FeatureStore, open_store, repair_store, verify_store
from sam3cache.features.copying import merge, subset
from sam3cache.features.hdf5 import export_hdf5, import_hdf5
from sam3cache.features.repacking import repack
from sam3cache.features.summary import summarise
from sam3cache.images import letterbox_image, read_image, read_manifest
from sam3cache.loading import CachedSamples
from sam3cache.training import TrainConfig
from sam3cache.training.division import divide
from sam3cache.variants import Variant

VIEWS = ("hflip", "rot10")
NUM_IMAGES = 10  # s00, s01, s04, s05, s08, s09 are for training.
TRAINING = ("s00", "s01", "s04", "s05", "s08", "s09")


def config(folder: Path, variants: tuple[str, ...] | None = None) -> ExtractConfig:
    return ExtractConfig(
        folder,
        folder.parent / "x.zarr",
        levels=("image_1008",),
        backbone="sam3-mini",
        variants=variants,
    )


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures and the store of them and of two views of those for training."""
    folder = write_images(tmp_path_factory.mktemp("made") / "pictures", NUM_IMAGES)
    result = extract(config(folder, VIEWS))
    assert (result.num_samples, result.num_variants, result.num_computed) == (10, 12, 22)
    assert (result.num_with_mask, result.sealed) == (10, True)
    return folder.parent


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    # copytree keeps times, by which extraction knows its pictures.
    return Path(shutil.copytree(made, tmp_path / "copy"))


def views_of(store: FeatureStore) -> dict[str, str]:
    """Each variant's id, and that of the sample that it is of."""
    ids = {sample.row: sample.id for sample in store.samples}
    return {v.id: ids[v.base_row] for v in store.variants if v.base_row is not None}


def expected_views(ids: tuple[str, ...] = TRAINING) -> dict[str, str]:
    return {f"{identity}~{name}": identity for identity in ids for name in VIEWS}


def content_of(store: FeatureStore) -> dict[str, tuple[str, bytes, bytes, tuple[float, float]]]:
    """By id, all that a sample or variant is, wherever its row lies."""
    found = {}
    for sample in (*store.samples, *store.variants):
        mask = store.read_mask(sample.row)
        angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
        picture = store.read("image_1008", sample.row).tobytes()
        found[sample.id] = (sample.split, picture, b"" if mask is None else mask.tobytes(), angles)
    return found


def require_sound(store: Path) -> None:
    assert [str(finding) for finding in verify_store(store).findings] == []


def rewrite(folder: Path, old: str, new: str) -> None:
    manifest = folder / "manifest.csv"
    text = manifest.read_text(encoding="utf-8")
    assert old in text
    manifest.write_text(text.replace(old, new), encoding="utf-8")


def test_views_of_training_samples_are_rows_of_their_own_and_no_samples(made: Path) -> None:
    store = open_store(made / "x.zarr")
    assert [sample.id for sample in store.samples] == [f"s{i:02}" for i in range(NUM_IMAGES)]
    assert views_of(store) == expected_views()
    assert {variant.split for variant in store.variants} == {"train"}
    given = {s.id: s for s in read_manifest(made / "pictures").samples}
    bases = {sample.row: sample for sample in store.samples}
    for variant in store.variants:
        assert variant.base_row is not None
        base, view = bases[variant.base_row], Variant.parse(variant.variant)
        picture = view.picture(read_image(given[base.id]))
        square = letterbox_image(picture)[0].numpy()
        assert np.array_equal(store.read("image_1008", variant.row), square)
        mask = store.read_mask(base.row)
        assert mask is not None
        wanted = view.mask(mask, base.height_px, base.width_px)
        assert np.array_equal(store.read_mask(variant.row), wanted)
        assert store.has_mask(variant.row)
        sign = -1 if variant.variant == "hflip" else 1
        assert variant.primary_angle_deg == sign * base.primary_angle_deg
        assert variant.secondary_angle_deg == base.secondary_angle_deg
        assert (variant.group, variant.extra) == (base.group, base.extra)
    require_sound(made / "x.zarr")
    summary = summarise(made / "x.zarr")
    assert (summary["num_samples"]["ok"], summary["variants"]) == (10, {"hflip": 6, "rot10": 6})


def test_a_variant_is_loaded_with_a_target_that_lies_on_its_picture(made: Path) -> None:
    store = open_store(made / "x.zarr")
    flipped = next(v for v in store.variants if v.id == "s01~hflip")  # 128 x 96: padded right.
    samples = CachedSamples(
        store, [1, flipped.row], ["image_1008"], target_size_px=252, residency="stream"
    )
    batch = samples.batch([0, 1])
    assert batch.target_BKTT is not None
    width = int(batch.content_B2[0, 1]) // 4
    assert batch.content_B2[0].tolist() == batch.content_B2[1].tolist() == [1008, 756]
    plain, mirrored = batch.target_BKTT[:, 0]
    assert plain[:, :width].flip(1).equal(mirrored[:, :width])
    assert not plain.equal(mirrored)
    assert (mirrored[:, width:] == 255).all()
    assert batch.angles_B2[1].tolist() == [16.0, 16.0]


def test_training_draws_from_views_of_what_it_learns_and_of_nothing_else(made: Path) -> None:
    store = open_store(made / "x.zarr")
    ids = {sample.row: sample.id for sample in (*store.samples, *store.variants)}

    def groups(**settings: Any) -> tuple[list[list[str]], list[str]]:
        found = divide(store, TrainConfig(str(store.path), "x", **settings))
        assert sorted(found.train) == sorted(row for group in found.groups for row in group)
        learned = [[ids[row] for row in group] for group in found.groups]
        return learned, [ids[row] for row in found.val]

    learned, validated = groups()
    assert learned == [[i, f"{i}~hflip", f"{i}~rot10"] for i in TRAINING]
    assert validated == ["s02", "s06"]
    assert groups(variants="rot10.0")[0] == [[i, f"{i}~rot10"] for i in TRAINING]
    assert groups(variants="none")[0] == [[i] for i in TRAINING]
    for fold in range(3):
        learned, validated = groups(folds=3, fold=fold)
        assert {i for group in learned for i in group}.isdisjoint(validated)
        assert not any("~" in i for i in validated)
        held_out = {view for view, base in expected_views().items() if base in validated}
        assert held_out.isdisjoint(i for group in learned for i in group)
    with pytest.raises(ConfigError, match=r"has no variant 'gamma1.5' \(it has hflip, rot10\)"):
        groups(variants="gamma")


def test_the_same_command_again_and_one_without_the_option_leave_all_as_it_is(place: Path) -> None:
    before = (place / "x.zarr/complete.json").read_bytes()
    for variants in (VIEWS, None):
        result = extract(config(place / "pictures", variants))
        assert (result.num_computed, result.num_removed, result.num_variants) == (0, 0, 12)
    assert (place / "x.zarr/complete.json").read_bytes() == before


def test_views_are_added_and_given_up_and_come_back_for_nothing(place: Path) -> None:
    folder, before = place / "pictures", content_of(open_store(place / "x.zarr"))
    more = extract(config(folder, (*VIEWS, "gamma")))
    assert (more.num_samples, more.num_variants, more.num_computed) == (10, 18, 6)
    store = open_store(place / "x.zarr")
    assert Counter(v.variant for v in store.variants) == {"hflip": 6, "rot10": 6, "gamma1.5": 6}
    none = extract(config(folder, ()))
    assert (none.num_samples, none.num_variants, none.num_removed) == (10, 0, 18)
    assert open_store(place / "x.zarr").variants == ()
    assert extract(config(folder)).num_variants == 0
    back = extract(config(folder, VIEWS))
    assert (back.num_computed, back.num_variants) == (0, 12)
    assert content_of(open_store(place / "x.zarr")) == before
    require_sound(place / "x.zarr")


def test_views_follow_their_sample_when_it_changes_goes_or_gets_another_name(place: Path) -> None:
    folder = place / "pictures"
    pixels = np.asarray(Image.open(folder / "images/00.png"))
    Image.fromarray(255 - pixels).save(folder / "images/00.png")
    rewrite(folder, "s04,images/04.png,masks/04.png,-13,13,train,p0\n", "")
    (folder / "images/05.png").rename(folder / "images/other.png")
    rewrite(folder, "s05,images/05.png", "renamed,images/other.png")
    result = extract(config(folder))
    # s00 and its views anew; s04 and its views gone; s05 and its views under another name.
    assert (result.num_computed, result.num_removed, result.num_renamed) == (3, 6, 3)
    store = open_store(place / "x.zarr")
    assert views_of(store) == expected_views(("s00", "s01", "renamed", "s08", "s09"))
    flipped = next(v for v in store.variants if v.id == "s00~hflip")
    assert flipped.base_row is not None
    base = store.read("image_1008", flipped.base_row)
    assert np.array_equal(store.read("image_1008", flipped.row)[:, :, ::-1], base)
    require_sound(place / "x.zarr")


def test_views_of_a_sample_that_is_no_longer_for_training_are_used_for_nothing(place: Path) -> None:
    folder, store = place / "pictures", place / "x.zarr"
    (place / "splits.csv").write_text("id,split\ns00,val\ns01,test\n", encoding="utf-8")
    set_annotations(AnnotationsConfig(store, place / "splits.csv"))
    opened = open_store(store)
    assert views_of(opened) == expected_views(TRAINING[2:])
    orphans = sorted(set(opened.every_row) - {s.row for s in (*opened.samples, *opened.variants)})
    assert len(orphans) == 4
    for row in orphans:
        assert opened.read_mask(row) is None
        assert not opened.has_mask(row)
        with pytest.raises(MissingSampleError, match=f"no usable sample in row {row}"):
            CachedSamples(opened, [row], ["image_1008"])
    require_sound(store)
    # The manifest says so as well: their rows are given up.
    rewrite(folder, "-17,17,train", "-17,17,val")
    rewrite(folder, "-16,16,train", "-16,16,test")
    result = extract(config(folder))
    assert (result.num_computed, result.num_removed, result.num_variants) == (0, 4, 8)
    require_sound(store)


@pytest.mark.parametrize("name", ["images/01.png", "masks/01.png"])
def test_a_picture_that_goes_bad_takes_its_views_along_and_is_told_once(
    place: Path, name: str
) -> None:
    (place / "pictures" / name).write_bytes(b"no picture")
    result = extract(config(place / "pictures"))
    assert [aside.id for aside in result.set_aside] == ["s01"]
    store = open_store(place / "x.zarr")
    assert [aside.id for aside in store.set_aside] == ["s01"]
    assert "s01~hflip" not in views_of(store)
    assert (result.num_samples, result.num_variants) == (9, 10)
    again = extract(config(place / "pictures"))
    assert (again.num_computed, again.num_removed) == (0, 0)
    require_sound(place / "x.zarr")


def test_damage_that_only_decoding_finds_sets_aside_sample_and_views_alike(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", 2)
    whole = (folder / "images/01.png").read_bytes()
    (folder / "images/01.png").write_bytes(whole[:200])
    for _ in range(2):
        result = extract(config(folder, ("hflip",)))
        assert (result.num_samples, result.num_variants, result.sealed) == (1, 1, True)
        assert [aside.id for aside in result.set_aside] == ["s01"]
    require_sound(tmp_path / "x.zarr")
    (folder / "images/01.png").write_bytes(whole)
    assert extract(config(folder)).num_variants == 2


def test_labels_that_are_set_anew_are_those_of_the_views_too(place: Path) -> None:
    folder, store = place / "pictures", place / "x.zarr"
    for i in range(NUM_IMAGES):
        mask = np.zeros_like(np.asarray(Image.open(folder / f"images/{i:02}.png")))
        mask[:, : 20 + i] = 255
        Image.fromarray(mask).save(folder / f"masks/{i:02}.png")
    set_labels(LabelsConfig(store, "reader2", folder / "manifest.csv"))
    opened = open_store(store)
    flipped = next(v for v in opened.variants if v.id == "s09~hflip")
    mask_KHW = opened.read_mask(flipped.row, "reader2")
    assert mask_KHW is not None
    assert mask_KHW[0, 0].tolist() == [0] * (mask_KHW.shape[2] - 29) + [1] * 29
    require_sound(store)


def test_copies_keep_views_with_their_samples(place: Path, tmp_path: Path) -> None:
    store = open_store(place / "x.zarr")
    everything = content_of(store)
    part = subset(store.path, tmp_path / "part.zarr", ids=["s02", "s04", "s09"])
    assert (part.num_samples, part.num_variants) == (3, 4)
    assert views_of(open_store(part.store)) == expected_views(("s04", "s09"))
    kept = {"s02", "s04", "s09", *expected_views(("s04", "s09"))}
    assert content_of(open_store(part.store)) == {k: everything[k] for k in kept}
    rest = subset(store.path, tmp_path / "rest.zarr", ids=["s00", "s03"])
    both = merge([part.store, rest.store], tmp_path / "both.zarr", prefix=True)
    assert (both.num_samples, both.num_variants) == (5, 6)
    merged = views_of(open_store(both.store))
    assert merged["rest-s00~rot10"] == "rest-s00"
    export_hdf5(store, tmp_path / "a.h5")
    again = import_hdf5(tmp_path / "a.h5", tmp_path / "again.zarr").store
    assert content_of(open_store(again)) == everything
    for copy in (part.store, both.store, again):
        require_sound(copy)
    with pytest.raises(ConfigError, match=r"no sample 's04~hflip'"):
        subset(store.path, tmp_path / "none.zarr", ids=["s04~hflip"])


def test_a_repack_moves_views_and_keeps_whose_they_are(place: Path) -> None:
    rewrite(place / "pictures", "s04,images/04.png,masks/04.png,-13,13,train,p0\n", "")
    extract(config(place / "pictures"))
    before = content_of(open_store(place / "x.zarr"))
    assert repack(place / "x.zarr").num_moved > 0
    store = open_store(place / "x.zarr")
    assert content_of(store) == before
    assert views_of(store) == expected_views(tuple(i for i in TRAINING if i != "s04"))
    result = extract(config(place / "pictures"))
    assert (result.num_computed, result.num_removed) == (0, 0)


def test_views_stay_views_when_the_table_of_samples_is_lost(place: Path) -> None:
    before = content_of(open_store(place / "x.zarr"))
    (place / "x.zarr/samples.parquet").unlink()
    repair_store(place / "x.zarr")
    result = extract(config(place / "pictures"))
    assert (result.num_computed, result.num_variants, result.sealed) == (0, 12, True)
    assert content_of(open_store(place / "x.zarr")) == before


def test_a_plan_says_what_views_take(place: Path) -> None:
    forecast = plan(config(place / "pictures", (*VIEWS, "gamma")), measure=False)
    assert (forecast.num_samples, forecast.num_new, forecast.num_kept) == (10, 0, 10)
    variants = forecast.variants
    assert variants is not None
    assert variants.names == ("hflip", "rot10", "gamma1.5")
    assert (variants.num_samples, variants.num_to_compute) == (18, 6)
    picture_bytes = next(i.size_bytes for i in forecast.items if i.name == "image_1008")
    assert variants.size_bytes == picture_bytes
    new = replace(config(place / "pictures", VIEWS), output=place / "new.zarr")
    whole = plan(new, measure=False)
    assert whole.variants is not None
    assert (whole.num_new, whole.variants.num_to_compute, whole.num_to_compute) == (10, 12, 22)
    share = whole.variants.size_bytes / whole.items[0].size_bytes
    assert share == pytest.approx(12 / 22)
    many = plan(new, num_images=1000, measure=False)
    assert many.variants is not None
    assert (many.num_samples, many.variants.num_to_compute) == (1000, 1200)
    assert many.items[0].num_samples == 2200
    assert plan(config(place / "pictures", ()), measure=False).variants is None


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", 4)
    with pytest.raises(ConfigError, match=r"variant 'spin' is unknown"):
        config(folder, ("spin",))
    rewrite(folder, "s02,", "s00~hflip,")
    with pytest.raises(ManifestError, match=r"id 's00~hflip' is that of variant hflip of 's00'"):
        extract(config(folder, VIEWS))
    assert not (tmp_path / "x.zarr").exists()
