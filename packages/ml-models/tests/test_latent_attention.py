"""Latent attention is DeepSeek's own in transformers, alone, cut over ranks, and in pieces."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_layer import (
    LATENT,
    LENGTH,
    YARN,
    architecture,
    assert_close,
    assert_ranks_are_one,
    hidden_states,
    in_pieces_and_at_once,
    outputs_and_gradients,
    upstream,
    weights,
)
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

ARCHITECTURES = {
    "v3": architecture(**LATENT, **YARN),
    "v2": architecture(**LATENT, **YARN),
    "v2 without a latent vector of queries": architecture(**{**LATENT, "q_lora_rank": None}),
}
NAMES = {
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
    "o_proj": "linear_proj",
}


def transformers_config(name, arch):
    rope = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_scaling_type:
        rope |= {
            "rope_type": "yarn",
            "factor": arch.rope_scaling_factor,
            "original_max_position_embeddings": arch.original_max_position_embeddings,
            "mscale": arch.rope_scaling_mscale,
            "mscale_all_dim": arch.rope_scaling_mscale_all_dim,
        }
    kind = DeepseekV3Config if name == "v3" else DeepseekV2Config
    return kind(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_attention_heads,
        q_lora_rank=arch.q_lora_rank,
        kv_lora_rank=arch.kv_lora_rank,
        qk_nope_head_dim=arch.qk_head_dim,
        qk_rope_head_dim=arch.qk_pos_emb_head_dim,
        v_head_dim=arch.v_head_dim,
        max_position_embeddings=arch.max_position_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
    )


def expected(name):
    """Return output `(S, B, H)` and gradients of transformers' class, by our names."""
    arch = ARCHITECTURES[name]
    config = transformers_config(name, arch)
    if name == "v3":
        attention, rotary = v3.DeepseekV3Attention(config, 0), v3.DeepseekV3RotaryEmbedding(config)
    else:
        attention, rotary = v2.DeepseekV2Attention(config, 0), v2.DeepseekV2RotaryEmbedding(config)
    ours = weights(arch, 0)
    with torch.no_grad():
        for key, parameter in attention.named_parameters():
            module, _, kind = key.rpartition(".")
            parameter.copy_(ours.pop(f"{NAMES[module]}.{kind}"))
    assert not ours
    hidden = hidden_states(arch).requires_grad_()
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    positions = rotary(hidden, torch.arange(LENGTH)[None])
    given = {"position_embeddings": positions, "attention_mask": mask}
    output = attention(hidden.transpose(0, 1), **given)[0].transpose(0, 1)
    (output * upstream(hidden.detach())).sum().backward()
    gradients = {}
    for key, parameter in attention.named_parameters():
        module, _, kind = key.rpartition(".")
        gradients[f"{NAMES[module]}.{kind}"] = parameter.grad
    return output.detach(), hidden.grad, gradients


def every_case(topology):
    from ml_parallel.groups import initialize_groups

    initialize_groups(topology)
    return {name: outputs_and_gradients(arch, 0, topology) for name, arch in ARCHITECTURES.items()}


@functools.cache
def ranks(size, sequence_parallel, use_mc2):
    topology = Topology(
        tensor_model_parallel_size=size, sequence_parallel=sequence_parallel, use_mc2=use_mc2
    )
    return run_ranks(every_case, size, topology)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("size", "sequence_parallel", "use_mc2"),
    [(1, False, False), (2, False, False), (2, True, False), (2, True, True)],
)
def test_outputs_and_gradients_are_those_of_transformers(name, size, sequence_parallel, use_mc2):
    found = [rank[name] for rank in ranks(size, sequence_parallel, use_mc2)]
    assert_ranks_are_one(
        found, expected(name), ARCHITECTURES[name], 0, is_cut=sequence_parallel, tolerance=5e-6
    )


def in_pieces(arch):
    from ml_parallel.groups import initialize_groups

    initialize_groups(Topology())
    return in_pieces_and_at_once(arch, 0)


def test_decoding_step_by_step_is_the_whole_at_once():
    ((pieces, whole),) = run_ranks(in_pieces, 1, ARCHITECTURES["v3"])
    assert_close(pieces, torch.from_numpy(whole), "decoding", tolerance=5e-6)
