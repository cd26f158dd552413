"""Conversations to tokens with the chat template that comes with a tokenizer.

The tokens are those of the whole text, as `apply_chat_template` gives them, cut where questions end
and answers begin. Where one token would reach across such a place, the text on either side is
tokenized by itself: the model never sees that token when it is asked.

A template that writes nothing after an answer (GLM-4) gives the model no way to end one: EOS is the
label of what follows an answer then, and the last token, as with `efficient_eos`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_data.instruction.conversation import Conversation, Message, RecordError
from ml_data.instruction.turns import IGNORED, Turn, Turns
from ml_data.templates.chat_template import (
    CALL_FORMS,
    CallForm,
    ChatTemplate,
    messages_of,
    read_chat_template,
    tools_of,
)
from ml_data.templates.spans import find_answers
from ml_data.templates.text_encoder import TextEncoder, text_encoder
from ml_data.templates.tool_format import read_calls

if TYPE_CHECKING:
    from ml_data.tokenizer import Tokenizer

_WORD = "qzwordzq"
_THOUGHTS = "the thoughts of the last answer (a --prompt-type for models that think keeps them)"
_SHAPES = 1000
"""So many shapes of conversations are remembered: with tools, almost every one has its own."""


def chat_template_format(tokenizer: Tokenizer) -> ChatTemplateFormat:
    """Return what encodes conversations with a tokenizer's own chat template.

    Raises:
        UsageError: It has none, or nothing ends an answer.
    """
    from ml_data.tokenizer import required_eod

    path = Path(tokenizer.path)
    template = read_chat_template(path if path.is_dir() else path.parent)
    spellings = {*template.special_tokens.values(), *tokenizer.special_tokens}
    encoder = text_encoder(tokenizer, spellings)
    if _ends_answers(template):
        return ChatTemplateFormat(template, encoder, tokenizer.eod)
    eos = required_eod(tokenizer, "--hf-chat-template with a template that ends no answer")
    return ChatTemplateFormat(template, encoder, eos, unended=eos)


def _ends_answers(template: ChatTemplate) -> bool:
    messages = [{"role": role, "content": _WORD} for role in ("user", "assistant")]
    try:
        text = template.render(messages, None).text
    except RecordError:  # it is that of a conversation, later
        return True
    return bool(text.rpartition(_WORD)[2].strip())


@dataclass(frozen=True)
class ChatTemplateFormat:
    """A tokenizer with its chat template: a `ChatFormat`."""

    template: ChatTemplate
    encoder: TextEncoder
    eos: int | None
    """The token that ends a document."""
    unended: int | None = None
    """That token, if the template itself ends no answer."""
    forms: dict[tuple[str, ...], CallForm] = field(default_factory=dict)
    """For shapes of conversations, how the template writes them whole."""

    def encode(self, conversation: Conversation) -> Turns:
        """Return the tokens of an answered conversation."""
        if not conversation.answered:
            raise RecordError("the conversation ends without an answer")
        shape = _shape(conversation)
        if shape not in self.forms:
            if len(self.forms) >= _SHAPES:
                self.forms.clear()
            self.forms[shape] = _form(self.template, conversation)
        messages = messages_of(conversation, self.forms[shape])
        tools = tools_of(conversation)
        text, answers = find_answers(self.template, messages, tools)
        places = [place for answer in answers for place in answer]
        ids = _cut(text, places, self.encoder.encode)
        later = IGNORED if self.unended is None else self.unended
        turns = (
            Turn(ids[2 * n], ids[2 * n + 1], message.learned, later if n else IGNORED)
            for n, message in enumerate(conversation.messages[1::2])
        )
        return Turns(tuple(turns), (*ids[-1], *(() if self.unended is None else (self.unended,))))


def _shape(conversation: Conversation) -> tuple[str, ...]:
    """Return what a template may write differently: who speaks, and what there is."""
    messages = map(_message_shape, conversation.messages)
    parts = {
        "system": conversation.system,
        "tools": tools_of(conversation),
        "thoughts": _thinks(conversation),
    }
    return (*messages, *(name for name, value in parts.items() if value))


def _message_shape(message: Message) -> str:
    if message.role != "function":
        return f"{message.role} {len(message.observed)}"
    calls, text = read_calls(message.content)
    return f"{message.role} {len(calls)} {'with text' if text else ''}"


def _thinks(conversation: Conversation) -> bool:
    """Return whether the last answer has thoughts; templates may leave out earlier ones."""
    return "</think>" in conversation.messages[-1].content


def _form(template: ChatTemplate, conversation: Conversation) -> CallForm:
    """Return how the template writes a conversation of this shape without leaving anything out.

    Raises:
        RecordError: It does not.
    """
    probe, words = _probe(conversation)
    errors = []
    for form in CALL_FORMS:
        try:
            text = template.render(messages_of(probe, form), tools_of(probe)).text
        except RecordError as error:
            errors.append(error)
            continue
        left_out = list(dict.fromkeys(whose for word, whose in words.items() if word not in text))
        if form.no_text is None and "None" in text:  # the value, written as text
            left_out.append("calls without text before them")
        if not left_out:
            return form
        errors.append(RecordError(f"the chat template leaves out {', '.join(left_out)}"))
    raise errors[0]


def _probe(conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
    """Return a conversation of the same shape, and the words in it with what they are."""
    words: dict[str, str] = {}

    def word(of: str) -> str:
        words[text := f"{_WORD}{len(words)}zq"] = of
        return text

    def content(message: Message) -> str:
        if message.role == "function":
            calls, text = read_calls(message.content)
            text = thoughts(message) + (word("text before calls") if text else "")
            return json.dumps({"content": text, "tool_calls": [call() for _ in calls]})
        return thoughts(message) + word(f"what the {message.role} says")

    def call() -> dict[str, Any]:
        return {"name": word("calls"), "arguments": {word("calls"): word("calls")}}

    def answers(message: Message) -> tuple[str, ...]:
        return tuple(word(f"what the {message.role} says") for _ in message.answers)

    def thoughts(message: Message) -> str:
        last = message is conversation.messages[-1] and _thinks(conversation)
        return f"<think>\n{word(_THOUGHTS)}\n</think>\n\n" if last else ""

    messages = tuple(
        replace(m, answers=answers(m)) if m.answers else replace(m, content=content(m))
        for m in conversation.messages
    )
    system = word("the system text") if conversation.system else None
    tools = None
    if tools_of(conversation):
        parameters = {"type": "object", "properties": {}}
        tool = {"name": word("tools"), "description": word("tools"), "parameters": parameters}
        tools = json.dumps([tool])
    return Conversation(messages, system, tools), words


def _cut(
    text: str, places: Sequence[int], encode: Callable[[Sequence[str]], list[list[int]]]
) -> list[list[int]]:
    """Return the tokens of `text` in the parts between `places`."""
    edges = [0, *places, len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(edges)]
    whole, *alone = encode([text, *parts])
    if [id_ for ids in alone for id_ in ids] == whole:
        return alone
    beginnings = encode([text[:place] for place in places])
    cuts = [len(ids) if whole[: len(ids)] == ids else None for ids in beginnings]
    known = [0, *cuts, len(whole)]
    return [
        ids if start is None or end is None else whole[start:end]
        for ids, (start, end) in zip(alone, itertools.pairwise(known), strict=True)
    ]
