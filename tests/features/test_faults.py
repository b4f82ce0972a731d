"""The n-th operation on the disk fails, for every n until a run is clean: nothing is lost.

By default for every fifth n, as all of them take a while.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from failing_disk import FailingDisk

from sam3cache.features import (
    AnnotationRow,
    BlockClaims,
    Fingerprint,
    LabelRow,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    block_of,
    describe_store,
    finish_seal,
    is_described,
    is_sealed,
    merge_sample_facts,
    missing_items,
    open_store,
    read_receipts,
    seal_store,
    store_lock,
    write_label_block,
    write_level_block,
    write_sample_facts,
)

# int8 has a second array, so that a block of it is more than one file.
LEVEL = LevelSpec("fpn_72.int8", (2, 4, 4))
FINGERPRINT = Fingerprint({"level": LEVEL.name})
LEVELS = {LEVEL.name: (LEVEL, FINGERPRINT)}
LABEL_SET = LabelSetSpec("mask", ("vessel",), 8, 8)


def features_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).standard_normal(LEVEL.shape).astype(np.float16)


def mask_of(row: int, version: int) -> np.ndarray:
    """A mask whose file has the same size in every version."""
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, (row + version) % 8, 3] = 1
    return mask


def go_on(root: Path, rows: Mapping[int, int]) -> None:
    """Do what is missing of a store, as an extraction does; ``rows``: versions of masks by row."""
    samples = [SampleRow(row, f"s{row}", f"{row}.png", None, 8, 8, 1) for row in rows]
    masks = {row: LabelRow(row, source="m.png", mtime_ns=version) for row, version in rows.items()}

    def missing() -> dict[int, frozenset[str]]:
        receipts = read_receipts(root)
        label_sources = {"mask": masks}
        return missing_items(samples, receipts, root, levels=LEVELS, label_sources=label_sources)

    with store_lock(root):
        description = {
            "settings": {},
            "levels": LEVELS,
            "label_sets": {"mask": LABEL_SET},
            "samples": merge_sample_facts(samples, read_receipts(root)),
            "annotations": [AnnotationRow(row, f"s{row}", "train", "g") for row in rows],
        }
        if not is_described(root, **description) or (missing() and is_sealed(root)):
            describe_store(root, **description)
    claims = BlockClaims(root)
    for block, items in missing().items():
        with claims.claim(block) as ours:
            assert ours
            members = [row for row in rows if block_of(row) == block]
            if LEVEL.item in items:
                features = {row: features_of(row) for row in members}
                write_level_block(root, LEVEL, FINGERPRINT.digest, block, features)
            if LABEL_SET.item in items:
                contents = {row: mask_of(row, rows[row]) for row in members}
                write_label_block(root, LABEL_SET, block, contents, masks)
            facts = [replace(sample, status="ok") for sample in samples if sample.row in members]
            write_sample_facts(root, block, facts)
    with store_lock(root):
        assert not missing()
        if is_sealed(root):
            finish_seal(root)
        else:
            seal_store(root)


def files_of(root: Path) -> dict[str, bytes]:
    """Contents by path; locks mean nothing."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    }


def finished(root: Path, expected: Mapping[str, bytes]) -> dict[str, int]:
    """Times of change of the files that receipts name, and that are as they shall be."""
    return {
        shard.key: (root / shard.key).stat().st_mtime_ns
        for receipt in read_receipts(root).values()
        for shard in receipt.shards
        if receipt.is_done(root) and (root / shard.key).read_bytes() == expected.get(shard.key)
    }


def check_what_is_there(root: Path, versions: Mapping[int, set[int]]) -> None:
    """Whatever the store claims to hold can be read, and is right."""
    store = open_store(root, allow_unsealed=True)
    for item, block in store.receipts:
        for row in store.receipts[item, block].rows:
            if item == LEVEL.item:
                assert np.allclose(store.read(LEVEL.name, row), features_of(row), atol=0.03)
            elif item == "labels.mask":
                mask = store.read_mask(row)
                assert any(np.array_equal(mask, mask_of(row, v)) for v in versions[row])


FIRST = {0: 0, 1: 0, 2: 0}
# One mask is another, one sample is new, and in a new block.
CHANGED = {0: 1, 1: 0, 2: 0, 16: 0}
SCENARIOS = {
    "writing a store": ({}, FIRST, FIRST),
    "changing it": (FIRST, CHANGED, CHANGED),
    "changing it, and thinking better of it": (FIRST, {0: 1, 1: 0, 2: 0}, FIRST),
}


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("scenario", "lasting"),
    [
        ("writing a store", False),
        ("writing a store", True),
        ("changing it", True),
        ("changing it, and thinking better of it", True),
    ],
)
def test_whichever_operation_fails_the_next_run_completes_the_store(
    scenario, lasting, step, tmp_path
):
    before, wanted, afterwards = SCENARIOS[scenario]
    old, right = tmp_path / "old", tmp_path / "right"
    old.mkdir()
    if before:
        go_on(old, before)
    shutil.copytree(old, right)
    go_on(right, afterwards)
    expected = files_of(right)
    versions = {row: {rows[row] for rows in (before, wanted) if row in rows} for row in wanted}
    for fail_at in range(1, 1000, step):
        root = tmp_path / f"{fail_at}"
        shutil.copytree(old, root)
        number = errno.EIO if fail_at % 2 else errno.ENOSPC
        with FailingDisk(root, fail_at, lasting=lasting, number=number) as disk:
            error = None
            try:
                go_on(root, wanted)
            except OSError as raised:
                error = raised
        if not disk.failed:
            break
        # What is tidied up may fail in silence.
        assert error is None or error.errno == number
        assert error is None or str(error.filename).startswith(str(root))
        if (root / "zarr.json").exists():
            check_what_is_there(root, versions)
        done = finished(root, expected) if wanted == afterwards else {}
        with FailingDisk(root, 0):
            go_on(root, afterwards)
        # As if undisturbed; no temporary stays, and nothing that was finished is written again.
        assert files_of(root) == expected
        assert done.items() <= finished(root, expected).items()
        open_store(root)
    assert 40 < fail_at < 400
