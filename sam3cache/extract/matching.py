"""Which sample of a store a manifest's row speaks of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sam3cache.errors import ManifestError
from sam3cache.features import StoredSample
from sam3cache.records import Sample


def match_samples(
    stored: Sequence[StoredSample], given: Sequence[Sample], *, manifest: str, store: Path
) -> dict[int, Sample]:
    """Find the samples of a store that a manifest's rows speak of.

    An id decides; of what is left, picture and frame, where they are of one sample alone on both
    sides.

    Args:
        stored: samples of the store.
        given: rows of the manifest.
        manifest: what messages call it.
        store: to name it in messages.

    Returns:
        By row of the store, the manifest's sample.

    Raises:
        ManifestError: when none matches.
    """
    by_id = {sample.id: sample for sample in given}
    matched = {sample.row: by_id[sample.id] for sample in stored if sample.id in by_id}
    used = {sample.id for sample in matched.values()}
    num_given = Counter((sample.source, sample.frame) for sample in given)
    num_stored = Counter((sample.source, sample.frame) for sample in stored)
    by_picture = {
        (sample.source, sample.frame): sample
        for sample in given
        if sample.source and sample.id not in used
    }
    for sample in stored:
        picture = (sample.source, sample.frame)
        if sample.row in matched or picture not in by_picture:
            continue
        if num_given[picture] == num_stored[picture] == 1:
            matched[sample.row] = by_picture[picture]
    if not matched:
        raise ManifestError(
            f"{manifest}: none of its {len(given)} rows is of {store}, neither by id "
            f"({_first([sample.id for sample in given])} here, "
            f"{_first([sample.id for sample in stored])} in the store) nor by image and frame; "
            "give ids of the store, or paths as they were when it was extracted"
        )
    return matched


def _first(ids: Sequence[str]) -> str:
    return f"{ids[0]}, …" if ids else "none"
