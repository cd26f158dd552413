"""Writing a result back to the layout of its source, and comparing every stored byte.

The tensors go to a temporary file that is removed again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ml_convert import execute
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.execute import Advance
from ml_convert.files import Files, for_each
from ml_convert.plan import Checkpoint, Plan
from ml_convert.tensor import Extent
from ml_models.parameter import Parameter

_BLOCK = 1 << 20


def check_possible(source: Checkpoint, result: Checkpoint) -> None:
    """Check that nothing was changed on purpose.

    Raises:
        ConversionError: The result is to differ from the source.
    """
    if source.updates:
        raise ConversionError("--verify roundtrip: merging an adapter cannot be taken back")
    for name, dtype in source.dtypes.items():
        if result.dtypes[name].itemsize < dtype.itemsize or (
            dtype != result.dtypes[name] and dtype.itemsize == result.dtypes[name].itemsize
        ):
            raise ConversionError(
                f"--verify roundtrip: {name} is rounded from {dtype.name} to "
                f"{result.dtypes[name].name}, which cannot be taken back"
            )


def check(
    table: tuple[Parameter, ...],
    source: Checkpoint,
    result: Checkpoint,
    scratch: Path,
    *,
    workers: int,
    advance: Advance,
) -> None:
    """Convert a result back, and compare it with the source.

    Args:
        table: All parameters of the model.
        source: What the result was made of.
        result: The result.
        scratch: Name of the file to write to; it must not exist, and is removed.
        workers: Number of threads.
        advance: Called with the bytes of what was written and compared.

    Raises:
        VerificationError: Names the first tensor that differs.
        OSError: There is no room for the file.
    """
    back, size = _laid_out(source, scratch)
    try:
        with Files() as files:
            files.create(scratch, size)
            work = Plan(table=table, source=result, target=back)
            execute.copy(work, files, workers=workers, advance=advance, checksums=False)

            def compare(index: int) -> None:
                _compare(source, back, index, files)

            for_each(range(len(source.extents)), compare, workers=workers)
    finally:
        scratch.unlink(missing_ok=True)


def _laid_out(source: Checkpoint, path: Path) -> tuple[Checkpoint, int]:
    """Put the tensors of a checkpoint one after another in a file; returns its size, too."""
    extents, end = [], 0
    for extent in source.extents:
        extents.append(Extent(path, end, extent.dtype, extent.shape))
        end += extent.nbytes
    return Checkpoint(layout=source.layout, extents=tuple(extents)), end


def _compare(source: Checkpoint, back: Checkpoint, index: int, files: Files) -> None:
    stored, ours, theirs = source.layout.tensors[index], source.extents[index], back.extents[index]
    size = ours.nbytes - stored.padding * ours.row_bytes
    for offset in range(0, size, _BLOCK):
        here, there = (np.empty(min(_BLOCK, size - offset), np.uint8) for _ in range(2))
        files.read(ours.path, ours.offset + offset, here)
        files.read(theirs.path, theirs.offset + offset, there)
        if not np.array_equal(here, there):
            raise VerificationError(
                f"{ours.path}: {stored.name} comes back from the result as something else"
            )
