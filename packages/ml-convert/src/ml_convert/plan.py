"""The plan of a conversion: two checkpoints of one model, copied band by band.

A band is some rows of one parameter, about 3 MiB. It is read through the rectangles of one
checkpoint and written through those of the other, so every byte is read once and written once,
memory does not grow with the model, and bands can be done in any order by any number of threads.
Where one side is transposed, a band is a tile: long enough both ways for either side's lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ml_convert.errors import ConversionError
from ml_convert.files import Files
from ml_convert.layout import Layout, Rectangle, check_complete, matrix, steps
from ml_convert.tensor import Dtype, Extent
from ml_models.architecture import Architecture
from ml_models.weights import Parameter, parameters

BAND_BYTES = 3 << 20  # less takes more calls, more takes more memory for each thread
TILE_BYTES = 4 << 20
_TILE_ROWS = 2048
PARAMETERS_AT_ONCE = 32  # more than there are threads


class Update(Protocol):
    """A change of a parameter's elements on the way, such as what a LoRA adapter adds."""

    def apply(self, data: np.ndarray, band: Band, files: Files) -> None:
        """Change a band in place.

        Args:
            data: Bytes of shape (rows, row bytes).
            band: Which part of the parameter they are.
            files: To read what is added from.
        """


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a model in files."""

    layout: Layout
    """Which part of which parameter each stored tensor holds."""
    extents: Sequence[Extent]
    """Where each stored tensor lies, in the order of `layout.tensors`."""
    updates: Mapping[str, Update] = field(default_factory=dict)
    """What to change of parameters when they are read, by their names."""

    @cached_property
    def primary(self) -> Callable[[str], tuple[Rectangle, ...]]:
        """The rectangles that make up a parameter, by its name."""
        return lru_cache(PARAMETERS_AT_ONCE)(self.layout.primary)

    @cached_property
    def copies(self) -> Callable[[str], tuple[Rectangle, ...]]:
        """The rectangles that repeat parts of a parameter, by its name."""
        return lru_cache(PARAMETERS_AT_ONCE)(self.layout.copies)

    def is_transposed(self, parameter: str) -> bool:
        """Tell whether neighbours in a file are mostly neighbours in a column of a parameter."""
        found = self.layout.rectangles[parameter]
        if found[0].columns == 1 or all(rectangle.place is None for rectangle in found):
            return False
        places = (steps(r, self.layout.tensors[r.tensor].shape) for r in found)
        return any(place.row < place.column for place in places)

    @cached_property
    def dtypes(self) -> Mapping[str, Dtype]:
        """The dtype of each parameter.

        Raises:
            ConversionError: Parts of a parameter are stored in different dtypes.
        """
        found: dict[str, Dtype] = {}
        for name, rectangles in self.layout.rectangles.items():
            for index in dict.fromkeys(rectangle.tensor for rectangle in rectangles):
                extent = self.extents[index]
                dtype = found.setdefault(name, extent.dtype)
                if dtype != extent.dtype:
                    raise ConversionError(
                        f"{extent.path}: {self.layout.tensors[index].name} is "
                        f"{extent.dtype.name}, but another part of {name} is {dtype.name}"
                    )
        return found


class Band(NamedTuple):
    """Some rows of a parameter, or some columns of some rows."""

    parameter: str
    row: int
    rows: int
    columns: int
    column: int = 0


class Overlap(NamedTuple):
    """What a band and a rectangle have in common."""

    rectangle: Rectangle
    row: int
    """First row, in the parameter."""
    rows: int
    column: int
    """First column, in the parameter."""
    columns: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to copy. `plan` makes one after proving that it loses nothing."""

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
            height, width = self._size_of_bands(parameter.name, rows, columns)
            for column in range(0, columns, width):
                count = min(width, columns - column)
                for row in range(0, rows, height):
                    yield Band(parameter.name, row, min(height, rows - row), count, column)

    def _size_of_bands(self, parameter: str, rows: int, columns: int) -> tuple[int, int]:
        """Return how many rows and columns a band of a parameter has."""
        itemsize = self.source.dtypes[parameter].itemsize
        if any(side.is_transposed(parameter) for side in (self.source, self.target)):
            elements = TILE_BYTES // itemsize
            height = min(rows, _TILE_ROWS)
            width = max(1, min(columns, elements // height))
            return min(rows, elements // width), width
        width = min(columns, TILE_BYTES // itemsize)
        return max(1, BAND_BYTES // (width * itemsize)), width


def plan(
    arch: Architecture,
    source: Checkpoint,
    target: Checkpoint,
    table: tuple[Parameter, ...] | None = None,
) -> Plan:
    """Make a plan after proving that both sides store the whole model.

    Args:
        arch: The model.
        source: What to read.
        target: What to write.
        table: Parameters to copy, if they are not those of the model, but of an adapter.

    Raises:
        ConversionError: One of them does not.
    """
    table = table or parameters(arch)
    _check_floating_point(source)
    check_complete(source.layout, table)
    check_complete(target.layout, table)
    return Plan(table=table, source=source, target=target)


def _check_floating_point(source: Checkpoint) -> None:
    """Refuse integers, which are weights only together with scales that belong to no parameter."""
    for name, dtype in source.dtypes.items():
        if not dtype.is_floating_point:
            index = source.layout.rectangles[name][0].tensor
            raise ConversionError(
                f"{source.extents[index].path}: {source.layout.tensors[index].name} is "
                f"{dtype.name}, which no weight is; quantized weights are not understood: load "
                "them with the library that quantized them, dequantize and save them"
            )


def overlapping(rectangles: Sequence[Rectangle], band: Band) -> Iterator[Overlap]:
    """List what each of these rectangles of a parameter has in common with a band."""
    bottom, right = band.row + band.rows, band.column + band.columns
    for rectangle in rectangles:
        row, column = rectangle.parameter_row, rectangle.parameter_column
        top, left = max(band.row, row), max(band.column, column)
        rows = min(bottom, row + rectangle.rows) - top
        columns = min(right, column + rectangle.columns) - left
        if rows > 0 and columns > 0:
            yield Overlap(rectangle, top, rows, left, columns)
