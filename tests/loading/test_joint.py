"""One reading for several: what ends it, everybody who comes there is told."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from store_builder import build_store

from sam3cache.features import open_store
from sam3cache.loading import CachedSamples
from sam3cache.loading.joint import JointReading
from sam3cache.records import Batch


class Interrupted(CachedSamples):
    """Samples whose disk fails once, after the first piece."""

    def iterate(self, *args: Any, **values: Any) -> Generator[Batch]:
        yield next(super().iterate(*args, **values))
        raise OSError(5, "Input/output error")


def test_a_failure_that_passes_is_told_to_all_as_it_was(tmp_path: Path) -> None:
    store = open_store(build_store(tmp_path / "x.zarr", level_shapes={"fpn_72": (8, 6, 6)}))
    rows = [sample.row for sample in store.samples]
    reading = JointReading(
        Interrupted(store, rows, ("fpn_72",), residency="stream"), piece_size=2, with_target=False
    )
    members = [reading.join(lambda epoch: None) for _ in range(2)]
    pieces = [member.iterate(2, epoch=1, piece_size=2, with_target=False) for member in members]
    for piece in pieces:
        assert len(next(piece).rows) == 2
    for piece in pieces:
        with pytest.raises(OSError, match="Input/output error"):
            next(piece)
