"""Create megatron-core's process groups from a topology, and ask where this rank stands."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state

from ml_parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands in each parallel dimension."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    expert_dp_rank: int
    """Which of the ranks with the same experts it is."""
    optimizer_rank: int
    """Which shard of the distributed optimizer it updates, among those with the same experts; equal
    on replicas."""
    instance: int
    """Which optimizer instance (replica) it belongs to."""


def initialize_groups(
    topology: Topology, *, num_chunks: int = 1, timeout_minutes: int = 45
) -> Place:
    """Create every process group of `topology` over the ranks of the default group.

    Args:
        topology: How the ranks are cut; it must fit their number.
        num_chunks: Model chunks a pipeline stage holds (virtual pipeline).
        timeout_minutes: How long a collective waits for a missing rank.
    """
    instances = topology.num_distributed_optimizer_instances
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
        pipeline_model_parallel_size=topology.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        context_parallel_size=topology.context_parallel_size,
        expert_model_parallel_size=topology.expert_model_parallel_size,
        num_distributed_optimizer_instances=instances,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    dp_rank = parallel_state.get_data_parallel_rank()
    dp_size = parallel_state.get_data_parallel_world_size()
    ep_size = topology.expert_model_parallel_size
    shards = dp_size // instances
    return Place(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=topology.tensor_model_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=topology.pipeline_model_parallel_size,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=ep_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        # Ranks with different experts come first among the data-parallel ranks.
        optimizer_rank=dp_rank % shards // ep_size if topology.use_distributed_optimizer else 0,
        instance=dp_rank // shards,
    )
