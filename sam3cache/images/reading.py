"""A sample's pixels and masks, as extraction wants them: 8 bits, upright, one frame.

Shape legend: T frames, H height, W width, C channels (1 grey, 3 RGB), M planes of a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError, QuotingError
from sam3cache.images.classes import FOREGROUND, ClassTable
from sam3cache.images.files import open_picture
from sam3cache.images.percentiles import exact_percentiles
from sam3cache.images.picture import Picture, apply_window, find_once
from sam3cache.records import CONTRAST, IGNORE_LABEL, MEMBER_MARK, Sample
from sam3cache.variants import Variant

WINDOW_PERMILLE = (5, 995)
"""Beyond 8 bits, this share of a picture's or a cine's values is mapped to 0 and to 255."""

LOSSY_MASK_THRESHOLD = 128
"""JPEG blurs a mask of 0 and 255, so the middle decides."""

MAX_ASPECT_DIFFERENCE = 0.01
"""Share by which a mask's aspect ratio may differ from its image's."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the headers of a sample's files say.

    Attributes:
        height_px: height of the image, upright.
        width_px: width of the image, upright.
        num_channels: 1 for grey, 3 for RGB.
        mask_height_px: height of the mask's own grid, or None when there is no mask.
        mask_width_px: width of the mask's own grid, or None when there is no mask.
        size_bytes: size of the image's file.
        mtime_ns: when the image's file was last changed.
        orientation: the tag by which the image was turned upright; 1 when it was not.
        mask_orientation: the same for the mask, or None when there is no mask.
    """

    height_px: int
    width_px: int
    num_channels: int
    mask_height_px: int | None
    mask_width_px: int | None
    size_bytes: int
    mtime_ns: int
    orientation: int = 1
    mask_orientation: int | None = None


def probe(sample: Sample) -> ImageInfo:
    """Read the headers of a sample's files, and check all that they can tell.

    Raises:
        ImageError: a file that is missing, damaged or of no known format; a frame that the file
            lacks; a mask of another shape than the image.
    """
    with _open_image(sample) as picture:
        _frame_index(picture, sample.frame, sample.source)
        height_px, width_px = picture.height_px, picture.width_px
        num_channels, orientation = picture.num_channels, picture.orientation
    mask_height_px = mask_width_px = mask_orientation = None
    if sample.mask_path is not None:
        with _open_mask(sample) as mask:
            _mask_index(mask, sample)
            mask_height_px, mask_width_px = mask.height_px, mask.width_px
            mask_orientation = mask.orientation
            _check_aspect(sample, (height_px, width_px), mask, orientation)
    stat = sample.image_path.stat()
    return ImageInfo(
        height_px,
        width_px,
        num_channels,
        mask_height_px,
        mask_width_px,
        stat.st_size,
        stat.st_mtime_ns,
        orientation,
        mask_orientation,
    )


def read_image(sample: Sample) -> NDArray[np.uint8]:
    """Decode a sample's image, or its frame of a cine; of a variant, its changed view.

    8-bit pixels stay as they are. Of any other type, the 0.5 and 99.5 percentiles of the picture
    (all its channels) become 0 and 255; of a cine those of all frames, so that they share one
    window. A stack, whose rows are pictures of their own, is no cine.

    Returns:
        uint8 (H, W, 1) or (H, W, 3), upright, without alpha.

    Raises:
        ImageError: a file that is missing, damaged or of no known format; a frame that the file
            lacks; values that are not finite.
    """
    return read_image_and_type(sample)[0]


def read_image_and_type(sample: Sample) -> tuple[NDArray[np.uint8], np.dtype[Any]]:
    """Decode a sample's image as :func:`read_image` does; return also the type its file stores.

    Raises:
        ImageError: as there.
    """
    pixels_HWC, pixel_type = _read_as_it_is(sample)
    if sample.variant:
        pixels_HWC = Variant.parse(sample.variant).picture(pixels_HWC)
    return pixels_HWC, pixel_type


def _read_as_it_is(sample: Sample) -> tuple[NDArray[np.uint8], np.dtype[Any]]:
    with _open_image(sample) as picture:
        pixels_HWC = picture.read(_frame_index(picture, sample.frame, sample.source))
        pixel_type = pixels_HWC.dtype
        if pixel_type == np.uint8:
            return pixels_HWC, pixel_type
        if pixel_type == np.bool_:
            return pixels_HWC.astype(np.uint8) * 255, pixel_type
        if picture.to_8_bits is not None:
            return picture.to_8_bits(pixels_HWC), pixel_type
        if not picture.is_of_cine:
            window = exact_percentiles(
                lambda: [pixels_HWC], pixel_type, WINDOW_PERMILLE, sample.source
            )
        else:
            stat = sample.image_path.stat()
            window = _cine_window(
                sample.image_path,
                sample.image_member,
                sample.source,
                pixel_type,
                stat.st_size,
                stat.st_mtime_ns,
            )
    return apply_window(pixels_HWC, *window), pixel_type


def read_mask(
    sample: Sample, image_size_px: tuple[int, int] | None = None
) -> NDArray[np.uint8] | None:
    """Decode a sample's mask to 0 and 1, on its own grid.

    Foreground is: True; an integer above 0; a float of at least 0.5; in a JPEG, at least 128. Of a
    colour mask, any channel counts. Of a mask cine, the sample's own frame is taken.

    Args:
        sample: whose mask it is.
        image_size_px: height and width of its image; None: the image's file tells.

    Returns:
        uint8 (1, H, W) of 0 and 1, or None when the sample has no mask.

    Raises:
        ImageError: a file that is missing, damaged or of no known format; another aspect ratio
            than the image's; floats that are no probabilities.
    """
    if sample.mask_path is None:
        return None
    if image_size_px is None:
        with _open_image(sample) as picture:
            image_size_px = (picture.height_px, picture.width_px)
    with _open_mask(sample) as mask:
        _check_aspect(sample, image_size_px, mask)
        values_HWC = mask.read(_mask_index(mask, sample))
        return _foreground(values_HWC, mask, sample)[None]


def read_labels(
    files: Sequence[Sample | None], table: ClassTable, image_size_px: tuple[int, int]
) -> NDArray[np.uint8] | None:
    """Decode a sample's masks of several classes, on their own grid.

    Args:
        files: the sample with each of its masks in turn, None where it lacks one: of class numbers
            one file; of planes one file a class, or one with a plane a class (an ``.npy`` of
            M x H x W, a TIFF of M pages), each read as :func:`read_mask` does.
        table: the classes.
        image_size_px: height and width of the image.

    Returns:
        uint8 (M, H, W): class numbers 0 to C in one plane, or planes of 0 and 1; 255 is not to be
        counted, and fills the plane of a file that is lacking. None without any file.

    Raises:
        ImageError: as :func:`read_mask` does; numbers that the table lacks, or colours in place of
            numbers; planes that are not as many as the classes, or not of one size.
    """
    given = [sample for sample in files if sample is not None]
    if not given:
        return None
    if table.numbers is not None:
        return _read_numbers(given[0], table, image_size_px)
    if len(files) == 1 and (len(table.names) > 1 or _has_categories(given[0], table)):
        return _read_planes(given[0], table.names, image_size_px)
    planes = [None if sample is None else read_mask(sample, image_size_px) for sample in files]
    sizes = {f"{plane.shape[1]} x {plane.shape[2]}" for plane in planes if plane is not None}
    if len(sizes) > 1:
        raise ImageError(
            f"{', '.join(str(sample.mask) for sample in given)}: masks of {' and '.join(sizes)} "
            "pixels; expected one size for all masks of an image"
        )
    nothing = next(np.full_like(plane, IGNORE_LABEL) for plane in planes if plane is not None)
    return np.concatenate([nothing if plane is None else plane for plane in planes])


def _foreground(values_HWC: NDArray[Any], mask: Picture, sample: Sample) -> NDArray[np.uint8]:
    """Return 1 where a mask marks something, uint8 (H, W)."""
    if values_HWC.dtype.kind != "f":
        threshold = LOSSY_MASK_THRESHOLD if mask.is_lossy else 1
        foreground_HWC = np.greater_equal(values_HWC, threshold)
    elif np.isfinite(values_HWC).all() and values_HWC.min() >= 0:
        foreground_HWC = np.greater_equal(values_HWC, 0.5)
    else:
        raise ImageError(
            f"{sample.mask}: float mask with values below 0 or not finite; expected "
            "probabilities in [0, 1]; apply the sigmoid or the threshold first"
        )
    foreground_HW: NDArray[np.uint8] = foreground_HWC.any(axis=-1).astype(np.uint8)
    if mask.ignored is not None:
        foreground_HW[(values_HWC == mask.ignored).all(axis=-1)] = IGNORE_LABEL
    return foreground_HW


def _read_numbers(
    sample: Sample, table: ClassTable, image_size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return class numbers as the store has them, uint8 (1, H, W)."""
    with _open_mask(sample, as_numbers=True) as mask:
        _check_aspect(sample, image_size_px, mask)
        if mask.is_lossy:
            raise ImageError(f"{sample.mask}: JPEG blurs class numbers; save them as PNG or .npy")
        values_HWC = mask.read(_mask_index(mask, sample))
        if values_HWC.shape[-1] > 1 and (values_HWC != values_HWC[..., :1]).any():
            raise ImageError(
                f"{sample.mask}: colours; expected class numbers, as grey, indices of a palette or "
                "integers of an .npy"
            )
        values_HW = values_HWC[..., 0]
        if values_HW.dtype.kind == "f" and not np.array_equal(values_HW, np.rint(values_HW)):
            raise ImageError(f"{sample.mask}: fractions; expected class numbers")
        if (number := table.contradicts(mask.class_names)) is not None:
            raise ImageError(
                f"{sample.mask}: category {number} is {mask.class_names[number]!r}, which is not "
                "what the classes say; name them as this file does, or without numbers, as "
                f"{','.join(table.names)}"
            )
        mask_HW, unknown = table.renumber(values_HW)
        if unknown is not None:
            assert table.numbers is not None
            known = ", ".join(str(number) for number in sorted(table.numbers))
            raise ImageError(
                f"{sample.mask}: class number {unknown} ({int((values_HW == unknown).sum())} "
                f"pixels), which no class has; known are {known}; add it to the classes, as "
                f"NAME={unknown}, or background={unknown} if it is none (background=* takes all "
                "numbers that are not named)"
            )
    return mask_HW[None]


