"""The optimizer over data-parallel ranks, and its state by parameter.

megatron-core has three optimizers: plain float32, mixed precision, and distributed (ZeRO-1: each
rank updates one part of the flat gradient buffer). They store their state differently.
`optimizer_shards` shows all three in one way: which elements of which parameter this rank updates,
with the tensors that belong to them. Checkpoints need to know nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from ml_parallel.accumulation import accumulate_in_blocks
from ml_parallel.topology import Topology

STATES = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment (Kingma and Ba 2015, arXiv:1412.6980)."""


@dataclass(frozen=True)
class OptimizerShard:
    """The elements `[start, stop)` of one flattened parameter, updated by this rank."""

    parameter: torch.nn.Parameter
    start: int
    stop: int
    main: torch.Tensor
    """The float32 values the optimizer updates; the parameter itself in float32 training."""
    inner: torch.optim.Optimizer

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The torch optimizer's state of these elements, moments and step count."""
        return self.inner.state[self.main]


def distribute(
    modules: Sequence[torch.nn.Module], config: TransformerConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Wrap each model chunk for data parallelism; gradients are accumulated in float32."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=topology.overlap_grad_reduce,
        overlap_param_gather=topology.overlap_param_gather,
        use_distributed_optimizer=topology.use_distributed_optimizer,
        num_distributed_optimizer_instances=topology.num_distributed_optimizer_instances,
    )
    chunks = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp,
            module=module,
            # Buckets of later chunks are reduced while earlier ones still compute.
            disable_bucketing=number > 0,
        )
        for number, module in enumerate(modules)
    ]
    for chunk in chunks:
        accumulate_in_blocks(chunk)
    return chunks


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig
) -> MegatronOptimizer:
    """Build Adam over the chunks, with its state allocated; only matrices have weight decay.

    The state exists from the start, so that a checkpoint written before the first step is whole.
    """
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            # megatron-core marks norms and biases with wd_mult 0, and leaves it to the step() of
            # its scheduler to heed that. Ours (ml_train.schedule) is only asked for rates.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        # Apex's and Transformer Engine's allocate their own state.
        if isinstance(inner.optimizer, torch.optim.AdamW | torch.optim.Adam):
            _allocate_state(inner.optimizer)
    _share_loss_scale(_inner_optimizers(optimizer))
    return optimizer


class SharedLossScale:
    """The loss scale of several optimizers, which moves once in a step.

    megatron-core gives experts that are dealt out over ranks an optimizer of their own, with a loss
    scale of its own. An overflow in one of the two would set them apart for good.
    """

    def __init__(self, scaler: MegatronGradScaler, optimizers: int) -> None:
        self._scaler = scaler
        self._optimizers = optimizers
        self._overflows: list[bool] = []

    @property
    def scale(self) -> torch.Tensor:
        """What the loss is multiplied by."""
        return self._scaler.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        """What gradients are multiplied by."""
        return self._scaler.inv_scale

    def update(self, overflow: bool) -> None:
        """Note what one optimizer saw; after the last one the scale moves."""
        self._overflows.append(overflow)
        if len(self._overflows) == self._optimizers:
            self._scaler.update(any(self._overflows))
            self._overflows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and its counters."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scale and its counters."""
        self._scaler.load_state_dict(state)


def _share_loss_scale(optimizers: Sequence[MegatronOptimizer]) -> None:
    scaled = [inner for inner in optimizers if getattr(inner, "grad_scaler", None) is not None]
    if len(scaled) > 1:
        shared = SharedLossScale(scaled[0].grad_scaler, len(scaled))
        for inner in scaled:
            inner.grad_scaler = shared


def _allocate_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        # One fused pass over memory; torch does not choose it by itself on a CPU.
        group["fused"], group["foreach"] = True, False
        for main in group["params"]:
            adam.state[main] = {
                "step": torch.zeros((), dtype=torch.float32, device=main.device),
                **{name: torch.zeros_like(main) for name in STATES},
            }


def optimizer_shards(optimizer: MegatronOptimizer) -> Iterator[OptimizerShard]:
    """Yield every shard that this rank updates."""
    for inner in _inner_optimizers(optimizer):
        if isinstance(inner, DistributedOptimizer):
            yield from _distributed_shards(inner)
        elif not inner.is_stub_optimizer:
            yield from _whole_parameters(inner)


def _inner_optimizers(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _distributed_shards(optimizer: DistributedOptimizer) -> Iterator[OptimizerShard]:
    groups = optimizer.optimizer.param_groups
    for parameter, (group, order) in optimizer.model_param_group_index_map.items():
        elements = optimizer._get_model_param_range_map(parameter)["param"]
        main = groups[group]["params"][order]
        yield OptimizerShard(parameter, elements.start, elements.end, main, optimizer.optimizer)


def _whole_parameters(optimizer: MegatronOptimizer) -> Iterator[OptimizerShard]:
    parameters = {id(main): main for group in optimizer.param_groups for main in group["params"]}
    for half, full in zip(
        getattr(optimizer, "float16_groups", []),
        getattr(optimizer, "fp32_from_float16_groups", []),
        strict=True,
    ):
        parameters |= {id(main): model for model, main in zip(half, full, strict=True)}
    for group in optimizer.param_groups:
        for main in group["params"]:
            parameter = parameters[id(main)]
            yield OptimizerShard(parameter, 0, parameter.numel(), main, optimizer.optimizer)
