"""Qwen 3: as Qwen 2.5 without biases, and with norms of the heads of query and key."""

from __future__ import annotations

from ml_models.families import decoder, qwen2
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Always, Choice, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope

_SHARED = {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "head_dim": 128,
}
_TIED = {**_SHARED, "tie_word_embeddings": True}  # the embedding counts once

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        qwen2.LENGTH,
        decoder.GROUPS,
        Value("head_dim", "kv_channels", default=128),
        Rope(),
        Choice("attention_bias", decoder.ATTENTION_BIASES, default=False),
        decoder.NO_BIASES,
        *qwen2.WINDOWS,
        Always(qk_layernorm=True),
    ),
    rules=(*decoder.LLAMA_RULES, *decoder.QK_NORMS),
    sizes=(
        size("qwen3-0.6b", 596_049_920, shape(28, 1024, 3072, 16, 8), _TIED),
        size("qwen3-1.7b", 1_720_574_976, shape(28, 2048, 6144, 16, 8), _TIED),
        size("qwen3-4b", 4_022_468_096, shape(36, 2560, 9728, 32, 8), _TIED),
        size("qwen3-8b", 8_190_735_360, shape(36, 4096, 12288, 32, 8), _SHARED),
        size("qwen3-14b", 14_768_307_200, shape(40, 5120, 17408, 40, 8), _SHARED),
        size("qwen3-32b", 32_762_123_264, shape(64, 5120, 25600, 64, 8), _SHARED),
    ),
)
