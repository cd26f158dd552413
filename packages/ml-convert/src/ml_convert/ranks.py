"""How the ranks of a Megatron-Core checkpoint share a model: which file holds what.

Norms and some biases are on every tensor-parallel rank, and a tied embedding is stored again on the
last pipeline stage: those count as copies of the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ml_convert.layout import Layout, Rectangle, Stored, matrix
from ml_models.architecture import Architecture
from ml_models.weights import (
    EMBEDDING,
    OUTPUT_LAYER,
    Parameter,
    Run,
    local_name,
    shard_runs,
    stage_parameters,
)
from ml_parallel.checkpoint import MODEL_FILE, rank_directory
from ml_parallel.stages import Stages


def layout(
    arch: Architecture, stages: Stages, *, tensor_parallel_size: int, padded_vocab_size: int
) -> Layout:
    """Describe how a checkpoint with these stages and ranks stores a model."""
    tensors: list[Stored] = []
    rectangles: dict[str, list[Rectangle]] = {}
    originals: dict[tuple[str, int], int] = {}  # index by parameter and part of it
    for shard in _shards(arch, stages, tensor_parallel_size):
        parameter = shard.parameter
        shape, runs = shard_runs(
            parameter,
            tp_size=tensor_parallel_size,
            tp_rank=shard.tp_rank,
            padded_vocab_size=padded_vocab_size,
        )
        held = EMBEDDING if _is_tied_copy(arch, parameter) else parameter.name
        part = (held, 0 if parameter.split is None else shard.tp_rank)
        padding = shape[0] - sum(run.length for run in runs) if parameter.padded else 0
        original = originals.get(part)
        tensors.append(Stored(shard.file, shard.name, shape, held, padding, original))
        index = len(tensors) - 1
        originals.setdefault(part, index)
        found = (_rectangle(index, parameter, shape, run) for run in runs)
        rectangles.setdefault(held, []).extend(found)
    return Layout(
        tensors=tuple(tensors),
        rectangles={name: tuple(found) for name, found in rectangles.items()},
    )


class _Shard(NamedTuple):
    file: str
    name: str
    parameter: Parameter
    tp_rank: int


def _shards(arch: Architecture, stages: Stages, tp_size: int) -> Iterator[_Shard]:
    """List what every rank stores, rank by rank."""
    last = (len(stages) - 1, len(stages[-1]) - 1)
    for (pp_rank, chunks), tp_rank in product(enumerate(stages), range(tp_size)):
        file = rank_file(tp_rank=tp_rank, pp_rank=pp_rank, pp_size=len(stages))
        for number, layers in enumerate(chunks):
            is_first, is_last = (pp_rank, number) == (0, 0), (pp_rank, number) == last
            key = chunk_key(number, len(chunks))
            for parameter in stage_parameters(arch, layers, first=is_first, last=is_last):
                name = local_name(parameter.name, first_layer=layers.start)
                yield _Shard(file, f"{key}.{name}", parameter, tp_rank)


def _is_tied_copy(arch: Architecture, parameter: Parameter) -> bool:
    return parameter.name == OUTPUT_LAYER and not arch.untie_embeddings_and_output_weights


def _rectangle(tensor: int, parameter: Parameter, shape: Sequence[int], run: Run) -> Rectangle:
    """Turn a run of indices along the dimension that is cut into a rectangle."""
    rows, columns = matrix(shape)
    if parameter.split is not None and parameter.split.dim == 1:
        return Rectangle(tensor, 0, 0, run.global_start, rows, run.length)
    return Rectangle(tensor, run.local_start, run.global_start, 0, run.length, columns)


def rank_file(*, tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """Return the path of a rank's file within a checkpoint."""
    directory = rank_directory(tp_rank=tp_rank, pp_rank=pp_rank, pp_size=pp_size)
    return f"{directory}/{MODEL_FILE}"


def chunk_key(chunk: int, chunks: int) -> str:
    """Return the key of a chunk's tensors in a rank's file."""
    return "model" if chunks == 1 else f"model{chunk}"
