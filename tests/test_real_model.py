"""A real model goes through every Megatron format and comes back bit for bit, and still speaks."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ml_convert import Request, convert

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The three primary colours are"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    command = [sys.executable, str(ROOT / "tools" / "assets.py"), "model-smollm2"]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    directory = tmp_path_factory.mktemp("real") / "smollm2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' reader of GGUF
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
        read = AutoModelForCausalLM.from_pretrained(
            source, gguf_file="model.gguf", dtype=torch.bfloat16
        )
    del read.config.quantization_config  # the weights are plain ones now
    model = LlamaForCausalLM(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoints(smollm2) -> dict[str, Path]:
    """The model in every format on the way, each made from the one before.

    Its 9 heads can be cut in 3, not in 2.
    """
    root = smollm2.parent
    steps = {
        "mcore tp3 pp2": {
            "save_format": "mcore",
            "target_tensor_parallel_size": 3,
            "target_pipeline_parallel_size": 2,
        },
        "legacy pp2 vpp": {
            "save_format": "legacy",
            "target_pipeline_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 5,
        },
        "mcore tp3": {"save_format": "mcore", "target_tensor_parallel_size": 3},
        "hf": {"save_format": "hf", "hf_config": smollm2},
    }
    found, source = {}, smollm2
    for name, options in steps.items():
        found[name] = root / name.replace(" ", "-")
        convert(Request(load_dir=source, save_dir=found[name], **options))
        source = found[name]
    return found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


def continuation(directory: Path) -> str:
    """Return what transformers says after the prompt, greedily, computed in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_every_bit_comes_back(smollm2, checkpoints):
    before, after = weights(smollm2), weights(checkpoints["hf"])
    assert before.keys() == after.keys()
    assert sum(tensor.numel() for tensor in before.values()) == 134_515_008
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name


@pytest.mark.slow
def test_it_says_the_same_before_and_after_and_from_the_megatron_form(smollm2, checkpoints):
    text = continuation(smollm2)
    assert "blue" in text.lower()
    assert continuation(checkpoints["hf"]) == text
    words = [
        sys.executable,
        "-m",
        "ml_eval",
        "generate",
        "--load",
        str(checkpoints["mcore tp3"]),
        "--params-dtype",
        "fp32",
    ]
    words += ["--tokenizer-name-or-path", str(smollm2), "--max-new-tokens", str(NEW_TOKENS)]
    done = subprocess.run([*words, "--prompt", PROMPT], check=True, capture_output=True, text=True)
    assert text.strip() in done.stdout
