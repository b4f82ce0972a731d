"""Every kind of manifest: which reader takes a path, and what makes a table of it.

A new reader is a function from a path to a ``Table``, and a line in ``READERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from sam3cache.errors import ManifestError
from sam3cache.images.coco import coco_table, find_coco_files
from sam3cache.images.columns import read_setting
from sam3cache.images.dicom import (
    HEAD_BYTES,
    dicom_table,
    find_dicoms,
    is_called_dicom,
    is_dicom,
    is_head,
)
from sam3cache.images.hdf5 import HDF5_MAGIC, Hdf5File
from sam3cache.images.npz import ZIP_MAGIC, NpzFile
from sam3cache.images.picture import SUFFIXES
from sam3cache.images.stacks import container_table
from sam3cache.images.tables import Table, parquet_table, read_csv_rows

Reader = Callable[[Path, Path | None], AbstractContextManager[Table]]
"""Takes the path and a ``columns.toml`` or None; rows may be read while the context lasts."""

FOLDER = "folder"
"""The reader of folders of pictures; it needs no table, as names say what belongs together."""


@contextmanager
def csv_table(path: Path, columns: Path | None) -> Iterator[Table]:
    """Open a CSV.

    Raises:
        ManifestError: when it is none.
    """
    del columns
    # The reader of CSV splits lines itself, as a quoted cell may hold some.
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield read_csv_rows(file, path)


READERS: dict[str, Reader] = {
    "csv": csv_table,
    "parquet": parquet_table,
    "hdf5": partial(container_table, Hdf5File),
    "npz": partial(container_table, NpzFile),
    "coco": coco_table,
    "dicom": dicom_table,
}

_MAGICS = {HDF5_MAGIC: "hdf5", ZIP_MAGIC: "npz", b"PAR1": "parquet"}


def find_reader(path: Path, columns: Path | None) -> tuple[Path, str]:
    """Return what is to be read in a path's place, and the name of its reader.

    What a file is, its first bytes say, and what a folder is, what it holds; ``reader`` in the
    ``columns.toml`` goes before.

    Raises:
        ManifestError: an unknown reader, or a folder that may be meant in two ways.
    """
    wanted = read_setting(columns, "reader")
    if wanted is not None and wanted not in {*READERS, FOLDER}:
        raise ManifestError(
            f"{columns}: reader {wanted!r}; expected one of {', '.join([*READERS, FOLDER])}"
        )
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise ManifestError(f"{path}: is no file but a pipe, device or socket; name a file")
        return path, wanted or _of_file(path)
    for name in ("csv", "parquet"):
        table = path / f"manifest.{name}"
        if wanted in (None, name) and table.is_file():
            return table, name
    return path, wanted or _of_folder(path)


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return "csv"  # Whose reader says what is wrong.
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            return name
    if is_head(head) or is_called_dicom(path.name):
        return "dicom"
    return "coco" if path.suffix.lower() == ".json" else "csv"


def _of_folder(folder: Path) -> str:
    if find_coco_files(folder):
        return "coco"
    pictures = (folder / "images").rglob("*") if (folder / "images").is_dir() else folder.glob("*")
    has_pictures = any(path.suffix.lower() in SUFFIXES for path in pictures)
    # Beside pictures, one that is only called so does not count.
    has_dicoms = any(not has_pictures or is_dicom(path) for path in find_dicoms(folder))
    if has_pictures and has_dicoms:
        raise ManifestError(
            f'{folder}: holds pictures and DICOM files; say which are meant by reader = "{FOLDER}" '
            'or reader = "dicom" in a columns.toml'
        )
    return "dicom" if has_dicoms else FOLDER
