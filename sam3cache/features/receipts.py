"""What is done: a receipt a block and item, and the seal over all of them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zlib
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sam3cache.errors import CorruptStoreError
from sam3cache.features.files import (
    canonical_json,
    sha256_of_file,
    sha256_of_json,
)
from sam3cache.features.lazy import LazySequence
from sam3cache.features.levels import LABEL_TILE_PX
from sam3cache.features.places import Place, for_places, replace_file, write_atomic

FORMAT_VERSION = 2
"""Of the store on disk; docs/format.md says what changed."""

SEAL_FILE = "complete.json"
SEAL_COPY = "receipts/sealed.json"
"""A second copy of the seal; without seal and folded receipts, it says that the seal was lost."""
FOLDED_FILE = "receipts/folded.json"
CHANGE_FILE = "receipts/change.json"
"""Names the change of labels or annotations that a store is unsealed for."""

LABEL_CHANGE = "`store labels"
"""How the name of a change of labels begins: it has taken a set away until it is done."""

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


class Facts(LazySequence[dict[str, Any]]):
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

    def item(self, place: int) -> dict[str, Any]:
        """Return what is known of a row."""
        return {name: column[place] for name, column in self._columns.items()}

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
    def from_json(cls, value: Any, path: Place) -> Receipt:
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

    def is_done(self, root: Place, sizes: Mapping[str, int] | None = None) -> bool:
        """Return whether every file named is there with the size stated.

        Args:
            root: the store.
            sizes: of its files by path, where they have been listed.
        """
        for shard in self.shards:
            if sizes is not None:
                if sizes.get(shard.key) != shard.size_bytes:
                    return False
                continue
            try:
                if (root / shard.key).stat().st_size != shard.size_bytes:
                    return False
            except FileNotFoundError:
                return False
        return True


ReceiptKey = tuple[str, int]

_NUM_UNPACKED, _NUM_GROUPS = 256, 64
_GROUP_RECEIPTS = 16
_RECEIPTS_MARK = b',"receipts":['
_BLOCK_MARK = re.compile(rb'\{"block":(?P<block>\d+),"digest":')
_ITEM_MARK = re.compile(rb',"item":"([^"\\]*)"')
_SEAL_MARK = re.compile(rb',"seal":"(?P<seal>[0-9a-f]{64})"\}\Z')
_SEAL_MARK_BYTES = 100


def _facts(value: Any) -> Facts:
    return Facts(value) if isinstance(value, dict) else Facts.of(value)  # by row in version 1


def write_receipt(root: Place, receipt: Receipt) -> None:
    """Commit one item of one block."""
    content = receipt.to_json()
    # Until the seal hashes it: a flipped bit must not vouch for another row or picture.
    content["sha256"] = sha256_of_json(content)
    write_atomic(receipt_path(root, receipt.item, receipt.block), canonical_json(content))


def read_receipts_of_block(
    root: Place, block: int, items: Iterable[str]
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
                sealed = ReceiptsOnDemand(_load_seal(seal)[2]) if seal.exists() else {}
            if (item, block) in sealed:
                receipts[item, block] = sealed[item, block]
        else:
            receipts[item, block] = parse_receipt(data, path)
    return receipts


def parse_receipt(data: bytes, path: Place) -> Receipt:
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


def read_receipts(root: Place) -> dict[ReceiptKey, Receipt]:
    """Read every receipt, folded and single; a single one is the newer.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    return dict(scan_receipts(root))


def scan_receipts(root: Place) -> ReceiptsOnDemand:
    """Read every receipt as :func:`read_receipts` does, to be made into objects when asked for.

    Raises:
        CorruptStoreError: when one cannot be read.
    """
    found: _Packed | None = None
    for name in (FOLDED_FILE, SEAL_COPY if is_seal_lost(root) else SEAL_FILE):
        path = root / name
        if path.exists():
            _, _, loaded = _load_seal(path)
            if found is None:
                found = loaded
            else:
                found.update(loaded)
    packed = found or _Packed(root / "receipts")
    paths = single_receipts(root)
    for path, data in zip(paths, for_places(_read, paths), strict=True):
        receipt = parse_receipt(data, path)
        packed.hold(data)
        packed.add(receipt.item, receipt.block, 0, len(data))
    return ReceiptsOnDemand(packed)


def single_receipts(root: Place) -> list[Place]:
    """Return where the receipts lie that no seal has folded, sorted."""
    found: list[Place] = [*(root / "receipts").glob("*/*.json")]
    return sorted(found, key=str)


