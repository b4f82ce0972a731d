"""What a store says of itself, read so that damage is told instead of raised.

A damaged seal does not take everything with it: receipts that can still be read are taken, and are
believed where the files that they name have the checksums that they state.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard, TypeVar, get_args

from sam3cache.errors import ConfigError, CorruptStoreError, NotAStoreError, StoreError
from sam3cache.features.files import canonical_json, sha256_of_file
from sam3cache.features.fingerprint import Fingerprint
from sam3cache.features.levels import BLOCK_ROWS, LABEL_TILE_PX, LabelSetSpec, LevelSpec, ShardGrid
from sam3cache.features.objects import ObjectPath
from sam3cache.features.places import Place, for_places, place_of
from sam3cache.features.receipts import (
    CHANGE_FILE,
    FOLDED_FILE,
    FORMAT_VERSION,
    OVERLAY_OF,
    SAMPLES_ITEM,
    SEAL_COPY,
    SEAL_FILE,
    Receipt,
    ReceiptKey,
    ShardRecord,
    is_seal_lost,
    matches_own_hash,
    parse_receipt,
    single_receipts,
)
from sam3cache.features.tables import (
    ANNOTATIONS_FILE,
    LABEL_ROWS_FILE,
    SAMPLES_FILE,
    AnnotationRow,
    LabelRow,
    SampleRow,
    read_annotations,
    read_label_rows,
    read_samples,
)
from sam3cache.features.writer import GROUP_FILE, block_of, metadata_files
from sam3cache.tasks import Task

Kind = Literal[
    "seal",
    "receipt",
    "metadata",
    "table",
    "missing",
    "size",
    "checksum",
    "content",
    "incomplete",
    "unfinished",
    "stray",
]
"""What a finding is about; ``VerifyResult`` says which of them are damage."""

_INT32 = 2**31
_INT64 = ("row", "size_bytes", "mtime_ns")
_STATUSES = ("pending", "ok", "aside", "removed")
_SPLITS = ("train", "val", "test")
UNKNOWN_SPLIT = ""
"""Split of a sample whose annotations were lost, until the next extraction."""

# What zarr-python may write differently from one version to the next says nothing of damage.
_METADATA_KEYS = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
    "attributes",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: what it is about.
        path: of the file below the store, forward slashes.
        message: what was met, and what was expected.
        item: of the receipt concerned, as "levels.fpn_72"; empty for none.
        block: of that receipt; None for none.
        rows: samples concerned, as far as is known.
    """

    kind: Kind
    path: str
    message: str
    item: str = ""
    block: int | None = None
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardClaim:
    """A file that a receipt names, with what it has to hold.

    Attributes:
        item: of the receipt.
        block: of the receipt.
        record: name, size and checksums as the receipt states them.
        grid: layout of the array.
        rows: that have a chunk in it, ascending.
        limits_px: for labels, by row, the height and width of the mask from the tile's corner on.
        max_label: for labels, the highest number that may stand there beside 255; None: any.
    """

    item: str
    block: int
    record: ShardRecord
    grid: ShardGrid
    rows: tuple[int, ...]
    limits_px: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    max_label: int | None = None


