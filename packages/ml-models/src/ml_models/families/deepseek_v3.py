"""DeepSeek-V3 and R1: as V2, but experts are scored by a sigmoid and balanced by a bias.

The published files also hold a layer that predicts a second token (`model.layers.61`). It is no
part of the model that generates; transformers leaves it out, and so do we. They are quantized,
which is refused: cast them to bfloat16 with DeepSeek's script first.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.entries import Always, Must, Value
from ml_models.families.family import Family, Size
from ml_models.families.latent import CONFIG, RULES

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    aliases=("deepseek3",),
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    config=(
        *CONFIG,
        Value("max_position_embeddings", "max_position_embeddings", default=4096),
        Value("first_k_dense_replace", "first_k_dense_replace", default=3),
        Value("routed_scaling_factor", "routed_scaling_factor", float, default=2.5),
        Value("n_group", "moe_router_num_groups", default=8),
        Value("topk_group", "moe_router_group_topk", default=4),
        Value("norm_topk_prob", "norm_topk_prob", bool, default=True),
        Must("topk_method", "noaux_tc"),
        Must("scoring_func", "sigmoid"),
        Must("num_nextn_predict_layers", 0, 1),
        Always(
            moe_router_score_function="sigmoid",
            moe_router_group_score="top2_sum",
            moe_router_enable_expert_bias=True,
        ),
    ),
    rules=RULES,
    ignored=(*decoder.NO_FREQUENCIES, "model.layers.61.*"),
    sizes=(
        Size(
            name="deepseek-v3",  # https://huggingface.co/deepseek-ai/DeepSeek-V3
            config={
                "vocab_size": 129280,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "max_position_embeddings": 163840,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "first_k_dense_replace": 3,
                "routed_scaling_factor": 2.5,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096,
                },
            },
            parameters=671_026_419_200,
        ),
    ),
)
