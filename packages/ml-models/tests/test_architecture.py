"""The description of a model fills in what Megatron derives and refuses what cannot be built."""

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from ml_models.architecture import Architecture
from ml_models.flags import UsageError, parse


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
        ({"swiglu": True, "geglu": True}, r"--swiglu, --geglu: choose one"),
        ({"add_rmsnorm_offset": True}, r"--add-rmsnorm-offset: needs --normalization RMSNorm"),
        ({"norm_head": True}, r"--norm-head: needs --untie-embeddings"),
        ({"activation_func_clamp_value": 7.0}, r"means nothing without --quick-geglu"),
        ({"rotary_percent": 1.5}, r"--rotary-percent 1.5: must be greater than 0 and at most 1"),
        ({"rope_scaling_type": "ntk"}, r"--rope-scaling-type ntk: valid are .*llama3, yarn"),
        ({"rope_scaling_type": "llama3"}, r"--rope-scaling-type llama3: needs --low-freq-factor"),
        ({"low_freq_factor": 1.0}, r"--low-freq-factor 1.0: means nothing without --rope-scaling"),
        (
            {"rope_scaling_factor": 8.0},
            r"--rope-scaling-factor 8.0: means nothing without --rope-scaling-type",
        ),
        (
            {"rope_scaling_type": "linear", "rope_scaling_attention_factor": 0.5},
            r"attention-factor 0.5: means nothing without --rope-scaling-type yarn or longrope",
        ),
        (
            {"position_embedding_type": "alibi", "rotary_base": 5e5},
            r"--rotary-base 500000.0: means nothing without --position-embedding-type rope",
        ),
        ({"moe_aux_loss_coeff": 0.01}, r"coeff 0.01: means nothing without --num-experts"),
        (
            {"num_experts": 4, "moe_shared_expert_gate": True},
            r"-gate: means nothing without --n-shared-experts or --moe-shared-expert-int",
        ),
        (
            {"num_experts": 4, "moe_router_bias_update_rate": 0.1},
            r"rate 0.1: means nothing without --moe-router-enable-expert-bias",
        ),
        ({"window_attn_skip_freq": (2,)}, r"means nothing without --sliding-window"),
        ({"sliding_window": 0}, r"--sliding-window 0: must be at least 1"),
        (
            {"sliding_window": 8, "window_attn_skip_freq": (1, 0, 1)},
            r"--window-attn-skip-freq 1,0,1: must be one number, or 0 or 1 for each of .* 2",
        ),
        ({"no_rope_freq": (0,)}, r"--no-rope-freq 0: must be at least 1"),
        ({"multi_latent_attention": True}, r"--multi-latent-attention: also needs --kv-lora-rank"),
        ({"v_head_dim": 8}, r"--v-head-dim 8: means nothing without --multi-latent-attention"),
        ({"n_shared_experts": 1}, r"--n-shared-experts 1: means nothing without --num-experts"),
        ({"num_experts": 4, "moe_router_topk": 5}, r"topk 5: must be at most --num-experts 4"),
        ({"num_experts": 4, "moe_router_num_groups": 2}, r"needs --moe-router-group-topk"),
        (
            {"num_experts": 4, "moe_router_num_groups": 3, "moe_router_group_topk": 1},
            r"--moe-router-num-groups 3: must divide --num-experts 4",
        ),
        (
            {"num_experts": 4, "moe_router_num_groups": 2, "moe_router_group_topk": 3},
            r"--moe-router-group-topk 3: must be from 1 to --moe-router-num-groups 2",
        ),
    ],
)
def test_impossible_models_are_refused_with_flag_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_biases_everywhere_say_what_biases_here_and_there_would():
    assert build(add_qkv_bias=True, add_dense_bias=True) == build()
    some = build(add_bias_linear=False, add_dense_bias=True)
    assert (some.has_qkv_bias, some.has_dense_bias) == (False, True)


def test_windows_follow_a_frequency_or_a_list():
    def windows(*pattern):
        return build(num_layers=6, sliding_window=8, window_attn_skip_freq=pattern or None).windows

    assert build().windows == (None, None)
    assert windows() == (8,) * 6
    assert windows(3) == (8, 8, None, 8, 8, None)
    assert windows(1, 0, 0, 1, 1, 0) == (8, None, None, 8, 8, None)


def test_layers_without_positions_follow_a_frequency_or_a_list():
    assert build().layers_with_rope == (True, True)
    assert build(num_layers=4, no_rope_freq=(2,)).layers_with_rope == (True, False, True, False)
    assert build(no_rope_freq=(1, 0)).layers_with_rope == (False, True)
    assert build(position_embedding_type="alibi").layers_with_rope == (False, False)


def test_the_first_layers_and_those_between_have_no_experts():
    arch = build(num_layers=6, num_experts=4, first_k_dense_replace=1, moe_layer_freq=(2,))
    assert [arch.has_experts(layer) for layer in range(6)] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert not build().has_experts(0)
    assert arch.expert_size == arch.ffn_size


def test_layers_with_experts_follow_a_frequency_or_a_list():
    def layers(*freq, dense=0):
        arch = build(num_layers=6, num_experts=4, moe_layer_freq=freq, first_k_dense_replace=dense)
        return [int(arch.has_experts(layer)) for layer in range(6)]

    assert layers(3) == [1, 0, 0, 1, 0, 0]
    assert layers(0, 1, 1, 0, 0, 1) == [0, 1, 1, 0, 0, 1]
    assert layers(1, 1, 1, 0, 0, 1, dense=2) == [0, 0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"--moe-layer-freq 1,0: must be one number, or 0 or 1"):
        layers(1, 0)


