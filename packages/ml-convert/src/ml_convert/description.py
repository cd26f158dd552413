"""What a plan does, tensor by tensor, for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ml_convert.execute import steps_from
from ml_convert.layout import Rectangle, matrix
from ml_convert.plan import Band, Checkpoint, Plan, overlapping


class Origin(NamedTuple):
    """A tensor of the source, and what of it is used."""

    file: str
    name: str
    ranges: tuple[tuple[int, int], ...]
    """First index and one past the last, along each axis."""
    parts: int
    """How many rectangles."""

    def __str__(self) -> str:
        """Return it as one would index an array."""
        ranges = ", ".join(f"{first}:{stop}" for first, stop in self.ranges)
        parts = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"{self.name}[{ranges}]{parts} ({self.file})"


class Entry(NamedTuple):
    """A tensor of the target."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    origins: tuple[Origin, ...]
    steps: tuple[str, ...]
    """What is done besides putting parts in their place."""

    def __str__(self) -> str:
        """Return a line."""
        done = f"; {', '.join(self.steps)}" if self.steps else ""
        origins = " + ".join(map(str, self.origins)) or "nothing"
        return f"{self.name} {self.dtype}{list(self.shape)} = {origins}{done}"


def entries(plan: Plan) -> Iterator[Entry]:
    """Describe every tensor of the target."""
    found = dict(plan.target.layout.by_tensor())
    for index, stored in enumerate(plan.target.layout.tensors):
        extent, held = plan.target.extents[index], found.get(index, [])
        yield Entry(
            file=stored.file,
            name=stored.name,
            shape=stored.shape,
            dtype=extent.dtype.name,
            nbytes=extent.nbytes,
            origins=tuple(_origins(plan.source, held)),
            steps=tuple(_steps(plan, index, [name for name, _ in held])),
        )


def _origins(source: Checkpoint, held: Sequence[tuple[str, Rectangle]]) -> Iterator[Origin]:
    """List the tensors that make up these rectangles of parameters."""
    used: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for name, r in held:
        band = Band(name, r.parameter_row, r.rows, r.columns, r.parameter_column)
        for part in overlapping(source.primary(name), band):
            shape = source.layout.tensors[part.rectangle.tensor].shape
            first, row, column = steps_from(part, shape)
            last = first + (part.rows - 1) * row + (part.columns - 1) * column
            ends = (_index(first, shape), _index(last, shape))
            used.setdefault(part.rectangle.tensor, []).append(ends)
    for tensor, found in used.items():
        stored = source.layout.tensors[tensor]
        starts, stops = zip(*found, strict=True)
        ranges = tuple(
            (min(axis[0]), max(axis[1]) + 1)
            for axis in zip(zip(*starts, strict=True), zip(*stops, strict=True), strict=True)
        )
        yield Origin(stored.file, stored.name, ranges, len(found))


def _index(element: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(element, shape))


def _steps(plan: Plan, index: int, names: Sequence[str]) -> Iterator[str]:
    stored, extent = plan.target.layout.tensors[index], plan.target.extents[index]
    if stored.copy_of is not None:
        original = plan.target.layout.tensors[stored.copy_of]
        yield f"repeats {original.name} ({original.file})"
    if any(plan.source.is_transposed(n) != plan.target.is_transposed(n) for n in names):
        yield "transposed"
    if any(name in plan.source.updates for name in names):
        yield "adapter added"
    for dtype in sorted({plan.source.dtypes[name] for name in names}):
        if dtype != extent.dtype:
            yield f"{dtype.name} to {extent.dtype.name}"
    if stored.padding:
        rows = matrix(stored.shape)[0]
        what = "the last row" if plan.target.layout.repeats_last_row else "zeros"
        yield f"rows {rows - stored.padding}:{rows} are padding ({what})"
