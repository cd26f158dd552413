"""The files of a Megatron checkpoint's ranks, as they are found.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     tensor rank, pipeline stage, expert rank

A number is left out where there is one rank only. A file holds `args`, and the tensors of its rank
as `model`, or `model0`, `model1`, ... with several chunks to a stage. Layers and experts count from
0 in each file. Nothing here knows what a model consists of.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ml_convert import legacy, ptfile
from ml_convert.errors import ConversionError
from ml_convert.pickles import TensorPickle
from ml_convert.ranks import rank_file
from ml_convert.tensor import Extent
from ml_models.weights import EMBEDDING
from ml_parallel import checkpoint as directories

_NO_WEIGHTS = re.compile(r"\._extra_state$|rotary_pos_emb\.inv_freq$|rotary_emb\.inv_freq$")
_RANK = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})")
_ADAPTER = re.compile(r"\.lora_[AB]\.|\.lora_embedding_[AB]\.|\.modules_to_save\.")
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


class Coordinates(NamedTuple):
    """Which rank a file belongs to."""

    tp_rank: int
    pp_rank: int
    ep_rank: int


@dataclass(kw_only=True)
class Rank:
    """What one rank stored."""

    path: Path
    """Its file."""
    args: Namespace
    """Args of the training; empty if there are none."""
    chunks: list[dict[str, Extent]]
    """Tensors of each chunk by their name in this file, without weightless ones."""
    adapters: list[dict[str, Extent]] = field(default_factory=list)
    """Tensors of LoRA adapters of each chunk, by the module of Megatron-Core they belong to."""


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """All ranks of a checkpoint."""

    directory: Path
    """Directory of the checkpoint."""
    ranks: Mapping[Coordinates, Rank]
    """What each rank stored; none is missing."""
    sizes: Coordinates
    """How many ranks there are along each dimension."""

    @property
    def args(self) -> Namespace:
        """What the first rank says of the training."""
        return self.ranks[Coordinates(0, 0, 0)].args

    def file(self, rank: Coordinates) -> str:
        """Return the path within the checkpoint that a rank's file should have."""
        return rank_file(
            tp_rank=rank.tp_rank,
            pp_rank=rank.pp_rank,
            pp_size=self.sizes.pp_rank,
            ep_rank=rank.ep_rank,
            ep_size=self.sizes.ep_rank,
        )


def read_ranks(directory: Path) -> RankFiles:
    """Read what all ranks of a checkpoint stored.

    Raises:
        ConversionError: A rank is missing, or its file is damaged or of a kind not supported.
    """
    found = _read_directories(directory)
    ranks = dict(_numbered(found, directory))
    sizes = Coordinates(*(max(numbers) + 1 for numbers in zip(*ranks, strict=True)))
    files = RankFiles(directory=directory, ranks=ranks, sizes=sizes)
    _check_all_there(files)
    return files


def holds_adapter(files: RankFiles) -> bool:
    """Tell whether there is a LoRA adapter."""
    return any(chunk for rank in files.ranks.values() for chunk in rank.adapters)


# Which ranks there are


def _read_directories(directory: Path) -> dict[tuple[int, ...], Rank]:
    """Read every file, by the numbers in the name of its directory."""
    found: dict[tuple[int, ...], Rank] = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise ConversionError(
                f"{path}: no name of a rank, which is mp_rank_TT, mp_rank_TT_PPP or "
                "mp_rank_TT_PPP_EEE"
            )
        numbers = (int(match[1]), *map(int, match[2].split("_")[1:]))
        found[numbers] = read_rank(path / directories.MODEL_FILE)
    if not found:
        raise ConversionError(f"{directory}: holds no ranks (mp_rank_*)")
    if len(set(map(len, found))) > 1:
        names = ", ".join(path.name for path in sorted(directory.glob("mp_rank_*")))
        raise ConversionError(f"{directory}: holds ranks of different kinds of names ({names})")
    return found


