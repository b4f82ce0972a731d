"""What a check has found: kinds of findings, their cases, and how grave they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The gravest first: what makes figures untrue or leaves samples behind, what is likely to be a
mistake, and what is worth knowing."""

EXIT_CODES: dict[Severity, int] = {"error": 1, "warning": 3, "note": 0}
"""What the program ends with, by the gravest finding."""

_NUM_SAID = 3
"""Cases that a line has, and samples that a case names; the JSON has all cases and more samples."""

MAX_NAMED = 8
"""Samples of one case that are named: a group in two splits may have thousands."""


@dataclass(frozen=True, slots=True)
class Case:
    """One occurrence of a finding.

    Attributes:
        samples: ids of the samples it is of, at most ``MAX_NAMED``; none where it is of all.
        value: what was met.
    """

    samples: tuple[str, ...]
    value: str

    @property
    def names(self) -> str:
        """The samples in words: "a", "a and b", "a, b, c and others"."""
        named, others = self.samples[:_NUM_SAID], self.samples[_NUM_SAID:]
        *first, last = (*named, *(["others"] if others else [])) or ("",)
        return f"{', '.join(first)} and {last}" if first else last

    def __str__(self) -> str:
        """Name the samples, then the value."""
        return ": ".join(part for part in (self.names, self.value) if part)


@dataclass(frozen=True, slots=True)
class Finding:
    """All that is wrong in one way.

    Attributes:
        kind: a short name for scripts, such as "empty-mask".
        severity: how grave it is.
        title: what it is, in a few words.
        cases: each occurrence, in the manifest's order.
        expected: what should have been met.
        advice: what to do.
    """

    kind: str
    severity: Severity
    title: str
    cases: tuple[Case, ...]
    expected: str
    advice: str

    def __str__(self) -> str:
        """Write what was met as one line, and below it what was expected and what to do."""
        said = "; ".join(str(case) for case in self.cases[:_NUM_SAID])
        num_more = len(self.cases) - _NUM_SAID
        more = f"; and {num_more} more" if num_more > 0 else ""
        number = f" ({len(self.cases)})" if len(self.cases) > 1 else ""
        return (
            f"{self.severity}: {self.title}{number}: {said}{more}.\n"
            f"    Expected: {self.expected}.\n"
            f"    What to do: {self.advice}."
        )


def gravest_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity alone, and leave out those without a case."""
    return tuple(
        sorted((f for f in findings if f.cases), key=lambda f: SEVERITIES.index(f.severity))
    )


def count_by_severity(findings: Iterable[Finding]) -> dict[Severity, int]:
    """Return how many findings there are of each severity."""
    found = Counter(finding.severity for finding in findings)
    return {severity: found[severity] for severity in SEVERITIES}
