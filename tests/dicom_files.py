"""DICOM files of X-ray angiography, written by pydicom; frames are compressed by imagecodecs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import UID, XRayAngiographicImageStorage, generate_uid

IMPLICIT, EXPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
BIG_ENDIAN, RLE = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"
_J = "1.2.840.10008.1.2.4."

# By transfer syntax, how a frame of at most 16 bits is compressed.
LOSSLESS = {
    _J + "57": lambda frame, bits: imagecodecs.jpeg8_encode(
        frame, lossless=True, bitspersample=bits
    ),
    _J + "70": lambda frame, bits: imagecodecs.ljpeg_encode(frame, bitspersample=bits),
    _J + "80": lambda frame, bits: imagecodecs.jpegls_encode(frame),
    _J + "90": lambda frame, bits: imagecodecs.jpeg2k_encode(
        frame, level=0, codecformat="j2k", reversible=True
    ),
    _J + "201": lambda frame, bits: imagecodecs.htj2k_encode(frame),
}
LOSSY = {
    _J + "50": lambda frame, bits: imagecodecs.jpeg8_encode(frame, level=95),
    _J + "51": lambda frame, bits: imagecodecs.jpeg8_encode(frame, level=98, bitspersample=bits),
    _J + "81": lambda frame, bits: imagecodecs.jpegls_encode(frame, level=2),
    _J + "91": lambda frame, bits: imagecodecs.jpeg2k_encode(
        frame, level=40, codecformat="j2k", bitspersample=bits
    ),
}


def angiogram(num_frames: int, side_px: int, bits: int, *, fullest: int = 0) -> np.ndarray:
    """A cine (T, H, W) in which dark tubes fill, most in frame ``fullest``."""
    rng = np.random.default_rng(side_px + bits)
    row, column = np.mgrid[:side_px, :side_px] / side_px
    ground = 0.6 + 0.2 * np.sin(3 * row) * np.cos(2 * column)
    tube = np.exp(-(((column - 0.5 - 0.2 * np.sin(6 * row)) / 0.012) ** 2))
    frames = []
    for index in range(num_frames):
        filling = 1 / (1 + abs(index - fullest))
        noise = rng.normal(0, 0.01, ground.shape)
        frames.append((ground * (1 - 0.5 * filling * tube) + noise).clip(0, 1))
    top = 2**bits - 1
    return np.rint(np.stack(frames) * top).astype(np.uint8 if bits <= 8 else np.uint16)


def write_dicom(
    path: Path, pixels: np.ndarray, *, bits: int = 8, syntax: str = EXPLICIT, **tags: Any
) -> Path:
    """Write stored values (T, H, W), (H, W) or (H, W, 3) with more tags, as keywords; None: not."""
    is_colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    frames = pixels if pixels.ndim == 3 and not is_colour else pixels[None]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = XRayAngiographicImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = UID(syntax)
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality = "XA"
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in tags.items():
        if value is not None:
            setattr(dataset, keyword, value)
    encode = {**LOSSLESS, **LOSSY}.get(syntax)
    if encode is not None:
        dataset.PixelData = encapsulate([encode(np.ascontiguousarray(f), bits) for f in frames])
    elif syntax == RLE:
        encoder = get_encoder(RLE)
        dataset.PixelData = encapsulate(
            [
                encoder.encode(
                    np.ascontiguousarray(frame).tobytes(),
                    rows=dataset.Rows,
                    columns=dataset.Columns,
                    samples_per_pixel=dataset.SamplesPerPixel,
                    bits_allocated=dataset.BitsAllocated,
                    bits_stored=bits,
                    photometric_interpretation=dataset.PhotometricInterpretation,
                    pixel_representation=dataset.PixelRepresentation,
                    number_of_frames=1,
                    planar_configuration=0,
                )
                for frame in frames
            ]
        )
    elif UID(syntax).is_encapsulated:
        dataset.PixelData = encapsulate([b"what nobody can decode"])
    else:
        order = ">" if syntax == BIG_ENDIAN else "<"
        data = frames.astype(frames.dtype.newbyteorder(order)).tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if UID(syntax).is_encapsulated or pixels.itemsize == 1 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path
