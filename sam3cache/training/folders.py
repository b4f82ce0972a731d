"""A run's folder: what is in it, and who is at work in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sam3cache.errors import ConfigError, StoreBusyError
from sam3cache.features import store_lock
from sam3cache.features.locks import locks_work
from sam3cache.heads.checkpoint import (
    BEST,
    LAST,
    METRICS_FILE,
    MODEL_FILE,
    STATE_FILE,
    TO_REPLACE,
)
from sam3cache.training.config import TrainConfig

_LOCK = ".lock"

# Of any of these, what only a run has; a folder of runs may have runs called "best" and "last".
_OF_A_RUN = (
    f"{BEST}/{MODEL_FILE}",
    f"{LAST}/{MODEL_FILE}",
    f"{LAST}/{STATE_FILE}",
    METRICS_FILE,
)

# What a lock leaves, or a killed holder of it.
_OF_A_LOCK = frozenset({_LOCK, ".holder.json"})


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for the length of the ``with``.

    It is made if it is missing, and taken away again if nothing has come into it. The claim dies
    with its holder. Where the file system has no locks nobody is kept out, as what a killed process
    leaves there would keep everybody out.

    Args:
        folder: of a run, or of several.

    Raises:
        ConfigError: another process is at work in it.
        OSError: it cannot be made, or not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            if locks_work(folder):
                try:
                    stack.enter_context(store_lock(folder, timeout_s=0))
                except StoreBusyError as error:
                    raise ConfigError(f"{error}; or choose another --name") from None
            try:
                yield
            finally:
                if not is_in_use(folder):
                    # While it is held, so that nobody else's is deleted; Windows does not let us.
                    with suppress(OSError):
                        (folder / _LOCK).unlink()
    finally:
        if not is_in_use(folder):
            with suppress(OSError):
                folder.rmdir()


def is_in_use(folder: Path) -> bool:
    """Return whether a folder holds anything beside what says who is at work in it."""
    return folder.exists() and any(path.name not in _OF_A_LOCK for path in folder.iterdir())


def mark_to_replace(folder: Path) -> None:
    """Note that what a folder holds is to be replaced: a later ``--resume`` begins there anew.

    Until the new run begins, the old one can be evaluated.
    """
    if is_in_use(folder):
        (folder / TO_REPLACE).touch()


def unmark(folder: Path) -> None:
    """Take the mark away: what there was to replace is gone."""
    (folder / TO_REPLACE).unlink(missing_ok=True)


def require_unused(config: TrainConfig, *, go_on: str, replace: str) -> None:
    """Refuse a run's folder that holds something, unless that shall go on or be replaced.

    Args:
        config: of the run.
        go_on: what ``--resume`` goes on with.
        replace: what ``--overwrite`` replaces.

    Raises:
        ConfigError: saying what can be done.
    """
    if is_in_use(config.run_dir) and not (config.resume or config.overwrite):
        raise ConfigError(
            f"{config.run_dir} holds a run already; choose another --name, or give --resume to go "
            f"on with {go_on}, or --overwrite to replace {replace}"
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder holds what a run writes."""
    return any((folder / name).exists() for name in _OF_A_RUN)


def runs_in(folder: Path) -> list[str]:
    """Return the names of the runs that have folders of their own in a folder."""
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and is_run(path))
