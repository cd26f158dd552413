"""Designing a checkpoint before it is written: its files, their sizes, and every offset in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_convert import companions, huggingface, megatron_args, ranks
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.plan import Checkpoint
from ml_convert.ptfile import NewTensor, PtFile
from ml_convert.request import Request
from ml_convert.safetensors_file import SafetensorsFile
from ml_convert.source import Source
from ml_convert.tensor import Dtype, Extent
from ml_models.families.family import Family


class Content(Protocol):
    """A file whose structure is known before its data."""

    has_checksums: bool
    size: int
    offsets: list[int]

    def finish(self, descriptor: int, checksums: Sequence[int]) -> None:
        """Write everything but the tensors."""


class NewFile(NamedTuple):
    """A file with tensors, to be written."""

    name: str
    """Path within the checkpoint."""
    content: Content
    tensors: tuple[int, ...]
    """Its tensors as indices into the layout, in the order of the content's offsets."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A checkpoint to be written."""

    layout: Layout
    """Which part of which parameter each stored tensor holds."""
    dtypes: tuple[Dtype, ...]
    """Dtype of each stored tensor."""
    files: tuple[NewFile, ...]
    """The files that hold them."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name."""
        return {file.name: file.content.size for file in self.files}

    @property
    def has_checksums(self) -> bool:
        """Whether the files store the CRC-32 of tensors."""
        return any(file.content.has_checksums for file in self.files)

    def checkpoint(self, root: Path) -> Checkpoint:
        """Tell where every tensor will lie when the files are written under this directory."""
        extents: dict[int, Extent] = {}
        for file in self.files:
            for index, offset in zip(file.tensors, file.content.offsets, strict=True):
                shape = self.layout.tensors[index].shape
                extents[index] = Extent(root / file.name, offset, self.dtypes[index], shape)
        ordered = tuple(extents[index] for index in range(len(self.layout.tensors)))
        return Checkpoint(layout=self.layout, extents=ordered)


def design(request: Request, source: Source) -> Target:
    """Design what a request asks for.

    Raises:
        ConversionError: The model cannot be cut this way, or belongs to no known family.
    """
    if request.save_format == "hf":
        return _hugging_face(request, source)
    return _megatron(request, source)


def family_of(source: Source) -> Family:
    """Find the family to export as.

    Raises:
        ConversionError: Nobody says it.
    """
    if source.family is None:
        raise ConversionError(
            f"{source.path}: does not say which model family it is of; "
            "give --model-type-hf, or --hf-config"
        )
    return source.family


def _dtypes(layout: Layout, request: Request, source: Source) -> tuple[Dtype, ...]:
    """Give the dtype of each stored tensor: the one asked for, or that of its parameter."""
    kept = source.checkpoint.dtypes
    return tuple(request.dtype or kept[stored.parameter] for stored in layout.tensors)


# Megatron


def _megatron(request: Request, source: Source) -> Target:
    """One file for each rank."""
    padded = request.padded_vocab_size(source.arch)
    layout = ranks.layout(
        source.arch,
        request.stages(source.arch),
        tensor_parallel_size=request.target_tensor_parallel_size,
        padded_vocab_size=padded,
    )
    dtypes = _dtypes(layout, request, source)
    args = megatron_args.namespace(
        source.arch,
        request.topology,
        dtype=dtypes[0],
        padded_vocab_size=padded,
        make_vocab_size_divisible_by=request.make_vocab_size_divisible_by,
        family=source.family.name if source.family else None,
        inherited=source.args,
    )
    files = []
    for name, tensors in _by_file(layout).items():
        content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        for index in tensors:
            stored = layout.tensors[index]
            chunk, _, tensor = stored.name.partition(".")
            content.setdefault(chunk, {})[tensor] = NewTensor(dtypes[index], stored.shape)
        files.append(NewFile(name, PtFile(content, archive=Path(name).stem), tensors))
    return Target(layout=layout, dtypes=dtypes, files=tuple(files))


# Hugging Face


def _hugging_face(request: Request, source: Source) -> Target:
    """Files of limited size, in the order of the model."""
    family = family_of(source)
    whole = huggingface.layout(family, source.arch, {})
    dtypes = _dtypes(whole, request, source)
    sizes = {
        stored.name: math.prod(stored.shape) * dtype.itemsize
        for stored, dtype in zip(whole.tensors, dtypes, strict=True)
    }
    shards = companions.shards(sizes, request.max_shard_bytes)
    layout = huggingface.layout(family, source.arch, shards)
    files = []
    for name, tensors in _by_file(layout).items():
        content = {layout.tensors[i].name: (dtypes[i], layout.tensors[i].shape) for i in tensors}
        files.append(NewFile(name, SafetensorsFile(content), tensors))
    return Target(layout=layout, dtypes=dtypes, files=tuple(files))


def _by_file(layout: Layout) -> dict[str, tuple[int, ...]]:
    """List the tensors of each file, in order; chunks of a Megatron file stay together."""
    found: dict[str, list[int]] = {}
    for index, stored in enumerate(layout.tensors):
        found.setdefault(stored.file, []).append(index)
    return {file: tuple(indices) for file, indices in found.items()}
