"""Predictors: tasks, batches, and features from a store in place of the tower's."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from head_runs import levels_of, write_run
from PIL import Image
from worker_thread import one_process

import sam3cache
from sam3cache.errors import ConfigError, FingerprintError, ImageError, WeightsError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import FeatureStore, open_store
from sam3cache.features.copying import subset
from sam3cache.heads import load_checkpoint
from sam3cache.images import read_image
from sam3cache.inference import Predictor, load
from sam3cache.loading import CachedSamples
from sam3cache.records import Sample
from sam3cache.tasks import class_probabilities, decide


@pytest.fixture
def run(store: FeatureStore, tmp_path: Path) -> Path:
    return write_run(levels_of(store), tmp_path / "run", "film-conv")


def pixels_of(store: FeatureStore, pictures: Path, row: int) -> np.ndarray:
    sample = store.samples[row]
    return read_image(Sample(sample.id, sample.source, pictures))


def from_cache(store: FeatureStore, run: Path, row: int, device: str = "cpu") -> torch.Tensor:
    """Return logits on a stored sample's own grid by the road that training and evaluation take."""
    head, info = load_checkpoint(run / "best")
    cached = CachedSamples(store, [row], tuple(info.levels), residency="stream")
    with torch.inference_mode():
        logits = head(cached.batch([0]))[0]
    box = cached.letterbox(0)
    return box.logits_to_grid(logits, box.source_height_px, box.source_width_px)


@pytest.mark.parametrize("head", ["film-conv", "film-detail"])
def test_with_a_store_predictions_are_those_of_its_features_and_no_tower_is_loaded(
    store: FeatureStore, pictures: Path, tmp_path: Path, head: str
) -> None:
    run = write_run(levels_of(store), tmp_path / "run", head)
    # Weights that are not there: whoever asked for the tower would be told.
    predictor = sam3cache.load(run, store=store.path, weights=tmp_path / "absent.pt")
    for row in range(2):
        sample = store.samples[row]
        found = predictor.predict(
            pixels_of(store, pictures, row), sample.primary_angle_deg, sample.secondary_angle_deg
        )
        expected = from_cache(store, run, row).sigmoid().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)
    other = pixels_of(store, pictures, 0).copy()
    other[0, 0, 0] ^= 1
    with pytest.raises(WeightsError, match=r"absent\.pt"):
        predictor.predict(other)


def test_of_equal_pictures_the_one_whose_angles_are_known_speaks(
    pictures: Path, tmp_path: Path
) -> None:
    """A picture may be in a store twice, and one of its rows without angles."""
    picture = (pictures / "images" / "00.png").as_posix()
    angles = ("", ""), ("30", "-20"), ("30", "")
    rows = [f"{i},{picture},{','.join(pair)},{i}" for i, pair in enumerate(angles)]
    table = tmp_path / "twice.csv"
    head = "id,image,primary_angle,secondary_angle,group"
    table.write_text("\n".join([head, *rows]), encoding="utf-8")
    with one_process():
        config = ExtractConfig(table, tmp_path / "x.zarr", levels=("fpn_72",), backbone="sam3-mini")
        extract(config)
    store = open_store(tmp_path / "x.zarr")
    run = write_run(levels_of(store), tmp_path / "run", "film-conv")
    predictor = sam3cache.load(run, store=store)
    stored = predictor.prepare(read_image(Sample("0", "00.png", pictures / "images"))).stored
    assert stored is not None
    assert (stored.primary_angle_deg, stored.secondary_angle_deg) == (30.0, -20.0)


def test_what_the_store_lacks_goes_through_the_tower_in_the_same_batch(
    store: FeatureStore, run: Path, pictures: Path
) -> None:
    known = pixels_of(store, pictures, 0)
    new = np.ascontiguousarray(known[:, ::-1])
    predictor = load(run, store=store)
    prepared = [predictor.prepare(known), predictor.prepare(new)]
    assert [predictor.origin(image) for image in prepared] == ["store", "tower"]
    angles = [(30.0, 10.0), (math.nan, 5.0)]
    mixed = list(predictor.predict_many([known, new], angles, batch_size=2))
    tower = load(run)
    np.testing.assert_allclose(mixed[0], predictor.predict(known, 30.0, 10.0), atol=1e-6)
    np.testing.assert_allclose(mixed[1], tower.predict(new, math.nan, 5.0), atol=1e-5)
    # Rounding to float16 tells the store's features from the tower's.
    by_tower = tower.predict(known, 30.0, 10.0)
    assert np.abs(mixed[0] - by_tower).max() > 5e-6
    np.testing.assert_allclose(mixed[0], by_tower, atol=1e-3)


def test_a_store_of_other_features_is_refused(
    store: FeatureStore, tmp_path: Path, store_path: Path
) -> None:
    run = write_run(levels_of(store, "int8"), tmp_path / "run", "film-conv")
    assert load(run, store=store_path).store is not None
    without = tmp_path / "y.zarr"
    subset(store_path, without, levels=["fpn_72"])
    with pytest.raises(FingerprintError, match=r"y.zarr: .*int8.*or predict without it"):
        load(run, store=without)


