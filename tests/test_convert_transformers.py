"""What ml-convert writes for Hugging Face is what transformers and safetensors read and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch

from ml_convert import Request, convert
from ml_models.registry import family_for

TOKENS = torch.arange(40).reshape(2, 20)
VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}


@pytest.fixture(params=VARIANTS)
def llama(request, tmp_path):
    """A tiny random model in bfloat16, saved in several files by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 301,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 3,
        "eos_token_id": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **VARIANTS[request.param]}))
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def round_trip(llama: Path, tmp_path: Path, **options) -> Path:
    convert(
        Request(
            load_dir=llama,
            save_dir=tmp_path / "mcore",
            save_format="mcore",
            target_tensor_parallel_size=2,
            target_pipeline_parallel_size=2,
            num_layers_per_virtual_pipeline_stage=1,
        )
    )
    request = Request(
        load_dir=tmp_path / "mcore", save_dir=tmp_path / "back", save_format="hf", **options
    )
    convert(request)
    return tmp_path / "back"


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_all_bytes_of_all_tensors_come_back(llama, tmp_path, max_shard_size):
    back = round_trip(llama, tmp_path, max_shard_size=max_shard_size)
    expected, found = tensors_of(llama), tensors_of(back)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_loads_the_same_model(llama, tmp_path, with_config):
    from transformers import AutoModelForCausalLM

    back = round_trip(llama, tmp_path, hf_config=llama if with_config else None)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama, back)]
    configs = [model.config.to_dict() for model in models]
    for config in configs:
        config.pop("_name_or_path", None)
        if not with_config:  # special tokens belong to a tokenizer, which nobody gave
            del config["bos_token_id"], config["eos_token_id"]
    assert configs[0] == configs[1]
    with torch.no_grad():
        first, second = (model(TOKENS).logits for model in models)
    assert torch.equal(first, second)
    assert float(first.float().std()) > 0.1


def test_a_config_read_and_written_means_the_same_to_transformers(llama):
    from transformers import LlamaConfig

    config = json.loads((llama / "config.json").read_text())
    family = family_for(config)
    written = family.to_hf(family.from_hf(config), "bfloat16")
    ours, theirs = (LlamaConfig.from_dict(c).to_dict() for c in (written, config))
    for name in ("bos_token_id", "eos_token_id", "transformers_version", "torch_dtype"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


def test_tensor_names_and_shapes_of_the_family_are_those_of_the_class(llama):
    config = json.loads((llama / "config.json").read_text())
    family = family_for(config)
    expected = {name: tuple(tensor.shape) for name, tensor in tensors_of(llama).items()}
    found = family.tensors(family.from_hf(config))
    assert {name: tensor.shape for name, tensor in found.items()} == expected
