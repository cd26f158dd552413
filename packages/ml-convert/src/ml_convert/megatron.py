"""Megatron checkpoints, of Megatron-Core or Megatron-Legacy: one file for each rank.

    <root>/latest_checkpointed_iteration.txt
    <root>/iter_0000100/mp_rank_00_001/model_optim_rng.pt      tensor rank 0, pipeline stage 1

How a checkpoint was cut, and in which dialect, is found out from its files, so any tensor,
pipeline and expert-parallel size, layer list or interleaving can be read.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from ml_convert import legacy, megatron_args
from ml_convert.binding import Found, bind
from ml_convert.dialects import Dialect, recognize
from ml_convert.errors import ConversionError
from ml_convert.rank_files import Coordinates, RankFiles, holds_adapter, read_ranks
from ml_convert.ranks import chunk_key, layout
from ml_convert.source import Source
from ml_convert.tensor import Extent
from ml_convert.torch_dist import is_torch_dist
from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.families.family import Family
from ml_models.weights import EMBEDDING
from ml_parallel import checkpoint as directories
from ml_parallel.checkpoint import CheckpointError
from ml_parallel.stages import Stages

_LAYER = re.compile(rf"(?:decoder|{legacy.ROOT}\.encoder)\.layers\.(\d+)\.")


def is_megatron(path: Path) -> bool:
    """Tell whether a directory looks like Megatron checkpoints, or like one of them."""
    return bool(directories.candidates(path)) or any(path.glob("mp_rank_*")) or is_torch_dist(path)


def checkpoint_directory(root: Path, iteration: int | None) -> Path:
    """Find the directory of one checkpoint.

    Args:
        root: A directory of checkpoints, or one of them.
        iteration: Which; None for the one the tracker names.

    Raises:
        ConversionError: There is none.
    """
    if any(root.glob("mp_rank_*")) or is_torch_dist(root):
        return root
    try:
        directories.read_tracker(root)
    except CheckpointError as error:
        raise ConversionError(f"{error}; choose a checkpoint with --iteration") from None
    found = directories.candidates(root)
    if iteration is not None:
        name = directories.iteration_directory(iteration)
        if root / name not in found:
            names = ", ".join(sorted(path.name for path in found)) or "nothing"
            raise ConversionError(f"--iteration {iteration}: {root} holds {names}, not {name}")
        return root / name
    if not found:
        raise ConversionError(f"{root}: holds no Megatron checkpoint")
    return found[0]


def open_checkpoint(
    directory: Path,
    *,
    default: Architecture | None,
    true_vocab_size: int | None,
    kind: str = "auto",
    hashes: bool = False,
) -> Source:
    """Open one checkpoint.

    Args:
        directory: Holds mp_rank_* directories.
        default: Description to use where `args` say nothing.
        true_vocab_size: Vocabulary without padding, if it is known better.
        kind: What it has to be: legacy, mcore, or auto for either.
        hashes: Check the content against the manifest, if there is one.

    Raises:
        ConversionError: It is damaged, incomplete, or of a kind that is not supported.
    """
    try:
        directories.verify(directory, hashes=hashes, only=directories.MODEL_FILE)
    except CheckpointError as error:
        raise ConversionError(f"{error}; choose another checkpoint with --iteration") from None
    if is_torch_dist(directory):
        raise ConversionError(f"{directory}: is of the format torch_dist, not of one file per rank")
    files = read_ranks(directory)
    arch = megatron_args.architecture(files.args, default, str(directory))
    arch = replace(arch, vocab_size=true_vocab_size or arch.vocab_size)
    dialect = recognize(_names(files), arch)
    _check_kind(dialect, kind, directory)
    padded = _padded_vocab_size(files, dialect)
    _check_vocab_size(arch, padded, directory)
    expected = layout(
        arch,
        _stages(files, arch.num_layers),
        tensor_parallel_size=files.sizes.tp_rank,
        padded_vocab_size=padded,
        expert_parallel_size=files.sizes.ep_rank,
        dialect=dialect,
    )
    return Source(
        path=directory,
        arch=arch,
        family=_family(files.args),
        checkpoint=bind(expected, _found(files), directory),
        args=files.args,
        rank_files=files if holds_adapter(files) else None,
    )


def _check_kind(dialect: Dialect, kind: str, directory: Path) -> None:
    found = "legacy" if dialect.legacy else "mcore"
    if kind not in ("auto", found):
        raise ConversionError(f"{directory}: is of the format {found}, not {kind}")


def _family(args: Namespace) -> Family | None:
    return registry.find(getattr(args, "model_family", None))


def _names(files: RankFiles) -> Iterable[str]:
    return (name for rank in files.ranks.values() for chunk in rank.chunks for name in chunk)


def _found(files: RankFiles) -> Found:
    """List the tensors of all ranks by file and name."""
    return {
        files.file(coordinates): {
            f"{chunk_key(number, len(rank.chunks))}.{name}": extent
            for number, chunk in enumerate(rank.chunks)
            for name, extent in chunk.items()
        }
        for coordinates, rank in files.ranks.items()
    }


def _padded_vocab_size(files: RankFiles, dialect: Dialect) -> int:
    """Add up the rows of the embedding over the tensor-parallel ranks."""
    name = legacy.name(EMBEDDING) if dialect.legacy else EMBEDDING
    assert name is not None
    rows: list[int] = []
    for tp_rank in range(files.sizes.tp_rank):
        rank = files.ranks[Coordinates(tp_rank, 0, 0)]
        table = rank.chunks[0].get(name)
        if table is None or not table.shape:
            raise ConversionError(f"{rank.path}: {name} is missing")
        rows.append(table.shape[0])
        if rows[-1] != rows[0]:
            raise ConversionError(
                f"{rank.path}: {name} has {rows[-1]} rows, but {rows[0]} on the first rank"
            )
    return sum(rows)


def _check_vocab_size(arch: Architecture, padded: int, directory: Path) -> None:
    if not 0 < arch.vocab_size <= padded:
        raise ConversionError(
            f"{directory}: args do not say how many of the {padded} rows of the vocabulary are "
            "padding; give --true-vocab-size, or --hf-config"
        )


def _stages(files: RankFiles, num_layers: int) -> Stages:
    """Number the layers of each chunk: the first chunks of all stages, then the second, ..."""
    ranks = [files.ranks[Coordinates(0, stage, 0)] for stage in range(files.sizes.pp_rank)]
    counts = [[_count_layers(chunk) for chunk in rank.chunks] for rank in ranks]
    if len({len(rank.chunks) for rank in files.ranks.values()}) > 1:
        raise ConversionError(f"{files.directory}: stages have different numbers of chunks")
    first, stages = 0, [[range(0)] * len(counts[0]) for _ in counts]
    for number, pp_rank in product(range(len(counts[0])), range(len(counts))):
        stages[pp_rank][number] = range(first, first + counts[pp_rank][number])
        first += counts[pp_rank][number]
    if first != num_layers:
        raise ConversionError(
            f"{files.directory}: its files hold {first} layers, its args say "
            f"num_layers={num_layers}"
        )
    return tuple(map(tuple, stages))


def _count_layers(chunk: Mapping[str, Extent]) -> int:
    return len({match[1] for match in map(_LAYER.match, chunk) if match})
