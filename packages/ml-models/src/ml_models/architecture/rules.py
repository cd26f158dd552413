"""What the checks of an architecture share: messages that name the flag, the value and the rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

_NEEDS = "needs"


def flag(name: str, value: object = "") -> str:
    """Write a field as the flag it is, with a value."""
    return f"--{name.replace('_', '-')} {value}".rstrip()


def at_least_one(arch: Any, names: Iterable[str]) -> None:
    """Check that sizes are positive; None is a size that is not given.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(arch, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name, value)}: must be at least 1")


def positive(arch: Any, names: Iterable[str]) -> None:
    """Check that numbers are greater than 0; None is a number that is not given.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(arch, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag(name, value)}: must be greater than 0")


def not_negative(arch: Any, names: Iterable[str]) -> None:
    """Check that numbers are at least 0; None is a number that is not given.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(arch, name)
        if value is not None and value < 0:
            raise ValueError(f"{flag(name, value)}: must be at least 0")


def one_of(arch: Any, name: str, valid: Iterable[object]) -> None:
    """Check that a value is one of those that exist.

    Raises:
        ValueError: It is not.
    """
    choices = tuple(valid)
    if getattr(arch, name) not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{flag(name, getattr(arch, name))}: valid are {listed}")


def needs(*switches: str, **values: str | tuple[str, ...]) -> dict[str, Any]:
    """Return the metadata of a field that means nothing without another.

    Args:
        switches: Fields one of which must be given.
        values: A field, and the value or values it must have.
    """
    return {_NEEDS: {**dict.fromkeys(switches), **values}}


def check_needs(arch: Any, given: Collection[str] = ()) -> None:
    """Check that nothing is given that means nothing without what is not given.

    Args:
        arch: The model.
        given: Fields that were given for sure; of others only the value can tell.

    Raises:
        ValueError: A field is given or not at its default, though those it needs are.
    """
    for field in fields(arch):
        needed, value = field.metadata.get(_NEEDS), getattr(arch, field.name)
        asked = value != field.default or (value and field.name in given)
        if needed is None or not asked:
            continue
        if not any(_is_given(getattr(arch, name), wanted) for name, wanted in needed.items()):
            names = (flag(name, _listed(wanted, " or ")) for name, wanted in needed.items())
            what = flag(field.name, _listed(value, ","))
            raise ValueError(f"{what}: means nothing without {' or '.join(names)}")


def _is_given(value: Any, wanted: Any) -> bool:
    if wanted is None:
        return bool(value)
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def _listed(value: Any, separator: str) -> str:
    if value is None or value is True:
        return ""
    return separator.join(map(str, value)) if isinstance(value, tuple) else str(value)


def per_layer(
    name: str, pattern: tuple[int, ...] | None, num_layers: int, *, first: int = 1
) -> tuple[bool, ...]:
    """Spell out a pattern of layers as Megatron writes it.

    Args:
        name: The field, for messages.
        pattern: One number n: every n-th layer is True, the others False. Several: 1 for True and
            0 for False, one for each layer. None: all are False.
        num_layers: Number of layers.
        first: Number of the first layer, as every n-th is counted.

    Raises:
        ValueError: It has the wrong length, or other numbers.
    """
    if pattern is None:
        return (False,) * num_layers
    given = flag(name, ",".join(map(str, pattern)))
    if len(pattern) == 1 and num_layers > 1:
        if pattern[0] < 1:
            raise ValueError(f"{given}: must be at least 1")
        return tuple((layer + first) % pattern[0] == 0 for layer in range(num_layers))
    if len(pattern) != num_layers or not set(pattern) <= {0, 1}:
        raise ValueError(
            f"{given}: must be one number, or 0 or 1 for each of --num-layers {num_layers}"
        )
    return tuple(map(bool, pattern))
