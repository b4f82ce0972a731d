"""Real files of every format, and damage done to them."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pyarrow as pa
import tifffile
from dicom_files import DEFLATED, EXPLICIT, LOSSLESS, LOSSY, RLE, angiogram, write_dicom
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask
from pydicom.dataset import Dataset

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images import close_kept_files, probe, read_image, read_manifest, read_mask

CINE = angiogram(3, 32, 8, fullest=1)
HEADER_BYTES = 1500
"""Where most damage goes: what is said at the beginning decides how the rest is understood."""


def _picture(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        Image.fromarray(CINE[0]).save(folder / name)
        return folder / name

    return write


def _dicom(syntax: str) -> Callable[[Path], Path]:
    bits = 12 if syntax.endswith(".51") else 8
    return _dicom_with(
        bits, syntax, PatientID="1", WindowCenter=[100, 5], WindowWidth=[200, 6], **_VIEW
    )


def _dicom_with(bits: int, syntax: str = EXPLICIT, **tags: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pixels = angiogram(3, 32, bits, fullest=1)
        return write_dicom(folder / "a.dcm", pixels, bits=bits, syntax=syntax, **tags)

    return write


_VIEW = {"PositionerPrimaryAngle": "30", "PositionerSecondaryAngle": "-10"}


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _enhanced_groups() -> dict[str, Any]:
    return {
        "PerFrameFunctionalGroupsSequence": [
            _item(
                PositionerPositionSequence=[
                    _item(PositionerPrimaryAngle=angle, PositionerSecondaryAngle=-angle)
                ],
                FrameVOILUTSequence=[_item(WindowCenter=2000, WindowWidth=1500)],
            )
            for angle in (20, 40, 60)
        ]
    }


def _palette() -> dict[str, Any]:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = np.arange(256, dtype="<u2").tobytes()
    return tags


def _lookup() -> dict[str, Any]:
    item = _item(LUTDescriptor=[256, 0, 8], LUTData=list(range(256)))
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return {"VOILUTSequence": [item]}


DICOMS: dict[str, Callable[[Path], Path]] = {
    "rotational": _dicom_with(
        8,
        PositionerMotion="DYNAMIC",
        PositionerPrimaryAngleIncrement="1.5",
        PositionerSecondaryAngleIncrement=[0, 10, 20],
        **_VIEW,
    ),
    "enhanced": _dicom_with(12, **_enhanced_groups()),
    "palette": _dicom_with(8, **_palette()),
    "VOI LUT": _dicom_with(12, **_lookup()),
}


def _hdf5(images: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w") as file:
            file.create_dataset("images", data=images, chunks=(1, 32, 32), compression="gzip")
            file["masks"], file["angles"], file["groups"] = (
                CINE > 9,
                [[1.0, 2.0]] * 3,
                [b"a", b"b", b"c"],
            )
        return folder / "a.h5"

    return write


def _grouped_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        for name, frame in zip("pqr", CINE, strict=True):
            file[f"{name}/image"], file[f"{name}/mask"] = frame, frame > 9
            file[name].attrs["primary_angle"] = 12.5
    return folder / "a.h5"


def _npz(images: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "a.npz", images=images, masks=CINE > 9, groups=np.arange(3))
        return folder / "a.npz"

    return write


def _small_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", images=CINE, masks=CINE > 9, groups=np.arange(3))
    return folder / "a.npz"


def _coco(folder: Path) -> Path:
    Image.fromarray(CINE[0]).save(folder / "1.png")
    letters = coco_mask.encode(np.asfortranarray((CINE[0] > 150).astype(np.uint8)))
    letters["counts"] = letters["counts"].decode("ascii")
    document = {
        "images": [{"id": 1, "file_name": "1.png", "height": 32, "width": 32}],
        "categories": [{"id": 6, "name": "lad"}, {"id": 7, "name": "lcx"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 6, "segmentation": [[1, 1, 20, 1, 20, 9]]},
            {"id": 2, "image_id": 1, "category_id": 7, "segmentation": letters},
        ],
    }
    (folder / "a.json").write_text(json.dumps(document), encoding="utf-8")
    return folder / "a.json"


def _table(folder: Path, name: str) -> Path:
    np.save(folder / "x.npy", CINE)
    table = {"image": ["x.npy"] * 3, "frame": [0, 1, 2], "primary_angle": [1.5, -20.0, 3.0]}
    if name.endswith(".parquet"):
        parquet.write_table(pa.table(table), folder / name)
    else:
        rows = zip(*table.values(), strict=True)
        lines = [",".join(table), *(",".join(map(str, row)) for row in rows)]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def _tiff(pixels: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.tif"
        tifffile.imwrite(path, pixels, compression="zlib", photometric="minisblack")
        return path

    return write


def _npy(name: str, pixels: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / name, pixels)
        return folder / name

    return write


STILLS = ("a.png", "a.jpg", "a.bmp", "a.npy")
DEEP, FLOATS = CINE.astype(np.uint16) * 200, CINE.astype(np.float32) / 255

FILES: dict[str, Callable[[Path], Path]] = {
    **{name: _picture(name) for name in ("a.png", "a.jpg", "a.bmp")},
    "a.tif": _tiff(CINE.astype(np.uint16)),
    "a.tif of floats": _tiff(FLOATS),
    "a.npy": _npy("a.npy", CINE[0]),
    "a cine of 16 bits as .npy": _npy("cine.npy", DEEP),
    **{f"dicom {s}": _dicom(s) for s in (EXPLICIT, DEFLATED, RLE, *LOSSLESS, *LOSSY)},
    **{f"dicom, {kind}": write for kind, write in DICOMS.items()},
    "a.h5": _hdf5(CINE),
    "a.h5 of 16 bits": _hdf5(DEEP),
    "a.h5 with groups": _grouped_hdf5,
    "a.npz": _npz(CINE),
    "a.npz of floats": _npz(FLOATS),
    "a small .npz": _small_npz,
    "a.json": _coco,
    "a.csv": lambda folder: _table(folder, "a.csv"),
    "a.parquet": lambda folder: _table(folder, "a.parquet"),
}


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    """Yield the bytes with some changed, removed, doubled or cut off, without end."""
    random_ = random.Random(seed)
    while True:
        changed = bytearray(copy.copy(data))
        for _ in range(random_.randint(1, 4)):
            end = len(changed) if random_.random() < 0.3 else min(len(changed), HEADER_BYTES)
            place = random_.randrange(max(1, end))
            kind = random_.randrange(5)
            if kind == 0:
                changed[place : place + 1] = bytes([random_.randrange(256)])
            elif kind == 1:
                changed[place : place + 4] = random_.choice(
                    [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
                )
            elif kind == 2:
                del changed[place : place + random_.randint(1, 32)]
            elif kind == 3:
                changed[place:place] = changed[place : place + random_.randint(1, 32)]
            elif random_.random() < 0.3:
                del changed[place:]
        yield bytes(changed)


def read_all(path: Path) -> str:
    """Read a file as a manifest, or as the picture of one, with all that its samples name.

    Returns:
        What was wrong with it, in one line; "" when nothing was.
    """
    manifest_path = path
    if path.suffix in (".png", ".jpg", ".bmp", ".tif", ".npy"):
        manifest_path = path.with_name("m.csv")
        frame = "" if path.name in STILLS else "1"
        manifest_path.write_text(f"image,frame\n{path.name},{frame}\n", encoding="utf-8")
    problem = ""
    try:
        manifest = read_manifest(manifest_path)
    except ManifestError as error:
        return str(error)
    for aside in manifest.set_aside:
        problem = aside.reason
    for sample in manifest.samples[:8]:
        try:
            probe(sample)
            read_image(sample)
            read_mask(sample)
        except ImageError as error:
            problem = str(error)
    close_kept_files()
    return problem


def peak_bytes() -> int:
    """Return the most memory that this process has had, since it began or :func:`forget_peak`."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # What getrusage tells is at least the peak of the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Let the peak begin with what is held now, where the system can: not on Windows."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