@dataclass
class Survey:
    """A store as far as it can be read.

    Attributes:
        root: the store's folder.
        findings: damage so far.
        sealed: whether there is a seal, right or wrong.
        seal_holds: whether the seal, if any, is what it was: only then its hashes count.
        hashes: of the seal, by path.
        copies: text of zarr.json files that a seal keeps, by path.
        description: what zarr.json says, or the seal's copy of it; None when neither can be read.
        levels: by name, those whose metadata can be read.
        digests: of the levels' fingerprints, by name.
        label_sets: by name, those whose metadata can be read.
        expected: every zarr.json, by path, as the description has it.
        receipts: all that can be read, the newest of each.
        receipt_files: where each was found.
        claims: the files that the receipts name.
        samples: samples.parquet, None when it cannot be read.
        annotations: annotations.parquet, likewise.
        label_rows: by label set, rows.parquet, likewise.
    """

    root: Place
    findings: list[Finding] = field(default_factory=list)
    sealed: bool = False
    seal_holds: bool = True
    hashes: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    description: dict[str, Any] | None = None
    levels: dict[str, LevelSpec] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    label_sets: dict[str, LabelSetSpec] = field(default_factory=dict)
    expected: dict[str, bytes] = field(default_factory=dict)
    receipts: dict[ReceiptKey, Receipt] = field(default_factory=dict)
    receipt_files: dict[ReceiptKey, str] = field(default_factory=dict)
    claims: list[ShardClaim] = field(default_factory=list)
    samples: list[SampleRow] | None = None
    annotations: list[AnnotationRow] | None = None
    label_rows: dict[str, dict[int, LabelRow] | None] = field(default_factory=dict)

    def add(
        self,
        kind: Kind,
        path: str,
        message: str,
        key: ReceiptKey | None = None,
        rows: Iterable[int] = (),
    ) -> None:
        """Note a finding."""
        item, block = key if key is not None else ("", None)
        self.findings.append(Finding(kind, path, message, item, block, tuple(rows)))

    @property
    def rows(self) -> list[SampleRow]:
        """The table of samples with the facts of finished blocks, as far as both can be read."""
        # Here and not by merge_sample_facts: facts may be of any type.
        facts = {
            fact["row"]: fact
            for (item, _), receipt in self.receipts.items()
            if item == SAMPLES_ITEM
            for fact in receipt.facts
            if _is_int(fact.get("row"))
        }
        statuses = {"pending": ("ok", "aside"), "ok": ("aside",)}
        return [
            SampleRow(row.row, row.id, row.source, status=facts[row.row]["status"])
            if row.row in facts and facts[row.row].get("status") in statuses.get(row.status, ())
            else row
            for row in self.samples or ()
        ]


def survey_store(root: Place) -> Survey:
    """Read all of a store but its shards.

    Raises:
        NotAStoreError: when ``root`` has nothing of a store.
        StoreError: when the store's format is newer than this code.
        OSError: when the system does not let us read.
    """
    if isinstance(root, ObjectPath):
        root.require_reachable()
    survey = Survey(place_of(root))
    if not any((root / name).exists() for name in (GROUP_FILE, SEAL_FILE, SAMPLES_FILE)):
        what = "is not a feature store (no zarr.json in it)" if root.exists() else "does not exist"
        raise NotAStoreError(
            f"{root} {what}; give the folder that `sam3cache extract MANIFEST -o FOLDER` wrote"
        )
    _read_receipts(survey)
    _read_description(survey)
    _read_specs(survey)
    _check_metadata(survey)
    _read_tables(survey)
    _check_hashes(survey)
    for key in sorted(survey.receipts):
        _check_receipt(survey, key)
    if survey.samples is not None:
        _check_samples(survey, survey.samples)
        _check_complete(survey)
    return survey


def _read(path: Place) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _parse(data: bytes | str | None) -> Any:
    """Return what JSON says; None for what is none."""
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        return None


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_receipts(survey: Survey) -> None:
    """Read the receipts in the order in which newer ones replace older ones."""
    root = survey.root
    survey.sealed = (root / SEAL_FILE).exists()
    is_lost = is_seal_lost(root)
    if is_lost:
        survey.add("seal", SEAL_FILE, f"is missing, though its copy {SEAL_COPY} is there")
    for name in (FOLDED_FILE, SEAL_COPY if is_lost else SEAL_FILE):
        if (root / name).exists():
            _read_seal(survey, name)
    if survey.sealed and survey.seal_holds:
        _check_copy_of_seal(survey)
    elif survey.sealed and (root / SEAL_COPY).exists():
        _read_seal(survey, SEAL_COPY)
    paths = single_receipts(root)
    for path, data in zip(paths, for_places(_read, paths), strict=True):
        item, number = path.parent.name, path.stem
        name = f"receipts/{item}/{path.name}"
        key = (item, int(number)) if re.fullmatch(r"\d{8}", number) else None
        try:
            receipt = None if data is None else parse_receipt(data, path)
        except CorruptStoreError:
            receipt = None
        if key is None or receipt is None or (receipt.item, receipt.block) != key:
            message = "is not the receipt that was written there"
            survey.add("receipt", name, message, key)
            if key is not None:
                survey.receipts.pop(key, None)
            continue
        known = {*receipt.to_json(), "sha256"}
        if not set(_parse(data)) <= known:
            survey.add("receipt", name, "has entries that no receipt has", key)
        survey.receipts[key] = receipt
        survey.receipt_files[key] = name


