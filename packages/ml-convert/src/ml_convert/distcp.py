"""Files of torch.distributed.checkpoint: one file of `torch.save` after the other.

    __0_0.distcp    a chunk of a tensor, the next chunk, ..., and pickled objects between them

What is where stands in `.metadata` (`ml_convert.torch_dist_metadata`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_convert import ptfile
from ml_convert.errors import ConversionError
from ml_convert.pickles import TensorPickle
from ml_convert.ptfile import NewTensor, PtFile
from ml_convert.table import Table
from ml_convert.tensor import Extent
from ml_convert.torch_dist_metadata import Metadata

_ALIGNMENT = 64


def tensors(directory: Path, metadata: Metadata, keys: Iterable[str]) -> Mapping[str, list[Extent]]:
    """Find the bytes of all chunks of these tensors, in the order of their chunks.

    Raises:
        ConversionError: A file does not hold what `.metadata` says.
    """
    found: dict[str, list[Extent]] = {}
    by_file: dict[str, list[tuple[str, int]]] = {}
    for key in keys:
        chunks = metadata.tensors[key].chunks
        found[key] = [Extent(directory, 0, metadata.tensors[key].dtype, ())] * len(chunks)
        for number, chunk in enumerate(chunks):
            by_file.setdefault(chunk.file, []).append((key, number))
    for file, parts in by_file.items():
        path = directory / file
        with path.open("rb") as opened:
            for key, number in parts:
                tensor = metadata.tensors[key]
                chunk = tensor.chunks[number]
                saved = ptfile.read_part(opened, path, chunk.start, chunk.length)
                value = saved.value
                if not isinstance(value, TensorPickle) or value[:2] != (tensor.dtype, chunk.shape):
                    raise ConversionError(
                        f"{path}: at byte {chunk.start} is not the {tensor.dtype.name} "
                        f"tensor of shape {list(chunk.shape)} that .metadata names for {key}"
                    )
                found[key][number] = saved.extent(value)
    return found


class Span(NamedTuple):
    """Bytes of a file."""

    start: int
    length: int


class DistcpFile:
    """A file to be written: `size`, `spans` and `offsets` first, then data, then `finish`."""

    has_checksums = True

    def __init__(self, values: Sequence[Any]) -> None:
        """Lay out the file.

        Args:
            values: What to save one after the other: a NewTensor, or plain values.
        """
        self._values = values
        self.spans = Table(Span, numbers=Span._fields)
        """Where each value will be."""
        self.offsets = array("q")
        """Where each tensor's data starts."""
        self.size = 0
        """Size of the whole file."""
        for value in values:
            start, part = -(-self.size // _ALIGNMENT) * _ALIGNMENT, _part(value)
            self.spans.append(Span(start, part.size))
            self.offsets.extend(start + offset for offset in part.offsets)
            self.size = start + part.size

    def finish(self, descriptor: int, checksums: Sequence[int]) -> None:
        """Write everything but the tensors.

        Args:
            descriptor: The open file.
            checksums: CRC-32 of each tensor's data, in the order of `offsets`.
        """
        remaining = iter(checksums)
        for value, (start, _) in zip(self._values, self.spans, strict=True):
            crcs = [next(remaining)] if isinstance(value, NewTensor) else []
            _part(value).finish(descriptor, crcs, start=start)


def _part(value: Any) -> PtFile:
    return PtFile(value, archive="archive")
