"""Gemma: norms multiply by 1 + weight, embeddings by sqrt(hidden size), gelu in a gated MLP.

Weights of norms are stored without the 1, and so are Megatron's with zero-centred norms: they are
copied as they are.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.entries import Always, Choice, Entry, Must, Not, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope

# What all generations share; what comes later in a list of entries wins.
COMMON: tuple[Entry, ...] = (
    *decoder.SIZES,
    decoder.GROUPS,
    Value("head_dim", "kv_channels", default=256),
    decoder.NORM_EPSILON,
    Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
    Choice("attention_bias", decoder.ATTENTION_BIASES, default=False),
    Must("use_bidirectional_attention", False, written=False),
    decoder.NOT_QUANTIZED,
    Always(
        normalization="RMSNorm",
        add_rmsnorm_offset=True,
        input_embeds_norm=True,
        geglu=True,
        add_bias_linear=False,
    ),
)

GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    config=(
        *COMMON,
        Value("max_position_embeddings", "max_position_embeddings", default=8192),
        Rope(),
        # "gelu" means the approximation, too; transformers corrects it, with a warning.
        Must("hidden_act", "gelu_pytorch_tanh", "gelu"),
        Must("hidden_activation", "gelu_pytorch_tanh"),
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(  # https://huggingface.co/google/gemma-2b, gemma-7b
        decoder.size(
            "gemma-2b",
            2_506_172_416,
            decoder.shape(18, 2048, 16384, 8, 1),
            vocab_size=256000,
        ),
        decoder.size(
            "gemma-7b",
            8_537_680_896,
            decoder.shape(28, 3072, 24576, 16),
            vocab_size=256000,
        ),
    ),
)
