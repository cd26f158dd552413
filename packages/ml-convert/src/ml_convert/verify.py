"""Comparing two checkpoints of a model bit by bit.

The written checkpoint is opened as any other: names, shapes and offsets come from its files, not
from what the writer meant to write. Then every band of every parameter is read from both sides,
every repeated tensor is compared with its original, and padding must be zeros.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from ml_convert import padding
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.execute import Advance, check_copies, converted_to, element, gather
from ml_convert.files import Buffers, Files, for_each
from ml_convert.plan import Band, Plan
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

    Parameters that are float32 in models of any dtype are not converted.

    Raises:
        VerificationError: Names the first parameter that is not.
    """
    for parameter in plan.table:
        name, stored = parameter.name, plan.source.dtypes[parameter.name]
        expected = stored if parameter.float32 else dtype or stored
        found = plan.target.dtypes[name]
        if found != expected:
            path = plan.target.extents[plan.target.primary(name)[0].tensor].path
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
    padding.check(plan, files)


def _difference(plan: Plan, band: Band, found: np.ndarray, expected: np.ndarray) -> str:
    row, byte = np.argwhere(found != expected)[0]
    itemsize = plan.target.dtypes[band.parameter].itemsize
    row, column = band.row + int(row), band.column + int(byte) // itemsize
    here = element(plan.target, band.parameter, row, column)
    there = element(plan.source, band.parameter, row, column)
    return f"{here} differs from {there}"
