"""The miniature of SAM 3's tower, real pictures, a real store, and a head trained on it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folder import write_images
from PIL import Image

from sam3cache.errors import CheckpointError, FingerprintError, ImageError
from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import FeatureStore, StoredSample, open_store
from sam3cache.heads import build_head, load_checkpoint, save_checkpoint
from sam3cache.heads.film_conv import FilmConv
from sam3cache.images import read_image
from sam3cache.inference import Equivalence, Predictor, check_equivalence, load
from sam3cache.loading import CachedSamples
from sam3cache.records import Sample
from sam3cache.training import TrainConfig, train


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("inference"), num_images=3)


@pytest.fixture(scope="module")
def store(pictures: Path) -> FeatureStore:
    path = pictures / "x.zarr"
    config = ExtractConfig(pictures, path, levels=("fpn_72", "image_1008"), backbone="sam3-mini")
    assert extract(config).sealed
    return open_store(path)


@pytest.fixture(scope="module")
def run(store: FeatureStore) -> Path:
    config = TrainConfig(
        str(store.path),
        "first",
        head="film-conv",
        output=str(store.path.parent / "checkpoints"),
        head_options={"embedding_dim": 64, "widths": [16, 16]},
        epochs=1,
        learning_rate=1e-2,
        loss_size_px=144,
        device="cpu",
    )
    return train(config).run_dir


def test_the_default_heads_logits_are_as_close(store: FeatureStore, pictures: Path) -> None:
    config = TrainConfig(
        str(store.path),
        "detail",
        output=str(store.path.parent / "checkpoints"),
        head_options={"embedding_dim": 16, "width": 8, "context_width": 8},
        epochs=1,
        learning_rate=1e-2,
        loss_size_px=126,
        device="cpu",
    )
    for one in check_equivalence(store, train(config).run_dir, store.samples[:2], pictures):
        assert one.holds, one
        # The picture is stored exactly; the features, rounded, are read all the same.
        assert one.max_abs_difference > 0


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load(run)


@pytest.fixture(scope="module")
def found(store: FeatureStore, run: Path, pictures: Path) -> tuple[Equivalence, ...]:
    return check_equivalence(store, run, store.samples[:2], pictures)


def test_logits_from_the_store_differ_from_online_ones_by_no_more_than_float16_explains(
    found: tuple[Equivalence, ...],
) -> None:
    assert [e.id for e in found] == ["s00", "s01"]
    for e in found:
        assert e.holds
        # That rounding is seen at all shows that two roads are compared, not one with itself.
        assert 0 < e.max_abs_difference < e.bound
        assert 0 < e.relative_error < 2.0**-11


def test_masks_differ_only_where_a_logit_lies_below_the_bound(
    store: FeatureStore, run: Path, pictures: Path, tmp_path: Path, predictor: Predictor
) -> None:
    sample = store.samples[0]
    pixels = read_image(Sample(sample.id, sample.source, pictures))
    angles = (sample.primary_angle_deg, sample.secondary_angle_deg)
    with torch.inference_mode():
        stored = predictor.head(CachedSamples(store, [0], ["fpn_72"]).batch([0]))
        online = predictor.head(predictor.batch(pixels, *angles)[0])
    # Zero goes between the two logits that differ most, so that one mask at least must differ.
    worst = int((stored - online).abs().argmax())
    shift = float(stored.flatten()[worst] + online.flatten()[worst]) / 2
    head, info = load_checkpoint(run / "best")
    assert isinstance(head, FilmConv)
    head.segmentation[-1].bias.data -= shift  # type: ignore[union-attr, operator]
    save_checkpoint(tmp_path / "shifted", head, info)

    (e,) = check_equivalence(store, tmp_path / "shifted", [sample], pictures)
    differs = (stored >= shift) != (online >= shift)
    assert e.num_masks_differing >= 1
    assert e.num_masks_differing == pytest.approx(int(differs.sum()), abs=2)
    assert ((stored - shift).abs()[differs] <= e.bound).all()
    assert (e.num_logits, e.holds) == (stored.numel(), True)


def test_the_bound_is_the_rounding_of_a_linear_heads_features(
    store: FeatureStore, run: Path, pictures: Path, tmp_path: Path
) -> None:
    """For a 1×1 convolution the bound is Σ |w| (2⁻¹¹ |f| + 2⁻²⁵), by hand."""
    _, info = load_checkpoint(run / "best")
    head = build_head("linear", {"fpn_72": store.levels["fpn_72"].shape})
    save_checkpoint(
        tmp_path / "linear", head, dataclasses.replace(info, head="linear", head_options={})
    )
    (e,) = check_equivalence(store, tmp_path / "linear", store.samples[:1], pictures)
    weight = head.segmentation.weight.detach()[0, :, 0, 0].abs().numpy()  # type: ignore[union-attr]
    feature = np.abs(store.read("fpn_72", 0).astype(np.float64))
    bounds = np.einsum("c,chw->hw", weight, 2.0**-11 * feature + 2.0**-25)
    assert bounds.min() * 0.99 < e.bound < bounds.max() * 1.01
    assert 0 < e.max_abs_difference < e.bound


def test_a_prediction_lies_on_the_images_own_grid_and_reads_files_and_arrays_alike(
    predictor: Predictor, store: FeatureStore, pictures: Path
) -> None:
    path = pictures / store.samples[0].source
    from_file = predictor.predict(path)
    assert from_file.shape == (1, 96, 128)
    assert from_file.dtype == np.float32
    assert 0 <= from_file.min() < from_file.max() <= 1
    grey = np.array(Image.open(path))
    np.testing.assert_array_equal(from_file, predictor.predict(grey))
    colour = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_allclose(from_file, predictor.predict(colour), atol=1e-5)
    assert not np.array_equal(from_file, predictor.predict(grey, 0, 0)), "0/0 is not unknown"


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint16), np.zeros((4, 4, 2), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)],
    ids=["16 bits", "2 channels", "4 axes"],
)
def test_an_array_that_is_no_image_is_refused(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="expected uint8"):
        predictor.predict(array)


def test_other_weights_are_refused_by_their_hash(run: Path) -> None:
    with pytest.raises(FingerprintError, match=r"weights_sha256 .* → random:") as caught:
        load(run, weights="random")
    assert "\n" not in str(caught.value)


def with_fields(run: Path, folder: Path, fields: dict[str, object]) -> Path:
    """Copy a checkpoint as if its features had been made with other settings."""
    head, info = load_checkpoint(run / "best")
    levels = {
        level: {**entry, "fields": {**entry["fields"], **fields}}
        for level, entry in info.levels.items()
    }
    save_checkpoint(folder, head, dataclasses.replace(info, levels=levels))
    return folder


def test_features_of_another_preprocessing_are_refused(run: Path, tmp_path: Path) -> None:
    other = with_fields(run, tmp_path / "run", {"preprocessing.preprocessing_version": 0})
    with pytest.raises(FingerprintError, match="preprocessing_version 0 → 1;"):
        load(other)


def test_an_unknown_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    other = with_fields(run, tmp_path / "run", {"architecture.depth": 5})
    with pytest.raises(CheckpointError, match="made by a tower that is none of"):
        load(other)


def test_the_resize_mode_is_that_of_the_features(run: Path, tmp_path: Path) -> None:
    squashing = load(with_fields(run, tmp_path / "run", {"preprocessing.resize_mode": "squash"}))
    _, letterbox = squashing.batch(np.zeros((10, 20, 1), np.uint8), 0.0, 0.0)
    assert (letterbox.content_height_px, letterbox.content_width_px) == (1008, 1008)


def test_an_image_that_was_changed_since_is_told(
    store: FeatureStore, run: Path, pictures: Path, tmp_path: Path
) -> None:
    sample: StoredSample = store.samples[0]
    shutil.copytree(pictures / "images", tmp_path / "images")
    Image.new("L", (128, 96)).save(tmp_path / sample.source)
    with pytest.raises(ImageError, match="not the image whose features are stored"):
        check_equivalence(store, run, [sample], tmp_path)


def test_what_the_checkpoint_records_is_enough_to_rebuild_the_tower(predictor: Predictor) -> None:
    assert predictor.tower is not None
    assert predictor.tower.spec.name == "sam3-mini"
    assert predictor.tower.levels == ("fpn_72",)
