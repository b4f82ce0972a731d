"""The first pass: SAM 3's vision tower once over every image, into a feature store.

``run`` tells the story; ``rows`` gives samples their rows, ``pool`` keeps a worker a device busy,
``worker`` turns a block of samples into committed features, and ``device`` puts batches of them
through the tower.
"""

from sam3cache.extract.config import (
    DEFAULT_LEVELS,
    ExtractConfig,
    ExtractProgress,
    ExtractResult,
    TimeShares,
    WorkerStatus,
)
from sam3cache.extract.run import extract

__all__ = [
    "DEFAULT_LEVELS",
    "ExtractConfig",
    "ExtractProgress",
    "ExtractResult",
    "TimeShares",
    "WorkerStatus",
    "extract",
]
