"""Predictions as COCO JSON: run lengths, as pycocotools has them.

Run lengths say every pixel, holes and single ones too; polygons would not.

Shape legend: C classes, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

import sam3cache
from sam3cache.records import Sample


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image and what was predicted on it.

    Attributes:
        sample: which it is.
        height_px: of the image.
        width_px: of the image.
        annotations: from :func:`annotations_of`.
    """

    sample: Sample
    height_px: int
    width_px: int
    annotations: tuple[dict[str, Any], ...]


def annotations_of(
    mask_CHW: NDArray[np.bool_], probability_CHW: NDArray[np.float32]
) -> tuple[dict[str, Any], ...]:
    """Return an annotation for each class that has pixels, still without its own and image's id.

    Args:
        mask_CHW: which pixels are of each class.
        probability_CHW: of each class; ``score`` is their mean over the pixels of the mask.
    """
    found = []
    for number, (mask_HW, probability_HW) in enumerate(
        zip(mask_CHW, probability_CHW, strict=True), start=1
    ):
        if not mask_HW.any():
            continue
        runs = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
        found.append(
            {
                "category_id": number,
                "segmentation": {"size": list(runs["size"]), "counts": runs["counts"].decode()},
                "area": int(coco_mask.area(runs)),
                "bbox": [float(value) for value in coco_mask.toBbox(runs)],
                "iscrowd": 0,
                "score": round(float(probability_HW[mask_HW].mean(dtype=np.float64)), 6),
            }
        )
    return tuple(found)


def coco_json(images: Iterable[CocoImage], classes: Sequence[str]) -> str:
    """Return a data set of COCO's format; ids count from 1, classes as in masks of numbers.

    Args:
        images: in order.
        classes: names of what is predicted, in order.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        entry: dict[str, Any] = {
            "id": image_id,
            "file_name": image.sample.source,
            "height": image.height_px,
            "width": image.width_px,
            "sample": image.sample.id,
        }
        if image.sample.frame is not None:
            entry["frame"] = image.sample.frame
        entries.append(entry)
        for annotation in image.annotations:
            numbers = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**numbers, **annotation})
    content = {
        "info": {"description": "masks predicted by sam3cache", "version": sam3cache.__version__},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
    }
    return json.dumps(content, allow_nan=False) + "\n"
