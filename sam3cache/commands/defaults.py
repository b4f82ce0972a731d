"""What a command takes when it is not told: the only one there is."""

from __future__ import annotations

from pathlib import Path

from sam3cache.errors import ConfigError


def only_store() -> Path:
    """Return the store in features/ if there is just one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    stores = sorted(Path("features").glob("*.zarr"))
    if len(stores) == 1:
        return stores[0]
    raise ConfigError(
        f"no store is named and features/ does not hold just one ({_names(stores)}); give the path "
        "of one, or make one with `sam3cache extract`"
    )


def only_run() -> Path:
    """Return the trained run in checkpoints/ if there is just one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    runs = sorted(best.parent for best in Path("checkpoints").glob("*/best"))
    if len(runs) == 1:
        return runs[0]
    raise ConfigError(
        f"no checkpoint is named and checkpoints/ does not hold just one run ({_names(runs)}); "
        "give the path of one, or make one with `sam3cache train`"
    )


def require_order(store: Path, checkpoint: Path) -> None:
    """Refuse a store and a checkpoint that were given the wrong way round.

    Raises:
        ConfigError: they were.
    """
    if (checkpoint / "zarr.json").is_file() and not (store / "zarr.json").is_file():
        raise ConfigError(
            f"{checkpoint} is a feature store, and {store} is none: give the store first, then the "
            "checkpoint"
        )


def _names(paths: list[Path]) -> str:
    return ", ".join(path.as_posix() for path in paths) or "none"
