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
    seconds = math.fsum(step.elapsed_seconds for step in steps) / len(steps)
    speed = last.elapsed_seconds / seconds
    return replace(
        last,
        elapsed_seconds=seconds,
        loss=math.fsum(losses) / len(losses) if losses else last.loss,
        skipped_iterations=sum(step.skipped_iterations for step in steps),
        nan_iterations=sum(step.nan_iterations for step in steps),
        tokens_per_second_per_device=last.tokens_per_second_per_device * speed,
        tflops_per_device=last.tflops_per_device * speed,
        mfu=last.mfu * speed,
    )


def model_flops_per_iteration(
    arch: Architecture, global_batch_size: int, *, seq_length: int, padded_vocab_size: int
) -> float:
    """Return the FLOP of forward and backward that the model needs, as Megatron counts them.

    The backward pass is twice the forward pass. Attention is counted without causal sparsity, and
    recomputation is not counted. Where a head is hidden size / number of heads wide this is

        12 B s L h^2 (1 + ffn/h g + ng/nh + s/h + V/(2 L h)),    g = 1.5 with a gated MLP, else 1
    """
    hidden = arch.hidden_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.query_groups * arch.head_dim
    attention = 2 * hidden * queries + 2 * hidden * keys
    scores = 2 * seq_length * queries
    mlp = (3 if arch.swiglu else 2) * hidden * arch.ffn_size
    products_per_token = arch.num_layers * (attention + scores + mlp) + hidden * padded_vocab_size
    forward = 2.0 * products_per_token * global_batch_size * seq_length
    return 3.0 * forward


def tokens_per_second_per_device(
    global_batch_size: int, seq_length: int, *, world_size: int, seconds: float
) -> float:
    """Return tokens/s of one device from the time of a step."""
    return global_batch_size * seq_length / (world_size * seconds)


def tflops_per_device(flops: float, *, world_size: int, seconds: float) -> float:
    """Return TFLOP/s of one device from the FLOP and the time of a step."""
    return flops / (world_size * seconds) / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    """Return the part of its peak that a device reaches with what the model needs."""
    return tflops / peak_tflops
