"""Planning an extraction: what it would write and how long it would take, changing nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sam3cache import runtime
from sam3cache.errors import ManifestError, WeightsError
from sam3cache.extract.batching import choose_batch_size
from sam3cache.extract.config import (
    LABEL_SET,
    ExtractConfig,
    ExtractProgress,
)
from sam3cache.extract.forecast import (
    Forecast,
    Packed,
    TimeForecast,
    VariantForecast,
    choices,
    encode_some,
    forecast_job,
    forecast_level,
    forecast_masks,
    forecast_tables,
    free_bytes_at,
    spread,
)
from sam3cache.extract.job import (
    Report,
    find_seed,
    make_setups,
    plan_job,
    read_request,
    require_folder,
    require_some,
)
from sam3cache.extract.levels import find_digest, find_variants, make_settings, plan_levels
from sam3cache.extract.pilot import Pilot, run_pilot
from sam3cache.extract.rows import Wanted, probe_all
from sam3cache.extract.state import StoreState
from sam3cache.features import (
    BLOCK_ROWS,
    LabelSetSpec,
    ObjectPath,
    is_sealed,
    read_description,
)
from sam3cache.images import Manifest, count_rows, find_csv, read_manifest, sample_manifest

MAX_EXACT_ROWS = 200_000
"""Of a longer CSV only some rows are read; what they say is taken to hold for all."""

NUM_SAMPLED = 64
_NUM_PILOT_IMAGES = 32
_NOISE_PX = 512
_NO_DIGEST = "(not looked at)"
_DOES_NOT_FIT = "there is too little space"


def plan(
    config: ExtractConfig,
    report: Report = lambda progress: None,
    *,
    num_images: int | None = None,
    measure: bool = True,
) -> Forecast:
    """Return what an extraction would write and how long it would take; nothing is changed.

    Whether it fits on the disk, :attr:`Forecast.fits` tells.

    Args:
        config: as for :func:`sam3cache.extract.extract`; its manifest may be a folder that does
            not exist if ``num_images`` is given, and the images are then noise.
        report: called often, from this thread, with how far it is.
        num_images: plan for so many images like those of the manifest, rather than for its own.
        measure: whether to run the workers for some seconds, to learn the time.

    Raises:
        ManifestError: when the manifest is unusable, or none of its images can be read.
        ConfigError: when an option cannot be used here.
        FingerprintError: when the store's features were made differently.
        StoreError: when the folder is no store, or cannot hold these images.
        OSError: when the disk cannot be written to.
    """
    require_folder(config.output)
    if num_images is None:
        csv = find_csv(config.manifest)
        if csv is None or count_rows(csv) <= MAX_EXACT_ROWS:
            return _plan_exactly(config, report, measure)
    if num_images is not None and not config.manifest.exists():
        with tempfile.TemporaryDirectory() as folder:
            _write_noise(Path(folder))
            config = replace(config, manifest=Path(folder), columns=None)
            return _plan_by_sample(config, report, num_images, measure)
    return _plan_by_sample(config, report, num_images, measure)


def _write_noise(folder: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(4):
        pixels_HW = noise.integers(0, 256, (_NOISE_PX, _NOISE_PX), dtype=np.uint8)
        np.save(folder / f"{number}.npy", pixels_HW)


def _plan_exactly(config: ExtractConfig, report: Report, measure: bool) -> Forecast:
    begun_s = time.monotonic()
    state = StoreState.read(config.output, LABEL_SET)
    digest = None if state.description is not None else _NO_DIGEST
    job = plan_job(read_request(config, state, report, digest=digest), state)
    check_s = time.monotonic() - begun_s
    forecast = forecast_job(job)
    if not forecast.fits:
        return replace(forecast, why_no_time=_DOES_NOT_FIT)
    if not measure or not forecast.num_to_compute:
        return forecast
    tasks = spread(job.tasks, _NUM_PILOT_IMAGES)
    wanted = [job.plan.owners[row.row] for task in tasks for row in task.rows]
    try:
        pilot = _run_pilot(
            config,
            state.description,
            job.label_set,
            wanted,
            forecast.num_to_compute,
            report,
        )
    except WeightsError as error:
        return replace(forecast, why_no_time=str(error))
    measured = forecast_job(job, forecast.packed.having(pilot.bytes_an_image, job.levels))
    return replace(measured, time=_time(pilot, check_s, forecast.num_to_compute))


def _run_pilot(
    config: ExtractConfig,
    description: Mapping[str, Any] | None,
    label_set: LabelSetSpec | None,
    wanted: Sequence[Wanted],
    num_to_compute: int,
    report: Report,
) -> Pilot:
    """Measure, with the weights that a new store's plan has done without until now.

    Raises:
        WeightsError: when they are absent or not the backbone's.
    """
    settings = make_settings(config, 0, description)
    digest = find_digest(config, description)
    levels = plan_levels(
        config,
        description,
        settings,
        digest,
        max(item.info.num_channels for item in wanted if item.info),
    )
    setups = make_setups(config, settings, levels, label_set)
    batch_size = choose_batch_size(config, description, setups[0], num_to_compute)
    if batch_size is not None:
        setups = tuple(replace(setup, batch_size=batch_size) for setup in setups)
    return run_pilot(
        # What an object store takes is not measured: it would be written to.
        Path(tempfile.gettempdir())
        if isinstance(config.output, ObjectPath)
        else runtime.existing_folder(config.output),
        setups,
        spread(wanted, _NUM_PILOT_IMAGES),
        num_to_compute,
        lambda num_done, num_total: report(ExtractProgress("measuring", num_done, num_total, {})),
    )


def _time(pilot: Pilot, check_s: float, num_images: int) -> TimeForecast:
    return TimeForecast(
        check_s=check_s,
        start_s=pilot.start_s,
        images_per_s=pilot.images_per_s,
        tower_images_per_s=pilot.tower_images_per_s,
        decode_images_per_s=pilot.decode_images_per_s,
        write_bytes_per_s=pilot.write_bytes_per_s,
        num_measured=pilot.num_images,
        batch_size=pilot.batch_size,
        total_s=check_s + pilot.start_s + num_images / pilot.images_per_s,
    )


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What some samples of a manifest say of all of them.

    Attributes:
        num_samples: of the whole manifest.
        usable: those looked at that can be used.
        num_looked_at: how many were.
        check_s: what looking at one took.
    """

    num_samples: int
    usable: Sequence[Wanted]
    num_looked_at: int
    check_s: float

    @property
    def num_usable(self) -> int:
        return round(self.num_samples * len(self.usable) / self.num_looked_at)


