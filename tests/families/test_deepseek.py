"""Latent attention, shared experts, a choice among groups of experts: DeepSeek."""

from __future__ import annotations

import pytest
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from transformers import DeepseekV2Config, DeepseekV3Config

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {  # numbers with which the ramp ends within the few channels
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4,
    "original_max_position_embeddings": 64,
    "beta_fast": 2,
    "beta_slow": 0.5,
}
LAYOUTS = ("single", "tp2sp", "pp2", "ep2")


def balance(name, tensor):
    """Make the bias of the choice large enough to change it."""
    if name.endswith("e_score_correction_bias"):
        tensor.uniform_(-0.5, 0.5)
        return True
    return False


CASES = (
    Case(
        name="deepseek-v2",
        config=DeepseekV2Config(
            **SIZES,
            **GROUPS,
            topk_method="group_limited_greedy",
            n_shared_experts=2,
            routed_scaling_factor=16.0,
            q_lora_rank=24,
            rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        layouts=LAYOUTS,
    ),
    Case(
        name="deepseek-v2-lite",
        config=DeepseekV2Config(
            **{**SIZES, "first_k_dense_replace": 0},
            topk_method="greedy",
            n_shared_experts=1,
            q_lora_rank=None,
            rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        ),
        layouts=LAYOUTS,
    ),
    Case(
        name="deepseek-v3",
        config=DeepseekV3Config(
            **SIZES,
            **GROUPS,
            n_shared_experts=1,
            routed_scaling_factor=2.5,
            q_lora_rank=24,
            num_mtp_layers=0,
        ),
        layouts=LAYOUTS,
        randomize=balance,
    ),
)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case, tmp_path_factory):
    check_round_trip(case, tmp_path_factory)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES[2:]))
def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_gradients(case, layout, tmp_path_factory)
