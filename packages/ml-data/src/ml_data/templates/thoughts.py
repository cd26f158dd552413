"""Thoughts of answers, as models that think have them in their own templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ml_data.conversation import Message


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


def think(
    thinking: Thinking | None, messages: Sequence[Message]
) -> tuple[Sequence[Message], str | None]:
    """Return the messages with the thoughts they keep, and what precedes the last answer."""
    if thinking is None:
        return messages, None
    asked = max((n for n, message in enumerate(messages) if message.role == "user"), default=0)
    kept: list[Message] = []
    thought = ""
    for number, message in enumerate(messages):
        thought = ""
        if message.role == "assistant":
            thought, content = _split(thinking, message.content)
            if thought and number > asked:
                content = thinking.start + thought + thinking.end + content
            message = dataclasses.replace(message, content=content)
        kept.append(message)
    return kept, None if thought else thinking.empty


def _split(thinking: Thinking, content: str) -> tuple[str, str]:
    """Return the thoughts in an answer, and the rest of it."""
    before, end, after = content.rpartition(thinking.end.strip())
    if not end:
        return "", content
    thought = before.rpartition(thinking.start.strip())[2]
    return thought.strip("\n"), after.lstrip("\n")
