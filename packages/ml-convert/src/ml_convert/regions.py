"""Reading and writing parts of stored tensors that are not one run of bytes.

A part of a transposed tensor, or every second row of one, lies in the file as lines: equal pieces
at equal distances. All parts of a tensor that lie on the same lines go together: where they are
neighbours, such as the heads of query, key and value, one read or write of a line serves all.
Between the elements of a line may be some that belong to others. A read skips them; a write reads
the line first, and holds a lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from ml_convert.files import Files
from ml_convert.layout import Steps
from ml_convert.tensor import Extent

_WORTH_SKIPPING = 2048  # bytes: it takes as long to read them as to start another read


class Region(NamedTuple):
    """A part of a band, and where it lies in its stored tensor."""

    words: np.ndarray
    """Elements of shape (rows, columns)."""
    steps: Steps

    @property
    def is_run(self) -> bool:
        """Whether it is one run of bytes."""
        rows, columns = self.words.shape
        return (columns == 1 or self.steps.column == 1) and (rows == 1 or self.steps.row == columns)


class _Line(NamedTuple):
    """A region as lines: its faster axis runs along them."""

    words: np.ndarray
    """Elements of shape (lines, elements of a line); a view of the region's."""
    start: int
    """First element within the line."""
    step: int

    @property
    def stop(self) -> int:
        return self.start + (self.words.shape[1] - 1) * self.step + 1

    @property
    def place(self) -> slice:
        return slice(self.start, self.stop, self.step)


class _Lines(NamedTuple):
    first: int
    """Where the first one starts, in elements."""
    step: int
    """From one line to the next."""
    number: int


def read(extent: Extent, regions: Sequence[Region], files: Files) -> None:
    """Fill regions of a stored tensor from its file."""
    for lines, parts in _by_lines(regions).items():
        nearby = _WORTH_SKIPPING // extent.dtype.itemsize
        for start, stop, found in _runs(parts, nearby):
            content = _read_lines(extent, lines, start, stop, files)
            for part in found:
                part.words[...] = content[:, part.start - start : part.stop - start : part.step]


def write(extent: Extent, regions: Sequence[Region], files: Files) -> None:
    """Write regions of a stored tensor to its file."""
    for lines, parts in _by_lines(regions).items():
        for start, stop, found in _runs(parts, 0):
            is_shared = any(part.step > 1 for part in found)
            with files.lock(extent.path) if is_shared else nullcontext():
                if sum(part.words.shape[1] for part in found) == stop - start:
                    content = np.empty((lines.number, stop - start), found[0].words.dtype)
                else:
                    content = _read_lines(extent, lines, start, stop, files)
                _put(content, start, found)
                _write_lines(extent, lines, start, content, files)


def _by_lines(regions: Sequence[Region]) -> dict[_Lines, list[_Line]]:
    found: dict[_Lines, list[_Line]] = {}
    for words, (first, row, column) in regions:
        rows, columns = words.shape
        if columns == 1 or row < column:  # transposed
            words, rows, columns, row, column = words.T, columns, rows, column, row
        step = row if rows > 1 else 0
        start = first % step if step else first
        lines = _Lines(first - start, step, rows)
        found.setdefault(lines, []).append(_Line(words, start, column))
    return found


def _runs(parts: list[_Line], nearby: int) -> Iterator[tuple[int, int, list[_Line]]]:
    """Join parts of lines that follow each other within so many elements."""
    group: list[_Line] = []
    start = stop = 0
    for part in sorted(parts, key=lambda part: part.start):
        if group and part.start > stop + nearby:
            yield start, stop, group
            group = []
        if not group:
            start, stop = part.start, part.stop
        group.append(part)
        stop = max(stop, part.stop)
    yield start, stop, group


def _put(content: np.ndarray, start: int, parts: Sequence[_Line]) -> None:
    for part in parts:
        content[:, part.start - start : part.stop - start : part.step] = part.words


def _read_lines(extent: Extent, lines: _Lines, start: int, stop: int, files: Files) -> np.ndarray:
    """Read the elements `start` to `stop` of every line; returns (lines, elements)."""
    width, word = stop - start, np.dtype(f"u{extent.dtype.itemsize}")
    offset = extent.offset + (lines.first + start) * word.itemsize
    if 2 * width >= lines.step:  # what lies between is less: read it, too
        whole = np.empty((lines.number - 1) * lines.step + width, word)
        files.read(extent.path, offset, whole)
        step = (lines.step * word.itemsize, word.itemsize)
        return np.lib.stride_tricks.as_strided(whole, (lines.number, width), step)
    content = np.empty((lines.number, width), word)
    for index, line in enumerate(content):
        files.read(extent.path, offset + index * lines.step * word.itemsize, line)
    return content


def _write_lines(
    extent: Extent, lines: _Lines, start: int, content: np.ndarray, files: Files
) -> None:
    offset = extent.offset + (lines.first + start) * content.itemsize
    if lines.step == content.shape[1] or lines.number == 1:
        files.write(extent.path, offset, np.ascontiguousarray(content))
        return
    for index, line in enumerate(content):
        files.write(extent.path, offset + index * lines.step * content.itemsize, line)
