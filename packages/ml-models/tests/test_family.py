"""Rules turn into row ranges that cover every tensor of both sides exactly once."""

import dataclasses

import pytest
from piece_copies import check_both_directions

from ml_models.architecture import Architecture
from ml_models.families.family import Family
from ml_models.families.llama import LLAMA
from ml_models.families.rules import ExpertStack, FlatQkv, GroupedQkv, Same, Stacked
from ml_models.parameter import Parameter

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "ffn_hidden_size": 24,
    "max_position_embeddings": 8,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}


def build(**changes):
    return Architecture(**{**SIZES, **changes})


VARIANTS = [
    {},
    {"num_query_groups": 2},
    {"num_query_groups": 1, "kv_channels": 8},
    {"add_bias_linear": True},
    {"untie_embeddings_and_output_weights": False},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_pieces_fill_both_sides_completely_and_reverse_each_other(changes):
    check_both_directions(LLAMA, build(**changes))


def parameter(rows, *columns, **more):
    return Parameter(name="m.weight", shape=(rows, *columns), split=None, init="normal", **more)


def test_query_key_and_value_are_grouped():
    rule = GroupedQkv("qkv", query="q", key="k", value="v")
    parts = list(rule.parts(build(num_query_groups=2), parameter(32)))
    assert [part[:3] for part in parts] == [
        ("q", 0, 8), ("k", 0, 4), ("v", 0, 4),
        ("q", 8, 8), ("k", 4, 4), ("v", 4, 4),
    ]  # fmt: skip


def test_a_flat_tensor_has_all_queries_then_all_keys_then_all_values():
    parts = list(FlatQkv("qkv", "h").parts(build(num_query_groups=2), parameter(32)))
    assert [part[1:3] for part in parts] == [(0, 8), (16, 4), (24, 4), (8, 8), (20, 4), (28, 4)]


def test_stacked_tensors_follow_each_other():
    rule = Stacked("fc1", ("gate", "up"))
    parts = list(rule.parts(build(), parameter(48)))
    assert [part[:3] for part in parts] == [("gate", 0, 24), ("up", 0, 24)]


def test_gate_and_up_of_a_stack_of_experts_may_take_turns():
    rule = ExpertStack("fc1", "h", 2)
    parts = list(rule.parts(build(), parameter(8, 3, expert=5)))
    assert parts == [("h", 0, 4, 2, 5), ("h", 1, 4, 2, 5)]


def test_stacks_and_transposed_matrices_fill_both_sides():
    arch = build(num_experts=2, moe_ffn_hidden_size=6)
    experts, stack = "decoder.layers.*.mlp.experts.local_experts.@", "model.layers.*.mlp.experts"
    plain = {"weight": "", "bias": "_bias"}
    special = (
        Same("decoder.layers.*.mlp.router", "model.layers.*.router"),
        ExpertStack(f"{experts}.linear_fc1", f"{stack}.up", 2, suffixes=plain, transposed=True),
        ExpertStack(f"{experts}.linear_fc2", f"{stack}.down", suffixes=plain, transposed=True),
        FlatQkv("decoder.layers.*.self_attention.linear_qkv", "model.*.qkv", transposed=True),
    )
    kept = {rule.module for rule in special}
    rules = (*special, *(rule for rule in LLAMA.rules if rule.module not in kept))
    for bias in (False, True):
        family = dataclasses.replace(LLAMA, rules=rules)
        check_both_directions(family, dataclasses.replace(arch, add_bias_linear=bias))
    shapes = {name: tensor.shape for name, tensor in family.tensors(arch).items()}
    assert shapes["model.layers.1.mlp.experts.up"] == (2, 16, 12)
    assert shapes["model.layers.1.mlp.experts.down"] == (2, 6, 16)
    assert shapes["model.0.qkv.weight"] == (16, 48)


def test_a_parameter_without_a_rule_is_an_error_not_a_gap():
    family = Family(
        name="half",
        model_types=("half",),
        architectures=(),
        config=LLAMA.config,
        rules=(Same("embedding.word_embeddings", "wte"),),
    )
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm.weight: family half has no"):
        list(family.pieces(build()))


def test_tensors_without_weights_are_ignored_by_pattern():
    assert LLAMA.ignores("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not LLAMA.ignores("model.layers.11.self_attn.q_proj.weight")
