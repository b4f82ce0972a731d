"""Measuring trained heads on stored features, and whether they use the view angle."""

from sam3cache.evaluation.angle_use import AngleUse, Difference, format_view
from sam3cache.evaluation.evaluate import (
    EvalConfig,
    checkpoint_folder,
    evaluate,
    fingerprints_of,
    serve_as_trained,
)
from sam3cache.evaluation.notices import notices_of_features
from sam3cache.evaluation.report import METRICS, EvalResult, ImageScore
from sam3cache.evaluation.statistics import (
    Interval,
    Summary,
    bootstrap_interval,
    interval_text,
    number_text,
    summarise,
)

__all__ = [
    "METRICS",
    "AngleUse",
    "Difference",
    "EvalConfig",
    "EvalResult",
    "ImageScore",
    "Interval",
    "Summary",
    "bootstrap_interval",
    "checkpoint_folder",
    "evaluate",
    "fingerprints_of",
    "format_view",
    "interval_text",
    "notices_of_features",
    "number_text",
    "serve_as_trained",
    "summarise",
]
