"""Real files of every format, and damage done to them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import tifffile
from dicom_files import DEFLATED, EXPLICIT, LOSSLESS, LOSSY, RLE, angiogram, write_dicom
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask

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
    def write(folder: Path) -> Path:
        bits = 12 if syntax.endswith(".51") else 8
        return write_dicom(
            folder / "a.dcm",
            angiogram(3, 32, bits),
            bits=bits,
            syntax=syntax,
            PatientID="1",
            WindowCenter=[100, 5],
            WindowWidth=[200, 6],
            PositionerPrimaryAngle="30",
        )

    return write


def _hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("images", data=CINE, chunks=(1, 32, 32), compression="gzip")
        file["masks"], file["angles"], file["groups"] = (
            CINE > 9,
            [[1.0, 2.0]] * 3,
            [b"a", b"b", b"c"],
        )
    return folder / "a.h5"


def _npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=CINE, masks=CINE > 9, groups=np.arange(3))
    return folder / "a.npz"


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


def _tiff(folder: Path) -> Path:
    tifffile.imwrite(
        folder / "a.tif", CINE.astype(np.uint16), compression="zlib", photometric="minisblack"
    )
    return folder / "a.tif"


def _npy(folder: Path) -> Path:
    np.save(folder / "a.npy", CINE[0])
    return folder / "a.npy"


FILES: dict[str, Callable[[Path], Path]] = {
    **{name: _picture(name) for name in ("a.png", "a.jpg", "a.bmp")},
    "a.tif": _tiff,
    "a.npy": _npy,
    **{f"dicom {s}": _dicom(s) for s in (EXPLICIT, DEFLATED, RLE, *LOSSLESS, *LOSSY)},
    "a.h5": _hdf5,
    "a.npz": _npz,
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
        frame = "1" if path.suffix == ".tif" else ""
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
