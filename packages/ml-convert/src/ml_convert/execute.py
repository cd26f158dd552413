"""Copying a model from one checkpoint to another, band by band."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from ml_convert.checksum import Piece
from ml_convert.errors import ConversionError
from ml_convert.files import Buffers, Files, for_each
from ml_convert.layout import Rectangle
from ml_convert.plan import Band, Checkpoint, Plan, overlapping
from ml_convert.tensor import Dtype, cast

Advance = Callable[[int], None]
"""Called with the bytes of each band that is done."""


def copy(
    plan: Plan, files: Files, *, workers: int, advance: Advance, checksums: bool
) -> list[list[Piece]]:
    """Copy all parameters into files that exist already.

    Returns:
        The pieces that were written of each stored tensor of the target, with their checksums (or
        zeros, if none are asked for).

    Raises:
        ConversionError: Copies in the source differ, or a number does not fit the target dtype.
    """
    written: list[list[Piece]] = [[] for _ in plan.target.extents]
    buffers = Buffers()

    def copy_band(band: Band) -> None:
        data = gather(plan.source, band, files, buffers)
        check_copies(plan.source, band, data, files, buffers)
        converted = converted_to(plan.target.dtypes[band.parameter], data, plan, band)
        for tensor, offset, part in scatter(plan.target, band, converted, files):
            crc = zlib.crc32(part.data) if checksums else 0
            written[tensor].append(Piece(offset, part.nbytes, crc))
        advance(data.nbytes)

    for_each(plan.bands(), copy_band, workers=workers)
    return written


def gather(
    checkpoint: Checkpoint, band: Band, files: Files, buffers: Buffers, *, buffer: str = "source"
) -> np.ndarray:
    """Read a band.

    Returns:
        Bytes of shape (rows, row bytes), valid until the thread's next call for this `buffer`.
    """
    itemsize = checkpoint.dtypes[band.parameter].itemsize
    data = buffers.take(buffer, band.rows, band.columns * itemsize)
    for rectangle, start, stop in overlapping(checkpoint.primary[band.parameter], band):
        part = _part(data, band, rectangle, start, stop, itemsize)
        if part.flags.c_contiguous:
            _read(checkpoint, rectangle, start, part, files)
        else:
            scratch = buffers.take("scratch", *part.shape)
            _read(checkpoint, rectangle, start, scratch, files)
            part[...] = scratch
    return data


def check_copies(
    checkpoint: Checkpoint, band: Band, data: np.ndarray, files: Files, buffers: Buffers
) -> None:
    """Check that stored tensors that repeat parts of a band repeat them.

    Raises:
        ConversionError: One differs.
    """
    itemsize = checkpoint.dtypes[band.parameter].itemsize
    for rectangle, start, stop in overlapping(checkpoint.copies[band.parameter], band):
        part = _part(data, band, rectangle, start, stop, itemsize)
        scratch = buffers.take("scratch", *part.shape)
        _read(checkpoint, rectangle, start, scratch, files)
        if not np.array_equal(part, scratch):
            raise ConversionError(_differing_copies(checkpoint, rectangle.tensor))


def scatter(
    checkpoint: Checkpoint, band: Band, data: np.ndarray, files: Files
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Write a band to all places that hold it; yields stored tensor, offset in it, and bytes."""
    itemsize = checkpoint.dtypes[band.parameter].itemsize
    rectangles = checkpoint.layout.rectangles[band.parameter]
    for rectangle, start, stop in overlapping(rectangles, band):
        part = np.ascontiguousarray(_part(data, band, rectangle, start, stop, itemsize))
        extent = checkpoint.extents[rectangle.tensor]
        offset = _row(rectangle, start) * extent.row_bytes
        files.write(extent.path, extent.offset + offset, part)
        yield rectangle.tensor, offset, part


def converted_to(target: Dtype, data: np.ndarray, plan: Plan, band: Band) -> np.ndarray:
    """Return a band of the source in another dtype."""
    try:
        return cast(data, plan.source.dtypes[band.parameter], target)
    except ConversionError as error:
        raise ConversionError(f"{band.parameter}: {error}") from None


def _part(
    data: np.ndarray, band: Band, rectangle: Rectangle, start: int, stop: int, itemsize: int
) -> np.ndarray:
    """The bytes of a band that rows `start` to `stop` of a rectangle hold."""
    first = rectangle.parameter_column * itemsize
    columns = slice(first, first + rectangle.columns * itemsize)
    return data[start - band.row : stop - band.row, columns]


def _row(rectangle: Rectangle, parameter_row: int) -> int:
    """Turn a row of the parameter into the row of the stored tensor."""
    return rectangle.row + parameter_row - rectangle.parameter_row


def _read(
    checkpoint: Checkpoint, rectangle: Rectangle, start: int, target: np.ndarray, files: Files
) -> None:
    extent = checkpoint.extents[rectangle.tensor]
    offset = extent.offset + _row(rectangle, start) * extent.row_bytes
    files.read(extent.path, offset, target)


def _differing_copies(checkpoint: Checkpoint, index: int) -> str:
    copy = checkpoint.layout.tensors[index]
    assert copy.copy_of is not None
    original = checkpoint.layout.tensors[copy.copy_of]
    return (
        f"{checkpoint.extents[index].path}: {copy.name} should repeat {original.name} of "
        f"{checkpoint.extents[copy.copy_of].path}, but differs from it"
    )
