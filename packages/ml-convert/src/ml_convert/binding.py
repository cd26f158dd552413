"""Matching what a layout expects with what a checkpoint's files hold, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.plan import Checkpoint
from ml_convert.tensor import Extent, extent_table

Found = Mapping[str, Mapping[str, Extent]]
"""Tensors that exist, by file (within the checkpoint) and by name."""


def bind(layout: Layout, found: Found, root: Path) -> Checkpoint:
    """Find every stored tensor of a layout, and nothing else.

    Raises:
        ConversionError: Tensors are missing, unknown, or of another shape.
    """
    extents, missing = extent_table(), []
    for stored in layout.tensors:
        extent = found.get(stored.file, {}).get(stored.name)
        if extent is None:
            missing.append(stored)
            continue
        if extent.shape != stored.shape and not missing:
            raise ConversionError(
                f"{root / stored.file}: {stored.name} has shape {list(extent.shape)}, the "
                f"model's description asks for {list(stored.shape)}"
            )
        extents.append(extent)
    if missing:
        raise ConversionError(
            f"{root}: {_some(missing[0].name, missing[0].file, len(missing))} missing"
        )
    if len(extents) < sum(map(len, found.values())):
        raise ConversionError(f"{root}: {_unknown(layout, found)} not part of this model")
    return Checkpoint(layout=layout, extents=extents)


def _unknown(layout: Layout, found: Found) -> str:
    expected = {(stored.file, stored.name) for stored in layout.tensors}
    unknown = [(file, n) for file, held in found.items() for n in held if (file, n) not in expected]
    file, name = unknown[0]
    return _some(name, file, len(unknown))


def _some(name: str, file: str, count: int) -> str:
    """Name the first of some tensors, and how many there are."""
    where = f"{name} ({file})" if file else name  # no file is known of what is nowhere
    return f"{where} is" if count == 1 else f"{count} tensors, such as {where}, are"
