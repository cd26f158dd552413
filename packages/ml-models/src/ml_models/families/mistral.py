"""Mistral: Llama where every layer has a sliding window, if any has."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, value_of
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Custom, Fields, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope


def _read_window(config: Config) -> Fields:
    """A missing key means 4096, null means no window."""
    if config.get("sliding_window", 4096) is None:
        return {}
    return {"sliding_window": value_of({"sliding_window": 4096, **config}, "sliding_window", int)}


def _write_window(arch: Architecture) -> Fields:
    return {"sliding_window": arch.sliding_window}


_7B = {**shape(32, 4096, 14336, 32, 8), "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
_V01 = {"vocab_size": 32000, "sliding_window": 4096}
_V03 = {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6}

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        Value("max_position_embeddings", "max_position_embeddings", default=131072),
        Value("num_key_value_heads", "num_query_groups", default=8),
        decoder.HEAD_DIM,
        Rope(),
        Custom(_read_window, _write_window),
        decoder.NO_BIASES,
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(
        size("mistral-7b", 7_241_732_096, _7B, _V01),
        size("mistral-7b-v0.3", 7_248_023_552, _7B, _V03),
    ),
)
