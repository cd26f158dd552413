"""Mixtral: Mistral with experts; the two chosen ones share a softmax."""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import HF_LAYER, MLP
from ml_models.families.entries import Value
from ml_models.families.experts import BALANCE, EXPERT
from ml_models.families.family import Family
from ml_models.families.rope import Rope
from ml_models.families.rules import Same, Stacked

_HF_EXPERTS = f"{HF_LAYER}.block_sparse_moe.experts.@"

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        Value("max_position_embeddings", "max_position_embeddings", default=131072),
        Value("num_key_value_heads", "num_query_groups", default=8),
        decoder.HEAD_DIM,
        Value("rms_norm_eps", "norm_epsilon", float, default=1e-5),
        Rope(default_base=1_000_000.0),
        Value("sliding_window", "sliding_window", default=None),
        Value("num_local_experts", "num_experts", default=8, also=("num_experts",)),
        Value("num_experts_per_tok", "moe_router_topk", default=2),
        BALANCE,
        decoder.NO_BIASES,
    ),
    rules=(
        decoder.EMBEDDING,
        decoder.QKV,
        decoder.ATTENTION_OUTPUT,
        *decoder.NORMS,
        Same(f"{MLP}.router", f"{HF_LAYER}.block_sparse_moe.gate"),
        Stacked(f"{EXPERT}.linear_fc1", (f"{_HF_EXPERTS}.w1", f"{_HF_EXPERTS}.w3")),
        Same(f"{EXPERT}.linear_fc2", f"{_HF_EXPERTS}.w2"),
        *decoder.HEAD,
    ),
    ignored=decoder.NO_FREQUENCIES,
    sizes=(  # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
        decoder.size(
            "mixtral-8x7b",
            46_702_792_704,
            decoder.shape(32, 4096, 14336, 32, 8),
            vocab_size=32000,
            max_position_embeddings=32768,
        ),
        decoder.size(
            "mixtral-8x22b",
            140_620_634_112,
            decoder.shape(56, 6144, 16384, 48, 8),
            vocab_size=32000,
            max_position_embeddings=65536,
        ),
    ),
)
