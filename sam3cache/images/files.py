"""One picture file of any format, as headers and raw frames.

The format is what the first bytes say, whatever the name says. A file is a still or a cine; frames
come out oriented, without alpha, palettes resolved, in the type that the file stores.

Shape legend: T frames, H height, W width, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from imagecodecs import png_decode
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sam3cache.errors import ImageError, QuotingError
from sam3cache.images.coco import open_coco_mask
from sam3cache.images.contrast import contrast_frame
from sam3cache.images.dicom import HEAD_BYTES, is_head, may_be_dicom, open_dicom
from sam3cache.images.hdf5 import HDF5_MAGIC, open_hdf5
from sam3cache.images.npz import ZIP_MAGIC, open_npz
from sam3cache.images.picture import (
    DECODER_ERRORS,
    MAX_PIXELS,
    SUFFIXES,
    Picture,
    array_picture,
    find_once,
    quietly,
    require_regular,
)
from sam3cache.records import CONTRAST, MEMBER_MARK

__all__ = ["MAX_PIXELS", "SUFFIXES", "Picture", "open_picture", "quietly"]

FORMATS = "PNG, JPEG, TIFF, BMP, .npy, .npz, HDF5 or DICOM"

PILLOW_FORMATS = ("PNG", "JPEG", "BMP")

_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # damage is ours to report, once


@contextmanager
def open_picture(
    path: Path,
    name: str,
    *,
    member: str = "",
    frame: int | None = None,
    is_mask: bool = False,
    as_numbers: bool = False,
    as_planes: bool = False,
) -> Iterator[Picture]:
    """Open a picture; whatever its decoder raises until it is closed becomes an ImageError.

    Args:
        path: where the file is.
        name: what to call it in messages, which must not show where it is.
        member: what is meant inside the file: a dataset of an HDF5 file, an array of an ``.npz``,
            an image's id in a COCO file; ``contrast`` is the frame with the most contrast agent,
            as a still. Empty: all that there is, if that is one thing.
        frame: index into a cine. It decides what a three-dimensional .npy is: with a frame
            (T, H, W), without one (H, W, 1) or (H, W, 3).
        is_mask: a three-dimensional .npy of a mask is (H, W, 1), (H, W, 3) or (1, H, W) whenever
            its shape allows it, since it may be a still although its image is a cine.
        as_numbers: whether pixels are numbers rather than brightness: of a palette its indices, of
            fewer than 8 bits what they say.
        as_planes: whether a COCO file's mask is wanted as a plane a category.

    Raises:
        ImageError: no such file, an unknown format, a damaged file, or no pixels in it.
    """
    wants_contrast = member == CONTRAST or member.endswith(MEMBER_MARK + CONTRAST)
    if wants_contrast:
        member = member.removesuffix(CONTRAST).removesuffix(MEMBER_MARK)
        frame = 0  # As of a cine.
    how = _How(member, frame, is_mask, as_numbers, as_planes)
    try:
        with _opened(path, name, how) as picture:
            if picture.height_px == 0 or picture.width_px == 0 or picture.num_frames == 0:
                raise ImageError(
                    f"{name}: no pixels ({picture.num_frames or 1} frame(s) of "
                    f"{picture.height_px} x {picture.width_px}); export it again"
                )
            if picture.height_px * picture.width_px > MAX_PIXELS:
                raise ImageError(
                    f"{name}: {picture.height_px} x {picture.width_px} pixels, more than "
                    f"{MAX_PIXELS:,}; shrink it first"
                )
            yield _of_contrast(picture, path, name, how) if wants_contrast else picture
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; mend its path or restore the file") from None
    except PermissionError:
        raise ImageError(f"{name}: may not be read; change its permissions") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        is_bomb = isinstance(error, Image.DecompressionBombError)
        detail = f"more than {MAX_PIXELS:,} pixels" if is_bomb else "not an image"
        raise ImageError(f"{name}: {detail}; expected {FORMATS} of a plausible size") from None
    except DECODER_ERRORS as error:
        text = (isinstance(error, OSError) and error.strerror) or str(error).replace(
            str(path), name
        )
        detail = " ".join(text.split())[:120]
        kind = type(error).__name__
        # Decoders quote names of files, and of what is in them.
        raise QuotingError(
            f"{name}: damaged or truncated ({detail or kind}); restore the file",
            f"{name}: damaged or truncated ({kind}); restore the file",
        ) from None


@dataclass(frozen=True, slots=True)
class _How:
    """How a file is to be understood; as for :func:`open_picture`."""

    member: str
    frame: int | None
    is_mask: bool
    as_numbers: bool
    as_planes: bool


@contextmanager
def _opened(path: Path, name: str, how: _How) -> Iterator[Picture]:
    require_regular(path, name)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ImageError(f"{name}: empty file; restore it")
    # First, as the preamble of DICOM may be the beginning of a TIFF.
    if is_head(head) and not how.member:
        if not how.is_mask and not may_be_dicom(path.name):
            raise ImageError(
                f"{name}: DICOM under the suffix of another format, so that nothing of its header "
                "was taken and its name is not hidden; let its name end in .dcm"
            )
        yield open_dicom(path, name)
    elif head.startswith(HDF5_MAGIC):
        yield open_hdf5(path, name, how.member, frame=how.frame, is_mask=how.is_mask)
    elif head.startswith(ZIP_MAGIC):
        yield open_npz(path, name, how.member, frame=how.frame, is_mask=how.is_mask)
    elif how.is_mask and how.member and path.suffix.lower() == ".json":
        yield open_coco_mask(
            path, name, how.member, as_numbers=how.as_numbers, as_planes=how.as_planes
        )
    elif how.member:
        raise QuotingError(
            f"{name}: has no parts with names; leave {MEMBER_MARK}{how.member} out",
            f"{name}: has no parts with names; leave what is behind {MEMBER_MARK} out",
        )
    elif head.startswith(b"\x93NUMPY"):
        yield _open_npy(path, name, how.frame, how.is_mask)
    elif head.startswith(_TIFF_MAGICS):
        with tifffile.TiffFile(path) as tiff:
            yield _open_tiff(tiff, name, path.stat().st_size, how.as_numbers)
    else:
        with quietly():
            image = Image.open(path, formats=PILLOW_FORMATS)
        with image:
            yield _open_pillow(image, path, head, how.as_numbers)


def _of_contrast(picture: Picture, path: Path, name: str, how: _How) -> Picture:
    """Return the frame with the most contrast agent, as a still; it is not looked for yet."""
    stat = path.stat()

    def read(index: int) -> NDArray[Any]:
        assert index == 0, index
        return picture.read(_contrast_frame(path, name, how, stat.st_size, stat.st_mtime_ns))

    if picture.num_frames is None:
        return picture
    return replace(picture, num_frames=None, read=read, is_one_of_cine=True)


@find_once
def _contrast_frame(path: Path, name: str, how: _How, size_bytes: int, mtime_ns: int) -> int:
    """Return the index of a cine's frame; found once, as it takes all of them."""
    del size_bytes, mtime_ns  # Part of the cache's key: a changed file has another.
    with _opened(path, name, how) as picture:
        return contrast_frame(picture.frames())