def is_sealed(root: Place) -> bool:
    """Return whether the seal is in place (not whether it is right)."""
    return (root / SEAL_FILE).exists()


def is_seal_lost(root: Place) -> bool:
    """Return whether a store was sealed, and only the copy of its seal is left."""
    is_known = is_sealed(root) or (root / FOLDED_FILE).exists()
    return not is_known and (root / SEAL_COPY).exists()


def write_seal(root: Place, receipts: Mapping[ReceiptKey, Receipt], hashed: Iterable[str]) -> None:
    """Seal the store, then delete the receipts that the seal holds.

    Args:
        root: the store.
        receipts: all of them.
        hashed: paths below the store whose bytes the seal fixes.
    """
    names = sorted(hashed)
    hashes = {name: sha256_of_file(root / name) for name in names}
    # A second copy of what is small and cannot be computed again.
    metadata = {
        name: (root / name).read_text(encoding="utf-8") for name in names if name.endswith(".json")
    }
    head = {"format_version": FORMAT_VERSION, "hashes": hashes, "metadata": metadata}
    data = _seal(head, receipts)
    # The copy first and, where a seal is broken, last: whatever is killed, no seal is without one.
    write_atomic(root / SEAL_COPY, data)
    write_atomic(root / SEAL_FILE, data)
    _delete_folded_receipts(root)


def _seal(head: Mapping[str, Any], receipts: Mapping[ReceiptKey, Receipt]) -> bytearray:
    """Return the canonical JSON of a seal, put together receipt by receipt: there may be many.

    Args:
        head: all but the receipts and the hash; its keys come before "receipts".
        receipts: all of them.
    """
    data = bytearray(canonical_json(dict(head))[:-1] + _RECEIPTS_MARK)
    for number, key in enumerate(sorted(receipts)):
        data += b"," if number else b""
        data += canonical_json(receipts[key].to_json())
    data += b"]"
    hasher = hashlib.sha256(data)
    hasher.update(b"}")
    data += b',"seal":"' + hasher.hexdigest().encode() + b'"}'
    return data


def finish_sealing(root: Place) -> None:
    """Do what a kill right after the seal was written has left undone."""
    _copy(root, SEAL_FILE, SEAL_COPY)
    _delete_folded_receipts(root)


def mend_seal(root: Place) -> str:
    """Write the seal anew from its copy, or the copy from the seal; hold :func:`store_lock`.

    Returns:
        The file that was written; empty where both are right, or neither.
    """
    if not is_sealed(root) and not is_seal_lost(root):
        return ""
    whole = [name for name in (SEAL_FILE, SEAL_COPY) if _is_whole_seal(root / name)]
    if whole == [SEAL_COPY]:
        return _copy(root, SEAL_COPY, SEAL_FILE)
    return _copy(root, SEAL_FILE, SEAL_COPY) if SEAL_FILE in whole else ""


def _is_whole_seal(path: Place) -> bool:
    try:
        return _split_seal(_read(path), path) is not None
    except CorruptStoreError:
        return False


def _copy(root: Place, source: str, target: str) -> str:
    data = (root / source).read_bytes()
    if (root / target).exists() and (root / target).read_bytes() == data:
        return ""
    write_atomic(root / target, data)
    return target


def _delete_folded_receipts(root: Place) -> None:
    """Delete the receipts that a seal in place holds as well."""
    _delete_single_receipts(root)
    (root / FOLDED_FILE).unlink(missing_ok=True)


def _delete_single_receipts(root: Place) -> None:
    for _ in for_places(_delete, single_receipts(root)):
        pass


def _delete(path: Place) -> None:
    path.unlink(missing_ok=True)


def break_seal(root: Place) -> None:
    """Make a sealed store one that is being worked on; its receipts still count."""
    if is_sealed(root):
        (root / "receipts").mkdir(exist_ok=True)
        # Left over where a kill came between sealing and folding; the seal holds them all.
        _delete_single_receipts(root)
        replace_file(root / SEAL_FILE, root / FOLDED_FILE)
        (root / SEAL_COPY).unlink(missing_ok=True)
    elif is_seal_lost(root):
        replace_file(root / SEAL_COPY, root / FOLDED_FILE)


def drop_seal(root: Place) -> None:
    """Delete the seal of a store whose receipts have been folded without it."""
    (root / SEAL_FILE).unlink(missing_ok=True)
    (root / SEAL_COPY).unlink(missing_ok=True)


