"""Measuring trained heads on stored features, and what they make of angles and features."""

from sam3cache.evaluation.angle_use import AngleUse
from sam3cache.evaluation.comparing import (
    ClassPresence,
    CompareConfig,
    Compared,
    Comparison,
    PairComparison,
    PairedDifference,
    compare,
    measure_rows,
)
from sam3cache.evaluation.evaluate import (
    EvalConfig,
    checkpoint_folder,
    evaluate,
    fingerprints_of,
    serve_as_trained,
)
from sam3cache.evaluation.feature_use import FeatureUse, PartUse
from sam3cache.evaluation.notices import notices_of_features
from sam3cache.evaluation.report import EvalResult
from sam3cache.evaluation.scores import DISTANCES, MEAN_OVER_CLASSES, METRICS, ImageScore
from sam3cache.evaluation.shuffling import Difference
from sam3cache.evaluation.statistics import (
    Interval,
    Summary,
    gain_text,
    interval_text,
    mean_interval,
    number_text,
    over_text,
    summarise,
)
from sam3cache.evaluation.strata import Stratum
from sam3cache.evaluation.threshold import ThresholdChoice

__all__ = [
    "DISTANCES",
    "MEAN_OVER_CLASSES",
    "METRICS",
    "AngleUse",
    "ClassPresence",
    "CompareConfig",
    "Compared",
    "Comparison",
    "Difference",
    "EvalConfig",
    "EvalResult",
    "FeatureUse",
    "ImageScore",
    "Interval",
    "PairComparison",
    "PairedDifference",
    "PartUse",
    "Stratum",
    "Summary",
    "ThresholdChoice",
    "checkpoint_folder",
    "compare",
    "evaluate",
    "fingerprints_of",
    "gain_text",
    "interval_text",
    "mean_interval",
    "measure_rows",
    "notices_of_features",
    "number_text",
    "over_text",
    "serve_as_trained",
    "summarise",
]