def test_several_images_of_any_size_come_in_their_order(
    store: FeatureStore, run: Path, pictures: Path
) -> None:
    predictor = load(run, store=store)
    images = [pixels_of(store, pictures, row) for row in (2, 0, 1)]
    many = list(predictor.predict_many(images, batch_size=2))
    assert [found.shape for found in many] == [(1, *image.shape[:2]) for image in images]
    for found, image in zip(many, images, strict=True):
        np.testing.assert_allclose(found, predictor.predict(image), atol=1e-6)


def test_classes_that_exclude_each_other(
    store: FeatureStore, pictures: Path, tmp_path: Path
) -> None:
    classes = ("LAD", "LCX", "RCA")
    run = write_run(
        levels_of(store), tmp_path / "run", "film-conv", task="multiclass", classes=classes
    )
    predictor = load(run, store=store)
    assert (predictor.task, predictor.classes) == ("multiclass", classes)
    image = pixels_of(store, pictures, 1)
    sample = store.samples[1]
    angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
    logits = from_cache(store, run, 1)
    probability = predictor.predict(image, *angles)
    assert probability.shape == (3, *image.shape[:2])
    np.testing.assert_allclose(
        probability, class_probabilities(logits, "multiclass").numpy(), atol=1e-6
    )
    mask = predictor.segment(image, *angles)
    assert mask.dtype == np.bool_
    assert (mask.sum(axis=0) <= 1).all()
    assert mask.any()
    assert (mask != decide(logits, "multiclass").numpy()).mean() < 1e-3
    # "None of them" is a class as well: probabilities of 0.4 and less lose against it.
    assert (mask.any(axis=0) == (probability.max(axis=0) > 1 - probability.sum(axis=0))).all()


def test_labels_are_decided_each_by_itself_at_the_checkpoints_threshold(
    store: FeatureStore, pictures: Path, tmp_path: Path
) -> None:
    run = write_run(
        levels_of(store), tmp_path / "run", "film-conv", classes=("a", "b"), threshold=0.45
    )
    predictor = load(run, store=store)
    image = pixels_of(store, pictures, 0)
    probability = predictor.predict(image)
    mask = predictor.segment(image)
    np.testing.assert_array_equal(mask, probability >= 0.45)
    assert mask.any()
    assert not mask.all()


def test_a_grey_picture_saved_in_colour_is_grey_and_a_coloured_one_refused(
    store: FeatureStore, pictures: Path, tmp_path: Path
) -> None:
    predictor = load(write_run(levels_of(store), tmp_path / "run", "film-detail"))
    grey = pixels_of(store, pictures, 0)
    colour = np.repeat(grey, 3, axis=2)
    np.testing.assert_allclose(predictor.predict(colour), predictor.predict(grey), atol=1e-5)
    colour[0, 0, 1] ^= 8
    with pytest.raises(ImageError, match="in colour"):
        predictor.predict(colour)


def test_a_head_that_reads_the_picture_alone_needs_neither_tower_nor_store(
    store: FeatureStore, pictures: Path, tmp_path: Path
) -> None:
    run = write_run(
        levels_of(store),
        tmp_path / "run",
        "film-detail",
        options={"use_features": False, "width": 8},
    )
    predictor = load(run, weights=tmp_path / "absent.pt")
    image = predictor.prepare(pixels_of(store, pictures, 0))
    assert (predictor.tower, predictor.origin(image)) == (None, "picture")
    assert predictor.predict(pixels_of(store, pictures, 0)).shape == (1, 96, 128)


@pytest.mark.parametrize(("head", "reads"), [("film-conv", True), ("linear", False)])
def test_whether_a_head_reads_angles_is_tried(
    store: FeatureStore, tmp_path: Path, head: str, reads: bool
) -> None:
    run = write_run(levels_of(store), tmp_path / "run", head)
    assert load(run, store=store).reads_angles() is reads


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (1, {"angles_deg": [(181.0, 0.0)]}, ConfigError, "primary angle 181"),
        (1, {"angles_deg": [(0.0, -91.0)]}, ConfigError, "secondary angle -91"),
        (2, {"angles_deg": [(0.0, 0.0)]}, ConfigError, "1 pairs of angles for 2 images"),
        (1, {"batch_size": 0}, ConfigError, "batch size 0"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    store: FeatureStore,
    run: Path,
    images: int,
    options: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    predictor: Predictor = load(run, store=store)
    blank = [np.zeros((8, 8), np.uint8)] * images
    with pytest.raises(error, match=words):
        next(predictor.predict_many(blank, **options))  # type: ignore[arg-type]


def test_a_file_that_is_damaged_is_named(store: FeatureStore, run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "whole.png")
    shutil.copy(tmp_path / "whole.png", tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    with pytest.raises(ImageError, match=r"half\.png"):
        load(run, store=store).predict(tmp_path / "half.png")
