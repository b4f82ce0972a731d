"""What is done: a receipt a block and item, and the seal over all of them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

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
CHANGE_FILE = "receipts/change.json"
"""Names the change of labels or annotations that a store is unsealed for."""

OVERLAY_OF = "overlay_of"
"""Setting of a store without levels: the seal of the store that its labels are for."""

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


class Facts(Sequence[dict[str, Any]]):
    """What a receipt knows of rows: kept by column, as there are many and few are asked for."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        """Take the columns, which are lists of one length.

        Raises:
            ValueError: when they are not.
        """
        self._columns = columns
        columns_are_lists = all(isinstance(column, list) for column in columns.values())
        if not columns_are_lists or len({len(column) for column in columns.values()}) > 1:
            raise ValueError("expected lists of one length")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Facts:
        """Make facts of rows that all have the same keys."""
        lines = list(rows)
        names = lines[0] if lines else ()
        return cls({name: [line[name] for line in lines] for name in names})

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The columns by name."""
        return self._columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not self._columns:
            raise IndexError(index)  # Without which an iteration over no rows has no end.
        return {name: column[index] for name, column in self._columns.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self._columns == other._columns

    def __hash__(self) -> int:
        return hash(tuple(self._columns))


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
    facts: Facts = field(default_factory=lambda: Facts({}))

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as docs/format.md lays it out."""
        return {
            "item": self.item,
            "block": self.block,
            "rows": list(self.rows),
            "digest": self.digest,
            "shards": [shard.to_json() for shard in self.shards],
            "facts": self.facts.columns,
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
                facts=_facts(value["facts"]),
            )
        except (LookupError, TypeError, ValueError, OverflowError):
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

# Bytes of JSON, where in them the receipt begins and ends, and the file that they are from.
_Packed = dict[ReceiptKey, tuple[bytes, int, int, Path]]

_NUM_UNPACKED = 1024
_RECEIPTS_MARK = b',"receipts":['
_BLOCK_MARK = re.compile(rb'\{"block":(?P<block>\d+),"digest":')
_ITEM_MARK = re.compile(rb',"item":"([^"\\]*)"')
_SEAL_MARK = re.compile(rb',"seal":"(?P<seal>[0-9a-f]{64})"\}\Z')


def _facts(value: Any) -> Facts:
    return Facts(value) if isinstance(value, dict) else Facts.of(value)  # by row in version 1


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Commit one item of one block."""
    content = receipt.to_json()
    # Until the seal hashes it: a flipped bit must not vouch for another row or picture.
    content["sha256"] = sha256_of_json(content)
    write_atomic(receipt_path(root, receipt.item, receipt.block), canonical_json(content))


def read_receipts_of_block(
    root: Path, block: int, items: Iterable[str]
) -> dict[ReceiptKey, Receipt]:
    """Read the newest receipts of one block: single ones, or those of a seal set in the meantime.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    receipts: dict[ReceiptKey, Receipt] = {}
    sealed: Mapping[ReceiptKey, Receipt] | None = None
    for item in items:
        path = receipt_path(root, item, block)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if sealed is None:
                seal = root / SEAL_FILE
                sealed = ReceiptsOnDemand(_load_seal(seal)[1]) if seal.exists() else {}
            if (item, block) in sealed:
                receipts[item, block] = sealed[item, block]
        else:
            receipts[item, block] = parse_receipt(data, path)
    return receipts


def parse_receipt(data: bytes, path: Path) -> Receipt:
    """Read the content of a single receipt's file.

    Raises:
        CorruptStoreError: when it cannot be read, or does not match its own hash.
    """
    content = _parse(data, path)
    # Format version 1 had no hash.
    if isinstance(content, dict) and "sha256" in content:
        body = {name: value for name, value in content.items() if name != "sha256"}
        if content["sha256"] != _hash_of(body):
            raise _unreadable(path)
    return Receipt.from_json(content, path)


def read_receipts(root: Path) -> dict[ReceiptKey, Receipt]:
    """Read every receipt, folded and single; a single one is the newer.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    return dict(scan_receipts(root))


def scan_receipts(root: Path) -> Mapping[ReceiptKey, Receipt]:
    """Read every receipt as :func:`read_receipts` does, to be made into objects when asked for.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    packed: _Packed = {}
    for name in (FOLDED_FILE, SEAL_FILE):
        path = root / name
        if path.exists():
            packed.update(_load_seal(path)[1])
    for path in sorted((root / "receipts").glob("*/*.json")):
        data = _read(path)
        receipt = parse_receipt(data, path)
        packed[receipt.item, receipt.block] = (data, 0, len(data), path)
    return ReceiptsOnDemand(packed)


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
        # A second copy of what is small and cannot be computed again.
        "metadata": {
            name: (root / name).read_text(encoding="utf-8")
            for name in sorted(hashed)
            if name.endswith(".json")
        },
    }
    content["seal"] = sha256_of_json(content)
    write_atomic(root / SEAL_FILE, canonical_json(content))
    delete_unsealed_receipts(root)


def delete_unsealed_receipts(root: Path) -> None:
    """Delete the receipts that a seal in place holds as well."""
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


def fold_receipts(root: Path, receipts: Mapping[ReceiptKey, Receipt]) -> None:
    """Make these the receipts of an unsealed store: one file, and no single ones beside it."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "receipts": [receipts[key].to_json() for key in sorted(receipts)],
        "hashes": {},
    }
    content["seal"] = sha256_of_json(content)
    write_atomic(root / FOLDED_FILE, canonical_json(content))
    _delete_single_receipts(root)


