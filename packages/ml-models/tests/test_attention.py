"""Self attention: every variant is its formula in float64, alone, cut over ranks, and in pieces."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from attention_layer import (
    CASES,
    architecture,
    assert_close,
    assert_ranks_are_one,
    build,
    hidden_states,
    in_pieces_and_at_once,
    outputs_and_gradients,
    upstream,
    weights,
)

from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

ARCHITECTURES = {name: (architecture(**fields), layer) for name, (fields, layer) in CASES.items()}


def formula(arch, layer, w, hidden):
    """Return `(S, B, H)` in float64 from the weights by name."""
    length, batch, _ = hidden.shape
    groups, per_group = arch.query_groups, arch.num_attention_heads // arch.query_groups
    qkv = hidden @ w["linear_qkv.weight"].T + w.get("linear_qkv.bias", 0)
    qkv = qkv.view(length, batch, groups, per_group + 2, arch.head_dim)
    q, k = qkv[..., :per_group, :].flatten(2, 3), qkv[..., per_group, :]
    v = qkv[..., per_group + 1, :]
    if arch.qk_layernorm:
        q, k = (_norm(arch, w, x, name) for x, name in ((q, "q_layernorm"), (k, "k_layernorm")))
    if arch.layers_with_rope[layer]:
        q, k = _rotate(arch, layer, q), _rotate(arch, layer, k)
    k, v = (x.repeat_interleave(per_group, 2) for x in (k, v))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k)
    scores = scores * (arch.softmax_scale or arch.head_dim**-0.5)
    if arch.attn_logit_softcapping:
        scores = arch.attn_logit_softcapping * torch.tanh(scores / arch.attn_logit_softcapping)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    if arch.position_embedding_type == "alibi":
        heads = arch.num_attention_heads
        slopes = torch.tensor([2.0 ** (-8 * (n + 1) / heads) for n in range(heads)]).double()
        scores = scores - slopes[:, None, None] * behind
    hidden_keys = (behind < 0) | (behind >= (arch.windows[layer] or length))
    scores = scores.masked_fill(hidden_keys, -math.inf)
    if arch.softmax_type == "learnable":
        sinks = w["core_attention.softmax_offset"][:, None, None]
        scores = torch.cat((scores, sinks.expand(batch, -1, length, 1)), -1)
    attention = scores.softmax(-1)[..., :length]
    context = torch.einsum("bnqk,kbnd->qbnd", attention, v).flatten(2)
    return context @ w["linear_proj.weight"].T + w.get("linear_proj.bias", 0)


def _norm(arch, w, x, name):
    weight = w[f"{name}.weight"] + (1 if arch.add_rmsnorm_offset else 0)
    if arch.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + arch.norm_epsilon).sqrt()
    return x * weight + w.get(f"{name}.bias", 0)


def _rotate(arch, layer, x):
    dim = arch.rotary_dim
    windowed = arch.windows[layer] is not None
    base = arch.rotary_base_local if windowed and arch.rotary_base_local else arch.rotary_base
    speeds = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = torch.polar(torch.ones(()).double(), torch.arange(len(x))[:, None] * speeds)
    turning, rest = x[..., :dim], x[..., dim:]
    if arch.rotary_interleaved:
        pairs = turning.unflatten(-1, (-1, 2))
    else:
        pairs = turning.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns[:, None, None])
    if not arch.rotary_interleaved:
        turned = turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), rest), -1)


def every_case(cases, topology):
    from ml_parallel.groups import initialize_groups

    initialize_groups(topology)
    return {
        name: outputs_and_gradients(arch, layer, topology) for name, (arch, layer) in cases.items()
    }


def expected(arch, layer):
    """Return the output, and the gradients of the input and of the parameters, of the formula."""
    hidden = hidden_states(arch).double().requires_grad_()
    w = {name: x.double().requires_grad_() for name, x in weights(arch, layer).items()}
    output = formula(arch, layer, w, hidden)
    (output * upstream(hidden.detach().float()).double()).sum().backward()
    return output.detach(), hidden.grad, {name: x.grad for name, x in w.items()}


@pytest.fixture(scope="module")
def alone():
    (found,) = run_ranks(every_case, 1, ARCHITECTURES, Topology())
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(alone, name):
    arch, layer = ARCHITECTURES[name]
    assert_ranks_are_one(
        [alone[name]], expected(arch, layer), arch, layer, is_cut=False, tolerance=2e-5
    )


CUT = ("alibi", "sinks", "query and key norms", "soft-capped", "all biases")


@functools.cache
def cut(size, sequence_parallel):
    cases = {name: ARCHITECTURES[name] for name in CUT}
    topology = Topology(
        tensor_model_parallel_size=size, sequence_parallel=sequence_parallel, use_mc2=False
    )
    return run_ranks(every_case, size, cases, topology)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, False)])
def test_ranks_together_are_one(name, size, sequence_parallel):
    """Cut over 4 ranks, two ranks share each of two groups."""
    arch, layer = ARCHITECTURES[name]
    ranks = [rank[name] for rank in cut(size, sequence_parallel)]
    assert_ranks_are_one(
        ranks, expected(arch, layer), arch, layer, is_cut=sequence_parallel, tolerance=2e-5
    )


LATENT = architecture(
    multi_latent_attention=True,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_head_dim=6,
    qk_pos_emb_head_dim=4,
    v_head_dim=5,
    qk_layernorm=True,
)


def global_shapes(arch):
    """Return what a distributed checkpoint of megatron-core says of the parameters."""
    from ml_parallel.groups import initialize_groups

    topology = Topology(tensor_model_parallel_size=2)
    initialize_groups(topology)
    sharded = build(arch, 0, topology).sharded_state_dict()
    return {
        name: tuple(tensor.global_shape)
        for name, tensor in sharded.items()
        if not name.endswith("_extra_state")  # of Transformer Engine; ours have none
    }


@pytest.mark.parametrize("arch", [ARCHITECTURES["sinks"][0], LATENT], ids=["sinks", "latent"])
def test_distributed_checkpoints_know_how_parameters_are_cut(arch):
    whole = {name: tuple(x.shape) for name, x in weights(arch, 0).items()}
    for shapes in run_ranks(global_shapes, 2, arch):
        assert shapes == whole


def every_piece(cases):
    from ml_parallel.groups import initialize_groups

    initialize_groups(Topology())
    return {name: in_pieces_and_at_once(*case) for name, case in cases.items()}


DECODED = {
    **{name: ARCHITECTURES[name] for name in ("plain", "alibi", "sinks", "soft-capped")},
    **{name: ARCHITECTURES[name] for name in ("base of windows", "query and key norms")},
}


@pytest.fixture(scope="module")
def decoded():
    (found,) = run_ranks(every_piece, 1, DECODED)
    return found


@pytest.mark.parametrize("name", DECODED)
def test_decoding_step_by_step_is_the_whole_at_once(decoded, name):
    pieces, whole = decoded[name]
    assert_close(pieces, torch.from_numpy(whole), "decoding", tolerance=5e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"position_embedding_type": "alibi"}, "--position-embedding-type alibi"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
    ],
)
def test_soft_capping_is_refused_where_no_model_says_what_it_means(other, message):
    with pytest.raises(ValueError, match=f"--attn-logit-softcapping: .* with {message}"):
        architecture(attn_logit_softcapping=30.0, **other)


WINDOWED = architecture(
    num_layers=5, sliding_window=7, window_attn_skip_freq=(0, 1, 1, 0, 1), no_rope_freq=(2,)
)


def numbers_and_windows(topology):
    from ml_models.gpt import build_model, transformer_config
    from ml_parallel.groups import initialize_groups
    from ml_parallel.stages import stage_layers

    arch = WINDOWED if topology.num_layer_list else EVEN
    initialize_groups(topology, num_chunks=len(stage_layers(arch.num_layers, topology)[0]))
    chunks = build_model(
        arch, topology, transformer_config(arch, topology), padded_vocab_size=16, seq_length=16
    )
    for chunk in chunks:
        attentions = [layer.self_attention for layer in chunk.module.decoder.layers]
        assert [a.layer_number - 1 for a in attentions] == list(chunk.layers)
        windows = [a.core_attention.window for a in attentions]
        assert windows == [arch.windows[layer] for layer in chunk.layers]
    return [layer for chunk in chunks for layer in chunk.layers]


EVEN = architecture(num_layers=4, sliding_window=7, window_attn_skip_freq=(0, 1, 1, 0))


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({}, [[0, 1], [2, 3]]),
        ({"num_layers_per_virtual_pipeline_stage": 1}, [[0, 2], [1, 3]]),
        ({"num_layer_list": (3, 2)}, [[0, 1, 2], [3, 4]]),
    ],
)
def test_layers_know_their_number_in_every_pipeline(options, held):
    topology = Topology(pipeline_model_parallel_size=2, **options)
    assert run_ranks(numbers_and_windows, 2, topology) == held
