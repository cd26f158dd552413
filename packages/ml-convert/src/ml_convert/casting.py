"""Converting floating point numbers between dtypes, with the rounding of torch."""

from __future__ import annotations

import numpy as np

from ml_convert.errors import ConversionError
from ml_convert.tensor import Dtype


def cast(data: np.ndarray, source: Dtype, target: Dtype) -> np.ndarray:
    """Convert floating point numbers, rounding once to nearest even, as torch does.

    Args:
        data: Bytes of shape (rows, row bytes).
        source: What they are.
        target: What to return, as bytes of shape (rows, row bytes).

    Raises:
        ConversionError: One of the dtypes is no floating point type, or a finite number is too
            large for the target.
    """
    if source == target:
        return data
    if not {source.name, target.name} <= {"float32", "float16", "bfloat16"}:
        raise ConversionError(f"{source.name} cannot be converted to {target.name}")
    numbers = _decode(data, source)
    with np.errstate(over="ignore"):
        found = _encode(numbers, target)
        lost = np.isfinite(numbers) & ~np.isfinite(_decode(found, target))
    if lost.any():
        raise ConversionError(f"{numbers[lost][0]:g} is too large for {target.name}")
    return found


def rounded(data: np.ndarray, converted: np.ndarray, source: Dtype, target: Dtype) -> int:
    """Count the elements that a conversion has changed.

    Args:
        data: Bytes of what was converted.
        converted: Bytes of what it was converted to.
        source: What `data` is.
        target: What `converted` is.
    """
    before, after = _decode(data, source), _decode(converted, target)
    return int(np.count_nonzero((before != after) & ~np.isnan(before)))


def _decode(data: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype.name == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.dtype(dtype.name))


def _encode(numbers: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype.name != "bfloat16":
        return numbers.astype(np.dtype(dtype.name)).view(np.uint8)
    words = numbers.astype(np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    quiet = (words >> 16) | 0x40  # a NaN stays one, whatever its low bits were
    found = np.where(np.isnan(numbers), quiet, rounded)
    return found.astype(np.uint16).view(np.uint8)
