"""Images: from somebody's manifest to pixels on the square that the tower takes.

``read_manifest`` finds the samples, ``probe`` reads headers, ``read_image``, ``read_mask`` and
``read_labels`` decode, ``letterbox_image`` lays an image on the square.
"""

from sam3cache.images.classes import FOREGROUND, ClassTable, parse_classes
from sam3cache.images.manifest import (
    Manifest,
    ManifestSample,
    count_rows,
    find_csv,
    read_manifest,
    sample_manifest,
)
from sam3cache.images.opened import close_kept_files
from sam3cache.images.preprocessing import (
    PREPROCESSING_VERSION,
    letterbox_image,
    pixel_hash,
    preprocessing_fields,
)
from sam3cache.images.pseudonyms import key_path
from sam3cache.images.reading import (
    ImageInfo,
    probe,
    read_image,
    read_image_and_type,
    read_labels,
    read_mask,
)

__all__ = [
    "FOREGROUND",
    "PREPROCESSING_VERSION",
    "ClassTable",
    "ImageInfo",
    "Manifest",
    "ManifestSample",
    "close_kept_files",
    "count_rows",
    "find_csv",
    "key_path",
    "letterbox_image",
    "parse_classes",
    "pixel_hash",
    "preprocessing_fields",
    "probe",
    "read_image",
    "read_image_and_type",
    "read_labels",
    "read_manifest",
    "read_mask",
    "sample_manifest",
]
