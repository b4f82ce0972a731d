"""Extraction of the picture level alone, which needs no tower: what changes, and what does not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr
from picture_folder import write_images
from PIL import Image
from worker_thread import one_process

from sam3cache.errors import ManifestError, StoreError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import open_store
from sam3cache.features.receipts import break_seal, write_receipt


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads():
    with one_process():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of five pictures, one of them broken, and the store made from it."""
    folder = write_images(tmp_path_factory.mktemp("base") / "pictures", num_images=5)
    (folder / "images/03.png").write_bytes((folder / "images/03.png").read_bytes()[:200])
    result = run(folder)
    assert result.sealed
    return folder.parent


@pytest.fixture
def copy(base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy" / "pictures"


def run(folder):
    return extract(
        ExtractConfig(
            folder, folder.parent / "x.zarr", levels=("image_1008",), backbone="sam3-mini"
        )
    )


def test_a_broken_picture_is_set_aside_and_the_rest_is_stored(base):
    store = open_store(base / "x.zarr")
    assert [sample.id for sample in store.samples] == ["s00", "s01", "s02", "s04"]
    (aside,) = store.set_aside
    assert aside.id == "s03"
    assert "03.png" in aside.reason
    assert "\n" not in aside.reason
    array = zarr.open_group(base / "x.zarr", mode="r")["levels/image_1008"]
    assert array[4].any()
    assert not array[3].any()


def test_an_unchanged_manifest_leaves_every_file_as_it_is(copy):
    store = copy.parent / "x.zarr"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    result = run(copy)
    assert (result.num_computed, result.num_kept, result.sealed) == (0, 4, True)
    after = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    ignored = {store / ".lock"}
    assert {p: t for p, t in after.items() if p not in ignored} == {
        p: t for p, t in before.items() if p not in ignored
    }


def test_a_corrected_mask_is_taken_over_without_touching_a_feature(copy):
    store = copy.parent / "x.zarr"
    shard = store / "levels/image_1008/c/0/0/0/0"
    before = shard.stat().st_mtime_ns
    Image.fromarray(np.full((56, 56), 255, np.uint8)).save(copy / "masks/02.png")
    result = run(copy)
    assert (result.num_computed, result.num_relabelled, result.sealed) == (0, 1, True)
    assert shard.stat().st_mtime_ns == before
    assert open_store(store).read_mask(2).all()


def test_a_mask_corrected_after_a_kill_before_the_seal_is_taken_over(copy):
    store = copy.parent / "x.zarr"
    break_seal(store)
    Image.fromarray(np.full((56, 56), 255, np.uint8)).save(copy / "masks/02.png")
    assert run(copy).sealed
    assert open_store(store).read_mask(2).all()


def test_a_mask_corrected_after_a_kill_within_the_seal_is_taken_over(copy):
    """Killed after complete.json was written and before the single receipts were deleted."""
    store = copy.parent / "x.zarr"
    for receipt in open_store(store).receipts.values():
        write_receipt(store, receipt)
    Image.fromarray(np.full((56, 56), 255, np.uint8)).save(copy / "masks/02.png")
    assert run(copy).sealed
    assert open_store(store).read_mask(2).all()


def test_a_mask_that_goes_bad_sets_its_sample_aside_until_it_is_mended(copy):
    store = copy.parent / "x.zarr"
    manifest = copy / "manifest.csv"
    text = manifest.read_text(encoding="utf-8").replace("masks/02.png", "masks/02.npy")
    manifest.write_text(text, encoding="utf-8")
    np.save(copy / "masks/02.npy", np.full((56, 56), -1.0))
    bad = run(copy)
    assert bad.sealed
    assert {aside.id for aside in bad.set_aside} == {"s02", "s03"}
    again = run(copy)
    assert (again.num_computed, again.num_removed, again.sealed) == (0, 0, True)
    np.save(copy / "masks/02.npy", np.ones((56, 56)))
    mended = run(copy)
    assert {aside.id for aside in mended.set_aside} == {"s03"}
    (sample,) = [sample for sample in open_store(store).samples if sample.id == "s02"]
    assert open_store(store).read_mask(sample.row).all()


def test_a_mask_larger_than_all_before_makes_room_for_itself(copy):
    store = copy.parent / "x.zarr"
    Image.fromarray(np.full((1120, 1120), 255, np.uint8)).save(copy / "masks/02.png")
    assert run(copy).sealed
    array = zarr.open_group(store, mode="r")["labels/mask/masks"]
    assert array.shape[2:] == (1120, 1120)
    assert array[2].all()
    assert open_store(store).read_mask(2).all()


def test_a_kill_while_blocks_are_appended_leaves_no_old_description(copy):
    store = copy.parent / "x.zarr"
    before = (store / "zarr.json").read_bytes()
    Image.fromarray(np.full((96, 128), 200, np.uint8)).save(copy / "images/00.png")
    run(copy)
    break_seal(store)
    (store / "zarr.json").write_bytes(before)
    assert run(copy).sealed
    assert zarr.open_group(store, mode="r").attrs["sam3cache"]["num_blocks"] == 2


def test_a_colour_picture_in_a_grey_store_is_set_aside_by_name(copy):
    Image.new("RGB", (96, 96), (200, 10, 10)).save(copy / "images/colour.png")
    with (copy / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("colour,images/colour.png,,0,0,train,p9\n")
    result = run(copy)
    assert result.sealed
    (aside,) = [aside for aside in result.set_aside if aside.id == "colour"]
    assert "images/colour.png has colour" in aside.reason


def test_the_seed_of_the_split_is_remembered(copy):
    manifest = copy / "manifest.csv"
    lines = [line.split(",") for line in manifest.read_text(encoding="utf-8").splitlines()]
    manifest.write_text("\n".join(",".join(line[:5]) for line in lines), encoding="utf-8")
    first = extract(
        ExtractConfig(
            copy,
            copy.parent / "x.zarr",
            levels=("image_1008",),
            backbone="sam3-mini",
            seed=3,
        )
    )
    splits = {note.id: note.split for note in open_store(first.store).annotations.values()}
    assert run(copy).num_moved == 0
    assert {n.id: n.split for n in open_store(first.store).annotations.values()} == splits


def test_a_corrected_angle_is_taken_over_without_computing_anything(copy):
    path = copy / "manifest.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(",-17,17,", ",-30,,"), "utf-8")
    result = run(copy)
    assert (result.num_computed, result.sealed) == (0, True)
    sample = open_store(copy.parent / "x.zarr").samples[0]
    assert sample.primary_angle_deg == -30
    assert np.isnan(sample.secondary_angle_deg)


def test_a_changed_picture_is_computed_anew_and_alone(copy):
    store = copy.parent / "x.zarr"
    Image.fromarray(np.full((96, 128), 200, np.uint8)).save(copy / "images/00.png")
    result = run(copy)
    assert (result.num_computed, result.num_removed, result.sealed) == (1, 1, True)
    after = open_store(store)
    (sample,) = [sample for sample in after.samples if sample.id == "s00"]
    assert sample.row == 16
    assert (after.read("image_1008", 16)[0, :700] == 200).all()


def test_a_lost_shard_is_rebuilt(copy):
    store = copy.parent / "x.zarr"
    shard = store / "levels/image_1008/c/0/0/0/0"
    before = shard.read_bytes()
    shard.unlink()
    result = run(copy)
    assert (result.num_computed, result.sealed) == (4, True)
    assert shard.read_bytes() == before


def test_a_folder_that_is_something_else_is_left_alone(copy):
    store = copy.parent / "x.zarr"
    (store / "zarr.json").unlink()
    (store / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match="not empty and not a feature store"):
        run(copy)
    assert (store / "notes.txt").exists()


def rename_images(folder):
    for path in (folder / "images").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    manifest = folder / "manifest.csv"
    text = manifest.read_text(encoding="utf-8").replace("images/", "images/other-")
    manifest.write_text(text, encoding="utf-8")


def test_a_renamed_folder_costs_nothing(copy):
    store = copy.parent / "x.zarr"
    before = {path: path.read_bytes() for path in (store / "levels").rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in before}
    rename_images(copy)
    result = run(copy)
    assert (result.num_computed, result.num_renamed, result.num_kept) == (0, 4, 4)
    assert result.sealed
    after = {path: path.read_bytes() for path in (store / "levels").rglob("*") if path.is_file()}
    # Only the picture that cannot be read gets a row of its own, in a block of its own.
    assert {p: d for p, d in after.items() if "/c/" in p.as_posix()} == {
        p: d for p, d in before.items() if "/c/" in p.as_posix()
    }
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if "/c/" in p.as_posix())
    sources = [sample.source for sample in open_store(store).samples]
    assert sources == [f"images/other-{i:02}.png" for i in (0, 1, 2, 4)]


def test_a_store_of_other_pictures_is_not_emptied_by_a_slip_in_its_name(copy):
    store = copy.parent / "x.zarr"
    before = (store / "complete.json").read_bytes()
    rename_images(copy)
    for number, path in enumerate((copy / "images").iterdir()):
        Image.fromarray(np.full((96, 128), number, np.uint8)).save(path)
    with pytest.raises(StoreError, match=r"none of the 4 images in .* is in "):
        run(copy)
    assert (store / "complete.json").read_bytes() == before


def test_a_manifest_of_which_nothing_can_be_read_stops_before_it_starts(copy):
    shutil.rmtree(copy / "images")
    before = (copy.parent / "x.zarr/complete.json").read_bytes()
    with pytest.raises(ManifestError, match="none of its 5 samples can be used"):
        run(copy)
    assert (copy.parent / "x.zarr/complete.json").read_bytes() == before


@pytest.mark.long
def test_launches_on_one_store_share_the_work_and_agree_on_who_seals_it(tmp_path):
    folder = write_images(tmp_path / "pictures", num_images=40)
    command = [
        *(sys.executable, "-m", "sam3cache", "extract", folder, "-o", tmp_path / "x.zarr"),
        *("--levels", "image_1008", "--backbone", "sam3-mini", "--devices", "cpu", "--json"),
    ]
    launches = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [launch.communicate(timeout=150) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    assert sum(json.loads(stdout)["num_computed"] for stdout, _ in outputs) == 40
    assert len(open_store(tmp_path / "x.zarr").samples) == 40


def test_what_spoils_is_not_counted_as_computed_and_what_is_mended_is_replaced(
    copy, tmp_path, invoke
):
    options = ("--levels", "image_1008", "--backbone", "sam3-mini", "--devices", "cpu")
    first = invoke("extract", copy, "-o", tmp_path / "y.zarr", *options)
    assert "4 samples, sealed; 4 computed in " in first.stdout
    assert "1 set aside." in first.stdout
    Image.fromarray(np.full((96, 128), 9, np.uint8)).save(copy / "images/03.png")
    second = invoke("extract", copy, "-o", tmp_path / "y.zarr", *options)
    assert "4 kept, 1 replaced, being changed or mended." in second.stdout
    assert "no longer in the manifest" not in second.stdout
    info = invoke("store", "info", tmp_path / "y.zarr").stdout
    assert "(1 replaced)" in info


def test_the_command_lists_what_it_set_aside_and_says_so_by_its_exit_code(copy, invoke):
    result = invoke(
        *("extract", copy, "-o", copy.parent / "x.zarr", "--levels", "image_1008"),
        *("--backbone", "sam3-mini", "--devices", "cpu", "--json"),
    )
    assert result.exit_code == 3
    assert result.stderr.count("set aside: s03 (images/03.png)") == 1
    assert json.loads(result.stdout)["num_samples"] == 4


def test_a_folder_one_too_deep_is_said_to_teach_nothing(tmp_path, invoke):
    folder = write_images(tmp_path / "pictures", num_images=2)
    result = invoke(
        *("extract", folder / "images", "-o", tmp_path / "x.zarr"),
        *("--levels", "image_1008", "--devices", "cpu"),
    )
    assert result.exit_code == 0, result.stderr
    assert "0 have a mask, 0 both view angles." in result.stdout
    assert "Without masks nothing can be trained" in result.stdout
    assert "Next:" not in result.stdout
