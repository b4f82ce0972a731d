"""Which levels a store shall have, and what their values depend on, then and now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3cache import runtime
from sam3cache.backbone import BACKBONES, LEVELS, NumericPath, TowerSpec, weights_sha256
from sam3cache.errors import ConfigError, FingerprintError
from sam3cache.extract.config import IMAGE_LEVEL, ExtractConfig
from sam3cache.features import Fingerprint, LevelSpec, in_words, split_name
from sam3cache.images import preprocessing_fields

Levels = Mapping[str, tuple[LevelSpec, Fingerprint]]

ASKED_BATCH_SIZE = "asked_batch_size"
"""The setting that says what a batch size was before memory turned out too small for it."""

_NO_DIGEST = "(not looked at)"
_HASH_DIGITS = 12


def is_of_tower(level: str) -> bool:
    """Return whether a level comes from the tower, rather than being the picture itself."""
    return level != IMAGE_LEVEL


def level_spec(name: str, backbone: TowerSpec, num_channels: int) -> LevelSpec:
    """Return a level's shape and precision.

    Args:
        name: of the level, perhaps with a precision, as "fpn_72.int8".
        backbone: whose level.
        num_channels: of the picture level.

    Raises:
        ConfigError: when there is no such level or precision.
    """
    base, _ = split_name(name)
    if base not in LEVELS and base != IMAGE_LEVEL:
        known = ", ".join([*LEVELS, IMAGE_LEVEL])
        raise ConfigError(f"level {name!r} is unknown; expected some of {known}")
    if base == IMAGE_LEVEL:
        return LevelSpec(name, (num_channels, backbone.size_px, backbone.size_px), "uint8")
    return LevelSpec(name, backbone.level_shape(base))


def find_backbone(config: ExtractConfig) -> TowerSpec:
    """Return what the configuration's backbone is made of.

    Raises:
        ConfigError: when there is none of that name.
    """
    spec = BACKBONES.get(config.backbone)
    if spec is None:
        raise ConfigError(
            f"backbone {config.backbone!r} is unknown; expected one of {', '.join(BACKBONES)}"
        )
    return spec


def names_of_levels(
    config: ExtractConfig, description: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Return the names of the store's levels and, after them, of those that shall be added."""
    stored = () if description is None else tuple(description["levels"])
    return (*stored, *(name for name in config.levels if name not in stored))


def find_digest(config: ExtractConfig, description: Mapping[str, Any] | None) -> str:
    """Check the names of levels and backbone, then hash the weights; empty without the tower.

    Raises:
        ConfigError: when a level or the backbone is unknown.
        FingerprintError: when another backbone made the store: its weights need not be looked for.
        WeightsError: when the weights are absent or not the backbone's.
    """
    names = names_of_levels(config, description)
    backbone = find_backbone(config)
    for name in names:
        level_spec(name, backbone, 1)
    if not any(map(is_of_tower, names)):
        return ""
    architecture = _architecture(backbone)
    if description is not None and any(
        level["fingerprint"].get(field) != value
        for name, level in description["levels"].items()
        if is_of_tower(name)
        for field, value in architecture.items()
    ):
        plan_levels(config, description, description["settings"], _NO_DIGEST, 1)
    return weights_sha256(config.backbone, config.weights)