def _plan_by_sample(
    config: ExtractConfig, report: Report, num_images: int | None, measure: bool
) -> Forecast:
    root = config.output
    description = read_description(root) if (root / "zarr.json").exists() else None
    seed = find_seed(config, description)
    sampled = _look_at_some(config, report, num_images, seed)
    settings = make_settings(config, seed, description)
    digest = _NO_DIGEST if description is None else find_digest(config, description)
    num_channels = max(item.info.num_channels for item in sampled.usable if item.info)
    levels = plan_levels(config, description, settings, digest, num_channels)
    label_set = _label_set(sampled.usable)
    # Rows of a store that is being worked on are not looked at here: all is planned anew.
    num_stored = 0
    if description is not None and is_sealed(root):
        num_stored = min(sampled.num_usable, description["num_blocks"] * BLOCK_ROWS)
    packed = encode_some([item.sample for item in sampled.usable], levels, config.resize_mode)

    variants = find_variants(config, description)
    share_of_training = np.mean([item.sample.split == "train" for item in sampled.usable])
    num_variants = round(sampled.num_usable * float(share_of_training)) * len(variants)

    def forecast(packed: Packed) -> Forecast:
        stored = {} if description is None else description["levels"]
        num_new = sampled.num_usable - num_stored
        # Variants of stored samples may be stored, too; all of them are planned anew.
        items = [
            forecast_level(
                spec,
                range((num_new if name in stored else sampled.num_usable) + num_variants),
                packed,
            )
            for name, (spec, _) in levels.items()
        ]
        of_variants = None
        if variants:
            size_bytes = sum(
                round(item.size_bytes * num_variants / max(1, item.num_samples)) for item in items
            )
            of_variants = VariantForecast(variants, num_variants, num_variants, size_bytes)
        if label_set is not None:
            share = np.mean([item.mask is not None for item in sampled.usable])
            items.append(
                forecast_masks(label_set, range(num_new), round(num_new * float(share)), packed)
            )
        num_blocks = -(-(num_new + num_variants) // BLOCK_ROWS)
        num_items = 1 + len(levels) + (label_set is not None)
        num_rows = sampled.num_samples + num_variants
        items.append(forecast_tables(num_rows, num_blocks, num_items))
        return Forecast(
            store=root,
            num_samples=sampled.num_usable,
            num_new=num_new,
            num_changed=0,
            num_kept=num_stored,
            num_renamed=0,
            num_to_compute=max(item.num_samples for item in items[: len(levels)]),
            num_set_aside=sampled.num_samples - sampled.num_usable,
            num_removed=0,
            items=tuple(items),
            free_bytes=free_bytes_at(root),
            num_looked_at=sampled.num_looked_at,
            choices=choices(config, stored, levels, items, packed),
            variants=of_variants,
            packed=packed,
        )

    first = forecast(packed)
    if not first.fits:
        return replace(first, why_no_time=_DOES_NOT_FIT)
    if not measure or not first.num_to_compute:
        return first
    try:
        pilot = _run_pilot(
            config, description, label_set, sampled.usable, first.num_to_compute, report
        )
    except WeightsError as error:
        return replace(first, why_no_time=str(error))
    measured = forecast(packed.having(pilot.bytes_an_image, levels))
    check_s = sampled.check_s * sampled.num_samples
    return replace(measured, time=_time(pilot, check_s, measured.num_to_compute))


def _look_at_some(
    config: ExtractConfig, report: Report, num_images: int | None, seed: int
) -> _Sampled:
    csv = find_csv(config.manifest)
    num_samples = num_images
    if csv is None:
        manifest: Manifest = read_manifest(config.manifest, config.columns, seed=seed)
    else:
        found = sample_manifest(csv, config.columns, num_samples=NUM_SAMPLED, seed=seed)
        manifest = found.manifest
        num_samples = found.num_rows if num_images is None else num_images
    assert num_samples is not None
    some = spread(manifest.samples, NUM_SAMPLED)
    begun_s = time.monotonic()
    wanted = probe_all(
        some,
        manifest.set_aside[:NUM_SAMPLED],
        lambda num_done, num_total: report(ExtractProgress("checking", num_done, num_total, {})),
    )
    check_s = (time.monotonic() - begun_s) / max(1, len(some))
    require_some(manifest.name, wanted)
    usable = [item for item in wanted if item.info is not None]
    if not num_samples:
        raise ManifestError(f"{manifest.name}: no rows; expected a header and a row a sample")
    return _Sampled(num_samples, usable, len(wanted), check_s)


def _label_set(wanted: Sequence[Wanted]) -> LabelSetSpec | None:
    masks = [item.mask for item in wanted if item.mask is not None]
    if not masks:
        return None
    height_px = max(mask.height_px for mask in masks)
    width_px = max(mask.width_px for mask in masks)
    return LabelSetSpec(LABEL_SET, ("foreground",), height_px, width_px)
