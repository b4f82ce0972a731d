"""Real pictures, and a store of them made by the miniature tower; once for all files here."""

from pathlib import Path

import pytest
from picture_folder import write_images
from worker_thread import one_process

from sam3cache.extract import ExtractConfig, extract
from sam3cache.features import FeatureStore, open_store

LEVELS = ("fpn_72", "fpn_72.int8", "fpn_72.r5", "image_1008")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("inference"), num_images=3)


@pytest.fixture(scope="session")
def store_path(pictures: Path) -> Path:
    path = pictures / "x.zarr"
    with one_process():
        assert extract(ExtractConfig(pictures, path, levels=LEVELS, backbone="sam3-mini")).sealed
    return path


@pytest.fixture
def store(store_path: Path) -> FeatureStore:
    """The store, opened anew: whoever asks for another precision is served it from then on."""
    return open_store(store_path)