def _read_planes(
    sample: Sample, names: Sequence[str], image_size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return the planes of one file as 0 and 1, uint8 (M, H, W)."""
    assert sample.mask_path is not None
    assert sample.mask is not None
    with (
        _saying_line(sample),
        # As of a cine: three axes are never a still of three colours.
        open_picture(
            sample.mask_path,
            sample.mask,
            member=sample.mask_member,
            frame=0,
            is_mask=bool(sample.mask_member),
            as_planes=True,
        ) as mask,
    ):
        if mask.plane_names:
            _check_aspect(sample, image_size_px, mask)
            return _named_planes(sample, mask, names)
        if mask.num_frames != len(names):
            raise ImageError(
                f"{sample.mask}: {mask.num_frames or 1} planes of {mask.height_px} x "
                f"{mask.width_px}; expected {len(names)} ({', '.join(names)}), as an .npy of "
                f"{len(names)} x H x W, or a column of masks a class; if the file holds class "
                f"numbers, give each class its own, as {names[0]}=1,{names[1]}=2"
            )
        _check_aspect(sample, image_size_px, mask)
        return np.stack([_foreground(plane, mask, sample) for plane in mask.frames()])


def _has_categories(sample: Sample, table: ClassTable) -> bool:
    """Tell whether a mask is of a COCO file, of which one class may be wanted."""
    is_coco = sample.mask_path is not None and sample.mask_path.suffix.lower() == ".json"
    return is_coco and table != FOREGROUND


def _named_planes(sample: Sample, mask: Picture, names: Sequence[str]) -> NDArray[np.uint8]:
    """Return the planes that have these names, uint8 (M, H, W)."""
    unknown = [name for name in names if name not in mask.plane_names]
    if unknown:
        raise ImageError(
            f"{sample.mask}: no category {unknown[0]!r}; it has {', '.join(mask.plane_names)}"
        )
    planes = [mask.read(mask.plane_names.index(name)) for name in names]
    return np.stack([_foreground(plane, mask, sample) for plane in planes])


@contextmanager
def _saying_line(sample: Sample) -> Iterator[None]:
    """Begin errors with the place in the manifest, where its names are hidden."""
    try:
        yield
    except ImageError as error:
        if sample.line is None:
            raise
        text = error.plain if isinstance(error, QuotingError) else str(error)
        raise ImageError(f"{sample.line}: {text}") from None


@contextmanager
def _open_image(sample: Sample) -> Iterator[Picture]:
    with (
        _saying_line(sample),
        open_picture(
            sample.image_path, sample.source, member=sample.image_member, frame=sample.frame
        ) as picture,
    ):
        yield picture


@contextmanager
def _open_mask(sample: Sample, *, as_numbers: bool = False) -> Iterator[Picture]:
    assert sample.mask_path is not None
    assert sample.mask is not None
    with (
        _saying_line(sample),
        open_picture(
            sample.mask_path,
            sample.mask,
            member=sample.mask_member,
            frame=sample.frame,
            is_mask=True,
            as_numbers=as_numbers,
        ) as mask,
    ):
        yield mask


def _frame_index(picture: Picture, frame: int | None, name: str) -> int:
    """Check that the picture has this frame."""
    if picture.num_frames is None:
        if frame not in (None, 0):
            raise ImageError(f"{name}: frame {frame} of a still; leave its frame empty")
        return 0
    if frame is None:
        raise ImageError(
            f"{name}: a cine of {picture.num_frames} frames; say which frame in the "
            "manifest: a number from 0, or contrast for the one with the most contrast agent"
        )
    if not 0 <= frame < picture.num_frames:
        raise ImageError(
            f"{name}: no frame {frame}; it has 0 to {picture.num_frames - 1}; mend the manifest"
        )
    return frame


def _mask_index(mask: Picture, sample: Sample) -> int:
    """Return the mask's frame: a mask that is a still belongs to whichever frame is used."""
    frame = None if mask.num_frames is None else sample.frame
    return _frame_index(mask, frame, str(sample.mask))


def _check_aspect(
    sample: Sample, image: tuple[int, int], mask: Picture, orientation: int = 1
) -> None:
    """Refuse a mask that no resize of the image could have, but for one pixel's rounding."""
    size_px = (mask.height_px, mask.width_px)
    if _has_aspect(image, size_px):
        return
    is_on_its_side = (
        orientation >= 5 and mask.orientation == 1 and _has_aspect(image[::-1], size_px)
    )
    raise ImageError(
        f"{sample.mask}: mask of {size_px[0]} x {size_px[1]} for an image of {image[0]} x "
        f"{image[1]} (height x width); "
        + (
            f"the image was turned upright by its orientation tag ({orientation}), and the mask "
            "was not, which has none; save both as they are seen, without a tag"
            if is_on_its_side
            else "expected the same aspect ratio; check that it belongs to this image"
        )
    )


def _has_aspect(image: tuple[int, int], mask: tuple[int, int]) -> bool:
    expected_width = image[1] * mask[0] / image[0]
    expected_height = image[0] * mask[1] / image[1]
    return (
        abs(mask[1] / expected_width - 1) <= MAX_ASPECT_DIFFERENCE
        or abs(mask[1] - expected_width) <= 1
        or abs(mask[0] - expected_height) <= 1
    )


@find_once
def _cine_window(
    path: Path, member: str, name: str, dtype: np.dtype[Any], size_bytes: int, mtime_ns: int
) -> tuple[float, float]:
    """Window of a whole cine; once a file, since its samples usually follow one another."""
    del size_bytes, mtime_ns  # part of the cache's key: a changed file has a new window
    cine = member.removesuffix(CONTRAST).removesuffix(MEMBER_MARK)
    with open_picture(path, name, member=cine, frame=0) as picture:
        return exact_percentiles(picture.frames, dtype, WINDOW_PERMILLE, name)
