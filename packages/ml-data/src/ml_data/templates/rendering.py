"""Conversations to text with a template: what is tokenized, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.templates.template import Items, Place, Special, Template, Text, Token
from ml_data.templates.thoughts import think
from ml_data.templates.tool_format import ToolFormat

Piece = str | Token | Special


def render(template: Template, conversation: Conversation) -> list[list[Piece]]:
    """Return the pieces of each message, with what stands before it.

    Raises:
        RecordError: The template has no form for what is in the conversation.
    """
    messages, thoughts, no_thoughts = think(template.thinking, conversation.messages)
    if template.trim:
        messages = [_trimmed(message) for message in messages]
    opening = _Opening(template, conversation)
    pieces: list[list[Piece]] = []
    for number, message in enumerate(messages):
        if number % 2:
            pieces.append(_answer(template, message, thoughts[number]))
        else:
            before = fill(template.separator) if number else opening.pieces()
            pieces.append([*before, *opening.question(message, number)])
    if no_thoughts:
        pieces[-2].append(no_thoughts)
    return pieces


def fill(items: Items, values: Mapping[str, str] = {}) -> list[Piece]:
    """Return the pieces of a part of a template, with `values` in it."""
    pieces = [item.render(values) if isinstance(item, Text) else item for item in items]
    return [piece for piece in pieces if piece != ""]


class _Opening:
    """The system text and the descriptions of tools, wherever a template has them."""

    def __init__(self, template: Template, conversation: Conversation) -> None:
        self.template = template
        self.tools = ""
        if conversation.tools is not None:
            self.tools = _tool_format(template, "tools").describe(conversation.tools)
        self.system = conversation.system or template.default_system
        if template.trim:
            self.system = self.system.strip()
        asked = [n for n, message in enumerate(conversation.messages) if message.role == "user"]
        self.numbers: dict[Place, int] = {
            "front": -1,
            "first_question": 0,
            "last_question": max(asked, default=0),
        }

    def pieces(self) -> list[Piece]:
        """Return what comes before the first question."""
        template = self.template
        pieces = fill(template.prefix)
        if template.tools_in == "front" and template.tools and self.tools:
            pieces += fill(template.tools, {"content": self.tools})
        if template.system_in == "front":
            pieces += self._system()
        return pieces

    def question(self, message: Message, number: int) -> list[Piece]:
        """Return a question, with the system text and the tools that belong into it."""
        template = self.template
        content, before = template.observation_separator.join(message.observed), []
        if number == self.numbers[template.system_in]:
            content = "".join(str(piece) for piece in self._system()) + content
        if self.tools and number == self.numbers[template.tools_in]:
            if template.tools:
                before = fill(template.tools, {"content": self.tools})
            else:
                content = self.tools + content
        if message.role == "user":
            items = template.user
        else:
            items = template.observation
            content = template.tool_format.observe(content) if template.tool_format else content
        return before + fill(items, {"content": content, "round": str(number // 2)})

    def _system(self) -> list[Piece]:
        template, system = self.template, self.system
        if template.tools_in == "front" and not template.tools:
            system = system + self.tools if system else self.tools.lstrip("\n")
        if not system and not template.force_system:
            return []
        items = template.system_with_tools if self.tools else template.system
        return fill(items, {"content": system})


def _trimmed(message: Message) -> Message:
    answers = tuple(answer.strip() for answer in message.answers)
    return replace(message, content=message.content.strip(), answers=answers)


def _answer(template: Template, message: Message, thoughts: str) -> list[Piece]:
    if message.role == "assistant":
        return fill(template.assistant, {"content": thoughts + message.content})
    calls = _tool_format(template, "calls of tools").call(message.content)
    return fill(template.function, {"content": thoughts + calls})


def _tool_format(template: Template, what: str) -> ToolFormat:
    if template.tool_format is None:
        raise RecordError(f"template {template.name} has no form for {what}")
    return template.tool_format