def _open_npy(path: Path, name: str, frame: int | None, is_mask: bool) -> Picture:
    with quietly():
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array_picture(array, name, frame=frame, is_mask=is_mask)


def _open_tiff(tiff: tifffile.TiffFile, name: str, size_bytes: int, as_numbers: bool) -> Picture:
    _require_end(tiff, name)
    series, page = tiff.series[0], tiff.series[0].keyframe
    photometric = _tag_name(page.photometric)
    if photometric not in ("MINISWHITE", "MINISBLACK", "RGB", "YCBCR", "PALETTE"):
        raise ImageError(f"{name}: TIFF in {photometric}; expected grey, RGB or palette")
    axes = page.axes
    if axes not in ("YX", "YXS", "SYX"):
        raise ImageError(f"{name}: TIFF with axes {axes}; expected height, width and samples")
    num_samples = 1 if axes == "YX" else page.shape[axes.index("S")]
    if num_samples > 4:
        raise ImageError(f"{name}: TIFF of {num_samples} channels; expected 1 to 4")
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or max(ends) > size_bytes:
        raise ImageError(f"{name}: damaged or truncated (pixels beyond the end); restore the file")

    orientation = _orientation(page.tags["Orientation"].value if "Orientation" in page.tags else 1)
    height_px, width_px = page.shape[axes.index("Y")], page.shape[axes.index("X")]
    palette = page.colormap if photometric == "PALETTE" and not as_numbers else None
    if palette is None:
        num_channels = 1 if num_samples < 3 else 3
    else:
        palette = (palette >> 8).astype(np.uint8).T
        num_channels = _palette_channels(palette)

    def read(index: int) -> NDArray[Any]:
        pixels = series.pages[index].asarray()
        if axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        if photometric == "MINISWHITE":
            pixels = ~pixels if pixels.dtype.kind in "bu" else -pixels
        if palette is not None:
            pixels = palette[pixels.astype(np.intp)]
        upright = _upright(_colour(pixels, num_channels), orientation)
        if upright.shape != (height_px, width_px, num_channels):
            raise ImageError(f"{name}: damaged (page {index} has another shape); restore the file")
        return upright

    if orientation >= 5:
        height_px, width_px = width_px, height_px
    return Picture(
        height_px,
        width_px,
        num_channels,
        len(series.pages) if len(series.pages) > 1 else None,
        is_lossy=_tag_name(page.compression) in ("OJPEG", "JPEG", "JPEG_LOSSY"),
        read=read,
        orientation=orientation,
    )


