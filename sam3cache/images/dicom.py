"""DICOM: pictures and cines of X-ray angiography, and what their headers say of them.

pydicom reads headers and lays frames out; imagecodecs decodes what is compressed. So no package
beyond pydicom is needed, and the same file gives the same pixels whatever else is installed.

Shape legend: H height, W width, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError, ManifestError
from sam3cache.images import dicom_codecs
from sam3cache.images.opened import kept_open
from sam3cache.images.picture import (
    CONTAINER_SUFFIXES,
    DECODER_ERRORS,
    MAX_PIXELS,
    Picture,
    apply_window,
    quietly,
    require_regular,
)
from sam3cache.images.picture import SUFFIXES as PICTURE_SUFFIXES
from sam3cache.images.tables import Table
from sam3cache.records import CONTRAST

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.pixels import Decoder

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
"""What names of DICOM files end in, or in anything else."""

_OTHER_SUFFIXES = PICTURE_SUFFIXES | CONTAINER_SUFFIXES

HEAD_BYTES = 132
"""PS3.10, 7.1: a preamble of 128 bytes, then four letters."""

MAX_INFLATED_BYTES = 1 << 30
"""Of a deflated file, which has to be inflated as a whole."""

_DEFLATED, _EXPLICIT = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.1"
_STILL_DEG = 1.0
"""How far angles of a run's frames may differ that is not rotational."""

_XRAY_CLASSES = "1.2.840.10008.5.1.4.1.1.12."
"""What SOP classes of angiography and fluoroscopy begin with, enhanced and biplane ones too."""

_CAPTURE_CLASS = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture, and with a dot behind, those of many frames."""

_LOSSY_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")

# All that is read of a header. Of whom it is, only what groups are made of.
_FACTS = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "Modality",
    "BurnedInAnnotation",
    "PatientID",
    "IssuerOfPatientID",
    "StudyInstanceUID",
    "PositionerPrimaryAngle",
    "PositionerSecondaryAngle",
    "PositionerMotion",
    "PositionerPrimaryAngleIncrement",
    "PositionerSecondaryAngleIncrement",
    "PositionerPositionSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ImagerPixelSpacing",
    "PixelSpacing",
    "PixelSpacingCalibrationType",
    "EstimatedRadiographicMagnificationFactor",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "NumberOfFrames",
    "Rows",
    "Columns",
)
_COLOURS = ("Red", "Green", "Blue")
_PICTURE = (
    *_FACTS,
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in _COLOURS),
    *(f"{colour}PaletteColorLookupTableData" for colour in _COLOURS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in _COLOURS),
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)

_PIXEL_KEYWORDS = {0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData", 0x0010: "PixelData"}

_PIXEL_VRS = (b"OB", b"OW", b"OF", b"OD", b"UN")

# What it complains of may quote whom a picture is of.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")


@dataclass(frozen=True)
class RunAngles:
    """One angle of a run's frames: as few numbers as the header has, whatever it claims of frames.

    Attributes:
        listed_deg: one of all frames, or one a frame; None when unknown.
        step_deg: what each frame adds to the one before, where the one that is listed is the first
            frame's; None when unknown.
    """

    listed_deg: tuple[float | None, ...]
    step_deg: float | None = 0.0

    def of_frame(self, frame: int | None, num_frames: int) -> float | None:
        """Return a frame's; None where they differ and the frame is not known."""
        first_deg = self.listed_deg[0]
        if len(self.listed_deg) == 1 and self.step_deg == 0:
            return first_deg
        if frame is None or not 0 <= frame < num_frames:
            return None
        if len(self.listed_deg) > 1:
            return self.listed_deg[frame] if frame < len(self.listed_deg) else None
        if frame == 0 or first_deg is None:
            return first_deg
        return None if self.step_deg is None else _turned(first_deg, self.step_deg * frame)