def _read_seal(survey: Survey, name: str) -> None:
    data = _read(survey.root / name) or b""
    content = _parse(data)
    is_whole = (
        isinstance(content, dict)
        and all(isinstance(content.get(part), kind) for part, kind in _SEAL_PARTS)
        and matches_own_hash(data, content)
    )
    if is_whole and canonical_json(content) != data:
        # Its values are right, and yet these are not the bytes that were written.
        survey.add("seal", name, "is not written as a seal is, though its hash is right")
        survey.seal_holds &= name != SEAL_FILE
    elif not is_whole:
        survey.add("seal", name, "does not match its own hash: receipts in it need proof")
        survey.seal_holds &= name != SEAL_FILE
    if is_whole:
        values = content["receipts"]
        if name == SEAL_FILE:
            survey.hashes = {str(path): str(value) for path, value in content["hashes"].items()}
        survey.copies |= {str(k): str(v) for k, v in content.get("metadata", {}).items()}
    else:
        # Receipt by receipt: one byte may have spoiled the JSON around all the others.
        text = data.decode("ascii", errors="replace")
        values = [_parse_from(text, match.start()) for match in _RECEIPT_START.finditer(text)]
    for value in values:
        try:
            receipt = Receipt.from_json(value, survey.root / name)
        except CorruptStoreError:
            if is_whole:
                survey.add("receipt", name, "holds a receipt that cannot be read")
            continue
        key = (receipt.item, receipt.block)
        survey.receipts[key] = receipt
        survey.receipt_files[key] = name


def _check_copy_of_seal(survey: Survey) -> None:
    seal, copy = _read(survey.root / SEAL_FILE), _read(survey.root / SEAL_COPY)
    # Version 1 had no copy.
    if copy is None and _parse(seal)["format_version"] == 1:
        return
    if copy != seal:
        what = "is missing" if copy is None else "differs from what it is a copy of"
        survey.add("seal", SEAL_COPY, f"{what}, {SEAL_FILE}")


_SEAL_PARTS = (("receipts", list), ("hashes", dict), ("seal", str))
_RECEIPT_START = re.compile(r'\{"block":')


def _parse_from(text: str, start: int) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _read_description(survey: Survey) -> None:
    data = _read(survey.root / GROUP_FILE)
    description = _description_in(_parse(data))
    is_as_sealed = (
        survey.seal_holds
        and data is not None
        and survey.hashes.get(GROUP_FILE) in (None, hashlib.sha256(data).hexdigest())
    )
    if description is None or not is_as_sealed:
        copy = _description_in(_parse(survey.copies.get(GROUP_FILE)))
        if description is None and (not survey.hashes or not survey.seal_holds):
            # With a seal, its hash tells the same.
            what = "is missing" if data is None else "does not describe a store"
            survey.add("metadata", GROUP_FILE, what)
        description = copy if copy is not None else description
    survey.description = description
    if description is None:
        return
    if description["format_version"] > FORMAT_VERSION and is_as_sealed:
        raise StoreError(
            f"{survey.root} has format version {description['format_version']}, this sam3cache "
            f"reads up to {FORMAT_VERSION}; upgrade sam3cache"
        )
    for name, level in description["levels"].items():
        survey.digests[name] = level["digest"]
        if Fingerprint(level["fingerprint"]).digest != level["digest"]:
            survey.add(
                "metadata", GROUP_FILE, f"states a fingerprint of {name} that is not its digest's"
            )


