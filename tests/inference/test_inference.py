"""The miniature of SAM 3's tower, real pictures, a real store, and heads on its features."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from head_runs import levels_of, write_run
from PIL import Image

from sam3cache.backbone import NumericPath
from sam3cache.errors import CheckpointError, FingerprintError, ImageError
from sam3cache.features import FEATURE_PRECISIONS, FeatureStore, Precision, StoredSample, open_store
from sam3cache.features.precision import decode, encode
from sam3cache.heads import build_head, load_checkpoint, save_checkpoint
from sam3cache.heads.film_conv import FilmConv
from sam3cache.images import read_image
from sam3cache.inference import Predictor, check_equivalence, load
from sam3cache.inference.equivalence import compare, rounding
from sam3cache.loading import CachedSamples
from sam3cache.records import Batch, Sample
from sam3cache.training import TrainConfig, train


@pytest.fixture(scope="module")
def run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "first"
    return write_run(levels_of(open_store(store_path)), folder, "film-conv")


def test_the_default_heads_logits_are_as_close(
    store: FeatureStore, pictures: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        str(store.path),
        "detail",
        output=str(tmp_path),
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


def test_logits_from_the_store_differ_from_online_ones_by_no_more_than_float16_explains(
    store: FeatureStore, run: Path, pictures: Path
) -> None:
    found = check_equivalence(store, run, store.samples[:2], pictures)
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
        online = predictor.head(predictor.batch([predictor.prepare(pixels)], [angles]))
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
    letterbox = squashing.prepare(np.zeros((10, 20, 1), np.uint8)).letterbox
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


@pytest.mark.parametrize("precision", ["int8", "r5"])
def test_a_head_trained_on_fewer_bits_is_held_to_what_these_explain(
    store: FeatureStore, pictures: Path, tmp_path: Path, precision: str
) -> None:
    run = write_run(levels_of(store, precision), tmp_path / "run", "film-conv")
    (one,) = check_equivalence(store, run, store.samples[:1], pictures)
    assert one.holds, one
    assert one.bound > 0
    # Four steps of int8 are no rounding, nor are 3 % where 1 of 32 parts is rounded away.
    predictor = load(run)
    sample = store.samples[0]
    image = predictor.prepare(read_image(Sample(sample.id, sample.source, pictures)))
    batch = predictor.batch([image], [(sample.primary_angle_deg, sample.secondary_angle_deg)])
    feature = batch.levels["fpn_72"]
    gradient = sign_of_gradient(predictor, batch)
    limit = rounding(precision, "fp32", feature)  # type: ignore[arg-type]
    for share, holds in ((0.5, True), (3.0, False)):
        moved = dataclasses.replace(batch, levels={"fpn_72": feature + share * limit * gradient})
        found = compare("moved", predictor, moved, batch)
        assert found.holds is holds, (share, found)


def sign_of_gradient(predictor: Predictor, batch: Batch) -> torch.Tensor:
    """Return the direction in which each feature moves the logits, taken together, up."""
    feature = batch.levels["fpn_72"].clone().requires_grad_()
    logits = predictor.head(dataclasses.replace(batch, levels={"fpn_72": feature}))
    (gradient,) = torch.autograd.grad(logits.flatten()[100], feature)
    return gradient.sign()


@pytest.mark.parametrize("precision", FEATURE_PRECISIONS)
@pytest.mark.parametrize("path", ["fp32", "bf16"])
def test_no_value_of_a_store_is_farther_from_one_made_online_than_rounding_explains(
    precision: Precision, path: NumericPath
) -> None:
    """Over values of every size that float16 has, at extraction and online next to the same."""
    random = np.random.default_rng(0)
    size = random.uniform(-23, 8, (32, 1, 1)) + random.uniform(-8, 3, (32, 64, 64))
    online = (random.choice([-1, 1], size.shape) * 2.0**size).astype(np.float32)
    # Values in the middle between two steps of int8 go either way at a nudge.
    steps = np.abs(online).max(axis=(1, 2), keepdims=True) / 127
    online[::2] = ((np.round(online / steps) + 0.5) * steps)[::2]
    # So do values between that in the middle of two of r5 or r7, and its neighbour in float16.
    steps = {"r7": 2.0**-7}.get(precision, 2.0**-5)
    mantissa = 1 + (np.floor(random.uniform(0, 1 / steps, size.shape)) + 0.5) * steps - 2.0**-11
    online[1::4] = (mantissa * 2.0 ** np.floor(size))[1::4]
    nudge = 2e-7 * random.choice([-1, 1], online.shape)
    extracted = (online * (1 + nudge)).astype(np.float32)
    if path == "bf16":
        online = torch.from_numpy(online).bfloat16().float().numpy()
        up = np.nextafter(online, np.inf, dtype=np.float32)
        extracted = online + random.choice([-1, 0, 1], online.shape) * 2.0**-7 * (
            2.0 ** np.floor(np.log2(np.abs(up)))
        ).astype(np.float32)
    stored = decode(precision, encode(precision, extracted)).astype(np.float32)
    kept = online
    if precision not in ("float16", "bf16"):
        kept = decode(precision, encode(precision, online)).astype(np.float32)
    limit = rounding(precision, path, torch.from_numpy(kept)).numpy()
    difference = np.abs(stored - kept)
    assert (difference <= limit).all(), float((difference / limit).max())
    # Nor is the limit one that anything would keep.
    assert difference.max() > 0
    assert (difference / limit).max() > 0.4
