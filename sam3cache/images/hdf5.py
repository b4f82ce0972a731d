"""HDF5: datasets as pictures and masks, and as the columns of a manifest.

Links to other files, and data that lies in them, are refused: a data set may not reach for what it
was not handed out with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3cache.errors import QuotingError
from sam3cache.images.opened import kept_open
from sam3cache.images.picture import Picture, array_picture, names_stack

if TYPE_CHECKING:
    import h5py

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

MAX_CHUNK_BYTES = 1 << 30
"""Of a compressed dataset, a chunk has to be read as a whole."""

MAX_LISTED = 100_000
"""Datasets of a file beyond which its list is not gone through."""


def open_hdf5(path: Path, name: str, member: str, *, frame: int | None, is_mask: bool) -> Picture:
    """Open a dataset as a picture; without a name, the only one that there is.

    Raises:
        QuotingError: no such dataset.
        ImageError: none that is a picture.
    """
    file = kept_open(path, Hdf5File)
    is_stack = names_stack(member)
    if not member:
        names = [one for one, shape in file.shapes().items() if len(shape) >= 2]
        if len(names) != 1:
            some = ", ".join(names[:8]) or "none"
            raise QuotingError(
                f"{name}: holds the datasets {some}; say which one, as FILE.h5::NAME",
                f"{name}: holds not one dataset; say which one, as FILE.h5::NAME",
            )
        member = names[0]
    try:
        dataset = file.dataset(member)
    except LookupError as error:
        plain = f"{name}: no such dataset that can be used; mend the name behind ::"
        raise QuotingError(f"{name}: {error.args[0]}", plain) from None
    return array_picture(dataset, name, frame=frame, is_mask=is_mask, is_stack=is_stack)


class Hdf5File:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: when it is no HDF5, or damaged.
        """
        import h5py

        self._file: h5py.File = h5py.File(path, "r", locking=False)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # While Python ends h5py cannot close anything any more, and modules have lost their names.
        if hasattr(self, "_file") and not is_finalizing():
            self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the datasets by name, with their shapes, in the file's order.

        Raises:
            ValueError: when there are too many.
        """
        import h5py

        found: dict[str, tuple[int, ...]] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = tuple(item.shape or ())
                if len(found) > MAX_LISTED:
                    raise ValueError(f"more than {MAX_LISTED:,} datasets")

        self._file.visititems(visit)  # Follows no link.
        return found

    def dataset(self, name: str) -> h5py.Dataset:
        """Return a dataset, which stays on disk.

        Raises:
            LookupError: saying what is wrong with it.
        """
        import h5py

        group: Any = self._file
        for part in [part for part in name.split("/") if part]:
            link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
            if link is None:
                raise LookupError(f"no dataset {name!r}; it has {self._some()}")
            if not isinstance(link, h5py.HardLink):
                raise LookupError(f"{name!r} is a link; expected the dataset itself")
            group = group[part]
        if not isinstance(group, h5py.Dataset) or group.shape is None:
            raise LookupError(f"{name!r} is no dataset; it has {self._some()}")
        if group.external or group.is_virtual:
            raise LookupError(f"{name!r} lies in other files; put it into this one")
        if group.chunks and math.prod(group.chunks) * group.dtype.itemsize > MAX_CHUNK_BYTES:
            raise LookupError(
                f"{name!r} has chunks of {group.chunks}, more than {MAX_CHUNK_BYTES:,} bytes; "
                "write it with a chunk a picture"
            )
        return group

    def values(self, name: str, begin: int, end: int) -> Any:
        """Return some rows of a dataset, or its value if it has no axes."""
        dataset = self.dataset(name)
        return dataset[begin:end] if dataset.shape else dataset[()]

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes of a group that are one value."""
        attributes = self._file[name].attrs.items()
        return {key: value for key, value in attributes if getattr(value, "shape", ()) == ()}

    def _some(self) -> str:
        return ", ".join(list(self.shapes())[:8]) or "none"
