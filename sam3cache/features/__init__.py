"""The feature store: what extraction writes and training reads. docs/format.md is its definition.

Reading needs :func:`open_store` alone. Writing is :func:`describe_store`, then a block at a time,
then :func:`seal_store`; ``sam3cache.extract`` does it.
"""

from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import BLOCK_ROWS, LabelSetSpec, LevelSpec
from sam3cache.features.locks import BlockClaims, store_lock
from sam3cache.features.precision import Encoded, Precision, decode, split_name, stored_dtype
from sam3cache.features.receipts import is_sealed, read_receipts, read_receipts_of_block
from sam3cache.features.store import (
    FeatureStore,
    StoredSample,
    label_rows_of,
    merge_sample_facts,
    open_store,
    read_description,
    read_label_set_spec,
)
from sam3cache.features.tables import (
    AnnotationRow,
    LabelRow,
    SampleRow,
    read_annotations,
    read_samples,
)
from sam3cache.features.writer import (
    block_of,
    describe_store,
    is_described,
    missing_items,
    seal_store,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

__all__ = [
    "BLOCK_ROWS",
    "AnnotationRow",
    "BlockClaims",
    "Encoded",
    "FeatureStore",
    "Fingerprint",
    "LabelRow",
    "LabelSetSpec",
    "LevelSpec",
    "Precision",
    "SampleRow",
    "StoredSample",
    "block_of",
    "decode",
    "describe_store",
    "is_described",
    "is_sealed",
    "label_rows_of",
    "merge_sample_facts",
    "missing_items",
    "open_store",
    "read_annotations",
    "read_description",
    "read_label_set_spec",
    "read_receipts",
    "read_receipts_of_block",
    "read_samples",
    "seal_store",
    "split_name",
    "store_lock",
    "stored_dtype",
    "write_label_block",
    "write_level_block",
    "write_sample_facts",
]
