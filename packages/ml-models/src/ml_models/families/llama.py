"""Llama: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

Also Llama 2, Code Llama, Yi, TinyLlama and everything else whose config.json says `llama`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_models.architecture import Architecture
from ml_models.families.config_json import (
    integer,
    must_be,
    number,
    optional_integer,
    rope_base,
    rope_fields,
    switch,
)
from ml_models.families.family import Family, GroupedQkv, Same, Stacked

_DECODER = "decoder.layers.*"
_LAYER = "model.layers.*"

RULES = (
    Same("embedding.word_embeddings", "model.embed_tokens"),
    Same(f"{_DECODER}.input_layernorm", f"{_LAYER}.input_layernorm"),
    GroupedQkv(
        f"{_DECODER}.self_attention.linear_qkv",
        query=f"{_LAYER}.self_attn.q_proj",
        key=f"{_LAYER}.self_attn.k_proj",
        value=f"{_LAYER}.self_attn.v_proj",
    ),
    Same(f"{_DECODER}.self_attention.linear_proj", f"{_LAYER}.self_attn.o_proj"),
    Same(f"{_DECODER}.pre_mlp_layernorm", f"{_LAYER}.post_attention_layernorm"),
    Stacked(f"{_DECODER}.mlp.linear_fc1", (f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj")),
    Same(f"{_DECODER}.mlp.linear_fc2", f"{_LAYER}.mlp.down_proj"),
    Same("decoder.final_layernorm", "model.norm"),
    Same("output_layer", "lm_head"),
)


def _from_hf(config: Mapping[str, object]) -> Architecture:
    """Translate a config.json; missing values mean what they mean in transformers."""
    must_be(config, "hidden_act", "silu")
    must_be(config, "partial_rotary_factor", 1, 1.0)
    must_be(config, "quantization_config")
    bias = switch(config, "attention_bias", False)
    if switch(config, "mlp_bias", False) != bias:
        raise ValueError(
            "config.json: attention_bias and mlp_bias differ; Megatron has both biases or neither"
        )
    return Architecture(
        num_layers=integer(config, "num_hidden_layers"),
        hidden_size=integer(config, "hidden_size"),
        num_attention_heads=integer(config, "num_attention_heads"),
        num_query_groups=optional_integer(config, "num_key_value_heads"),
        kv_channels=optional_integer(config, "head_dim"),
        ffn_hidden_size=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_position_embeddings=optional_integer(config, "max_position_embeddings") or 2048,
        normalization="RMSNorm",
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        swiglu=True,
        rotary_base=rope_base(config, 10000.0),
        untie_embeddings_and_output_weights=not switch(config, "tie_word_embeddings", False),
        add_bias_linear=bias,
        init_method_std=number(config, "initializer_range", 0.02),
    )


def _to_hf(arch: Architecture, dtype: str) -> dict[str, object]:
    """Write a config.json; `dtype` is the name of the dtype the weights are stored in."""
    _check_representable(arch)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.query_groups,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position_embeddings,
        "initializer_range": arch.init_method_std,
        "rms_norm_eps": arch.norm_epsilon,
        "use_cache": True,
        "tie_word_embeddings": not arch.untie_embeddings_and_output_weights,
        **rope_fields(arch.rotary_base),
        "attention_bias": arch.add_bias_linear,
        "mlp_bias": arch.add_bias_linear,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _check_representable(arch: Architecture) -> None:
    missing = {
        "--normalization RMSNorm": arch.normalization != "RMSNorm",
        "--swiglu": not arch.swiglu,
        "no --add-qkv-bias (Llama has biases everywhere or nowhere)": (
            arch.add_qkv_bias and not arch.add_bias_linear
        ),
        "a --hidden-size that --num-attention-heads divides": (
            arch.hidden_size % arch.num_attention_heads != 0
        ),
    }
    for requirement, broken in missing.items():
        if broken:
            raise ValueError(f"not a Llama model: the family needs {requirement}")


LLAMA = Family(
    name="llama",
    aliases=("llama2",),
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=RULES,
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)
