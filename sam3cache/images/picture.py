"""One open picture of any format, and what all formats share in making one.

Shape legend: T frames, H height, W width, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import stat
import struct
import threading
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy"})
"""What counts as a picture in a folder; a file named in a CSV may be called anything."""

CONTAINER_SUFFIXES = frozenset({".h5", ".hdf5", ".npz", ".json"})
"""Of files that hold many pictures or masks, of which one is named behind ``::``."""

MAX_PIXELS = 178_956_970
"""Pixels of one frame beyond which a file is taken for a decompression bomb; Pillow's own limit."""

# What the decoders raise on damaged bytes; found by damaging files (tests/images/test_files.py,
# tests/images/test_damaged_files.py).
DECODER_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    BufferError,
    AssertionError,  # of tifffile
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

P = ParamSpec("P")
T = TypeVar("T")

_NUM_FOUND = 1024

_warnings_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Picture:
    """An open file: what its header says, and how to read a frame of it.

    Attributes:
        height_px: height of a frame, upright.
        width_px: width of a frame, upright.
        num_channels: 1 or 3.
        num_frames: T of a cine, or None for a still.
        is_lossy: whether the pixels went through JPEG.
        read: the frame of an index (0 for a still) as (H, W, C), in the type that the file stores.
        to_8_bits: maps a frame to uint8 as the file itself says, or None where it says nothing.
        ignored: value of a mask's pixels that are not to be counted, or None.
        plane_names: what the frames are of, when they are a mask's planes with names.
        class_names: by number, of a mask of class numbers whose file names them.
        is_one_of_cine: whether a still is a frame of a cine.
        is_stack: whether the frames are pictures of their own, and no cine.
        orientation: the tag by which the file's pixels were turned upright; 1 when they were not.
    """

    height_px: int
    width_px: int
    num_channels: int
    num_frames: int | None
    is_lossy: bool
    read: Callable[[int], NDArray[Any]]
    to_8_bits: Callable[[NDArray[Any]], NDArray[np.uint8]] | None = None
    ignored: int | None = None
    plane_names: tuple[str, ...] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)
    is_one_of_cine: bool = False
    is_stack: bool = False
    orientation: int = 1

    @property
    def is_of_cine(self) -> bool:
        """Whether there are other frames, with which a window is shared."""
        return self.is_one_of_cine or (self.num_frames is not None and not self.is_stack)

    def frames(self) -> Iterator[NDArray[Any]]:
        """Read every frame in turn."""
        for index in range(self.num_frames or 1):
            yield self.read(index)


def require_regular(path: Path, name: str) -> None:
    """Refuse what is no regular file: opening a pipe waits for ever, and a device may never end.

    Args:
        path: what is about to be opened.
        name: what to call it in messages.

    Raises:
        OSError: when it is not there.
        ImageError: a folder, pipe, device or socket.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name}: is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{name}: is no file but a pipe, device or socket; name a file")


def find_once(find: Callable[P, T]) -> Callable[P, T]:
    """Remember what takes a whole file to find: threads that ask meanwhile wait for the first."""
    remembered = cast("Callable[P, T]", lru_cache(maxsize=_NUM_FOUND)(find))
    lock_of = lru_cache(maxsize=_NUM_FOUND)(lambda *_: threading.Lock())
    lock = threading.Lock()

    @wraps(find)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            own_lock = lock_of(*args)
        with own_lock:
            return remembered(*args, **kwargs)

    return found


def names_stack(member: str) -> bool:
    """Tell whether what is named in a container is a stack: a picture a row, each of its own.

    What lies in a group (``p1/cine``), and what is all of its file and need not be named, is a
    cine where it has several frames.
    """
    return bool(member) and "/" not in member.strip("/")


def array_picture(
    array: Any, name: str, *, frame: int | None, is_mask: bool, is_stack: bool = False
) -> Picture:
    """Return an array as a picture: H x W (x 1 or 3), or a cine T x H x W (x 1 or 3).

    Args:
        array: anything with ``shape`` and ``dtype`` that gives a part for an index or ``...``; it
            may lie on disk, as only the frame that is asked for is taken.
        name: what to call it in messages.
        frame: as for :func:`sam3cache.images.files.open_picture`.
        is_mask: likewise.
        is_stack: whether what would be frames of a cine are pictures of their own.

    Raises:
        ImageError: of no such shape or type.
    """
    shape = tuple(array.shape)
    if array.dtype.kind not in "buif":
        raise ImageError(f"{name}: pixels of type {array.dtype}; expected bool, integers or floats")
    may_be_still = is_mask or frame is None
    if len(shape) == 2:
        num_frames, frame_shape = None, (*shape, 1)
    elif len(shape) == 3 and shape[-1] in (1, 3) and may_be_still:
        num_frames, frame_shape = None, shape
    elif len(shape) == 3 and shape[0] == 1 and is_mask:
        num_frames, frame_shape = None, (*shape[1:], 1)
    elif len(shape) == 3:
        num_frames, frame_shape = shape[0], (*shape[1:], 1)
    elif len(shape) == 4 and shape[-1] in (1, 3):
        num_frames, frame_shape = shape[0], shape[1:]
    else:
        raise ImageError(f"{name}: array of shape {shape}; expected H x W (x 3) or T x H x W (x 3)")

    def read(index: int) -> NDArray[Any]:
        part = array[...] if num_frames is None else array[index]
        return np.array(part).reshape(frame_shape)  # out of a map: only this frame is read

    return Picture(*frame_shape, num_frames, is_lossy=False, read=read, is_stack=is_stack)


def apply_window(pixels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Map [low, high] to [0, 255] and clip; where both are one value, only more is white."""
    if high > low:
        scaled = (pixels.astype(np.float64) - low) / (high - low) * 255.0
    else:
        scaled = np.where(pixels > low, 255.0, 0.0)
    result: NDArray[np.uint8] = np.rint(scaled.clip(0.0, 255.0)).astype(np.uint8)
    return result


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the decoders' warnings (odd EXIF, large pictures, old headers) out of the output.

    Filters are global to the process, so threads take turns: keep what stands inside short.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