def fold_receipts(root: Place, receipts: Mapping[ReceiptKey, Receipt]) -> None:
    """Make these the receipts of an unsealed store: one file, and no single ones beside it."""
    head = {"format_version": FORMAT_VERSION, "hashes": {}}
    write_atomic(root / FOLDED_FILE, _seal(head, receipts))
    _delete_single_receipts(root)


def seal_at_end(data: bytes) -> str | None:
    """Return the hash that a seal states, given its last bytes; None where they are no seal's."""
    tail = _SEAL_MARK.search(data)
    return None if tail is None else tail["seal"].decode()


def hashes_in_seal(path: Place) -> dict[str, str]:
    """Return the SHA-256 of every file that a seal fixes, by path.

    Raises:
        CorruptStoreError: when the seal is not what was written.
    """
    return {str(name): str(value) for name, value in _load_seal(path)[1].items()}


def check_seal(root: Place) -> tuple[str, ReceiptsOnDemand]:
    """Check the seal and all that it hashes; return the hash it states, and its receipts.

    Raises:
        CorruptStoreError: naming the first file that differs.
    """
    seal, hashes, receipts = _load_seal(root / SEAL_FILE)
    for name, expected in hashes.items():
        try:
            found = sha256_of_file(root / name)
        except FileNotFoundError:
            found = "missing"
        if found != expected:
            raise CorruptStoreError(
                f"{root / name} is not what the store was sealed with (SHA-256 {found[:12]}, "
                f"expected {expected[:12]}); `sam3cache store verify {root} --repair` mends what "
                "the store still has twice; else restore the file, or extract into a new store"
            )
    return seal, ReceiptsOnDemand(receipts)


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


def _load_seal(path: Place) -> tuple[str, Mapping[str, Any], _Packed]:
    """Check a seal against its own hash; return that, the hashes in it, and its receipts."""
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
    return str(content["seal"]), content["hashes"], _pack(content.get("receipts"), path)


def _split_seal(data: bytes, path: Place) -> tuple[str, Mapping[str, Any], _Packed] | None:
    """Take a seal apart that is as we write it, without making objects of all its receipts.

    What its hash vouches for is canonical JSON of ours: within a text every quotation mark has a
    backslash before it, so that the marks searched for here stand for nothing but keys.

    Returns:
        None when it is not like that, or does not match its hash.
    """
    begin = data.find(_RECEIPTS_MARK)
    tail = _SEAL_MARK.search(data, max(0, len(data) - _SEAL_MARK_BYTES))
    if begin < 0 or tail is None:
        return None
    hasher = hashlib.sha256(memoryview(data)[: tail.start()])
    hasher.update(b"}")
    seal = hasher.hexdigest()
    if seal != tail["seal"].decode():
        return None
    head = _parse(data[:begin] + b"}", path)
    starts = [(mark.start(), int(mark["block"])) for mark in _BLOCK_MARK.finditer(data, begin)]
    # Interned: a few names, each of which stands in thousands of receipts.
    items = [sys.intern(m[1].decode()) for m in _ITEM_MARK.finditer(data, begin)]
    if not isinstance(head.get("hashes"), dict) or len(starts) != len(items):
        return None
    ends = [start - 1 for start, _ in starts[1:]] + [tail.start() - 1] * bool(starts)
    packed = _Packed(path)
    for at in range(0, len(starts), _GROUP_RECEIPTS):
        group_end = ends[min(at + _GROUP_RECEIPTS, len(ends)) - 1]
        group_begin = starts[at][0]
        packed.hold(data[group_begin:group_end])
        for number in range(at, min(at + _GROUP_RECEIPTS, len(starts))):
            start, block = starts[number]
            packed.add(items[number], block, start - group_begin, ends[number] - group_begin)
    return seal, head["hashes"], packed


def _pack(receipts: Any, path: Place) -> _Packed:
    """Return receipts as they are kept by :class:`ReceiptsOnDemand`."""
    if not isinstance(receipts, list):
        raise _unreadable(path)
    packed = _Packed(path)
    try:
        for value in receipts:
            data = canonical_json(value)
            packed.hold(data)
            packed.add(str(value["item"]), int(value["block"]), 0, len(data))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _unreadable(path) from None
    return packed