@dataclass(frozen=True)
class DicomFacts:
    r"""What a header says beside the pixels, as the cells of a manifest.

    Attributes:
        num_frames: 1 of a still.
        primary_angles: degrees, LAO positive.
        secondary_angles: degrees, cranial positive.
        spacing_mm: rows and columns in the plane of the patient, as ``0.2\0.2``; "" when unknown.
        spacing_from: what that comes from, in words.
        patient: what tells patients apart, "" where the header does not. Never to be kept but as a
            hash.
        is_xray: whether it is of angiography or fluoroscopy, or does not say of what it is.
        has_text: whether the header says that text which may name the patient is in the pixels.
    """

    num_frames: int
    primary_angles: RunAngles
    secondary_angles: RunAngles
    spacing_mm: str
    spacing_from: str
    patient: str
    is_xray: bool
    has_text: bool

    def angle(self, which: str, frame: int | None) -> str:
        """Return an angle of a frame; "" where they differ and the frame is not known."""
        angles = self.primary_angles if which == "primary_angle" else self.secondary_angles
        angle_deg = angles.of_frame(frame, self.num_frames)
        return "" if angle_deg is None else f"{angle_deg:g}"


def may_be_dicom(name: str) -> bool:
    """Tell by a file's name whether it is worth looking into: unless it is of another format."""
    return _suffix(name) not in _OTHER_SUFFIXES


def is_called_dicom(name: str) -> bool:
    """Tell by a file's name that it should be DICOM, whatever it holds."""
    return _suffix(name) in SUFFIXES


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a path object is slow


def is_head(head: bytes) -> bool:
    """Tell whether a DICOM file begins so; one without a preamble is not taken for one."""
    return head[128:HEAD_BYTES] == b"DICM"


def is_dicom(path: Path) -> bool:
    """Tell by a file's first bytes whether it is DICOM; False when it cannot be read."""
    try:
        if not path.is_file():
            return False  # A pipe has no first bytes, but lets whoever asks for them wait.
        with path.open("rb") as file:
            return is_head(file.read(HEAD_BYTES))
    except (OSError, ValueError):
        return False  # As of a name that no system allows.


