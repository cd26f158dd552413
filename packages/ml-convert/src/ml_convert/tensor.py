"""A tensor in a file: where its bytes lie and what they mean.

Every checkpoint format is read into this one type, and no conversion needs more: unless a dtype is
changed, elements are opaque words. Tensors are contiguous and little-endian.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_convert.errors import ConversionError


class Dtype(NamedTuple):
    """A dtype and what the file formats call it."""

    name: str
    itemsize: int
    safetensors: str
    torch_storage: str


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, "F64", "DoubleStorage"),
        Dtype("float32", 4, "F32", "FloatStorage"),
        Dtype("float16", 2, "F16", "HalfStorage"),
        Dtype("bfloat16", 2, "BF16", "BFloat16Storage"),
        Dtype("int64", 8, "I64", "LongStorage"),
        Dtype("int32", 4, "I32", "IntStorage"),
        Dtype("int16", 2, "I16", "ShortStorage"),
        Dtype("int8", 1, "I8", "CharStorage"),
        Dtype("uint8", 1, "U8", "ByteStorage"),
        Dtype("bool", 1, "BOOL", "BoolStorage"),
    )
}


class Extent(NamedTuple):
    """A tensor's place in a file."""

    path: Path
    offset: int
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the content."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one index along dim 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


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
