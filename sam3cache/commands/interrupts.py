"""Being told to end: Ctrl-C, and what a batch system sends before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sam3cache.errors import StoppedError

# What a batch system sends at the end, SLURM's warning before it, and Windows' Ctrl-Break.
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGBREAK")


class SignalInterrupt(KeyboardInterrupt):
    """Another signal than Ctrl-C's has come, which is to end the program as that one does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and Ctrl-Break interrupt the ``with`` as Ctrl-C does.

    Outside the main thread, where Python takes no signals, nothing changes.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SignalInterrupt(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(interrupt: KeyboardInterrupt, what_now: str) -> StoppedError:
    """Return what ends the program, with the exit code that shells give to a signal.

    Args:
        interrupt: that has come.
        what_now: what is kept and how to go on.
    """
    number = interrupt.number if isinstance(interrupt, SignalInterrupt) else int(signal.SIGINT)
    name = signal.Signals(number).name
    if name in ("SIGINT", "SIGBREAK"):
        return StoppedError(f"interrupted; {what_now}")
    error = StoppedError(f"stopped by {name}; {what_now}")
    error.exit_code = 128 + number
    return error
