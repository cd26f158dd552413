"""LayerNorm, biases everywhere, a plain MLP: GPT-2 and Bloom."""

from __future__ import annotations

import pytest
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from transformers import BloomConfig, GPT2Config

CASES = (
    Case(
        name="gpt2",
        config=GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_inner=160,
            n_positions=160,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    Case(
        name="bloom",
        # More heads than a power of two: the slopes of ALiBi are two series then.
        config=BloomConfig(vocab_size=VOCABULARY, hidden_size=72, n_layer=2, n_head=6),
    ),
)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case, tmp_path_factory):
    check_round_trip(case, tmp_path_factory)


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_gradients(case, layout, tmp_path_factory)
