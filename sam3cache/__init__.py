"""Run SAM 3 once over your images; train heads on the cached features.

The road: images go through the vision tower once (``sam3cache extract``) into a feature store, a
folder that any Zarr library reads. Heads train on it and are measured on it in seconds (``sam3cache
train``, ``eval``), as often as you like, without SAM 3. In Python:

    store = sam3cache.open("features/angio.zarr")      # samples, levels, labels, batches
    predictor = sam3cache.load("checkpoints/first")    # a trained head on new images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sam3cache.errors import Sam3CacheError
    from sam3cache.heads import Head
    from sam3cache.inference import Predictor, load
    from sam3cache.loading.opened import OpenedStore, open
    from sam3cache.records import Batch

__all__ = [
    "Batch",
    "Head",
    "OpenedStore",
    "Predictor",
    "Sam3CacheError",
    "__version__",
    "load",
    "open",
]

# Imported when they are first used: torch alone takes seconds.
_HOMES = {
    "Batch": "records",
    "Head": "heads",
    "OpenedStore": "loading.opened",
    "Predictor": "inference",
    "Sam3CacheError": "errors",
    "load": "inference",
    "open": "loading.opened",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
