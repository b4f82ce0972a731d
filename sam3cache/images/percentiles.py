"""Exact percentiles of all values of a cine, which need not fit into memory.

Values become unsigned integers of the same order. They are counted by their highest sixteen bits,
then, among those that are alike so far, by the next: each time all frames are read once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3cache.errors import ImageError

_DIGIT_BITS = 16
_PART_VALUES = 1 << 17
"""Values that are counted at a time, so that a processor's cache holds them."""


def exact_percentiles(
    frames: Callable[[], Iterable[NDArray[Any]]],
    dtype: np.dtype[Any],
    permille: tuple[int, int],
    name: str,
) -> tuple[float, float]:
    """Return two percentiles: each the smallest value that so many do not exceed.

    Args:
        frames: begins to read all frames anew.
        dtype: of the frames, integers or floats.
        permille: which percentiles.
        name: what to call the file in messages.

    Raises:
        ImageError: of floats that are not finite.
    """
    native = dtype.newbyteorder("=") if dtype.itemsize <= 8 else np.dtype(np.float64)
    num_bits = 8 * native.itemsize
    found, ranks = [0, 0], [0, 0]
    for shift in range(max(0, num_bits - _DIGIT_BITS), -1, -_DIGIT_BITS):
        is_first = shift + _DIGIT_BITS >= num_bits
        counts = {leading: np.zeros(1 << _DIGIT_BITS, np.int64) for leading in found}
        for values in _parts(frames(), native):
            if is_first and native.kind == "f" and not np.isfinite(values).all():
                raise ImageError(f"{name}: holds values that are not finite; export it again")
            keys = _to_keys(values)
            for leading, counted in counts.items():
                alike = keys if is_first else keys[keys >> (shift + _DIGIT_BITS) == leading]
                digits = (alike >> shift).astype(np.int64) & ((1 << _DIGIT_BITS) - 1)
                counted += np.bincount(digits, minlength=counted.size)
        if is_first:
            num_values = int(counts[0].sum())
            ranks = [max(0, math.ceil(num_values * p / 1000) - 1) for p in permille]
        for end in range(2):
            up_to = counts[found[end]].cumsum()
            digit = int(np.searchsorted(up_to, ranks[end] + 1))
            ranks[end] -= int(up_to[digit - 1]) if digit else 0
            found[end] = found[end] << _DIGIT_BITS | digit
    low, high = (_of_key(key, native) for key in found)
    return low, high


def _parts(frames: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    for frame in frames:
        values = frame.ravel()
        for begin in range(0, values.size, _PART_VALUES):
            yield values[begin : begin + _PART_VALUES].astype(dtype, copy=False)


def _to_keys(values: NDArray[Any]) -> NDArray[Any]:
    """Return unsigned integers of as many bits, in the order of the values."""
    bits: NDArray[Any] = values.view(f"u{values.itemsize}")
    sign = bits.dtype.type(1 << (8 * values.itemsize - 1))
    keys = bits
    if values.dtype.kind == "i":
        keys = bits ^ sign
    elif values.dtype.kind == "f":
        keys = np.where(bits & sign, ~bits, bits ^ sign)  # Below zero, more bits mean less.
    return keys


def _of_key(key: int, dtype: np.dtype[Any]) -> float:
    """Return the value that has a key."""
    sign = 1 << (8 * dtype.itemsize - 1)
    if dtype.kind == "u":
        return float(key)
    if dtype.kind == "i":
        return float(key - sign)
    bits = key ^ sign if key & sign else 2 * sign - 1 - key
    return float(np.array(bits, f"u{dtype.itemsize}").view(dtype))
