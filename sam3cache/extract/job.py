"""What an extraction has to do: decided from a manifest and a store, without changing either."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sam3cache import runtime
from sam3cache.backbone import find_numeric_path
from sam3cache.errors import ManifestError, StoreError
from sam3cache.extract.config import IMAGE_LEVEL, LABEL_SET, ExtractConfig, ExtractProgress
from sam3cache.extract.levels import (
    Levels,
    find_digest,
    find_variants,
    is_of_tower,
    make_settings,
    plan_levels,
)
from sam3cache.extract.masks import changed_masks
from sam3cache.extract.rows import (
    AnnotationChanges,
    PixelHashes,
    RowPlan,
    WantedSamples,
    compare_annotations,
    hash_changed,
    plan_rows,
    probe_all,
)
from sam3cache.extract.state import StoreState
from sam3cache.extract.worker import BlockTask, WorkerSetup
from sam3cache.features import (
    LabelSetSpec,
    LazySequence,
    ObjectPath,
    Place,
    RowsWithFacts,
    describe_store,
    foreign_files,
    is_described,
    missing_items,
    read_label_set_spec,
)
from sam3cache.images import Manifest, key_path, read_manifest

Report = Callable[[ExtractProgress], None]

_HAS_COLOUR = (
    f"{{}} has colour, and level {IMAGE_LEVEL} of this store is grey; save the picture as grey, or "
    "extract everything into a new store"
)


@dataclass(frozen=True)
class Request:
    """What is asked for, as far as files tell, whatever state the store is in.

    Attributes:
        config: what to do.
        seed: of the split.
        manifest: as it was read.
        wanted: its samples, and what their files' headers say.
        hashes: of pictures that had to be decoded to be compared.
        digest: of the weights.
    """

    config: ExtractConfig
    seed: int
    manifest: Manifest
    wanted: WantedSamples
    hashes: PixelHashes
    digest: str


def read_request(
    config: ExtractConfig, state: StoreState, report: Report, *, digest: str | None = None
) -> Request:
    """Read the manifest and look at its files.

    Args:
        config: what to do.
        state: of the store; files that are as it recorded need no look.
        report: called often, from this thread, with how far it is.
        digest: of the weights; they are hashed unless it is given.

    Raises:
        ManifestError: when the manifest is unusable, or none of its images can be read; when one
            cannot, and the configuration is strict.
        ConfigError: when a level or the backbone is unknown.
        FingerprintError: when another backbone made the store.
        WeightsError: when the weights are absent or not the backbone's.
    """
    seed = find_seed(config, state.description)
    manifest = read_manifest(config.manifest, config.columns, seed=seed)
    wanted = probe_all(
        manifest.samples,
        manifest.set_aside,
        _stage(report, "checking"),
        state.stored,
        find_variants(config, state.description),
    )
    require_some(manifest.name, wanted)
    if config.strict:
        require_all(manifest, wanted)
    if digest is None:
        digest = find_digest(config, state.description)
    hashes = hash_changed(state.stored, wanted, _stage(report, "comparing"))
    return Request(config, seed, manifest, wanted, hashes, digest)


def require_all(manifest: Manifest, wanted: WantedSamples) -> None:
    """Refuse a manifest of which anything cannot be read, naming what comes first.

    Raises:
        ManifestError: when that is so.
    """
    bad = [index for index in range(wanted.num_originals) if not wanted.is_usable(index)]
    if not bad:
        return
    first, where = bad[0], ""
    if manifest.lines:
        first = min(bad, key=manifest.lines.__getitem__)
        where = f"{manifest.unit} {manifest.lines[first]}: "
    sample, reason = wanted.samples[first], wanted[first].reason
    raise ManifestError(
        f"{where}sample {sample.id!r} cannot be used: {reason.removeprefix(where)} "
        f"({len(bad)} in all; without --strict they are set aside)"
    )


def require_some(name: str, wanted: WantedSamples) -> None:
    """Refuse a manifest of which nothing can be read.

    Args:
        name: of the manifest, in messages.
        wanted: its samples.

    Raises:
        ManifestError: when that is so.
    """
    if not wanted.num_usable:
        raise ManifestError(
            f"{name}: none of its {len(wanted)} samples can be used, the first because: "
            f"{wanted[0].reason}; correct the manifest or its files"
        )


def require_folder(root: Place) -> None:
    """Refuse an output that is no folder, or a bucket that cannot be used.

    Raises:
        StoreError: when that is so.
    """
    if isinstance(root, ObjectPath):
        root.require_reachable()
    elif root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file; give -o a folder, such as features/NAME.zarr")


def find_seed(config: ExtractConfig, description: Mapping[str, Any] | None) -> int:
    """Return the seed of the split: the one that is asked for, else the store's, else 0."""
    if config.seed is not None:
        return config.seed
    return 0 if description is None else int(description["settings"].get("seed", 0))


