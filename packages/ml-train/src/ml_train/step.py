"""One training step: forward and backward over the micro-batches, then an update or none.

megatron-core runs the schedule and the optimizer. What is ours is the gate between them: the
gradient norm and the loss are known and finite on every rank, or no rank touches its weights.

Shapes: `B` micro-batch, `S` sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.utils import clip_grads_with_norm_

from ml_models.packing import PackedSequences
from ml_parallel.groups import Place
from ml_train.batches import Batch


@dataclass(frozen=True)
class BatchShape:
    """What megatron-core's schedules need to know of a global batch."""

    micro_batch_size: int
    seq_length: int
    num_microbatches: int

    def in_one_row(self) -> BatchShape:
        """Return the shape of batches whose samples share a row."""
        return BatchShape(1, self.micro_batch_size * self.seq_length, self.num_microbatches)


class Report(NamedTuple):
    """What the last stage of a pipeline knows of a micro-batch."""

    loss: torch.Tensor
    """Sum over its tokens that count."""
    tokens: torch.Tensor
    """Number of those."""
    computed: int
    """Number of all."""
    pairs: int
    """Pairs of those in the same sequence."""


class Totals(NamedTuple):
    """What all reports of a global batch say together; the same on every rank."""

    loss: float
    """Sum over the tokens that count."""
    tokens: float
    """Number of those; as the sum, of each tensor-parallel rank."""
    stop_requested: bool
    """Whether any rank was asked to stop."""
    filled: float
    """See `StepResult`."""
    keys: float
    """See `StepResult`."""


@dataclass(frozen=True)
class StepResult:
    """What happened in a step; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, in nats."""
    grad_norm: float
    """Before clipping; NaN or Inf when the step was skipped for it."""
    updated: bool
    """Whether the weights changed."""
    stop_requested: bool
    """Whether any rank was asked to stop."""
    filled: float
    """Tokens computed, as a part of --seq-length for every sample: less than 1 only with
    --variable-seq-lengths."""
    keys: float
    """Tokens of its sequence, for a computed token on average."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def prepare_config(
    config: TransformerConfig,
    optimizer: MegatronOptimizer,
    chunks: Sequence[Any],
    shape: BatchShape,
) -> None:
    """Tell megatron-core's schedules what to do with gradients.

    Losses are summed over tokens and the gradients divided by their number at the end. In between
    they are kept at the size of a micro-batch's mean, which float16 can hold.
    """
    ddp = chunks[0].ddp_config
    tokens = shape.micro_batch_size * shape.seq_length
    config.finalize_model_grads_func = partial(_finalize_gradients, tokens)
    # It would change this bias before anyone knows whether the step is good: see `train_step`.
    config.moe_router_enable_expert_bias = False
    config.grad_scale_func = lambda loss: optimizer.scale_loss(loss) / tokens
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync[0] if len(chunks) == 1 else no_sync
    if ddp.overlap_param_gather:
        sync = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = sync[0] if len(chunks) == 1 else sync


def _finalize_gradients(
    divided_by: int, chunks: list[Any], num_tokens: torch.Tensor, **groups: Any
) -> None:
    finalize_model_grads(chunks, num_tokens / divided_by, **groups)


def seed_step(seed: int, iteration: int, place: Place) -> None:
    """Seed dropout from the run's seed, the step, and the rank's place.

    Nothing random is carried from step to step, so a resumed run needs no stored generator, and
    ranks that hold different layers or samples drop different elements. Ranks of one
    tensor-parallel group share the seed; megatron-core derives from it what must differ there.
    """
    key = f"{seed}:{iteration}:{place.pp_rank}:{place.dp_rank}".encode()
    derived = int.from_bytes(hashlib.sha256(key).digest()[:4], "little") >> 1
    model_parallel_cuda_manual_seed(derived)


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Sequence[Iterator[Batch]],
    shape: BatchShape,
    *,
    stop_requested: Callable[[], bool],
) -> StepResult:
    """Compute the gradients of a global batch and update the weights, if everything is finite.

    Args:
        chunks: The model chunks of this rank.
        optimizer: From `ml_parallel.optimizer.build_optimizer`.
        batches: One iterator of micro-batches for each chunk.
        shape: Of the global batch.
        stop_requested: Tells whether this rank was asked to stop; called after the backward pass.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = _run_schedule(chunks, batches, shape, forward_only=False)
    totals = _reduce(reports, shape, stop_requested())
    loss = mean_loss([totals])
    overflow = optimizer.prepare_grads()
    grad_norm = math.inf if overflow else float(optimizer.get_grad_norm())
    updated = math.isfinite(loss) and math.isfinite(grad_norm)
    if updated:
        _clip(optimizer, grad_norm)
        optimizer.step_with_ready_grads()
    _balance_experts(chunks, updated=updated)
    return StepResult(loss, grad_norm, updated, totals.stop_requested, totals.filled, totals.keys)


