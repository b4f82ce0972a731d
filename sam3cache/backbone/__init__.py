"""SAM 3's vision tower: from 1008 px pixels to features, frozen.

``spec`` says what a tower is, ``weights`` and ``hub`` where its weights come from, ``tower`` runs
it. The ``sam3`` package is imported when a tower is built, not before.
"""

from sam3cache.backbone.spec import (
    BACKBONES,
    LEVELS,
    NUMERIC_PATHS,
    NumericPath,
    TowerSpec,
    find_numeric_path,
)
from sam3cache.backbone.tower import (
    Tower,
    ignore_warnings_of_sam3,
    load_tower,
    weights_sha256,
)

__all__ = [
    "BACKBONES",
    "LEVELS",
    "NUMERIC_PATHS",
    "NumericPath",
    "Tower",
    "TowerSpec",
    "find_numeric_path",
    "ignore_warnings_of_sam3",
    "load_tower",
    "weights_sha256",
]
