"""Being told to stop, and stopping where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Stop = Callable[[], str | None]
"""Says what wants a training to stop, such as "SIGTERM"; None while nothing does."""

# Ctrl-C, what a batch system sends before it kills, and Ctrl-Break, Windows' own.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")


def never() -> None:
    """Want no stop."""
    return


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
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in before:
            signal.signal(number, take)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
