"""Designing a checkpoint of megatron-core's `torch_dist` format, and what goes with its tensors."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ml_convert import torch_dist_metadata
from ml_convert.distcp import DistcpFile
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Rectangle, Rectangles, Stored, matrix, stored_tensors
from ml_convert.ptfile import NewTensor, PtFile
from ml_convert.table import Table
from ml_convert.tensor import Dtype
from ml_convert.torch_dist import BACKENDS, COMMON, CONFIG
from ml_convert.torch_dist_keys import Written, has_extra_state, is_stacked, written
from ml_convert.torch_dist_metadata import (
    METADATA,
    Bytes,
    Chunk,
    Metadata,
    Tensor,
    bytes_table,
    chunk_table,
)
from ml_models.architecture import Architecture
from ml_models.weights import Parameter, parameters

_NO_STATE: list[None] = [None]  # what megatron-core's own linear layers keep as extra state


class _Item(NamedTuple):
    """A parameter to be written."""

    parameter: Parameter
    place: Written
    shape: tuple[int, ...]
    """With padding."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape with an axis of length 1 for each number in its place."""
        return (*(1 for _ in self.place.offsets), *self.shape)


def layout(arch: Architecture, *, padded_vocab_size: int, files: Mapping[str, str]) -> Layout:
    """Describe how a checkpoint of this format stores a model: each parameter is one chunk.

    Args:
        arch: The model.
        padded_vocab_size: Rows of the vocabulary tables.
        files: File of each parameter by name.
    """
    tensors, rectangles = stored_tensors(), Rectangles()
    for index, item in enumerate(_items(arch, padded_vocab_size)):
        name, rows = item.parameter.name, item.parameter.shape[0]
        key = f"{item.place.key}{list(item.place.offsets)}"
        padding = item.shape[0] - rows
        tensors.append(Stored(files.get(name, ""), key, item.shape, name, padding))
        columns = matrix(item.shape)[1]
        rectangles.add(name, Rectangle(index, 0, 0, 0, rows, columns))
    return Layout(tensors=tensors, rectangles=rectangles)


def _items(arch: Architecture, padded_vocab_size: int) -> Iterator[_Item]:
    stacked = is_stacked(arch)
    for parameter in parameters(arch):
        shape = parameter.shape
        if parameter.padded:
            shape = (padded_vocab_size, *shape[1:])
        yield _Item(parameter, written(parameter, arch, stacked=stacked), shape)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The files beside those with tensors."""

    metadata: Metadata
    """What lies where."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """What is not a tensor."""

    def write(self, root: Path) -> None:
        """Write them."""
        (root / METADATA).write_bytes(torch_dist_metadata.dump(self.metadata))
        (root / CONFIG).write_text(json.dumps(BACKENDS))
        file = PtFile(dict(self.common), archive="common")
        with (root / COMMON).open("wb") as opened:
            file.finish(opened.fileno(), [])


def files(sizes: Mapping[str, int], max_bytes: int) -> dict[str, str]:
    """Deal parameters out to files of limited size.

    Args:
        sizes: Bytes of each parameter by name.
        max_bytes: Largest size of a file with more than one.
    """
    found, number, size = {}, 0, 0
    for name, nbytes in sizes.items():
        if size and size + nbytes > max_bytes:
            number, size = number + 1, 0
        found[name], size = f"__0_{number}.distcp", size + nbytes
    return found


class Design(NamedTuple):
    """A checkpoint to be written."""

    files: Mapping[str, DistcpFile]
    companions: Companions


def design(
    arch: Architecture,
    *,
    dtypes: Mapping[str, Dtype],
    padded_vocab_size: int,
    files: Mapping[str, str],
    args: Namespace,
) -> Design:
    """Lay out the files.

    Args:
        arch: The model.
        dtypes: The dtype of each parameter by its name.
        padded_vocab_size: Rows of the vocabulary tables.
        files: File of each parameter by name.
        args: Args of the checkpoint.
    """
    laid_out: dict[str, DistcpFile] = {}
    tensors: dict[str, Tensor] = {}
    objects = bytes_table()
    for file, found in groupby(
        _items(arch, padded_vocab_size), lambda item: files[item.parameter.name]
    ):
        held = list(found)
        with_state = [item for item in held if has_extra_state(item.parameter)]
        values = _values(held, dtypes)
        content = laid_out[file] = DistcpFile([*values, *(_NO_STATE for _ in with_state)])
        for item, span in zip(held, content.spans, strict=False):
            _add_chunk(tensors, item, dtypes[item.parameter.name], _chunk(item, file, *span))
        for item, span in zip(with_state, content.spans[len(held) :], strict=True):
            objects.append(Bytes(item.place.extra_state, file, *span))
    metadata = Metadata(tensors, objects)
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {
            "non_homogeneous_layers": not is_stacked(arch),
            "singleton_local_shards": False,
        },
    }
    return Design(laid_out, Companions(metadata=metadata, common=common))


def _chunk(item: _Item, file: str, start: int, length: int) -> Chunk:
    offsets = (*item.place.offsets, *(0 for _ in item.shape))
    return Chunk(offsets, item.chunk_shape, file, start, length)


def _values(items: Sequence[_Item], dtypes: Mapping[str, Dtype]) -> Iterator[NewTensor]:
    """Yield what to save, the same object for the same shape."""
    known: dict[NewTensor, NewTensor] = {}
    for item in items:
        value = NewTensor(dtypes[item.parameter.name], item.chunk_shape)
        yield known.setdefault(value, value)


def _add_chunk(tensors: dict[str, Tensor], item: _Item, dtype: Dtype, chunk: Chunk) -> None:
    """Add a chunk to the tensor of the whole model that it is a part of."""
    key, shape = item.place.key, (*item.place.sizes, *item.shape)
    tensor = tensors.setdefault(key, Tensor(dtype, shape, chunk_table()))
    if tensor.dtype != dtype:
        raise ConversionError(
            f"{key} would hold weights of {tensor.dtype.name}, and {item.parameter.name}, which is "
            f"{dtype.name}; give --params-dtype"
        )
    assert isinstance(tensor.chunks, Table)
    tensor.chunks.append(chunk)
