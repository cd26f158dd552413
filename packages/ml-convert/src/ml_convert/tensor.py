"""A tensor in a file: where its bytes lie and what they mean.

Every checkpoint format is read into this one type, and no conversion needs more: unless a dtype is
changed, elements are opaque words. Tensors are contiguous and little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ml_convert.table import Table


class Dtype(NamedTuple):
    """A dtype and what the file formats call it."""

    name: str
    itemsize: int
    safetensors: str
    torch_storage: str

    @property
    def is_floating_point(self) -> bool:
        """Whether it is one of floating point numbers."""
        return "float" in self.name


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


ZEROS = Path("(zeros)")
"""Path of an extent that no file holds, as all of it is zeros."""


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


def extent_table(extents: Iterable[Extent] = ()) -> Table[Extent]:
    """Return a list of extents that takes little memory."""
    return Table(Extent, extents, numbers=("offset",))
