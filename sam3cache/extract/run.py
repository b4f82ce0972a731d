"""The first pass: from a manifest to a sealed store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sam3cache import runtime
from sam3cache.backbone import BACKBONES, LEVELS, TowerSpec, weights_sha256
from sam3cache.errors import ConfigError, ManifestError, StoreError
from sam3cache.extract.config import (
    IMAGE_LEVEL,
    LABEL_SET,
    ExtractConfig,
    ExtractProgress,
    ExtractResult,
    WorkerStatus,
)
from sam3cache.extract.plan import (
    PixelHashes,
    RowPlan,
    Wanted,
    hash_changed,
    plan_rows,
    probe_all,
)
from sam3cache.extract.pool import run_pool
from sam3cache.extract.worker import BlockTask, WorkerSetup
from sam3cache.features import (
    BlockClaims,
    Fingerprint,
    LabelSetSpec,
    LevelSpec,
    SampleRow,
    block_of,
    describe_store,
    is_described,
    is_sealed,
    label_rows_of,
    merge_sample_facts,
    missing_items,
    open_store,
    read_annotations,
    read_description,
    read_receipts,
    read_samples,
    seal_store,
    store_lock,
)
from sam3cache.images import preprocessing_fields, read_manifest

Report = Callable[[ExtractProgress], None]
_MAX_PAUSES = 5
_PAUSE_S = 2.0


def extract(config: ExtractConfig, report: Report = lambda progress: None) -> ExtractResult:
    """Run SAM 3's vision tower once over every image of a manifest and store its features.

    The same call again resumes: finished blocks are not computed twice, changed images are computed
    anew, and several calls on one store share the work.

    Args:
        config: what to do.
        report: called often, from this thread, with how far it is.

    Raises:
        ManifestError: when the manifest is unusable, or none of its images can be read.
        ConfigError: when an option cannot be used here.
        WeightsError: when the weights are absent or not the backbone's.
        FingerprintError: when the store's features were made differently.
        NumericError: when the tower yields NaN, or overflows float16.
        WorkerError: when a block kills two workers.
        StoreError: when the folder is no store, is busy, or cannot hold these images.
    """
    start_s = time.monotonic()
    root = config.output
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; give -o a folder, such as features/NAME.zarr")

    def report_check(num_done: int, num_total: int) -> None:
        report(ExtractProgress("checking", num_done, num_total, {}))

    description = _description(root)
    seed = config.seed
    if seed is None:
        seed = 0 if description is None else int(description["settings"].get("seed", 0))
    manifest = read_manifest(config.manifest, config.columns, seed=seed)
    wanted = probe_all(manifest.samples, manifest.set_aside, report_check)
    if all(item.info is None for item in wanted):
        raise ManifestError(
            f"{config.manifest}: none of its {len(wanted)} samples can be used, the first because: "
            f"{wanted[0].reason}; correct the manifest or its files"
        )
    # Before the folder is made or locked: absent weights leave nothing behind, and decoding what
    # has changed keeps nobody waiting.
    digest = _weights_digest(config) if set(config.levels) != {IMAGE_LEVEL} else None
    hashes = PixelHashes()
    if description is not None:
        hashes = hash_changed(_rows(root), wanted, report_check)
    with store_lock(root):
        job = _prepare(root, config, seed, wanted, hashes, digest)
    claims = BlockClaims(root)
    num_computed = 0
    num_pauses = 0
    while job.tasks and num_pauses < _MAX_PAUSES:
        tasks = [task for task in job.tasks if claims.is_free(task.block)]
        if tasks:
            num_images = sum(len(task.rows) for task in tasks)
            elsewhere = run_pool(job.setups, tasks, _reporter(report, num_images))
            ours = [task for task in tasks if task.block not in elsewhere]
            num_computed += sum(len(task.rows) for task in ours if _computes(task))
        if tasks and ours:
            num_pauses = 0
        else:
            # Another launch holds all that is left.
            num_pauses += 1
            time.sleep(_PAUSE_S)
        # Locked: whoever seals the store meanwhile folds the receipts that are read here.
        with store_lock(root):
            job = replace(job, tasks=_tasks(root, job))
    if not job.tasks:
        _seal(root, job)
    store = open_store(root, allow_unsealed=True)
    return ExtractResult(
        store=root,
        sealed=store.sealed,
        num_samples=len(store.samples),
        num_computed=num_computed,
        num_relabelled=job.num_relabelled,
        num_kept=len(job.plan.samples) - num_computed,
        num_removed=job.plan.num_removed,
        num_moved=job.plan.num_moved,
        set_aside=store.set_aside,
        leaks=tuple(manifest.leaks),
        split_rule=manifest.split_rule,
        elapsed_s=time.monotonic() - start_s,
    )


def _computes(task: BlockTask) -> bool:
    return any(item.startswith("levels.") for item in task.items)


def _reporter(report: Report, num_total: int) -> Callable[[Mapping[int, WorkerStatus], int], None]:
    return lambda workers, num_done: report(
        ExtractProgress("extracting", num_done, num_total, dict(workers))
    )


@dataclass(frozen=True)
class _Job:
    """What is to be done, decided while the store was locked."""

    plan: RowPlan
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]]
    label_set: LabelSetSpec | None
    setups: tuple[WorkerSetup, ...]
    tasks: tuple[BlockTask, ...]
    num_relabelled: int = 0


def _weights_digest(config: ExtractConfig) -> str:
    """Check the names of levels and backbone, then hash the weights."""
    unknown = [name for name in config.levels if name not in LEVELS and name != IMAGE_LEVEL]
    if unknown:
        known = ", ".join([*LEVELS, IMAGE_LEVEL])
        raise ConfigError(f"level {unknown[0]!r} is unknown; expected some of {known}")
    return weights_sha256(config.backbone, config.weights)


def _description(root: Path) -> dict[str, Any] | None:
    return read_description(root) if (root / "zarr.json").exists() else None


def _rows(root: Path) -> list[SampleRow]:
    return merge_sample_facts(read_samples(root), read_receipts(root))


def _prepare(
    root: Path,
    config: ExtractConfig,
    seed: int,
    wanted: list[Wanted],
    hashes: PixelHashes,
    digest: str | None,
) -> _Job:
    """Bring the store's description up to date and list what is missing."""
    description = _description(root)
    if description is None and _foreign_files(root):
        raise StoreError(
            f"{root} is not empty and not a feature store; give -o a new folder, such as "
            "features/NAME.zarr"
        )
    if description is not None and is_sealed(root):
        open_store(root)  # Refuses a store whose metadata or tables were changed behind our back.
    settings = _settings(config, seed, description)
    levels = _levels(config, description, settings, wanted, digest)
    if IMAGE_LEVEL in levels:
        wanted = [_fit_channels(item, levels[IMAGE_LEVEL][0].shape[0]) for item in wanted]
    existing: list[SampleRow] = []
    old_splits: dict[int, str] = {}
    if description is not None:
        existing = _rows(root)
        old_splits = {note.row: note.split for note in read_annotations(root)}
        _require_common_source(root, config, existing, wanted)
    plan = plan_rows(existing, wanted, hashes, old_splits)
    label_set = _label_set(root, description, plan)
    label_sets = {} if label_set is None else {label_set.name: label_set}
    job = _Job(plan, levels, label_set, _setups(config, settings, levels, label_set), ())
    tasks = _tasks(root, job)
    described = description is not None and is_described(
        root,
        settings=settings,
        levels=levels,
        label_sets=label_sets,
        samples=plan.rows,
        annotations=plan.annotations,
    )
    if not described or (tasks and is_sealed(root)):
        describe_store(
            root,
            settings=settings,
            levels=levels,
            label_sets=label_sets,
            samples=plan.rows,
            annotations=plan.annotations,
        )
    return replace(job, tasks=tasks, num_relabelled=_num_relabelled(root, job))


