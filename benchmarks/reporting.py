"""What the programs of this folder share: who else computed meanwhile, tables, bounds, results.

A program hands its findings over as a ``Report``; what it prints, what lies in ``results/`` and
what the README and docs/ say are the same strings.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import psutil
import torch

from sam3cache.runtime import cpu_name, device_memory, environment_fields, num_cpu_cores

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
"""Where regions of results stand."""

# From this share of the machine's processor time on, other programs are said to have computed too.
QUIET_SHARE = 0.05


@dataclass(frozen=True)
class Bound:
    """A claim that a program checks, and exits with 1 when it does not hold.

    Attributes:
        claim: in words, with its limit.
        value: as measured.
        holds: whether the claim is true of the value.
    """

    claim: str
    value: float
    holds: bool


@dataclass(frozen=True)
class Report:
    """What a program has measured.

    Attributes:
        program: its name: of its result files, and of its regions in the README and docs/.
        columns: headings of the table; the first is of what was measured.
        rows: cells, as many as headings.
        notes: sentences below the table.
        bounds: what was claimed and checked.
        figures: every measured number, by round, for other programs.
        settings: what was asked for.
        machine: where it ran.
        versions: of the packages that matter.
        date: when it ran, ISO 8601 to the minute.
    """

    program: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    bounds: Sequence[Bound]
    figures: Mapping[str, Any]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=environment_fields)
    date: str = field(default_factory=lambda: datetime.now().isoformat(timespec="minutes"))

    def publish(self, json_path: Path | None) -> int:
        """Print the table, write the result if wanted, and return the exit status.

        Args:
            json_path: a file, or an existing folder for a name of program, processor and date.
        """
        print(text_table(self.columns, self.rows))
        print("\n" + machine_line(asdict(self)))
        print("\n".join(self.notes))
        for bound in self.bounds:
            state = "holds" if bound.holds else "MISSED"
            print(f"{state}: {bound.claim} (measured {bound.value:.3g})")
        if json_path is not None:
            if json_path.is_dir():
                where = re.sub(r"[^a-z0-9]+", "-", str(self.machine["device_name"]).lower())
                json_path /= f"{self.program}-{where.strip('-')}-{self.date[:10]}.json"
            content = json.dumps(asdict(self), indent=2) + "\n"
            json_path.write_text(content, encoding="utf-8", newline="\n")
            print(f"Written: {json_path}")
        return 0 if all(bound.holds for bound in self.bounds) else 1


class Machine:
    """The machine a program runs on, and how much of it went to other programs meanwhile."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = self._now()

    def fields(self) -> dict[str, Any]:
        """Describe the machine; the share of others is counted since this object was made."""
        elapsed_s, busy_s, own_s = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        all_cores_s = elapsed_s * (psutil.cpu_count() or 1)
        return {
            "device": self._device,
            "device_name": device_memory(self._device).name,
            "cpu": cpu_name(),
            "num_cores": num_cpu_cores(),
            "num_threads": torch.get_num_threads(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.system(),
            "share_of_others": round(max(0.0, busy_s - own_s) / all_cores_s, 3),
        }

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return seconds: of the clock, of all processors at work, and of this process's."""
        times = psutil.cpu_times()._asdict()
        idle_s = times["idle"] + times.get("iowait", 0.0)
        # Time of virtual machines is counted among the users' already.
        guest_s = times.get("guest", 0.0) + times.get("guest_nice", 0.0)
        own = psutil.Process().cpu_times()
        # Those of processes that it has started count once these have ended.
        own_s = own.user + own.system + own.children_user + own.children_system
        return time.monotonic(), sum(times.values()) - idle_s - guest_s, own_s


def alternate(
    rounds: int, contestants: Mapping[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Time contestants in turn, A B A B …, so that what else happens strikes them alike.

    Returns:
        By contestant, its seconds in each round; a first round, to warm up, is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            started_s = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started_s)
    return seconds


def duration(seconds: float) -> str:
    """Say a duration as people do: 45 s, 12 min, 3.1 h, 5.2 days."""
    for unit_s, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def significant(value: float) -> str:
    """Write a number to two significant digits, without an exponent: 0.041, 8.3, 150."""
    return f"{float(f'{value:.2g}'):g}"


def rate(seconds: Sequence[float], num_images: int) -> float:
    """Return images a second, by the median of several timings of ``num_images``."""
    return num_images / median(seconds)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out for the terminal: the first column to the left, the others to the right."""
    lines = [[cell.replace("`", "") for cell in line] for line in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Lay a result out for a page."""
    columns, rows = result["columns"], result["rows"]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    table = ["| " + " | ".join(line) + " |" for line in (columns, rule, *rows)]
    return "\n".join([*table, "", machine_line(result), *result["notes"]])


def machine_line(result: Mapping[str, Any]) -> str:
    """Say where and when a result was measured, and whether the machine was its own."""
    machine, date = result["machine"], result["date"][:10]
    device = "" if machine["device"] == "cpu" else f"{machine['device_name']}, "
    line = (
        f"{device}{machine['cpu']}, {machine['num_cores']} cores ({machine['num_threads']} "
        f"threads), torch {result['versions']['torch']}, {date}."
    )
    if machine["share_of_others"] >= QUIET_SHARE:
        share = f"{machine['share_of_others']:.0%}"
        line += f" Other programs took {share} of the processor meanwhile: it is faster alone."
    return line


# Two-sided 95% points of Student's distribution, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def interval_text(
    values: Sequence[float],
    *,
    sign: bool = False,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Write Student's 95% interval of a mean, cut to what values can be; a dash for one value."""
    if len(values) < 2:
        return "–"
    half = _STUDENT[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    low, high = max(within[0], mean(values) - half), min(within[1], mean(values) + half)
    return f"{low:+z.3f} to {high:+z.3f}" if sign else f"{low:.3f} to {high:.3f}"


def newest_result(program: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return a program's latest result, None when it has none."""
    files = folder.glob(f"{program}-*.json")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    own = [result for result in results if result["program"] == program]
    return max(own, key=lambda result: str(result["date"]), default=None)


def with_results(page: str, folder: Path = RESULTS) -> str:
    """Return a page with every ``<!-- benchmark:NAME -->`` region as the results have it."""

    def region(match: re.Match[str]) -> str:
        result = newest_result(match["name"], folder)
        body = "" if result is None else markdown(result) + "\n"
        return f"<!-- benchmark:{match['name']} -->\n{body}<!-- /benchmark:{match['name']} -->"

    pattern = r"<!-- benchmark:(?P<name>[\w-]+) -->\n.*?<!-- /benchmark:(?P=name) -->"
    return re.sub(pattern, region, page, flags=re.DOTALL)


def measure_apart(program: str, kind: str, argument: str) -> dict[str, float]:
    """Have a program measure something in a process of its own, where nothing else takes memory.

    Args:
        program: path of the program, which takes ``--measure KIND ARGUMENT`` and prints JSON last.
        kind: of the measurement.
        argument: what to measure.
    """
    done = subprocess.run(
        [sys.executable, program, "--measure", kind, argument],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result
