"""Llama's config.json, read and written, and its tensor names."""

import pytest

from ml_models.architecture import Architecture
from ml_models.families.llama import LLAMA

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "some_field_of_the_future": {"kept": True},
}


def read(**changes):
    return LLAMA.from_hf({**CONFIG, **changes})


def test_a_config_is_translated_field_by_field():
    assert read() == Architecture(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        ffn_hidden_size=176,
        vocab_size=99,
        max_position_embeddings=512,
        normalization="RMSNorm",
        norm_epsilon=1e-6,
        swiglu=True,
        rotary_base=500000.0,
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        init_method_std=0.02,
    )


def test_missing_values_mean_what_they_mean_in_transformers():
    optional = {"num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"}
    optional |= {"rope_theta", "tie_word_embeddings"}
    arch = LLAMA.from_hf({key: value for key, value in CONFIG.items() if key not in optional})
    assert arch.num_query_groups == 4
    assert arch.max_position_embeddings == 2048
    assert arch.norm_epsilon == 1e-6
    assert arch.rotary_base == 10000.0
    assert arch.untie_embeddings_and_output_weights


def test_a_head_dimension_of_its_own_is_kept():
    assert read(head_dim=32).head_dim == 32
    assert read(head_dim=None).head_dim == 16


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default"}},
    ],
)
def test_the_rotary_base_is_found_where_transformers_4_and_5_put_it(spelling):
    assert read(**spelling).rotary_base == 500000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "axial", "factor": 8.0}}, "type 'axial' .*supported: "),
        ({"rope_scaling": {"type": "linear"}}, "'linear' need factor"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "given as both 500000.0 and 1.0"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is true without attention_bias"),
        ({"attention_bias": "yes", "mlp_bias": True}, "attention_bias must be true or false"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized .*quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, not '64'"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True},
        {"head_dim": 32, "initializer_range": 0.01, "rms_norm_eps": 1e-5},
    ],
)
def test_a_written_config_reads_back_as_the_same_model(changes):
    arch = read(**changes)
    assert LLAMA.from_hf(LLAMA.to_hf(arch, "bfloat16")) == arch


def test_both_spellings_of_rotary_base_and_dtype_are_written():
    config = LLAMA.to_hf(read(), "bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "--normalization is LayerNorm, .* only say RMSNorm"),
        ({"swiglu": False, "geglu": True}, "--swiglu is False"),
        ({"add_qkv_bias": True}, "--add-qkv-bias is True"),
    ],
)
def test_models_that_are_no_llama_are_not_written_as_one(changes, message):
    sizes = {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 9,
        "max_position_embeddings": 8,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
    }
    with pytest.raises(ValueError, match=f"not a llama model: .*{message}"):
        LLAMA.to_hf(Architecture(**{**sizes, **changes}), "float32")


def shapes(arch):
    return {name: tensor.shape for name, tensor in LLAMA.tensors(arch).items()}


def test_tensor_names_and_shapes_are_those_transformers_saves():
    assert shapes(read(num_hidden_layers=1)) == {
        "model.embed_tokens.weight": (99, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.mlp.gate_proj.weight": (176, 64),
        "model.layers.0.mlp.up_proj.weight": (176, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 176),
        "model.norm.weight": (64,),
        "lm_head.weight": (99, 64),
    }
    assert "lm_head.weight" not in shapes(read(tie_word_embeddings=True))
    with_bias = shapes(read(attention_bias=True, mlp_bias=True))
    assert with_bias["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert with_bias["model.layers.1.mlp.up_proj.bias"] == (176,)
