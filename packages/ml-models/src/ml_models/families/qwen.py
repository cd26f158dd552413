"""Qwen (1): Llama under names of its own; the gate is `w2`, and the biases are those of c_attn.

Its code changes rotary base and scale of the scores for sequences longer than `seq_length`, and
only outside training. The model described here is the trained one, up to `seq_length`.
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Not, Value
from ml_models.families.family import Family
from ml_models.families.rules import FlatQkv, Same, Stacked

_HF_LAYER = "transformer.h.*"
_LONGEST = "max_position_embeddings"


def _write_length(arch: Architecture) -> Fields:
    return {_LONGEST: arch.max_position_embeddings}


_CONFIG: tuple[Entry, ...] = (
    Value("vocab_size", "vocab_size"),
    Value("hidden_size", "hidden_size"),
    Value("intermediate_size", "ffn_hidden_size", factor=2),  # of gate and up together
    Value("num_hidden_layers", "num_layers"),
    Value("num_attention_heads", "num_attention_heads"),
    Value("kv_channels", "kv_channels", default=128),
    Value("seq_length", _LONGEST, also=(_LONGEST,)),
    Custom(lambda _config: {}, _write_length),
    Value("initializer_range", "init_method_std", float, default=0.02),
    Value("layer_norm_epsilon", "norm_epsilon", float, default=1e-6),
    Value("rotary_emb_base", "rotary_base", float, default=10000.0),
    Value("rotary_pct", "rotary_percent", float, default=1.0),
    Not("no_bias", "add_bias_linear", default=True),
    Always(add_qkv_bias=True, normalization="RMSNorm", swiglu=True),
    decoder.UNTIED,
    Must("use_dynamic_ntk", True, False),
    Must("use_logn_attn", True, False),
    Must("scale_attn_weights", True),
    decoder.NOT_QUANTIZED,
)


_SHARED = {"kv_channels": 128, "no_bias": True}
_SMALL = {**_SHARED, "vocab_size": 151936, "seq_length": 8192}
_LARGE = {**_SHARED, "vocab_size": 152064}

QWEN = Family(
    name="qwen",
    model_types=("qwen",),
    architectures=("QWenLMHeadModel",),
    config=_CONFIG,
    rules=(
        Same("embedding.word_embeddings", "transformer.wte"),
        Same(f"{decoder.LAYER}.input_layernorm", f"{_HF_LAYER}.ln_1"),
        FlatQkv(f"{decoder.ATTENTION}.linear_qkv", f"{_HF_LAYER}.attn.c_attn"),
        Same(f"{decoder.ATTENTION}.linear_proj", f"{_HF_LAYER}.attn.c_proj"),
        Same(f"{decoder.LAYER}.pre_mlp_layernorm", f"{_HF_LAYER}.ln_2"),
        Stacked(f"{decoder.MLP}.linear_fc1", (f"{_HF_LAYER}.mlp.w2", f"{_HF_LAYER}.mlp.w1")),
        Same(f"{decoder.MLP}.linear_fc2", f"{_HF_LAYER}.mlp.c_proj"),
        Same("decoder.final_layernorm", "transformer.ln_f"),
        Same("output_layer", "lm_head"),
    ),
    ignored=("transformer.rotary_emb.inv_freq",),
    sizes=(
        size("qwen-1.8b", 1_836_828_672, shape(24, 2048, 2 * 5504, 16), _SMALL),
        size("qwen-7b", 7_721_324_544, shape(32, 4096, 2 * 11008, 32), _SMALL),
        size("qwen-14b", 14_167_290_880, shape(40, 5120, 2 * 13696, 40), _LARGE, seq_length=2048),
        size(
            "qwen-72b",
            72_287_920_128,
            shape(80, 8192, 2 * 24576, 64),
            _LARGE,
            seq_length=32768,
            rotary_emb_base=1000000,
        ),
    ),
)
