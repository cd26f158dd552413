"""Grok-1: norms on both sides, multipliers, soft-capped scores, eight experts.

The architecture is that of https://github.com/xai-org/grok-1, names and config.json are those of
the community's port, https://huggingface.co/hpcai-tech/grok-1: xAI's own files are no Hugging Face
model. The port computes gelu exactly, xAI by the tanh approximation, as we do. The weights of the
two chosen experts are their shares of the softmax over all eight; what these sum up to is of no
matter to the norm after the experts.
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, number, value_of
from ml_models.families.decoder import ATTENTION, HF_LAYER, LAYER, MLP
from ml_models.families.entries import Always, Custom, Entry, Fields, Not, Value
from ml_models.families.experts import BALANCE, EXPERT
from ml_models.families.family import Family
from ml_models.families.rope import Rope
from ml_models.families.rules import GroupedQkv, Same, Stacked

_HF_EXPERT = f"{HF_LAYER}.moe_block.experts.@"
_SCALE = {"weight": ".scale"}
_MULTIPLIER = "attn_output_multiplier"


def _read_scale(config: Config) -> Fields:
    """Despite its name it multiplies the scores."""
    hidden, heads = (value_of(config, key, int) for key in ("hidden_size", "num_attention_heads"))
    usual = (hidden // heads) ** -0.5
    scale = number(config, _MULTIPLIER, usual)
    return {} if scale == usual else {"softmax_scale": scale}


def _write_scale(arch: Architecture) -> Fields:
    return {_MULTIPLIER: arch.head_dim**-0.5 if arch.softmax_scale is None else arch.softmax_scale}


_CONFIG: tuple[Entry, ...] = (
    *decoder.SIZES,
    Value("max_position_embeddings", "max_position_embeddings", default=8192),
    decoder.GROUPS,
    Value("rms_norm_eps", "norm_epsilon", float, default=1e-5),
    Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
    Rope(),
    Custom(_read_scale, _write_scale),
    Value("max_attn_value", "attn_logit_softcapping", float, default=30.0),
    Value("embedding_multiplier_scale", "embedding_multiplier_scale", float, 78.38367176906169),
    Value("output_multiplier_scale", "output_multiplier_scale", float, 0.5773502691896257),
    Value("num_experts", "num_experts", default=8),
    Value("num_experts_per_tok", "moe_router_topk", default=2),
    BALANCE,
    decoder.NOT_QUANTIZED,
    Always(
        normalization="RMSNorm",
        post_norm=True,
        geglu=True,
        add_bias_linear=False,
        moe_router_pre_softmax=True,
    ),
)

GROK1 = Family(
    name="grok1",
    aliases=("grok",),
    model_types=("grok-1", "grok1"),
    architectures=("Grok1ModelForCausalLM", "Grok1ForCausalLM"),
    config=_CONFIG,
    rules=(
        decoder.EMBEDDING,
        Same(f"{LAYER}.input_layernorm", f"{HF_LAYER}.pre_attn_norm", suffixes=_SCALE),
        GroupedQkv(
            f"{ATTENTION}.linear_qkv",
            query=f"{HF_LAYER}.attn.q_proj",
            key=f"{HF_LAYER}.attn.k_proj",
            value=f"{HF_LAYER}.attn.v_proj",
        ),
        Same(f"{ATTENTION}.linear_proj", f"{HF_LAYER}.attn.o_proj"),
        Same(f"{LAYER}.post_attn_norm", f"{HF_LAYER}.post_attn_norm", suffixes=_SCALE),
        Same(f"{LAYER}.pre_mlp_layernorm", f"{HF_LAYER}.pre_moe_norm", suffixes=_SCALE),
        Same(f"{MLP}.router", f"{HF_LAYER}.moe_block.gate"),
        Stacked(f"{EXPERT}.linear_fc1", (f"{_HF_EXPERT}.linear", f"{_HF_EXPERT}.linear_v")),
        Same(f"{EXPERT}.linear_fc2", f"{_HF_EXPERT}.linear_1"),
        Same(f"{LAYER}.post_mlp_layernorm", f"{HF_LAYER}.post_moe_norm", suffixes=_SCALE),
        Same("decoder.final_layernorm", "model.norm", suffixes=_SCALE),
        Same("output_layer", "lm_head"),
    ),
    sizes=(
        decoder.size(  # announced as 314 billion
            "grok-1",
            315_684_820_992,
            decoder.shape(64, 6144, 32768, 48, 8),
            vocab_size=131072,
        ),
    ),
)
