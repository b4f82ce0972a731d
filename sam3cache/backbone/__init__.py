"""SAM 3's vision tower: from 1008 px pixels to features, frozen.

``spec`` says what a tower is, ``weights`` and ``hub`` where its weights come from, ``tower`` runs
it. The ``sam3`` package is imported when a tower is built, not before.
"""

from sam3cache.backbone.spec import BACKBONES, LEVELS, TowerSpec
from sam3cache.backbone.tower import (
    NumericPath,
    Tower,
    ignore_warnings_of_sam3,
    load_tower,
    weights_sha256,
)

__all__ = [
    "BACKBONES",
    "LEVELS",
    "NumericPath",
    "Tower",
    "TowerSpec",
    "ignore_warnings_of_sam3",
    "load_tower",
    "weights_sha256",
]
