"""OpenAI's chat format: messages of system, user, assistant and tool, with calls of tools.

As in their fine-tuning API: `weight` 0 keeps an answer out of the loss, content is text or a list
of text parts, `tools` (or the older `functions`) stands beside `messages`. `reasoning_content`
becomes `<think>...</think>` before the answer, as reasoning models write it. What several tools
answer in a row is one message that has each of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from ml_data.handlers.columns import Columns, Tags, text
from ml_data.handlers.tools import call_text, tool_list
from ml_data.instruction.conversation import Conversation, Message, Preference, RecordError, Role
from ml_data.reading.record import shown

_PAIR = ("chosen", "rejected")


def conversation(record: Mapping[str, Any], columns: Columns) -> list[Conversation]:
    """Return the conversation a record holds."""
    found = _read(record, columns.value(record, "messages", required=True), columns)
    if not found.answered:
        raise RecordError(f"message {len(found.messages)}, the last, is not answered")
    return [found]


def preference(record: Mapping[str, Any], columns: Columns) -> list[Preference]:
    """Return the preference a record holds.

    `chosen` and `rejected` are messages that answer `messages`, or, as in TRL, lists of messages:
    whole conversations that differ in the last one.
    """
    chosen, rejected = (columns.value(record, name, required=True) for name in _PAIR)
    asked: Any = []
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        asked = chosen[:-1]
        if asked != rejected[:-1]:
            raise RecordError("chosen and rejected differ before their last message")
        chosen, rejected = chosen[-1], rejected[-1]
    asked = asked or columns.value(record, "messages", required=True)
    better, worse = (
        _message(answer, columns.tags, name)
        for answer, name in zip((chosen, rejected), _PAIR, strict=True)
    )
    return [Preference(_read(record, asked, columns), better, worse)]


def _read(record: Mapping[str, Any], messages: Any, columns: Columns) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(entry, dict) for entry in messages):
        raise RecordError(f"{columns.messages!r} is not a list of messages but {shown(messages)}")
    system, tags, first = columns.text(record, "system"), columns.tags, 1
    if messages and messages[0].get(tags.role_tag) in (tags.system_tag, "developer"):
        system = _text(messages[0], tags, "message 1")
        first, messages = 2, messages[1:]
    numbered = enumerate(messages, first)
    said = [_message(entry, tags, f"message {number}") for number, entry in numbered]
    tools = columns.value(record, "tools") or record.get("functions")
    return Conversation(tuple(_joined(said)), system or None, tool_list(tools))


def _joined(messages: list[Message]) -> Iterator[Message]:
    """Join what several tools answered to one message of several calls."""
    for role, run in groupby(messages, key=lambda message: message.role):
        same = list(run)
        if role == "observation" and len(same) > 1:
            answers = tuple(message.content for message in same)
            yield Message(role, "\n".join(answers), answers=answers)
        else:
            yield from same


def _message(message: Any, tags: Tags, what: str) -> Message:
    if not isinstance(message, dict):
        raise RecordError(f"{what} is not a message but {shown(message)}")
    role = _role(message, tags, what)
    learned, content = _learned(message, what), _text(message, tags, what)
    reasoning = text(message.get("reasoning_content") or "", f"the reasoning_content of {what}")
    calls = _calls(message, what)
    if reasoning:
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"
    if role != "assistant" or not calls:
        return Message(role, content, learned)
    return Message("function", call_text(calls, content), learned)


def _role(message: Mapping[str, Any], tags: Tags, what: str) -> Role:
    roles: dict[Any, Role] = {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        "function": "observation",
    }
    given = message.get(tags.role_tag)
    if not isinstance(given, str) or given not in roles:
        known = ", ".join(map(repr, roles))
        raise RecordError(f"{what} is of {shown(given)}, must be of {known}")
    return roles[given]


def _calls(message: Mapping[str, Any], what: str) -> list[Any]:
    calls, older = message.get("tool_calls") or [], message.get("function_call")
    if not isinstance(calls, list):
        raise RecordError(f"the tool_calls of {what} are not a list but {shown(calls)}")
    return calls or ([older] if older else [])


def _learned(message: Mapping[str, Any], what: str) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise RecordError(f"the weight of {what} is {shown(weight)}, must be 0 or 1")
    return weight != 0


def _text(message: Mapping[str, Any], tags: Tags, what: str) -> str:
    content = message.get(tags.content_tag)
    if content is None:
        return ""
    if not isinstance(content, list):
        return text(content, f"the {tags.content_tag} of {what}")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RecordError(f"{what} has a part that is not text: {shown(part)}")
        parts.append(text(part.get("text"), f"a part of {what}"))
    return "".join(parts)