def _stage(report: Report, stage: Literal["checking", "comparing"]) -> Callable[[int, int], None]:
    return lambda num_done, num_total: report(ExtractProgress(stage, num_done, num_total, {}))


@dataclass(frozen=True)
class Job:
    """What is to be done to a store, given the state that it is in.

    Attributes:
        config: what was asked for.
        settings: the store's provenance.
        plan: the tables.
        levels: every level.
        label_set: the masks' set, or None without masks.
        label_sets: every set that the store has or shall have, that one too, by name.
        state: the store, as it was looked at last.
        annotation_changes: what the manifest says otherwise than the store.
        tasks: blocks that lacked something then.
        changed_masks: rows whose mask comes from another file, or another state of it, than now.
        num_unmasked: of these, those that had a mask and for which the manifest names none.
    """

    config: ExtractConfig
    settings: Mapping[str, Any]
    plan: RowPlan
    levels: Levels
    label_set: LabelSetSpec | None
    label_sets: Mapping[str, LabelSetSpec]
    state: StoreState
    annotation_changes: AnnotationChanges
    tasks: Tasks
    changed_masks: Sequence[int] = ()
    num_unmasked: int = 0

    def at(self, state: StoreState) -> Job:
        """Return the job with what is still to be done of it, given the store as it is now."""
        return replace(self, state=state, tasks=_tasks(self, state))

    def describe(self) -> Job:
        """Bring the store's description up to date; hold :func:`store_lock`.

        Raises:
            OSError: when the disk is full or read-only.
        """
        described: dict[str, Any] = {
            "settings": self.settings,
            "levels": self.levels,
            "label_sets": self.label_sets,
            "samples": self.plan.rows,
            "annotations": self.plan.annotations,
        }
        is_current = not self.plan.is_changed and not self.annotation_changes.are_any
        if (
            self.state.description is not None
            and is_described(self.state.root, **described, tables_are_current=is_current)
            and not (self.tasks and self.state.sealed)
        ):
            return self
        describe_store(self.state.root, **described)
        return replace(self, state=self.state.redescribed(self.plan.rows))

    def setups(self) -> tuple[WorkerSetup, ...]:
        """Return a worker for each device."""
        return make_setups(self.config, self.settings, self.levels, self.label_set)


def plan_job(request: Request, state: StoreState) -> Job:
    """Decide what is to be done; nothing is written.

    Raises:
        FingerprintError: when the store's features were made differently.
        StoreError: when the folder is something else than a store, or a store of other images.
    """
    root, description, config = state.root, state.description, request.config
    if description is None and root.exists() and foreign_files(root):
        raise StoreError(
            f"{root} is not empty and not a feature store; give -o a new folder, such as "
            "features/NAME.zarr"
        )
    settings = make_settings(config, request.seed, description)
    settings |= _key_setting(request, state)
    wanted = request.wanted
    levels = plan_levels(config, description, settings, request.digest, wanted.num_channels)
    if IMAGE_LEVEL in levels:
        wanted = wanted.fit_channels(levels[IMAGE_LEVEL][0].shape[0], _HAS_COLOUR)
    plan = plan_rows(state.stored, wanted, request.hashes)
    _require_common_picture(state, request.manifest.name, plan)
    label_set = _label_set(state, plan)
    label_sets = {
        name: read_label_set_spec(root, name)
        for name in (() if description is None else description["label_sets"])
    }
    if label_set is not None:
        label_sets[label_set.name] = label_set
    changes = compare_annotations(state.annotations(), plan.annotations, plan.is_variant)
    none = Tasks({}, plan, state)
    job = Job(config, settings, plan, levels, label_set, label_sets, state, changes, none)
    changed = array("q") if label_set is None else changed_masks(state, plan)
    return replace(
        job.at(state),
        changed_masks=changed,
        num_unmasked=sum(
            state.masks[row].present and not plan.masks[row].present for row in changed
        ),
    )


