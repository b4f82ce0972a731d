"""Runs against a baseline: their scores paired image by image, with intervals and a verdict."""

from sam3cache.evaluation.comparing.compare import (
    ClassPresence,
    CompareConfig,
    Compared,
    Comparison,
    PairComparison,
    compare,
)
from sam3cache.evaluation.comparing.page import measure_rows
from sam3cache.evaluation.comparing.statistics import PairedDifference

__all__ = [
    "ClassPresence",
    "CompareConfig",
    "Compared",
    "Comparison",
    "PairComparison",
    "PairedDifference",
    "compare",
    "measure_rows",
]
