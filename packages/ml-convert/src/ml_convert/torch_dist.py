"""Checkpoints of megatron-core's `torch_dist` format: tensors of the whole model, in chunks.

    <root>/latest_checkpointed_iteration.txt
    <root>/iter_0000100/.metadata         which tensor lies in which file, and where
    <root>/iter_0000100/metadata.json     name and version of the format
    <root>/iter_0000100/common.pt         args, and what else is not a tensor
    <root>/iter_0000100/__0_0.distcp      chunks of tensors

A chunk counts as a stored tensor, whose axes that run over layers and experts are part of its rows.
"""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ml_convert import distcp, megatron_args, ptfile, torch_dist_metadata
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Rectangle, Rectangles, Stored, matrix, stored_tensors
from ml_convert.plan import Checkpoint
from ml_convert.source import Source
from ml_convert.tensor import Extent, extent_table
from ml_convert.torch_dist_keys import Key, parse
from ml_convert.torch_dist_metadata import METADATA, Chunk, Metadata, Tensor
from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.weights import EMBEDDING, Parameter, parameters
from ml_parallel import checkpoint as directories
from ml_parallel.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

COMMON = "common.pt"
CONFIG = "metadata.json"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_TRAINING = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")


def is_torch_dist(directory: Path) -> bool:
    """Tell whether a directory is a checkpoint of this format."""
    return (directory / METADATA).is_file()


def open_checkpoint(
    directory: Path,
    *,
    default: Architecture | None,
    true_vocab_size: int | None,
    hashes: bool = False,
) -> Source:
    """Open one checkpoint.

    Args:
        directory: Holds `.metadata`.
        default: Description to use where `args` say nothing.
        true_vocab_size: Vocabulary without padding, if it is known better.
        hashes: Check the content against the manifest, if there is one.

    Raises:
        ConversionError: It is damaged, incomplete, or of a kind that is not supported.
    """
    _check_manifest(directory, hashes=hashes)
    _check_backends(directory)
    args = _args(directory)
    metadata = torch_dist_metadata.read(directory)
    arch = megatron_args.architecture(args, default, str(directory))
    arch = replace(arch, vocab_size=true_vocab_size or arch.vocab_size)
    wanted = {key: parse(key) for key in _weights(metadata, directory)}
    _check_vocab_size(arch, metadata, wanted, directory)
    return Source(
        path=directory,
        arch=arch,
        family=registry.find(getattr(args, "model_family", None)),
        checkpoint=_checkpoint(directory, metadata, wanted, arch),
        args=args,
    )


def _check_manifest(directory: Path, *, hashes: bool) -> None:
    try:
        if directories.read_manifest(directory) is not None:
            directories.verify(directory, hashes=hashes)
    except CheckpointError as error:
        raise ConversionError(f"{error}; choose another checkpoint with --iteration") from None


def _check_backends(directory: Path) -> None:
    path = directory / CONFIG
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return  # of torch.distributed itself
    except ValueError as error:
        raise ConversionError(f"{path}: no JSON ({error})") from None
    for name, supported in BACKENDS.items():
        if not isinstance(found, dict) or found.get(name, supported) != supported:
            value = found.get(name) if isinstance(found, dict) else found
            raise ConversionError(f"{path}: {name} is {value!r}; {supported!r} is supported")


def _args(directory: Path) -> Namespace:
    path = directory / COMMON
    if not path.is_file():
        raise ConversionError(f"{path}: missing")
    content = ptfile.read(path).value
    args = content.get("args") if isinstance(content, dict) else None
    return args if isinstance(args, Namespace) else Namespace()


def _weights(metadata: Metadata, directory: Path) -> list[str]:
    """List the keys of tensors that are weights."""
    found = [key for key in metadata.tensors if not key.startswith(_TRAINING)]
    ignored = len(metadata.tensors) - len(found)
    if ignored:
        logger.warning(
            "%s: %d tensors of the optimizer and the like are not converted", directory, ignored
        )
    return found


def _check_vocab_size(
    arch: Architecture, metadata: Metadata, wanted: Mapping[str, Key], directory: Path
) -> None:
    tables = (metadata.tensors[key] for key, parsed in wanted.items() if parsed.name == EMBEDDING)
    table = next(tables, None)
    if table is None or not table.shape:
        raise ConversionError(f"{directory}: {EMBEDDING} is missing")
    if not 0 < arch.vocab_size <= table.shape[0]:
        raise ConversionError(
            f"{directory}: args do not say how many of the {table.shape[0]} rows of the vocabulary "
            "are padding; give --true-vocab-size, or --hf-config"
        )


