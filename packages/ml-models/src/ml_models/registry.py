"""Find the family of a model by name or by its `config.json`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from ml_models.architecture import Architecture
from ml_models.families.family import Family
from ml_models.families.llama import LLAMA

_FAMILIES = (LLAMA,)


def names() -> tuple[str, ...]:
    """List the families by name."""
    return tuple(family.name for family in _FAMILIES)


def family(name: str) -> Family:
    """Find a family by its name or one of its aliases.

    Raises:
        ValueError: No family has this name; the message lists those that exist.
    """
    known = {alias: found for found in _FAMILIES for alias in (found.name, *found.aliases)}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"model family {name!r} is unknown (known: {', '.join(known)}){hint}")


def family_of(arch: Architecture) -> Family | None:
    """Find the first family that can represent a model; None if there is none."""
    return next((found for found in _FAMILIES if found.represents(arch)), None)


def family_for(config: Mapping[str, object]) -> Family:
    """Find the family of a Hugging Face config.json, by `model_type`, else by `architectures`.

    Raises:
        ValueError: No family reads such a model.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    listed = architectures if isinstance(architectures, (list, tuple)) else ()
    for found in _FAMILIES:
        if model_type in found.model_types:
            return found
        if model_type is None and any(name in found.architectures for name in listed):
            return found
    known = ", ".join(model_type for found in _FAMILIES for model_type in found.model_types)
    raise ValueError(
        f"config.json: model_type {model_type!r} (architectures {list(listed)}) belongs to no "
        f"known family (known model types: {known})"
    )
