"""What a training run has in memory and a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ml_models.architecture import Architecture
from ml_models.gpt import Chunk
from ml_parallel.groups import Place
from ml_parallel.topology import Topology

MAIN = "main_param"
"""The float32 weights of a model that computes in half precision."""

OURS = "ml_train_version"
"""The argument of a checkpoint that says that ml-train wrote it."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Padding included."""
    skipped_iterations: int = 0
    nan_iterations: int = 0


@dataclass(frozen=True)
class TrainingState:
    """Everything of this rank that a checkpoint holds."""

    arch: Architecture
    topology: Topology
    place: Place
    padded_vocab_size: int
    params_dtype: str
    global_batch_size: int
    run: Mapping[str, Any]
    """The flags that the rest of the run follows from, as `ml_train.identity` has them."""
    chunks: Sequence[Chunk]
    wrapped: Sequence[DistributedDataParallel]
    """The modules of the chunks in megatron-core's data-parallel wrapper."""
    optimizer: MegatronOptimizer

    def global_names(self) -> dict[int, str]:
        """Return the name in the whole model of each tensor, by the tensor's id()."""
        return {
            id(tensor): chunk.global_name(name)
            for chunk in self.chunks
            for name, tensor in chunk.tensors()
        }


def shard_file(optimizer_rank: int) -> str:
    """Return the name of an optimizer shard's file."""
    return f"optimizer_shard_{optimizer_rank:03d}.pt"
