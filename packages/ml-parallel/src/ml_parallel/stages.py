"""Which layers each pipeline stage holds.

Without interleaving a stage is one contiguous chunk. With
`--num-layers-per-virtual-pipeline-stage n`, chunks of n layers are dealt out to the stages in turn:
chunk c of stage p of P starts at layer n * (P * c + p). 8 layers on 2 stages with n = 2:

    stage 0: [0 1] [4 5]
    stage 1: [2 3] [6 7]
"""

from __future__ import annotations

from itertools import accumulate

from ml_parallel.topology import Topology

Stages = tuple[tuple[range, ...], ...]
"""[pp_rank][chunk] -> global numbers of its layers, from 0."""


def stage_layers(num_layers: int, topology: Topology) -> Stages:
    """Return the layers of every chunk of every stage: `[pp_rank][chunk] -> range`.

    Raises:
        ValueError: The layers cannot be cut this way. Names the flag, its value, the rule and
            what would be valid.
    """
    if topology.num_layer_list is not None:
        return _listed(num_layers, topology.num_layer_list)
    stages = topology.pipeline_model_parallel_size
    if num_layers % stages:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: must divide --num-layers {num_layers} "
            f"(valid: {_divisors(num_layers)}), or give --num-layer-list"
        )
    per_stage = num_layers // stages
    per_chunk = topology.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        _check_chunk(per_chunk, per_stage)
    size = per_chunk or per_stage
    return tuple(
        tuple(
            range(first, first + size) for first in range(stage * size, num_layers, stages * size)
        )
        for stage in range(stages)
    )


def pipeline_layout(num_layers: int, topology: Topology) -> str | None:
    """Return megatron-core's `pipeline_model_parallel_layout` for a `--num-layer-list`, else None.

    "Et*4|t*3L" is a stage with the embedding and 4 layers, and one with 3 layers and the loss.
    """
    if topology.num_layer_list is None:
        return None
    stages = stage_layers(num_layers, topology)
    return "E" + "|".join(f"t*{len(layers)}" for (layers,) in stages) + "L"


def _listed(num_layers: int, sizes: tuple[int, ...]) -> Stages:
    if sum(sizes) != num_layers:
        raise ValueError(
            f"--num-layer-list {','.join(map(str, sizes))}: must add up to --num-layers "
            f"{num_layers}, not {sum(sizes)}"
        )
    ends = accumulate(sizes)
    return tuple((range(end - size, end),) for size, end in zip(sizes, ends, strict=True))


def _check_chunk(per_chunk: int, per_stage: int) -> None:
    given = f"--num-layers-per-virtual-pipeline-stage {per_chunk}"
    if per_stage == 1:
        raise ValueError(f"{given}: stages of 1 layer cannot be interleaved; leave it out")
    if per_stage % per_chunk or per_chunk == per_stage:
        raise ValueError(
            f"{given}: must divide the {per_stage} layers of a stage into at least 2 chunks "
            f"(valid: {_divisors(per_stage, most=per_stage - 1)})"
        )


def _divisors(number: int, *, most: int | None = None) -> str:
    return ", ".join(str(n) for n in range(1, (most or number) + 1) if number % n == 0)
