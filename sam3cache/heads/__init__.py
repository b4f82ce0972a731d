"""Heads: small networks over cached features, their registry, and their checkpoints.

A head maps a ``Batch`` to mask logits on the padded square. ``HEADS`` holds those that come with
the package; a user's own is named "package.module:Class", both to train it and to load it.
"""

from sam3cache.heads.checkpoint import (
    CheckpointInfo,
    check_fingerprints,
    load_checkpoint,
    save_checkpoint,
)
from sam3cache.heads.head import Head, count_parameters
from sam3cache.heads.registry import (
    HEADS,
    PartSize,
    build_head,
    describe_head,
    fitting_heads,
    forward_gflop,
)
from sam3cache.heads.view import FiLM, ViewEncoder

__all__ = [
    "HEADS",
    "CheckpointInfo",
    "FiLM",
    "Head",
    "PartSize",
    "ViewEncoder",
    "build_head",
    "check_fingerprints",
    "count_parameters",
    "describe_head",
    "fitting_heads",
    "forward_gflop",
    "load_checkpoint",
    "save_checkpoint",
]
