"""Thoughts of answers, as models that think have them in their own templates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

from ml_data.instruction.conversation import Message
from ml_data.templates.tool_format import read_calls


class Thinking(NamedTuple):
    """What surrounds the thoughts of an answer, with its line breaks.

    As Qwen 3's own template has it: answers to earlier questions lose their thoughts, and the last
    answer, if it has none, gets empty ones. The model does not learn to write these: they are part
    of what it reads, as when one asks it not to think.
    """

    start: str
    end: str

    @property
    def empty(self) -> str:
        """Return no thoughts."""
        return self.start + self.end


class Thoughts(NamedTuple):
    """Messages and what the model thought before it said them."""

    messages: Sequence[Message]
    """Without thoughts."""
    kept: Sequence[str]
    """Of each message, the thoughts that stand before it, or nothing."""
    empty: str
    """No thoughts, before the last answer if it has none."""


def think(thinking: Thinking | None, messages: Sequence[Message]) -> Thoughts:
    """Take the thoughts out of messages.

    Raises:
        RecordError: One that calls tools cannot be read.
    """
    if thinking is None:
        return Thoughts(messages, [""] * len(messages), "")
    asked = max((n for n, message in enumerate(messages) if message.role == "user"), default=0)
    said: list[Message] = []
    kept: list[str] = []
    for number, message in enumerate(messages):
        thought, rest = _thought(thinking, message)
        kept.append(thinking.start + thought + thinking.end if thought and number > asked else "")
        said.append(dataclasses.replace(message, content=rest))
    return Thoughts(said, kept, "" if kept[-1] else thinking.empty)


def _thought(thinking: Thinking, message: Message) -> tuple[str, str]:
    """Return the thoughts in a message, and its content without them."""
    if message.role == "assistant":
        return _split(thinking, message.content)
    if message.role != "function":
        return "", message.content
    calls, text = read_calls(message.content)
    thought, rest = _split(thinking, text)
    return thought, json.dumps({"content": rest, "tool_calls": calls}, ensure_ascii=False)


def _split(thinking: Thinking, content: str) -> tuple[str, str]:
    """Return the thoughts in a text, and the rest of it."""
    before, end, after = content.rpartition(thinking.end.strip())
    if not end:
        return "", content
    thought = before.rpartition(thinking.start.strip())[2]
    return thought.strip("\n"), after.lstrip("\n")
