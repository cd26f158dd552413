"""Phi-3 and Phi-4: Llama with stacked projections, partly rotary, windows and long scaling."""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Custom, Fields, Must, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope, merged
from ml_models.families.rules import FlatQkv


def _check_scaling(config: Config) -> Fields:
    """Refuse other kinds, all of which transformers reads as `longrope` here."""
    section = merged(config)
    kind = section.get("rope_type", section.get("type"))
    must_be({"type of rotary positions": kind}, "type of rotary positions", *_SCALINGS)
    return {}


_SCALINGS = ("default", "longrope", "su")

_4K = {"vocab_size": 32064, "max_position_embeddings": 4096, "sliding_window": 2047}
_PHI4 = {"vocab_size": 100352, "max_position_embeddings": 16384, "rope_theta": 2.5e5}

PHI3 = Family(
    name="phi3",
    aliases=("phi4",),
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        Value("max_position_embeddings", "max_position_embeddings", default=4096),
        Value("rms_norm_eps", "norm_epsilon", float, default=1e-5),
        decoder.GROUPS,
        Custom(_check_scaling, lambda _arch: {}),
        Rope(default_percent=1.0),
        Value("sliding_window", "sliding_window", default=None),
        *(Must(key, 0.0) for key in ("resid_pdrop", "embd_pdrop")),
        decoder.NO_BIASES,
    ),
    rules=(
        decoder.EMBEDDING,
        FlatQkv(f"{decoder.ATTENTION}.linear_qkv", f"{decoder.HF_LAYER}.self_attn.qkv_proj"),
        decoder.ATTENTION_OUTPUT,
        *decoder.NORMS,
        *decoder.STACKED_MLP,
        *decoder.HEAD,
    ),
    sizes=(
        size("phi3-mini-4k", 3_821_079_552, shape(32, 3072, 8192, 32), _4K),
        size("phi3-medium-4k", 13_960_238_080, shape(40, 5120, 17920, 40, 10), _4K),
        size("phi4-14b", 14_659_507_200, shape(40, 5120, 17920, 40, 10), _PHI4),
    ),
)
