"""Trained heads on new images, through the tower; and proof that the store takes its place."""

from sam3cache.inference.equivalence import Equivalence, check_equivalence
from sam3cache.inference.export import ExportResult, export_head
from sam3cache.inference.predictor import Predictor, load
from sam3cache.inference.run import ImageResult, PredictConfig, PredictResult, predict_images

__all__ = [
    "Equivalence",
    "ExportResult",
    "ImageResult",
    "PredictConfig",
    "PredictResult",
    "Predictor",
    "check_equivalence",
    "export_head",
    "load",
    "predict_images",
]
