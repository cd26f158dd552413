"""The table of parameters agrees with what is cut, padded and put back together from it.

The oracle for every cut is plain numpy: concatenating and splitting whole arrays.
"""

import itertools

import numpy as np
import pytest

from ml_models.architecture import Architecture
from ml_models.weights import (
    Parameter,
    Split,
    check_tensor_parallel,
    expert_range,
    global_name,
    local_name,
    padded_vocab_size,
    parameters,
    shard_runs,
    stage_parameters,
    tensor_parallel_sizes,
)

LLAMA = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}


def llama(**changes):
    return Architecture(**{**LLAMA, **changes})


def by_name(arch):
    return {p.name: p for p in parameters(arch)}


def test_a_llama_has_these_parameters_in_this_order():
    names = [p.name for p in parameters(llama(num_layers=1))]
    assert names == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_shapes_are_those_of_the_whole_model():
    table = by_name(llama(kv_channels=16))
    assert table["embedding.word_embeddings.weight"].shape == (100, 32)
    assert table["decoder.layers.2.self_attention.linear_qkv.weight"].shape == (128, 32)
    assert table["decoder.layers.2.self_attention.linear_proj.weight"].shape == (32, 64)
    assert table["decoder.layers.2.mlp.linear_fc1.weight"].shape == (96, 32)
    assert table["decoder.layers.2.mlp.linear_fc2.weight"].shape == (32, 48)
    assert table["decoder.layers.2.input_layernorm.weight"].shape == (32,)
    assert table["output_layer.weight"].shape == (100, 32)


def test_layers_carry_their_number_and_nothing_else_does():
    for parameter in parameters(llama()):
        number = parameter.name.split(".")[2] if "layers" in parameter.name else None
        assert parameter.layer == (None if number is None else int(number))


def test_tied_models_have_no_output_layer():
    assert "output_layer.weight" not in by_name(llama(untie_embeddings_and_output_weights=False))


def test_biases_and_layer_norms_are_listed_when_the_model_has_them():
    table = by_name(llama(normalization="LayerNorm", add_bias_linear=True, swiglu=False))
    first = "decoder.layers.0"
    assert table[f"{first}.input_layernorm.bias"].init == "zeros"
    assert table[f"{first}.self_attention.linear_qkv.bias"].split == Split(0)
    assert table[f"{first}.self_attention.linear_proj.bias"].split is None
    assert table[f"{first}.mlp.linear_fc1.bias"].shape == (48,)
    assert table[f"{first}.mlp.linear_fc1.weight"].split == Split(0)
    assert table[f"{first}.mlp.linear_fc2.bias"].shape == (32,)
    assert table["decoder.final_layernorm.bias"].shape == (32,)
    only_qkv = by_name(llama(add_qkv_bias=True))
    assert [name for name in only_qkv if name.endswith("bias")] == [
        f"decoder.layers.{n}.self_attention.linear_qkv.bias" for n in range(3)
    ]


def test_only_the_two_matrices_that_end_a_residual_branch_start_scaled():
    scaled = {p.name.split(".", 3)[-1] for p in parameters(llama()) if p.init == "scaled_normal"}
    assert scaled == {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}


def test_parameters_without_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="--vocab-size is not known"):
        parameters(llama(vocab_size=0))


@pytest.mark.parametrize(
    ("vocab", "divisor", "tp", "padded"),
    [(32000, 128, 1, 32000), (32000, 128, 8, 32768), (100, 1, 2, 100), (101, 1, 2, 102)],
)
def test_the_vocabulary_is_padded_to_a_multiple_for_every_rank(vocab, divisor, tp, padded):
    found = padded_vocab_size(
        vocab, make_vocab_size_divisible_by=divisor, tensor_model_parallel_size=tp
    )
    assert found == padded


def cut(whole, split, tp_size, tp_rank):
    """Cut a whole array the slow way."""
    if split is None:
        return whole
    blocks = np.split(whole, split.blocks, axis=split.dim)
    parts = [np.split(block, tp_size, axis=split.dim)[tp_rank] for block in blocks]
    return np.concatenate(parts, axis=split.dim)


