"""Megatron-Core checkpoints: one file for each tensor-parallel rank of each pipeline stage.

    <root>/latest_checkpointed_iteration.txt
    <root>/iter_0000100/mp_rank_00_001/model_optim_rng.pt      tensor rank 0, pipeline stage 1

A file holds `args`, and the tensors of its rank as `model`, or `model0`, `model1`, ... with several
chunks to a stage. Layers count from 0 in each chunk. How a checkpoint was cut is found out from its
files, so any tensor and pipeline size, layer list or interleaving can be read.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ml_convert import megatron_args, ptfile
from ml_convert.binding import Found, bind
from ml_convert.errors import ConversionError
from ml_convert.pickles import TensorPickle
from ml_convert.ranks import chunk_key, layout, rank_file
from ml_convert.source import Source
from ml_convert.tensor import Extent
from ml_models import registry
from ml_models.architecture import Architecture
from ml_models.weights import EMBEDDING
from ml_parallel import checkpoint as directories
from ml_parallel.checkpoint import CheckpointError
from ml_parallel.stages import Stages

# Names of the Transformer Engine layer spec, which fuses norms with the linear layer that follows.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_NO_WEIGHTS = re.compile(r"\._extra_state$|rotary_pos_emb\.inv_freq$")
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def is_megatron(path: Path) -> bool:
    """Tell whether a directory looks like Megatron checkpoints, or like one of them."""
    return bool(directories.candidates(path)) or any(path.glob("mp_rank_*"))


def checkpoint_directory(root: Path, iteration: int | None) -> Path:
    """Find the directory of one checkpoint.

    Args:
        root: A directory of checkpoints, or one of them.
        iteration: Which; None for the one the tracker names.

    Raises:
        ConversionError: There is none.
    """
    if any(root.glob("mp_rank_*")):
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


class _Rank(NamedTuple):
    file: str
    args: Namespace
    chunks: list[dict[str, Extent]]
    """Tensors of each chunk by their name in this file, without weightless ones."""


def open_checkpoint(
    directory: Path,
    *,
    default: Architecture | None,
    true_vocab_size: int | None,
    hashes: bool = False,
) -> Source:
    """Open one checkpoint.

    Args:
        directory: Holds mp_rank_* directories.
        default: Description to use where `args` say nothing.
        true_vocab_size: Vocabulary without padding, if it is known better.
        hashes: Check the content against the manifest, if there is one.

    Raises:
        ConversionError: It is damaged, incomplete, or of a kind that is not supported.
    """
    try:
        directories.verify(directory, hashes=hashes, only=directories.MODEL_FILE)
    except CheckpointError as error:
        raise ConversionError(f"{error}; choose another checkpoint with --iteration") from None
    tp_size, pp_size = _sizes(directory)
    stages_of_ranks = [
        [
            _read_rank(directory, rank_file(tp_rank=tp_rank, pp_rank=pp_rank, pp_size=pp_size))
            for tp_rank in range(tp_size)
        ]
        for pp_rank in range(pp_size)
    ]
    first_stage = stages_of_ranks[0]
    args = first_stage[0].args
    arch = megatron_args.architecture(args, default, str(directory))
    arch = replace(arch, vocab_size=true_vocab_size or arch.vocab_size)
    padded = _padded_vocab_size(first_stage, directory)
    _check_vocab_size(arch, padded, directory)
    stages = _stages([ranks[0] for ranks in stages_of_ranks], arch.num_layers, directory)
    expected = layout(arch, stages, tensor_parallel_size=tp_size, padded_vocab_size=padded)
    found = _found(rank for ranks in stages_of_ranks for rank in ranks)
    family = getattr(args, "model_family", None)
    return Source(
        path=directory,
        arch=arch,
        family=registry.family(family) if family in registry.names() else None,
        checkpoint=bind(expected, found, directory),
        args=args,
    )


def _found(ranks: Iterable[_Rank]) -> Found:
    """List the tensors of all ranks by file and name, under the names of the local spec."""
    return {
        (rank.file, f"{chunk_key(number, len(rank.chunks))}.{_local_spec(name)}"): extent
        for rank in ranks
        for number, chunk in enumerate(rank.chunks)
        for name, extent in chunk.items()
    }


def _sizes(directory: Path) -> tuple[int, int]:
    """Find the number of tensor and pipeline ranks from the names of the directories."""
    if (directory / ".metadata").is_file():
        raise ConversionError(f"{directory}: the torch_dist format is not supported yet")
    names = sorted(path.name for path in directory.glob("mp_rank_*"))
    found = {}
    for name in names:
        match = _RANK.fullmatch(name)
        if match is None:
            raise ConversionError(
                f"{directory / name}: expert-parallel ranks are not supported yet"
            )
        found[int(match[1]), int(match[2] or 0)] = name
    tp_size, pp_size = (max(ranks, default=-1) + 1 for ranks in zip(*found, strict=True))
    for tp_rank, pp_rank in product(range(tp_size), range(pp_size)):
        if (tp_rank, pp_rank) not in found:
            rank = directories.rank_directory(tp_rank=tp_rank, pp_rank=pp_rank, pp_size=pp_size)
            raise ConversionError(f"{directory / rank}: missing, though there are {names[-1]}")
    return tp_size, pp_size


def _read_rank(directory: Path, file: str) -> _Rank:
    path = directory / file
    if not path.is_file():
        raise ConversionError(f"{path}: missing")
    saved = ptfile.read(path)
    content = saved.value
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: no Megatron checkpoint")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < 2:
        raise ConversionError(
            f"{path}: checkpoint_version {version!r} stores query, key and value in another order; "
            "versions from 2.0 on are supported"
        )
    args = content.get("args")
    return _Rank(
        file=file,
        args=args if isinstance(args, Namespace) else Namespace(),
        chunks=[_chunk_tensors(chunk, saved) for chunk in _chunks(content, path)],
    )


def _chunks(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    keys = ["model"] if "model" in content else []
    while f"model{len(keys)}" in content and keys != ["model"]:
        keys.append(f"model{len(keys)}")
    chunks = [content[key] for key in keys]
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ConversionError(f"{path}: holds no model")
    if any("language_model" in chunk for chunk in chunks):
        raise ConversionError(f"{path}: the Megatron-Legacy format is not supported yet")
    return chunks


def _chunk_tensors(chunk: Mapping[str, Any], saved: ptfile.Saved) -> dict[str, Extent]:
    tensors = {}
    for name, value in chunk.items():
        if _NO_WEIGHTS.search(name):
            continue
        if not isinstance(value, TensorPickle):
            raise ConversionError(f"{saved.path}: {name} is no tensor")
        tensors[name] = saved.extent(value)
    return tensors


def _local_spec(name: str) -> str:
    """Return the name of a tensor in the local layer spec."""
    for fused, separate in _FUSED_NORMS.items():
        name = name.replace(fused, separate)
    return name


def _padded_vocab_size(first_stage: Sequence[_Rank], directory: Path) -> int:
    tables = [rank.chunks[0].get(EMBEDDING) for rank in first_stage]
    if None in tables:
        raise ConversionError(f"{directory}: {EMBEDDING} is missing")
    return sum(table.shape[0] for table in tables if table is not None and table.shape)


def _check_vocab_size(arch: Architecture, padded: int, directory: Path) -> None:
    if not 0 < arch.vocab_size <= padded:
        raise ConversionError(
            f"{directory}: args do not say how many of the {padded} rows of the vocabulary are "
            "padding; give --true-vocab-size, or --hf-config"
        )


def _stages(ranks: Sequence[_Rank], num_layers: int, directory: Path) -> Stages:
    """Number the layers of each chunk: the first chunks of all stages, then the second, ..."""
    counts = [[_count_layers(chunk) for chunk in rank.chunks] for rank in ranks]
    if len({len(chunks) for chunks in counts}) > 1:
        raise ConversionError(f"{directory}: stages have different numbers of chunks")
    first, stages = 0, [[range(0)] * len(counts[0]) for _ in counts]
    for number, pp_rank in product(range(len(counts[0])), range(len(counts))):
        stages[pp_rank][number] = range(first, first + counts[pp_rank][number])
        first += counts[pp_rank][number]
    if first != num_layers:
        raise ConversionError(
            f"{directory}: its files hold {first} layers, its args say num_layers={num_layers}"
        )
    return tuple(map(tuple, stages))


def _count_layers(chunk: Mapping[str, Extent]) -> int:
    return len({match[1] for match in map(_LAYER.match, chunk) if match})