def _description_in(group: Any) -> dict[str, Any] | None:
    """Return what a group's zarr.json says of a store, if all of it is there."""
    try:
        description: dict[str, Any] = group["attributes"]["sam3cache"]
        complete = (
            all(_is_int(description[name]) for name in ("format_version", "num_blocks"))
            and description["block_rows"] == BLOCK_ROWS
            and isinstance(description["settings"], dict)
            and all(isinstance(name, str) for name in description["label_sets"])
            and all(
                isinstance(level["digest"], str)
                and isinstance(level["fingerprint"], dict)
                and all(_is_field(value) for value in level["fingerprint"].values())
                for level in description["levels"].values()
            )
        )
    except (KeyError, TypeError, AttributeError):
        return None
    return description if complete else None


def _is_field(value: object) -> bool:
    return (
        isinstance(value, str)
        or _is_int(value)
        or (isinstance(value, float) and math.isfinite(value))
    )


def _read_specs(survey: Survey) -> None:
    """Read what the arrays are from their metadata, or from the seal's copy."""
    description = survey.description
    level_names: Iterable[str]
    if description is None:
        items = {item.partition(".")[::2] for item, _ in survey.receipts}
        level_names = sorted(name for kind, name in items if kind == "levels")
        label_names = sorted(name for kind, name in items if kind == "labels")
    else:
        level_names, label_names = description["levels"], description["label_sets"]
    for name in level_names:
        path = f"levels/{name}/{GROUP_FILE}"
        level = _spec_from(survey, (path,), lambda array, name=name: _level_in(name, array))
        if level is not None:
            survey.levels[name] = level
    for name in label_names:
        paths = (f"labels/{name}/{GROUP_FILE}", f"labels/{name}/masks/{GROUP_FILE}")
        label_set = _spec_from(
            survey, paths, lambda group, array, name=name: _label_set_in(name, group, array)
        )
        if label_set is not None:
            survey.label_sets[name] = label_set


def _spec_from(survey: Survey, paths: tuple[str, ...], build: Callable[..., T]) -> T | None:
    """Build a spec from metadata: of the seal's copies where it has them, else of the files."""
    files = [_parse(_read(survey.root / path)) for path in paths]
    copies = [_parse(survey.copies.get(path)) for path in paths]
    for values in (copies, files) if survey.sealed and survey.seal_holds else (files, copies):
        try:
            return build(*values)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, ConfigError):
            continue
    return None


def _level_in(name: str, array: Any) -> LevelSpec:
    _, c, h, w = map(int, array["shape"])
    return LevelSpec(name, (_positive(c), _positive(h), _positive(w)), str(array["data_type"]))


def _label_set_in(name: str, group: Any, array: Any) -> LabelSetSpec:
    attributes = group["attributes"]["sam3cache"]
    classes, task = attributes["classes"], attributes.get("task", "multilabel")
    _, k, h, w = map(int, array["shape"])
    if not isinstance(classes, list) or task not in get_args(Task):
        raise ValueError(attributes)
    spec = LabelSetSpec(name, tuple(map(str, classes)), _positive(h), _positive(w), task)
    if k != spec.num_planes:
        raise ValueError(classes)
    return spec


def _positive(size: int) -> int:
    # Far beyond any level or mask: a flipped digit must not make us reserve memory.
    if not 0 < size < 10**6:
        raise ValueError(size)
    return size


