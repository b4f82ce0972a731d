"""Checking a manifest before anything is paid for: what would be set aside, and what would mislead.

:func:`check` looks at every sample once and returns what it found; :func:`write_page` shows it.
"""

from sam3cache.checking.check import CheckConfig, CheckResult, check
from sam3cache.checking.findings import EXIT_CODES, Case, Finding, Severity, count_by_severity
from sam3cache.checking.page import PAGE_FILE, write_page
from sam3cache.checking.shift import CommonShift, Shift, best_shift, common_shift

__all__ = [
    "EXIT_CODES",
    "PAGE_FILE",
    "Case",
    "CheckConfig",
    "CheckResult",
    "CommonShift",
    "Finding",
    "Severity",
    "Shift",
    "best_shift",
    "check",
    "common_shift",
    "count_by_severity",
    "write_page",
]
