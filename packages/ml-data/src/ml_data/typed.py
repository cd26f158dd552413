"""Dataclasses read from JSON: every field has a value of its type, or the file is damaged."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union


def check_types(instance: Any) -> None:
    """Check the values of a dataclass against the types of its fields.

    Raises:
        TypeError: one does not fit; the message names it.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not _fits(value, hints[field.name]):
            raise TypeError(f"{field.name} cannot be {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:  # tuple[T, ...]
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if dataclasses.is_dataclass(value) and isinstance(value, hint):
        check_types(value)
        return True
    allowed = {int: (int,), float: (int, float)}.get(hint, (hint,))
    return type(value) in allowed  # True is no number
