"""Damage files of every format and read them: no traceback, no hang, and memory within a bound.

Each kind of file is damaged and read in a process of its own, for a share of the time, so that a
decoder of somebody else's that crashes is seen as that process's end.

Exits with 1 when a bound is missed:

- no file ends a process, or raises anything but what says in one line what is wrong;
- no file takes longer than MAX_S to be read;
- no process takes, at any moment, more memory than MAX_BYTES above the most it took before. Not
  checked of HDF5: libhdf5 takes as much as a damaged heap of texts claims to be, before it finds
  that it is none. How much that was is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from reporting import Bound, Machine, Report

ROOT = Path(__file__).parents[1]
MAX_S = 20.0
MAX_BYTES = 2_000_000_000
SEED = 20_011
HDF5 = "a.h5"  # What kinds of it begin with.


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    if options.kind is not None:
        return fuzz(options.kind, options.seconds, options.seed)
    sys.path.insert(0, str(ROOT / "tests"))
    from damage import FILES

    machine = Machine("cpu")
    seconds = (20.0 if options.quick else options.seconds) / len(FILES)
    rows, found = [], {}
    for kind in FILES:
        command = [sys.executable, __file__, "--kind", kind, "--seconds", str(seconds)]
        command += ["--seed", str(options.seed)]
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + 60 + 2 * MAX_S
            )
            output, status = process.stdout, process.returncode
        except subprocess.TimeoutExpired:
            output, status = "", -1
        lines = output.strip().splitlines()
        one = json.loads(lines[-1]) if lines and status == 0 else {"num_files": 0, "bad": [output]}
        found[kind] = {"status": status, **one}
        rows.append(
            (
                kind,
                str(one["num_files"]),
                str(one.get("num_refused", "-")),
                f"{one.get('longest_s', float('nan')):.2f}",
                f"{one.get('grown_bytes', float('nan')) / 1e6:.0f}",
                "ended" if status else str(len(one["bad"])),
            )
        )
    num_bad = sum(one["status"] != 0 or len(one["bad"]) > 0 for one in found.values())
    longest_s = max(float(one.get("longest_s", MAX_S)) for one in found.values())
    grown = max(
        float(one.get("grown_bytes", 0)) for kind, one in found.items() if not kind.startswith(HDF5)
    )
    return Report(
        program="fuzz",
        columns=("file", "damaged", "refused", "longest, s", "memory, MB", "wrong"),
        rows=rows,
        notes=["What is not refused was read: damage that no checksum covers goes unseen."],
        bounds=[
            Bound("no kind of file raises or ends anything", float(num_bad), num_bad == 0),
            Bound(f"no file takes more than {MAX_S:.0f} s", longest_s, longest_s <= MAX_S),
            Bound(
                f"at most {MAX_BYTES / 1e9:.0f} GB more memory, HDF5 apart",
                grown / 1e9,
                grown <= MAX_BYTES,
            ),
        ],
        figures=found,
        settings={"seconds": options.seconds, "quick": options.quick, "seed": options.seed},
        machine=machine.fields(),
    ).publish(options.json)


def fuzz(kind: str, seconds: float, seed: int) -> int:
    """Damage one kind of file for some time, and print what happened as JSON."""
    sys.path.insert(0, str(ROOT / "tests"))
    from damage import FILES, damaged, peak_bytes, read_all

    num_files = num_refused = 0
    longest_s, bad = 0.0, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["SAM3CACHE_KEY_FILE"] = str(Path(folder) / "names.key")
        path = FILES[kind](Path(folder))
        data = path.read_bytes()
        read_all(path)
        before_bytes = peak_bytes()
        deadline_s = time.monotonic() + seconds
        for changed in damaged(data, seed):
            path.write_bytes(changed)
            begun_s = time.monotonic()
            try:
                problem = read_all(path)
            except Exception:  # noqa: BLE001 - exactly what is looked for
                problem = ""
                bad.append(traceback.format_exc()[-2000:])
            longest_s = max(longest_s, time.monotonic() - begun_s)
            num_files += 1
            num_refused += bool(problem)
            if "\n" in problem:
                bad.append(problem)
            if time.monotonic() > deadline_s or len(bad) >= 5:
                break
    result = {
        "num_files": num_files,
        "num_refused": num_refused,
        "longest_s": longest_s,
        "grown_bytes": peak_bytes() - before_bytes,
        "bad": bad,
    }
    print(json.dumps(result))
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="in all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--kind", help="of file, in this process alone")
    parser.add_argument("--quick", action="store_true", help="20 s of reading")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