def _check_metadata(survey: Survey) -> None:
    """Compare every zarr.json but the store's own with what the description asks for."""
    description = survey.description
    if description is None:
        return
    expected = metadata_files(
        description["settings"],
        {
            name: (spec, Fingerprint(description["levels"][name]["fingerprint"]))
            for name, spec in survey.levels.items()
        },
        survey.label_sets,
        max(0, description["num_blocks"]),
    )
    del expected[GROUP_FILE]
    survey.expected = expected
    names = set(expected)
    names |= {f"levels/{name}/{GROUP_FILE}" for name in description["levels"]}
    for name in description["label_sets"]:
        names |= {f"labels/{name}/{GROUP_FILE}", f"labels/{name}/masks/{GROUP_FILE}"}
    for path in sorted(names):
        data = _read(survey.root / path)
        found = _parse(data)
        if data is None:
            survey.add("metadata", path, "is missing")
        elif not isinstance(found, dict):
            survey.add("metadata", path, "is not JSON")
        elif path not in expected:
            survey.add("metadata", path, "does not describe an array of a store")
        else:
            wanted = json.loads(expected[path])
            differing = [
                key for key in _METADATA_KEYS if not _same(found.get(key), wanted.get(key))
            ]
            if differing:
                survey.add(
                    "metadata",
                    path,
                    f"differs from what the store's description asks for in {', '.join(differing)}",
                )
    if survey.sealed and survey.seal_holds:
        unnamed = {GROUP_FILE, SAMPLES_FILE, ANNOTATIONS_FILE, *expected} - set(survey.hashes)
        for path in sorted(unnamed):
            survey.add("seal", SEAL_FILE, f"has no hash of {path}")


def _same(found: Any, wanted: Any) -> bool:
    # NaN, the fill value of floats, is a string in Zarr's JSON; plain equality does.
    return bool(found == wanted)


