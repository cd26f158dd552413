"""What a config.json says that cannot be represented is refused, with the key and its value."""

import json
from pathlib import Path

import pytest

from ml_models import registry

FOLDER = Path(__file__).parent / "configs"
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}


def config_of(family, **changes):
    """Return the first config.json of a family, changed."""
    configs = json.loads((FOLDER / f"{family}.json").read_text())
    return next(iter(configs.values())) | changes


def read(family, **changes):
    return registry.family(family).from_hf(config_of(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "relu"}, "is 'relu', only 'gelu_new' or"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"query_pre_attn_scalar": 2.5}, "scalar must be a whole number, not 2.5"),
        ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping must be a number"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "as both"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "of sliding_attention have rope_type 'linear', only 'default'",
        ),
        ("qwen3_moe", {"mlp_only_layers": [4]}, r"mlp_only_layers \[4\] numbers of layers below"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0 must be at least 1"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "is 'noaux_tc', only 'greedy' or"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, only 1e-06"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads is 2, only 4"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v2", {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "both, or none"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "fp8_cast_bf16.py"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias is False"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"dequantize=True"),
    ],
)
def test_a_switch_without_a_place_in_megatron_is_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        read(family, **changes)


def test_a_missing_rank_of_queries_is_not_taken_for_none():
    config = config_of("deepseek_v2")
    del config["q_lora_rank"]
    with pytest.raises(ValueError, match="q_lora_rank is missing"):
        registry.family("deepseek_v2").from_hf(config)


def test_missing_caps_of_gemma2_are_the_usual_ones_and_null_is_none():
    config = config_of("gemma2", attn_logit_softcapping=None)
    del config["final_logit_softcapping"]
    arch = registry.family("gemma2").from_hf(config)
    assert (arch.attn_logit_softcapping, arch.final_logit_softcapping) == (None, 30.0)
    assert registry.family("gemma2").to_hf(arch, "float32")["attn_logit_softcapping"] is None


def test_scores_of_gemma2_are_scaled_by_a_number_of_their_own():
    assert read("gemma2", query_pre_attn_scalar=16).softmax_scale is None  # a head has 16 channels
    assert read("gemma2", query_pre_attn_scalar=144).softmax_scale == 144**-0.5


def test_gemma3_has_two_rotary_bases_in_both_spellings():
    old = read("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (old.rotary_base, old.rotary_base_local, old.rope_scaling_factor) == (1e6, 1e4, 8.0)
    written = registry.family("gemma3").to_hf(old, "float32")
    assert written["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    for gone in (("rope_parameters",), ("rope_theta", "rope_local_base_freq", "rope_scaling")):
        kept = {key: value for key, value in written.items() if key not in gone}
        assert registry.family("gemma3").from_hf(kept) == old


def test_grok_scales_scores_by_a_number_that_is_usually_one_over_the_root_of_a_head():
    assert read("grok1", attn_output_multiplier=8**-0.5).softmax_scale is None
    assert read("grok1", attn_output_multiplier=0.1).softmax_scale == 0.1


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 1]}, [2, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
    ],
)
def test_layers_of_qwen3_moe_without_experts_are_found_and_listed(changes, layers):
    arch = read("qwen3_moe", **changes)
    assert [layer for layer in range(4) if arch.has_experts(layer)] == layers
    written = registry.family("qwen3_moe").to_hf(arch, "float32")
    assert written["mlp_only_layers"] == [layer for layer in range(4) if layer not in layers]


def test_groups_of_experts_count_only_where_the_choice_is_limited_by_them():
    assert read("deepseek_v2").moe_router_num_groups == 4
    lite = read("deepseek_v2", topk_method="greedy")
    assert (lite.moe_router_num_groups, lite.moe_router_group_topk) == (None, None)


def test_how_a_router_was_trained_does_not_keep_a_model_from_being_exported():
    family = registry.family("mixtral")
    trained = {**vars(read("mixtral")), "moe_z_loss_coeff": 1e-3, "moe_aux_loss_coeff": 0.5}
    arch = type(read("mixtral"))(**trained)
    assert family.to_hf(arch, "float32")["router_aux_loss_coef"] == 0.5


OF_ONE_FAMILY = (
    *("bloom", "gpt2", "gemma", "gemma2", "gemma3", "mixtral"),
    *("grok1", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
)


@pytest.mark.parametrize("family", OF_ONE_FAMILY)
def test_a_model_that_only_one_family_has_is_recognised_and_asking_the_others_does_no_harm(family):
    for config in json.loads((FOLDER / f"{family}.json").read_text()).values():
        arch = registry.family(family).from_hf(config)
        found = [name for name in registry.names() if registry.family(name).represents(arch)]
        assert found == [family]
        assert registry.family_of(arch).name == family
