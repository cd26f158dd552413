"""Gemma 3, text only: five layers with a window and a rotary base of their own, then one without.

Rotary positions of the layers without a window may be stretched. Files of transformers 4 keep them
in `rope_theta` and `rope_scaling`, and those of layers with a window in `rope_local_base_freq`;
transformers 5 keeps one object for each kind of layer in `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, number
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Value
from ml_models.families.family import Family
from ml_models.families.gemma import COMMON
from ml_models.families.gemma2 import ACTIVATION, RULES, SCALE
from ml_models.families.rope import Rope, merged
from ml_models.families.windows import Windows

_ROPE = Rope(default_base=1_000_000.0)
_FULL, _LOCAL, _OLD_LOCAL = "full_attention", "sliding_attention", "rope_local_base_freq"


def _read_rope(config: Config) -> Fields:
    """Read both spellings; they must agree."""
    nested = config.get("rope_parameters")
    sections = nested if isinstance(nested, Mapping) else {}
    full = {**config, "rope_parameters": sections.get(_FULL)}
    local = merged({"rope_theta": config.get(_OLD_LOCAL), "rope_parameters": sections.get(_LOCAL)})
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json: rotary positions of {_LOCAL} have rope_type {local['rope_type']!r}, "
            "only 'default' is supported"
        )
    fields = _ROPE.read_section(config, merged(full))
    return fields | {"rotary_base_local": number(local, "rope_theta", 10_000.0)}


def _write_rope(arch: Architecture) -> Fields:
    local, fields = arch.rotary_base_local, _ROPE.write(arch)
    if not fields:
        return {}
    full = fields["rope_parameters"]
    if "rope_scaling" in fields:  # every transformers that has Gemma 3 knows `rope_type`
        fields["rope_scaling"] = full
    fields["rope_parameters"] = {
        _FULL: full,
        _LOCAL: {"rope_type": "default", "rope_theta": local},
    }
    return fields | {_OLD_LOCAL: local}


_CONFIG: tuple[Entry, ...] = (
    *COMMON,
    Value("num_key_value_heads", "num_query_groups", default=4),
    Value("max_position_embeddings", "max_position_embeddings", default=131072),
    Custom(_read_rope, _write_rope),
    Windows(4096, every=6, every_key="sliding_window_pattern"),
    SCALE,
    Must("attn_logit_softcapping", written=False),  # transformers has the key, and ignores it
    Value("final_logit_softcapping", "final_logit_softcapping", float, default=None),
    ACTIVATION,
    Always(post_norm=True, qk_layernorm=True),
)

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    config=_CONFIG,
    rules=(*RULES, *decoder.QK_NORMS),
    ignored=decoder.NO_FREQUENCIES,
    sizes=(  # https://huggingface.co/google/gemma-3-1b-pt
        decoder.size(
            "gemma3-1b",
            999_885_952,
            decoder.shape(26, 1152, 6912, 4, 1),
            vocab_size=262144,
            max_position_embeddings=32768,
            sliding_window=512,
        ),
    ),
)
