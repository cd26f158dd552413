"""Aquila and Aquila 2: Llama's architecture and names under a model type of their own.

Their config.json names a class of the model's repository (`AquilaForCausalLM`). An Aquila whose
config.json says `llama` is read as one.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import shape, size
from ml_models.families.family import Family
from ml_models.families.rope import Rope

_SHORT = {"vocab_size": 100008, "max_position_embeddings": 2048}
_7B = shape(32, 4096, 11008, 32)
_34B = shape(60, 6144, 24576, 48, 8)
_LONG = {"vocab_size": 100008, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

AQUILA = Family(
    name="aquila",
    aliases=("aquila2",),
    model_types=("aquila",),
    architectures=("AquilaForCausalLM", "AquilaModel"),
    config=(*decoder.LLAMA_LIKE, decoder.GROUPS, Rope(), decoder.NO_BIASES),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(
        size("aquila-7b", 7_295_537_152, _7B, _SHORT, rms_norm_eps=1e-6),
        size("aquila2-7b", 7_295_537_152, _7B, _SHORT, rms_norm_eps=1e-5),
        size("aquila2-34b", 33_693_554_688, _34B, _LONG),  # counted from its config.json
    ),
)