def _require_end(tiff: tifffile.TiffFile, name: str) -> None:
    """Refuse a file whose list of pages comes back to one of them: tifffile would follow it on."""
    form, file, seen = tiff.tiff, tiff.filehandle, set[int]()
    offset = tiff.pages.first.offset
    while 0 < offset < file.size:
        if offset in seen:
            raise ImageError(f"{name}: damaged (pages without end); restore the file")
        seen.add(offset)
        file.seek(offset)
        (num_tags,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
        file.seek(offset + form.tagnosize + num_tags * form.tagsize)
        next_page = file.read(form.offsetsize)
        offset = struct.unpack(form.offsetformat, next_page)[0] if next_page else 0


def _open_pillow(image: Image.Image, path: Path, head: bytes, as_numbers: bool) -> Picture:
    with quietly():
        orientation = _orientation(image.getexif().get(0x0112, 1))
    # Pillow cuts 16-bit colour to 8 bits. In a PNG, byte 24 is the depth and byte 25 the colours.
    is_png16 = image.format == "PNG" and head[24] == 16
    palette: NDArray[np.uint8] | None = None
    if is_png16:
        num_channels = 3 if head[25] & 2 else 1
    elif image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        num_channels = 1 if as_numbers else _palette_channels(palette)
    else:
        num_channels = 1 if image.mode in ("1", "L", "LA") else 3
    # Pillow spreads grey of fewer than 8 bits over 0 to 255.
    num_bits = 1 if image.mode == "1" else 8
    if image.format == "PNG" and head[25] == 0:
        num_bits = min(8, head[24])
    step = 255 // (2**num_bits - 1) if as_numbers else 1

    def read(index: int) -> NDArray[Any]:
        assert index == 0, index
        if is_png16:
            pixels = png_decode(path.read_bytes())
        elif palette is not None:
            indices = np.asarray(image)
            indices = indices if indices.ndim == 2 else indices[..., 0]
            colours = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
            pixels = indices if as_numbers else colours[indices]
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            pixels = np.array(image)
        else:
            pixels = np.array(image.convert("L" if num_channels == 1 else "RGB"))
        if step > 1:
            pixels = pixels // step
        return _upright(_colour(pixels, num_channels), orientation)

    width_px, height_px = image.size if orientation < 5 else image.size[::-1]
    is_lossy = image.format in ("JPEG", "MPO")
    return Picture(height_px, width_px, num_channels, None, is_lossy, read, orientation=orientation)


def _orientation(tag: Any) -> int:
    """Return an orientation tag's value; upright of one that TIFF does not define, such as 0."""
    return int(tag) if int(tag) in range(1, 9) else 1


def _tag_name(value: Any) -> str:
    """Return the name of a TIFF tag's value; one that TIFF does not define comes as a number."""
    return str(getattr(value, "name", value))


def _palette_channels(palette: NDArray[np.uint8]) -> int:
    """1 for a palette of greys, else 3."""
    return 1 if (palette == palette[:, :1]).all() else 3


def _colour(pixels: NDArray[Any], num_channels: int) -> NDArray[Any]:
    """(H, W) or (H, W, samples) → (H, W, num_channels): the leading samples, without alpha."""
    return (pixels[..., None] if pixels.ndim == 2 else pixels)[..., :num_channels]


def _upright(pixels_HWC: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo the TIFF and EXIF orientation tag (TIFF 6.0, section 8; 1 = upright)."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return np.ascontiguousarray(pixels_HWC)
