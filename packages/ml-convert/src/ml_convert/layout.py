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
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np

from ml_convert.coverage import Box, check_cover
from ml_convert.errors import ConversionError
from ml_convert.table import Table
from ml_models.weights import Parameter

_AT_ONCE = 1024  # rectangles


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


class Rectangles(Mapping[str, tuple[Rectangle, ...]]):
    """The rectangles of each parameter by its name, as numbers: there are many.

    They are added first, in any order, and looked at later.
    """

    def __init__(self, found: Iterable[tuple[str, Rectangle]] = ()) -> None:
        """Add rectangles with the parameters they belong to."""
        self._parameters: dict[str, int] = {}
        self._numbers = array("q")  # of a rectangle: number of its parameter, then its fields
        self._places: dict[int, Place] = {}
        self._order: np.ndarray | None = None
        self._starts: np.ndarray | None = None
        for parameter, rectangle in found:
            self.add(parameter, rectangle)

    def add(self, parameter: str, rectangle: Rectangle) -> None:
        """Add one more of a parameter."""
        assert self._order is None
        *numbers, place = rectangle
        if place is not None:
            self._places[len(self._numbers) // len(rectangle)] = place
        self._numbers.append(self._parameters.setdefault(parameter, len(self._parameters)))
        self._numbers.extend(numbers)

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._parameters

    def __getitem__(self, parameter: str) -> tuple[Rectangle, ...]:
        number, table = self._parameters[parameter], self._table()
        if self._order is None or self._starts is None:
            self._order = table[:, 0].argsort(kind="stable").astype(np.int32)
            owners = table[self._order, 0]
            self._starts = np.searchsorted(owners, range(len(self) + 1)).astype(np.int32)
        found = self._order[self._starts[number] : self._starts[number + 1]]
        return tuple(rectangle for _, rectangle in self._some(found))

    def by_tensor(self) -> Iterator[tuple[int, list[tuple[str, Rectangle]]]]:
        """List what stored tensors hold, by their index: parameters and rectangles of them."""
        names, order = list(self._parameters), self._table()[:, 1].argsort(kind="stable")
        parts = (order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE))
        found = chain.from_iterable(map(self._some, parts))
        for tensor, held in groupby(found, lambda part: part[1].tensor):
            yield tensor, [(names[number], rectangle) for number, rectangle in held]

    def _table(self) -> np.ndarray:
        return np.frombuffer(self._numbers, np.int64).reshape(-1, len(Rectangle._fields))

    def _some(self, indices: np.ndarray) -> Iterator[tuple[int, Rectangle]]:
        """Yield rectangles after the numbers of their parameters."""
        rows = self._table()[indices].tolist()
        for index, (number, *numbers) in zip(indices.tolist(), rows, strict=True):
            yield number, Rectangle._make((*numbers, self._places.get(index)))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint stores a model."""

    tensors: Sequence[Stored]
    """All stored tensors."""
    rectangles: Mapping[str, tuple[Rectangle, ...]]
    """What each parameter consists of, by its name; rectangles of copies included."""
    repeats_last_row: bool = False
    """Rows of padding hold what the last row of their parameter holds, instead of zeros."""

    def primary(self, parameter: str) -> tuple[Rectangle, ...]:
        """List the rectangles of a parameter without those that repeat others, top to bottom."""
        found = (r for r in self.rectangles[parameter] if self.tensors[r.tensor].copy_of is None)
        return tuple(sorted(found, key=lambda r: (r.parameter_row, r.parameter_column)))

    def copies(self, parameter: str) -> tuple[Rectangle, ...]:
        """List the rectangles of a parameter that repeat others."""
        rectangles = self.rectangles[parameter]
        return tuple(r for r in rectangles if self.tensors[r.tensor].copy_of is not None)

    def by_tensor(self) -> Iterator[tuple[int, list[tuple[str, Rectangle]]]]:
        """List the stored tensors that hold something by index: what of which parameter."""
        found = self.rectangles
        if not isinstance(found, Rectangles):
            found = Rectangles((name, r) for name, held in found.items() for r in held)
        return found.by_tensor()


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Give the rows and columns a shape counts as."""
    return shape[0], math.prod(shape[1:])