class _Packed:
    """Receipts as JSON, compressed by groups, found by item and block.

    A later one replaces another. Places are kept by column: as objects they would take more than
    the receipts.
    """

    def __init__(self, path: Place) -> None:
        """Name the file that is to be named if a receipt cannot be read."""
        self.path = path
        self.groups: list[bytes] = []
        self._at: dict[str, dict[int, int]] = {}
        self._group, self._begin, self._end = array("i"), array("i"), array("i")

    def hold(self, data: bytes) -> None:
        """Take the JSON of the receipts that are added next."""
        self.groups.append(zlib.compress(data, level=1))

    def add(self, item: str, block: int, begin: int, end: int) -> None:
        """Note where in the last group a receipt lies."""
        self._at.setdefault(item, {})[block] = len(self._begin)
        self._group.append(len(self.groups) - 1)
        self._begin.append(begin)
        self._end.append(end)

    def update(self, other: _Packed) -> None:
        """Take over the receipts of another."""
        base = len(self.groups)
        self.groups += other.groups
        for item, blocks in other._at.items():
            for block, at in blocks.items():
                self._at.setdefault(item, {})[block] = len(self._begin)
                self._group.append(base + other._group[at])
                self._begin.append(other._begin[at])
                self._end.append(other._end[at])

    def place(self, item: str, block: int) -> tuple[int, int, int]:
        """Return the group that a receipt is in, and where in it it begins and ends."""
        at = self._at[item][block]
        return self._group[at], self._begin[at], self._end[at]

    def has(self, item: str, block: int) -> bool:
        """Return whether there is such a receipt."""
        return block in self._at.get(item, ())

    def names(self) -> Iterator[ReceiptKey]:
        """Go through items and blocks."""
        return ((item, block) for item, blocks in self._at.items() for block in blocks)

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def only(self, items: Container[str]) -> _Packed:
        """Return the receipts of some items."""
        kept = copy(self)
        kept._at = {item: blocks for item, blocks in self._at.items() if item in items}
        return kept


class ReceiptsOnDemand(Mapping[ReceiptKey, Receipt]):
    """Receipts as bytes, each read when it is asked for: as objects they take ten times as much."""

    def __init__(self, packed: _Packed) -> None:
        self._packed = packed
        # Whoever reads samples asks for the same few over and over.
        self._unpack = lru_cache(_NUM_UNPACKED)(self._unpack_now)
        self._group = lru_cache(_NUM_GROUPS)(self._decompressed)

    @classmethod
    def none(cls) -> ReceiptsOnDemand:
        """Return no receipts."""
        return cls(_Packed(Path()))

    def __getitem__(self, key: ReceiptKey) -> Receipt:
        if not self._packed.has(*key):
            raise KeyError(key)
        return self._unpack(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and len(key) == 2 and self._packed.has(*key)

    def __iter__(self) -> Iterator[ReceiptKey]:
        return self._packed.names()

    def __len__(self) -> int:
        return len(self._packed)

    def only(self, items: Container[str]) -> ReceiptsOnDemand:
        """Return the receipts of some items."""
        return ReceiptsOnDemand(self._packed.only(items))

    def _unpack_now(self, key: ReceiptKey) -> Receipt:
        group, begin, end = self._packed.place(*key)
        path = self._packed.path
        return Receipt.from_json(_parse(self._group(group)[begin:end], path), path)

    def _decompressed(self, group: int) -> bytes:
        return zlib.decompress(self._packed.groups[group])


def masks_in(receipt: Receipt | None) -> dict[int, tuple[int, ...]]:
    """Return, by row of a block of labels, what its mask is known by, without reading it.

    That is its height, its width, and the checksum of each of its tiles; receipts of format version
    1 have no checksums.
    """
    if receipt is None:
        return {}
    masks = {
        fact["row"]: [fact["height_px"], fact["width_px"]]
        for fact in receipt.facts
        if fact["present"]
    }
    for shard in receipt.shards:
        top_px, left_px = (LABEL_TILE_PX * int(part) for part in shard.key.split("/")[-2:])
        inside = [mask for mask in masks.values() if mask[0] > top_px and mask[1] > left_px]
        for mask, checksum in zip(inside, shard.chunk_crc32c, strict=False):
            mask.append(checksum)
    return {row: tuple(mask) for row, mask in masks.items()}


def receipt_path(root: Place, item: str, block: int) -> Place:
    """Return where the single receipt of an item of a block lies."""
    return root / "receipts" / item / f"{block:08d}.json"


def _load(path: Place) -> Any:
    return _parse(_read(path), path)


def _read(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(path) from None


def _parse(data: bytes, path: Place) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise _unreadable(path) from None


def _unreadable(path: Place) -> CorruptStoreError:
    return CorruptStoreError(
        f"{path} is not what was written there; `sam3cache store verify --repair` on the store "
        "mends it from its copy, or removes it and keeps every block that is proven"
    )
