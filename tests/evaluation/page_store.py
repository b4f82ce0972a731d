"""A small store whose features are the prediction, so that every Dice on a page is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    open_store,
    record_data,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)
from sam3cache.heads import CheckpointInfo, Head, build_head, save_checkpoint
from sam3cache.records import Batch
from sam3cache.tasks import Task

HEIGHT_PX, WIDTH_PX = 96, 128
MASK_HEIGHT_PX, MASK_WIDTH_PX = 24, 32
SIDE = 16
PICTURE_SIDE_PX = 512
CELL_PX = MASK_WIDTH_PX // SIDE

FEATURES = LevelSpec("fpn_72", (4, SIDE, SIDE))


@dataclass(frozen=True)
class Drawn:
    """One image: its true mask is 4 x 4 cells, its prediction the same ``shift`` cells on.

    Attributes:
        shift: Dice is 1 - shift / 4.
        id: of the sample; None for "s" and its number.
        group: None for "g" and its number.
        pixels: what stands for the picture where its hash is told; None for its number.
        angles_deg: primary and secondary.
        has_mask: whether there is a mask.
        is_empty: whether mask and prediction are empty.
        predicts_nothing: whether the prediction is empty.
        extra: columns of the manifest.
    """

    shift: int = 0
    id: str | None = None
    group: str | None = None
    pixels: int | None = None
    angles_deg: tuple[float | None, float | None] = (30.0, -25.0)
    has_mask: bool = True
    is_empty: bool = False
    predicts_nothing: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)


def write_page_store(
    root: Path,
    drawn: Sequence[Drawn],
    *,
    num_channels: int = 1,
    has_features: bool = True,
    resize_mode: str = "letterbox",
    classes: tuple[str, ...] = ("vessel",),
    task: Task = "multilabel",
    splits: tuple[str, ...] = ("test",),
    edit_mask: Callable[[int, np.ndarray], np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    weights: str = "w",
    seal: bool = True,
) -> Path:
    """Write a store of one block.

    Args:
        root: where.
        drawn: the images; each has its number as grey value.
        num_channels: of the pictures; 0 for a store without any.
        has_features: whether it has a level beside the pictures.
        resize_mode: of the levels' fingerprints. "squash" leaves the mask's cells where they are
            and stretches the rest with the square.
        classes: of the masks; each plane lies one cell below the one before.
        task: of the masks; as class numbers, the next class covers all but the first row of cells.
        splits: of the images in turn.
        edit_mask: given a row and its mask (M, H, W), returns the mask to store.
        settings: of the store.
        weights: ``weights_sha256`` of the features.
        seal: whether the store is sealed.
    """
    fields = {"preprocessing.resize_mode": resize_mode}
    levels = {}
    if has_features:
        made_like = Fingerprint({"level": "fpn_72", "weights_sha256": weights, **fields})
        levels["fpn_72"] = (FEATURES, made_like)
    if num_channels:
        shape = (num_channels, PICTURE_SIDE_PX, PICTURE_SIDE_PX)
        picture = LevelSpec("image_1008", shape, "uint8")
        levels["image_1008"] = (picture, Fingerprint({"level": "image_1008", **fields}))
    label_set = LabelSetSpec("mask", classes, MASK_HEIGHT_PX, MASK_WIDTH_PX, task)
    facts = [
        SampleRow(
            i,
            image.id or f"s{i}",
            f"images/{i}.png",
            height_px=HEIGHT_PX,
            width_px=WIDTH_PX,
            num_channels=num_channels,
            pixel_sha256=f"{i if image.pixels is None else image.pixels:064x}",
            status="pending",
        )
        for i, image in enumerate(drawn)
    ]
    notes = [
        AnnotationRow(
            *(i, facts[i].id, splits[i % len(splits)], image.group or f"g{i}", *image.angles_deg),
            image.extra,
        )
        for i, image in enumerate(drawn)
    ]
    with store_lock(root):
        describe_store(
            root,
            settings=dict(settings or {"backbone": "test"}),
            levels=levels,
            label_sets={"mask": label_set},
            samples=facts,
            annotations=notes,
        )
    rows_on_square = SIDE if resize_mode == "squash" else SIDE * HEIGHT_PX // WIDTH_PX
    masks: dict[int, np.ndarray | None] = {}
    features: dict[int, np.ndarray] = {}
    pictures: dict[int, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for i, image in enumerate(drawn):
        feature_CHW = rng.standard_normal(FEATURES.shape).astype(np.float16)
        feature_CHW[: len(classes)] = -1
        mask_KHW = np.zeros((len(classes), MASK_HEIGHT_PX, MASK_WIDTH_PX), dtype=np.uint8)
        if not image.is_empty:
            for k in range(len(classes)):
                at = slice(2 + k, 6 + k)
                if not image.predicts_nothing:
                    feature_CHW[k, at, 3 + image.shift : 7 + image.shift] = 1
                mask_KHW[k, at.start * CELL_PX : at.stop * CELL_PX, 3 * CELL_PX : 7 * CELL_PX] = 1
        if rows_on_square == SIDE:
            # The same 12 rows of cells, over the whole height of the square.
            feature_CHW = feature_CHW[:, (np.arange(SIDE) * 12 // SIDE)]
        features[i] = feature_CHW
        if task == "multiclass":
            numbers = np.arange(1, len(classes) + 1, dtype=np.uint8)[:, None, None]
            mask_KHW = (mask_KHW * numbers).max(axis=0, keepdims=True)
        if edit_mask is not None:
            mask_KHW = edit_mask(i, mask_KHW)
        masks[i] = mask_KHW if image.has_mask else None
        content_px = PICTURE_SIDE_PX * rows_on_square // SIDE
        square_CHW = np.zeros((num_channels, PICTURE_SIDE_PX, PICTURE_SIDE_PX), dtype=np.uint8)
        square_CHW[:, :content_px] = 100 + 10 * i
        pictures[i] = square_CHW
    for name, values in (("fpn_72", features), ("image_1008", pictures)):
        if name in levels:
            spec, made_like = levels[name]
            write_level_block(root, spec, made_like.digest, 0, values)
    sources = {i: LabelRow(i, source=f"masks/{i}.png") for i in masks}
    write_label_block(root, label_set, 0, masks, sources)
    write_sample_facts(root, 0, [replace(fact, status="ok") for fact in facts])
    if seal:
        with store_lock(root):
            seal_store(root)
    return root


class FromFeatures(Head):
    """Predicts what the first channels say; of class numbers, the higher goes before the lower."""

    needs = ("fpn_72",)

    def __init__(
        self, level_shapes: object, *, num_classes: int = 1, task: Task = "multilabel"
    ) -> None:
        super().__init__()
        self.num_classes, self.task = num_classes, task
        self.gain = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.gain.weight, 20.0)

    def forward(self, batch: Batch) -> Tensor:
        gain = self.gain.weight[0, 0]
        if self.task == "multilabel":
            return gain * batch.levels["fpn_72"][:, : self.num_classes].float()
        said_BCHW = batch.levels["fpn_72"][:, : self.num_classes - 1].float()
        order = torch.arange(1, self.num_classes, device=said_BCHW.device)[:, None, None]
        number_BHW = ((said_BCHW > 0) * order).amax(dim=1)
        one_hot_BHWK = nn.functional.one_hot(number_BHW, self.num_classes)
        return gain * (2 * one_hot_BHWK.movedim(-1, 1).float() - 1)


class Faint(FromFeatures):
    """Is right, but sure of nothing: 0.38 for what is mask, 0.08 for what is not, and between."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) / 20 - 1.5