def _require_common_source(
    root: Path, config: ExtractConfig, existing: list[SampleRow], wanted: list[Wanted]
) -> None:
    """Refuse a manifest that has nothing to do with the store: mostly a slip in -o."""
    stored = {row.source for row in existing if row.status == "ok"}
    if stored and stored.isdisjoint(item.sample.source for item in wanted):
        raise StoreError(
            f"none of the {len(stored)} images in {root} is in {config.manifest}, so that all "
            "would be given up; give -o another folder, or the manifest that this store was made "
            "from"
        )


def _num_relabelled(root: Path, job: _Job) -> int:
    """Count the stored masks that come from another file, or another state of it, than now."""
    if job.label_set is None:
        return 0
    stored = label_rows_of(job.label_set.name, read_receipts(root))
    return sum(
        (stored[row].source, stored[row].size_bytes, stored[row].mtime_ns)
        != (mask.source, mask.size_bytes, mask.mtime_ns)
        for row, mask in job.plan.masks.items()
        if row in stored
    )


def _fit_channels(item: Wanted, num_channels: int) -> Wanted:
    """Set a colour picture aside where the store's picture level is grey."""
    if item.info is None or item.info.num_channels <= num_channels:
        return item
    return replace(
        item,
        info=None,
        reason=f"{item.sample.source} has colour, and level {IMAGE_LEVEL} of this store is grey; "
        "save the picture as grey, or extract everything into a new store",
    )


