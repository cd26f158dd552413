"""Designing a checkpoint before it is written: its files, their sizes, and every offset in them."""

from __future__ import annotations

import math
from argparse import Namespace
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_convert import (
    companions,
    huggingface,
    legacy,
    lora_peft,
    lora_target,
    megatron_args,
    ranks,
    torch_dist_target,
)
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.lora import Adapter
from ml_convert.plan import Checkpoint
from ml_convert.ptfile import NewTensor, PtFile
from ml_convert.request import Request
from ml_convert.safetensors_file import SafetensorsFile
from ml_convert.source import Source
from ml_convert.tensor import Dtype, Extent, extent_table
from ml_models.families.family import Family
from ml_models.weights import parameters


class Content(Protocol):
    """A file whose structure is known before its data."""

    has_checksums: bool
    size: int

    @property
    def offsets(self) -> Sequence[int]:
        """Where each tensor's data starts."""

    def finish(self, descriptor: int, checksums: Sequence[int]) -> None:
        """Write everything but the tensors."""


class Companions(Protocol):
    """Files that go with those that hold tensors."""

    def write(self, root: Path) -> None:
        """Write them."""


class NewFile(NamedTuple):
    """A file with tensors, to be written."""

    name: str
    """Path within the checkpoint."""
    content: Content
    tensors: Sequence[int]
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
    beside: Companions | None = None
    """What goes with them, if anything."""

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
        paths = {file.name: root / file.name for file in self.files}
        offsets = array("q", bytes(8 * len(self.dtypes)))
        for file in self.files:
            for index, offset in zip(file.tensors, file.content.offsets, strict=True):
                offsets[index] = offset
        extents = (
            Extent(paths[stored.file], offset, dtype, stored.shape)
            for stored, offset, dtype in zip(self.layout.tensors, offsets, self.dtypes, strict=True)
        )
        return Checkpoint(layout=self.layout, extents=extent_table(extents))


def design(request: Request, source: Source) -> Target:
    """Design what a request asks for.

    Raises:
        ConversionError: The model cannot be cut this way, or belongs to no known family.
    """
    if source.adapter is not None:
        return _adapter(request, source, source.adapter)
    if request.save_format == "hf":
        return _hugging_face(request, source)
    if request.save_format == "torch_dist":
        return _torch_dist(request, source)
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
    """Give the dtype of each stored tensor: the one asked for, or that of its parameter.

    Parameters that are float32 in models of any dtype stay what they are.
    """
    kept = source.checkpoint.dtypes
    exempt = {parameter.name for parameter in parameters(source.arch) if parameter.float32}
    wanted = {n: kept[n] if n in exempt else request.dtype or kept[n] for n in layout.rectangles}
    for name, rectangles in layout.rectangles.items():
        for index in dict.fromkeys(rectangle.tensor for rectangle in rectangles):
            stored = layout.tensors[index]
            if wanted[name] != wanted[stored.parameter]:
                raise ConversionError(
                    f"{stored.name} would hold {stored.parameter}, which is "
                    f"{wanted[stored.parameter].name}, and {name}, which is {wanted[name].name}; "
                    "give --params-dtype"
                )
    return tuple(wanted[stored.parameter] for stored in layout.tensors)


# Megatron


def _megatron(request: Request, source: Source) -> Target:
    """One file for each rank."""
    padded = request.padded_vocabulary(source.arch)
    layout = ranks.layout(
        source.arch,
        request.stages(source.arch),
        tensor_parallel_size=request.target_tensor_parallel_size,
        padded_vocab_size=padded,
        expert_parallel_size=request.target_expert_parallel_size,
        dialect=request.dialect,
    )
    layout = replace(layout, repeats_last_row=request.pad_vocab == "last-row")
    dtypes = _dtypes(layout, request, source)
    args = _args(request, source, dtypes[0])
    return Target(layout=layout, dtypes=dtypes, files=_rank_files(request, layout, dtypes, args))


