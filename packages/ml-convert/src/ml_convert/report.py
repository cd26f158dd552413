"""What a conversion did, or would do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ml_convert.description import Entry
from ml_convert.plan import Checkpoint
from ml_convert.source import Source


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the result."""

    name: str
    """Path within the result."""
    size: int
    """Bytes."""
    tensors: int
    """Number of tensors."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did, or would do."""

    source: Path
    """The checkpoint that was read."""
    path: Path
    """The checkpoint that was written."""
    files: tuple[File, ...]
    """Its files with tensors."""
    parameters: int
    """Number of the model's parameters, each counted once."""
    padding: int
    """Bytes of padding in the result."""
    verified: bool = False
    """Whether the result was compared with the source, element by element."""
    rounded: int = 0
    """How many elements another dtype has changed, in the files that were not done before."""
    resumed: int = 0
    """How many files an interrupted attempt had done."""
    logits: str = ""
    """What a comparison of the logits found."""
    plan: tuple[Entry, ...] = ()
    """Of a dry run, every tensor that would be written, and from what."""
    free: int | None = None
    """Of a dry run, bytes that are free on the disk."""
    seconds: float = 0.0
    """How long it took."""

    @property
    def size(self) -> int:
        """Bytes of all files with tensors."""
        return sum(file.size for file in self.files)


def summary(
    source: Source, target: Checkpoint, path: Path, *, sizes: Mapping[str, int] | None = None
) -> Report:
    """Summarize what was written; without `sizes` the files exist."""
    counts = Counter(stored.file for stored in target.layout.tensors)
    pairs = zip(target.layout.tensors, target.extents, strict=True)
    files = (
        File(name=name, size=sizes[name] if sizes else (path / name).stat().st_size, tensors=count)
        for name, count in counts.items()
    )
    return Report(
        source=source.path,
        path=path,
        files=tuple(files),
        parameters=sum(math.prod(parameter.shape) for parameter in source.table),
        padding=sum(stored.padding * extent.row_bytes for stored, extent in pairs),
    )
