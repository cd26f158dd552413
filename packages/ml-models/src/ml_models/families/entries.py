"""Entries of a `config.json`, each of which knows both directions.

`read` takes from a config.json what it says about the model, as fields of `Architecture`; `write`
says it again. A family lists its entries, so what it can read it can write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config, must_be, value_of

Fields = dict[str, object]


class Entry(Protocol):
    """One thing that a config.json says."""

    def read(self, config: Config) -> Fields:
        """Translate it to fields of `Architecture`.

        Raises:
            ValueError: It is missing, of the wrong kind, or cannot be represented.
        """

    def write(self, arch: Architecture) -> Fields:
        """Translate it to keys of a config.json."""


_REQUIRED = object()


@dataclass(frozen=True)
class Value:
    """A value that both sides store alike."""

    key: str
    field: str
    kind: type[int] | type[float] | type[bool] | type[str] = int
    default: object = _REQUIRED
    """What a missing key means; None: the default of `Architecture`."""
    also: tuple[str, ...] = ()
    """Other names of the key, which are read."""
    factor: float = 1
    """The key is so many times the field."""

    def read(self, config: Config) -> Fields:
        """Take the first of the names that is there."""
        present = [key for key in (self.key, *self.also) if config.get(key) is not None]
        if present:
            value = value_of(config, present[0], self.kind)
            return {self.field: value if self.factor == 1 else self.kind(value / self.factor)}
        if self.default is _REQUIRED:
            raise ValueError(f"config.json: {self.key} is missing")
        return {} if self.default is None else {self.field: self.default}

    def write(self, arch: Architecture) -> Fields:
        """Write the value; None is left out."""
        value = getattr(arch, self.field)
        if value is None:
            return {}
        return {self.key: value if self.factor == 1 else self.kind(value * self.factor)}


@dataclass(frozen=True)
class Not:
    """A switch that config.json stores the other way round."""

    key: str
    field: str
    default: bool
    """What a missing key means, as a value of the key."""

    def read(self, config: Config) -> Fields:
        """Negate the key."""
        value = config.get(self.key)
        given = self.default if value is None else value_of(config, self.key, bool)
        return {self.field: not given}

    def write(self, arch: Architecture) -> Fields:
        """Negate the field."""
        return {self.key: not getattr(arch, self.field)}


class Always:
    """What is true of every model of the family, and config.json does not say."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def read(self, config: Config) -> Fields:  # noqa: ARG002
        """Return the fields."""
        return dict(self.fields)

    def write(self, arch: Architecture) -> Fields:  # noqa: ARG002
        """Write nothing."""
        return {}


class Must:
    """A key that can only have certain values; the first is written, any may be missing."""

    def __init__(self, key: str, *allowed: object, written: bool = True) -> None:
        self.key = key
        self.allowed = allowed
        self.written = written

    def read(self, config: Config) -> Fields:
        """Check the value."""
        must_be(config, self.key, *self.allowed)
        return {}

    def write(self, arch: Architecture) -> Fields:  # noqa: ARG002
        """Write the first of the values."""
        return {self.key: self.allowed[0]} if self.written and self.allowed else {}


@dataclass(frozen=True)
class Choice:
    """A key each of whose values stands for certain fields."""

    key: str
    meanings: dict[object, Fields]
    """Fields by value; the first value whose fields fit is written."""
    default: object
    """What a missing key means."""

    def read(self, config: Config) -> Fields:
        """Look up the value."""
        must_be(config, self.key, *self.meanings)
        value = config.get(self.key)
        return dict(self.meanings[self.default if value is None else value])

    def write(self, arch: Architecture) -> Fields:
        """Find the value whose fields are those of the model."""
        for value, fields in self.meanings.items():
            if all(getattr(arch, name) == wanted for name, wanted in fields.items()):
                return {self.key: value}
        return {self.key: self.default}


@dataclass(frozen=True)
class Custom:
    """Something else, as two functions."""

    read: Callable[[Config], Fields]
    write: Callable[[Architecture], Fields]
