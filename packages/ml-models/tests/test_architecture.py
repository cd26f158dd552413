"""The description of a model fills in what Megatron derives and refuses what cannot be built."""

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from ml_models.architecture import Architecture


def build(**changes):
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return Architecture(**{**sizes, **changes})


def test_sizes_nobody_gave_are_those_megatron_derives():
    arch = build(hidden_size=512, num_attention_heads=8)
    assert (arch.num_query_groups, arch.kv_channels, arch.ffn_hidden_size) == (8, 64, 2048)
    assert (arch.query_groups, arch.head_dim, arch.ffn_size) == (8, 64, 2048)


@pytest.mark.parametrize(("hidden_size", "ffn"), [(512, 1344), (4096, 10880), (2048, 5440)])
def test_a_gated_mlp_has_two_thirds_of_the_width_in_multiples_of_64(hidden_size, ffn):
    assert build(hidden_size=hidden_size, swiglu=True).ffn_hidden_size == ffn


def test_given_sizes_are_kept_and_a_head_may_be_wider_than_its_share():
    arch = build(ffn_hidden_size=96, num_query_groups=2, kv_channels=32)
    assert (arch.ffn_size, arch.query_groups, arch.head_dim) == (96, 2, 32)
    assert build(hidden_size=66, kv_channels=16).head_dim == 16


def test_a_derived_size_and_the_same_size_given_make_equal_models():
    assert build() == build(num_query_groups=4, kv_channels=16, ffn_hidden_size=256)


def test_the_switch_of_grouped_attention_changes_nothing_but_is_accepted():
    assert build(group_query_attention=True, num_query_groups=2) == build(num_query_groups=2)


def test_the_switch_of_grouped_attention_tells_megatron_the_truth():
    assert build(num_query_groups=2).group_query_attention
    assert not build(group_query_attention=True, num_query_groups=4).group_query_attention


def test_query_key_value_have_a_bias_with_either_switch():
    assert build().has_qkv_bias
    assert build(add_bias_linear=False, add_qkv_bias=True).has_qkv_bias
    assert not build(add_bias_linear=False).has_qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 66}, r"--hidden-size 66: .*--num-attention-heads 4 \(nearest: 64 or 68\)"),
        ({"hidden_size": 3}, r"\(nearest: 4\)"),
        ({"num_query_groups": 3}, r"--num-query-groups 3: must divide .* 4 \(valid: 1, 2, 4\)"),
        ({"num_layers": 0}, r"--num-layers 0: must be at least 1"),
        ({"ffn_hidden_size": -1}, r"--ffn-hidden-size -1: must be at least 1"),
        ({"vocab_size": -5}, r"--vocab-size -5: must be at least 1"),
        ({"norm_epsilon": 0.0}, r"--norm-epsilon 0.0: must be greater than 0"),
        ({"init_method_std": float("nan")}, r"--init-method-std nan"),
        ({"kv_channels": 15}, r"--kv-channels 15: must be even .* 16"),
        ({"normalization": "BatchNorm"}, r"--normalization BatchNorm: valid are LayerNorm, RMSN"),
        ({"position_embedding_type": "sine"}, r"--position-embedding-type sine: valid are"),
        ({"use_rotary_position_embeddings": False}, r"contradicts --position-embedding-type rope"),
        ({"group_query_attention": True}, r"--group-query-attention: .*--num-query-groups"),
        ({"hidden_size": 16, "swiglu": True}, r"--hidden-size 16: too small .*--ffn-hidden-size"),
    ],
)
def test_impossible_models_are_refused_with_flag_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_every_field_is_documented_for_help():
    bodies = [ast.parse(inspect.getsource(part)).body[0].body for part in Architecture.__mro__[:-1]]
    documented = {
        field.target.id
        for field, text in itertools.chain(*map(itertools.pairwise, bodies))
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(Architecture)}


def test_importing_needs_neither_torch_nor_megatron():
    code = "import sys, ml_models.weights; print({'torch', 'megatron', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
