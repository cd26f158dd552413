"""SmolLM3: Llama where every fourth layer does without positions."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, value_of
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Custom, Fields, Must, Not, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope

_EVERY = "no_rope_layer_interval"


def _read_layers(config: Config) -> Fields:
    """`no_rope_layers` has a 1 for each layer *with* positions, against its name."""
    listed = config.get("no_rope_layers")
    if listed is None:
        return {"no_rope_freq": (value_of({_EVERY: 4, **config}, _EVERY, int),)}
    if not isinstance(listed, (list, tuple)) or not set(listed) <= {0, 1}:
        raise ValueError(f"config.json: no_rope_layers must be a list of 0 and 1, not {listed!r}")
    return {"no_rope_freq": tuple(int(not turned) for turned in listed)}


def _write_layers(arch: Architecture) -> Fields:
    turned = [int(turns) for turns in arch.layers_with_rope]
    every = arch.no_rope_freq if len(arch.no_rope_freq or ()) == 1 else None
    written: Fields = {_EVERY: every[0]} if every else {}
    return written | {"no_rope_layers": turned, "layer_types": ["full_attention"] * len(turned)}


_3B = {
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "no_rope_layer_interval": 4,
}

SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    architectures=("SmolLM3ForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        Value("max_position_embeddings", "max_position_embeddings", default=32768),
        Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
        Value("num_key_value_heads", "num_query_groups", default=4),
        Rope(default_base=2e6),
        Custom(_read_layers, _write_layers),
        decoder.BIASES,
        Must("use_sliding_window", False),
    ),
    rules=decoder.LLAMA_RULES,
    sizes=(
        # Tied: the embedding counts once.
        size("smollm3-3b", 3_075_098_624, shape(36, 2048, 11008, 16, 4), _3B),
    ),
)
