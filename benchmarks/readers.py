"""How fast pictures are read, by format, on two threads and without anything else.

A picture is opened, decoded and brought to 8 bits as an extraction does it. PNG pictures of 512 x
512 pixels; the others are frames of cines of 1016 x 1016 pixels, 8 bits in 8 or 12 in 16, asked for
one after the other as a manifest's rows do. They show a vessel on a noisy ground: what is without
noise compresses, and is decoded, faster than any angiogram.

Exits with 1 when a bound is missed:

- at least MIN_PNG_PER_S pictures a second of PNG;
- at least MIN_FRAMES_PER_S frames a second of .npy and HDF5, and of DICOM as angiography machines
  write it (USUAL); what the other transfer syntaxes cost is shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from reporting import Bound, Machine, Report, alternate, rate, significant

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from dicom_files import (  # noqa: E402 - from the tests' folder
    DEFLATED,
    EXPLICIT,
    LOSSLESS,
    LOSSY,
    RLE,
    angiogram,
    write_dicom,
)

from sam3cache.images import read_image, read_manifest  # noqa: E402
from sam3cache.images.pseudonyms import KEY_FILE_VARIABLE  # noqa: E402
from sam3cache.records import Sample  # noqa: E402

NUM_THREADS = 2
MIN_PNG_PER_S, MIN_FRAMES_PER_S = 50.0, 20.0
STILL_PX, CINE_PX = 512, 1016
USUAL = {EXPLICIT, RLE, *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 57, 70))}
"""Uncompressed, run lengths, JPEG baseline and lossless."""

NAMES = {
    EXPLICIT: "uncompressed",
    DEFLATED: "deflated",
    RLE: "RLE",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless, first order",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS, near lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "HTJ2K lossless",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    options = parse_options(arguments)
    machine = Machine("cpu")
    rounds, num_frames = (1, 4) if options.quick else (options.rounds, options.frames)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ[KEY_FILE_VARIABLE] = str(folder / "names.key")
        kinds = write_all(folder, num_frames, options.quick)
        with ThreadPoolExecutor(NUM_THREADS) as pool:

            def read(samples: Sequence[Sample]) -> None:
                for pixels in pool.map(read_image, samples):
                    assert pixels.dtype == np.uint8

            runs: dict[str, Callable[[], object]] = {
                kind: partial(read, samples) for kind, (samples, _) in kinds.items()
            }
            seconds = alternate(rounds, runs)
    rates = {kind: rate(seconds[kind], len(kinds[kind][0])) for kind in kinds}
    png = next(iter(rates))
    usual = [".npy, 12 bits", "HDF5, gzip"]
    usual += [k for k in rates if any(f", {NAMES[one]}, " in k for one in USUAL)]
    slowest = min(usual, key=rates.__getitem__)
    return Report(
        program="readers",
        columns=("file", "pictures", "MB a picture", "pictures/s"),
        rows=[
            (
                kind,
                str(len(samples)),
                significant(size_bytes / len(samples) / 1e6),
                significant(rates[kind]),
            )
            for kind, (samples, size_bytes) in kinds.items()
        ],
        notes=[f"On {NUM_THREADS} threads; files are in the system's cache."],
        bounds=[
            Bound(
                f"at least {MIN_PNG_PER_S:.0f} pictures/s of PNG",
                rates[png],
                rates[png] >= MIN_PNG_PER_S,
            ),
            Bound(
                f"at least {MIN_FRAMES_PER_S:.0f} frames/s, the slowest being {slowest}",
                rates[slowest],
                rates[slowest] >= MIN_FRAMES_PER_S,
            ),
        ],
        figures={"seconds": seconds, "pictures_per_s": rates},
        settings={"rounds": rounds, "frames": num_frames, "quick": options.quick},
        machine=machine.fields(),
    ).publish(options.json)


def write_all(
    folder: Path, num_frames: int, quick: bool
) -> dict[str, tuple[Sequence[Sample], int]]:
    """Write files of every kind; return their samples and the files' bytes, PNG first."""
    stills = angiogram(num_frames * 2, STILL_PX, 8)
    for index, still in enumerate(stills):
        Image.fromarray(still).save(folder / f"{index}.png")
    kinds = {
        f"PNG, {STILL_PX} x {STILL_PX}": (
            [Sample(str(i), f"{i}.png", folder) for i in range(len(stills))],
            sum(path.stat().st_size for path in folder.glob("*.png")),
        )
    }
    cines = {bits: angiogram(num_frames, CINE_PX, bits) for bits in (8, 12)}
    np.save(folder / "a.npy", cines[12])
    np.savez(folder / "a.npz", images=cines[12])
    np.savez_compressed(folder / "b.npz", images=cines[8])
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset(
            "images", data=cines[8], chunks=(1, CINE_PX, CINE_PX), compression="gzip"
        )
    for name, kind, member in (
        ("a.npy", ".npy, 12 bits", ""),
        ("a.npz", ".npz, 12 bits", "::images"),
        ("b.npz", ".npz, compressed", "::images"),
        ("a.h5", "HDF5, gzip", "::images"),
    ):
        kinds[kind] = _frames(folder / name, name + member, num_frames)
    for syntax, name in NAMES.items():
        for bits in (8, 12):
            # Baseline is of 8 bits; some of the others are enough for a look.
            is_left_out = (bits == 12 and syntax.endswith(".50")) or (
                bits == 8 and syntax.endswith(".51")
            )
            if is_left_out or (quick and bits == 8 and syntax not in LOSSY):
                continue
            path = folder / f"{syntax}-{bits}.dcm"
            write_dicom(
                path, cines[bits], bits=bits, syntax=syntax, WindowCenter=2048, WindowWidth=4096
            )
            kinds[f"DICOM, {name}, {bits} bits"] = _frames(path, path.name, num_frames)
    assert {*LOSSLESS, *LOSSY} <= set(NAMES)
    assert read_manifest(folder / "a.h5").samples
    return kinds


def _frames(path: Path, source: str, num_frames: int) -> tuple[list[Sample], int]:
    samples = [Sample(str(i), source, path.parent, frame=i) for i in range(num_frames)]
    return samples, path.stat().st_size


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--frames", type=int, default=16, help="of each cine; twice as many stills")
    parser.add_argument("--quick", action="store_true", help="one round of few frames")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
