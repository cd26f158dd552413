"""What DeepSeek's generations share: latent attention, shared experts, their names and keys."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, value_of
from ml_models.families.decoder import ATTENTION, HF_LAYER, MLP
from ml_models.families.entries import Always, Choice, Custom, Entry, Fields, Must, Value
from ml_models.families.experts import EXPERTS
from ml_models.families.quantization import Unquantized
from ml_models.families.rope import Rope, merged
from ml_models.families.rules import Rule, Same, Stacked

_SELF = f"{HF_LAYER}.self_attn"
_SHARED = f"{HF_LAYER}.mlp.shared_experts"
_MSCALES = ("mscale", "mscale_all_dim")


def _read_queries(config: Config) -> Fields:
    """Read the size of the latent vector of queries: null means that there is none."""
    if "q_lora_rank" not in config:
        raise ValueError(
            "config.json: q_lora_rank is missing (null: queries have no latent vector)"
        )
    if config["q_lora_rank"] is None:
        return {}
    return {"q_lora_rank": value_of(config, "q_lora_rank", int)}


def _write_queries(arch: Architecture) -> Fields:
    return {"q_lora_rank": arch.q_lora_rank}


def _read_limits(config: Config) -> Fields:
    """Refuse what the published code would compute otherwise than Megatron."""
    must_be(config, "num_key_value_heads", config.get("num_attention_heads"))
    must_be(config, "rms_norm_eps", 1e-6)  # norms of latent vectors have this one always
    rope = merged(config)
    if sum(bool(rope.get(key)) for key in _MSCALES) == 1:
        raise ValueError("config.json: of mscale and mscale_all_dim give both, or none")
    return {}


def _write_limits(arch: Architecture) -> Fields:
    return {"num_key_value_heads": arch.num_attention_heads}


CONFIG: tuple[Entry, ...] = (
    *decoder.SIZES,
    decoder.UNTIED,
    decoder.NORM_EPSILON,
    Rope(latent=True),
    Custom(_read_limits, _write_limits),
    Custom(_read_queries, _write_queries),
    Value("kv_lora_rank", "kv_lora_rank"),
    Value("qk_nope_head_dim", "qk_head_dim"),
    Value("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    Value("v_head_dim", "v_head_dim"),
    Value("n_routed_experts", "num_experts"),
    Value("n_shared_experts", "n_shared_experts"),
    Value("num_experts_per_tok", "moe_router_topk"),
    Value("moe_intermediate_size", "moe_ffn_hidden_size"),
    Value("first_k_dense_replace", "first_k_dense_replace", default=0),
    Value("routed_scaling_factor", "routed_scaling_factor", float, default=1.0),
    Value("aux_loss_alpha", "moe_aux_loss_coeff", float, default=0.0),
    Choice(
        "seq_aux",
        {
            True: {"moe_router_load_balancing_type": "seq_aux_loss"},
            False: {"moe_router_load_balancing_type": "aux_loss"},
        },
        default=True,
    ),
    Must("moe_layer_freq", 1),
    Must("attention_bias", False),
    Must("mlp_bias", False, written=False),
    Must("hidden_act", "silu"),
    Must("rope_interleave", True, written=False),
    Unquantized(
        "cast them with the script that DeepSeek publishes beside them (fp8_cast_bf16.py)",
    ),
    Always(
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        multi_latent_attention=True,
        qk_layernorm=True,
    ),
)

RULES: tuple[Rule, ...] = (
    decoder.EMBEDDING,
    *decoder.NORMS,
    Same(f"{ATTENTION}.linear_q_proj", f"{_SELF}.q_proj"),
    Same(f"{ATTENTION}.linear_q_down_proj", f"{_SELF}.q_a_proj"),
    Same(f"{ATTENTION}.q_layernorm", f"{_SELF}.q_a_layernorm"),
    Same(f"{ATTENTION}.linear_q_up_proj", f"{_SELF}.q_b_proj"),
    Same(f"{ATTENTION}.linear_kv_down_proj", f"{_SELF}.kv_a_proj_with_mqa"),
    Same(f"{ATTENTION}.kv_layernorm", f"{_SELF}.kv_a_layernorm"),
    Same(f"{ATTENTION}.linear_kv_up_proj", f"{_SELF}.kv_b_proj"),
    decoder.ATTENTION_OUTPUT,
    *decoder.GATED_MLP,
    Same(
        f"{MLP}.router",
        f"{HF_LAYER}.mlp.gate",
        suffixes={"expert_bias": ".e_score_correction_bias"},
    ),
    *EXPERTS,
    Stacked(f"{MLP}.shared_experts.linear_fc1", (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj")),
    Same(f"{MLP}.shared_experts.linear_fc2", f"{_SHARED}.down_proj"),
    *decoder.HEAD,
)
