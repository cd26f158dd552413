"""How Megatron-LM and ModelLink spell the fields of an architecture in `args`.

A field has its own name, which is that of a flag of one of them, and often a second one. Some say
the same thing in another form: a window by the keys before a query, dense layers by a list.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_convert.dialects import Dialect
from ml_models.architecture import Architecture

# Other names of a field. With a name that has a default in Megatron-LM, the other counts more.
_ALIASES = {
    "add_rmsnorm_offset": ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    "final_logit_softcapping": ("output_logit_softcapping",),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_router_group_topk": ("topk_group",),
    "moe_router_num_groups": ("n_group",),
    "multi_latent_attention": ("multi_head_latent_attention",),
    "norm_epsilon": ("layernorm_epsilon",),
    "num_experts": ("num_moe_experts",),
    "original_max_position_embeddings": ("rope_scaling_original_max_position_embeddings",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim",),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor",),
}
_HAVE_DEFAULTS = ("qk_head_dim", "qk_pos_emb_head_dim")


def names(field: str) -> tuple[str, ...]:
    """List the names of a field, the one that counts most first."""
    found = (field, *_ALIASES.get(field, ()))
    return found[::-1] if field in _HAVE_DEFAULTS else found


def has_default(found: tuple[str, ...]) -> bool:
    """Tell whether one of a field's names has a value in Megatron-LM that nobody gave."""
    return any(name in _HAVE_DEFAULTS for name in found)


def spelled(arch: Architecture, dialect: Dialect) -> dict[str, Any]:
    """Write all fields, under every name."""
    fields = dataclasses.asdict(arch)
    for field, others in _ALIASES.items():
        fields |= dict.fromkeys(others, fields[field])
    return {
        **fields,
        **_attention(arch),
        **_positions(arch),
        **_experts(arch, dialect),
        "squared_relu": False,
        "openai_gelu": False,
        "bias_gelu_fusion": arch.approximate_gelu and not arch.is_gated,
        "use_mcore_models": not dialect.legacy,
        "transformer_impl": "transformer_engine" if dialect.fused_norms else "local",
        "moe_grouped_gemm": dialect.experts != "sequential",
    }


def _attention(arch: Architecture) -> dict[str, Any]:
    window = arch.sliding_window
    return {
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": _pattern(arch.window_attn_skip_freq),
    }


def _positions(arch: Architecture) -> dict[str, Any]:
    kind, factor = arch.rope_scaling_type, arch.rope_scaling_factor
    llama3 = (arch.low_freq_factor, arch.high_freq_factor, arch.original_max_position_embeddings)
    is_yarn = kind == "yarn"
    return {
        "rotary_base": int(arch.rotary_base) if arch.rotary_base % 1 == 0 else arch.rotary_base,
        "no_rope_freq": _pattern(arch.no_rope_freq),
        "use_partial_rope": arch.rotary_interleaved and arch.rotary_percent == 0.5,
        "use_rope_scaling": kind == "llama3" and llama3 == (1, 4, 8192),
        "rotary_seq_len_interpolation_factor": (
            int(factor) if kind == "linear" and factor % 1 == 0 else None
        ),
        "rope_type": "yarn" if is_yarn and arch.multi_latent_attention else "rope",
        "rotary_scaling_factor": factor if is_yarn else 1.0,
        "beta_fast": arch.rope_scaling_beta_fast,
        "beta_slow": arch.rope_scaling_beta_slow,
        "mscale": arch.rope_scaling_mscale,
        "mscale_all_dim": arch.rope_scaling_mscale_all_dim,
    }


def _experts(arch: Architecture, dialect: Dialect) -> dict[str, Any]:
    """MindSpeed wants a number as frequency beside the dense layers, Megatron-LM one list."""
    freq = _pattern(arch.moe_layer_freq)
    if arch.first_k_dense_replace and dialect.latent == "megatron":
        freq = [int(arch.has_experts(layer)) for layer in range(arch.num_layers)]
    factor = arch.routed_scaling_factor
    return {
        "moe_layer_freq": freq,
        "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
        "moe_shared_expert_intermediate_size": arch.shared_expert_size or None,
    }


def _pattern(values: tuple[int, ...] | None) -> int | list[int] | None:
    """Write a pattern of layers as Megatron does: one number, or a list."""
    if values is None or len(values) > 1:
        return None if values is None else list(values)
    return values[0]
