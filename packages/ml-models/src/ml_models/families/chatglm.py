"""ChatGLM 2 and 3, and GLM-4 in the files of its first release.

Multi-query attention with biases, half of each head rotary in neighbouring pairs, a stacked MLP.
`rope_ratio` multiplies the rotary base, as in the code of ChatGLM 3 and GLM-4. (That of
ChatGLM2-6B-32K divides positions by it, which its config.json does not tell.)
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, number, value_of
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Value
from ml_models.families.family import Family, Size
from ml_models.families.rules import FlatQkv, Same

_HF_LAYER = "transformer.encoder.layers.*"
_BASE = 10000.0


def _read_groups(config: Config) -> Fields:
    must_be(config, "multi_query_attention", True, False)
    if not config.get("multi_query_attention"):
        return {}
    return {"num_query_groups": value_of(config, "multi_query_group_num", int)}


def _write_groups(arch: Architecture) -> Fields:
    grouped = arch.query_groups != arch.num_attention_heads
    return {"multi_query_attention": grouped, "multi_query_group_num": arch.query_groups}


def _read_ratio(config: Config) -> Fields:
    return {"rotary_base": _BASE * number(config, "rope_ratio", 1.0)}


def _write_ratio(arch: Architecture) -> Fields:
    return {"rope_ratio": arch.rotary_base / _BASE}


_CONFIG: tuple[Entry, ...] = (
    Value("padded_vocab_size", "vocab_size"),
    Value("hidden_size", "hidden_size"),
    Value("ffn_hidden_size", "ffn_hidden_size"),
    Value("num_layers", "num_layers"),
    Value("num_attention_heads", "num_attention_heads"),
    Value("kv_channels", "kv_channels", default=128),
    Value("seq_length", "max_position_embeddings"),
    Value("layernorm_epsilon", "norm_epsilon", float, default=1e-5),
    Value("add_bias_linear", "add_bias_linear", bool, default=False),
    Value("add_qkv_bias", "add_qkv_bias", bool, default=False),
    Custom(_read_groups, _write_groups),
    Custom(_read_ratio, _write_ratio),
    decoder.UNTIED,
    Must("rmsnorm", True),
    Must("original_rope", True),
    Must("post_layer_norm", True),
    Must("apply_residual_connection_post_layernorm", False),
    Must("apply_query_key_layer_scaling", True, False),
    Must("pre_seq_len", written=False),
    decoder.NOT_QUANTIZED,
    Always(normalization="RMSNorm", swiglu=True, rotary_percent=0.5, rotary_interleaved=True),
)


def _chatglm3(name: str, **config: object) -> Size:
    sizes = {
        "num_layers": 28,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "num_attention_heads": 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 128,
        "padded_vocab_size": 65024,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    }
    return Size(name=name, config={**sizes, **config}, parameters=6_243_584_000)


CHATGLM = Family(
    name="chatglm",
    aliases=("chatglm2", "chatglm3"),
    model_types=("chatglm",),
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    config=_CONFIG,
    rules=(
        Same("embedding.word_embeddings", "transformer.embedding.word_embeddings"),
        Same(f"{decoder.LAYER}.input_layernorm", f"{_HF_LAYER}.input_layernorm"),
        FlatQkv(f"{decoder.ATTENTION}.linear_qkv", f"{_HF_LAYER}.self_attention.query_key_value"),
        Same(f"{decoder.ATTENTION}.linear_proj", f"{_HF_LAYER}.self_attention.dense"),
        Same(f"{decoder.LAYER}.pre_mlp_layernorm", f"{_HF_LAYER}.post_attention_layernorm"),
        Same(f"{decoder.MLP}.linear_fc1", f"{_HF_LAYER}.mlp.dense_h_to_4h"),
        Same(f"{decoder.MLP}.linear_fc2", f"{_HF_LAYER}.mlp.dense_4h_to_h"),
        Same("decoder.final_layernorm", "transformer.encoder.final_layernorm"),
        Same("output_layer", "transformer.output_layer"),
    ),
    ignored=("transformer.rotary_pos_emb.inv_freq",),
    sizes=(
        _chatglm3("chatglm3-6b", seq_length=8192),
        _chatglm3("chatglm3-6b-32k", seq_length=32768, rope_ratio=50),
    ),
)
