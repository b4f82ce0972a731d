"""A small store of images with variants, and a head that notes what it is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from sam3cache.features import (
    AnnotationRow,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    describe_store,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.heads import Head
from sam3cache.records import Batch

NUM_TRAIN, NUM_VAL = 8, 2
VARIANT = "gamma1.5"
NUM_ROWS = 2 * NUM_TRAIN + NUM_VAL
"""First the images of train, then those of val, then a variant of each of train."""

_SPEC = LevelSpec("fpn_72", (4, 12, 12))
_LABELS = LabelSetSpec("mask", ("vessel",), 48, 48)
_BLOCK = 16


def image_of(row: int) -> int:
    """Return the row of the image that a row is of, its own or that of its variant."""
    return row - NUM_TRAIN - NUM_VAL if row >= NUM_TRAIN + NUM_VAL else row


def build_variant_store(root: Path, *, num_rows: int = NUM_ROWS) -> Path:
    """Write the store: each image of a group of its own, channel 1 of every feature its row.

    Args:
        root: of the store.
        num_rows: how many of its rows; ``NUM_TRAIN + NUM_VAL``: no variants.
    """
    rng = np.random.default_rng(0)
    samples, notes = [], []
    for row in range(num_rows):
        image = image_of(row)
        is_variant = row != image
        id_ = f"s{image}" + is_variant * f"~{VARIANT}"
        samples.append(
            SampleRow(
                row,
                id_,
                f"images/{image}.png",
                height_px=96,
                width_px=96,
                num_channels=1,
                pixel_sha256=hashlib.sha256(id_.encode()).hexdigest(),
                status="ok",
                base_id=f"s{image}" if is_variant else None,
                variant=VARIANT if is_variant else None,
            )
        )
        split = "train" if image < NUM_TRAIN else "val"
        notes.append(AnnotationRow(row, id_, split, f"g{image}", 10.0, 5.0))
    fingerprint = Fingerprint(
        {"level": "fpn_72", "weights_sha256": "test", "preprocessing.resize_mode": "letterbox"}
    )
    with store_lock(root):
        describe_store(
            root,
            settings={"backbone": "test", "batch_size": 1},
            levels={"fpn_72": (_SPEC, fingerprint)},
            label_sets={"mask": _LABELS},
            samples=samples,
            annotations=notes,
        )
    for block, first in enumerate(range(0, num_rows, _BLOCK)):
        rows = samples[first : first + _BLOCK]
        masks: dict[int, np.ndarray | None] = {}
        values = {}
        for row in rows:
            image = image_of(row.row)
            mask = np.zeros(_LABELS.shape, dtype=np.uint8)
            mask[0, 4 + image : 24 + image, 8:32] = 1
            if row.variant is None:
                masks[row.row] = mask
            feature = rng.standard_normal(_SPEC.shape)
            feature[0] += 4.0 * mask[0, ::4, ::4]
            feature[1] = row.row
            values[row.row] = feature.astype(np.float32)
        sources = {row: LabelRow(row, source=f"masks/{row}.png") for row in masks}
        write_level_block(root, _SPEC, fingerprint.digest, block, values)
        write_label_block(root, _LABELS, block, masks, sources)
        write_sample_facts(root, block, rows)
    with store_lock(root):
        seal_store(root)
    return root


class Noting(Head):
    """A convolution that notes the rows it is trained on, as the features tell them.

    Attributes:
        trained: by head, in the order in which they were built, the rows so far.
    """

    needs = ("fpn_72",)
    trained: ClassVar[list[set[int]]] = []

    def __init__(self, level_shapes: Mapping[str, tuple[int, int, int]], *, num_classes: int = 1):
        super().__init__()
        self.layer = nn.Conv2d(level_shapes["fpn_72"][0], num_classes, 1)
        self._rows: set[int] = set()
        self.trained.append(self._rows)

    def forward(self, batch: Batch) -> Tensor:
        feature_BCHW = self.feature(batch, "fpn_72")
        if self.training:
            self._rows.update(int(row) for row in feature_BCHW[:, 1, 0, 0])
        logits_BKHW: Tensor = self.layer(feature_BCHW)
        return logits_BKHW
