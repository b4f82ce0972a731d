"""Run SAM 3 once over your images; train heads on the cached features."""

__version__ = "0.1.0"