class Steps(NamedTuple):
    """Where the elements of a rectangle lie in its stored tensor, counted in elements."""

    first: int
    """The first one."""
    row: int
    """From one row to the next."""
    column: int
    """From one column to the next."""


def steps(rectangle: Rectangle, shape: Sequence[int]) -> Steps:
    """Tell where a rectangle lies in a stored tensor of this shape."""
    place = rectangle.place
    if place is None:
        width = matrix(shape)[1]
        return Steps(rectangle.row * width, width, 1)
    axes = [math.prod(place.view[axis + 1 :]) for axis in range(len(place.view))]
    first = sum(start * step for start, step in zip(place.start, axes, strict=True))
    return Steps(first, axes[place.row_axis], axes[place.column_axis])


def check_complete(layout: Layout, parameters: Iterable[Parameter]) -> None:
    """Prove that a layout stores each element of each parameter, once, and nothing else.

    Raises:
        ConversionError: Names the parameter or stored tensor with a gap or an overlap.
    """
    table = {parameter.name: parameter for parameter in parameters}
    if table.keys() != layout.rectangles.keys():
        odd = sorted(table.keys() ^ layout.rectangles.keys())
        raise ConversionError(f"{odd[0]} is not stored by the layout, or is no parameter")
    check_parameters(layout, table.values())
    is_held = bytearray(len(layout.tensors))
    for index, held in layout.by_tensor():
        is_held[index] = True
        stored = layout.tensors[index]
        _check_stored(stored, [rectangle for _, rectangle in held])
    for index in range(len(layout.tensors)):
        if not is_held[index]:
            _check_stored(layout.tensors[index], ())


def _check_stored(stored: Stored, rectangles: Iterable[Rectangle]) -> None:
    """Prove that parameters and padding are all that a stored tensor holds."""
    boxes = [*(_stored_box(stored, rectangle) for rectangle in rectangles), *_padding(stored)]
    check_cover(stored.name, stored.shape, boxes, missing="belong to no parameter")


def check_parameters(layout: Layout, parameters: Iterable[Parameter]) -> None:
    """Prove that a layout stores each element of these parameters, once.

    Raises:
        ConversionError: Names the parameter with a gap or an overlap.
    """
    for parameter in parameters:
        if parameter.name not in layout.rectangles:
            raise ConversionError(f"{parameter.name} is not stored by the layout")
        view = matrix(parameter.shape)
        boxes = [_parameter_box(view, rectangle) for rectangle in layout.primary(parameter.name)]
        check_cover(parameter.name, parameter.shape, boxes, missing="are missing")


def stored_tensors(tensors: Iterable[Stored] = ()) -> Table[Stored]:
    """Return a list of stored tensors that takes little memory."""
    return Table(Stored, tensors)


def _parameter_box(view: tuple[int, int], r: Rectangle) -> Box:
    start = (r.parameter_row, r.parameter_column)
    return Box(view, start, (start[0] + r.rows, start[1] + r.columns))


def _stored_box(stored: Stored, r: Rectangle) -> Box:
    if r.place is None:
        return Box(matrix(stored.shape), (r.row, 0), (r.row + r.rows, r.columns))
    view, start, row_axis, column_axis = r.place
    length = [1] * len(view)
    length[row_axis], length[column_axis] = r.rows, r.columns
    stop = tuple(first + count for first, count in zip(start, length, strict=True))
    return Box(view, start, stop)


def _padding(stored: Stored) -> Iterator[Box]:
    if stored.padding:
        rows, columns = matrix(stored.shape)
        yield Box((rows, columns), (rows - stored.padding, 0), (rows, columns))
