"""Experts: how a router chooses among them, and how files store them."""

from __future__ import annotations

import pytest
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from reference_grok1 import Grok1
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
}
LAYOUTS = ("single", "tp2sp", "pp2", "ep2")
GROK1 = {
    **SIZES,
    "model_type": "grok-1",
    "architectures": ["Grok1ModelForCausalLM"],
    "rms_norm_eps": 1e-5,
    "num_experts": 4,
    "attn_output_multiplier": 0.3,  # not 1 / sqrt(16)
    "max_attn_value": 3.0,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "tie_word_embeddings": True,
}
CASES = (
    Case(
        name="mixtral",
        config=MixtralConfig(**SIZES, num_local_experts=4, head_dim=24, sliding_window=40),
        layouts=LAYOUTS,
    ),
    Case(
        name="qwen3-moe",
        config=Qwen3MoeConfig(
            **{**SIZES, "num_hidden_layers": 4, "num_experts_per_tok": 3},
            num_experts=6,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            head_dim=24,
            attention_bias=True,
        ),
        layouts=LAYOUTS,
        not_written=("decoder_sparse_step", "mlp_only_layers"),  # another spelling of the same
    ),
    Case(name="grok1", config=GROK1, reference=Grok1, layouts=LAYOUTS),
    Case(
        name="gpt-oss",
        config=GptOssConfig(
            **SIZES,
            num_local_experts=4,
            head_dim=24,
            sliding_window=40,
            swiglu_limit=1.0,  # else nothing is ever clamped
            rope_scaling={
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 2.0,  # with 32 the ramp begins before the first channel
                "beta_slow": 0.5,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        ),
        layouts=LAYOUTS,
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