def _rank_files(
    request: Request, layout: Layout, dtypes: Sequence[Dtype], args: Namespace
) -> tuple[NewFile, ...]:
    files = []
    for name, tensors in _by_file(layout).items():
        content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        for index in tensors:
            stored = layout.tensors[index]
            *parents, last = _path(stored.name, is_legacy=request.dialect.legacy)
            parent = content
            for key in parents:
                parent = parent.setdefault(key, {})
            parent[last] = NewTensor(dtypes[index], stored.shape)
        files.append(NewFile(name, PtFile(content, archive=Path(name).stem), tensors))
    return tuple(files)


def _args(request: Request, source: Source, dtype: Dtype) -> Namespace:
    padded, divisible_by = request.padded_vocab_size, request.make_vocab_size_divisible_by
    if padded is not None:  # say it so that Megatron comes to the same number
        divisible_by = padded // request.target_tensor_parallel_size
    return megatron_args.namespace(
        source.arch,
        request.topology,
        dtype=dtype,
        padded_vocab_size=request.padded_vocabulary(source.arch),
        make_vocab_size_divisible_by=divisible_by,
        family=source.family.name if source.family else None,
        inherited=companions.token_ids(source.config) if source.is_hugging_face else source.args,
        dialect=request.dialect,
    )


def _torch_dist(request: Request, source: Source) -> Target:
    """Files of limited size, in the order of the model."""
    padded = request.padded_vocabulary(source.arch)
    request.stages(source.arch)
    whole = torch_dist_target.layout(source.arch, padded_vocab_size=padded, files={})
    dtypes = {
        stored.parameter: dtype
        for stored, dtype in zip(whole.tensors, _dtypes(whole, request, source), strict=True)
    }
    sizes = {
        stored.parameter: math.prod(stored.shape) * dtypes[stored.parameter].itemsize
        for stored in whole.tensors
    }
    files = torch_dist_target.files(sizes, request.max_shard_bytes)
    layout = torch_dist_target.layout(source.arch, padded_vocab_size=padded, files=files)
    layout = replace(layout, repeats_last_row=request.pad_vocab == "last-row")
    args = _args(request, source, next(iter(dtypes.values())))
    contents, beside = torch_dist_target.design(
        source.arch, dtypes=dtypes, padded_vocab_size=padded, files=files, args=args
    )
    new = (NewFile(name, contents[name], found) for name, found in _by_file(layout).items())
    ordered = tuple(dtypes[stored.parameter] for stored in layout.tensors)
    return Target(layout=layout, dtypes=ordered, files=tuple(new), beside=beside)


def _path(name: str, *, is_legacy: bool) -> tuple[str, ...]:
    """Return the keys that lead to a tensor in a rank's file."""
    chunk, _, tensor = name.partition(".")
    return (chunk, *(legacy.path(tensor) if is_legacy else (tensor,)))


# Adapters


def _adapter(request: Request, source: Source, adapter: Adapter) -> Target:
    """The adapter by itself."""
    layout, config = lora_target.form(request, source)
    dtypes = _dtypes(layout, request, source)
    if config is not None:
        stored = zip(layout.tensors, dtypes, strict=True)
        content = SafetensorsFile({tensor.name: (dtype, tensor.shape) for tensor, dtype in stored})
        files = (NewFile(lora_peft.WEIGHTS, content, range(len(layout.tensors))),)
        return Target(layout=layout, dtypes=dtypes, files=files, beside=config)
    args = lora_target.with_settings(
        _args(request, source, dtypes[0]), adapter, is_legacy=request.dialect.legacy
    )
    return Target(layout=layout, dtypes=dtypes, files=_rank_files(request, layout, dtypes, args))


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


def _by_file(layout: Layout) -> dict[str, array[int]]:
    """List the tensors of each file, in order; chunks of a Megatron file stay together."""
    found: dict[str, array[int]] = {}
    for index, stored in enumerate(layout.tensors):
        found.setdefault(stored.file, array("q")).append(index)
    return found
