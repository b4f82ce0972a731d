"""How long commands show that they are alive, on stderr.

On a terminal: a bar with the rate, the time left and any rows below it. Elsewhere (a log file, a
batch system): one plain line about every ten seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_INTERVAL_S = 10.0
RATE_WINDOW_S = 30.0


class Bar:
    """Counts items done towards a total; ``progress`` makes one."""

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        num_done: int,
        console: Console,
        clock_s: Callable[[], float],
    ) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._num_done = num_done
        self._console, self._clock_s = console, clock_s
        self._note = ""
        self._rows: tuple[tuple[str, str], ...] = ()
        self._history = deque([(clock_s(), num_done)])
        self._line_due_s = clock_s() + LINE_INTERVAL_S
        self._line_of: tuple[int, int, str] | None = None
        self.live = console.is_terminal and not console.is_dumb_terminal

    def update(self, num_items: int = 1, note: str | None = None) -> None:
        """Count ``num_items`` more as done; a note stays until the next one."""
        self._num_done += num_items
        if note is not None:
            self._note = note
        now_s = self._clock_s()
        self._history.append((now_s, self._num_done))
        # The oldest entry kept lies at or just beyond the window, so that the rate spans it.
        while len(self._history) > 2 and self._history[1][0] <= now_s - RATE_WINDOW_S:
            self._history.popleft()
        if not self.live and now_s >= self._line_due_s:
            self.write_line()

    def report(self, num_done: int, num_total: int, note: str | None = None) -> None:
        """Take absolute counts, as the callbacks of long functions give them, and a note."""
        self._total = num_total
        self.update(num_done - self._num_done, note)

    def rows(self, rows: Iterable[tuple[str, str]]) -> None:
        """Replace the rows under the bar, such as ("cuda:0", "31.2 GB, 98 % busy")."""
        self._rows = tuple(rows)

    def print(self, message: str) -> None:
        """Write a line of its own above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def write_line(self) -> None:
        """Write the present state as a plain line."""
        self._line_due_s = self._clock_s() + LINE_INTERVAL_S
        self._line_of = self._state()
        rows = "".join(f"; {name} {value}" for name, value in self._rows)
        self.print(f"{self._title}: {self._counts()}{rows}")

    def write_last_line(self) -> None:
        """Write the present state, unless the last line has said it."""
        if self._line_of != self._state():
            self.write_line()

    def _state(self) -> tuple[int, int, str]:
        return self._num_done, self._total, self._note

    def __rich__(self) -> RenderableType:
        """Draw the bar and its rows, for rich."""
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self._title),
            ProgressBar(total=max(self._total, 1), completed=self._num_done, width=30),
            Text(self._counts()),
        )
        if not self._rows:
            return line
        below = Table.grid(padding=(0, 2))
        for name, value in self._rows:
            below.add_row(Text(f"  {name}", style="dim"), Text(value))
        return Group(line, below)

    def _counts(self) -> str:
        parts = []
        if self._total or not self._note:
            parts.append(f"{self._num_done}/{self._total} {self._unit}")
        (start_s, start_count), (end_s, end_count) = self._history[0], self._history[-1]
        if end_s > start_s and end_count > start_count:
            rate = (end_count - start_count) / (end_s - start_s)
            parts.append(f"{rate:.3g} {self._unit}/s")
            if self._num_done < self._total:
                parts.append(f"{format_duration((self._total - self._num_done) / rate)} left")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)


@contextmanager
def progress(
    title: str,
    *,
    total: int = 0,
    unit: str = "items",
    num_done: int = 0,
    console: Console | None = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Show progress on stderr while the block runs, and one plain line once it has ended.

    Args:
        title: what is being done, such as "Extracting".
        total: how many items there are in all; may be left to ``Bar.report``.
        unit: what the items are, in the plural.
        num_done: items that an earlier run has done; they do not count into the rate.
        console: where to write; stderr unless a test says otherwise.
        clock_s: a clock that never goes back, in seconds.

    Yields:
        The bar, to be told of progress by ``update`` and ``rows``.
    """
    console = console or Console(stderr=True)
    bar = Bar(title, total, unit, num_done, console, clock_s)
    if bar.live:
        # transient: the bar gives way to the closing line, which a scrolled terminal keeps.
        with Live(bar, console=console, refresh_per_second=4, transient=True):
            yield bar
    else:
        yield bar
    bar.rows(())
    bar.write_last_line()


class Stages:
    """Shows work that goes through stages: one bar after the other, each from its first report."""

    def __init__(self, stack: ExitStack) -> None:
        """Begin without a bar; ``stack``, when left, ends the last one."""
        self._stack = stack
        self._title = ""
        self._bar: Bar | None = None

    def show(self, title: str, num_done: int, num_total: int, note: str | None = None) -> Bar:
        """Take absolute counts of images in the stage called ``title``, and return its bar.

        What is done at a stage's first report does not count into its rate.
        """
        if self._bar is None or title != self._title:
            self._stack.close()
            self._title = title
            self._bar = self._stack.enter_context(
                progress(title, total=num_total, unit="images", num_done=num_done)
            )
        self._bar.report(num_done, num_total, note)
        return self._bar


def format_duration(duration_s: float) -> str:
    """Write a duration as m:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
