"""The feature store: what extraction writes and training reads. docs/format.md is its definition.

Reading needs :func:`open_store` alone. Writing is :func:`describe_store`, then a block at a time,
then :func:`seal_store`; ``sam3cache.extract`` does it.
"""

from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import BLOCK_ROWS, LabelSetSpec, LevelSpec
from sam3cache.features.locks import BlockClaims, store_lock
from sam3cache.features.store import FeatureStore, StoredSample, open_store
from sam3cache.features.tables import AnnotationRow, LabelRow, SampleRow
from sam3cache.features.writer import (
    describe_store,
    seal_store,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

__all__ = [
    "BLOCK_ROWS",
    "AnnotationRow",
    "BlockClaims",
    "FeatureStore",
    "Fingerprint",
    "LabelRow",
    "LabelSetSpec",
    "LevelSpec",
    "SampleRow",
    "StoredSample",
    "describe_store",
    "open_store",
    "seal_store",
    "store_lock",
    "write_label_block",
    "write_level_block",
    "write_sample_facts",
]
