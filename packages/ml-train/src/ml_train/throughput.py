"""What a step achieved, in numbers, and how they follow from its size and its time.

Throughput is end to end: the time of a step contains reading data, communication and the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ml_models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step of a run, or the mean of several."""

    iteration: int
    """Number of the step, from 1."""
    train_iters: int
    consumed_samples: int
    """Over all ranks, with this step's."""
    consumed_tokens: int
    """Computed for those samples, padding included."""
    elapsed_seconds: float
    learning_rate: float
    """Of this step."""
    global_batch_size: int
    loss: float
    """Mean over the tokens of the step, in nats; of several steps, over those not skipped."""
    loss_scale: float
    grad_norm: float
    """Before clipping."""
    skipped_iterations: int
    """Steps, of those this is about, that left the weights alone."""
    nan_iterations: int
    """Steps whose loss was not a number."""
    tokens_per_second_per_device: float
    tflops_per_device: float
    mfu: float
    """Part of the matmul peak of a device, from 0 to 1."""


def average(steps: Sequence[StepMetrics]) -> StepMetrics:
    """Return what a line about several steps in a row says; what is no mean is the last one's."""
    last = steps[-1]
    losses = [step.loss for step in steps if not step.skipped_iterations]
    seconds = math.fsum(step.elapsed_seconds for step in steps)

    def over_time(name: str) -> float:
        done = (getattr(step, name) * step.elapsed_seconds for step in steps)
        return math.fsum(done) / seconds

    return replace(
        last,
        elapsed_seconds=seconds / len(steps),
        loss=math.fsum(losses) / len(losses) if losses else last.loss,
        skipped_iterations=sum(step.skipped_iterations for step in steps),
        nan_iterations=sum(step.nan_iterations for step in steps),
        tokens_per_second_per_device=over_time("tokens_per_second_per_device"),
        tflops_per_device=over_time("tflops_per_device"),
        mfu=over_time("mfu"),
    )


def model_flops_per_iteration(
    arch: Architecture,
    global_batch_size: int,
    *,
    seq_length: float,
    padded_vocab_size: int,
    keys: float | None = None,
) -> float:
    """Return the FLOP of forward and backward that the model needs, as Megatron counts them.

    The backward pass is twice the forward pass. Attention is counted without causal sparsity;
    recomputation, keys outside a window, and experts that a token does not go to are not counted.
    Where a head is hidden size / number of heads wide, and there are no experts, this is

        12 B s L h^2 (1 + ffn/h g + ng/nh + s/h + V/(2 L h)),    g = 1.5 with a gated MLP, else 1

    Args:
        arch: The model.
        global_batch_size: B.
        seq_length: s; of samples of several lengths, the mean.
        padded_vocab_size: V.
        keys: Tokens of its sequence, for a token on average; s if None.
    """
    attended = seq_length if keys is None else keys
    projections = _projections(arch)
    products: float = arch.hidden_size * padded_vocab_size
    for layer, window in enumerate(arch.windows):
        seen = min(attended, window or attended)
        products += projections + _scores(arch, seen) + _feed_forward(arch, layer)
    forward = 2.0 * products * global_batch_size * seq_length
    return 3.0 * forward


def _projections(arch: Architecture) -> int:
    """Count the multiplications of a token in the linear layers of attention."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    if not arch.multi_latent_attention:
        queries, keys = heads * arch.head_dim, arch.query_groups * arch.head_dim
        return 2 * hidden * queries + 2 * hidden * keys
    queries, values = heads * arch.query_head_dim, heads * arch.value_head_dim
    rank = arch.q_lora_rank
    query = hidden * queries if rank is None else rank * (hidden + queries)
    latent, position = arch.kv_lora_rank or 0, arch.qk_pos_emb_head_dim or 0
    up = latent * (heads * (arch.qk_head_dim or 0) + values)
    return query + hidden * (latent + position) + up + values * hidden


def _scores(arch: Architecture, keys: float) -> float:
    """Count the multiplications of a token with so many keys and values."""
    return arch.num_attention_heads * (arch.head_dim + arch.value_head_dim) * keys


def _feed_forward(arch: Architecture, layer: int) -> int:
    """Count the multiplications of a token in the MLP of a layer, or its experts and router."""
    matrices = 3 if arch.is_gated else 2
    if not arch.has_experts(layer):
        return matrices * arch.hidden_size * arch.ffn_size
    width = arch.moe_router_topk * arch.expert_size + arch.shared_expert_size
    return arch.hidden_size * (matrices * width + (arch.num_experts or 0))


def tokens_per_second_per_device(
    global_batch_size: int, seq_length: float, *, world_size: int, seconds: float
) -> float:
    """Return tokens/s of one device from the time of a step."""
    return global_batch_size * seq_length / (world_size * seconds)


def tflops_per_device(flops: float, *, world_size: int, seconds: float) -> float:
    """Return TFLOP/s of one device from the FLOP and the time of a step."""
    return flops / (world_size * seconds) / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    """Return the part of its peak that a device reaches with what the model needs."""
    return tflops / peak_tflops
