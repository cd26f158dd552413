"""The rows that a vocabulary is padded with, so that every tensor-parallel rank has as many.

They belong to no token. Files are created empty, so zeros are there already; ModelLink and
Megatron-LM's converter repeat the last row of the vocabulary instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ml_convert.casting import cast
from ml_convert.errors import VerificationError
from ml_convert.execute import gather
from ml_convert.files import Buffers, Files
from ml_convert.plan import Band, Checkpoint, Plan

_BLOCK = 1 << 20


def fill(plan: Plan, files: Files, tensors: Sequence[int]) -> None:
    """Write the padding of these stored tensors of the target, which are zeros so far."""
    for index in tensors:
        stored, extent = plan.target.layout.tensors[index], plan.target.extents[index]
        if not stored.padding or not plan.target.layout.repeats_last_row:
            continue
        last = cast(
            _last_row(plan.source, stored.parameter, files),
            plan.source.dtypes[stored.parameter],
            extent.dtype,
        )
        for row, rows in _blocks(plan.target, index):
            offset = extent.offset + row * extent.row_bytes
            files.write(extent.path, offset, np.repeat(last, rows, axis=0))


def check(plan: Plan, files: Files) -> None:
    """Check that the padding of the target is what its layout says.

    Raises:
        VerificationError: Names the first row that is not.
    """
    layout = plan.target.layout
    for index, (stored, extent) in enumerate(zip(layout.tensors, plan.target.extents, strict=True)):
        if not stored.padding:
            continue
        expected = np.zeros((1, extent.row_bytes), np.uint8)
        if layout.repeats_last_row:
            expected = _last_row(plan.target, stored.parameter, files)
        for row, rows in _blocks(plan.target, index):
            found = np.empty((rows, extent.row_bytes), np.uint8)
            files.read(extent.path, extent.offset + row * extent.row_bytes, found)
            wrong = (found != expected).any(axis=1)
            if wrong.any():
                what = "a repetition of the last row" if layout.repeats_last_row else "zero"
                raise VerificationError(
                    f"{extent.path}: row {row + int(wrong.argmax())} of {stored.name} is padding, "
                    f"but not {what}"
                )


def _blocks(checkpoint: Checkpoint, index: int) -> Iterator[tuple[int, int]]:
    """Cut the padding of a stored tensor into blocks: first row and number of rows."""
    stored, extent = checkpoint.layout.tensors[index], checkpoint.extents[index]
    step = max(1, _BLOCK // extent.row_bytes)
    for row in range(stored.shape[0] - stored.padding, stored.shape[0], step):
        yield row, min(step, stored.shape[0] - row)


def _last_row(checkpoint: Checkpoint, parameter: str, files: Files) -> np.ndarray:
    """Read the last row of a parameter, as bytes of shape (1, row bytes)."""
    rectangles = checkpoint.primary(parameter)
    last = max(r.parameter_row + r.rows for r in rectangles) - 1
    columns = max(r.parameter_column + r.columns for r in rectangles)
    return gather(checkpoint, Band(parameter, last, 1, columns), files, Buffers()).copy()
