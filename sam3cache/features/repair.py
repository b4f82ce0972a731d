"""Taking out of a store what is broken, so that the same extraction rebuilds just that.

What has a second copy is written back: metadata from the seal, tables of masks from the receipts.
Everything else that is broken loses its receipt, and counts as not done. Nothing is deleted before
the receipts that stay are safe: a crash leaves a store that the same repair goes on with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam3cache.features.files import canonical_json, sha256_of_file
from sam3cache.features.locks import require_idle, store_lock
from sam3cache.features.receipts import (
    FOLDED_FILE,
    SAMPLES_ITEM,
    SEAL_FILE,
    Receipt,
    ReceiptKey,
    drop_seal,
    fold_receipts,
    matches_own_hash,
    mend_seal,
)
from sam3cache.features.store import label_rows_of
from sam3cache.features.survey import UNKNOWN_SPLIT, Finding, Survey
from sam3cache.features.tables import (
    ANNOTATIONS_FILE,
    LABEL_ROWS_FILE,
    SAMPLES_FILE,
    AnnotationRow,
    SampleRow,
    write_annotations,
    write_label_rows,
    write_samples,
)
from sam3cache.features.verify import Report, VerifyResult, inspect_store
from sam3cache.features.writer import GROUP_FILE
from sam3cache.runtime import write_atomic
from sam3cache.variants import split_variant_id


@dataclass(frozen=True)
class RepairResult:
    """What a repair found and did.

    Attributes:
        found: the store as it was.
        mended: files that have been written anew, by path below the store.
        dropped: items and blocks that count as not done now.
        lost: what cannot be repaired, and what to do about it. Where no block can be told from
            another without it, nothing has been touched.
        sealed: whether the store is sealed: then it is whole again as it is.
    """

    found: VerifyResult
    mended: tuple[str, ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()
    lost: tuple[str, ...] = ()
    sealed: bool = False


def repair_store(
    root: Path,
    sample_share: float = 1.0,
    seed: int = 0,
    report: Report = lambda num_done, num_total: None,
) -> RepairResult:
    """Verify a store and remove what is broken; the store is locked meanwhile.

    Args:
        root: the store's folder.
        sample_share: as for ``verify_store``; a store whose seal is damaged is read in full.
        seed: as for ``verify_store``.
        report: called with bytes read and to be read.

    Raises:
        ConfigError: when the share is none.
        NotAStoreError: when ``root`` has nothing of a store.
        StoreError: when its format is newer than this code.
        StoreBusyError: when another process works on it.
        OSError: when it cannot be read or written; nothing that was whole is lost.
    """
    with store_lock(root):
        require_idle(root)
        found, survey = inspect_store(root, sample_share, seed, report)
        if not survey.seal_holds and sample_share < 1:
            # Without the seal a receipt is proven by what it vouches for alone.
            found, survey = inspect_store(root, 1.0, seed, report)
        if not found.damage:
            return RepairResult(found, sealed=found.sealed)
        mended = mend_seal(root)
        if not mended:
            return _repair(root, found, survey)
        again, survey = inspect_store(root, sample_share, seed, report)
        result = _repair(root, again, survey)
        return replace(result, found=found, mended=(*result.mended, mended))


def _repair(root: Path, found: VerifyResult, survey: Survey) -> RepairResult:
    lost = _beyond_repair(survey, found.damage)
    if lost:
        return RepairResult(found, lost=lost, sealed=False)
    mended = _write_back(root, survey, found.damage)
    rest = [finding for finding in found.damage if finding.path not in mended]
    if not rest:
        return RepairResult(found, tuple(sorted(mended)), sealed=found.sealed)
    broken = {(finding.item, finding.block) for finding in rest if finding.block is not None}
    kept = {key: receipt for key, receipt in survey.receipts.items() if key not in broken}
    samples = survey.samples if survey.samples is not None else _samples_from(survey, kept)
    # From here on the store is unsealed; as long as the seal is there, its receipts rule.
    fold_receipts(root, kept)
    drop_seal(root)
    if any(finding.kind == "seal" for finding in rest):
        mended.add(FOLDED_FILE)
    if samples is not survey.samples:
        write_samples(root, samples)
        mended.add(SAMPLES_FILE)
    if any(finding.path == ANNOTATIONS_FILE for finding in rest):
        write_annotations(root, _bare_annotations(samples))
        mended.add(ANNOTATIONS_FILE)
    named = {record.key for receipt in survey.receipts.values() for record in receipt.shards}
    for finding in rest:
        if finding.path in named:
            with suppress(FileNotFoundError):
                (root / finding.path).unlink()
    return RepairResult(
        found,
        tuple(sorted(mended)),
        tuple(sorted(broken)),
        tuple(_without_copy({f.path for f in rest if f.kind == "metadata"})),
        sealed=False,
    )


def _without_copy(paths: set[str]) -> Iterator[str]:
    """Say what to do about metadata of a store that was never sealed, or whose seal is lost."""
    for path in sorted(paths):
        if path.startswith("levels/"):
            advice = "run the same `sam3cache extract`, which writes it anew, and verify again"
        else:
            advice = "restore the file, or extract into a new store"
        yield f"{path} has no second copy that can be read: {advice}"


def _beyond_repair(survey: Survey, damage: Sequence[Finding]) -> tuple[str, ...]:
    """Say what has no second copy; nothing is touched then."""
    lost = []
    if survey.description is None:
        lost.append(
            f"{GROUP_FILE} says what the features were made of, and the seal has no copy that can "
            "be read: restore the file, or extract into a new store"
        )
    if survey.samples is None and not _facts(survey.receipts):
        lost.append(
            f"{SAMPLES_FILE} says whose rows are whose, and no receipt does: restore the file, or "
            "extract into a new store"
        )
    if any(finding.kind == "seal" for finding in damage) and not survey.receipts:
        lost.append(
            f"{SEAL_FILE} and with it every receipt is gone, and nothing else vouches for a "
            "feature: restore the file, or run the same `sam3cache extract`, which computes every "
            "block anew"
        )
    if not (survey.sealed and survey.seal_holds):
        lost += _in_doubt(survey, damage)
    return tuple(lost)


def _in_doubt(survey: Survey, damage: Sequence[Finding]) -> list[str]:
    """Say which levels look broken everywhere: then their metadata may be what is wrong."""
    lost = []
    for item in sorted({claim.item for claim in survey.claims}):
        files = {claim.record.key for claim in survey.claims if claim.item == item}
        broken = {f.path for f in damage if f.kind in ("checksum", "content")}
        if len(files) > 1 and files <= broken:
            kind, _, name = item.partition(".")
            lost.append(
                f"all {len(files)} files of {kind}/{name} differ from what its {GROUP_FILE} says, "
                "so that either they or it may be damaged: restore that file, or delete the files "
                "and run the same `sam3cache extract`"
            )
    return lost


def _write_back(root: Path, survey: Survey, damage: Sequence[Finding]) -> set[str]:
    """Write what has a second copy; return the paths that are now as they were."""
    mended = set()
    for path in sorted({f.path for f in damage if f.kind in ("metadata", "table", "seal")}):
        if path in (SEAL_FILE, FOLDED_FILE):
            done = _rewrite_seal(root / path)
        elif path.endswith(LABEL_ROWS_FILE) and path.count("/") == 2:
            folder = root / path
            name = path.split("/")[1]
            lines = label_rows_of(name, survey.receipts)
            write_label_rows(folder.parent, (lines[row] for row in sorted(lines)))
            done = _is_as_sealed(root, survey, path)
        elif path in survey.copies or path in survey.expected:
            text = survey.copies.get(path)
            write_atomic(root / path, survey.expected[path] if text is None else text.encode())
            done = _is_as_sealed(root, survey, path)
        else:
            done = False
        if done:
            mended.add(path)
    return mended


def _is_as_sealed(root: Path, survey: Survey, path: str) -> bool:
    if survey.sealed and survey.seal_holds:
        return sha256_of_file(root / path) == survey.hashes.get(path)
    return path != GROUP_FILE or path in survey.copies


def _rewrite_seal(path: Path) -> bool:
    """Write a seal whose hash is right as seals are written; return whether it is."""
    data = path.read_bytes() if path.exists() else b""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict) or not matches_own_hash(data, content):
        return False
    canonical = canonical_json(content)
    if canonical == data:
        return False  # Something else is wrong with it.
    write_atomic(path, canonical)
    return True


def _facts(receipts: Mapping[ReceiptKey, Receipt]) -> dict[int, Mapping[str, Any]]:
    return {
        fact["row"]: fact
        for (item, _), receipt in receipts.items()
        if item == SAMPLES_ITEM
        for fact in receipt.facts
        if isinstance(fact.get("row"), int)
    }


def _samples_from(survey: Survey, kept: Mapping[ReceiptKey, Receipt]) -> list[SampleRow]:
    """Return the table of samples as far as the receipts and annotations tell.

    Sources are gone: the next extraction finds each picture by its pixels. Every row that anything
    speaks of stays taken, as a number that is given to another sample would bring it features that
    are not its own.
    """
    facts = _facts(kept)
    ids = {note.row: note.id for note in survey.annotations or ()}
    known = set(ids.values())
    numbers = {row for receipt in survey.receipts.values() for row in receipt.rows}
    rows = []
    for number in sorted(numbers | set(facts) | set(ids)):
        fact = facts.get(number)
        row = SampleRow(number, ids.get(number, ""), "")
        if fact is not None:
            row = replace(row, **fact)
        if fact is None or (survey.annotations is not None and number not in ids):
            row = replace(row, status="removed", reason="its line was lost")
        elif survey.annotations is None:
            row = replace(row, id=f"row-{number}")
        elif (found := split_variant_id(row.id)) is not None and found[0] in known:
            row = replace(row, base_id=found[0], variant=found[1])
        rows.append(row)
    return rows


def _bare_annotations(samples: Sequence[SampleRow]) -> list[AnnotationRow]:
    """Return lines that say nothing: the next extraction takes them from the manifest."""
    return [
        AnnotationRow(row.row, row.id, UNKNOWN_SPLIT, "")
        for row in samples
        if row.status != "removed"
    ]
