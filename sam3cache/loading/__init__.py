"""From a feature store to batches on a device, by the fastest road that fits in memory."""

from sam3cache.loading.cached import CachedSamples, Residency

__all__ = ["CachedSamples", "Residency"]