def _key_setting(request: Request, state: StoreState) -> dict[str, str]:
    """Return what tells of the key that the store's names come from, if of any.

    Raises:
        StoreError: when that is another than the user's.
    """
    description, now = state.description, request.manifest.key_mark
    before = "" if description is None else str(description["settings"].get("names_key", ""))
    if before and now and before != now:
        raise StoreError(
            f"{state.root} has its names of DICOM files from the key {before}, but "
            f"{key_path()} holds the key {now}, by which every file would be another: put the old "
            "key back, or give -o a new folder"
        )
    return {"names_key": now or before} if now or before else {}


def _require_common_picture(state: StoreState, manifest_name: str, plan: RowPlan) -> None:
    """Refuse a manifest that has nothing to do with the store: mostly a slip in -o."""
    if plan.num_kept:
        return
    stored = {row.source for row in state.rows if row.status == "ok"}
    if stored and stored.isdisjoint(sample.source for sample in plan.wanted.samples):
        raise StoreError(
            f"none of the {len(stored)} images in {state.root} is in {manifest_name}, under "
            "whatever name, so that all would be given up; give -o another folder, or the manifest "
            "that this store was made from"
        )


def _label_set(state: StoreState, plan: RowPlan) -> LabelSetSpec | None:
    """Return the label set, large enough for every mask of the manifest.

    A manifest that names no mask at all says nothing of masks: the set stays as it is.
    """
    height_px, width_px = plan.wanted.largest_mask_px
    if height_px <= 0:
        return None
    if state.description is not None and LABEL_SET in state.description["label_sets"]:
        old = read_label_set_spec(state.root, LABEL_SET)
        height_px, width_px = max(height_px, old.height_px), max(width_px, old.width_px)
    return LabelSetSpec(LABEL_SET, ("foreground",), height_px, width_px)


def make_setups(
    config: ExtractConfig,
    settings: Mapping[str, Any],
    levels: Levels,
    label_set: LabelSetSpec | None,
) -> tuple[WorkerSetup, ...]:
    """Return a worker for each device.

    Args:
        config: what to do; its output is where the workers write.
        settings: the store's provenance.
        levels: every level.
        label_set: the masks' set, or None without masks.
    """
    num_threads = max(1, runtime.num_cpu_cores() // len(config.devices))
    of_tower = [fingerprint for name, (_, fingerprint) in levels.items() if is_of_tower(name)]
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
                numeric_path=find_numeric_path(of_tower[0].fields["numeric_path"])
                if of_tower
                else "fp32",
                batch_size=settings["batch_size"],
                resize_mode=config.resize_mode,
                levels=levels,
                label_set=label_set,
            )
        )
    return tuple(setups)


class Tasks(LazySequence[BlockTask]):
    """Blocks that lack something, each with its rows and samples made when it is asked for.

    Args:
        missing: by block, what it lacks.
        plan: whose rows and samples they are.
        state: the store as it was when they lacked it.
    """

    def __init__(
        self, missing: Mapping[int, frozenset[str]], plan: RowPlan, state: StoreState
    ) -> None:
        self._missing, self._plan, self._state = missing, plan, state
        self.blocks = list(missing)

    def __len__(self) -> int:
        return len(self.blocks)

    def item(self, place: int) -> BlockTask:
        """Return a task."""
        block = self.blocks[place]
        found = RowsWithFacts(list(self._plan.rows.block(block)), self._state.receipts)
        rows = tuple(row for row in found if row.status in ("pending", "ok"))
        owners, masks = self._plan.owners, self._plan.masks
        return BlockTask(
            block,
            self._missing[block],
            rows,
            {row.row: owners[row.row].sample for row in rows},
            {row.row: masks[row.row] for row in rows},
        )

    def only(self, blocks: Iterable[int]) -> Tasks:
        """Return the tasks of some of the blocks, in the order in which they are named."""
        return Tasks({block: self._missing[block] for block in blocks}, self._plan, self._state)

    def num_rows(self) -> int:
        """Count their rows."""
        return sum(len(task.rows) for task in self)

    def to_compute(self) -> Tasks:
        """Return those of blocks that lack a level."""
        return self.only(
            block
            for block, items in self._missing.items()
            if any(item.startswith("levels.") for item in items)
        )

    def num_to_compute(self) -> int:
        """Count the rows that lack a level."""
        return self.to_compute().num_rows()


def _tasks(job: Job, state: StoreState) -> Tasks:
    """Return the blocks that lack something, and what."""
    label_sources = {} if job.label_set is None else {job.label_set.name: job.plan.masks}
    missing = missing_items(
        job.plan.rows,
        state.receipts,
        state.root,
        levels=job.levels,
        label_sources=label_sources,
    )
    return Tasks(dict(sorted(missing.items())), job.plan, state)
