import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from sam3cache.commands.progress import Bar, format_duration, progress


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def bar_in(
    output: io.StringIO, clock: Clock, *, terminal: bool = False, num_done: int = 0
) -> Iterator[Bar]:
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    with progress(
        "Extracting", total=100, unit="images", num_done=num_done, console=console, clock_s=clock
    ) as bar:
        yield bar


def test_a_log_file_gets_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock) as bar:
        for _ in range(25):
            clock.now_s += 1
            bar.update(4)
    assert output.getvalue().splitlines() == [
        "Extracting: 40/100 images, 4 images/s, 0:15 left",
        "Extracting: 80/100 images, 4 images/s, 0:05 left",
        "Extracting: 100/100 images, 4 images/s",
    ]


def test_the_rate_follows_the_last_half_minute() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock) as bar:
        bar.update(10)
        for _ in range(60):
            clock.now_s += 1
            bar.update(1)
    assert output.getvalue().splitlines()[-1] == "Extracting: 70/100 images, 1 images/s, 0:30 left"


def test_what_an_earlier_run_did_is_no_speed_of_this_one() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock, num_done=50) as bar:
        clock.now_s += 10
        bar.update(10, note="a.png")
    assert "60/100 images, 1 images/s, 0:40 left, a.png" in output.getvalue()


def test_counts_may_come_from_a_callback() -> None:
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, width=120)
    with progress("Drawing", unit="images", console=console, clock_s=clock) as bar:
        for num_done in (1, 2, 3):
            clock.now_s += 5
            bar.report(num_done, 3)
    assert output.getvalue().splitlines() == [
        "Drawing: 2/3 images, 0.2 images/s, 0:05 left",
        "Drawing: 3/3 images, 0.2 images/s",
    ]


def test_rows_stand_in_the_line_where_there_is_no_terminal() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock) as bar:
        bar.rows([("cuda:0", "31 GB"), ("cuda:1", "30 GB")])
        clock.now_s += 10
        bar.update()
    assert output.getvalue().splitlines()[0].endswith("left; cuda:0 31 GB; cuda:1 30 GB")


def test_a_terminal_shows_a_bar_with_rows_below_and_keeps_the_last_line() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock, terminal=True) as bar:
        bar.rows([("cuda:0", "31 GB")])
        clock.now_s += 1
        bar.update(50)
        bar.print("[b] a.png is set aside")
    drawn = output.getvalue()
    assert "━" in drawn
    assert "  cuda:0  31 GB" in drawn
    assert "[b] a.png is set aside" in drawn
    assert drawn.rstrip().endswith("Extracting: 50/100 images, 50 images/s, 0:01 left")


def test_a_failure_inside_leaves_no_closing_line() -> None:
    output, clock = io.StringIO(), Clock()
    with pytest.raises(ValueError, match="inside"), bar_in(output, clock):
        raise ValueError("inside")
    assert output.getvalue() == ""


@pytest.mark.parametrize(
    ("duration_s", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")]
)
def test_durations_read_as_a_clock(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


def test_a_line_has_the_note_of_its_own_counts() -> None:
    output, clock = io.StringIO(), Clock()
    with bar_in(output, clock) as bar:
        bar.report(20, 100, "epoch 1")
        clock.now_s += 10
        bar.report(44, 100, "epoch 3")
        assert output.getvalue().splitlines()[-1].startswith("Extracting: 44/100 images, ")
        assert output.getvalue().splitlines()[-1].endswith(", epoch 3")
