"""Hints: what the type of a field means for the words after its flag.

The table of types is in `ml_models.flags`.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ml_models.commands import did_you_mean

_UNIONS = (typing.Union, types.UnionType)


class Text(str):
    """Text in which a comma is a character like any other: in a tuple, each word is one text."""

    __slots__ = ()


def convert(hint: Any, given: str | Sequence[str]) -> Any:
    """Convert the word (for a tuple: the words) after a flag to `hint`.

    A stray comma between names gives no name: `Path("")` would be the working directory. Between
    numbers it is an error. One empty word is the empty tuple, as config files have it.

    Raises:
        ValueError: with what was given and what is valid.
    """
    if typing.get_origin(hint) is not tuple:
        return _scalar(hint, typing.cast("str", given))
    item = typing.get_args(hint)[0]
    if item is Text:
        return tuple(map(Text, given))
    names = item in (str, Path)
    separator = r"\s*,\s*" if names else r"\s*,\s*|\s+"
    parts = [part for text in given if text for part in re.split(separator, text.strip())]
    if names and parts and not any(parts):
        raise ValueError(f"{' '.join(given)!r} has nothing between its commas")
    return tuple(_scalar(item, part) for part in parts if part or not names)


def without_none(hint: Any) -> Any:
    """Return T for `T | None`: None is what no flag means, so no word stands for it."""
    if typing.get_origin(hint) not in _UNIONS:
        return hint
    return typing.Union[tuple(t for t in typing.get_args(hint) if t is not types.NoneType)]  # noqa: UP007


def metavar(hint: Any) -> str:
    """Return what `--help` shows after the flag.

    Raises:
        TypeError: no flag can have this type.
    """
    arguments = typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint][2]
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if typing.get_origin(hint) in _UNIONS:
        return "|".join(map(metavar, arguments))
    if typing.get_origin(hint) is tuple and arguments[1:] == (...,):
        return metavar(arguments[0])
    raise TypeError(f"no flag can be a {hint}")


def show(value: Any) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scalar(hint: Any, text: str) -> Any:
    if hint in _SCALARS:
        read, noun, _ = _SCALARS[hint]
        try:
            return read(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {noun}") from None
    if typing.get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if text in choices:
            return choices[text]
        known = ", ".join(choices)
        raise ValueError(f"{text!r} is not one of {known}{did_you_mean(text, choices)}")
    return _first(typing.get_args(hint), text)


def _first(members: Sequence[Any], text: str) -> Any:
    """Convert `text` to the first member of a union that takes it."""
    refusals = []
    for member in members:
        try:
            return _scalar(member, text)
        except ValueError as error:
            refusals.append(str(error))
    raise ValueError(" and ".join(refusals))


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):  # no rule refuses it later: every comparison with it is false
        raise ValueError
    return value


def _path(text: str) -> Path:
    if not text:  # Path("") is the working directory
        raise ValueError
    return Path(text).expanduser()


_SCALARS: dict[Any, tuple[Any, str, str]] = {
    int: (int, "an integer", "INT"),
    float: (_number, "a number", "FLOAT"),
    str: (str, "text", "TEXT"),
    Text: (Text, "text", "TEXT"),
    Path: (_path, "a path", "PATH"),
}