class FromOneOfThree(Head):
    """Reads two levels of features and the picture, and looks at one of them alone."""

    needs = ("fpn_72", "fpn_144", "image_1008")

    def __init__(self, level_shapes: object, *, num_classes: int = 1, used: str = "fpn_72") -> None:
        super().__init__()
        self.used = used
        self.bias = nn.Parameter(torch.tensor(-100.0 if used == "image_1008" else -2.0))

    def forward(self, batch: Batch) -> Tensor:
        return batch.levels[self.used][:, :1].float() + self.bias


class FromPicture(Head):
    """Predicts the brighter pixels; it reads no level of a tower."""

    needs = ("image_1008",)

    def __init__(self, level_shapes: object, *, num_classes: int = 1) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-90.0))

    def forward(self, batch: Batch) -> Tensor:
        return batch.levels["image_1008"][:, :1].float() + self.bias


def write_run(
    folder: Path,
    store: Path,
    head: str = "page_store:FromFeatures",
    *,
    num_classes: int = 1,
    task: Task = "multilabel",
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run with a best checkpoint, epoch 3, of a head for the levels of a store."""
    opened = open_store(store, allow_unsealed=True)
    shapes = {name: spec.shape for name, spec in opened.levels.items()}
    options = {**(options or {}), **({} if task == "multilabel" else {"task": task})}
    built = build_head(head, shapes, options, num_classes=num_classes)
    info = CheckpointInfo(
        head=head,
        head_options=options,
        num_classes=num_classes,
        task=task,
        levels={
            name: {
                "shape": list(shapes[name]),
                "digest": opened.fingerprint(name).digest,
                "fields": dict(opened.fingerprint(name).fields),
            }
            for name in built.needs
        },
        label_set="mask",
        epoch=3,
        settings=settings or {},
        data=asdict(record_data(opened, "mask")),
    )
    save_checkpoint(folder / "best", built, info)
    return folder
