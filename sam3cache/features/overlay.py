"""Labels and annotations beside a store that cannot or must not be written: an overlay.

An overlay is a store without levels. Its setting ``overlay_of`` is the seal of the store that it
was made for, and its table of samples names that store's rows, ids and pixels, which have to agree.
"""

from __future__ import annotations

from pathlib import Path

from sam3cache.errors import StoreError, UnsealedStoreError
from sam3cache.features.files import canonical_json
from sam3cache.features.locks import store_lock
from sam3cache.features.receipts import CHANGE_FILE, OVERLAY_OF
from sam3cache.features.store import FeatureStore, open_overlay
from sam3cache.features.writer import GROUP_FILE, describe_store, foreign_files, seal_store
from sam3cache.runtime import write_atomic


def make_overlay(folder: Path, store: FeatureStore) -> None:
    """Make an overlay of a store, without labels and annotations yet; one that is there is kept.

    Args:
        folder: of the overlay.
        store: opened, and sealed.

    Raises:
        StoreError: when the folder is in use for something else, such as a store of its own.
        UnsealedStoreError: when the store is not sealed.
        OSError: when it cannot be written.
    """
    if not store.sealed:
        raise UnsealedStoreError(
            f"{store.path} is not sealed: an overlay is of a finished store; run the same "
            "`sam3cache extract` again first"
        )
    if (folder / GROUP_FILE).exists():
        open_overlay(folder, allow_unsealed=True)  # Refuses a store of its own.
        return
    if folder.exists() and (not folder.is_dir() or foreign_files(folder)):
        raise StoreError(
            f"{folder} is there and no overlay; give --overlay a new folder, or one that it made"
        )
    with store_lock(folder):
        (folder / CHANGE_FILE).parent.mkdir(exist_ok=True)
        write_atomic(folder / CHANGE_FILE, canonical_json({"change": "making the overlay"}))
        describe_store(
            folder,
            settings={OVERLAY_OF: store.seal, "store": store.path.resolve().name},
            levels={},
            label_sets={},
            samples=[row for row in store.sample_rows if row.status == "ok"],
            annotations=(),
        )
        seal_store(folder)
