"""Resident memory has the same bound for models of very many tensors: each counts little.

The shapes are tiny, as the size of the tensors does not count at all (test_conversion shows that).
"""

import json
import subprocess
import sys

import pytest

from ml_convert.safetensors_file import SafetensorsFile
from ml_convert.tensor import DTYPES
from ml_models.registry import family_for

# DeepSeek-V3: 61 layers, of which 58 have 256 experts
MANY_TENSORS = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 61,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
RANKS = ("--target-expert-parallel-size", "8", "--target-pipeline-parallel-size", "4")
STAGES = ("--num-layer-list", "16,15,15,15")


def write_model(path):
    """Write zeros; returns the number of tensors."""
    family = family_for(MANY_TENSORS)
    tensors = {
        name: (DTYPES["float32" if name.endswith("bias") else "bfloat16"], hf.shape)
        for name, hf in family.tensors(family.from_hf(MANY_TENSORS)).items()
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MANY_TENSORS))
    new = SafetensorsFile(tensors)
    with (path / "model.safetensors").open("wb") as file:
        file.truncate(new.size)
        new.finish(file.fileno(), [])
    return len(tensors)


MEASURED = """
import re, sys
from pathlib import Path
from ml_convert.cli import main

assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_mib(source, target, save_format, *more):
    """Convert in a process of its own; returns its largest resident memory."""
    words = ["--load-dir", str(source), "--save-dir", str(target), "--save-format", save_format]
    command = [sys.executable, "-c", MEASURED, *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
def test_45_thousand_tensors_need_less_than_200_mib_in_every_direction(tmp_path):
    assert write_model(tmp_path / "hf") > 45_000
    peaks = {
        "to ranks": peak_mib(tmp_path / "hf", tmp_path / "mcore", "mcore", *RANKS, *STAGES),
        "to torch_dist": peak_mib(tmp_path / "mcore", tmp_path / "dist", "torch_dist"),
        "back": peak_mib(tmp_path / "dist", tmp_path / "back", "hf"),
        "Hugging Face to itself": peak_mib(tmp_path / "back", tmp_path / "again", "hf"),
    }
    assert max(peaks.values()) < 190, peaks
