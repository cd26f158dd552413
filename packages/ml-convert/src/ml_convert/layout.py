"""Where the parameters of a model lie in the tensors of a checkpoint, as rectangles.

Every format cuts the same parameters differently: Hugging Face keeps query, key and value apart,
Megatron gives each rank its rows or columns. Each is described by one list of rectangles between
its stored tensors and the parameters of the whole model (`ml_models.weights.parameters`). The list
reads both ways: from a checkpoint into parameters, or from parameters into a checkpoint. Converting
is reading through one list and writing through another; no pair of formats needs code of its own.

`check_complete` proves before any byte is copied that a list covers every element of every
parameter exactly once and every stored element but declared padding.

A tensor counts as a matrix of its dim 0 (rows) by all other dims (columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ml_convert.errors import ConversionError
from ml_models.weights import Parameter


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    file: str
    """Path of its file within the checkpoint."""
    name: str
    """Its name in that file."""
    shape: tuple[int, ...]
    """Its shape there."""
    parameter: str
    """The parameter of which it holds a part, or the first of them; all have the same dtype."""
    padding: int = 0
    """How many of its last rows belong to no parameter."""
    copy_of: int | None = None
    """Index of the stored tensor whose content it repeats."""


class Place(NamedTuple):
    """A matrix within a stored tensor that is not simply some of its rows.

    The tensor is looked at with another shape, in which one axis runs over the rows and one over
    the columns of the part of a parameter. Of every other axis the place takes one index: of a
    stack of experts one, of interleaved rows every second, of a transposed matrix the columns.
    """

    view: tuple[int, ...]
    """The shape to look at the stored tensor with."""
    start: tuple[int, ...]
    """First index along each axis."""
    row_axis: int
    column_axis: int


class Rectangle(NamedTuple):
    """Rows of a stored tensor (or another place in it), and the part of a parameter they hold."""

    tensor: int
    """Index of the stored tensor."""
    row: int
    """First row in the stored tensor; the rows are whole. 0 with a place."""
    parameter_row: int
    parameter_column: int
    rows: int
    columns: int
    place: Place | None = None
    """Where in the stored tensor, if these are not whole rows of it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint stores a model."""

    tensors: tuple[Stored, ...]
    """All stored tensors."""
    rectangles: Mapping[str, tuple[Rectangle, ...]]
    """What each parameter consists of, by its name; rectangles of copies included."""

    def primary(self, parameter: str) -> tuple[Rectangle, ...]:
        """List the rectangles of a parameter without those that repeat others, top to bottom."""
        found = (r for r in self.rectangles[parameter] if self.tensors[r.tensor].copy_of is None)
        return tuple(sorted(found, key=lambda r: (r.parameter_row, r.parameter_column)))

    def copies(self, parameter: str) -> tuple[Rectangle, ...]:
        """List the rectangles of a parameter that repeat others."""
        rectangles = self.rectangles[parameter]
        return tuple(r for r in rectangles if self.tensors[r.tensor].copy_of is not None)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Give the rows and columns a shape counts as."""
    return shape[0], math.prod(shape[1:])


def check_complete(layout: Layout, parameters: Iterable[Parameter]) -> None:
    """Prove that a layout stores each element of each parameter, once, and nothing else.

    Raises:
        ConversionError: Names the parameter or stored tensor with a gap or an overlap.
    """
    table = {parameter.name: parameter for parameter in parameters}
    if table.keys() != layout.rectangles.keys():
        odd = sorted(table.keys() ^ layout.rectangles.keys())
        raise ConversionError(f"{odd[0]} is not stored by the layout, or is no parameter")
    for name, parameter in table.items():
        _check_parameter(name, matrix(parameter.shape), layout.primary(name))
    by_tensor: dict[int, list[tuple[int, int]]] = {}
    for rectangles in layout.rectangles.values():
        for r in rectangles:
            if r.columns != matrix(layout.tensors[r.tensor].shape)[1]:
                raise ConversionError(f"{layout.tensors[r.tensor].name}: part of a row is unused")
            by_tensor.setdefault(r.tensor, []).append((r.row, r.rows))
    for index, stored in enumerate(layout.tensors):
        end = _end_of_runs(stored.name, by_tensor.get(index, []))
        if end != stored.shape[0] - stored.padding:
            raise ConversionError(f"{stored.name}: rows from {end} belong to no parameter")


def _check_parameter(name: str, shape: tuple[int, int], rectangles: Sequence[Rectangle]) -> None:
    """Check that strips of rows follow each other, each filled by rectangles side by side."""
    strips = []
    for strip, found in groupby(rectangles, key=lambda r: (r.parameter_row, r.rows)):
        columns = _end_of_runs(name, [(r.parameter_column, r.columns) for r in found])
        if columns != shape[1]:
            raise ConversionError(f"{name}: columns from {columns} of row {strip[0]} are missing")
        strips.append(strip)
    rows = _end_of_runs(name, strips)
    if rows != shape[0]:
        raise ConversionError(f"{name}: rows from {rows} are missing")


def _end_of_runs(name: str, runs: Iterable[tuple[int, int]]) -> int:
    """Return where runs (start, length) end; they must follow each other from 0 on."""
    end = 0
    for start, length in sorted(runs):
        if start != end:
            problem = "are missing" if start > end else "are there twice"
            raise ConversionError(
                f"{name}: indices {min(start, end)} to {max(start, end)} {problem}"
            )
        end += length
    return end
