"""Llama: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

Also Llama 2 and 3, Code Llama, Yi, TinyLlama and everything else whose config.json says `llama`.
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, value_of
from ml_models.families.entries import Always, Custom, Fields, Must
from ml_models.families.family import Family
from ml_models.families.rope import Rope


def _read_biases(config: Config) -> Fields:
    """Both switches must agree: Megatron has biases in attention and MLP, or in neither."""
    given = {key: config.get(key) for key in ("attention_bias", "mlp_bias")}
    present = {
        key: value_of(config, key, bool) for key, value in given.items() if value is not None
    }
    if len({present.get(key, False) for key in given}) > 1:
        raise ValueError(
            "config.json: attention_bias and mlp_bias differ; Megatron has both biases or neither"
        )
    must_be(config, "pretraining_tp", *range(1, 65))
    return {"add_bias_linear": any(present.values())}


def _write_biases(arch: Architecture) -> Fields:
    return {"attention_bias": arch.add_bias_linear, "mlp_bias": arch.add_bias_linear}


LLAMA = Family(
    name="llama",
    aliases=("llama2", "llama3", "codellama", "yi", "aquila2"),
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    config=(
        *decoder.SIZES,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        decoder.NORM_EPSILON,
        decoder.UNTIED,
        Rope(),
        Custom(_read_biases, _write_biases),
        Must("hidden_act", "silu"),
        Must("quantization_config", written=False),
        Always(normalization="RMSNorm", swiglu=True),
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
)
