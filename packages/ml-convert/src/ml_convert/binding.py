"""Matching what a layout expects with what a checkpoint's files hold, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.plan import Checkpoint
from ml_convert.tensor import Extent

Found = Mapping[tuple[str, str], Extent]
"""Tensors that exist, by file (within the checkpoint) and name."""


def bind(layout: Layout, found: Found, root: Path) -> Checkpoint:
    """Find every stored tensor of a layout, and nothing else.

    Raises:
        ConversionError: Tensors are missing, unknown, or of another shape.
    """
    expected = {(stored.file, stored.name): stored for stored in layout.tensors}
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    if missing:
        raise ConversionError(f"{root}: {_some(missing)} missing")
    if unknown:
        raise ConversionError(f"{root}: {_some(unknown)} not part of this model")
    for key, stored in expected.items():
        if found[key].shape != stored.shape:
            raise ConversionError(
                f"{root / stored.file}: {stored.name} has shape {list(found[key].shape)}, the "
                f"model's description asks for {list(stored.shape)}"
            )
    return Checkpoint(layout=layout, extents=tuple(found[key] for key in expected))


def _some(keys: Sequence[tuple[str, str]]) -> str:
    """Name the first of these tensors, and how many there are."""
    file, name = keys[0]
    if len(keys) == 1:
        return f"{name} ({file}) is"
    return f"{len(keys)} tensors, such as {name} ({file}), are"
