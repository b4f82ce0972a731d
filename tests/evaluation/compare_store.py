"""Runs whose Dice on every image of a page store is known, and differs from run to run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3cache.evaluation import EvalConfig, evaluate
from sam3cache.features import open_store, record_data
from sam3cache.heads import CheckpointInfo, Head, build_head, save_checkpoint
from sam3cache.records import Batch

HEAD = "compare_store:Shifted"


class Shifted(Head):
    """Predicts what the first channels say, as many cells further to the left as it has learned.

    Of an image that is drawn with shift s, a head of c cells has Dice 1 - abs(s - c) / 4.
    """

    needs = ("fpn_72",)

    def __init__(self, level_shapes: object, *, num_classes: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cells = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch: Batch) -> Tensor:
        feature_BKSS = batch.levels["fpn_72"][:, : self.num_classes].float()
        return 20.0 * feature_BKSS.roll(-round(self.cells.item()), dims=-1)


def write_shifted(
    folder: Path,
    store: Path,
    cells: int,
    *,
    num_classes: int = 1,
    settings: Mapping[str, Any] | None = None,
    trained_on: Mapping[str, str] | None = None,
) -> Path:
    """Write a run with a best checkpoint of a head of so many cells.

    Its seed and its fold are those of the folder's name, as training has it; of "head1", 1.
    """
    seed = re.search(r"(?:seed|head)(\d+)", folder.name)
    fold = re.search(r"fold(\d+)", folder.name)
    opened = open_store(store)
    shape = opened.levels["fpn_72"].shape
    built = build_head(HEAD, {"fpn_72": shape}, {}, num_classes=num_classes)
    built.load_state_dict({"cells": torch.tensor(float(cells))})
    made_like = opened.fingerprint("fpn_72")
    info = CheckpointInfo(
        head=HEAD,
        head_options={},
        num_classes=num_classes,
        levels={
            "fpn_72": {
                "shape": list(shape),
                "digest": made_like.digest,
                "fields": dict(made_like.fields),
            }
        },
        label_set="mask",
        epoch=3,
        settings={"fold": int(fold[1]) if fold else None, **(settings or {})},
        seed=int(seed[1]) if seed else 0,
        trained_on=trained_on or {},
        data=dataclasses.asdict(record_data(opened, "mask")),
    )
    save_checkpoint(folder / "best", built, info)
    return folder


def evaluated(
    folder: Path,
    store: Path,
    cells: int,
    *,
    num_classes: int = 1,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a run and evaluate it; ``options`` go to the evaluation."""
    run = write_shifted(folder, store, cells, num_classes=num_classes, settings=settings)
    quick = {"check_angles": False, "check_features": False, "page": False}
    evaluate(EvalConfig(store, run, head=HEAD, **quick, **options))
    return run
