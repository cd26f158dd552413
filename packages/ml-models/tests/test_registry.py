"""Families are found by name, alias, model type or architecture."""

import dataclasses
import subprocess
import sys

import pytest

from ml_models import registry


def test_a_family_is_found_by_name_and_by_modellinks_name():
    assert registry.family("llama").name == "llama"
    assert registry.family("llama2") is registry.family("llama")
    assert "llama" in registry.names()


def test_a_family_of_ours_is_found_without_looking_at_installed_packages():
    code = (
        "import sys; from ml_models import registry; registry.find('llama2');"
        "print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert registry.find(None) is None


def test_an_unknown_name_lists_the_known_and_suggests_the_closest():
    with pytest.raises(ValueError, match=r"'lama' is unknown \(known: llama.*did you mean llama"):
        registry.family("lama")


def test_a_config_is_recognised_by_model_type_else_by_architecture():
    assert registry.family_for({"model_type": "llama"}).name == "llama"
    assert registry.family_for({"architectures": ["LlamaForCausalLM"]}).name == "llama"


def test_a_model_is_of_the_family_that_can_describe_it():
    llama = registry.family("llama").from_hf(
        {
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 32,
        }
    )
    assert registry.family_of(llama).name == "llama"
    assert registry.family_of(dataclasses.replace(llama, normalization="LayerNorm")) is None


def test_another_models_config_is_refused_even_when_its_architecture_looks_right():
    with pytest.raises(ValueError, match=r"model_type 'bert' .*known model types: .*llama"):
        registry.family_for({"model_type": "bert", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match="model_type None"):
        registry.family_for({})


def test_importing_families_needs_neither_torch_nor_megatron_nor_transformers():
    code = (
        "import sys, ml_models.registry;"
        "print({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
