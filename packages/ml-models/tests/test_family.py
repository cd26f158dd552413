"""Rules turn into row ranges that cover every tensor of both sides exactly once."""

import itertools

import numpy as np
import pytest

from ml_models.architecture import Architecture
from ml_models.families.family import Family, GroupedQkv, Same, Stacked
from ml_models.families.llama import LLAMA
from ml_models.weights import parameters

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


def random_tensors(shapes):
    numbers = np.random.default_rng(0)
    return {name: numbers.standard_normal(shape) for name, shape in shapes.items()}


def forward(family, arch, hf):
    """Copy the pieces from left to right."""
    found = {p.name: np.full(p.shape, np.nan) for p in parameters(arch)}
    for piece in family.pieces(arch):
        rows = hf[piece.hf_name][piece.hf_row : piece.hf_row + piece.rows]
        found[piece.name][piece.row : piece.row + piece.rows] = rows
    return found


def backward(family, arch, core):
    """Copy the same pieces from right to left."""
    found = {name: np.full(shape, np.nan) for name, shape in family.tensors(arch).items()}
    for piece in family.pieces(arch):
        rows = core[piece.name][piece.row : piece.row + piece.rows]
        found[piece.hf_name][piece.hf_row : piece.hf_row + piece.rows] = rows
    return found


@pytest.mark.parametrize("changes", VARIANTS)
def test_pieces_fill_both_sides_completely_and_reverse_each_other(changes):
    arch = build(**changes)
    hf = random_tensors(LLAMA.tensors(arch))
    core = forward(LLAMA, arch, hf)
    assert not any(np.isnan(tensor).any() for tensor in core.values())
    back = backward(LLAMA, arch, core)
    for name, tensor in hf.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("changes", VARIANTS)
def test_pieces_never_overlap(changes):
    arch = build(**changes)
    for side in (lambda p: (p.name, p.row, p.rows), lambda p: (p.hf_name, p.hf_row, p.rows)):
        ranges = sorted(side(piece) for piece in LLAMA.pieces(arch))
        for (name, row, rows), (other, start, _) in itertools.pairwise(ranges):
            assert name != other or row + rows == start


def test_query_key_and_value_are_grouped():
    rule = GroupedQkv("qkv", query="q", key="k", value="v")
    parts = list(rule.parts(build(num_query_groups=2), rows=32))
    assert parts == [
        ("q", 0, 8), ("k", 0, 4), ("v", 0, 4),
        ("q", 8, 8), ("k", 4, 4), ("v", 4, 4),
    ]  # fmt: skip


def test_stacked_tensors_follow_each_other():
    rule = Stacked("fc1", ("gate", "up"))
    assert list(rule.parts(build(), rows=48)) == [("gate", 0, 24), ("up", 0, 24)]


def test_a_parameter_without_a_rule_is_an_error_not_a_gap():
    family = Family(
        name="half",
        model_types=("half",),
        architectures=(),
        from_hf=LLAMA.from_hf,
        to_hf=LLAMA.to_hf,
        rules=(Same("embedding.word_embeddings", "wte"),),
    )
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm.weight: family half has no"):
        list(family.pieces(build()))


def test_tensors_without_weights_are_ignored_by_pattern():
    assert LLAMA.ignores("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not LLAMA.ignores("model.layers.11.self_attn.q_proj.weight")
