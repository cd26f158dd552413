"""A key that config.json leaves out means what it means to transformers' own class."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import transformers

from ml_models.registry import family_for

TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "glm", "glm4", "bloom", "gpt2"),
    *("gemma", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
    "gpt_oss",
)
WITHOUT_DEFAULT = {"deepseek_v2": {"num_experts_per_tok": 6}}


@cache
def whole(model_type):
    config = transformers.CONFIG_MAPPING[model_type](
        **WITHOUT_DEFAULT.get(model_type, {})
    ).to_dict()
    return {**config, "model_type": model_type}


def describe(config):
    """Return every field, also those that do not count when models are compared."""
    return dataclasses.asdict(family_for(config).from_hf(config))


@pytest.mark.parametrize("model_type", TYPES)
def test_a_missing_key_has_the_default_of_transformers_or_is_asked_for(model_type):
    config = whole(model_type)
    expected, read = describe(config), 0
    for key in config.keys() - {"model_type"}:
        rest = {name: value for name, value in config.items() if name != key}
        try:
            found = describe(rest)
        except ValueError:
            continue
        read += 1
        differ = {name: found[name] for name in found if found[name] != expected[name]}
        assert not differ, key
    assert read > 5


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, only 1.0",
        ),
        (
            "qwen2",
            {
                "rope_parameters": None,
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 4096,
                },
            },
            "original_max_position_embeddings is 4096, only 32768",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gpt_oss", {"rope_parameters": None}, "rope_scaling .* is missing"),
    ],
)
def test_what_transformers_ignores_is_refused(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        describe({**whole(model_type), **changes})


def test_dynamic_positions_are_written_without_a_length_that_transformers_does_not_know():
    config = whole("llama") | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    family = family_for(config)
    arch = family.from_hf(config)
    assert arch.original_max_position_embeddings == config["max_position_embeddings"]
    written = family.to_hf(arch, "float32")
    for section in ("rope_parameters", "rope_scaling"):
        assert "original_max_position_embeddings" not in written[section]
    longer = dataclasses.replace(arch, max_position_embeddings=4 * arch.max_position_embeddings)
    with pytest.raises(ValueError, match="--original-max-position-embeddings is"):
        family.to_hf(longer, "float32")


def test_a_model_whose_layers_are_all_dense_is_one_model_however_it_is_said():
    config = whole("deepseek_v3") | {"num_hidden_layers": 4, "first_k_dense_replace": 4}
    arch = family_for(config).from_hf(config)
    listed = dataclasses.replace(arch, first_k_dense_replace=0, moe_layer_freq=(0, 0, 0, 0))
    assert listed == arch
    assert not any(arch.has_experts(layer) for layer in range(4))
    assert family_for(config).to_hf(listed, "float32")["first_k_dense_replace"] == 4
