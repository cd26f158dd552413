"""Zero-centred norms, scaled embeddings, gelu with a gate; then sandwich norms and windows."""

from __future__ import annotations

import pytest
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
}
WINDOWS = {"sliding_window": 40, "query_pre_attn_scalar": 30}
CASES = (
    Case(name="gemma", config=GemmaConfig(**SIZES, attention_bias=True)),
    Case(
        name="gemma2",
        config=Gemma2Config(
            **SIZES, **WINDOWS, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
        ),
    ),
    Case(
        name="gemma3",
        config=Gemma3TextConfig(
            **{**SIZES, "num_hidden_layers": 4},
            **WINDOWS,
            sliding_window_pattern=3,
            rope_theta=5000.0,
            rope_local_base_freq=300.0,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
        ),
        # transformers keeps a number here that it has turned into layer_types.
        not_written=("_sliding_window_pattern", "sliding_window_pattern"),
    ),
)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case, tmp_path_factory):
    check_round_trip(case, tmp_path_factory)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES[1:2]))
def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_gradients(case, layout, tmp_path_factory)
