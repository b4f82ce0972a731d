"""A level in several precisions: what was made for one stays with it when another is served."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from store_builder import build_store

import sam3cache
from sam3cache.errors import ConfigError
from sam3cache.training import TrainConfig, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {"fpn_72": (4, 72, 72), "fpn_72.int8": (4, 72, 72), "image_1008": (1, 8, 8)}
    return build_store(tmp_path_factory.mktemp("served") / "x.zarr", level_shapes=shapes)


def test_arrays_and_datasets_stay_with_the_precision_that_they_were_made_for(root: Path) -> None:
    store = sam3cache.open(root)
    level, dataset = store.levels["fpn_72"], store.dataset(["fpn_72"])
    exact = level[0]
    store.features.serve("int8")
    few = store.levels["fpn_72.int8"][0]
    assert not np.array_equal(exact, few)
    assert np.array_equal(store.features.read("fpn_72", 0), few)
    assert np.array_equal(level[0], exact)
    assert level.dtype == np.float16
    # A copy, as a worker process gets, opens the store for itself.
    for one in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert np.array_equal(one[0]["levels"]["fpn_72"].numpy(), exact)
    dataset = store.dataset(["fpn_72"])
    for one in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert np.array_equal(one[0]["levels"]["fpn_72"].numpy(), few)


def test_a_head_is_not_trained_on_another_precision_than_was_asked_for(tmp_path: Path) -> None:
    shapes = {"fpn_72": (4, 72, 72), "fpn_36.int8": (4, 36, 36)}
    root = build_store(tmp_path / "x.zarr", level_shapes=shapes)
    config = TrainConfig(
        store=str(root),
        name="run",
        output=str(tmp_path / "runs"),
        head="linear",
        feature_precision="int8",
        device="cpu",
    )
    message = "has level fpn_72 in no precision int8, only as fpn_72; leave --feature-precision out"
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "runs").exists()
