"""Comparing two checkpoints of a model bit by bit.

The written checkpoint is opened as any other: names, shapes and offsets come from its files, not
from what the writer meant to write. Then every band of every parameter is read from both sides,
every repeated tensor is compared with its original, and padding must be zeros.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from ml_convert.errors import ConversionError, VerificationError
from ml_convert.execute import Advance, check_copies, converted_to, gather
from ml_convert.files import Buffers, Files, for_each
from ml_convert.layout import Rectangle
from ml_convert.plan import Band, Checkpoint, Plan, overlapping
from ml_convert.source import Source
from ml_convert.tensor import Dtype


def check_description(source: Source, target: Source) -> None:
    """Check that two checkpoints describe the same model.

    Raises:
        VerificationError: Names the field and both values.
    """
    for field in fields(source.arch):
        ours, theirs = getattr(source.arch, field.name), getattr(target.arch, field.name)
        if field.compare and ours != theirs:
            raise VerificationError(
                f"{target.path}: {field.name} is {theirs}, but {ours} in {source.path}"
            )


def check_dtypes(plan: Plan, dtype: Dtype | None) -> None:
    """Check that the target is stored in this dtype, or without one in that of the source.

    Raises:
        VerificationError: Names the first parameter that is not.
    """
    for name, stored in plan.source.dtypes.items():
        expected, found = dtype or stored, plan.target.dtypes[name]
        if found != expected:
            path = plan.target.extents[plan.target.primary[name][0].tensor].path
            raise VerificationError(f"{path}: {name} is {found.name}, not {expected.name}")


def check_content(plan: Plan, files: Files, *, workers: int, advance: Advance) -> None:
    """Check that the target of a plan holds what its source holds.

    Raises:
        VerificationError: Names file, tensor and element of the first difference.
    """
    buffers = Buffers()

    def compare_band(band: Band) -> None:
        data = gather(plan.source, band, files, buffers)
        expected = converted_to(plan.target.dtypes[band.parameter], data, plan, band)
        found = gather(plan.target, band, files, buffers, buffer="target")
        if not np.array_equal(found, expected):
            raise VerificationError(_difference(plan, band, found, expected))
        try:
            check_copies(plan.target, band, found, files, buffers)
        except ConversionError as error:
            raise VerificationError(str(error)) from None
        advance(data.nbytes)

    for_each(plan.bands(), compare_band, workers=workers)
    _check_padding(plan.target, files)


def _difference(plan: Plan, band: Band, found: np.ndarray, expected: np.ndarray) -> str:
    row, byte = np.argwhere(found != expected)[0]
    row, column = band.row + int(row), int(byte) // plan.target.dtypes[band.parameter].itemsize
    here = _element(plan.target, band.parameter, row, column)
    there = _element(plan.source, band.parameter, row, column)
    return f"{here} differs from {there}"


def _element(checkpoint: Checkpoint, parameter: str, row: int, column: int) -> str:
    """Name the stored element that is (row, column) of a parameter."""
    band = Band(parameter, row, 1, 0)
    for rectangle, _, _ in overlapping(checkpoint.primary[parameter], band):
        if 0 <= column - rectangle.parameter_column < rectangle.columns:
            return _stored_element(checkpoint, rectangle, row, column)
    raise AssertionError(f"{parameter} has no element ({row}, {column})")


def _stored_element(checkpoint: Checkpoint, r: Rectangle, row: int, column: int) -> str:
    stored, extent = checkpoint.layout.tensors[r.tensor], checkpoint.extents[r.tensor]
    place = [r.row + row - r.parameter_row, column - r.parameter_column][: len(stored.shape)]
    return f"{extent.path}: {stored.name}{place}"


def _check_padding(checkpoint: Checkpoint, files: Files) -> None:
    for stored, extent in zip(checkpoint.layout.tensors, checkpoint.extents, strict=True):
        for row in range(stored.shape[0] - stored.padding, stored.shape[0]):
            padding = np.empty(extent.row_bytes, np.uint8)
            files.read(extent.path, extent.offset + row * extent.row_bytes, padding)
            if padding.any():
                raise VerificationError(
                    f"{extent.path}: row {row} of {stored.name} is padding, but not zero"
                )
