"""The proof that boxes cover an array: every element once, none twice.

Boxes may be given in different shapes of the same array, as when one tensor is looked at as whole
rows and as a stack of matrices. All are brought to one shape, whose axes are then cut wherever a
box begins or ends. What is left are cells that each box covers whole or not at all, so that
counting boxes for every cell proves it for every element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ml_convert.errors import ConversionError


class Box(NamedTuple):
    """Ranges of indices of an array in some shape of it."""

    view: tuple[int, ...]
    """The shape."""
    start: tuple[int, ...]
    """First index along each axis."""
    stop: tuple[int, ...]
    """One past the last."""


def check_cover(name: str, shape: tuple[int, ...], boxes: Sequence[Box], *, missing: str) -> None:
    """Prove that boxes cover an array exactly.

    Args:
        name: What to call it.
        shape: Its shape.
        boxes: In any shape of the same number of elements.
        missing: What to say of elements that no box covers.

    Raises:
        ConversionError: Names the first elements that are not covered, or covered twice.
    """
    size = math.prod(shape)
    if size == 0:
        return
    for box in boxes:
        _check_bounds(name, size, box)
    if len(boxes) == 1 and _is_whole(boxes[0]):
        return
    view, boxes = _in_one_view(boxes, size)
    cuts, counts = _count(view, boxes)
    if (counts == 1).all():
        return
    cell = np.unravel_index(int(np.argmax(counts != 1)), counts.shape)
    problem = missing if counts[cell] == 0 else "are there twice"
    start = [int(axis[index]) for axis, index in zip(cuts, cell, strict=True)]
    stop = [int(axis[index + 1]) for axis, index in zip(cuts, cell, strict=True)]
    raise ConversionError(f"{name}: elements {_described(view, shape, start, stop)} {problem}")


def _check_bounds(name: str, size: int, box: Box) -> None:
    ranges = zip(box.view, box.start, box.stop, strict=True)
    if math.prod(box.view) != size or not all(0 <= a < b <= n for n, a, b in ranges):
        raise ConversionError(
            f"{name}: elements {_ranges(box.start, box.stop)} of {list(box.view)} do not exist"
        )


def _is_whole(box: Box) -> bool:
    return box.stop == box.view and not any(box.start)


def _count(view: Sequence[int], boxes: Sequence[Box]) -> tuple[list[list[int]], np.ndarray]:
    """Cut the axes, and count the boxes that cover each cell."""
    ends = [
        sorted({0, size, *(box.start[axis] for box in boxes), *(box.stop[axis] for box in boxes)})
        for axis, size in enumerate(view)
    ]
    index = [{value: number for number, value in enumerate(cuts)} for cuts in ends]
    counts = np.zeros([len(cuts) - 1 for cuts in ends], np.int32)
    for box in boxes:
        ranges = zip(index, box.start, box.stop, strict=True)
        counts[tuple(slice(cuts[a], cuts[b]) for cuts, a, b in ranges)] += 1
    return ends, counts


# One shape for all boxes


def _in_one_view(boxes: Sequence[Box], size: int) -> tuple[tuple[int, ...], list[Box]]:
    """Split the axes of boxes until all boxes have the same shape."""
    views = {box.view for box in boxes}
    if len(views) < 2:
        return (views.pop() if views else (size,)), list(boxes)
    steps = sorted({step for view in views for step in _steps(view)} | {size}, reverse=True)
    if any(larger % smaller for larger, smaller in pairwise(steps)):
        raise ConversionError(f"shapes {sorted(views)} of one tensor have no common refinement")
    common = tuple(larger // smaller for larger, smaller in pairwise(steps))
    return common, [Box(common, *ends) for box in boxes for ends in _refined(box, steps)]


def _steps(view: Sequence[int]) -> list[int]:
    """How many elements apart neighbours along each axis are; 1 is always one of them."""
    return [math.prod(view[axis + 1 :]) for axis in range(len(view))] + [1]


def _refined(box: Box, steps: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give a box as boxes (start, stop) in a shape whose axes have these steps."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, step, start, stop in zip(
        box.view, _steps(box.view), box.start, box.stop, strict=False
    ):
        inner = [s for s in steps if step <= s <= size * step]
        sizes = [a // b for a, b in pairwise(inner)]
        parts = list(_split(sizes, start, stop)) if sizes else [((), ())]
        found = [(a + c, b + d) for a, b in found for c, d in parts]
    yield from found


def _split(
    sizes: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give a range of an axis as boxes over the axes it is split into."""
    if len(sizes) == 1:
        yield (start,), (stop,)
        return
    inner = math.prod(sizes[1:])
    first, last = -(-start // inner), stop // inner
    if first < last:
        yield (first, *(0 for _ in sizes[1:])), (last, *sizes[1:])
    if start < first * inner:
        row = start // inner
        for a, b in _split(sizes[1:], start % inner, min(stop, first * inner) - row * inner):
            yield (row, *a), (row + 1, *b)
    if max(last * inner, first * inner) < stop:
        for a, b in _split(sizes[1:], 0, stop - last * inner):
            yield (last, *a), (last + 1, *b)


# Messages


def _described(
    view: Sequence[int], shape: Sequence[int], start: Sequence[int], stop: Sequence[int]
) -> str:
    """Describe a cell in the tensor's own shape."""
    if tuple(view[: len(shape)]) == tuple(shape):
        return _ranges(start[: len(shape)], stop[: len(shape)])
    first = np.unravel_index(int(np.ravel_multi_index(tuple(start), tuple(view))), tuple(shape))
    count = math.prod(b - a for a, b in zip(start, stop, strict=True))
    return f"from {[int(index) for index in first]} ({count} of them)"


def _ranges(start: Sequence[int], stop: Sequence[int]) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
