"""How the ranks of a job are cut: the parallel flags as one value, and the ranks of every group.

Ranks are numbered as megatron-core does (its order tp-cp-ep-dp-pp), tensor-parallel neighbours
first and pipeline stages last:

    rank = tp_rank + TP * (cp_rank + CP * (dp_rank + DP * pp_rank))            dense layers
    rank = tp_rank + TP * (ep_rank + EP * (expert_dp_rank + expert_DP * pp_rank))      experts

The second line cuts the same ranks another way: expert parallelism is taken out of CP * DP. Nothing
here needs torch or a process group, so layouts of any size can be checked and looked at.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)

GroupKind = Literal[
    "tp", "cp", "dp", "pp", "tp-cp", "tp-dp", "tp-pp", "dp-cp", "tp-dp-cp",
    "embedding", "position-embedding", "intra-dp-cp", "inter-dp-cp",
    "ep", "tp-ep", "tp-ep-pp", "expert-tp", "expert-dp", "intra-expert-dp", "inter-expert-dp",
    "optimizer-instance",
]  # fmt: skip


class Coordinates(NamedTuple):
    """Where a rank stands in each dimension."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    ep_rank: int
    expert_dp_rank: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks over which every layer's tensors are cut."""
    pipeline_model_parallel_size: int = 1
    """Stages into which the layers are cut."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk when every stage holds several chunks in turn (interleaved pipeline)."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, such as 4,4,3; default the same number on all."""
    context_parallel_size: int = 1
    """Ranks over which every sample is cut along the sequence."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts of a layer are dealt out; taken from the data-parallel ranks."""
    sequence_parallel: bool = False
    """Also cut what lies between the tensor-parallel layers, along the sequence."""
    use_mc2: bool = False
    """Overlap the collectives of sequence parallelism with the matrix products beside them."""
    use_distributed_optimizer: bool = False
    """Cut the optimizer state over the data-parallel ranks (ZeRO-1)."""
    num_distributed_optimizer_instances: int = 1
    """Copies of the cut optimizer state, so that every part of it exists on that many ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already computes with others."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_pipeline(self)
        _check_optimizer(self)
        if self.use_mc2 and not self.sequence_parallel:
            raise ValueError("--use-mc2: needs --sequence-parallel")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            logger.warning("--sequence-parallel has no effect: --tensor-model-parallel-size is 1")
            object.__setattr__(self, "sequence_parallel", False)
            object.__setattr__(self, "use_mc2", False)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and work on one sample."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def overlap_p2p_comm(self) -> bool:
        """Whether pipeline stages send and receive while they compute.

        The interleaved schedule has to: without it, with two stages, both messages between the
        same two ranks get mixed up and gradients are wrong. The plain schedule refuses to.
        """
        return self.num_layers_per_virtual_pipeline_stage is not None

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of model copies that work on different samples."""
        if world_size < 1:
            raise ValueError(f"{world_size} ranks: there must be at least 1")
        if world_size % self.model_parallel_size:
            raise ValueError(_wrong_world(self, world_size))
        return world_size // self.model_parallel_size

    def validate(self, world_size: int) -> None:
        """Check that `world_size` ranks can be cut this way.

        Raises:
            ValueError: Names the flag, its value, the rule and the nearest valid values.
        """
        replicas = self.data_parallel_size(world_size) * self.context_parallel_size
        _check_divides(
            "expert_model_parallel_size",
            self.expert_model_parallel_size,
            replicas,
            f"the {replicas} data and context parallel ranks of {world_size} ranks",
        )
        replicas //= self.expert_model_parallel_size
        _check_divides(
            "num_distributed_optimizer_instances",
            self.num_distributed_optimizer_instances,
            replicas,
            f"the {replicas} ranks of {world_size} with the same parameters",
        )

    def coordinates(self, rank: int, world_size: int) -> Coordinates:
        """Return where `rank` stands in each dimension."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        tp, cp, ep = (
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.expert_model_parallel_size,
        )
        tp_rank, replica = rank % tp, rank // tp
        replicas = self.data_parallel_size(world_size) * cp
        pp_rank, replica = divmod(replica, replicas)
        return Coordinates(
            tp_rank=tp_rank,
            cp_rank=replica % cp,
            dp_rank=replica // cp,
            pp_rank=pp_rank,
            ep_rank=replica % ep,
            expert_dp_rank=replica // ep,
        )


# The ranks of every group


def groups(topology: Topology, world_size: int) -> dict[GroupKind, list[list[int]]]:
    """Return the ranks of every process group that megatron-core builds, by kind.

    | kind | ranks that |
    |---|---|
    | tp, cp, dp, pp, ep | differ in this coordinate only |
    | tp-pp, dp-cp, ... | differ in these coordinates only |
    | embedding, position-embedding | share the tables: first and last stage, first stage |
    | intra-dp-cp, intra-expert-dp | share out one copy of the optimizer state |
    | inter-dp-cp, inter-expert-dp | hold the same part of it |
    | optimizer-instance | hold one copy of all parameters and their optimizer state |
    | expert-tp, expert-dp, tp-ep, tp-ep-pp | as above, for the experts' weights |
    """
    topology.validate(world_size)
    tp, pp = topology.tensor_model_parallel_size, topology.pipeline_model_parallel_size
    cp, ep = topology.context_parallel_size, topology.expert_model_parallel_size
    dense = {"tp": tp, "cp": cp, "dp": world_size // (tp * cp * pp), "pp": pp}
    expert = {"tp": tp, "ep": ep, "dp": world_size // (tp * ep * pp), "pp": pp}
    stages = _cut(dense, "pp")
    replicas, expert_replicas = _cut(dense, "cp", "dp"), _cut(expert, "dp")
    instances = topology.num_distributed_optimizer_instances
    return {
        "tp": _cut(dense, "tp"),
        "cp": _cut(dense, "cp"),
        "dp": _cut(dense, "dp"),
        "pp": stages,
        "tp-cp": _cut(dense, "tp", "cp"),
        "tp-dp": _cut(dense, "tp", "dp"),
        "tp-pp": _cut(dense, "tp", "pp"),
        "dp-cp": replicas,
        "tp-dp-cp": _cut(dense, "tp", "cp", "dp"),
        "embedding": [sorted({ranks[0], ranks[-1]}) for ranks in stages],
        "position-embedding": [ranks[:1] for ranks in stages],
        "intra-dp-cp": _halves(replicas, instances),
        "inter-dp-cp": _partners(replicas, instances),
        "ep": _cut(expert, "ep"),
        "tp-ep": _cut(expert, "tp", "ep"),
        "tp-ep-pp": _cut(expert, "tp", "ep", "pp"),
        "expert-tp": _cut(expert, "tp"),
        "expert-dp": expert_replicas,
        "intra-expert-dp": _halves(expert_replicas, instances),
        "inter-expert-dp": _partners(expert_replicas, instances),
        "optimizer-instance": _instances(_cut(expert, "tp", "ep", "pp"), instances),
    }


def _cut(sizes: dict[str, int], *names: str) -> list[list[int]]:
    """Group the ranks that differ in the named coordinates only; `sizes` has the fastest first."""
    strides, stride = {}, 1
    for name, size in sizes.items():
        strides[name] = (size, stride)
        stride *= size
    members = _sums(strides[name] for name in sizes if name in names)
    origins = _sums(strides[name] for name in sizes if name not in names)
    return [[origin + member for member in members] for origin in origins]


def _sums(axes: Iterable[tuple[int, int]]) -> list[int]:
    """Return every sum of one multiple per axis, the first axis fastest."""
    sums = [0]
    for size, stride in axes:
        sums = [step * stride + low for step in range(size) for low in sums]
    return sums


def _halves(replicas: list[list[int]], instances: int) -> list[list[int]]:
    size = len(replicas[0]) // instances
    return [ranks[i : i + size] for ranks in replicas for i in range(0, len(ranks), size)]


def _partners(replicas: list[list[int]], instances: int) -> list[list[int]]:
    size = len(replicas[0]) // instances
    return [ranks[i::size] for ranks in replicas for i in range(size)]


def _instances(models: list[list[int]], instances: int) -> list[list[int]]:
    size = len(models) // instances
    return [
        sorted(rank for model in models[i : i + size] for rank in model)
        for i in range(0, len(models), size)
    ]


# Rules


def _check_sizes(topology: Topology) -> None:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "num_distributed_optimizer_instances",
        "num_layers_per_virtual_pipeline_stage",
    ):
        value = getattr(topology, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name, value)}: must be at least 1")


def _check_pipeline(topology: Topology) -> None:
    pp = topology.pipeline_model_parallel_size
    stages = _flag("pipeline_model_parallel_size", pp)
    per_chunk, layers = topology.num_layers_per_virtual_pipeline_stage, topology.num_layer_list
    if per_chunk is not None and pp < 2:
        chunk = _flag("num_layers_per_virtual_pipeline_stage", per_chunk)
        raise ValueError(f"{chunk}: needs at least 2 pipeline stages, not {stages}")
    if layers is None:
        return
    given = _flag("num_layer_list", ",".join(map(str, layers)))
    if per_chunk is not None:
        raise ValueError(
            f"{given}: cannot be combined with --num-layers-per-virtual-pipeline-stage"
        )
    if pp < 2:
        raise ValueError(f"{given}: needs at least 2 pipeline stages, not {stages}")
    if len(layers) != pp:
        raise ValueError(
            f"{given}: must have one number for each stage of {stages}, not {len(layers)}"
        )
    if min(layers) < 1:
        raise ValueError(f"{given}: every stage must have at least 1 layer")


def _check_optimizer(topology: Topology) -> None:
    instances = topology.num_distributed_optimizer_instances
    if instances > 1:
        given = _flag("num_distributed_optimizer_instances", instances)
        if not topology.use_distributed_optimizer:
            raise ValueError(f"{given}: needs --use-distributed-optimizer")
        if topology.overlap_grad_reduce:  # NVIDIA/Megatron-LM issue 3670, mended in 0.17.0
            raise ValueError(
                f"{given}: cannot be combined with --overlap-grad-reduce, "
                f"which gives wrong gradients there in megatron-core 0.16"
            )
    if topology.overlap_param_gather and not (
        topology.use_distributed_optimizer and topology.overlap_grad_reduce
    ):
        raise ValueError(
            "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce"
        )


def _check_divides(name: str, value: int, total: int, what: str) -> None:
    if total % value:
        valid = _choices(n for n in range(1, total + 1) if total % n == 0)
        raise ValueError(f"{_flag(name, value)}: must divide {what} (valid: {valid})")


def _wrong_world(topology: Topology, world_size: int) -> str:
    """Say why the model-parallel sizes do not fit the number of ranks, and what would."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {name: getattr(topology, name) for name in names if getattr(topology, name) > 1}
    model = math.prod(sizes.values())
    below = world_size // model * model
    hints = [f"{_choices(n for n in (below, below + model) if n)} ranks"]
    for name, size in sizes.items():
        if world_size % (model // size) == 0:
            hints.append(_flag(name, _nearest(world_size // (model // size), size)))
    product = " * ".join(_flag(name, size) for name, size in sizes.items())
    total = f" = {model}" if len(sizes) > 1 else ""
    return (
        f"{product}{total}: must divide the number of ranks, {world_size} "
        f"(nearest: {'; '.join(hints)})"
    )


def _nearest(total: int, value: int) -> str:
    """Return the divisors of `total` next to `value`."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    return _choices(sorted(sorted(divisors, key=lambda n: abs(n - value))[:2]))


def _choices(values: Iterable[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _flag(name: str, value: object) -> str:
    return f"--{name.replace('_', '-')} {value}"
