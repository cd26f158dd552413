"""Reading `config.json` with checks: a value of the wrong kind, or a meaning we lack, is an error.

transformers 4 keeps `rope_theta` at the top level with an optional `rope_scaling`; transformers 5
keeps both in `rope_parameters`. Files of either kind are read, and both spellings are written.
"""

from __future__ import annotations

from collections.abc import Mapping

Config = Mapping[str, object]


def integer(config: Config, key: str) -> int:
    """Read a whole number that must be there."""
    value = optional_integer(config, key)
    if value is None:
        raise ValueError(f"config.json: {key} is missing")
    return value


def optional_integer(config: Config, key: str) -> int | None:
    """Read a whole number that may be missing or null."""
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"config.json: {key} must be a whole number, not {value!r}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """Read a number."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def switch(config: Config, key: str, default: bool) -> bool:
    """Read true or false."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, not {value!r}")
    return value


def must_be(config: Config, key: str, *allowed: object) -> None:
    """Refuse a key whose value means something that cannot be represented; it may be missing."""
    value = config.get(key)
    if value is not None and value not in allowed:
        valid = " or ".join(repr(item) for item in allowed) or "nothing"
        raise ValueError(f"config.json: {key} is {value!r}, only {valid} is supported")


def rope_base(config: Config, default: float) -> float:
    """Read the base of the rotary frequencies in either spelling; refuses scaled frequencies."""
    bases = set()
    if config.get("rope_theta") is not None:
        bases.add(number(config, "rope_theta", default))
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"config.json: {key} must be an object, not {section!r}")
        _refuse_scaling(key, section)
        if section.get("rope_theta") is not None:
            bases.add(number(section, "rope_theta", default))
    if len(bases) > 1:
        raise ValueError(f"config.json: rope_theta is given as both {min(bases)} and {max(bases)}")
    return bases.pop() if bases else default


def rope_fields(base: float) -> dict[str, object]:
    """Write unscaled rotary positions for transformers 4 and 5."""
    parameters = {"rope_type": "default", "rope_theta": base}
    return {"rope_theta": base, "rope_parameters": parameters}


def _refuse_scaling(key: str, section: Mapping[str, object]) -> None:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json: {key} asks for rotary positions of type {kind!r}, only 'default' "
            "(unscaled) is supported"
        )
    must_be(section, "partial_rotary_factor", 1, 1.0)
