"""Qwen3-MoE: Qwen3 with many small experts; some layers may have none."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, value_of
from ml_models.families.entries import Always, Choice, Custom, Entry, Fields, Must, Value
from ml_models.families.experts import BALANCE, EXPERTS, ROUTER
from ml_models.families.family import Family
from ml_models.families.rope import Rope


def _read_dense_layers(config: Config) -> Fields:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    layers = value_of(config, "num_hidden_layers", int)
    step, dense = 1, config.get("mlp_only_layers") or ()
    if config.get("decoder_sparse_step") is not None:
        step = value_of(config, "decoder_sparse_step", int)
    if step < 1 or not isinstance(dense, (list, tuple)) or not set(dense) <= set(range(layers)):
        raise ValueError(
            f"config.json: decoder_sparse_step {step} must be at least 1, and mlp_only_layers "
            f"{dense!r} numbers of layers below num_hidden_layers {layers}"
        )
    marks = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]
    return {"moe_layer_freq": (1,) if all(marks) else tuple(marks)}


def _write_dense_layers(arch: Architecture) -> Fields:
    dense = [layer for layer in range(arch.num_layers) if not arch.has_experts(layer)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


_CONFIG: tuple[Entry, ...] = (
    *decoder.LLAMA_LIKE,
    Value("max_position_embeddings", "max_position_embeddings", default=32768),
    Value("num_key_value_heads", "num_query_groups", default=4),
    decoder.HEAD_DIM,
    Rope(),
    # transformers 5 writes the second name, transformers 4 reads the first.
    Value("num_experts", "num_experts", also=("num_local_experts",)),
    Value("num_local_experts", "num_experts", also=("num_experts",)),
    Value("num_experts_per_tok", "moe_router_topk", default=8),
    Value("moe_intermediate_size", "moe_ffn_hidden_size", default=768),
    Value("norm_topk_prob", "norm_topk_prob", bool, default=False),
    Custom(_read_dense_layers, _write_dense_layers),
    BALANCE,
    Choice("attention_bias", decoder.ATTENTION_BIASES, default=False),
    Must("use_sliding_window", False),
    Always(add_bias_linear=False, qk_layernorm=True, moe_router_pre_softmax=True),
)


_PUBLISHED = {
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "rope_theta": 1_000_000.0,
}

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    config=_CONFIG,
    rules=(
        *decoder.LLAMA_RULES,
        *decoder.QK_NORMS,
        ROUTER,
        *EXPERTS,
    ),
    sizes=(  # https://huggingface.co/Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B
        decoder.size(
            "qwen3-30b-a3b",
            30_532_122_624,
            decoder.shape(48, 2048, 6144, 32),
            moe_intermediate_size=768,
            **_PUBLISHED,
        ),
        decoder.size(
            "qwen3-235b-a22b",
            235_093_634_560,
            decoder.shape(94, 4096, 12288, 64),
            moe_intermediate_size=1536,
            **_PUBLISHED,
        ),
    ),
)