def _foreign_files(root: Path) -> list[Path]:
    """Return what a crash of our own, before the description was written, cannot have left."""
    ours = {".lock", ".holder.json", "levels", "labels", "claims", "receipts"}
    ours |= {"samples.parquet", "annotations.parquet"}
    return [
        path
        for path in root.iterdir()
        if path.name not in ours and path.suffix != runtime.TEMPORARY_SUFFIX
    ]


def _settings(
    config: ExtractConfig, seed: int, description: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the store's provenance: what its tower levels were begun with, else this run's."""
    if description is not None and set(description["levels"]) - {IMAGE_LEVEL}:
        settings = {**description["settings"], "seed": seed}
        if config.batch_size is not None:
            settings["batch_size"] = config.batch_size
        return settings
    on_cuda = all(device.startswith("cuda") for device in config.devices)
    numeric_path = config.numeric_path
    if numeric_path == "auto":
        numeric_path = "bf16" if on_cuda else "fp32"
    return {
        "backbone": config.backbone,
        "weights": _without_folders(config.weights),
        "batch_size": config.batch_size or (8 if on_cuda else 1),
        "numeric_path": numeric_path,
        "resize_mode": config.resize_mode,
        "seed": seed,
        "device": runtime.device_memory(config.devices[0]).name,
        "environment": runtime.environment_fields(),
    }


def _backbone(config: ExtractConfig) -> TowerSpec:
    spec = BACKBONES.get(config.backbone)
    if spec is None:
        raise ConfigError(
            f"backbone {config.backbone!r} is unknown; expected one of {', '.join(BACKBONES)}"
        )
    return spec


def _without_folders(weights: str | None) -> str:
    """Name the weights without saying where on this machine they lie."""
    if weights is None:
        return "default"
    path = Path(weights)
    return path.name if path.exists() else weights


def _levels(
    config: ExtractConfig,
    description: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    wanted: list[Wanted],
    digest: str | None,
) -> dict[str, tuple[LevelSpec, Fingerprint]]:
    """Return every level the store shall have; those it has must have been made the same way."""
    stored = {} if description is None else description["levels"]
    names = [*stored, *(name for name in config.levels if name not in stored)]
    spec = _backbone(config)
    numeric_path: Literal["fp32", "bf16"] = settings["numeric_path"]
    if config.numeric_path != "auto":
        numeric_path = config.numeric_path
    preprocessing = {
        f"preprocessing.{name}": value
        for name, value in preprocessing_fields(config.resize_mode).items()
    }
    levels: dict[str, tuple[LevelSpec, Fingerprint]] = {}
    for name in names:
        fields: dict[str, str | int | float]
        if name == IMAGE_LEVEL:
            num_channels = max(item.info.num_channels for item in wanted if item.info)
            if name in stored:
                num_channels = stored[name]["fingerprint"]["num_channels"]
            level = LevelSpec(name, (num_channels, spec.size_px, spec.size_px), "uint8")
            fields = {"precision": "uint8", "num_channels": num_channels}
        else:
            digest = digest or _weights_digest(config)
            level = LevelSpec(name, spec.level_shape(name))
            fields = {
                "precision": "float16",
                "numeric_path": numeric_path,
                "weights_sha256": digest,
            }
            fields |= {f"architecture.{k}": v for k, v in spec.architecture_fields().items()}
        fields |= {"level": name, "size_px": spec.size_px, **preprocessing}
        fingerprint = Fingerprint(fields)
        if name in stored:
            Fingerprint(stored[name]["fingerprint"]).require(
                fingerprint,
                level=name,
                remedy=(
                    f"Features of two kinds are never mixed: extract into another folder than "
                    f"{config.output}, or repeat the command with what the store was made with"
                ),
            )
        levels[name] = (level, fingerprint)
    return levels


def _label_set(
    root: Path, description: Mapping[str, Any] | None, plan: RowPlan
) -> LabelSetSpec | None:
    """Return the label set, large enough for every mask of the manifest."""
    present = [mask for mask in plan.masks.values() if mask.present]
    stored = description is not None and LABEL_SET in description["label_sets"]
    if not present and not stored:
        return None
    height_px = max((mask.height_px for mask in present), default=1)
    width_px = max((mask.width_px for mask in present), default=1)
    if stored:
        old = open_store(root, allow_unsealed=True).label_sets[LABEL_SET]
        height_px, width_px = max(height_px, old.height_px), max(width_px, old.width_px)
    return LabelSetSpec(LABEL_SET, ("foreground",), height_px, width_px)


def _setups(
    config: ExtractConfig,
    settings: Mapping[str, Any],
    levels: Mapping[str, tuple[LevelSpec, Fingerprint]],
    label_set: LabelSetSpec | None,
) -> tuple[WorkerSetup, ...]:
    num_threads = max(1, runtime.num_cpu_cores() // len(config.devices))
    of_tower = [fingerprint for name, (_, fingerprint) in levels.items() if name != IMAGE_LEVEL]
    setups = []
    for number, device in enumerate(config.devices):
        shared = config.devices.count(device) > 1
        setups.append(
            WorkerSetup(
                root=config.output,
                name=f"{device} #{number}" if shared else device,
                device=device,
                num_threads=num_threads,
                backbone=config.backbone,
                weights=config.weights,
                weights_sha256=str(of_tower[0].fields["weights_sha256"]) if of_tower else "",
                numeric_path="bf16"
                if of_tower and of_tower[0].fields["numeric_path"] == "bf16"
                else "fp32",
                batch_size=settings["batch_size"],
                resize_mode=config.resize_mode,
                levels=levels,
                label_set=label_set,
            )
        )
    return tuple(setups)


def _tasks(root: Path, job: _Job) -> tuple[BlockTask, ...]:
    """Return the blocks that lack something, and what."""
    receipts = read_receipts(root)
    rows = merge_sample_facts(job.plan.rows, receipts)
    label_sources = {} if job.label_set is None else {job.label_set.name: job.plan.masks}
    missing = missing_items(rows, receipts, root, levels=job.levels, label_sources=label_sources)
    members: dict[int, list[SampleRow]] = {block: [] for block in missing}
    for row in rows:
        if row.status in ("pending", "ok") and block_of(row.row) in members:
            members[block_of(row.row)].append(row)
    return tuple(
        BlockTask(
            block,
            items,
            tuple(members[block]),
            {row.row: job.plan.samples[row.row] for row in members[block]},
            {row.row: job.plan.masks[row.row] for row in members[block]},
        )
        for block, items in sorted(missing.items())
    )


def _seal(root: Path, job: _Job) -> None:
    """Seal the store unless it is sealed already, or others have given it more work meanwhile."""
    with store_lock(root):
        if is_sealed(root):
            return
        if all(row.status != "pending" for row in _rows(root)) and not _tasks(root, job):
            seal_store(root)