def find_dicoms(folder: Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Find the DICOM files below a folder, in order; folders that are links are not followed.

    Files that are called DICOM are among them, whatever they hold.

    Args:
        folder: where to look.
        on_error: is told of each folder that cannot be read.
    """
    for parent, folders, names in os.walk(folder, onerror=on_error):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            is_left_out = name.upper() == "DICOMDIR" or name.startswith(".")
            if is_left_out or not may_be_dicom(name):
                continue
            if is_called_dicom(name) or is_dicom(path):
                yield path


@contextmanager
def dicom_table(path: Path, columns: Path | None) -> Iterator[Table]:
    """Find the X-ray angiograms of a folder of DICOM files, or take one file.

    Of a cine it is the frame with the most contrast agent, unless ``columns.toml`` says another.
    """
    del columns
    if not path.is_dir():
        yield _table_of(path, path.absolute().parent, [(1, path.absolute())], [])
        return
    root = path.absolute()
    notes: list[str] = []
    unread: list[OSError] = []

    def files() -> Iterator[tuple[int, Path]]:
        num_dicoms = 0
        for num_dicoms, file in enumerate(find_dicoms(root, unread.append), 1):
            yield num_dicoms, file
        if num_others := _count_files(root) - num_dicoms:
            notes.append(f"{num_others} files that are not DICOM were left out")
        if unread:
            notes.append(
                f"{len(unread)} folders could not be read and were left out with all that is in "
                f"them: {unread[0].strerror}"
            )

    yield _table_of(path, root, files(), notes, is_folder=True)


@contextmanager
def dicom_files_table(files: Sequence[tuple[int, Path]]) -> Iterator[Table]:
    """Take DICOM files of one folder or several, each with the number that messages call it by.

    Their paths are relative to the folder that all of them share, so that no two are called alike.
    """
    paths = [path.absolute() for _, path in files]
    try:
        root = Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # Drives of Windows have nothing in common.
        root = paths[0].parent
    numbers = [number for number, _ in files]
    yield _table_of(root, root, zip(numbers, paths, strict=True), [])


def _table_of(
    path: Path,
    root: Path,
    files: Iterable[tuple[int, Path]],
    notes: list[str],
    *,
    is_folder: bool = False,
) -> Table:
    """Return a table of DICOM files, a row each that has a picture.

    Of a folder only X-ray angiography is meant: studies also hold screens with doses and names.
    """

    def rows() -> Iterator[tuple[int, list[str]]]:
        num_rows = num_without = num_others = num_with_text = 0
        for number, file in files:
            num_frames = 1
            # What is wrong with a file is said where its row is understood.
            with suppress(ImageError):
                facts = read_facts(file, "")
                if facts is None:
                    num_without += 1
                    continue
                if is_folder and not facts.is_xray:
                    num_others += 1
                    continue
                num_with_text += facts.has_text
                num_frames = facts.num_frames
            num_rows += 1
            name = file.relative_to(root) if file.is_relative_to(root) else file
            yield number, [name.as_posix(), CONTRAST if num_frames > 1 else ""]
        if num_without:
            notes.append(f"{num_without} DICOM files without a picture were left out")
        if num_others:
            notes.append(
                f"{num_others} DICOM files that are no X-ray angiography (secondary captures, or "
                "of another modality) were left out: name them in a CSV if they are meant"
            )
        if num_with_text:
            notes.append(text_note(num_with_text))
        if not num_rows:
            raise ManifestError(f"no DICOM file with a picture to take; {'; '.join(notes)}")

    return Table(path, root, ("image", "frame"), rows(), unit="file", notes=notes)


def text_note(num_files: int) -> str:
    """Say how many files tell of text in their pixels."""
    return (
        f"{num_files} DICOM files say that text is burnt into their pixels (Burned In Annotation), "
        "which may name the patient and is stored with them: look at them"
    )


def _count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def read_facts(path: Path, name: str) -> DicomFacts | None:
    """Read what a header says beside the pixels; None of a file that holds no picture.

    Raises:
        ImageError: a header that cannot be read.
    """
    try:
        require_regular(path, name)
        file = path.open("rb")
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise ImageError(f"{name}: {reason}; mend its path or restore the file") from None
    with file, _saying_name(name), quietly():
        header, _, _ = _read_header(file, _FACTS)
        if "Rows" not in header or "Columns" not in header:
            _require_no_picture(header, file)
            return None
        spacing_mm, spacing_from = _spacing(header)
        num_frames = max(1, int(header.get("NumberOfFrames", 1) or 1))
        return DicomFacts(
            num_frames,
            _angles(header, "PositionerPrimaryAngle", num_frames),
            _angles(header, "PositionerSecondaryAngle", num_frames),
            spacing_mm,
            spacing_from,
            _patient(header),
            _is_xray(header),
            _text(header, "BurnedInAnnotation") == "YES",
        )


def _require_no_picture(header: Dataset, file: BinaryIO) -> None:
    """Refuse a header that ends before it comes to its picture, as a file does that was cut."""
    from pydicom.uid import UID

    # Values that are not wanted are skipped by their lengths, beyond the end of what was cut.
    is_cut = file.tell() > file.seek(0, io.SEEK_END)
    if is_cut or "Image Storage" in UID(_text(header, "SOPClassUID")).name:
        raise _Unusable("damaged or truncated DICOM (it ends before its picture); restore the file")


def _is_xray(header: Dataset) -> bool:
    """Tell whether a picture is of angiography or fluoroscopy, or does not say of what it is.

    A secondary capture is of any screen, and has the modality of what was seen there.
    """
    kind, modality = _text(header, "SOPClassUID"), _text(header, "Modality")
    if kind == _CAPTURE_CLASS or kind.startswith(f"{_CAPTURE_CLASS}."):
        return False
    return modality in ("", "XA", "RF") or kind.startswith(_XRAY_CLASSES)


def _text(header: Dataset, keyword: str) -> str:
    return str(header.get(keyword, "") or "").strip()


def _patient(header: Dataset) -> str:
    """Return what tells patients apart: their id and who gave it, else their study."""
    patient_id = _text(header, "PatientID")
    if not patient_id:
        return _text(header, "StudyInstanceUID")
    issuer = _text(header, "IssuerOfPatientID")
    return f"{issuer}\n{patient_id}" if issuer else patient_id


def _angles(header: Dataset, keyword: str, num_frames: int) -> RunAngles:
    """Return the angles of PS3.3, C.8.7.5, or of an enhanced XA (C.8.19.6.10): one, or one a frame.

    Where the positioner stood still, as far as angles are known to a degree, they are one.
    """
    first_deg = _known(header.get(keyword))
    listed_deg = [first_deg]
    if first_deg is None:
        per_frame = header.get("PerFrameFunctionalGroupsSequence") or ()
        positions = [_first(group, "PositionerPositionSequence") for group in per_frame]
        listed_deg = [_known(None if p is None else p.get(keyword)) for p in positions]
        if not listed_deg or listed_deg[0] is None:
            shared = _first(header, "SharedFunctionalGroupsSequence")
            position = _first(shared, "PositionerPositionSequence")
            listed_deg = [_known(None if position is None else position.get(keyword))]
    elif num_frames > 1 and _text(header, "PositionerMotion") == "DYNAMIC":
        # What is to be added for each frame (PS3.3, C.8.7.5.1.3).
        value = header.get(f"{keyword}Increment")
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        increments = [_known(one) for one in value] if is_list else [_known(value)]
        if len(increments) != num_frames:
            step_deg = increments[0] if len(increments) == 1 else None
            is_still = step_deg is not None and abs(step_deg) * (num_frames - 1) <= _STILL_DEG
            return RunAngles((first_deg,), 0.0 if is_still else step_deg)
        listed_deg = [None if more is None else _turned(first_deg, more) for more in increments]
    known_deg = [angle_deg for angle_deg in listed_deg if angle_deg is not None]
    if len(known_deg) == len(listed_deg) and max(known_deg) - min(known_deg) <= _STILL_DEG:
        listed_deg = listed_deg[:1]
    return RunAngles(tuple(listed_deg))


def _turned(angle_deg: float, more_deg: float) -> float:
    """Add to an angle; half a turn and more is counted from the other side."""
    total_deg = angle_deg + more_deg
    if not math.isfinite(total_deg) or abs(total_deg) <= 180:
        return total_deg
    return math.remainder(total_deg, 360)


def _known(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _spacing(header: Dataset) -> tuple[str, str]:
    """Return the size of a pixel in the patient's plane, and where it comes from.

    PS3.3, 10.7.1.1: a Pixel Spacing that is the detector's own has not been calibrated, unless the
    header says how.
    """
    calibrated, detector = _pair(header, "PixelSpacing"), _pair(header, "ImagerPixelSpacing")
    if calibrated and (calibrated != detector or header.get("PixelSpacingCalibrationType")):
        return "\\".join(f"{mm:.6g}" for mm in calibrated), "pixel spacing, as calibrated"
    magnification, source = _positive(header, "EstimatedRadiographicMagnificationFactor"), "stated"
    if magnification is None:
        far, near = (
            _positive(header, f"DistanceSourceTo{what}") for what in ("Detector", "Patient")
        )
        magnification = far / near if far and near else None
        source = "by the distances from the source"
    if detector is None or magnification is None:
        # That of the detector alone is too large by the magnification, which nobody knows.
        return "", ""
    text = "\\".join(f"{mm / magnification:.6g}" for mm in detector)
    return text, f"imager pixel spacing / magnification {source}"


def _positive(header: Dataset, keyword: str) -> float | None:
    value = header.get(keyword)
    number = math.nan if value in (None, "") else float(value)
    return number if math.isfinite(number) and number > 0 else None


def _pair(header: Dataset, keyword: str) -> list[float] | None:
    values = header.get(keyword)
    if values is None or isinstance(values, str) or len(values) != 2:
        return None
    pair = [float(value) for value in values]
    return pair if all(math.isfinite(mm) and mm > 0 for mm in pair) else None


def _first(header: Dataset | None, keyword: str) -> Dataset | None:
    """Return the first item of a sequence."""
    sequence = None if header is None else header.get(keyword)
    return sequence[0] if sequence else None


def _number(value: Any) -> float:
    """Return a value, or the first of several."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else math.nan
    return math.nan if value in (None, "") else float(value)


def _read_header(file: BinaryIO, keywords: tuple[str, ...]) -> tuple[Dataset, str, BinaryIO]:
    """Return a header, the transfer syntax, and the file as it stands before the pixels.

    Of a deflated file that is one in memory.
    """
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag
    from pydicom.uid import UID, AllTransferSyntaxes

    if not is_head(file.read(HEAD_BYTES)):
        raise _Unusable("not a DICOM file; restore it")
    meta = read_dataset(
        file, False, True, stop_when=lambda tag, vr, length: tag.group != 2, at_top_level=False
    )
    syntax = UID(str(meta.get("TransferSyntaxUID", "")))
    if syntax not in AllTransferSyntaxes:
        raise _Unusable("DICOM of an unknown transfer syntax; export it again")
    if syntax == _DEFLATED:
        with file:
            file = _inflate(file)
        syntax = UID(_EXPLICIT)
    tags = [Tag(tag_for_keyword(keyword) or 0) for keyword in keywords]
    header = read_dataset(
        file,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=lambda tag, vr, length: tag.group == 0x7FE0 and tag.element in _PIXEL_KEYWORDS,
        specific_tags=tags,
    )
    return header, str(syntax), file


def _inflate(file: BinaryIO) -> BinaryIO:
    """Inflate the rest of a file (PS3.5, A.5), but not without end."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(file.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise _Unusable(
            f"deflated DICOM of more than {MAX_INFLATED_BYTES:,} bytes; export it without that"
        )
    return io.BytesIO(data)


def open_dicom(path: Path, name: str) -> Picture:
    """Open a DICOM file as a picture, or as a cine of its frames.

    Raises:
        ImageError: when it is damaged, or of a kind that cannot be read.
    """
    with _saying_name(name):
        # One that is inflated as a whole takes up to MAX_INFLATED_BYTES.
        return kept_open(path, _DicomFile, lambda file: not file.is_inflated).picture(name)


@contextmanager
def _saying_name(name: str) -> Iterator[None]:
    """Say what is wrong, but not in the words of the decoders: they may quote whom it is of."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        yield
    except (ImageError, FileNotFoundError, PermissionError):
        raise
    except _Unusable as error:
        raise ImageError(f"{name}: {error}") from None
    except (
        *DECODER_ERRORS,
        AssertionError,
        BytesLengthException,
        InvalidDicomError,
        Warning,
    ) as error:
        raise ImageError(
            f"{name}: damaged or truncated DICOM ({type(error).__name__}); restore the file"
        ) from None


class _Unusable(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with a file, without its name."""


class _DicomFile:
    """An open file: its header is read, its pixels are not."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        try:
            with quietly():
                self._header, self._syntax, self._file = _read_header(self._file, _PICTURE)
                self.is_inflated = isinstance(self._file, io.BytesIO)
                self._options = self._read_options()
                self._looks = _Looks(self._header)
            self._decoder = self._find_decoder()
        except BaseException:
            self._file.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def picture(self, name: str) -> Picture:
        """Return the picture, which reads from the file as long as it is open."""
        height_px, width_px = self._options["rows"], self._options["columns"]
        num_frames = self._options["number_of_frames"]
        num_channels = self._looks.num_channels(self._options["samples_per_pixel"])

        def read(index: int) -> NDArray[Any]:
            with _saying_name(name):
                pixels = self._looks.apply(self._decode(index))
                return pixels.reshape(height_px, width_px, num_channels)

        return Picture(
            height_px,
            width_px,
            num_channels,
            num_frames if num_frames > 1 else None,
            is_lossy=self._syntax in _LOSSY_JPEG,
            read=read,
            to_8_bits=self._looks.window,
        )

    def _read_options(self) -> dict[str, Any]:
        """Return what pydicom's decoders must know; the file then stands at the pixels' value."""
        from pydicom.pixels import as_pixel_options
        from pydicom.uid import UID

        if "Rows" not in self._header or "Columns" not in self._header:
            raise _Unusable("DICOM without a picture; leave it out")
        options: dict[str, Any] = as_pixel_options(self._header)
        options["number_of_frames"] = max(1, int(options["number_of_frames"]))
        if options["rows"] * options["columns"] > MAX_PIXELS:
            raise _Unusable(
                f"{options['rows']} x {options['columns']} pixels, more than {MAX_PIXELS:,}; "
                "shrink it first"
            )
        syntax = UID(self._syntax)
        order = "<" if syntax.is_little_endian else ">"
        begin = self._file.read(8)
        if len(begin) < 8:
            raise _Unusable("DICOM without pixels; leave it out")
        group, element = struct.unpack(f"{order}HH", begin[:4])
        if group != 0x7FE0 or element not in _PIXEL_KEYWORDS:
            raise _Unusable("DICOM without pixels; leave it out")
        options["pixel_keyword"] = _PIXEL_KEYWORDS[element]
        options["pixel_vr"] = "OW"
        # Some write the whole header as explicit as the syntax demands, but for this.
        if begin[4:6] in _PIXEL_VRS:
            options["pixel_vr"] = begin[4:6].decode("ascii")
            self._file.read(4)
        options["transfer_syntax_uid"] = syntax
        self._begin = self._file.tell()
        return options

    def _find_decoder(self) -> Decoder:
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        if not UID(self._syntax).is_encapsulated:
            return get_decoder(self._syntax)
        if self._syntax not in dicom_codecs.SYNTAXES:
            known = UID(self._syntax).name
            raise _Unusable(
                f"DICOM in the transfer syntax {known}, which is not read; export it as JPEG 2000, "
                "JPEG-LS, RLE or without compression"
            )
        return dicom_codecs.decoder_of(self._syntax)

    def _decode(self, index: int) -> NDArray[Any]:
        """Return a frame, (H, W) or (H, W, 3), in RGB where it is in colours."""
        self._file.seek(self._begin)
        is_compressed = self._decoder.is_encapsulated
        pixels: NDArray[Any]
        pixels, _ = self._decoder.as_array(
            self._file,
            index=index,
            raw=False,
            decoding_plugin=dicom_codecs.PLUGIN if is_compressed else "",
            **self._options,
        )
        return pixels


class _Looks:
    """How stored values are to be shown: palettes, modality and windows."""

    def __init__(self, header: Dataset) -> None:
        self._header = header
        photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2"))
        self._is_palette = photometric == "PALETTE COLOR"
        self._is_bit = int(header.get("BitsAllocated", 8)) == 1
        # Of X-rays it leads back to intensity, and is not for display (PS3.17, FFF.2.3.1.3.4).
        is_xray = str(header.get("Modality", "") or "").strip() in ("XA", "RF")
        modality_table = None if is_xray else _first(header, "ModalityLUTSequence")
        self._has_modality_table = modality_table is not None
        self._slope = float(header.get("RescaleSlope", 1) or 1)
        self._intercept = float(header.get("RescaleIntercept", 0) or 0)
        if not (math.isfinite(self._slope) and math.isfinite(self._intercept)):
            raise _Unusable("DICOM whose rescale slope or intercept is not finite; correct it")
        bits, is_signed = int(header.get("BitsStored", 8)), header.get("PixelRepresentation") == 1
        # The sum of a value and its opposite, when black and white change places.
        self._top = -1 if is_signed else 2**bits - 1
        if modality_table is not None:
            self._top = 2 ** int(modality_table.LUTDescriptor[2]) - 1
        self._is_negative = photometric == "MONOCHROME1"
        has_negative_slope = self._slope < 0 and modality_table is None
        self._is_inverted = self._is_negative != has_negative_slope
        self._is_8_bit = bits == 8 and not is_signed and modality_table is None
        self.window = self._find_window() if photometric.startswith("MONOCHROME") else None

    def num_channels(self, num_samples: int) -> int:
        return 3 if num_samples > 1 or self._is_palette else 1

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn stored values into brightness, in the type that is stored."""
        if self._is_palette:
            from pydicom.pixels import apply_color_lut

            colours: NDArray[Any] = apply_color_lut(pixels, self._header)
            return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)
        if self._is_bit:
            return pixels.astype(bool)
        if self._has_modality_table:
            from pydicom.pixels import apply_modality_lut

            pixels = apply_modality_lut(pixels, self._header)
        pixels = self._opposite(pixels)
        return pixels.astype(np.uint8) if self._is_8_bit and pixels.dtype.kind in "iu" else pixels

    def _opposite(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Let black and white change places where they have to; twice, and nothing has changed."""
        if not self._is_inverted:
            return pixels
        if pixels.dtype.kind not in "iu":
            return -pixels
        return (self._top - pixels.astype(np.int64)).astype(pixels.dtype)

    def _modality(self, pixels: NDArray[Any]) -> NDArray[np.float64]:
        """Return what shown values are in the units that windows are in (PS3.3, C.11.1)."""
        return self._opposite(pixels) * self._slope + self._intercept

    def _find_window(self) -> Callable[[NDArray[Any]], NDArray[np.uint8]] | None:
        """Return the file's own way from brightness to 8 bits (PS3.3, C.11.2), if it has one."""
        shared = _first(self._header, "SharedFunctionalGroupsSequence")
        frame = _first(self._header, "PerFrameFunctionalGroupsSequence")
        groups = [_first(group, "FrameVOILUTSequence") for group in (frame, shared)]
        header = next(
            (g for g in (*groups, self._header) if g is not None and _has_window(g)), None
        )
        if self._has_modality_table or header is None:
            return None
        if item := _first(header, "VOILUTSequence"):
            return self._by_table(item)
        centre, width = _number(header.WindowCenter), _number(header.WindowWidth)
        if not (math.isfinite(centre) and math.isfinite(width) and width >= 1):
            return None
        kind = str(header.get("VOILUTFunction", "") or "LINEAR")
        low = centre - width / 2
        high = low + width
        if kind == "LINEAR":
            low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2

        def by_window(pixels: NDArray[Any]) -> NDArray[np.uint8]:
            values = self._modality(pixels)
            if kind == "SIGMOID":
                values = 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-500, 500)))
                shown = apply_window(values, 0, 1)
            else:
                shown = apply_window(values, low, high)
            return 255 - shown if self._is_negative else shown

        return by_window

    def _by_table(self, item: Dataset) -> Callable[[NDArray[Any]], NDArray[np.uint8]] | None:
        """Return the lookup of a VOI table; None of one that cannot be."""
        _, first, num_bits = (int(number) for number in item.LUTDescriptor)
        data = item.LUTData
        table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.array(data)
        if not 1 <= num_bits <= 16 or not table.size:
            return None

        def by_table(pixels: NDArray[Any]) -> NDArray[np.uint8]:
            places = np.rint(self._modality(pixels)).astype(np.int64) - first
            shown = apply_window(table[places.clip(0, table.size - 1)], 0, 2.0**num_bits - 1)
            return 255 - shown if self._is_negative else shown

        return by_table


def _has_window(header: Dataset) -> bool:
    return bool(header.get("VOILUTSequence")) or not (
        math.isnan(_number(header.get("WindowCenter")))
        or math.isnan(_number(header.get("WindowWidth")))
    )