def make_settings(
    config: ExtractConfig, seed: int, description: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the store's provenance: what its tower levels were begun with, else this run's.

    Raises:
        ConfigError: when the store has another batch size than the one that is asked for.
    """
    variants = find_variants(config, description)
    # Of a store without any nothing is said: it is as it was before there were variants.
    more = {"variants": list(variants)} if variants else {}
    if description is not None and any(map(is_of_tower, description["levels"])):
        before = {k: v for k, v in description["settings"].items() if k != "variants"}
        _require_same_batch_size(config, before)
        return {**before, "seed": seed, **more}
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
        "device": _device_name(config),
        "environment": runtime.environment_fields(),
        **more,
    }


def halved_batch_size(settings: Mapping[str, Any], batch_size: int) -> dict[str, int]:
    """Return what to record of a batch size that memory was too small for.

    The size that was asked for stays beside it, so that the same command still goes on.

    Args:
        settings: the store's, as they are recorded.
        batch_size: the smallest that a worker of this process has come down to.

    Returns:
        The settings that change; none where another process has recorded as small a one.
    """
    recorded: int = settings["batch_size"]
    if batch_size >= recorded:
        return {}
    return {"batch_size": batch_size, ASKED_BATCH_SIZE: settings.get(ASKED_BATCH_SIZE, recorded)}


def _require_same_batch_size(config: ExtractConfig, settings: Mapping[str, Any]) -> None:
    recorded = settings["batch_size"]
    if config.batch_size not in (None, recorded, settings.get(ASKED_BATCH_SIZE)):
        raise ConfigError(
            f"--batch-size {config.batch_size}: {config.output} was made with batches of "
            f"{recorded}, and a store keeps to one size, on which the last bits of its features "
            "depend: leave --batch-size out to go on with it, or extract into a new folder with -o"
        )


def _device_name(config: ExtractConfig) -> str:
    if config.engine == "ray":
        from sam3cache.extract.ray_engine import device_name

        return device_name(config.devices[0])
    return runtime.device_memory(config.devices[0]).name


def find_variants(config: ExtractConfig, description: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the variants of training samples: those that are asked for, else the store's."""
    if config.variants is not None:
        return config.variants
    return () if description is None else tuple(description["settings"].get("variants", ()))


def _without_folders(weights: str | None) -> str:
    """Name the weights without saying where on this machine they lie."""
    if weights is None:
        return "default"
    path = Path(weights)
    return path.name if path.exists() else weights


def plan_levels(
    config: ExtractConfig,
    description: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    digest: str,
    num_channels: int,
) -> Levels:
    """Return every level the store shall have.

    Args:
        config: what to do.
        description: of the store, None when there is none yet.
        settings: of :func:`make_settings`.
        digest: of the weights.
        num_channels: of a picture level that is new.

    Raises:
        ConfigError: when a level or the backbone is unknown.
        FingerprintError: when levels that the store has were made differently.
    """
    stored = {} if description is None else description["levels"]
    backbone = find_backbone(config)
    numeric_path: NumericPath = settings["numeric_path"]
    if config.numeric_path != "auto":
        numeric_path = config.numeric_path
    preprocessing = {
        f"preprocessing.{name}": value
        for name, value in preprocessing_fields(config.resize_mode).items()
    }
    levels: dict[str, tuple[LevelSpec, Fingerprint]] = {}
    for name in names_of_levels(config, description):
        if name == IMAGE_LEVEL and name in stored:
            num_channels = int(stored[name]["fingerprint"]["num_channels"])
        spec = level_spec(name, backbone, num_channels)
        fields: dict[str, str | int | float] = {
            "level": spec.base,
            "precision": in_words(spec.precision),
            "size_px": backbone.size_px,
            **preprocessing,
        }
        if is_of_tower(name):
            fields |= {"numeric_path": numeric_path, "weights_sha256": digest}
            fields |= _architecture(backbone)
        else:
            fields["num_channels"] = num_channels
        levels[name] = (spec, Fingerprint(fields))
    if description is not None:
        _require_same(config, description, levels)
    return levels


def _architecture(backbone: TowerSpec) -> dict[str, str | int | float]:
    return {f"architecture.{k}": v for k, v in backbone.architecture_fields().items()}


def _require_same(
    config: ExtractConfig,
    description: Mapping[str, Any],
    levels: Levels,
) -> None:
    """Refuse to go on with levels that were made differently, and say how and what now."""
    stored = description["levels"]
    changes: dict[str, list[str]] = {}
    changed: dict[str, Any] = {}
    for name in stored:
        old, new = Fingerprint(stored[name]["fingerprint"]), levels[name][1]
        if old.digest == new.digest:
            continue
        for field in sorted({*old.fields, *new.fields}):
            before, now = old.fields.get(field), new.fields.get(field)
            if before != now:
                changes.setdefault(f"{field}: {_shown(before)} → {_shown(now)}", []).append(name)
                changed[field] = before
    if not changes:
        return
    # Fields that changed for the same levels are told together.
    by_levels: dict[tuple[str, ...], list[str]] = {}
    for change, names in changes.items():
        by_levels.setdefault(tuple(names), []).append(change)
    told = "; ".join(
        f"level{'s' * (len(names) > 1)} {', '.join(names)}: {'; '.join(lines)}"
        for names, lines in by_levels.items()
    )
    raise FingerprintError(
        f"{config.output} was made differently: {told}. Features of two kinds are never mixed: "
        f"{_remedy(changed, description['settings'], config)}, or extract into a new folder with -o"
    )


def _shown(value: object) -> str:
    if value is None:
        return "(absent)"
    text = str(value)
    kind, colon, digits = text.rpartition(":")
    is_hash = len(digits) == 64 and set(digits) <= set("0123456789abcdef")
    return f"{kind}{colon}{digits[:_HASH_DIGITS]}…" if is_hash else text


def _remedy(changed: Mapping[str, Any], settings: Mapping[str, Any], config: ExtractConfig) -> str:
    """Say how to repeat the command as the store was made.

    Args:
        changed: the store's own values of the fields that differ.
        settings: the store's provenance.
        config: of this run.
    """
    options: list[str] = []
    notes: list[str] = []
    if "weights_sha256" in changed or any(name.startswith("architecture.") for name in changed):
        backbone, weights = settings["backbone"], settings["weights"]
        options.append(f"--backbone {backbone}")
        if weights != "default":
            options.append(f"--weights {weights}")
        if (backbone, weights) == (config.backbone, _without_folders(config.weights)):
            called = "its own weights" if weights == "default" else f"weights called {weights}"
            digest = _shown(changed.get("weights_sha256"))
            notes.append(f"{called} are others now: find those of SHA-256 {digest}")
    if "numeric_path" in changed:
        options.append(f"--numeric-path {changed['numeric_path']}")
    if "preprocessing.resize_mode" in changed:
        options.append(f"--resize {changed['preprocessing.resize_mode']}")
    optional = {"numeric_path", "weights_sha256", "preprocessing.resize_mode", "size_px"}
    if not all(name in optional or name.startswith("architecture.") for name in changed):
        version = settings.get("environment", {}).get("sam3cache", "of then")
        notes.append(f"this sam3cache makes it another way: use version {version}")
    parts = [f"repeat the command with {' '.join(options)}"] if options else []
    text = " and ".join(parts) + (f" ({'; '.join(notes)})" if notes and parts else "")
    return text or "; ".join(notes)