def seal_of(root: Path) -> str:
    """Return the hash that a seal states of itself.

    Raises:
        CorruptStoreError: when the seal cannot be read.
    """
    content = _load(root / SEAL_FILE)
    if not isinstance(content, dict) or not isinstance(content.get("seal"), str):
        raise _unreadable(root / SEAL_FILE)
    return str(content["seal"])


def check_seal(root: Path) -> Mapping[ReceiptKey, Receipt]:
    """Check the seal and all that it hashes; return its receipts.

    Raises:
        CorruptStoreError: naming the first file that differs.
    """
    hashes, receipts = _load_seal(root / SEAL_FILE)
    for name, expected in hashes.items():
        try:
            found = sha256_of_file(root / name)
        except FileNotFoundError:
            found = "missing"
        if found != expected:
            raise CorruptStoreError(
                f"{root / name} is not what the store was sealed with (SHA-256 {found[:12]}, "
                f"expected {expected[:12]}); restore the file, or extract into a new store"
            )
    return ReceiptsOnDemand(receipts)


def matches_own_hash(data: bytes, content: Mapping[str, Any]) -> bool:
    """Return whether a seal's hash is that of all the rest.

    Args:
        data: bytes of the file.
        content: what they say.
    """
    seal = content.get("seal")
    # As we write it, the hash comes last: the bytes before it need not be put together again.
    tail = f',"seal":"{seal}"}}'.encode()
    if data.endswith(tail) and hashlib.sha256(data[: -len(tail)] + b"}").hexdigest() == seal:
        return True
    return seal == _hash_of({name: part for name, part in content.items() if name != "seal"})


def _hash_of(content: Mapping[str, Any]) -> str:
    try:
        return sha256_of_json(content)
    except ValueError:  # infinity, which Python reads as JSON and we never write
        return ""


def _load_seal(path: Path) -> tuple[Mapping[str, Any], _Packed]:
    """Check a seal against its own hash; return the hashes in it, and its receipts."""
    data = _read(path)
    found = _split_seal(data, path)
    if found is not None:
        return found
    content = _parse(data, path)
    if not isinstance(content, dict) or not isinstance(content.get("hashes"), dict):
        raise _unreadable(path)
    if not matches_own_hash(data, content):
        raise CorruptStoreError(
            f"{path} does not match its own hash; `sam3cache store verify --repair` on the store "
            "keeps every block that it can prove, or restore the file from a copy"
        )
    return content["hashes"], _pack(content.get("receipts"), path)


def _split_seal(data: bytes, path: Path) -> tuple[Mapping[str, Any], _Packed] | None:
    """Take a seal apart that is as we write it, without making objects of all its receipts.

    What its hash vouches for is canonical JSON of ours: within a text every quotation mark has a
    backslash before it, so that the marks searched for here stand for nothing but keys.

    Returns:
        None when it is not like that, or does not match its hash.
    """
    begin = data.find(_RECEIPTS_MARK)
    tail = _SEAL_MARK.search(data, max(0, len(data) - 100))
    if begin < 0 or tail is None:
        return None
    hasher = hashlib.sha256(memoryview(data)[: tail.start()])
    hasher.update(b"}")
    if hasher.hexdigest() != tail["seal"].decode():
        return None
    head = _parse(data[:begin] + b"}", path)
    starts = [(mark.start(), int(mark["block"])) for mark in _BLOCK_MARK.finditer(data, begin)]
    # Interned: a few names, each of which stands in thousands of receipts.
    items = [sys.intern(m[1].decode()) for m in _ITEM_MARK.finditer(data, begin)]
    if not isinstance(head.get("hashes"), dict) or len(starts) != len(items):
        return None
    ends = [start - 1 for start, _ in starts[1:]] + [tail.start() - 1]
    receipts = {
        (item, block): (data, start, end, path)
        for item, (start, block), end in zip(items, starts, ends, strict=True)
    }
    return head["hashes"], receipts


def _pack(receipts: Any, path: Path) -> _Packed:
    """Return receipts as they are kept by :class:`ReceiptsOnDemand`."""
    if not isinstance(receipts, list):
        raise _unreadable(path)
    packed: _Packed = {}
    try:
        for value in receipts:
            data = canonical_json(value)
            packed[str(value["item"]), int(value["block"])] = (data, 0, len(data), path)
    except (KeyError, TypeError, ValueError):
        raise _unreadable(path) from None
    return packed


class ReceiptsOnDemand(Mapping[ReceiptKey, Receipt]):
    """Receipts as bytes, each read when it is asked for: as objects they take ten times as much.

    Args:
        packed: by item and block, where its JSON lies: bytes, begin, end; and the file to name.
    """

    def __init__(self, packed: _Packed) -> None:
        self._packed = packed
        # Whoever reads samples asks for the same few over and over.
        self._unpack = lru_cache(_NUM_UNPACKED)(self._unpack_now)

    def __getitem__(self, key: ReceiptKey) -> Receipt:
        return self._unpack(key)

    def __iter__(self) -> Iterator[ReceiptKey]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def _unpack_now(self, key: ReceiptKey) -> Receipt:
        data, begin, end, path = self._packed[key]
        return Receipt.from_json(_parse(data[begin:end], path), path)


def receipt_path(root: Path, item: str, block: int) -> Path:
    """Return where the single receipt of an item of a block lies."""
    return root / "receipts" / item / f"{block:08d}.json"


def _load(path: Path) -> Any:
    return _parse(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path) from None


def _parse(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise _unreadable(path) from None


def _unreadable(path: Path) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} is not what was written there; `sam3cache store verify --repair` on the store "
        "removes it and keeps every block that is proven"
    )
