"""How a level's values become the bytes that are stored, and back: float16 or fewer bits.

A level's name says its precision after a dot: ``fpn_72`` is float16, ``fpn_72.int8`` the same level
in 8 bits. int8 and the rounded ones are made from the float16 values, bf16 from the tower's own.

Shape legend: C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ConfigError

Precision = Literal["float16", "bf16", "r7", "r5", "int8", "uint8"]

FEATURE_PRECISIONS: tuple[Precision, ...] = ("float16", "bf16", "r7", "int8", "r5")
"""What features may be stored in, the most exact for most weights first."""

MANTISSA_BITS: dict[Precision, int] = {"r7": 7, "r5": 5}
"""Of float16's 10 mantissa bits, how many the rounded precisions keep."""

_IN_WORDS: dict[Precision, str] = {
    "float16": "float16",
    "bf16": "bfloat16",
    "r7": "float16 rounded to 7 mantissa bits",
    "r5": "float16 rounded to 5 mantissa bits",
    "int8": "int8 with a scale a sample and channel",
    "uint8": "uint8",
}
_STORED_DTYPE: dict[Precision, str] = {"bf16": "uint16", "int8": "int8", "uint8": "uint8"}
_INT8_LIMIT = 127


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample of a level as it is stored.

    Attributes:
        data_CHW: of the level's stored dtype.
        scale_C: float32, what int8 values are multiplied with; None for other precisions.
    """

    data_CHW: NDArray[Any]
    scale_C: NDArray[np.float32] | None = None


def split_name(level: str) -> tuple[str, Precision]:
    """Return what a level is of, and its precision: ("fpn_72", "int8") for "fpn_72.int8".

    Raises:
        ConfigError: when the part after the dot is no precision.
    """
    base, dot, suffix = level.partition(".")
    if not dot:
        return base, "uint8" if base.startswith("image") else "float16"
    for precision in FEATURE_PRECISIONS[1:]:
        if suffix == precision and not base.startswith("image"):
            return base, precision
    raise ConfigError(
        f"level {level!r}: {suffix!r} is no precision that it can have; expected "
        f"{base} alone" + ("" if base.startswith("image") else f" (float16), or {choices(base)}")
    )


def choices(base: str) -> str:
    """Name the levels that a base may be stored as beside float16, for messages."""
    return ", ".join(f"{base}.{precision}" for precision in FEATURE_PRECISIONS[1:])


def in_words(precision: Precision) -> str:
    """Say what a precision is, as fingerprints record it."""
    return _IN_WORDS[precision]


def from_words(text: str) -> Precision:
    """Return the precision that :func:`in_words` has said; float16 for what it never says."""
    return next((name for name, words in _IN_WORDS.items() if words == text), "float16")


def stored_dtype(precision: Precision) -> str:
    """Return the dtype of the array on disk."""
    return _STORED_DTYPE.get(precision, "float16")


def encode(precision: Precision, value_CHW: NDArray[Any]) -> Encoded:
    """Turn values into what is stored.

    Args:
        precision: of the level.
        value_CHW: finite floats, or uint8 for pictures. bf16 keeps 8 significant bits of float32
            values; the others keep what float16 holds.

    Returns:
        int8 (C, H, W) ``round(value / scale)`` with ``scale = max |value| / 127`` a channel; for
        bf16 the upper half of float32's bits as uint16; for others float16 or uint8. Rounding is to
        nearest, ties to even.
    """
    if precision == "uint8":
        return Encoded(value_CHW)
    if precision == "bf16":
        return Encoded(_bfloat16_bits(np.ascontiguousarray(value_CHW, dtype=np.float32)))
    half_CHW = np.ascontiguousarray(value_CHW, dtype=np.float16)
    if precision == "int8":
        exact_CHW = half_CHW.astype(np.float32)
        scale_C = np.abs(exact_CHW).max(axis=(1, 2)) / np.float32(_INT8_LIMIT)
        divisor_C = np.where(scale_C > 0, scale_C, np.float32(1))
        data_CHW = np.rint(exact_CHW / divisor_C[:, None, None]).clip(-_INT8_LIMIT, _INT8_LIMIT)
        return Encoded(data_CHW.astype(np.int8), scale_C)
    if precision in MANTISSA_BITS:
        return Encoded(_rounded(half_CHW, MANTISSA_BITS[precision]))
    return Encoded(half_CHW)


def decode(
    precision: Precision, encoded: Encoded, out_CHW: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Turn what is stored into values.

    Args:
        precision: of the level.
        encoded: as stored.
        out_CHW: where to write, of :func:`value_dtype`; a new array unless given.

    Returns:
        (C, H, W): float16; float32 for bf16; uint8 for pictures.
    """
    if precision == "bf16":
        value_CHW = (encoded.data_CHW.astype(np.uint32) << 16).view(np.float32)
    elif precision == "int8":
        assert encoded.scale_C is not None
        value_CHW = encoded.data_CHW * encoded.scale_C[:, None, None]
    else:
        value_CHW = encoded.data_CHW
    if out_CHW is None:
        return value_CHW.astype(value_dtype(precision), copy=False)
    out_CHW[...] = value_CHW
    return out_CHW


