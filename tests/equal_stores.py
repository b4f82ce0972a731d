"""Whether two extractions came out the same."""

import filecmp
from pathlib import Path


def require_equal(store: Path, other: Path) -> None:
    """Compare all features and masks, byte for byte."""
    names = sorted(
        path.relative_to(other).as_posix()
        for part in ("levels", "labels")
        for path in (other / part).rglob("*")
        if path.is_file()
    )
    assert names
    assert filecmp.cmpfiles(other, store, names, shallow=False) == (names, [], [])