def shard(parameter, whole, *, tp_size, tp_rank, padded):
    """Cut a whole array with the runs."""
    shape, runs = shard_runs(parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=padded)
    dim = parameter.split.dim if parameter.split else 0
    found = np.zeros(shape, whole.dtype)
    for run in runs:
        here = (slice(None),) * dim + (slice(run.local_start, run.local_start + run.length),)
        there = (slice(None),) * dim + (slice(run.global_start, run.global_start + run.length),)
        found[here] = whole[there]
    return found


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("padded", [100, 128, 300, 512])
def test_every_shard_equals_cutting_the_padded_tensor(tp_size, padded):
    arch = llama(add_bias_linear=True)
    for parameter, tp_rank in itertools.product(parameters(arch), range(tp_size)):
        whole = np.arange(1, 1 + np.prod(parameter.shape)).reshape(parameter.shape)
        rows = padded - 100 if parameter.padded else 0
        grown = np.pad(whole, [(0, rows)] + [(0, 0)] * (whole.ndim - 1))
        expected = cut(grown, parameter.split, tp_size, tp_rank)
        found = shard(parameter, whole, tp_size=tp_size, tp_rank=tp_rank, padded=padded)
        np.testing.assert_array_equal(found, expected, err_msg=parameter.name)


def test_a_rank_that_holds_only_padding_has_no_runs():
    table = by_name(llama())["output_layer.weight"]
    shape, runs = shard_runs(table, tp_size=4, tp_rank=3, padded_vocab_size=512)
    assert (shape, runs) == ((128, 32), ())


def test_the_gate_and_up_halves_of_a_shard_are_the_ranks_parts_of_each():
    fc1 = by_name(llama())["decoder.layers.0.mlp.linear_fc1.weight"]
    shape, runs = shard_runs(fc1, tp_size=2, tp_rank=1, padded_vocab_size=128)
    assert shape == (48, 32)
    assert runs == ((24, 0, 24), (72, 24, 24))


def test_tensors_that_cannot_be_cut_evenly_are_refused_by_name():
    odd = Parameter(name="x.weight", shape=(10, 4), split=Split(0, 2), init="normal")
    with pytest.raises(ValueError, match=r"x.weight: 5 indices along dim 0 .*parallel-size 2"):
        shard_runs(odd, tp_size=2, tp_rank=0, padded_vocab_size=0)
    table = by_name(llama())["output_layer.weight"]
    with pytest.raises(ValueError, match=r"padded vocabulary \(64\) is smaller .* \(100\)"):
        shard_runs(table, tp_size=2, tp_rank=0, padded_vocab_size=64)


@pytest.mark.parametrize(
    ("tp_size", "message"),
    [
        (3, r"size 3: must divide --num-attention-heads 4 \(valid for this model: 1, 2, 4\)"),
        (8, r"size 8: must divide --num-attention-heads 4"),
    ],
)
def test_a_tensor_parallel_size_the_heads_do_not_allow_names_the_valid_ones(tp_size, message):
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(llama(), tp_size)


def test_groups_and_mlp_limit_the_tensor_parallel_size_too():
    arch = llama(hidden_size=48, num_attention_heads=12, num_query_groups=3, ffn_hidden_size=24)
    assert tensor_parallel_sizes(arch) == (1, 3, 6, 12)
    with pytest.raises(ValueError, match=r"divide or be a multiple of --num-query-groups 3"):
        check_tensor_parallel(arch, 2)
    with pytest.raises(ValueError, match=r"must divide --ffn-hidden-size 49"):
        check_tensor_parallel(llama(ffn_hidden_size=49), 2)
    for size in tensor_parallel_sizes(arch):
        check_tensor_parallel(arch, size)


def test_more_ranks_than_key_heads_cut_a_group_in_pieces():
    arch = llama(num_query_groups=1)
    qkv = by_name(arch)["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert shard_runs(qkv, tp_size=4, tp_rank=1, padded_vocab_size=128)[0] == (12, 32)


def test_stages_share_out_all_parameters():
    arch = llama()
    first = stage_parameters(arch, range(2), first=True, last=False)
    last = stage_parameters(arch, range(2, 3), first=False, last=True)
    assert first + last == parameters(arch)


def test_the_last_stage_of_a_tied_model_stores_a_copy_of_the_embedding():
    arch = llama(untie_embeddings_and_output_weights=False)
    last = stage_parameters(arch, range(2, 3), first=False, last=True)[-1]
    assert (last.name, last.shape, last.padded) == ("output_layer.weight", (100, 32), True)
    whole = stage_parameters(arch, range(3), first=True, last=True)
    assert whole == parameters(arch)


def test_layer_numbers_go_from_model_to_stage_and_back():
    name = "decoder.layers.12.mlp.linear_fc1.weight"
    assert local_name(name, first_layer=10) == "decoder.layers.2.mlp.linear_fc1.weight"
    assert global_name(local_name(name, first_layer=10), first_layer=10) == name
    assert local_name("output_layer.weight", first_layer=10) == "output_layer.weight"
    with pytest.raises(ValueError, match="before the stage's first layer 13"):
        local_name(name, first_layer=13)


SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}


