"""From a feature store to batches on a device, by the fastest road that fits in memory."""

from sam3cache.loading.cached import CachedSamples
from sam3cache.loading.residency import Placement, Residency, choose_residency

__all__ = ["CachedSamples", "Placement", "Residency", "choose_residency"]
