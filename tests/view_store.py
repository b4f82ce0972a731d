"""A store whose masks depend on the view angle alone, and heads that do or do not look at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from sam3cache.heads import CheckpointInfo, Head, build_head, save_checkpoint
from sam3cache.records import Batch

HEIGHT_PX, WIDTH_PX = 72, 96
MASK_HEIGHT_PX, MASK_WIDTH_PX = 36, 48
LEVEL = LevelSpec("fpn_72", (4, 72, 72))
FINGERPRINT = {"level": "fpn_72", "weights_sha256": "w", "preprocessing.resize_mode": "letterbox"}

View = tuple[float | None, float | None]


def write_view_store(
    root: Path,
    views: Sequence[View],
    *,
    split: str = "test",
    fingerprint: dict[str, str] | None = None,
    masks: dict[int, np.ndarray | None] | None = None,
    seal: bool = True,
) -> Path:
    """Write a store of one block: each image's mask is its left half when the view is RAO, else its
    right half. Channel 0 of the features is the column, from -1 to 1; the others are noise. Each
    image is a group of its own.

    Args:
        root: where.
        views: by image, primary and secondary angle.
        split: of all images.
        fingerprint: of the level.
        masks: other masks by row; None for no mask.
        seal: whether the store is sealed.
    """
    assert len(views) <= 16
    made_like = Fingerprint(fingerprint or FINGERPRINT)
    label_set = LabelSetSpec("mask", ("vessel",), MASK_HEIGHT_PX, MASK_WIDTH_PX)
    facts = [
        SampleRow(
            i,
            f"s{i}",
            f"images/{i}.png",
            height_px=HEIGHT_PX,
            width_px=WIDTH_PX,
            num_channels=1,
            pixel_sha256=f"{i:064x}",
            status="pending",
        )
        for i in range(len(views))
    ]
    with store_lock(root):
        describe_store(
            root,
            settings={"backbone": "test"},
            levels={"fpn_72": (LEVEL, made_like)},
            label_sets={"mask": label_set},
            samples=facts,
            annotations=[
                AnnotationRow(i, f"s{i}", split, f"g{i}", *view) for i, view in enumerate(views)
            ],
        )
    rng = np.random.default_rng(0)
    features, drawn = {}, {}
    for i, (primary, _) in enumerate(views):
        feature_CHW = rng.standard_normal(LEVEL.shape).astype(np.float16)
        feature_CHW[0] = np.linspace(-1, 1, 72)
        features[i] = feature_CHW
        mask_1HW = np.zeros((1, MASK_HEIGHT_PX, MASK_WIDTH_PX), dtype=np.uint8)
        half = slice(0, 24) if primary is None or primary < 0 else slice(24, 48)
        mask_1HW[:, :, half] = 1
        drawn[i] = mask_1HW
    write_level_block(root, LEVEL, made_like.digest, 0, features)
    drawn |= masks or {}
    sources = {i: LabelRow(i, source=f"masks/{i}.png") for i in drawn}
    write_label_block(root, label_set, 0, drawn, sources)
    write_sample_facts(root, 0, [_ok(fact) for fact in facts])
    if seal:
        with store_lock(root):
            seal_store(root)
    return root


def _ok(fact: SampleRow) -> SampleRow:
    return SampleRow(**{n: getattr(fact, n) for n in SampleRow.__slots__} | {"status": "ok"})


class Sided(Head):
    """Predicts the left half for RAO and the right half for LAO, from the angle alone."""

    needs = ("fpn_72",)

    def __init__(self, level_shapes: object, *, num_classes: int = 1, gain: float = 50.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, batch: Batch) -> Tensor:
        side_B = batch.angles_B2[:, 0].nan_to_num(-1.0).sign()
        return self.gain * side_B[:, None, None, None] * batch.levels["fpn_72"][:, :1].float()


def write_checkpoint(
    folder: Path,
    head: str,
    *,
    options: dict[str, Any] | None = None,
    fingerprint: dict[str, str] | None = None,
    edit: Callable[[nn.Module], None] = lambda head: None,
) -> Path:
    """Write a run with a best checkpoint of a head as it is built; ``edit`` may change it first."""
    torch.manual_seed(0)
    built = build_head(head, {"fpn_72": LEVEL.shape}, options or {})
    edit(built)
    made_like = Fingerprint(fingerprint or FINGERPRINT)
    info = CheckpointInfo(
        head=head,
        head_options=options or {},
        num_classes=1,
        levels={
            "fpn_72": {
                "shape": list(LEVEL.shape),
                "digest": made_like.digest,
                "fields": dict(made_like.fields),
            }
        },
        label_set="mask",
        epoch=7,
    )
    save_checkpoint(folder / "best", built, info)
    return folder
