"""GLM-4 (model type `glm`): half of each head rotary in neighbouring pairs, a stacked MLP.

GLM-4-9B in the files of transformers; in those of its first release it is a `chatglm`.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Always, Entry, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope
from ml_models.families.rules import Rule

CONFIG: tuple[Entry, ...] = (
    *decoder.LLAMA_LIKE,
    Value("max_position_embeddings", "max_position_embeddings", default=131072),
    Value("rms_norm_eps", "norm_epsilon", float, default=1.5625e-07),
    Value("num_key_value_heads", "num_query_groups", default=2),
    Value("head_dim", "kv_channels", default=128),
    Value("attention_bias", "add_qkv_bias", bool, default=True),
    Rope(default_percent=0.5),
    Always(rotary_interleaved=True),
    decoder.NO_BIASES,
)
RULES: tuple[Rule, ...] = (
    decoder.EMBEDDING,
    decoder.QKV,
    decoder.ATTENTION_OUTPUT,
    *decoder.NORMS,
    *decoder.STACKED_MLP,
    *decoder.HEAD,
)
SHAPE_9B = {**shape(40, 4096, 13696, 32, 2), "vocab_size": 151552}
_CHAT = {"max_position_embeddings": 131072, "rope_theta": 5e6}

GLM = Family(
    name="glm",
    model_types=("glm",),
    architectures=("GlmForCausalLM",),
    config=CONFIG,
    rules=RULES,
    sizes=(
        size("glm4-9b", 9_399_951_360, SHAPE_9B, max_position_embeddings=8192),
        size("glm4-9b-chat", 9_399_951_360, SHAPE_9B, _CHAT),
    ),
)
