"""Rotary positions in a `config.json`, in the spellings of transformers 4 and 5.

transformers 4 keeps `rope_theta` and `partial_rotary_factor` at the top level with an optional
`rope_scaling`; transformers 5 keeps all in `rope_parameters`, one for each kind of layer where they
differ. Files of either kind are read, and both spellings are written: an older reader that finds
only the new one would silently take a base of 10000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config, must_be, number, value_of
from ml_models.families.entries import Fields

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"
_WITH_ORIGINAL = ("dynamic", "llama3", "yarn", "longrope")
# Key of a section, field of an architecture, for each type of scaling.
_NUMBERS = {
    "linear": {"factor": "rope_scaling_factor"},
    "dynamic": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "beta_fast": "rope_scaling_beta_fast",
        "beta_slow": "rope_scaling_beta_slow",
        "attention_factor": "rope_scaling_attention_factor",
    },
    "longrope": {
        "factor": "rope_scaling_factor",
        "attention_factor": "rope_scaling_attention_factor",
    },
}


@dataclass(frozen=True)
class Rope:
    """Base, share of the channels, and scaling of rotary positions."""

    default_base: float | None = 10000.0
    """What a missing base means; None: it must be there."""
    default_percent: float | None = None
    """What a missing share of channels means; None: all turn, whatever transformers finds there."""
    latent: bool = False
    """The share of channels is that of latent attention, and is not written."""

    def read(self, config: Config) -> Fields:
        """Read both spellings; they must agree."""
        return self.read_section(config, merged(config))

    def read_section(self, config: Config, section: Mapping[str, Any]) -> Fields:
        """Read one set of rotary positions of a model."""
        fields: Fields = {"rotary_base": self._base(section)}
        if not self.latent:
            fields["rotary_percent"] = self._percent(section)
        kind = section.get("rope_type", section.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        if kind not in _TYPES:
            raise ValueError(
                f"config.json: rotary positions of type {kind!r} are not supported "
                f"(supported: {', '.join(_TYPES)})"
            )
        return fields if kind == "default" else fields | _read_scaling(kind, config, section)

    def write(self, arch: Architecture) -> Fields:
        """Write both spellings."""
        if arch.position_embedding_type != "rope":
            return {}
        section = self.section(arch)
        fields: Fields = {"rope_theta": arch.rotary_base, "rope_parameters": section}
        if "partial_rotary_factor" in section:
            fields["partial_rotary_factor"] = section["partial_rotary_factor"]
        if section["rope_type"] != "default":
            old = {key: value for key, value in section.items() if key != "rope_theta"}
            fields["rope_scaling"] = old | {"type": section["rope_type"]}
        if arch.rope_scaling_type == "longrope":  # where Phi-3 keeps it
            fields[_ORIGINAL] = arch.original_max_position_embeddings
        return fields

    def section(self, arch: Architecture) -> dict[str, Any]:
        """Write the rotary positions of a model as one object."""
        kind = arch.rope_scaling_type or "default"
        section: dict[str, Any] = {"rope_type": kind, "rope_theta": arch.rotary_base}
        if self.default_percent not in (None, arch.rotary_percent):
            section["partial_rotary_factor"] = arch.rotary_percent
        for key, field in _NUMBERS.get(kind, {}).items():
            if getattr(arch, field) is not None:
                section[key] = getattr(arch, field)
        if kind in _WITH_ORIGINAL and kind != "dynamic":
            section[_ORIGINAL] = arch.original_max_position_embeddings
        if kind == "yarn":
            section |= _yarn_section(arch)
        if kind == "longrope":
            section["short_factor"] = list(arch.rope_scaling_short_factors or ())
            section["long_factor"] = list(arch.rope_scaling_long_factors or ())
        return section

    def _percent(self, section: Mapping[str, Any]) -> float:
        """Read the share of channels; most classes of transformers turn all without looking."""
        if self.default_percent is None:
            must_be(section, "partial_rotary_factor", 1.0)
            return 1.0
        return number(section, "partial_rotary_factor", self.default_percent)

    def _base(self, section: Mapping[str, Any]) -> float:
        if section.get("rope_theta") is None and self.default_base is None:
            raise ValueError("config.json: rope_theta is missing")
        return number(section, "rope_theta", self.default_base or 0.0)


def merged(config: Config) -> dict[str, Any]:
    """Collect what the top level, `rope_scaling` and `rope_parameters` say of rotary positions.

    Raises:
        ValueError: They contradict each other.
    """
    found: dict[str, Any] = {}
    top = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor", _ORIGINAL)}
    for where, section in (
        ("the top level", top),
        ("rope_scaling", config.get("rope_scaling")),
        ("rope_parameters", config.get("rope_parameters")),
    ):
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"config.json: {where} must be an object, not {section!r}")
        for key, value in section.items():
            if value is not None and found.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json: {key} is given as both {found[key]} and {value} ({where})"
                )
    return found


def _read_scaling(kind: str, config: Config, section: Mapping[str, Any]) -> Fields:
    fields: Fields = {"rope_scaling_type": kind}
    for key, field in _NUMBERS[kind].items():
        if section.get(key) is not None:
            fields[field] = number(section, key, 0.0)
    if kind in _WITH_ORIGINAL:
        longest = config.get("max_position_embeddings")
        if kind == "dynamic":  # transformers knows no other length for it
            must_be(section, _ORIGINAL, longest)
        original = section if section.get(_ORIGINAL) is not None else {_ORIGINAL: longest}
        fields[_ORIGINAL] = int(value_of(original, _ORIGINAL, float))
        if "rope_scaling_factor" not in fields and isinstance(longest, int):
            fields["rope_scaling_factor"] = longest / fields[_ORIGINAL]  # type: ignore[operator]
    if "rope_scaling_factor" not in fields:
        raise ValueError(f"config.json: rotary positions of type {kind!r} need factor")
    if kind == "yarn":
        fields |= _read_yarn(section)
    if kind == "longrope":
        for key in ("short", "long"):
            fields[f"rope_scaling_{key}_factors"] = _numbers(section, f"{key}_factor")
    must_be(section, "finetuned", True, False)
    return fields


def _read_yarn(section: Mapping[str, Any]) -> Fields:
    """`mscale` counts only together with `mscale_all_dim`, as in transformers."""
    truncate = section.get("truncate")
    fields: Fields = {"rope_scaling_truncate": truncate is None or bool(truncate)}
    mscale, all_dim = section.get("mscale"), section.get("mscale_all_dim")
    if mscale and all_dim:
        fields["rope_scaling_mscale"] = float(mscale)
        fields["rope_scaling_mscale_all_dim"] = float(all_dim)
    return fields


def _yarn_section(arch: Architecture) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if not arch.rope_scaling_truncate:
        section["truncate"] = False
    if arch.rope_scaling_mscale_all_dim:
        section["mscale"] = arch.rope_scaling_mscale
        section["mscale_all_dim"] = arch.rope_scaling_mscale_all_dim
    return section


def _numbers(section: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = section.get(key)
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    ):
        raise ValueError(f"config.json: {key} must be a list of numbers, not {values!r}")
    return tuple(map(float, values))
