"""How the ranks of a Megatron checkpoint share a model: which file holds what.

Norms and some biases are on every tensor-parallel rank, everything but experts is on every
expert-parallel rank, and a tied embedding is stored again on the last pipeline stage: those count
as copies of the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_convert import legacy
from ml_convert.dialects import Dialect, Home, Share
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout, Place, Rectangle, Rectangles, Stored, matrix, stored_tensors
from ml_models.architecture import Architecture
from ml_models.weights import (
    EMBEDDING,
    OUTPUT_LAYER,
    Parameter,
    Run,
    expert_range,
    local_name,
    shard_runs,
    stage_parameters,
)
from ml_parallel.checkpoint import MODEL_FILE, rank_directory
from ml_parallel.stages import Stages

LOCAL_SPEC = Dialect()


def layout(
    arch: Architecture,
    stages: Stages,
    *,
    tensor_parallel_size: int,
    padded_vocab_size: int,
    expert_parallel_size: int = 1,
    dialect: Dialect = LOCAL_SPEC,
) -> Layout:
    """Describe how a checkpoint with these stages and ranks stores a model.

    Raises:
        ConversionError: The dialect has no place for a parameter, or the ranks for an expert.
    """
    dialect.check(arch)
    building = _Building(arch, dialect, tensor_parallel_size, padded_vocab_size)
    try:
        experts = [
            expert_range(arch, ep_rank=ep_rank, ep_size=expert_parallel_size)
            for ep_rank in range(expert_parallel_size)
        ]
        for chunk in _chunks(stages, tensor_parallel_size, experts):
            for parameter in stage_parameters(
                arch, chunk.layers, first=chunk.is_first, last=chunk.is_last
            ):
                building.add(parameter, chunk)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from None
    return Layout(tensors=building.tensors, rectangles=building.rectangles)


class _Chunk(NamedTuple):
    """A chunk of a pipeline stage, on all of its ranks."""

    key: str
    """Its key in a file."""
    layers: range
    is_first: bool
    is_last: bool
    experts: list[range]
    """Global numbers of the experts of each expert-parallel rank."""
    files: list[list[str]]
    """[tp_rank][ep_rank] -> file."""


def _chunks(stages: Stages, tp_size: int, experts: list[range]) -> Iterator[_Chunk]:
    last = (len(stages) - 1, len(stages[-1]) - 1)
    for pp_rank, chunks in enumerate(stages):
        files = [
            [
                rank_file(
                    tp_rank=tp_rank,
                    pp_rank=pp_rank,
                    pp_size=len(stages),
                    ep_rank=ep_rank,
                    ep_size=len(experts),
                )
                for ep_rank in range(len(experts))
            ]
            for tp_rank in range(tp_size)
        ]
        for number, layers in enumerate(chunks):
            place = (pp_rank, number)
            key = chunk_key(number, len(chunks))
            yield _Chunk(key, layers, place == (0, 0), place == last, experts, files)


class _Building:
    """A layout that grows parameter by parameter.

    What the ranks have in common is worked out once: large models have thousands of ranks.
    """

    def __init__(
        self, arch: Architecture, dialect: Dialect, tp_size: int, padded_vocab_size: int
    ) -> None:
        self.tensors = stored_tensors()
        self.rectangles = Rectangles()
        self._arch, self._dialect = arch, dialect
        self._tp_size, self._padded_vocab_size = tp_size, padded_vocab_size
        self._shared: dict[tuple[str, str], int] = {}  # tensors of several parameters
        self._embeddings: dict[tuple[int, int], int] = {}

    def add(self, parameter: Parameter, chunk: _Chunk) -> None:
        """Add what all ranks store of a parameter of this chunk."""
        parameter = self._dialect.whole(parameter)
        cuts = [self._cut(parameter, tp_rank) for tp_rank in range(self._tp_size)]
        shape = cuts[0][0]
        ep_ranks, experts = _owners(parameter, chunk.experts)
        name = local_name(
            parameter.name, first_layer=chunk.layers.start, first_expert=experts.start
        )
        is_copy = _is_tied_copy(self._arch, parameter)
        share = Share(parameter, name, shape, experts)
        held = EMBEDDING if is_copy else parameter.name
        originals = self._embeddings if held == EMBEDDING else {}  # by rank and first row
        for home in self._homes(share, is_copy=is_copy):
            full = home._replace(name=f"{chunk.key}.{home.name}")
            for tp_rank, (_, runs) in enumerate(cuts):
                padding = shape[0] - sum(run.length for run in runs) if parameter.padded else 0
                stored = Stored("", full.name, full.shape, held, padding)
                part = (0 if parameter.split is None else tp_rank, full.first)
                rectangles = list(_rectangles(full, parameter, shape, runs))
                for ep_rank in ep_ranks:
                    is_shared = full.stack is not None or full.rows != full.shape[0]
                    stored = stored._replace(file=chunk.files[tp_rank][ep_rank])
                    original = originals.get(part)
                    index = self._index(stored, original, is_shared=is_shared)
                    originals.setdefault(part, index)
                    for rectangle in rectangles:
                        self.rectangles.add(held, rectangle._replace(tensor=index))

    def _cut(self, parameter: Parameter, tp_rank: int) -> tuple[tuple[int, ...], tuple[Run, ...]]:
        return shard_runs(
            parameter,
            tp_size=self._tp_size,
            tp_rank=tp_rank,
            padded_vocab_size=self._padded_vocab_size,
        )

    def _homes(self, share: Share, *, is_copy: bool) -> Iterator[Home]:
        if is_copy and self._dialect.legacy:
            yield Home(legacy.TIED_OUTPUT_LAYER, share.shape, 0, share.shape[0])
        else:
            yield from self._dialect.homes(self._arch, share)

    def _index(self, stored: Stored, original: int | None, *, is_shared: bool) -> int:
        """Return the index of a stored tensor, which may be there already."""
        key = (stored.file, stored.name)
        if is_shared and key in self._shared:
            return self._shared[key]
        index = len(self.tensors)
        if is_shared:
            self._shared[key] = index
        self.tensors.append(stored._replace(copy_of=original))
        return index


def _owners(parameter: Parameter, experts: list[range]) -> tuple[Sequence[int], range]:
    """Tell which expert-parallel ranks have a parameter, and the experts of the first one."""
    if parameter.expert is None:
        return range(len(experts)), experts[0]
    ep_rank = parameter.expert // len(experts[0])
    return (ep_rank,), experts[ep_rank]


def _is_tied_copy(arch: Architecture, parameter: Parameter) -> bool:
    return parameter.name == OUTPUT_LAYER and not arch.untie_embeddings_and_output_weights


def _rectangles(
    home: Home, parameter: Parameter, shape: Sequence[int], runs: Sequence[Run]
) -> Iterator[Rectangle]:
    """Turn the runs of a share, as far as they are in a stored tensor, into rectangles of it."""
    rows, columns = matrix(shape)
    if parameter.split is not None and parameter.split.dim == 1:
        (run,) = runs
        yield _rectangle(home, 0, Rectangle(0, 0, 0, run.global_start, rows, columns))
        return
    for run in runs:
        start = max(run.local_start, home.first)
        stop = min(run.local_start + run.length, home.first + home.rows)
        if start < stop:
            row = run.global_start + start - run.local_start
            part = Rectangle(0, 0, row, 0, stop - start, columns)
            yield _rectangle(home, start - home.first, part)


def _rectangle(home: Home, row: int, part: Rectangle) -> Rectangle:
    """Place a part of a parameter that begins at a row of what a stored tensor holds of it."""
    if home.stack is None:
        return part._replace(row=home.row + row)
    entry, entries = home.stack
    view = (entries, part.columns, home.rows)
    return part._replace(place=Place(view, (entry, 0, row), row_axis=2, column_axis=1))


def rank_file(
    *, tp_rank: int, pp_rank: int, pp_size: int, ep_rank: int = 0, ep_size: int = 1
) -> str:
    """Return the path of a rank's file within a checkpoint."""
    directory = rank_directory(
        tp_rank=tp_rank, pp_rank=pp_rank, pp_size=pp_size, ep_rank=ep_rank, ep_size=ep_size
    )
    return f"{directory}/{MODEL_FILE}"


def chunk_key(chunk: int, chunks: int) -> str:
    """Return the key of a chunk's tensors in a rank's file."""
    return "model" if chunks == 1 else f"model{chunk}"
