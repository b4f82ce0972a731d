"""Is a store as it was written? Every checksum, receipt, shape, number, table and name.

The structure is always looked at in full: seal, receipts, metadata, tables, and of every shard its
size and index. What shards hold is read, too, of all blocks or of a random share of them.

Shape legend: C channels, H height, W width.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError, CorruptStoreError, StoreBusyError, StoreError
from sam3cache.features.places import Place, close_by, files_below, stamp
from sam3cache.features.receipts import FOLDED_FILE, SEAL_COPY, SEAL_FILE, receipt_path
from sam3cache.features.shards import ShardReader, crc32c
from sam3cache.features.survey import Finding, Kind, ShardClaim, Survey, known_files, survey_store
from sam3cache.features.tables import ANNOTATIONS_FILE, SAMPLES_FILE
from sam3cache.features.writer import GROUP_FILE
from sam3cache.records import IGNORE_LABEL
from sam3cache.runtime import num_cpu_cores

Report = Callable[[int, int], None]

NOTES: tuple[Kind, ...] = ("unfinished", "stray")
"""Kinds of findings that are no damage."""

_MAX_THREADS = 8
_LEFT_ALONE = "claims"
_STATED_IN = (GROUP_FILE, SAMPLES_FILE, ANNOTATIONS_FILE, SEAL_FILE, SEAL_COPY, FOLDED_FILE)
_FLOAT16_EXPONENT = np.uint16(0x7C00)
_BFLOAT16_EXPONENT = np.uint16(0x7F80)


@dataclass(frozen=True)
class VerifyResult:
    """What a store was found to be.

    Attributes:
        store: its folder.
        sealed: whether it has a seal, right or wrong.
        findings: all that is not as it should be, and notes.
        num_samples: samples that can be used, without their variants.
        num_files: files looked at.
        num_shards: of these, shards.
        num_shards_read: shards whose every byte was read.
        num_bytes: read from shards.
        sample_share: share of the blocks whose shards were to be read.
        elapsed_s: of the call.
    """

    store: Place
    sealed: bool
    findings: tuple[Finding, ...]
    num_samples: int
    num_files: int
    num_shards: int
    num_shards_read: int
    num_bytes: int
    sample_share: float
    elapsed_s: float

    @property
    def damage(self) -> tuple[Finding, ...]:
        """What differs from what was written."""
        return tuple(finding for finding in self.findings if finding.kind not in NOTES)


def verify_store(
    root: Place,
    sample_share: float = 1.0,
    seed: int = 0,
    report: Report = lambda num_done, num_total: None,
) -> VerifyResult:
    """Compare a store with what its receipts and seal say; changes nothing and locks nothing.

    Damage is returned, not raised: it never ends the search for more.

    Args:
        root: the store's folder.
        sample_share: share of the blocks whose shards are read whole, above 0, at most 1.
        seed: of the choice of these blocks.
        report: called with bytes read and to be read.

    Raises:
        ConfigError: when the share is none.
        NotAStoreError: when ``root`` has nothing of a store.
        StoreError: when its format is newer than this code.
        StoreBusyError: when another process changed it meanwhile.
        OSError: when the system does not let us read it.
    """
    return inspect_store(root, sample_share, seed, report)[0]


def inspect_store(
    root: Place, sample_share: float, seed: int, report: Report
) -> tuple[VerifyResult, Survey]:
    """Verify a store, and return what it says of itself as well, for repair."""
    start_s = time.monotonic()
    if not 0 < sample_share <= 1:
        raise ConfigError(
            f"a share of {sample_share:g} of the blocks: expected above 0 and at most 1 (100%)"
        )
    before = stamp(root, _STATED_IN)
    survey = survey_store(root)
    blocks = sorted({claim.block for claim in survey.claims})
    num_chosen = max(1, round(sample_share * len(blocks))) if blocks else 0
    chosen = set(random.Random(seed).sample(blocks, num_chosen))
    in_full = [claim for claim in survey.claims if claim.block in chosen]
    in_part = [claim for claim in survey.claims if claim.block not in chosen]
    num_bytes = sum(claim.record.size_bytes for claim in in_full)
    findings = list(survey.findings)
    lock = threading.Lock()
    num_done = 0

    def check(claim: ShardClaim) -> list[Finding]:
        nonlocal num_done
        with close_by(root, claim.record.key) as folder:
            found = list(check_shard(folder, claim))
        with lock:
            num_done += claim.record.size_bytes
            report(num_done, num_bytes)
        return found

    with ThreadPoolExecutor(min(_MAX_THREADS, num_cpu_cores())) as pool:
        for found in pool.map(check, in_full):
            findings += found
        for found in pool.map(lambda claim: list(_check_outline(root, claim)), in_part):
            findings += found
    known = known_files(survey)
    num_files = 0
    for path in files_below(root, _LEFT_ALONE):
        num_files += path in known
        if path not in known:
            findings.append(Finding("stray", path, "is named by nothing"))
    result = VerifyResult(
        store=root,
        sealed=survey.sealed,
        findings=tuple(findings),
        num_samples=sum(row.status == "ok" and row.variant is None for row in survey.rows),
        num_files=num_files,
        num_shards=len(survey.claims),
        num_shards_read=len(in_full),
        num_bytes=num_bytes,
        sample_share=sample_share,
        elapsed_s=time.monotonic() - start_s,
    )
    is_changed = result.damage and stamp(root, _STATED_IN) != before
    if is_changed or (result.damage and _has_newer_receipts(root, survey, findings)):
        raise StoreBusyError(
            f"{root} was changed by another process while it was read; wait for it to end, and "
            "verify again"
        )
    return result, survey


def _has_newer_receipts(root: Place, survey: Survey, findings: Sequence[Finding]) -> bool:
    """Return whether a damaged block has a single receipt that was not there before."""
    return any(
        finding.block is not None
        and (finding.item, finding.block) not in survey.receipts
        and finding.kind not in ("receipt", *NOTES)
        and receipt_path(root, finding.item, finding.block).exists()
        for finding in findings
    )


def _check_outline(root: Place, claim: ShardClaim) -> Iterator[Finding]:
    """Check what can be checked without reading a shard: its size and its index."""
    record = claim.record
    path = root / record.key
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        yield _finding(claim, "missing", reason)
        return
    if size_bytes != record.size_bytes:
        yield _finding(
            claim, "size", f"has {size_bytes} bytes, its receipt says {record.size_bytes}"
        )
        return
    try:
        reader = ShardReader.open(path, claim.grid, record.size_bytes, record.chunk_crc32c)
    except (CorruptStoreError, OSError):
        yield _finding(claim, "checksum", "its index is not what was written")
        return
    positions = tuple(row % claim.grid.num_inner for row in claim.rows)
    if reader.positions != positions:
        first = claim.rows[0] // claim.grid.num_inner * claim.grid.num_inner
        odd = sorted({*reader.positions} ^ {*positions})
        yield _finding(
            claim,
            "content",
            "holds other rows than its receipt states",
            [first + position for position in odd],
        )
    elif not _is_dense(reader, record.size_bytes):
        yield _finding(claim, "content", "its chunks do not lie in row order without gaps")


def _is_dense(reader: ShardReader, size_bytes: int) -> bool:
    offset = 0
    for position in reader.positions:
        start, length = (int(value) for value in reader.index[position])
        if start != offset:
            return False
        offset += length
    return offset == size_bytes - 16 * reader.grid.num_inner - 4


def check_shard(root: Place, claim: ShardClaim) -> Iterator[Finding]:
    """Check one shard to its last byte: index, checksums, values.

    Args:
        root: the store's folder.
        claim: what its receipt says of it.

    Yields:
        What is wrong.
    """
    outline = list(_check_outline(root, claim))
    yield from outline
    record, grid = claim.record, claim.grid
    if any(finding.kind in ("missing", "size") for finding in outline):
        return
    path = root / record.key
    try:
        whole = crc32c(path.read_bytes())
    except OSError as error:
        yield _finding(claim, "missing", f"cannot be read ({error.strerror})")
        return
    if outline:
        return
    reader = ShardReader.open(path, grid, record.size_bytes, record.chunk_crc32c)
    broken = []
    out = np.empty(grid.inner[1:], dtype=grid.dtype)
    for row in claim.rows:
        try:
            reader.read_into(row % grid.num_inner, out)
        except (StoreError, OSError):
            broken.append(row)
            continue
        problem = _problem_of(claim, row, out)
        if problem:
            yield _finding(claim, "content", f"row {row} {problem}", [row])
    if broken:
        yield _finding(
            claim, "checksum", f"{len(broken)} of its {len(claim.rows)} chunks differ", broken
        )
    elif whole != record.crc32c:
        yield _finding(claim, "checksum", "the file differs from what its receipt states")


def _problem_of(claim: ShardClaim, row: int, values: NDArray[Any]) -> str:
    """Say what is wrong with one chunk whose checksum is right; nothing, as a rule."""
    if claim.item.startswith("labels."):
        return _problem_of_mask(claim, row, values)
    if not _is_finite(claim, values):
        return "has values that are NaN or infinite"
    return ""


def _is_finite(claim: ShardClaim, values: NDArray[Any]) -> bool:
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    exponent = {"float16": _FLOAT16_EXPONENT, "uint16": _BFLOAT16_EXPONENT}.get(claim.grid.dtype)
    if exponent is None:
        return True
    # On the bits: NumPy's own test is several times slower for float16, and knows no bfloat16.
    return not bool(((values.view(np.uint16) & exponent) == exponent).any())


def _problem_of_mask(claim: ShardClaim, row: int, tile: NDArray[Any]) -> str:
    height_px, width_px = claim.limits_px[row]
    if tile[:, height_px:].any() or tile[:, :, width_px:].any():
        return "has labels beyond the mask's own size"
    highest = claim.max_label
    if highest is not None and ((tile > highest) & (tile != IGNORE_LABEL)).any():
        expected = "0, 1" if highest == 1 else f"0 to {highest}"
        return f"has values other than {expected} and {IGNORE_LABEL}"
    return ""


def _finding(claim: ShardClaim, kind: Kind, message: str, rows: Sequence[int] = ()) -> Finding:
    return Finding(
        kind, claim.record.key, message, claim.item, claim.block, tuple(rows or claim.rows)
    )