@pytest.mark.parametrize(
    ("pattern", "shorter"),
    [
        ((1, 1, 1, 1), {}),
        ((0, 0, 1, 1), {"first_k_dense_replace": 2}),
        ((1, 0, 1, 0), {"moe_layer_freq": (2,)}),
        ((0, 1, 0, 1), {"moe_layer_freq": (0, 1, 0, 1)}),
    ],
)
def test_a_list_of_layers_with_experts_equals_the_shorter_spelling(pattern, shorter):
    listed = build(num_layers=4, num_experts=4, moe_layer_freq=pattern)
    assert listed == build(num_layers=4, num_experts=4, **shorter)


@pytest.mark.parametrize(
    ("pattern", "shorter"),
    [
        ((1, 1, 1, 1), None),
        ((1, 1, 0, 1), (3,)),
        ((1, 0, 1, 0), (2,)),
        ((0, 1, 1, 1), (0, 1, 1, 1)),
    ],
)
def test_a_list_of_layers_with_windows_equals_the_shorter_spelling(pattern, shorter):
    listed = build(num_layers=4, sliding_window=8, window_attn_skip_freq=pattern)
    assert listed == build(num_layers=4, sliding_window=8, window_attn_skip_freq=shorter)
    assert listed.window_attn_skip_freq == shorter


@pytest.mark.parametrize(
    ("pattern", "shorter"),
    [
        ((0, 0, 0, 0), None),
        ((0, 1, 0, 1), (2,)),
        ((1, 1, 1, 1), (1,)),
        ((1, 0, 0, 0), (1, 0, 0, 0)),
    ],
)
def test_a_list_of_layers_without_positions_equals_the_shorter_spelling(pattern, shorter):
    listed = build(num_layers=4, no_rope_freq=pattern)
    assert listed == build(num_layers=4, no_rope_freq=shorter)
    assert listed.no_rope_freq == shorter


def test_patterns_of_layers_may_be_spelled_as_in_args_of_megatron():
    spelled = build(num_layers=4, num_experts=4, moe_layer_freq=2, no_rope_freq=[0, 0, 0, 1])
    assert spelled == build(num_layers=4, num_experts=4, moe_layer_freq=(2,), no_rope_freq=(4,))


def test_how_a_router_was_trained_makes_no_other_model():
    trained = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.1}
    assert build(num_experts=4, **trained) == build(num_experts=4)


def test_shared_experts_are_as_wide_as_their_number_or_as_given():
    plain = {"num_experts": 4, "add_bias_linear": False}
    arch = build(**plain, moe_ffn_hidden_size=24, n_shared_experts=2)
    assert arch.shared_expert_size == 48
    given = build(**plain, moe_shared_expert_intermediate_size=40)
    assert given.shared_expert_size == 40
    assert build().shared_expert_size == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_shared_experts": 1}, "--n-shared-experts: have no biases: give --disable-bias-linear"),
        ({"moe_shared_expert_intermediate_size": 8}, "have no biases"),
        (
            {"moe_router_enable_expert_bias": True},
            "--moe-router-enable-expert-bias: needs --moe-router-score-function sigmoid",
        ),
        (
            {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
            "--moe-router-topk 2: must be at most 1, the experts of --moe-router-group-topk 1",
        ),
        (
            {
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_group_score": "top2_sum",
            },
            "--moe-router-num-groups 4: --moe-router-group-score top2_sum needs groups of 2",
        ),
    ],
)
def test_what_experts_cannot_have_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        build(num_experts=4, **sizes)


LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 10,
}


def test_a_head_of_latent_attention_has_two_parts():
    arch = build(**LATENT)
    assert (arch.head_dim, arch.value_head_dim, arch.rotary_dim) == (12, 10, 4)
    assert build(rotary_percent=0.5).rotary_dim == 8


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


def test_every_flag_that_needs_another_is_refused_without_it():
    found = [field for field in dataclasses.fields(Architecture) if "needs" in field.metadata]
    assert len(found) > 40
    others = {"str": "other", "tuple": (2,), "bool": True, "Literal": "other"}
    for field in found:
        kind = next((kind for kind in others if kind in str(field.type)), None)
        value = others[kind] if kind else 7
        if field.default is True:
            value = False
        changes = {"position_embedding_type": "alibi", field.name: value}
        name = field.name.replace("_", "-")
        with pytest.raises(ValueError, match=f"--{name}.*: means nothing without --"):
            build(**changes)


def parsed(words):
    sizes = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64"
    return parse(Architecture, f"{sizes} {words}".split(), prog="test")


@pytest.mark.parametrize("words", ["--moe-router-topk 2", "--moe-layer-freq 1"])
def test_a_flag_that_means_nothing_is_refused_at_its_default_too(words):
    with pytest.raises(UsageError, match=f"^{words}: means nothing without --num-experts$"):
        parsed(words)
    parsed(f"{words} --num-experts 4")


def test_a_flag_that_asks_for_nothing_needs_nothing():
    parsed("--no-norm-topk-prob --moe-aux-loss-coeff 0")
