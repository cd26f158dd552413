"""RMSNorm, rotary positions, a gated MLP: the families of transformers that are like Llama."""

from __future__ import annotations

import pytest
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from transformers import (
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 48,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
HALF = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
FOUR_LAYERS = {"num_hidden_layers": 4}
WINDOWS = {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1}

CASES = (
    Case(name="llama", config=LlamaConfig(**SIZES, rope_theta=50000.0, rms_norm_eps=1e-5)),
    Case(name="llama biases", config=LlamaConfig(**SIZES, **BIASES), layouts=("single", "tp2")),
    Case(
        name="llama biases of attention",
        config=LlamaConfig(**SIZES, attention_bias=True),
        layouts=("single",),
    ),
    Case(
        name="llama 3.2",
        config=LlamaConfig(
            **SIZES, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3_SCALING
        ),
    ),
    Case(name="mistral", config=MistralConfig(**SIZES, head_dim=32, sliding_window=50)),
    Case(
        name="qwen 2.5",
        config=Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
        not_written=("max_window_layers",),
    ),
    Case(
        name="qwen 2 windows",
        config=Qwen2Config(**SIZES, **WINDOWS),
        layouts=("single", "pp2"),
    ),
    Case(
        name="qwen 3",
        config=Qwen3Config(**SIZES, head_dim=32, attention_bias=True, rope_theta=50000.0),
        not_written=("max_window_layers",),
    ),
    Case(
        name="smollm 3",
        config=SmolLM3Config(
            **{**SIZES, **FOUR_LAYERS}, no_rope_layer_interval=2, **BIASES, pad_token_id=0
        ),
    ),
    Case(
        name="phi 3",
        config=Phi3Config(
            **SIZES,
            sliding_window=60,
            rope_parameters=LONG,
            original_max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=2,
        ),
        not_written=("original_max_position_embeddings",),
    ),
    Case(name="glm", config=GlmConfig(**SIZES, head_dim=32, rope_parameters=HALF, pad_token_id=0)),
    Case(
        name="glm 4",
        config=Glm4Config(**SIZES, head_dim=32, rope_parameters=HALF, pad_token_id=0),
    ),
)
WITH_GRADIENTS = [case for case in CASES if case.name in ("llama", "qwen 3", "glm 4")]


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case, tmp_path_factory):
    check_round_trip(case, tmp_path_factory)


@pytest.mark.parametrize(("case", "layout"), every_layout(WITH_GRADIENTS))
def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_gradients(case, layout, tmp_path_factory)
