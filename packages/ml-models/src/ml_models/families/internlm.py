"""InternLM (1): Llama with biases of all four projections of attention.

Its rotary positions have a key of their own: `rotary: {base, type}`; type `dynamic` raises the base
once a sequence is longer than `max_position_embeddings`, `origin` never does.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, number
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Choice, Custom, Fields
from ml_models.families.family import Family

_DEFAULT = {"base": 10000, "type": "dynamic"}


def _read_rotary(config: Config) -> Fields:
    given = config.get("rotary")
    section = _DEFAULT if given is None else given
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json: rotary must be an object, not {given!r}")
    must_be(section, "type", "dynamic", "origin")
    fields: Fields = {"rotary_base": number(section, "base", 10000.0)}
    if section.get("type") == "origin":
        return fields
    longest = int(number(config, "max_position_embeddings", 2048))
    return fields | {
        "rope_scaling_type": "dynamic",
        "original_max_position_embeddings": longest,
    }


def _write_rotary(arch: Architecture) -> Fields:
    kind = "dynamic" if arch.rope_scaling_type == "dynamic" else "origin"
    return {"rotary": {"base": arch.rotary_base, "type": kind}}


_SHARED = {"vocab_size": 103168, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_20B = {"bias": False, "max_position_embeddings": 4096}

INTERNLM = Family(
    name="internlm",
    model_types=("internlm",),
    architectures=("InternLMForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        Custom(_read_rotary, _write_rotary),
        Choice("bias", decoder.ATTENTION_BIASES, default=True),
        decoder.NO_BIASES,
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(  # counted from their config.json
        size("internlm-7b", 7_321_948_160, shape(32, 4096, 11008, 32), _SHARED),
        size("internlm-20b", 20_088_714_240, shape(60, 5120, 13824, 40), _SHARED, _20B),
        # Its weights were never released; with the vocabulary of the others.
        size("internlm-65b", 66_454_298_624, shape(80, 8192, 22016, 64), _SHARED),
    ),
)
