"""Random initial weights that depend on the seed and the parameter's name, not on the layout.

A parameter is drawn as the whole tensor would be on one device, in blocks of rows that each have
their own generator; a rank draws only the blocks its shard touches. So every tensor-, pipeline- and
data-parallel size starts from the same model, and a bug in a layout shows as a different loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch

from ml_models.architecture import Architecture
from ml_models.gpt import Chunk
from ml_models.weights import EMBEDDING, OUTPUT_LAYER, Parameter, Run, Split, shard_runs

_BLOCK_ELEMENTS = 1 << 22


@torch.no_grad()
def initialize(
    chunks: Iterable[Chunk],
    arch: Architecture,
    *,
    seed: int,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> None:
    """Fill the parameters of this rank's chunks.

    Normal with `init_method_std`, divided by `sqrt(2 * num_layers)` for the layers that write to
    the residual stream (Megatron's scaled initialisation, after GPT-2); norms 1, biases 0. Padding
    rows of the vocabulary are 0.
    """
    for chunk in chunks:
        for name, tensor in chunk.tensors():
            parameter = chunk.parameters[name]
            _, runs = shard_runs(
                parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=padded_vocab_size
            )
            _fill(tensor, parameter, runs, arch, seed)


def _fill(
    tensor: torch.Tensor, parameter: Parameter, runs: tuple[Run, ...], arch: Architecture, seed: int
) -> None:
    if parameter.init in ("ones", "zeros"):
        tensor.fill_(1.0 if parameter.init == "ones" else 0.0)
        return
    std = arch.init_method_std
    if parameter.init == "scaled_normal":
        std /= math.sqrt(2 * arch.num_layers)
    tensor.zero_()
    for start, block in _blocks(parameter, runs, arch, seed):
        _copy_block(tensor, start, block.mul_(std), parameter.split, runs)


def _blocks(
    parameter: Parameter, runs: tuple[Run, ...], arch: Architecture, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) of the standard normal global tensor for the rows that are needed."""
    tied = not arch.untie_embeddings_and_output_weights
    name = EMBEDDING if tied and parameter.name == OUTPUT_LAYER else parameter.name
    rows, *rest = parameter.shape
    step = max(1, _BLOCK_ELEMENTS // math.prod(rest))
    cut_rows = parameter.split is None or parameter.split.dim == 0
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        if cut_rows and not any(
            run.global_start < stop and start < run.global_start + run.length for run in runs
        ):
            continue
        digest = hashlib.sha256(f"{seed}:{name}:{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        yield start, torch.randn(stop - start, *rest, generator=generator)


def _copy_block(
    tensor: torch.Tensor,
    start: int,
    block: torch.Tensor,
    split: Split | None,
    runs: tuple[Run, ...],
) -> None:
    stop = start + block.shape[0]
    for run in runs:
        if split is not None and split.dim == 1:
            columns = block[:, run.global_start : run.global_start + run.length]
            tensor[start:stop, run.local_start : run.local_start + run.length].copy_(columns)
            continue
        low, high = max(start, run.global_start), min(stop, run.global_start + run.length)
        if low < high:
            offset = run.local_start - run.global_start
            tensor[low + offset : high + offset].copy_(block[low - start : high - start])
