"""ShareGPT: a list of messages, each with a role and a content under keys that tags name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_data.handlers.columns import Columns, Tags, keys_of, text
from ml_data.handlers.tools import call_text, tool_list
from ml_data.instruction.conversation import Conversation, Message, Preference, RecordError, Role
from ml_data.reading.record import shown


def conversation(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the conversation a record holds."""
    found = read(record, columns)
    if not found.answered:
        raise RecordError(f"message {len(found.messages)}, the last, is not answered")
    return [found]


def preference(record: Mapping[str, Any], columns: Columns) -> list[Preference]:
    """Return the preference a record holds."""
    answers = [
        _answer(columns.value(record, field, required=True), columns, field)
        for field in ("chosen", "rejected")
    ]
    return [Preference(read(record, columns), *answers)]


def read(record: Mapping[str, Any], columns: Columns) -> Conversation:
    """Return the messages of a record, answered or not; a first message of the system is taken."""
    messages = columns.value(record, "messages", required=True)
    if not isinstance(messages, list) or not all(isinstance(entry, dict) for entry in messages):
        raise RecordError(f"{columns.messages!r} is not a list of messages but {shown(messages)}")
    tags = columns.tags
    system, first = columns.text(record, "system"), 1
    if messages and messages[0].get(tags.role_tag) == tags.system_tag:
        system = _content(messages[0], tags, "message 1")
        first, messages = 2, messages[1:]
    tools = tool_list(columns.value(record, "tools"))
    return Conversation(tuple(_messages(messages, tags, first)), system or None, tools)


def _messages(messages: list[dict[str, Any]], tags: Tags, first: int) -> Iterator[Message]:
    for number, message in enumerate(messages, first):
        what = f"message {number}"
        role = _role(message, tags, what)
        yield Message(role, _said(message, role, tags, what))


def _answer(message: Any, columns: Columns, field: str) -> Message:
    column = getattr(columns, field)
    if not isinstance(message, dict):
        raise RecordError(f"{column!r} is not a message but {shown(message)}")
    role = _role(message, columns.tags, repr(column))
    return Message(role, _said(message, role, columns.tags, repr(column)))


def _role(message: Mapping[str, Any], tags: Tags, what: str) -> Role:
    roles: dict[Any, Role] = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
    }
    if tags.role_tag not in message:
        raise RecordError(f"{what} has no {tags.role_tag!r}; its keys are {keys_of(message)}")
    name = message[tags.role_tag]
    if not isinstance(name, str) or name not in roles:
        known = ", ".join(map(repr, roles))
        raise RecordError(f"{what} is of {shown(name)}, must be of {known}")
    return roles[name]


def _said(message: Mapping[str, Any], role: Role, tags: Tags, what: str) -> str:
    content = _content(message, tags, what)
    if role != "function":
        return content
    return call_text(_calls(content, what))


def _calls(content: str, what: str) -> list[Any]:
    """Return the calls of a message that holds one or a list of them in JSON.

    Raises:
        RecordError: it does not.
    """
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what} calls a tool, but is not JSON: {shown(content)}") from error
    return calls if isinstance(calls, list) else [calls]


def _content(message: Mapping[str, Any], tags: Tags, what: str) -> str:
    if tags.content_tag not in message:
        raise RecordError(f"{what} has no {tags.content_tag!r}; its keys are {keys_of(message)}")
    return text(message[tags.content_tag], f"the {tags.content_tag!r} of {what}")
