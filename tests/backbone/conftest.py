"""One small tower in every layout, made once."""

from pathlib import Path

import pytest
import torch
from torch import nn
from towers import UNIT, build_transformers_model, randomize, write_checkpoints


@pytest.fixture(scope="session")
def transformers_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build_transformers_model(UNIT)
    randomize(model)
    return model


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, transformers_model: nn.Module
) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), transformers_model)
