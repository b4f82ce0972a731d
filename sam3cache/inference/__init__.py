"""Trained heads on new images, through the tower; and proof that the store takes its place."""

from sam3cache.inference.equivalence import Equivalence, check_equivalence
from sam3cache.inference.predictor import Predictor, load

__all__ = ["Equivalence", "Predictor", "check_equivalence", "load"]
