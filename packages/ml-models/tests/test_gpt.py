"""The model on megatron-core: initialised alike in every layout, and right."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from ml_models.architecture import Architecture
from ml_models.weights import padded_vocab_size, parameters, shard_runs
from ml_parallel.stages import stage_layers
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

ARCH = Architecture(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    max_position_embeddings=64,
    vocab_size=101,
    swiglu=True,
    normalization="RMSNorm",
    add_bias_linear=False,
    add_qkv_bias=True,
    untie_embeddings_and_output_weights=True,
)
TIED = dataclasses.replace(ARCH, untie_embeddings_and_output_weights=False)
EXPERTS = dataclasses.replace(
    ARCH, num_experts=4, moe_ffn_hidden_size=24, n_shared_experts=1, first_k_dense_replace=1
)


def build(arch, topology, seed=3):
    from ml_models.gpt import build_model, transformer_config
    from ml_models.initialize import initialize
    from ml_parallel.groups import initialize_groups

    stages = stage_layers(arch.num_layers, topology)
    place = initialize_groups(topology, num_chunks=len(stages[0]))
    rows = padded_vocab_size(
        arch.vocab_size,
        make_vocab_size_divisible_by=4,
        tensor_model_parallel_size=topology.tensor_model_parallel_size,
    )
    config = transformer_config(arch, topology)
    chunks = build_model(arch, topology, config, padded_vocab_size=rows, seq_length=16)
    tp = {"tp_rank": place.tp_rank, "tp_size": place.tp_size}
    initialize(chunks, arch, seed=seed, padded_vocab_size=rows, **tp)
    return chunks, place, rows


def shards(arch, topology):
    chunks, place, rows = build(arch, topology)
    return [
        (chunk.global_name(name), place.tp_rank, place.tp_size, rows, tensor.detach().clone())
        for chunk in chunks
        for name, tensor in chunk.module.named_parameters()
    ]


def shards_by_pickle(arch, topology):
    return [(*entry[:-1], entry[-1].numpy()) for entry in shards(arch, topology)]


CUTS = [
    (2, Topology(tensor_model_parallel_size=2)),
    (2, Topology(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)),
    (4, Topology(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
]
DEALT = Topology(tensor_model_parallel_size=2, expert_model_parallel_size=2)


@pytest.mark.parametrize(
    ("arch", "world_size", "topology"),
    [(arch, *cut) for arch in (ARCH, TIED) for cut in CUTS] + [(EXPERTS, 4, DEALT)],
)
def test_initial_weights_are_those_of_a_single_process(arch, world_size, topology):
    (single,) = run_ranks(shards_by_pickle, 1, arch, Topology())
    whole = {name: torch.from_numpy(values) for name, *_, values in single}
    table = {p.name: p for p in parameters(arch)}
    seen = set()
    for rank in run_ranks(shards_by_pickle, world_size, arch, topology):
        for name, tp_rank, tp_size, rows, values in rank:
            tied = name not in table
            parameter = table["embedding.word_embeddings.weight" if tied else name]
            seen.add(parameter.name)
            shape, runs = shard_runs(
                parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=rows
            )
            dim = parameter.split.dim if parameter.split else 0
            expected = torch.zeros(shape)
            for run in runs:
                part = whole[parameter.name].narrow(dim, run.global_start, run.length)
                expected.narrow(dim, run.local_start, run.length).copy_(part)
            assert torch.equal(torch.from_numpy(values), expected), name
    assert seen == set(table)


def test_the_seed_and_the_name_decide_the_weights():
    def two_seeds(arch):
        weights = []
        for seed in (3, 3, 4):
            chunks, *_ = build(arch, Topology(), seed)
            module = chunks[0].module
            weights.append({n: p.detach() for n, p in module.named_parameters() if p.dim() == 2})
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        first, again, different = weights
        same = all(torch.equal(first[name], again[name]) for name in first)
        other = any(torch.equal(first[name], different[name]) for name in first)
        alike = torch.equal(*(first[f"decoder.layers.{n}.mlp.linear_fc1.weight"] for n in (0, 1)))
        return same, other, alike, {name: float(p.std()) for name, p in first.items()}

    ((same, other, alike, deviations),) = run_ranks(two_seeds, 1, ARCH)
    assert same
    assert not other
    assert not alike
    for name, deviation in deviations.items():
        scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / (2 * ARCH.num_layers) ** 0.5 if scaled else 0.02
        assert deviation == pytest.approx(expected, rel=0.05), name


def loss_and_formula(arch):
    """Return the model's loss and that of a plain float64 transformer with its weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    chunks, *_ = build(arch, Topology())
    model_parallel_cuda_manual_seed(1)
    module = chunks[0].module
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)  # norms and biases that matter
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, arch.vocab_size, (2, 17), generator=generator)
    positions = torch.arange(16).expand(2, -1)
    loss = module(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    weights = {name: t.detach().double() for name, t in module.named_parameters()}
    expected = formula(arch, weights, tokens)
    return loss.detach().numpy(), expected.numpy()


def formula(arch, w, tokens):
    def norm(x, name):
        x = x / (x.pow(2).mean(-1, keepdim=True) + arch.norm_epsilon).sqrt()
        return x * w[f"{name}.weight"]

    def rotate(x):  # (B, S, N, D)
        half = arch.head_dim // 2
        speeds = arch.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = (torch.arange(x.shape[1])[:, None] * speeds)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1
        )

    x = w["embedding.word_embeddings.weight"][tokens[:, :-1]]
    groups, per_group = arch.query_groups, arch.num_attention_heads // arch.query_groups
    for layer in range(arch.num_layers):
        p = f"decoder.layers.{layer}"
        h = norm(x, f"{p}.input_layernorm")
        qkv = h @ w[f"{p}.self_attention.linear_qkv.weight"].T
        qkv = qkv + w[f"{p}.self_attention.linear_qkv.bias"]
        qkv = qkv.view(*h.shape[:2], groups, per_group + 2, arch.head_dim)
        q = rotate(qkv[..., :per_group, :].flatten(2, 3))
        k, v = rotate(qkv[..., per_group, :]), qkv[..., per_group + 1, :]
        k, v = (t.repeat_interleave(per_group, 2) for t in (k, v))
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) / arch.head_dim**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attention = scores.masked_fill(future, -torch.inf).softmax(-1)
        context = torch.einsum("bnqk,bknd->bqnd", attention, v).flatten(2)
        x = x + context @ w[f"{p}.self_attention.linear_proj.weight"].T
        h = norm(x, f"{p}.pre_mlp_layernorm")
        gate, up = (h @ w[f"{p}.mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ w[f"{p}.mlp.linear_fc2.weight"].T
    table = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])
    logits = norm(x, "decoder.final_layernorm") @ table[: arch.vocab_size].T
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(tokens.shape[0], -1)


