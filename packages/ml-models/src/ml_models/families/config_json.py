"""Reading `config.json` with checks: a value of the wrong kind is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, object]

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def value_of(config: Config, key: str, kind: type) -> Any:
    """Read a value that is there.

    Raises:
        ValueError: It is of another kind.
    """
    value = config[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"config.json: {key} must be {_KINDS[kind]}, not {value!r}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """Read a number."""
    return default if config.get(key) is None else float(value_of(config, key, float))


def must_be(config: Config, key: str, *allowed: object) -> None:
    """Refuse a key whose value means something that cannot be represented; it may be missing."""
    value = config.get(key)
    if value is not None and value not in allowed:
        valid = " or ".join(repr(item) for item in allowed) or "nothing"
        raise ValueError(f"config.json: {key} is {value!r}, only {valid} is supported")
