"""The plan of a conversion: two checkpoints of one model, copied band by band.

A band is some rows of one parameter, about 1 MiB. It is read through the rectangles of one
checkpoint and written through those of the other, so every byte is read once and written once,
memory does not grow with the model, and bands can be done in any order by any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Rectangle, check_complete, matrix
from ml_convert.tensor import Dtype, Extent
from ml_models.architecture import Architecture
from ml_models.weights import Parameter, parameters

BAND_BYTES = 1 << 20  # stays in the cache between read, checksum and write: half the time of 4 MiB


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a model in files."""

    layout: Layout
    """Which part of which parameter each stored tensor holds."""
    extents: tuple[Extent, ...]
    """Where each stored tensor lies, in the order of `layout.tensors`."""

    @cached_property
    def primary(self) -> Mapping[str, tuple[Rectangle, ...]]:
        """The rectangles that make up each parameter."""
        return {name: self.layout.primary(name) for name in self.layout.rectangles}

    @cached_property
    def copies(self) -> Mapping[str, tuple[Rectangle, ...]]:
        """The rectangles that repeat parts of each parameter."""
        return {name: self.layout.copies(name) for name in self.layout.rectangles}

    @cached_property
    def dtypes(self) -> Mapping[str, Dtype]:
        """The dtype of each parameter.

        Raises:
            ConversionError: Parts of a parameter are stored in different dtypes.
        """
        found: dict[str, Dtype] = {}
        for stored, extent in zip(self.layout.tensors, self.extents, strict=True):
            dtype = found.setdefault(stored.parameter, extent.dtype)
            if dtype != extent.dtype:
                raise ConversionError(
                    f"{extent.path}: {stored.name} is {extent.dtype.name}, but another part of "
                    f"{stored.parameter} is {dtype.name}"
                )
        return found


class Band(NamedTuple):
    """Some rows of a parameter."""

    parameter: str
    row: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion that was proven to lose nothing."""

    table: tuple[Parameter, ...]
    """Every parameter of the model."""
    source: Checkpoint
    """What to read."""
    target: Checkpoint
    """What to write."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are read."""
        dtypes = self.source.dtypes
        return sum(dtypes[p.name].itemsize * math.prod(p.shape) for p in self.table)

    def bands(self) -> Iterator[Band]:
        """Cut every parameter into bands."""
        for parameter in self.table:
            rows, columns = matrix(parameter.shape)
            row_bytes = columns * self.source.dtypes[parameter.name].itemsize
            step = max(1, BAND_BYTES // row_bytes)
            for row in range(0, rows, step):
                yield Band(parameter.name, row, min(step, rows - row), columns)


def plan(arch: Architecture, source: Checkpoint, target: Checkpoint) -> Plan:
    """Make a plan after proving that both sides store the whole model.

    Raises:
        ConversionError: One of them does not.
    """
    table = parameters(arch)
    check_complete(source.layout, table)
    check_complete(target.layout, table)
    return Plan(table=table, source=source, target=target)


def overlapping(
    rectangles: Sequence[Rectangle], band: Band
) -> Iterator[tuple[Rectangle, int, int]]:
    """List the rectangles with rows of a band, and these rows: first and one past the last."""
    for rectangle in rectangles:
        start = max(band.row, rectangle.parameter_row)
        stop = min(band.row + band.rows, rectangle.parameter_row + rectangle.rows)
        if start < stop:
            yield rectangle, start, stop
