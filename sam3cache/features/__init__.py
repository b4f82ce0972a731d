"""The feature store: what extraction writes and training reads. docs/format.md is its definition.

Reading needs :func:`open_store` alone. Writing is :func:`describe_store`, then a block at a time,
then :func:`seal_store`; ``sam3cache.extract`` does it.
"""

from sam3cache.features.class_counts import ClassCount, classes_of_samples, count_classes
from sam3cache.features.contents import DataRecord, record_data
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.lazy import LazySequence
from sam3cache.features.levels import BLOCK_ROWS, LabelSetSpec, LevelSpec
from sam3cache.features.locks import BlockClaims, store_lock
from sam3cache.features.mirror import Fetching, watch_fetching
from sam3cache.features.objects import ObjectPath
from sam3cache.features.overlay import make_overlay
from sam3cache.features.places import Place, place_of, stamp
from sam3cache.features.precision import (
    FEATURE_PRECISIONS,
    Encoded,
    Precision,
    decode,
    encode,
    in_words,
    split_name,
    stored_dtype,
)
from sam3cache.features.receipts import (
    LABEL_CHANGE,
    Receipt,
    ReceiptKey,
    ReceiptsOnDemand,
    is_sealed,
    read_receipts,
    read_receipts_of_block,
    scan_receipts,
)
from sam3cache.features.relabel import (
    LabelSetSummary,
    open_to_change,
    put_label_set,
    remove_label_set,
    replace_annotations,
    require_label_set_name,
    staging_of,
    summarise_label_sets,
)
from sam3cache.features.repair import RepairResult, repair_store
from sam3cache.features.store import (
    FeatureStore,
    RowsWithFacts,
    StoredSample,
    interrupted_change,
    label_rows_of,
    merge_sample_facts,
    open_store,
    read_description,
    read_label_set_spec,
)
from sam3cache.features.survey import Finding
from sam3cache.features.tables import (
    AnnotationRow,
    LabelRow,
    SampleRow,
    num_replaced,
    read_annotations,
    read_samples,
    scan_annotations,
    scan_samples,
)
from sam3cache.features.verify import VerifyResult, verify_store
from sam3cache.features.writer import (
    block_of,
    describe_store,
    finish_seal,
    foreign_files,
    is_described,
    missing_items,
    note_setting,
    seal_store,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

__all__ = [
    "BLOCK_ROWS",
    "FEATURE_PRECISIONS",
    "LABEL_CHANGE",
    "AnnotationRow",
    "BlockClaims",
    "ClassCount",
    "DataRecord",
    "Encoded",
    "FeatureStore",
    "Fetching",
    "Finding",
    "Fingerprint",
    "LabelRow",
    "LabelSetSpec",
    "LabelSetSummary",
    "LazySequence",
    "LevelSpec",
    "ObjectPath",
    "Place",
    "Precision",
    "Receipt",
    "ReceiptKey",
    "ReceiptsOnDemand",
    "RepairResult",
    "RowsWithFacts",
    "SampleRow",
    "StoredSample",
    "VerifyResult",
    "block_of",
    "classes_of_samples",
    "count_classes",
    "decode",
    "describe_store",
    "encode",
    "finish_seal",
    "foreign_files",
    "in_words",
    "interrupted_change",
    "is_described",
    "is_sealed",
    "label_rows_of",
    "make_overlay",
    "merge_sample_facts",
    "missing_items",
    "note_setting",
    "num_replaced",
    "open_store",
    "open_to_change",
    "place_of",
    "put_label_set",
    "read_annotations",
    "read_description",
    "read_label_set_spec",
    "read_receipts",
    "read_receipts_of_block",
    "read_samples",
    "record_data",
    "remove_label_set",
    "repair_store",
    "replace_annotations",
    "require_label_set_name",
    "scan_annotations",
    "scan_receipts",
    "scan_samples",
    "seal_store",
    "split_name",
    "staging_of",
    "stamp",
    "store_lock",
    "stored_dtype",
    "summarise_label_sets",
    "verify_store",
    "watch_fetching",
    "write_label_block",
    "write_level_block",
    "write_sample_facts",
]
