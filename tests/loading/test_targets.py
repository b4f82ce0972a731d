"""Targets of class numbers: what the store has, by its nearest pixel, and nothing between."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from store_builder import build_store

import sam3cache
from sam3cache.errors import ConfigError
from sam3cache.features import (
    LabelRow,
    LabelSetSpec,
    open_store,
    put_label_set,
    staging_of,
    write_label_block,
)
from sam3cache.loading import CachedSamples
from sam3cache.tasks import Task

SIZE = (48, 48)


def put(root: Path, masks: Mapping[int, np.ndarray], classes: tuple[str, ...], task: Task) -> None:
    spec = LabelSetSpec("branches", classes, *SIZE, task)
    sources = {row: LabelRow(row) for row in masks}
    write_label_block(staging_of(root, "branches"), spec, 0, masks, sources)
    put_label_set(root, "branches", classes, task=task)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return build_store(tmp_path / "x.zarr", num_samples=6, level_shapes={"fpn_72": (2, 3, 3)})


def random_masks(num_planes: int, *values: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    return {row: rng.choice(np.array(values, np.uint8), (num_planes, *SIZE)) for row in range(6)}


def targets_of(root: Path, size_px: int) -> torch.Tensor:
    store = open_store(root)
    samples = CachedSamples(
        store, range(6), ("fpn_72",), target_size_px=size_px, label_set="branches"
    )
    batches = list(samples.iterate(4, shuffle=False))
    targets = [batch.target_BKTT for batch in batches]
    assert [row for batch in batches for row in batch.rows] == list(range(6))
    return torch.cat([target for target in targets if target is not None])


@pytest.mark.parametrize(("size_px", "step"), [(144, 1 / 3), (48, 1), (16, 3)])
def test_class_numbers_are_taken_from_the_nearest_pixel(
    root: Path, size_px: int, step: float
) -> None:
    masks = random_masks(1, 0, 1, 3, 255)
    put(root, masks, ("a", "b", "c"), "multiclass")
    at = np.floor((np.arange(size_px) + 0.5) * step).astype(int)
    target = targets_of(root, size_px)
    assert target.dtype == torch.uint8
    assert target.shape == (6, 1, size_px, size_px)
    for row, mask in masks.items():
        assert np.array_equal(target[row].numpy(), mask[:, at[:, None], at])


def test_planes_of_several_classes_are_laid_each_by_itself(root: Path) -> None:
    masks = random_masks(3, 0, 1, 255)
    put(root, masks, ("a", "b", "c"), "multilabel")
    assert np.array_equal(targets_of(root, 48).numpy(), np.stack(list(masks.values())))


@pytest.mark.parametrize(
    ("classes", "task", "highest", "message"),
    [
        (
            ("a", "b"),
            "multiclass",
            3,
            r"branches holds 3 .sample s\d.; expected class numbers up to",
        ),
        (("a",), "multilabel", 2, r"branches holds 2 .sample s\d.; expected 0 and 1; set it again"),
    ],
)
def test_numbers_that_no_class_has_are_refused(
    root: Path, classes: tuple[str, ...], task: Task, highest: int, message: str
) -> None:
    put(root, random_masks(1, 0, 1, highest), classes, task)
    with pytest.raises(ConfigError, match=message):
        targets_of(root, 48)


def test_an_opened_store_says_what_its_labels_are(root: Path) -> None:
    masks = random_masks(1, 0, 1, 2)
    put(root, masks, ("a", "b"), "multiclass")
    labels = sam3cache.open(root).labels
    assert (labels["branches"].task, labels["branches"].classes) == ("multiclass", ("a", "b"))
    assert (labels["mask"].task, labels["mask"].classes) == ("multilabel", ("vessel",))
    mask = labels["branches"][0]
    assert mask is not None
    assert np.array_equal(mask, masks[0])
