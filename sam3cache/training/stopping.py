"""Being told to stop, and stopping where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sam3cache.errors import StoppedError

Stop = Callable[[], str | None]
"""Says what wants a training to stop, such as "SIGTERM"; None while nothing does."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
"""Ctrl-C, what a batch system sends before it kills, SLURM's warning before that, and Ctrl-Break,
Windows' own; a system need not have all of them."""


def never() -> None:
    """Want no stop."""
    return


def stopped(reason: str, message: str) -> StoppedError:
    """Return what ends the program, with the exit code that shells give to a signal.

    Args:
        reason: what has wanted the stop, mostly the name of a signal.
        message: what is kept and how to go on.
    """
    error = StoppedError(message)
    # Ctrl-Break is to Windows what Ctrl-C is.
    if reason in SIGNALS and reason != "SIGBREAK":
        error.exit_code = 128 + getattr(signal, reason)
    return error


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Take signals that would end the program as a wish to stop; the second ends it as ever.

    Outside the main thread, where Python takes no signals, nothing changes.

    Yields:
        Which signal has come.
    """
    came: list[str] = []
    before: dict[int, Any] = {}

    def take(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in before:
            signal.signal(number, take)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