def build(**changes):
    return Architecture(**{**SIZES, **changes})


def shapes(**changes):
    return {p.name: p.shape for p in parameters(build(**changes)) if p.layer in (None, 0)}


def test_latent_attention_has_projections_down_on_every_rank_and_up_by_heads():
    latent = {
        "multi_latent_attention": True,
        "num_query_groups": None,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 10,
        "qk_layernorm": True,
    }
    arch = build(**latent, q_lora_rank=24)
    table = {p.name.removeprefix("decoder.layers.0.self_attention."): p for p in parameters(arch)}
    heads, hidden = arch.num_attention_heads, arch.hidden_size
    expected = {
        "linear_q_down_proj.weight": ((24, hidden), None),
        "q_layernorm.weight": ((24,), None),
        "linear_q_up_proj.weight": ((heads * 12, 24), 0),
        "linear_kv_down_proj.weight": ((16 + 4, hidden), None),
        "kv_layernorm.weight": ((16,), None),
        "linear_kv_up_proj.weight": ((heads * (8 + 10), 16), 0),
        "linear_proj.weight": ((hidden, heads * 10), 1),
    }
    for name, (shape, dim) in expected.items():
        assert table[name].shape == shape, name
        assert (table[name].split and table[name].split.dim) == dim, name
    assert "linear_qkv.weight" not in table
    direct = shapes(**latent)
    assert direct["decoder.layers.0.self_attention.linear_q_proj.weight"] == (heads * 12, hidden)


def test_experts_are_numbered_and_the_router_is_on_every_rank():
    arch = build(num_experts=4, moe_ffn_hidden_size=24, n_shared_experts=2, swiglu=True,
                 moe_router_enable_expert_bias=True, moe_shared_expert_gate=True,
                 moe_router_score_function="sigmoid", add_bias_linear=False)  # fmt: skip
    mlp = "decoder.layers.0.mlp."
    table = {p.name.removeprefix(mlp): p for p in parameters(arch) if p.name.startswith(mlp)}
    assert table["router.weight"].shape == (4, arch.hidden_size)
    assert table["router.weight"].split is None
    assert table["router.expert_bias"].float32
    fc1 = table["experts.local_experts.3.linear_fc1.weight"]
    assert (fc1.shape, fc1.expert) == ((48, arch.hidden_size), 3)
    assert table["shared_experts.linear_fc1.weight"].shape == (96, arch.hidden_size)
    assert table["shared_experts.gate_weight"].shape == (1, arch.hidden_size)
    held = stage_parameters(arch, range(1), first=True, last=False, experts=range(2, 4))
    assert {p.expert for p in held} == {None, 2, 3}


def test_experts_are_dealt_out_in_order_and_numbered_from_zero_on_each_rank():
    arch = build(num_experts=6)
    assert expert_range(arch, ep_rank=1, ep_size=3) == range(2, 4)
    name = "decoder.layers.5.mlp.experts.local_experts.3.linear_fc1.weight"
    local = local_name(name, first_layer=4, first_expert=2)
    assert local == "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    assert global_name(local, first_layer=4, first_expert=2) == name
    with pytest.raises(
        ValueError, match=r"size 4: must divide --num-experts 6 \(valid: 1, 2, 3, 6"
    ):
        expert_range(arch, ep_rank=0, ep_size=4)


def test_optional_parts_of_a_layer_and_of_the_embedding_have_their_parameters():
    found = shapes(
        post_norm=True, qk_layernorm=True, softmax_type="learnable", embed_layernorm=True,
        position_embedding_type="learned_absolute", add_bias_linear=False, add_dense_bias=True,
    )  # fmt: skip
    arch = build()
    layer, hidden = "decoder.layers.0", (arch.hidden_size,)
    assert found[f"{layer}.post_attn_norm.weight"] == hidden
    assert found[f"{layer}.post_mlp_layernorm.weight"] == hidden
    assert found[f"{layer}.self_attention.q_layernorm.weight"] == (arch.head_dim,)
    sinks = f"{layer}.self_attention.core_attention.softmax_offset"
    assert found[sinks] == (arch.num_attention_heads,)
    assert found[f"{layer}.self_attention.linear_proj.bias"] == hidden
    assert f"{layer}.self_attention.linear_qkv.bias" not in found
    positions = found["embedding.position_embeddings.weight"]
    assert positions == (arch.max_position_embeddings, arch.hidden_size)
    assert found["embedding.word_embeddings.norm.bias"] == hidden


def test_norms_that_add_one_start_at_zero():
    table = parameters(build(normalization="RMSNorm", add_rmsnorm_offset=True))
    assert {p.init for p in table if "norm" in p.name} == {"zeros"}