def _read_tables(survey: Survey) -> None:
    def attempt(path: str, read: Callable[[Place], T], folder: Place) -> T | None:
        try:
            return read(folder)
        except (CorruptStoreError, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = re.search(r"cannot be read \((.*?)\);", str(error))
            survey.add("table", path, f"cannot be read: {reason[1] if reason else error}")
            return None

    root = survey.root
    survey.samples = attempt(SAMPLES_FILE, read_samples, root)
    survey.annotations = attempt(ANNOTATIONS_FILE, read_annotations, root)
    for name in survey.label_sets:
        # The receipts say the same until the seal is set.
        if survey.sealed:
            path = f"labels/{name}/{LABEL_ROWS_FILE}"
            survey.label_rows[name] = attempt(path, read_label_rows, root / "labels" / name)


def _check_hashes(survey: Survey) -> None:
    """Compare files with the seal; what is known to be broken is not told twice."""
    if not survey.seal_holds:
        return
    told = {finding.path for finding in survey.findings}
    for path, expected in survey.hashes.items():
        try:
            found = sha256_of_file(survey.root / path)
        except (OSError, ValueError):
            found = ""
        if found == expected:
            continue
        is_table = path.endswith(".parquet")
        if path not in told:
            what = "is missing" if not found else "is not what the store was sealed with"
            survey.add("table" if is_table else "metadata", path, what)
        # What it says cannot be believed, though it can be read.
        if path == SAMPLES_FILE:
            survey.samples = None
        elif path == ANNOTATIONS_FILE:
            survey.annotations = None
        elif is_table and path.count("/") == 2:
            survey.label_rows[path.split("/")[1]] = None


def _check_receipt(survey: Survey, key: ReceiptKey) -> None:
    """Check one receipt against the description, and list the files that it names."""
    item, block = key
    receipt = survey.receipts[key]
    path = survey.receipt_files[key]

    def damaged(message: str, rows: Iterable[int] = ()) -> None:
        survey.add("receipt", path, f"{item} of block {block}: {message}", key, rows)

    kind, _, name = item.partition(".")
    description = survey.description
    if description is not None and not 0 <= block < description["num_blocks"]:
        damaged(f"there are blocks 0 to {description['num_blocks'] - 1}")
        return
    rows = receipt.rows
    if list(rows) != sorted(set(rows)) or any(block_of(row) != block for row in rows):
        damaged(f"states rows {rows}, which are not ascending rows of that block")
        return
    if kind == "levels":
        if name not in survey.digests and description is not None:
            damaged("there is no such level")
            return
        if receipt.digest != survey.digests.get(name, receipt.digest):
            damaged("its digest is not that of the level's fingerprint")
            return
        if name in survey.levels:
            _claim_level(survey, receipt, survey.levels[name], damaged)
    elif kind == "labels":
        if description is not None and name not in description["label_sets"]:
            if survey.sealed:
                damaged("there is no such label set")
            else:
                survey.add("unfinished", path, f"{item} is being changed", key)
            return
        if name in survey.label_sets:
            _claim_labels(survey, receipt, survey.label_sets[name], damaged)
    elif item != SAMPLES_ITEM:
        damaged("there is no such item")
    elif not _are_facts_of_samples(receipt):
        damaged("its facts are not those of samples")
    elif not survey.seal_holds and _disagrees_with_table(survey, receipt):
        damaged("its facts are not those of samples.parquet, and the seal cannot tell")


def _claim_level(
    survey: Survey, receipt: Receipt, spec: LevelSpec, damaged: Callable[..., None]
) -> None:
    wanted: dict[str, tuple[ShardGrid, list[int]]] = {}
    for row in receipt.rows:
        for grid in spec.grids:
            key = grid.key((row // grid.num_inner,))
            wanted.setdefault(key, (grid, []))[1].append(row)
    _claim(survey, receipt, {k: (grid, rows, {}) for k, (grid, rows) in wanted.items()}, damaged)


def _claim_labels(
    survey: Survey, receipt: Receipt, spec: LabelSetSpec, damaged: Callable[..., None]
) -> None:
    lines: dict[int, LabelRow] = {}
    for fact in receipt.facts:
        line = _label_row_in(fact, spec)
        if line is None:
            damaged("its facts are not those of masks")
            return
        lines[line.row] = line
    if sorted(lines) != list(receipt.rows):
        damaged("its facts are not of the rows that it states")
        return
    table = survey.label_rows.get(spec.name)
    if table is not None:
        differing = [row for row, line in lines.items() if table.get(row) != line]
        if differing:
            damaged(f"differs from {LABEL_ROWS_FILE} in rows {differing}", differing)
    elif survey.sealed and not survey.seal_holds:
        damaged("neither seal nor table can vouch for its masks' sizes and sources", lines)
    wanted: dict[str, tuple[ShardGrid, list[int], dict[int, tuple[int, int]]]] = {}
    for row, line in sorted(lines.items()):
        if not line.present:
            continue
        for k in range(spec.num_planes):
            for y in range(0, line.height_px, LABEL_TILE_PX):
                for x in range(0, line.width_px, LABEL_TILE_PX):
                    index = (receipt.block, k, y // LABEL_TILE_PX, x // LABEL_TILE_PX)
                    shard = wanted.setdefault(spec.grid.key(index), (spec.grid, [], {}))
                    shard[1].append(row)
                    shard[2][row] = (line.height_px - y, line.width_px - x)
    max_label: int | None = len(spec.classes) if spec.task == "multiclass" else 1
    if spec.task == "multilabel" and spec.num_planes == 1:
        max_label = None  # Before there were tasks, one plane might hold class numbers.
    _claim(survey, receipt, wanted, damaged, max_label=max_label)


def _claim(
    survey: Survey,
    receipt: Receipt,
    wanted: Mapping[str, tuple[ShardGrid, list[int], Mapping[int, tuple[int, int]]]],
    damaged: Callable[..., None],
    *,
    max_label: int | None = None,
) -> None:
    """List a receipt's files if they are those that its rows lie in."""
    keys = [record.key for record in receipt.shards]
    if sorted(keys) != sorted(wanted):
        odd = sorted({*keys} ^ {*wanted}) or keys
        damaged(f"the files that it names are not those of its rows ({odd[0]})")
        return
    for record in receipt.shards:
        grid, rows, limits_px = wanted[record.key]
        if len(record.chunk_crc32c) not in (0, len(rows)):
            damaged(f"it has checksums of {len(record.chunk_crc32c)} chunks for {len(rows)} rows")
            return
        survey.claims.append(
            ShardClaim(receipt.item, receipt.block, record, grid, tuple(rows), limits_px, max_label)
        )


def _label_row_in(fact: Mapping[str, Any], spec: LabelSetSpec) -> LabelRow | None:
    try:
        line = LabelRow(**fact)
    except TypeError:
        return None
    numbers = (line.row, line.height_px, line.width_px, line.size_bytes, line.mtime_ns)
    fits = (
        all(map(_is_int, numbers))
        and isinstance(line.present, bool)
        and isinstance(line.source, str)
        and 0 <= line.height_px <= spec.height_px
        and 0 <= line.width_px <= spec.width_px
    )
    return line if fits else None


def _are_facts_of_samples(receipt: Receipt) -> bool:
    rows = [fact.get("row") for fact in receipt.facts]
    ok = [fact.get("row") for fact in receipt.facts if fact.get("status") == "ok"]
    return (
        not receipt.shards
        and all(_is_int(row) and block_of(row) == receipt.block for row in rows)
        and len(set(rows)) == len(rows)
        and ok == list(receipt.rows)
        and all(fact.get("status") in ("ok", "aside") for fact in receipt.facts)
        and all(_is_fact(name, value) for fact in receipt.facts for name, value in fact.items())
    )


def _is_fact(name: str, value: object) -> bool:
    """Return whether a value is of the type that a column of samples.parquet has."""
    if name in ("status", "reason", "pixel_sha256"):
        return isinstance(value, str)
    is_column = name in SampleRow.__slots__
    return is_column and _is_int(value) and abs(value) < _INT32 ** (2 if name in _INT64 else 1)


def _disagrees_with_table(survey: Survey, receipt: Receipt) -> bool:
    """Return whether a receipt's facts are others than the table's, into which they were folded."""
    table = {row.row: asdict(row) for row in survey.samples or ()}
    return any(
        fact["row"] not in table
        or any(table[fact["row"]][name] != value for name, value in fact.items())
        for fact in receipt.facts
    )


def _check_samples(survey: Survey, samples: list[SampleRow]) -> None:
    def damaged(message: str, rows: Iterable[int] = (), path: str = SAMPLES_FILE) -> None:
        survey.add("table", path, message, None, rows)

    numbers = [row.row for row in samples]
    if (
        not all(map(_is_int, numbers))
        or numbers != sorted(set(numbers))
        or min(numbers, default=0) < 0
    ):
        damaged("its rows are not ascending")
        survey.samples = None
        return
    wrong = [row.row for row in samples if row.status not in _STATUSES]
    if wrong:
        damaged(f"has a status that there is not, expected {', '.join(_STATUSES)}", wrong)
    if survey.description is not None:
        num_blocks = 1 + max(map(block_of, numbers), default=-1)
        if num_blocks != survey.description["num_blocks"]:
            damaged(f"spans {num_blocks} blocks, zarr.json {survey.description['num_blocks']}")
    seen: set[str | None] = set()
    for row in samples:
        if row.status != "removed":
            if row.id in seen or row.id is None:
                damaged(f"has two samples of id {row.id}", [row.row])
            seen.add(row.id)
    _check_annotations(survey, samples)
    for name, table in survey.label_rows.items():
        if table is None:
            continue
        path = f"labels/{name}/{LABEL_ROWS_FILE}"
        receipts = [r for (item, _), r in survey.receipts.items() if item == f"labels.{name}"]
        unknown = sorted(set(table) - {row for receipt in receipts for row in receipt.rows})
        if unknown and survey.seal_holds:
            damaged("has masks that no receipt vouches for", unknown, path)


def _check_annotations(survey: Survey, samples: list[SampleRow]) -> None:
    notes = survey.annotations
    if notes is None:
        return

    def damaged(message: str, rows: Iterable[int] = ()) -> None:
        survey.add("table", ANNOTATIONS_FILE, message, None, rows)

    numbers = [note.row for note in notes]
    if not all(map(_is_int, numbers)) or numbers != sorted(set(numbers)):
        damaged("its rows are not ascending")
        return
    # An overlay has annotations of its own, or none.
    settings = {} if survey.description is None else survey.description["settings"]
    is_overlay = OVERLAY_OF in settings
    by_row = {note.row: note for note in notes}
    rows = {row.row: row for row in samples}
    unknown = sorted(set(by_row) - set(rows))
    if unknown:
        damaged(f"has rows that {SAMPLES_FILE} has not", unknown)
    lacking = [
        row.row for row in samples if row.status in ("ok", "pending") and row.row not in by_row
    ]
    if lacking and not (is_overlay and not notes):
        damaged("lacks samples", lacking)
    other = [
        note.row
        for note in notes
        if note.row in rows and rows[note.row].status != "removed" and rows[note.row].id != note.id
    ]
    if other:
        damaged(f"has other ids than {SAMPLES_FILE}", other)
    lost = [note.row for note in notes if note.split == UNKNOWN_SPLIT]
    if lost and not survey.sealed:
        survey.add(
            "unfinished",
            ANNOTATIONS_FILE,
            "splits, groups and angles are to be read again",
            rows=lost,
        )
    odd = [n.row for n in notes if n.split not in (_SPLITS if survey.sealed else (*_SPLITS, ""))]
    if odd:
        damaged(f"has splits that are none of {', '.join(_SPLITS)}", odd)
    angles = [
        note.row
        for note in notes
        for angle in (note.primary_angle_deg, note.secondary_angle_deg)
        if angle is not None and not math.isfinite(angle)
    ]
    if angles:
        damaged("has angles that are not finite", sorted(set(angles)))


def _check_complete(survey: Survey) -> None:
    """See whether every sample that counts as done has everything, and what is still to be done."""
    ok: dict[int, set[int]] = {}
    pending: list[int] = []
    for row in survey.rows:
        if row.status == "ok":
            ok.setdefault(block_of(row.row), set()).add(row.row)
        elif row.status == "pending":
            pending.append(row.row)
    if pending:
        kind: Kind = "incomplete" if survey.sealed else "unfinished"
        survey.add(
            kind, SAMPLES_FILE, f"{len(pending)} samples are still to be extracted", None, pending
        )
    items = [f"levels.{name}" for name in survey.digests]
    if survey.description is not None:
        items += [f"labels.{name}" for name in survey.description["label_sets"]]
    if ok and items and not (survey.sealed or survey.receipts):
        survey.add("seal", SEAL_FILE, "is missing, and there are no receipts beside it")
        return
    told = {(f.item, f.block) for f in survey.findings if f.kind == "receipt"}
    for block, rows in sorted(ok.items()):
        for item in items:
            receipt = survey.receipts.get((item, block))
            lacking = sorted(rows - set(receipt.rows if receipt else ()))
            if lacking and (item, block) not in told:
                survey.add(
                    "incomplete" if survey.sealed else "unfinished",
                    survey.receipt_files.get((item, block), SEAL_FILE if survey.sealed else ""),
                    f"{item} of block {block}: no receipt vouches for {len(lacking)} samples",
                    (item, block),
                    lacking,
                )


def known_files(survey: Survey) -> set[str]:
    """Return every path below the store that something names, whether or not it is there."""
    names = {GROUP_FILE, SAMPLES_FILE, ANNOTATIONS_FILE, SEAL_FILE, SEAL_COPY, FOLDED_FILE}
    names |= {CHANGE_FILE, ".lock", ".holder.json", *survey.expected, *survey.hashes}
    names |= set(survey.receipt_files.values()) | {f.path for f in survey.findings}
    names |= {f"labels/{name}/{LABEL_ROWS_FILE}" for name in survey.label_sets}
    for receipt in survey.receipts.values():
        names |= {record.key for record in receipt.shards}
    return names