@pytest.mark.parametrize("arch", [ARCH, TIED], ids=["untied", "tied"])
def test_the_loss_is_that_of_the_published_formula(arch):
    ((found, expected),) = run_ranks(loss_and_formula, 1, arch)
    assert found == pytest.approx(expected, rel=1e-5)


def cut_loss(arch, topology):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    chunks, *_ = build(arch, topology)
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, arch.vocab_size, (2, 17), generator=generator)
    positions = torch.arange(16).expand(2, -1)
    return chunks[0].module(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).detach().numpy()


def test_padding_of_the_vocabulary_takes_no_probability():
    (single,) = run_ranks(cut_loss, 1, ARCH, Topology())
    for cut in run_ranks(cut_loss, 4, dataclasses.replace(ARCH, num_query_groups=4), TP4):
        assert cut.shape == single.shape
    expected = run_ranks(cut_loss, 1, dataclasses.replace(ARCH, num_query_groups=4), Topology())[0]
    assert cut == pytest.approx(expected, rel=1e-5)


TP4 = Topology(tensor_model_parallel_size=4, sequence_parallel=True)


def modules_by_name(arch, topology):
    chunks, *_ = build(arch, topology)
    return {name: type(module).__name__ for name, module in chunks[0].module.named_modules()}


@pytest.mark.parametrize(
    ("swiglu", "normalization", "activation", "norm"),
    [(True, "RMSNorm", "SwiGLU", "RMSNorm"), (False, "LayerNorm", "GELU", "LayerNorm")],
)
def test_layers_are_made_of_our_operators(swiglu, normalization, activation, norm):
    arch = dataclasses.replace(ARCH, swiglu=swiglu, normalization=normalization)
    (found,) = run_ranks(modules_by_name, 1, arch, Topology())
    layer = "decoder.layers.0"
    assert found[f"{layer}.mlp.activation_func"] == activation
    assert found[f"{layer}.self_attention.core_attention"] == "CoreAttention"
    norms = (f"{layer}.input_layernorm", f"{layer}.pre_mlp_layernorm", "decoder.final_layernorm")
    assert {found[name] for name in norms} == {norm}
    assert found["output_layer"] == "OutputLayer"


