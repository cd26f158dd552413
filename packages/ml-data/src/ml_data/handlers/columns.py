"""Which column of a record holds what, and which words name the roles.

The names are LLaMA-Factory's and ModelLink's: those of `--map-keys` and of `dataset_info.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_data.instruction.conversation import RecordError
from ml_data.reading.record import shown
from ml_models.commands import did_you_mean
from ml_models.flags import UsageError


@dataclass(frozen=True, kw_only=True)
class Tags:
    """How a message of a list of messages is written."""

    role_tag: str = "from"
    """Key of who speaks."""
    content_tag: str = "value"
    """Key of what is said."""
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    """What a tool answered."""
    function_tag: str = "function_call"
    """The model calls a tool."""
    system_tag: str = "system"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; None for one that is not there."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    """What follows the prompt on a new line."""
    response: str | None = "output"
    history: str | None = "history"
    """Earlier turns: a list of [question, answer]."""
    messages: str | None = "conversations"
    system: str | None = "system"
    tools: str | None = "tools"
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    tags: Tags = Tags()
    mapped: frozenset[str] = frozenset()
    """Fields that the user named: some record must have these columns."""
    named_by: str = "--map-keys"
    """What names them, for messages."""

    @property
    def named(self) -> frozenset[str]:
        """Names of the columns that the user named."""
        names = (getattr(self, field) for field in self.mapped)
        return frozenset(name for name in names if name is not None)

    def text(self, record: Mapping[str, Any], field: str, *, required: bool = False) -> str:
        """Return the text in the column of `field`; "" if it is null, or optional and not there.

        Raises:
            RecordError: it is not text, or not there.
        """
        value = self.value(record, field, required=required)
        if value is None:
            return ""
        return text(value, f"the value of {getattr(self, field)!r}")

    def value(self, record: Mapping[str, Any], field: str, *, required: bool = False) -> Any:
        """Return what is in the column of `field`; None if it is optional and not there.

        Raises:
            RecordError: it is not there.
        """
        column: str | None = getattr(self, field)
        if column is None:
            if required:
                raise RecordError(f"no column is named for {field}")
            return None
        if column not in record and required:
            there = f"the columns are {keys_of(record)}"
            raise RecordError(f"no column {column!r}; {there}; choose with {self.named_by}")
        value = record.get(column)
        if value is None and required:
            raise RecordError(f"the value of {column!r} is null")
        return value


def text(value: Any, what: str) -> str:
    """Return `value`, which must be text.

    Raises:
        RecordError: it is not.
    """
    if not isinstance(value, str):
        raise RecordError(f"{what} is not text but {shown(value)}")
    return value


def keys_of(record: Mapping[str, Any]) -> str:
    """Return the keys of a record or a message, for messages to people."""
    return ", ".join(map(repr, record)) or "none"


def map_keys(columns: Columns, mapping: Mapping[str, Any], fields: tuple[str, ...]) -> Columns:
    """Return `columns` with the names that `--map-keys` gives, of those in `fields`.

    An empty name stands for a column that is not there.

    Raises:
        UsageError: it names something else, or a name is not text.
    """
    where = "--map-keys"
    for key in mapping:
        if key not in fields:
            known = ", ".join(fields)
            near = did_you_mean(key, fields)
            raise UsageError(f"{where}: no key {key!r}; this handler has {known}{near}")
    given = {key: name for key, name in mapping.items() if key != "tags"}
    _check_names(where, given)
    names: dict[str, Any] = {key: name or None for key, name in given.items()}
    tags = map_tags(columns.tags, mapping.get("tags", {}), where)
    return dataclasses.replace(columns, **names, tags=tags, mapped=frozenset(names))


def map_tags(tags: Tags, mapping: Any, where: str) -> Tags:
    """Return `tags` with the names that `mapping` gives.

    Raises:
        UsageError: it is not an object, or names something else.
    """
    if not isinstance(mapping, dict):
        raise UsageError(f"{where}: tags must be an object, not {shown(mapping)}")
    names = [field.name for field in dataclasses.fields(Tags)]
    for key in mapping:
        if key not in names:
            raise UsageError(f"{where}: no tag {key!r}{did_you_mean(key, names)}")
    _check_names(where, mapping)
    return dataclasses.replace(tags, **mapping)


def _check_names(where: str, names: Mapping[str, Any]) -> None:
    for key, name in names.items():
        if not isinstance(name, str):
            raise UsageError(f"{where}: {key} must be a name, not {shown(name)}")