def value_dtype(precision: Precision) -> str:
    """Return the dtype that values are read as."""
    return {"bf16": "float32", "uint8": "uint8"}.get(precision, "float16")


def _bfloat16_bits(value_CHW: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits_CHW = value_CHW.view(np.uint32)
    # Half of the last place that stays, less one where that place is even: ties go to even.
    bits_CHW = bits_CHW + np.uint32(0x7FFF) + ((bits_CHW >> 16) & np.uint32(1))
    return (bits_CHW >> 16).astype(np.uint16)


def _rounded(value_CHW: NDArray[np.float16], num_bits: int) -> NDArray[np.float16]:
    dropped = 10 - num_bits
    bits_CHW = value_CHW.view(np.uint16).astype(np.uint32)
    half = (1 << (dropped - 1)) - 1
    bits_CHW = bits_CHW + half + ((bits_CHW >> dropped) & 1)
    bits_CHW &= ~np.uint32((1 << dropped) - 1)
    rounded_CHW = bits_CHW.astype(np.uint16).view(np.float16)
    # Rounding up from the largest values would give infinity: those keep their own bits.
    return np.where(np.isfinite(rounded_CHW), rounded_CHW, _truncated(value_CHW, dropped))


def _truncated(value_CHW: NDArray[np.float16], dropped: int) -> NDArray[np.float16]:
    bits_CHW = value_CHW.view(np.uint16) & np.uint16(0xFFFF & ~((1 << dropped) - 1))
    return bits_CHW.view(np.float16)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a precision keeps of one sample's values.

    Attributes:
        relative_l2: L2 norm of the errors over that of the values.
        cosine_min: of the least alike position: cosine of its C values with those that are kept.
        cosine_mean: over all positions.
        overflows: whether a value is beyond what the precision can hold; the others are then NaN.
    """

    relative_l2: float
    cosine_min: float
    cosine_mean: float
    overflows: bool


def fidelity(precision: Precision, value_CHW: NDArray[np.float32]) -> Fidelity:
    """Compare what a precision keeps of some values with the values.

    Args:
        precision: of a level.
        value_CHW: finite float32.
    """
    if precision != "bf16" and np.abs(value_CHW).max() > np.finfo(np.float16).max:
        return Fidelity(np.nan, np.nan, np.nan, overflows=True)
    exact_CHW = value_CHW.astype(np.float64)
    kept_CHW = decode(precision, encode(precision, value_CHW)).astype(np.float64)
    norms_HW = np.linalg.norm(exact_CHW, axis=0) * np.linalg.norm(kept_CHW, axis=0)
    # Where there is nothing, nothing is lost.
    cosine_HW = np.where(
        norms_HW > 0, (exact_CHW * kept_CHW).sum(axis=0) / np.where(norms_HW > 0, norms_HW, 1), 1
    )
    norm = float(np.linalg.norm(exact_CHW))
    error = float(np.linalg.norm(exact_CHW - kept_CHW)) / norm if norm else 0.0
    return Fidelity(error, float(cosine_HW.min()), float(cosine_HW.mean()), overflows=False)
