"""DeepSeek-V2 and V2-Lite: latent attention, shared experts, a choice among groups of experts."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, value_of
from ml_models.families.entries import Always, Custom, Fields, Must
from ml_models.families.family import Family
from ml_models.families.latent import CONFIG, RULES

_PUBLISHED = {
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}
_GROUPS = {"n_group": "moe_router_num_groups", "topk_group": "moe_router_group_topk"}


def _read_groups(config: Config) -> Fields:
    """Groups count only for the method that is limited by them."""
    must_be(config, "topk_method", "greedy", "group_limited_greedy")
    if config.get("topk_method", "greedy") != "group_limited_greedy":
        return {}
    return {field: value_of(config, key, int) for key, field in _GROUPS.items() if key in config}


def _write_groups(arch: Architecture) -> Fields:
    if arch.moe_router_num_groups is None:
        return {"topk_method": "greedy"}
    groups = {key: getattr(arch, field) for key, field in _GROUPS.items()}
    return {"topk_method": "group_limited_greedy", **groups}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    aliases=("deepseek2",),
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM",),
    config=(
        *CONFIG,
        Custom(_read_groups, _write_groups),
        Must("scoring_func", "softmax"),
        Must("norm_topk_prob", False),
        Always(moe_router_pre_softmax=True),
    ),
    rules=RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(  # https://huggingface.co/deepseek-ai/DeepSeek-V2, DeepSeek-V2-Lite
        decoder.size(
            "deepseek-v2",
            235_741_434_880,
            decoder.shape(60, 5120, 12288, 128),
            q_lora_rank=1536,
            moe_intermediate_size=1536,
            n_routed_experts=160,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
            **_PUBLISHED,
        ),
        decoder.size(
            "deepseek-v2-lite",
            15_706_484_224,
            decoder.shape(27, 2048, 10944, 16),
            q_lora_rank=None,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            **_PUBLISHED,
        ),
    ),
)
