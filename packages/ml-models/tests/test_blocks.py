"""Blocks of every kind: the losses and gradients of a plain float64 model, in every layout."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import plain_gpt
import pytest
import torch
from test_gpt import ARCH, build

from ml_models.weights import parameters, shard_runs
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

SMALL = dataclasses.replace(ARCH, num_layers=2, hidden_size=32, kv_channels=8, ffn_hidden_size=48)


def arch(**changes):
    return dataclasses.replace(SMALL, add_qkv_bias=False, **changes)


BLOOM = arch(
    swiglu=False, approximate_gelu=True, normalization="LayerNorm", add_bias_linear=True,
    embed_layernorm=True, untie_embeddings_and_output_weights=False,
)  # fmt: skip
GPT2 = dataclasses.replace(
    BLOOM, embed_layernorm=False, approximate_gelu=False,
    position_embedding_type="learned_absolute", use_rotary_position_embeddings=False,
    max_position_embeddings=40,
)  # fmt: skip
GEMMA2 = arch(
    swiglu=False, geglu=True, add_rmsnorm_offset=True, post_norm=True, input_embeds_norm=True,
    final_logit_softcapping=3.0, untie_embeddings_and_output_weights=False,
)  # fmt: skip
GROK1 = arch(
    swiglu=False, geglu=True, post_norm=True, embedding_multiplier_scale=5.5,
    output_multiplier_scale=0.6, num_experts=4, moe_router_pre_softmax=True,
)  # fmt: skip
BAICHUAN2 = arch(norm_head=True, add_dense_bias=True)
GPT_OSS = arch(
    swiglu=False, quick_geglu=True, activation_func_clamp_value=0.4, glu_linear_offset=1.0,
    add_bias_linear=True, num_experts=4, moe_ffn_hidden_size=24,
)  # fmt: skip
DEEPSEEK3 = arch(
    num_experts=8, moe_router_topk=3, moe_ffn_hidden_size=16, n_shared_experts=2,
    first_k_dense_replace=1, moe_router_score_function="sigmoid", norm_topk_prob=True,
    routed_scaling_factor=2.5, moe_router_num_groups=4, moe_router_group_topk=2,
    moe_router_group_score="top2_sum", moe_router_enable_expert_bias=True,
)  # fmt: skip
DEEPSEEK2 = arch(
    num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=16, moe_router_pre_softmax=True,
    moe_shared_expert_intermediate_size=20, moe_shared_expert_gate=True, moe_layer_freq=(0, 1),
    moe_router_num_groups=4, moe_router_group_topk=2, routed_scaling_factor=1.5,
)  # fmt: skip

BLOCKS = {
    "bloom": BLOOM,
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "grok1": GROK1,
    "baichuan2": BAICHUAN2,
    "gpt_oss": GPT_OSS,
    "deepseek3": DEEPSEEK3,
    "deepseek2": DEEPSEEK2,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}


def tokens_of(arch):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, arch.vocab_size, (2, 17), generator=generator)


def disturbance(name, shape):
    """Return what is added to a tensor, so that norms and biases matter: of its name alone."""
    seed = int.from_bytes(name.encode()) % (1 << 62)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def disturbed(arch, topology):
    """Build this rank's model and move every tensor by its part of the disturbance."""
    chunks, place, rows = build(arch, topology)
    (chunk,) = chunks
    with torch.no_grad():
        for name, tensor in chunk.tensors():
            whole_name, table = chunk.global_name(name), chunk.parameters[name]
            whole = disturbance(whole_name, table.shape)
            _, runs = shard_runs(
                table, tp_size=place.tp_size, tp_rank=place.tp_rank, padded_vocab_size=rows
            )
            dim = table.split.dim if table.split else 0
            for run in runs:
                part = whole.narrow(dim, run.global_start, run.length)
                tensor.narrow(dim, run.local_start, run.length).add_(part)
    return chunk


def loss_and_gradients(arch, topology, compare):
    """Return the loss, and (name, tensor-parallel rank, gradient), of a model in evaluation."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    chunk = disturbed(arch, topology)
    model_parallel_cuda_manual_seed(1)
    module = chunk.module
    tokens = tokens_of(arch)
    positions = torch.arange(16).expand(2, -1)
    loss = module(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    if not compare:
        return loss.detach().numpy()
    loss.mean().backward()
    weights = {n: t.detach().double().requires_grad_(n in gradients(module)) for n, t in
               ((chunk.global_name(n), t) for n, t in chunk.tensors())}  # fmt: skip
    expected = plain_gpt.loss(arch, weights, tokens)
    expected.mean().backward()
    worst = {}
    for name, grad in gradients(module).items():
        reference = weights[name].grad
        if reference is None:  # an expert that no token went to
            assert not grad.any()
            continue
        worst[name] = float((grad - reference).abs().max() / reference.abs().max())
    return loss.detach().numpy(), expected.detach().numpy(), worst


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


@functools.cache
def single(block):
    return run_ranks(loss_and_gradients, 1, BLOCKS[block], Topology(), True)[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_losses_and_gradients_are_those_of_a_plain_model(block):
    found, expected, worst = single(block)
    assert found == pytest.approx(expected, rel=1e-5)
    trained = {p.name for p in parameters(BLOCKS[block]) if not p.float32}
    assert trained - set(worst) <= {n for n in trained if ".local_experts." in n}
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize(
    ("block", "world_size", "cut"),
    [
        *((block, 2, TP2) for block in BLOCKS),
        *((block, 2, EP2) for block in ("gpt_oss", "deepseek3")),
        *((block, 4, {**TP2, **EP2}) for block in ("gpt_oss", "deepseek2")),
    ],
)
def test_losses_are_alike_in_every_layout(block, world_size, cut):
    expected = single(block)[0]
    arch = BLOCKS[block]
    for found in run_ranks(loss_and_gradients, world_size, arch, Topology(**cut), False):
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
