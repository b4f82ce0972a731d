"""Damage, repair, extract: the store is what it was, and only what was damaged is made again."""

import os
import shutil
from pathlib import Path

import pytest
from picture_folder import write_images
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import repair_store, verify_store

NUM_IMAGES = 18  # Two blocks, the last of two images.


def config(folder: Path) -> ExtractConfig:
    return ExtractConfig(
        folder / "pictures", folder / "x.zarr", levels=("image_1008",), backbone="sam3-mini"
    )


@pytest.fixture(scope="module", autouse=True)
def workers_are_threads():
    with one_process():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "pictures", NUM_IMAGES)
    assert extract(config(folder)).num_computed == NUM_IMAGES
    return folder


@pytest.fixture
def folder(made, tmp_path):
    # copytree keeps times, by which extraction knows its pictures.
    return Path(shutil.copytree(made, tmp_path / "copy"))


def content_of(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.parent.name != "claims" and path.name != ".lock"
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(store: Path) -> None:
    first, second = (store / f"levels/image_1008/c/{block}/0/0/0" for block in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def lose_seal(store):
    flip(store / "complete.json")
    flip(store / "receipts/sealed.json")


@pytest.mark.parametrize(
    ("damage", "dropped", "num_computed"),
    [
        (
            lambda store: flip(store / "levels/image_1008/c/1/0/0/0"),
            [("levels.image_1008", 1)],
            2,
        ),
        (swap, [("levels.image_1008", 0), ("levels.image_1008", 1)], NUM_IMAGES),
        (lambda store: (store / "labels/mask/masks/c/0/0/0/0").unlink(), [("labels.mask", 0)], 0),
        (lose_seal, [], 0),
        (lambda store: flip(store / "samples.parquet"), [], 0),
        (lambda store: os.truncate(store / "annotations.parquet", 9), [], 0),
    ],
    ids=["shard", "swapped", "masks", "seal", "samples", "annotations"],
)
def test_after_repair_extract_rebuilds_just_what_was_damaged(
    made, folder, damage, dropped, num_computed
):
    store = folder / "x.zarr"
    damage(store)
    assert verify_store(store).damage
    repaired = repair_store(store)
    assert list(repaired.dropped) == dropped
    assert not repaired.sealed
    assert not verify_store(store).damage
    result = extract(config(folder))
    assert result.sealed
    assert (result.num_computed, result.num_samples) == (num_computed, NUM_IMAGES)
    assert content_of(store) == content_of(made / "x.zarr")
    assert verify_store(store).findings == ()


def test_a_seal_that_was_deleted_costs_no_computation(made, folder):
    store = folder / "x.zarr"
    (store / "complete.json").unlink()
    result = extract(config(folder))
    assert (result.sealed, result.num_computed) == (True, 0)
    assert content_of(store) == content_of(made / "x.zarr")
    assert verify_store(store).findings == ()
