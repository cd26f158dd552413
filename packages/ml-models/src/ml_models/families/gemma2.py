"""Gemma 2: norms on both sides of attention and MLP, soft-capped scores, windows in turn."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, value_of
from ml_models.families.decoder import HF_LAYER, LAYER
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Value
from ml_models.families.family import Family
from ml_models.families.gemma import COMMON
from ml_models.families.rope import Rope
from ml_models.families.rules import Rule, Same
from ml_models.families.windows import Windows

_SCALAR = "query_pre_attn_scalar"
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _read_scale(config: Config) -> Fields:
    """Scores are divided by the root of this number, by default that of a head's channels."""
    scalar = 256 if config.get(_SCALAR) is None else value_of(config, _SCALAR, int)
    head = 256 if config.get("head_dim") is None else value_of(config, "head_dim", int)
    return {} if scalar == head else {"softmax_scale": scalar**-0.5}


def _write_scale(arch: Architecture) -> Fields:
    scale = arch.softmax_scale
    return {_SCALAR: arch.head_dim if scale is None else round(scale**-2)}


def _read_caps(config: Config) -> Fields:
    """Read caps; null means none, a missing one means the default."""
    given = {key: config.get(key, default) for key, default in _CAPS.items()}
    return {
        key: None if value is None else value_of(given, key, float) for key, value in given.items()
    }


def _write_caps(arch: Architecture) -> Fields:
    return {key: getattr(arch, key) for key in _CAPS}


SCALE = Custom(_read_scale, _write_scale)
ACTIVATION = Must("hidden_activation", "gelu_pytorch_tanh")
SANDWICH_NORMS: tuple[Rule, ...] = (
    Same(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm"),
    Same(f"{LAYER}.post_attn_norm", f"{HF_LAYER}.post_attention_layernorm"),
    Same(f"{LAYER}.pre_mlp_layernorm", f"{HF_LAYER}.pre_feedforward_layernorm"),
    Same(f"{LAYER}.post_mlp_layernorm", f"{HF_LAYER}.post_feedforward_layernorm"),
)
RULES: tuple[Rule, ...] = (
    decoder.EMBEDDING,
    decoder.QKV,
    decoder.ATTENTION_OUTPUT,
    *SANDWICH_NORMS,
    *decoder.GATED_MLP,
    *decoder.HEAD,
)

_CONFIG: tuple[Entry, ...] = (
    *COMMON,
    Value("num_key_value_heads", "num_query_groups", default=4),
    Value("max_position_embeddings", "max_position_embeddings", default=8192),
    Rope(),
    Windows(4096),
    SCALE,
    Custom(_read_caps, _write_caps),
    ACTIVATION,
    Always(post_norm=True),
)


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    config=_CONFIG,
    rules=RULES,
    sizes=(  # https://huggingface.co/google/gemma-2-2b, gemma-2-9b, gemma-2-27b
        decoder.size(
            "gemma2-2b",
            2_614_341_888,
            decoder.shape(26, 2304, 9216, 8, 4),
            vocab_size=256000,
        ),
        decoder.size(
            "gemma2-9b",
            9_241_705_984,
            decoder.shape(42, 3584, 14336, 16, 8),
            vocab_size=256000,
        ),
        decoder.size(
            "gemma2-27b",
            27_227_128_320,
            decoder.shape(46, 4608, 36864, 32, 16),
            vocab_size=256000,
            head_dim=128,
            query_pre_attn_scalar=144,
        ),
    ),
)