def _numbered(
    found: Mapping[tuple[int, ...], Rank], directory: Path
) -> Iterator[tuple[Coordinates, Rank]]:
    """Tell which number is which: a second one may be that of a stage or of an expert rank."""
    first = (0,) * len(next(iter(found)))
    if first not in found:
        name = "_".join(["mp_rank_00", *(f"{0:03d}" for _ in first[1:])])
        raise ConversionError(f"{directory / name}: missing")
    by_experts = len(first) == 2 and _second_is_expert(found)
    for numbers, rank in found.items():
        tp_rank, second, third = (*numbers, 0, 0)[:3]
        yield Coordinates(tp_rank, *((0, second) if by_experts else (second, third))), rank


def _second_is_expert(found: Mapping[tuple[int, ...], Rank]) -> bool:
    """Tell it from what args say, or else from the embedding, which only the first stage has."""
    args = found[0, 0].args
    stages = getattr(args, "pipeline_model_parallel_size", None)
    experts = getattr(args, "expert_model_parallel_size", None)
    if isinstance(stages, int) and isinstance(experts, int) and (stages > 1) != (experts > 1):
        return experts > 1
    table = legacy.name(EMBEDDING)
    other = found.get((0, 1))
    return other is not None and any({EMBEDDING, table} & chunk.keys() for chunk in other.chunks)


def _check_all_there(files: RankFiles) -> None:
    names = sorted(path.name for path in files.directory.glob("mp_rank_*"))
    for numbers in product(*map(range, files.sizes)):
        rank = Coordinates(*numbers)
        if rank not in files.ranks:
            missing = (files.directory / files.file(rank)).parent
            raise ConversionError(f"{missing}: missing, though there are {names[-1]}")
    for name, size in zip(_SIZES, files.sizes, strict=True):
        said = getattr(files.args, name, None)
        if isinstance(said, int) and said > size:
            raise ConversionError(
                f"{files.directory}: ranks are missing, args say {name}={said}, but there are "
                f"{', '.join(names)}"
            )


# One rank


def read_rank(path: Path) -> Rank:
    """Read what one rank stored.

    Raises:
        ConversionError: The file is missing, damaged, or holds no model.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: missing")
    saved = ptfile.read(path)
    content = saved.value
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: no Megatron checkpoint")
    _check_version(content.get("checkpoint_version", 0), path)
    args = content.get("args")
    rank = Rank(path=path, args=args if isinstance(args, Namespace) else Namespace(), chunks=[])
    for chunk in _chunks(content, path):
        tensors, adapters = _tensors(chunk, saved)
        rank.chunks.append(tensors)
        rank.adapters.append(adapters)
    return rank


def _check_version(version: Any, path: Path) -> None:
    if not isinstance(version, (int, float)) or version < 2:
        raise ConversionError(
            f"{path}: checkpoint_version {version!r} stores query, key and value in another order; "
            "versions from 2.0 on are supported"
        )


def _chunks(content: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    keys = ["model"] if "model" in content else []
    while f"model{len(keys)}" in content and keys != ["model"]:
        keys.append(f"model{len(keys)}")
    chunks = [content[key] for key in keys]
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ConversionError(f"{path}: holds no model")
    return chunks


def _tensors(
    chunk: Mapping[str, Any], saved: ptfile.Saved
) -> tuple[dict[str, Extent], dict[str, Extent]]:
    """List the tensors of a chunk, those of the model and those of adapters."""
    is_legacy = legacy.ROOT in chunk
    found: tuple[dict[str, Extent], dict[str, Extent]] = ({}, {})
    for name, value in legacy.flat(chunk) if is_legacy else chunk.items():
        if not isinstance(name, str):
            raise ConversionError(f"{saved.path}: {name!r} is no name of a tensor")
        if _NO_WEIGHTS.search(name):
            continue
        if not isinstance(value, TensorPickle):
            raise ConversionError(f"{saved.path}: {name} is no tensor")
        is_adapter = _ADAPTER.search(name) is not None
        name = name.replace(".base_layer.", ".")
        if is_adapter and is_legacy:
            name = legacy.adapter_name(name)
        if name in found[is_adapter]:
            raise ConversionError(f"{saved.path}: {name} is there twice, under two names")
        found[is_adapter][name] = saved.extent(value)
    return found