def evaluate(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Iterator[Batch]],
    shape: BatchShape,
    *,
    stop_requested: Callable[[], bool],
) -> Totals:
    """Compute the loss of a global batch, without dropout or gradients."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        reports = _run_schedule(chunks, batches, shape, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return _reduce(reports, shape, stop_requested())


def mean_loss(batches: Sequence[Totals]) -> float:
    """Return the mean over all tokens of global batches that count, in nats."""
    tokens = math.fsum(totals.tokens for totals in batches)
    return math.fsum(totals.loss for totals in batches) / tokens if tokens else math.nan


@contextmanager
def parameters_in_place(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """With --overlap-param-gather, fetch the updated parameters now instead of while computing."""
    overlap = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlap:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlap:
            chunk.enable_forward_pre_hook()


def _run_schedule(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Iterator[Batch]],
    shape: BatchShape,
    *,
    forward_only: bool,
) -> list[Report]:
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=list(batches) if several else batches[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=shape.num_microbatches,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )


def _forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    tokens, positions, packed = batch["tokens"], batch["position_ids"], None
    pairs = tokens.numel() * tokens.shape[1]
    if "sequence_ends" in batch:
        packed = PackedSequences(tuple(batch["sequence_ends"].tolist()), positions[0])
        pairs = packed.pairs
    losses = model(  # (B, S)
        tokens,
        positions,
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
    )
    return losses, partial(_sum_loss, batch["loss_mask"], pairs)


def _sum_loss(
    mask: torch.Tensor, pairs: int, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Return the summed loss and the number of tokens: the mean is taken over the global batch."""
    total, tokens = (losses * mask).sum(), mask.sum()
    report = Report(total.detach(), tokens, losses.numel(), pairs)
    return total, tokens.to(torch.int), report


def _reduce(reports: Sequence[Report], shape: BatchShape, stop: bool) -> Totals:
    """Add up the reports of all ranks.

    Only the last pipeline stage has losses; its tensor-parallel ranks all have the same ones, which
    cancels in the means.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        totals[0] += report.loss
        totals[1] += report.tokens
    totals[2] = float(stop)
    totals[3] = sum(report.computed for report in reports)
    totals[4] = len(reports) * shape.micro_batch_size * shape.seq_length
    totals[5] = sum(report.pairs for report in reports)
    torch.distributed.all_reduce(totals)
    loss, tokens, stops, computed, most, pairs = totals.tolist()
    return Totals(loss, tokens, stops > 0, computed / most, pairs / computed)


@torch.no_grad()
def _balance_experts(chunks: Sequence[torch.nn.Module], *, updated: bool) -> None:
    """Make experts with fewer tokens than the mean more likely, where a router has such a bias.

    It is a buffer without a gradient, moved by a constant after each step (arXiv:2408.15664).
    """
    for router in (module for chunk in chunks for module in chunk.modules()):
        if not isinstance(router, TopKRouter) or router.expert_bias is None:
            continue
        counts = router.local_tokens_per_expert
        if updated:
            rate = router.config.moe_router_bias_update_rate
            router.expert_bias.copy_(get_updated_expert_bias(counts, router.expert_bias, rate))
        counts.zero_()


def _clip(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Shorten the gradients to --clip-grad; in place, which megatron-core's own does not do."""
    norm = torch.tensor(grad_norm)
    for inner in optimizer.chained_optimizers:
        longest = inner.config.clip_grad
        if 0.0 < longest < grad_norm:
            clip_grads_with_norm_(inner.get_parameters(), longest, norm)
