from pathlib import Path

import pytest
from picture_folder import write_images


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for two blocks, most of which are missing: the tower is slow."""
    folder = write_images(tmp_path_factory.mktemp("pictures"))
    for number in range(6, 16):
        (folder / "images" / f"{number:02}.png").unlink()
    return folder
