"""Numbers of a step, against those worked out by hand and the published formula."""

from __future__ import annotations

import pytest
from some_steps import make_step

from ml_models.architecture import Architecture
from ml_train.throughput import (
    average,
    mfu,
    model_flops_per_iteration,
    tflops_per_device,
    tokens_per_second_per_device,
)

LLAMA2_7B = Architecture(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    max_position_embeddings=4096,
    swiglu=True,
)
LLAMA3_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    max_position_embeddings=8192,
    swiglu=True,
)
GPT3_175B = Architecture(
    num_layers=96, hidden_size=12288, num_attention_heads=96, max_position_embeddings=2048
)


def megatrons_formula(arch: Architecture, batch: int, s: int, vocab: int) -> float:
    layers, h = arch.num_layers, arch.hidden_size
    gated = 1.5 if arch.swiglu else 1.0
    return (
        12 * batch * s * layers * h**2
        * (
            1
            + arch.ffn_size / h * gated
            + arch.query_groups / arch.num_attention_heads
            + s / h
            + vocab / (2 * layers * h)
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "batch", "seq_length", "vocab"),
    [
        (LLAMA2_7B, 256, 4096, 32000),
        (LLAMA3_8B, 64, 8192, 128256),
        (GPT3_175B, 1536, 2048, 51200),
    ],
)
def test_flops_are_those_of_megatrons_formula(
    arch: Architecture, batch: int, seq_length: int, vocab: int
) -> None:
    flops = model_flops_per_iteration(arch, batch, seq_length=seq_length, padded_vocab_size=vocab)
    assert flops == pytest.approx(megatrons_formula(arch, batch, seq_length, vocab), rel=1e-12)


def test_flops_of_a_published_run() -> None:
    """Narayanan et al. 2021 (arXiv:2104.04473), equation 3, less the recomputation of layers."""
    s, h, layers, vocab = 2048, 12288, 96, 51200
    paper = 96 * 1536 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    recomputed = 24 * 1536 * s * layers * h**2 * (1 + s / (6 * h))
    flops = model_flops_per_iteration(GPT3_175B, 1536, seq_length=s, padded_vocab_size=vocab)
    assert flops == pytest.approx(paper - recomputed, rel=1e-12)


def test_heads_may_be_wider_or_narrower_than_the_hidden_size() -> None:
    arch = Architecture(
        num_layers=2,
        hidden_size=10,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,
        ffn_hidden_size=30,
        max_position_embeddings=8,
        swiglu=True,
    )
    # Multiplications for one token: query 10 x 24, key and value 10 x 12 each, output 24 x 10,
    # scores and values 8 x 24 each, gate, up and down 10 x 30 each; logits 10 x 50.
    layer = 240 + 120 + 120 + 240 + 192 + 192 + 3 * 300
    flops = 3 * 2 * 5 * 8 * (2 * layer + 500)
    assert model_flops_per_iteration(arch, 5, seq_length=8, padded_vocab_size=50) == flops


def test_throughput_is_of_one_device() -> None:
    assert tokens_per_second_per_device(16, 512, world_size=4, seconds=0.5) == 4096.0
    assert tflops_per_device(6e12, world_size=4, seconds=0.5) == 3.0
    assert mfu(177.0, 354.0) == 0.5


def test_an_average_is_over_the_time_of_all_steps() -> None:
    mean = average([make_step(1, elapsed_seconds=0.1), make_step(2, elapsed_seconds=0.3)])
    assert (mean.iteration, mean.consumed_samples) == (2, 32)
    assert mean.elapsed_seconds == pytest.approx(0.2)
    assert mean.tokens_per_second_per_device == pytest.approx(16384.0 * 0.3 / 0.2)
    assert mean.tflops_per_device == pytest.approx(12.34 * 0.3 / 0.2)
    assert mean.mfu == pytest.approx(0.4567 * 0.3 / 0.2)


def test_an_average_counts_skipped_steps_and_leaves_their_loss_out() -> None:
    steps = [
        make_step(1, loss=4.0),
        make_step(2, loss=float("nan"), skipped_iterations=1, nan_iterations=1),
        make_step(3, loss=5.0),
        make_step(4, loss=9.0, skipped_iterations=1),
    ]
    mean = average(steps)
    assert (mean.loss, mean.skipped_iterations, mean.nan_iterations) == (4.5, 2, 1)
    alone = average(steps[3:])
    assert alone.loss == 9.0
