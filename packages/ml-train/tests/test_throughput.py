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


def test_only_the_experts_that_a_token_goes_to_work() -> None:
    arch = Architecture(
        num_layers=3,
        hidden_size=10,
        num_attention_heads=5,
        ffn_hidden_size=30,
        max_position_embeddings=8,
        geglu=True,
        add_bias_linear=False,
        num_experts=16,
        moe_router_topk=3,
        moe_ffn_hidden_size=7,
        n_shared_experts=2,
        first_k_dense_replace=1,
    )
    # A token: query, key, value and output 10 x 10 each, scores and values 8 x 10 each; one MLP of
    # 3 x 10 x 30; twice a router of 10 x 16 and 3 + 2 experts of 3 x 10 x 7; logits 10 x 50.
    layers = 3 * (400 + 160) + 900 + 2 * (160 + 5 * 210)
    flops = 3 * 2 * 5 * 8 * (layers + 500)
    assert model_flops_per_iteration(arch, 5, seq_length=8, padded_vocab_size=50) == flops


def test_keys_outside_a_window_are_no_work() -> None:
    arch = Architecture(
        num_layers=2,
        hidden_size=10,
        num_attention_heads=5,
        ffn_hidden_size=30,
        max_position_embeddings=8,
        sliding_window=3,
        window_attn_skip_freq=(2,),
    )
    layers = 2 * (400 + 2 * 300) + (3 + 8) * 2 * 10
    flops = 3 * 2 * 5 * 8 * (layers + 500)
    assert model_flops_per_iteration(arch, 5, seq_length=8, padded_vocab_size=50) == flops


def test_keys_of_other_sequences_are_no_work() -> None:
    arch = Architecture(
        num_layers=2,
        hidden_size=10,
        num_attention_heads=5,
        ffn_hidden_size=30,
        max_position_embeddings=8,
        sliding_window=3,
        window_attn_skip_freq=(2,),
    )
    layers = 2 * (400 + 2 * 300) + (3 + 4.5) * 2 * 10
    flops = 3 * 2 * 5 * 8 * (layers + 500)
    packed = {"seq_length": 8, "keys": 4.5, "padded_vocab_size": 50}
    assert model_flops_per_iteration(arch, 5, **packed) == flops


@pytest.mark.parametrize(("q_lora_rank", "query"), [(None, 10 * 20), (6, 10 * 6 + 6 * 20)])
def test_latent_attention_is_counted_as_it_is_computed(q_lora_rank: int | None, query: int) -> None:
    arch = Architecture(
        num_layers=1,
        hidden_size=10,
        num_attention_heads=4,
        ffn_hidden_size=30,
        max_position_embeddings=8,
        multi_latent_attention=True,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=9,
        qk_head_dim=3,
        qk_pos_emb_head_dim=2,
        v_head_dim=7,
    )
    # Down 10 x (9 + 2), up 9 x 4 x (3 + 7), output 28 x 10; scores 8 x 20, values 8 x 28.
    layer = query + 110 + 360 + 280 + 160 + 224 + 600
    flops = 3 * 2 * 5 * 8 * (layer + 500)
    assert model_flops_per_iteration(arch, 5, seq_length=8, padded_vocab_size=50) == flops


def test_throughput_is_of_one_device() -> None:
    assert tokens_per_second_per_device(16, 512, world_size=4, seconds=0.5) == 4096.0
    assert tflops_per_device(6e12, world_size=4, seconds=0.5) == 3.0
    assert mfu(177.0, 354.0) == 0.5


def test_an_average_is_over_the_time_of_all_steps() -> None:
    names = ("elapsed_seconds", "tokens_per_second_per_device", "tflops_per_device", "mfu")
    numbers = ((0.1, 20_000.0, 20.0, 0.4), (0.3, 10_000.0, 12.0, 0.24))  # 2000, then 3000 tokens
    steps = [make_step(i, **dict(zip(names, step, strict=True))) for i, step in enumerate(numbers)]
    mean = average(steps)
    assert (mean.iteration, mean.consumed_samples) == (1, 16)
    assert mean.elapsed_seconds == pytest.approx(0.2)
    assert mean.tokens_per_second_per_device == pytest.approx(5000 / 0.4)
    assert mean.tflops_per_device == pytest.approx(5.6 / 0.4)
    assert mean.mfu == pytest.approx(0.112 / 0.4)


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