@pytest.mark.parametrize("use_mc2", [True, False])
def test_mc2_is_used_where_it_is_asked_for(use_mc2):
    topology = Topology(tensor_model_parallel_size=2, sequence_parallel=True, use_mc2=use_mc2)
    found = run_ranks(modules_by_name, 2, ARCH, topology)[0]
    linears = {
        name: kind for name, kind in found.items() if "layers.0" in name and "linear" in name
    }
    columns = {"GatheringLinear"} if use_mc2 else {"ColumnLinear"}
    rows = {"ScatteringLinear"} if use_mc2 else {"RowLinear"}
    assert {kind for name, kind in linears.items() if name.endswith(("qkv", "fc1"))} == columns
    assert {kind for name, kind in linears.items() if name.endswith(("proj", "fc2"))} == rows


def attention_asked_for(arch, **more):
    chunks, *_ = build(arch, Topology())
    attention = chunks[0].module.decoder.layers[0].self_attention.core_attention
    heads = (arch.num_attention_heads, arch.query_groups, arch.query_groups)
    query, key, value = (torch.randn(5, 1, n, arch.head_dim) for n in heads)
    try:
        return tuple(attention(query, key, value, None, **more).shape)
    except ValueError as error:
        return str(error)


def test_attention_refuses_what_it_would_ignore():
    assert run_ranks(attention_asked_for, 1, ARCH) == [(5, 1, ARCH.hidden_size)]
    asked = functools.partial(attention_asked_for, attention_bias=torch.zeros(1))
    assert run_ranks(asked, 1, ARCH) == ["attention here is causal: no attention_bias"]


LLAMA3_405B = Architecture(
    num_layers=126,
    hidden_size=16384,
    num_attention_heads=128,
    num_query_groups=8,
    ffn_hidden_size=53248,
    max_position_embeddings=131072,
    vocab_size=128256,
    swiglu=True,
    normalization="RMSNorm",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)


def size_without_memory(arch):
    from ml_models.gpt import build_model, transformer_config
    from ml_parallel.groups import initialize_groups

    initialize_groups(Topology())
    config = transformer_config(arch, Topology(), params_dtype=torch.bfloat16)
    with torch.device("meta"):
        rows = arch.vocab_size
        (chunk,) = build_model(arch, Topology(), config, padded_vocab_size=rows, seq_length=8192)
    tensors = dict(chunk.tensors())
    return sum(t.numel() for t in tensors.values()), {t.device.type for t in tensors.values()}


def test_405_billion_parameters_need_no_memory_on_the_meta_device():
    ((size, devices),) = run_ranks(size_without_memory, 1, LLAMA3_405B)
    assert size == 405_853_388_800  # as published
    assert devices == {"meta"}
