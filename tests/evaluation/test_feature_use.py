"""What a head makes of features and picture, found by giving it those of other images."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from page_store import write_run
from store_builder import build_store

from sam3cache.evaluation import EvalConfig, FeatureUse, evaluate
from sam3cache.evaluation.feature_use import NUM_FEATURE_SHUFFLES, exchanges
from sam3cache.evaluation.predicting import Rule, logits_of, planes, predict
from sam3cache.evaluation.shuffling import derangement
from sam3cache.features import open_store
from sam3cache.heads import load_checkpoint
from sam3cache.loading import CachedSamples

HEAD = "page_store:FromOneOfThree"
SHAPES = {"fpn_72": (4, 24, 24), "fpn_144": (2, 24, 24), "image_1008": (1, 24, 24)}
NUM_IMAGES = 22


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose levels each tell the mask; each two of them are a group."""
    return build_store(
        tmp_path_factory.mktemp("features") / "a.zarr",
        num_samples=NUM_IMAGES,
        level_shapes=SHAPES,
        splits=("test",),
        empty_mask_rows=(4,),
    )


def use_of(
    store: Path, run: Path, options: Mapping[str, str] | None = None, **config: object
) -> FeatureUse:
    write_run(run, store, HEAD, options=options)
    result = evaluate(
        EvalConfig(store, run, head=HEAD, check_angles=False, page=False, **config)  # type: ignore[arg-type]
    )
    assert result.feature_use is not None
    return result.feature_use


def test_a_head_that_looks_at_one_level_is_told_from_one_that_looks_at_all(
    store: Path, tmp_path: Path
) -> None:
    use = use_of(store, tmp_path / "run")
    assert use.verdict == "used", use.sentence
    verdicts = {part.levels: part.verdict for part in use.parts}
    assert verdicts == {
        ("fpn_72", "fpn_144"): "used",
        ("fpn_72",): "used",
        ("fpn_144",): "unused",
        ("image_1008",): "unused",
    }
    # The last has no mask, one an empty one.
    assert (use.num_images, use.num_groups) == (NUM_IMAGES - 2, NUM_IMAGES // 2)
    both, first, second, picture = use.parts
    assert both.dice_shuffled == first.dice_shuffled
    assert second.dice_shuffled == picture.dice_shuffled == use.dice_true
    assert use.sentence.startswith("The head uses the features: true features give ")
    assert use.sentence.endswith(
        "The head does not use the picture: with the pictures of other images all its outputs "
        "stay the same."
    )


def test_a_head_that_looks_at_the_picture_alone_does_not_use_the_features(
    store: Path, tmp_path: Path
) -> None:
    use = use_of(store, tmp_path / "run", {"used": "image_1008"})
    assert use.verdict == "unused"
    assert use.parts[-1].verdict == "used", use.sentence
    assert use.sentence.startswith("The head does not use the features: with the features of other")
    assert "The head uses the picture: true pictures give " in use.sentence


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_the_figures_are_those_of_a_plain_loop(
    store: Path, tmp_path: Path, batch_size: int
) -> None:
    """Every image with the whole batch of another image of another group, one by one."""
    use = use_of(store, tmp_path / "run", batch_size=batch_size, seed=3)
    opened = open_store(store)
    samples = opened.samples[:-1]
    head, info = load_checkpoint(tmp_path / "run" / "best", head=HEAD)
    cached = CachedSamples(opened, range(len(samples)), tuple(info.levels))
    rule = Rule("multilabel", 1, 0.5)
    groups = np.unique([sample.group for sample in samples], return_inverse=True)[1]

    def dice(i: int, donor: int) -> float:
        (logits_KSS,) = logits_of(head, cached.batch([donor]))
        mask_CHW = planes(cached, i, rule)
        return predict(logits_KSS, cached.letterbox(i), mask_CHW, rule).dice()

    rng = np.random.default_rng(3)
    donors = [derangement(groups, rng) for _ in range(NUM_FEATURE_SHUFFLES)]
    shuffled = [[dice(i, donor_N[i]) for i in range(len(samples))] for donor_N in donors]
    true = np.array([dice(i, i) for i in range(len(samples))])
    assert use.dice_true == pytest.approx(np.nanmean(true))
    assert use.parts[0].dice_shuffled == pytest.approx(np.nanmean(shuffled))
    gain = use.parts[0].true_minus_shuffled
    assert gain is not None
    assert gain.mean == pytest.approx(np.nanmean(true - np.mean(shuffled, axis=0)))


@pytest.mark.parametrize(
    ("num_images", "empty", "reason"),
    [(2, (), "no two groups here"), (4, (0, 1, 2, 3), "all masks here are empty")],
)
def test_what_cannot_be_shuffled_leaves_the_question_open(
    tmp_path: Path, num_images: int, empty: tuple[int, ...], reason: str
) -> None:
    store = build_store(
        tmp_path / "a.zarr",
        num_samples=num_images,
        level_shapes=SHAPES,
        splits=("test",),
        empty_mask_rows=empty,
    )
    use = use_of(store, tmp_path / "run")
    assert use.verdict == "undecided"
    assert reason in use.sentence


def test_few_groups_leave_the_question_open(tmp_path: Path) -> None:
    store = build_store(tmp_path / "a.zarr", num_samples=8, level_shapes=SHAPES, splits=("test",))
    use = use_of(store, tmp_path / "run")
    assert use.verdict == "undecided"
    assert "gains from the features cannot be told from 4 groups of images" in use.sentence


def test_a_head_of_the_picture_alone_is_said_to_read_no_features(tmp_path: Path) -> None:
    store = build_store(
        tmp_path / "a.zarr",
        num_samples=16,
        level_shapes={"image_1008": (1, 24, 24)},
        splits=("test",),
    )
    name = "page_store:FromPicture"
    write_run(tmp_path / "run", store, name)
    use = evaluate(EvalConfig(store, tmp_path / "run", head=name, page=False)).feature_use
    assert use is not None
    assert use.sentence.startswith("The head reads no features of a tower. ")
    assert [part.levels for part in use.parts] == [("image_1008",)]


def test_the_features_check_can_be_left_out(store: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", store, HEAD)
    config = EvalConfig(store, run, head=HEAD, check_features=False, page=False)
    assert evaluate(config).feature_use is None


def test_features_are_exchanged_among_images_that_lie_alike_on_the_square(tmp_path: Path) -> None:
    # Groups are pairs: of the wide ones 3 and 4 are of two, and 10 of the last group is alone.
    root = build_store(
        tmp_path / "a.zarr", num_samples=11, level_shapes=SHAPES, wide_rows=(3, 4), splits=("test",)
    )
    store = open_store(root)
    cached = CachedSamples(store, [s.row for s in store.samples], ("fpn_72",), residency="stream")
    found = [(among.tolist(), kind.tolist()) for among, kind in exchanges(cached, np.arange(10))]
    assert found == [([3, 4], [0, 1]), ([0, 1, 2, 5, 6, 7, 8, 9], [0, 0, 1, 2, 3, 3, 4, 4])]
    # One patient alone of a size has nobody to exchange with.
    (only,) = exchanges(cached, np.array([0, 2, 4, 6]))
    assert only[0].tolist() == [0, 2, 6]
