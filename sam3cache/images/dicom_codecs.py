"""Decoding of DICOM's compressed frames by imagecodecs, as a plug-in of pydicom's decoders.

The plug-ins that pydicom comes with need packages of their own, one of them under the GPL, or
decode RLE byte by byte. Every decoder here writes into an array of the size that the header has
announced, so that a frame of another size is refused before it takes memory.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import Decoder, DecodeRunner

PLUGIN = "sam3cache"

_JPEG = {
    "1.2.840.10008.1.2.4.50",  # Baseline, 8 bits
    "1.2.840.10008.1.2.4.51",  # Extended, 8 or 12 bits
    "1.2.840.10008.1.2.4.57",  # Lossless
    "1.2.840.10008.1.2.4.70",  # Lossless, first-order prediction
}
_JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}
_JPEG_2000 = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
_HTJ2K = {
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
}
_RLE = {"1.2.840.10008.1.2.5"}

SYNTAXES = _JPEG | _JPEG_LS | _JPEG_2000 | _HTJ2K | _RLE
"""UIDs of the compressed transfer syntaxes that can be decoded."""

# What pydicom asks of a module with a plug-in: names by UID, and the function below.
DECODER_DEPENDENCIES = dict.fromkeys(SYNTAXES, ("imagecodecs",))

_SIZ = b"\xff\x4f\xff\x51"  # Where a JPEG 2000 codestream begins: SOC, then SIZ.


_JPEG_FRAMES = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF; those left out are none.


def is_available(uid: str) -> bool:
    """Tell pydicom that nothing is missing."""
    return uid in SYNTAXES


def decoder_of(uid: str) -> Decoder:
    """Return pydicom's decoder of a compressed transfer syntax, with the plug-in.

    Raises:
        NotImplementedError: of an unknown one.
    """
    from pydicom.pixels import get_decoder

    decoder = get_decoder(uid)
    if PLUGIN not in decoder.available_plugins:
        try:
            decoder.add_plugin(PLUGIN, (__name__, "decode_frame"))
        except ValueError:
            # Another thread was quicker.
            assert PLUGIN in decoder.available_plugins, uid
    return decoder


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """Decode one frame, for pydicom, which calls this.

    Raises:
        ValueError: when the frame is not of the size or type that the header has announced.
    """
    uid = runner.transfer_syntax
    num_samples = runner.samples_per_pixel
    shape: tuple[int, ...] = (runner.rows, runner.columns)
    if num_samples > 1:
        shape = (*shape, num_samples)
    if uid in _RLE:
        return _decode_rle(source, runner)
    # Decoders may take memory for what the frame says before they look at what is expected.
    find_size = _jpeg_size if uid in _JPEG | _JPEG_LS else _jpeg_2000_size
    if find_size(source) != shape[:2]:
        raise ValueError("a frame of another size than the header's")
    is_wide = runner.bits_stored > 8
    # A codestream may be of other bits, or signed otherwise, than the header says.
    for dtype in ("u2", "i2", "u1", "i1") if is_wide else ("u1", "i1", "u2", "i2"):
        pixels = np.empty(shape, dtype)
        try:
            _decode_into(pixels, source, uid, runner)
        except ValueError as error:
            if "dtype" in str(error):
                continue
            raise
        if num_samples > 1:
            runner.set_option("planar_configuration", 0)
        runner.set_option("bits_allocated", 8 * pixels.itemsize)
        return pixels.tobytes()
    raise ValueError(f"frame is not of {shape} with 8 or 16 bits")


def _decode_into(pixels: Any, source: bytes, uid: str, runner: DecodeRunner) -> None:
    if uid in _JPEG_LS:
        if not source.rstrip(b"\0").endswith(b"\xff\xd9"):
            # CharLS takes seconds to find that out.
            raise ValueError("a frame without its end")
        imagecodecs.jpegls_decode(source, out=pixels)
        return
    photometric = str(runner.photometric_interpretation)
    is_colour = pixels.ndim == 3
    if uid in _JPEG:
        if not is_colour:
            imagecodecs.jpeg8_decode(source, out=pixels)
        else:
            inside = "YCBCR" if photometric.startswith("YBR") else "RGB"
            imagecodecs.jpeg8_decode(source, colorspace=inside, outcolorspace="RGB", out=pixels)
            runner.set_option("photometric_interpretation", "RGB")
        return
    # imagecodecs has OpenJPEG read both kinds of JPEG 2000.
    imagecodecs.jpeg2k_decode(source, out=pixels)
    if is_colour and photometric in ("YBR_RCT", "YBR_ICT"):
        runner.set_option("photometric_interpretation", "RGB")


def _decode_rle(source: bytes, runner: DecodeRunner) -> bytes:
    """PS3.5, annex G: planes of bytes, those of a sample from the highest to the lowest."""
    num_bytes = runner.bits_allocated // 8
    planes = np.empty((runner.samples_per_pixel, num_bytes, runner.rows, runner.columns), np.uint8)
    num_segments, *offsets = struct.unpack("<16L", source[:64])
    if num_segments != planes.shape[0] * num_bytes:
        raise ValueError(f"{num_segments} segments; expected {planes.shape[0] * num_bytes}")
    ends = [*offsets[1:num_segments], len(source)]
    size = runner.rows * runner.columns
    for number, (begin, end) in enumerate(zip(offsets, ends, strict=False)):
        segment = imagecodecs.packbits_decode(source[begin:end], out=size)
        plane = np.frombuffer(segment, np.uint8)
        if plane.size < size:
            raise ValueError("a segment is too short")
        sample, byte = divmod(number, num_bytes)
        planes[sample, byte] = plane[:size].reshape(planes.shape[2:])
    # To pydicom: sample after sample, the lowest byte first.
    runner.set_option("planar_configuration", 1)
    order = planes[:, ::-1] if sys.byteorder == "little" else planes
    return np.ascontiguousarray(np.moveaxis(order, 1, -1)).tobytes()


def _jpeg_2000_size(source: bytes) -> tuple[int, int]:
    """Return height and width of a codestream (ISO/IEC 15444-1, A.5.1)."""
    begin = source.find(_SIZ)
    if begin < 0:
        raise ValueError("no JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4I", source, begin + 8)
    return bottom - top, right - left


def _jpeg_size(source: bytes) -> tuple[int, int]:
    """Return height and width of a frame (ISO/IEC 10918-1, B.2.2; 14495-1, C.2.2)."""
    place = 2
    while place + 9 <= len(source):
        mark, kind, length = struct.unpack_from(">BBH", source, place)
        if mark != 0xFF:
            break
        if kind in _JPEG_FRAMES:
            height_px, width_px = struct.unpack_from(">HH", source, place + 5)
            return height_px, width_px
        # A fill byte may stand before a marker; a start of image has no length.
        place += 1 if kind == 0xFF else 2 if kind == 0xD8 else 2 + length
    raise ValueError("no JPEG frame")
