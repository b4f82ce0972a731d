"""What is done: a receipt a block and item, and the seal over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3cache.errors import CorruptStoreError
from sam3cache.features.files import (
    canonical_json,
    sha256_of_file,
    sha256_of_json,
)
from sam3cache.runtime import replace_file, write_atomic

FORMAT_VERSION = 2
"""Of the store on disk; docs/format.md says what changed."""

SEAL_FILE = "complete.json"
FOLDED_FILE = "receipts/folded.json"
SAMPLES_ITEM = "samples"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One file that a receipt vouches for.

    Attributes:
        key: path below the store, forward slashes.
        size_bytes: of the file.
        crc32c: of the file's bytes.
        chunk_crc32c: of the encoded bytes of the inner chunks that are present, in row order,
            without a checksum behind them; empty in format version 1.
    """

    key: str
    size_bytes: int
    crc32c: int
    chunk_crc32c: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        """Return the record as a list, as docs/format.md lays it out."""
        return [self.key, self.size_bytes, self.crc32c, list(self.chunk_crc32c)]

    @classmethod
    def from_json(cls, value: Any) -> ShardRecord:
        """Read what :meth:`to_json` wrote."""
        key, size_bytes, checksum, *rest = value
        return cls(
            str(key), int(size_bytes), int(checksum), tuple(map(int, rest[0])) if rest else ()
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that one item of one block is done.

    Attributes:
        item: "samples", "levels.<name>" or "labels.<set>".
        block: number of the block.
        rows: rows that the item holds in it.
        digest: of the level's fingerprint; empty for samples and labels.
        shards: files that hold the rows.
        facts: by row, in the order of ``rows``, or of all the block's rows for samples.
    """

    item: str
    block: int
    rows: tuple[int, ...]
    digest: str = ""
    shards: tuple[ShardRecord, ...] = ()
    facts: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as docs/format.md lays it out."""
        return {
            "item": self.item,
            "block": self.block,
            "rows": list(self.rows),
            "digest": self.digest,
            "shards": [shard.to_json() for shard in self.shards],
            "facts": [dict(fact) for fact in self.facts],
        }

    @classmethod
    def from_json(cls, value: Any, path: Path) -> Receipt:
        """Read what :meth:`to_json` wrote.

        Raises:
            CorruptStoreError: when a part is missing or of another type; ``path`` is named.
        """
        try:
            return cls(
                item=str(value["item"]),
                block=int(value["block"]),
                rows=tuple(int(row) for row in value["rows"]),
                digest=str(value["digest"]),
                shards=tuple(map(ShardRecord.from_json, value["shards"])),
                facts=tuple(dict(fact) for fact in value["facts"]),
            )
        except (KeyError, TypeError, ValueError):
            raise _unreadable(path) from None

    def is_done(self, root: Path) -> bool:
        """Return whether every file named is there with the size stated."""
        for shard in self.shards:
            try:
                if (root / shard.key).stat().st_size != shard.size_bytes:
                    return False
            except FileNotFoundError:
                return False
        return True


ReceiptKey = tuple[str, int]


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Commit one item of one block."""
    write_atomic(
        _receipt_path(root, receipt.item, receipt.block), canonical_json(receipt.to_json())
    )


def read_receipts_of_block(
    root: Path, block: int, items: Iterable[str]
) -> dict[ReceiptKey, Receipt]:
    """Read the newest receipts of one block: single ones, or those of a seal set in the meantime.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    receipts: dict[ReceiptKey, Receipt] = {}
    sealed: dict[ReceiptKey, Receipt] | None = None
    for item in items:
        path = _receipt_path(root, item, block)
        try:
            receipts[item, block] = Receipt.from_json(json.loads(path.read_bytes()), path)
        except FileNotFoundError:
            if sealed is None:
                seal = root / SEAL_FILE
                sealed = _receipts_of(_load(seal), seal) if seal.exists() else {}
            if (item, block) in sealed:
                receipts[item, block] = sealed[item, block]
        except ValueError:
            raise _unreadable(path) from None
    return receipts


def read_receipts(root: Path) -> dict[ReceiptKey, Receipt]:
    """Read every receipt, folded and single; a single one is the newer.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    receipts: dict[ReceiptKey, Receipt] = {}
    for name in (FOLDED_FILE, SEAL_FILE):
        path = root / name
        if path.exists():
            receipts.update(_receipts_of(_load(path), path))
    for path in sorted((root / "receipts").glob("*/*.json")):
        receipt = Receipt.from_json(_load(path), path)
        receipts[receipt.item, receipt.block] = receipt
    return receipts


def is_sealed(root: Path) -> bool:
    """Return whether the seal is in place (not whether it is right)."""
    return (root / SEAL_FILE).exists()


def write_seal(root: Path, receipts: Mapping[ReceiptKey, Receipt], hashed: Iterable[str]) -> None:
    """Seal the store, then delete the receipts that the seal holds.

    Args:
        root: the store.
        receipts: all of them.
        hashed: paths below the store whose bytes the seal fixes.
    """
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "receipts": [receipts[key].to_json() for key in sorted(receipts)],
        "hashes": {name: sha256_of_file(root / name) for name in sorted(hashed)},
    }
    content["seal"] = sha256_of_json(content)
    write_atomic(root / SEAL_FILE, canonical_json(content))
    _delete_single_receipts(root)
    (root / FOLDED_FILE).unlink(missing_ok=True)


def _delete_single_receipts(root: Path) -> None:
    for path in (root / "receipts").glob("*/*.json"):
        path.unlink(missing_ok=True)


def break_seal(root: Path) -> None:
    """Make a sealed store one that is being worked on; its receipts still count."""
    if is_sealed(root):
        (root / "receipts").mkdir(exist_ok=True)
        # Left over where a kill came between sealing and folding; the seal holds them all.
        _delete_single_receipts(root)
        replace_file(root / SEAL_FILE, root / FOLDED_FILE)


def check_seal(root: Path) -> dict[ReceiptKey, Receipt]:
    """Check the seal and all that it hashes; return its receipts.

    Raises:
        CorruptStoreError: naming the first file that differs.
    """
    path = root / SEAL_FILE
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("hashes"), dict):
        raise _unreadable(path)
    body = {name: value for name, value in content.items() if name != "seal"}
    if content.get("seal") != sha256_of_json(body):
        raise CorruptStoreError(
            f"{path} does not match its own hash; restore it from a copy, or delete it and run the "
            "same `sam3cache extract` again, which then computes every block anew"
        )
    for name, expected in content["hashes"].items():
        try:
            found = sha256_of_file(root / name)
        except FileNotFoundError:
            found = "missing"
        if found != expected:
            raise CorruptStoreError(
                f"{root / name} is not what the store was sealed with (SHA-256 {found[:12]}, "
                f"expected {expected[:12]}); restore the file, or extract into a new store"
            )
    return _receipts_of(content, path)


def _receipts_of(content: Any, path: Path) -> dict[ReceiptKey, Receipt]:
    if not isinstance(content, dict) or not isinstance(content.get("receipts"), list):
        raise _unreadable(path)
    found = (Receipt.from_json(value, path) for value in content["receipts"])
    return {(receipt.item, receipt.block): receipt for receipt in found}


def _receipt_path(root: Path, item: str, block: int) -> Path:
    return root / "receipts" / item / f"{block:08d}.json"


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError):
        raise _unreadable(path) from None


def _unreadable(path: Path) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} is not a receipt that can be read; delete it and run the same "
        "`sam3cache extract` again"
    )
