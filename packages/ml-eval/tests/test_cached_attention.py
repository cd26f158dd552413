"""With a cache, every kind of attention gives the logits that transformers gives without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from ml_convert import Request
from ml_convert.input import open_source
from ml_eval.engine import Engine, load
from ml_parallel.testing import run_ranks

IDS = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
EXPERTS = {"num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
CONFIGS = {
    "soft-capped, windows": transformers.Gemma2Config(
        **GROUPED, sliding_window=7, attn_logit_softcapping=2.0
    ),
    "another base where there are windows": transformers.Gemma3TextConfig(
        **GROUPED, sliding_window=7, rope_local_base_freq=100.0, layer_types=None
    ),
    "sinks, windows, yarn": transformers.GptOssConfig(
        **GROUPED, **EXPERTS, num_local_experts=4, sliding_window=7, rope_scaling=YARN
    ),
    "latent": transformers.DeepseekV3Config(
        **{**GROUPED, "num_key_value_heads": 4, "head_dim": 4},
        **EXPERTS,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "alibi": transformers.BloomConfig(
        **{**SIZES, "n_head": 4, "n_layer": 2}, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "learned positions": transformers.GPT2Config(
        **SIZES, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    ),
    "other angles in longer texts": transformers.Phi3Config(
        **GROUPED,
        original_max_position_embeddings=16,
        rope_scaling={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2, 1.4, 1.6],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    ),
    "layers without positions": transformers.SmolLM3Config(**GROUPED, no_rope_layer_interval=2),
}


def save(name: str, directory: Path) -> torch.Tensor:
    """Write a random model; returns its logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    with torch.inference_mode():
        for parameter, tensor in model.named_parameters():
            if parameter.endswith("sinks"):
                tensor.normal_()
        model.save_pretrained(directory)
        return expected_logits(name, model)


def expected_logits(name: str, model: transformers.PreTrainedModel) -> torch.Tensor:
    """Return the logits of every token, with the angles of a text that ends there."""
    if "longer texts" not in name:
        return model(IDS).logits
    return torch.cat([model(IDS[:, :end]).logits[:, -1:] for end in range(1, 25)], dim=1)


def in_pieces(directory: Path) -> list[torch.Tensor]:
    """Return the logits after each piece: a prompt in two parts, single tokens, a few more."""
    request = Request(load_dir=directory, save_dir=directory, save_format="hf")
    engine: Engine = load(open_source(request), device="cpu")
    cache = engine.cache(batch_size=2, length=IDS.shape[1])
    return [engine.next_logits(part, cache) for part in IDS.split([9, 4, *[1] * 6, 5], dim=1)]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_with_a_cache_are_those_of_transformers(name: str, tmp_path) -> None:
    expected = save(name, tmp_path)
    assert expected.std() > 0.3
    for ranks in (1, 2):
        for found in run_ranks(in_pieces, ranks, tmp_path, timeout=60):
            for logits, last in zip(found, (8, *range(12, 19), 23), strict=True):
                wanted = expected[:, last]
                torch.testing.assert_close(
                    logits, wanted, rtol=0, atol=1e-4 * float(expected.abs().max())
                )