# Chunks and parameters


def _checkpoint(
    directory: Path, metadata: Metadata, wanted: Mapping[str, Key], arch: Architecture
) -> Checkpoint:
    """Describe every chunk as a stored tensor."""
    building = _Building(directory, arch)
    extents = distcp.tensors(directory, metadata, wanted)
    for key, parsed in wanted.items():
        building.add(key, parsed, metadata.tensors[key], extents[key])
    return building.checkpoint()


class _Part(NamedTuple):
    """What a chunk holds of one parameter."""

    parameter: Parameter
    row: int
    """First row in the chunk."""


class _Building:
    """A layout that grows key by key."""

    def __init__(self, directory: Path, arch: Architecture) -> None:
        self._directory, self._arch = directory, arch
        self._table = {parameter.name: parameter for parameter in parameters(arch)}
        self._tensors = stored_tensors()
        self._extents = extent_table()
        self._rectangles = Rectangles()

    def add(self, key: str, parsed: Key, tensor: Tensor, extents: Sequence[Extent]) -> None:
        """Add the chunks of a stored tensor."""
        self._check_shape(key, parsed, tensor)
        for chunk, extent in zip(tensor.chunks, extents, strict=True):
            self._add_chunk(key, parsed, chunk, extent)

    def checkpoint(self) -> Checkpoint:
        """Finish.

        Raises:
            ConversionError: Nothing holds some parameter.
        """
        missing = [name for name in self._table if name not in self._rectangles]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise ConversionError(f"{self._directory}: {missing[0]}{more} missing")
        layout = Layout(tensors=self._tensors, rectangles=self._rectangles)
        return Checkpoint(layout=layout, extents=self._extents)

    def _check_shape(self, key: str, parsed: Key, tensor: Tensor) -> None:
        """Check that a stored tensor has the shape that the model's description asks for."""
        counts = {"layer": self._arch.num_layers, "expert": self._arch.num_experts or 0}
        sizes = tuple(counts[axis] for axis in parsed.axes)
        numbers = (0,) * len(sizes)
        parameter = self._table.get(parsed.parameter(numbers))
        if parameter is None:
            raise ConversionError(f"{self._directory}: {key} is not part of this model")
        rows, *columns = parameter.shape
        expected = (*sizes, rows // 2 if parsed.half is not None else rows, *columns)
        found = tensor.shape
        if parameter.padded and len(found) == 2 and found[0] >= rows:
            expected = (found[0], *columns)
        if found != expected:
            raise ConversionError(
                f"{self._directory}: {key} has shape {list(found)}, the model's description asks "
                f"for {list(expected)}"
            )

    def _add_chunk(self, key: str, parsed: Key, chunk: Chunk, extent: Extent) -> None:
        count = len(parsed.axes)
        offsets, shape = chunk.offsets[count:], chunk.shape[count:]
        ranges = zip(chunk.offsets[:count], chunk.shape[:count], strict=True)
        numbers = product(*(range(start, start + length) for start, length in ranges))
        named = (self._table[parsed.parameter(found)] for found in numbers)
        parts = [_Part(parameter, index * shape[0]) for index, parameter in enumerate(named)]
        stacked = (len(parts) * shape[0], *shape[1:])
        name = f"{key}{list(chunk.offsets)}"
        true_rows = self._rows(parts[0].parameter, parsed, offsets[0], shape[0])
        padding = shape[0] - true_rows if parts[0].parameter.padded else 0
        index = len(self._tensors)
        self._tensors.append(Stored(chunk.file, name, stacked, parts[0].parameter.name, padding))
        self._extents.append(extent._replace(shape=stacked))
        columns, column = math.prod(shape[1:]), offsets[1] if len(offsets) > 1 else 0
        for part in parts:
            first = offsets[0] + self._first_row(part.parameter, parsed)
            if true_rows:
                rectangle = Rectangle(index, part.row, first, column, true_rows, columns)
                self._rectangles.add(part.parameter.name, rectangle)

    def _rows(self, parameter: Parameter, parsed: Key, first: int, rows: int) -> int:
        """Count the rows of a chunk that are not padding."""
        whole = parameter.shape[0] // (2 if parsed.half is not None else 1)
        return max(0, min(rows, whole - first))

    def _first_row(self, parameter: Parameter, parsed: Key) -> int:
        return (parsed.half or 0) * matrix(parameter.shape)[0] // 2
