"""The values that cross module boundaries: plain, frozen, and free of behaviour.

Shape legend for tensor suffixes: B batch, C channels, H height, W width, K classes,
T side of the square target grid.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE_LABEL = 255
"""Mask value that neither loss nor metric counts."""

SPLITS = ("train", "val", "test")

CONTRAST = "contrast"
"""In place of a frame's index: the frame with the most contrast agent."""

MEMBER_MARK = "::"
_MEMBER = re.compile(r"(.+?\.(?:h5|hdf5|npz|json))::(.+)", re.IGNORECASE | re.DOTALL)


def split_member(name: str) -> tuple[str, str]:
    """Return the file of a name and what is meant inside it, empty for all of it.

    ``angio.h5::images`` is a dataset, ``train.json::12`` what a COCO file marks in the image of id
    12, ``cine.dcm::contrast`` a frame.
    """
    if MEMBER_MARK not in name:
        return name, ""
    if match := _MEMBER.fullmatch(name):
        return match[1], match[2]
    file = name.removesuffix(MEMBER_MARK + CONTRAST)
    return file, "" if file == name else CONTRAST


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a manifest, resolved: an image (or a frame of a cine) and what is known of it.

    Attributes:
        id: unique within the manifest.
        source: path of the image relative to ``root``, with forward slashes, and behind ``::`` what
            is meant inside that file (:func:`split_member`); or a name in place of what must not
            enter a store.
        root: folder that ``source`` and ``mask`` are relative to.
        frame: index into a cine, or None for a still.
        mask: path of the mask relative to ``root``, or None when there is none.
        primary_angle_deg: LAO positive, RAO negative, in [-180, 180]; None when unknown.
        secondary_angle_deg: cranial positive, caudal negative, in [-90, 90]; None when unknown.
        split: "train", "val" or "test".
        group: samples of one group (a patient) never fall into two splits.
        extra: every other column of the manifest, as text.
        image_location: where the image is when ``source`` is not its path; it never enters a store.
        mask_location: the same for the mask.
        line: of the manifest, as "line 3" or "file 3", to say in messages where names alone do not
            lead to a file.
        masks: of each column that was asked for in place of ``mask``, name and location as there;
            None where the cell is empty.
        variant: of which changed view of the image the pixels are, by its name in
            ``sam3cache.variants``; empty for the image itself.
        base_id: of a variant, the id of the sample that it is of.
    """

    id: str
    source: str
    root: Path
    frame: int | None = None
    mask: str | None = None
    primary_angle_deg: float | None = None
    secondary_angle_deg: float | None = None
    split: str = "train"
    group: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    image_location: Path | None = None
    mask_location: Path | None = None
    line: str | None = None
    masks: tuple[tuple[str, Path | None] | None, ...] = ()
    variant: str = ""
    base_id: str = ""

    @property
    def image_path(self) -> Path:
        """Absolute or working-directory-relative path of the image's file."""
        return _file_of(self.image_location or self.root / self.source)

    @property
    def image_member(self) -> str:
        """What is meant inside the image's file; empty for all of it."""
        return _member_of(self.image_location, self.source)

    @property
    def mask_path(self) -> Path | None:
        """Path of the mask's file, or None when there is none."""
        if self.mask is None:
            return None
        return _file_of(self.mask_location or self.root / self.mask)

    @property
    def mask_member(self) -> str:
        """What is meant inside the mask's file; empty for all of it."""
        return _member_of(self.mask_location, self.mask or "")

    def each_mask(self) -> tuple[Sample | None, ...]:
        """Return the sample with each of ``masks`` as its mask; with its own where there are none.

        None stands for a mask that it does not have.
        """
        files = self.masks or (None if self.mask is None else (self.mask, self.mask_location),)
        return tuple(
            None if file is None else replace(self, mask=file[0], mask_location=file[1], masks=())
            for file in files
        )


def _file_of(path: Path) -> Path:
    text = os.fspath(path)
    return path if MEMBER_MARK not in text else Path(split_member(text)[0])


def _member_of(location: Path | None, name: str) -> str:
    # A member is no path of this system: Windows would turn its slashes.
    return split_member(name if location is None else location.as_posix())[1]


@dataclass(frozen=True, slots=True)
class SetAside:
    """A sample that cannot be used, and why; it is listed and the run goes on."""

    id: str
    source: str
    reason: str

    @property
    def bare_reason(self) -> str:
        """The reason without the line that it may begin with, where that is the id already."""
        return self.reason.removeprefix(f"{self.id}: ")


@dataclass(frozen=True)
class Batch:
    """What a head sees, and in training what it is compared with.

    Attributes:
        levels: by level name, features (B, C, H, W) in float16, float32 or bfloat16, on the padded
            square; ``image_1008`` is uint8 (B, 1 or 3, 1008, 1008).
        angles_B2: float32, degrees, (primary, secondary); NaN where unknown.
        content_B2: int64, (height, width) in input pixels of the part that is picture rather than
            padding, at the top left of the 1008 px square.
        target_BKTT: uint8 masks on a square grid over the padded input, 0 / 1 / 255 = ignore
            (padding is ignored); None outside training.
        rows: the store's row numbers, in batch order; empty for images that are in no store.
    """

    levels: Mapping[str, torch.Tensor]
    angles_B2: torch.Tensor
    content_B2: torch.Tensor
    target_BKTT: torch.Tensor | None = None
    rows: tuple[int, ...] = ()
