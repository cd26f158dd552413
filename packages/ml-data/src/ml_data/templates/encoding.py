"""Conversations to tokens with a template and a tokenizer.

What never varies is tokenized once, when the two meet; the rest of a conversation in one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ml_data.instruction.conversation import Conversation, RecordError
from ml_data.instruction.turns import IGNORED, Turn, Turns
from ml_data.templates.rendering import Piece, fill, render
from ml_data.templates.template import Special, Template, Text, Token
from ml_data.templates.text_encoder import TextEncoder, text_encoder
from ml_models.flags import UsageError

if TYPE_CHECKING:
    from ml_data.tokenizer import Tokenizer

Ids = list[int]


@dataclass(frozen=True)
class TemplateFormat:
    """A template whose tokens are known: a `ChatFormat`."""

    template: Template
    encoder: TextEncoder
    eos: int | None
    """The token that ends an answer: the template's, or the tokenizer's own."""
    known: dict[Piece, Ids]
    """Tokens of the pieces that never vary."""

    def encode(self, conversation: Conversation) -> Turns:
        """Return the tokens of an answered conversation."""
        if not conversation.answered:
            raise RecordError("the conversation ends without an answer")
        *messages, end = self._encode(
            [*render(self.template, conversation), fill(self.template.suffix)]
        )
        unended = self.eos if self.template.efficient_eos else None
        turns = (
            Turn(
                source=messages[number],
                target=messages[number + 1],
                learned=conversation.messages[number + 1].learned,
                source_label=IGNORED if unended is None or number == 0 else unended,
            )
            for number in range(0, len(messages), 2)
        )
        return Turns(tuple(turns), (*end, *(() if unended is None else (unended,))))

    def _encode(self, messages: list[list[Piece]]) -> list[Ids]:
        """Return the tokens of each message."""
        new = [
            piece
            for pieces in messages
            for piece in pieces
            if isinstance(piece, str) and piece not in self.known
        ]
        ids = dict(self.known)
        ids.update(zip(new, self.encoder.encode(new), strict=True))
        return [[id_ for piece in pieces for id_ in ids[piece]] for pieces in messages]


def build_format(template: Template, tokenizer: Tokenizer) -> TemplateFormat:
    """Look up every token that the template needs.

    Raises:
        UsageError: The tokenizer lacks one.
    """
    lookup = _Lookup(template, tokenizer)
    needed = dict.fromkeys((*template.stop_words, *template.special_tokens))
    lookup.check(needed)
    encoder = text_encoder(tokenizer, needed)
    eos = lookup.eos() if lookup.needs_eos() else tokenizer.eod
    texts = _fixed_texts(template)
    known: dict[Piece, Ids] = dict(zip(texts, encoder.encode(texts), strict=True))
    known.update(
        (item, [lookup.id(item)]) for item in _items(template) if not isinstance(item, Text)
    )
    return TemplateFormat(template, encoder, eos, known)


@dataclass(frozen=True)
class _Lookup:
    template: Template
    tokenizer: Tokenizer

    def check(self, needed: Iterable[str]) -> None:
        """Check that the vocabulary has these tokens."""
        missing = [token for token in needed if self.tokenizer.token_id(token) is None]
        if missing:
            raise self._error(f"needs {' '.join(missing)}", "has no such token")

    def needs_eos(self) -> bool:
        """Return whether the tokenizer's own EOS may be none."""
        template = self.template
        return template.replace_eos or template.efficient_eos or Special("eos") in _items(template)

    def id(self, item: Token | Special) -> int:
        """Return the token of an item."""
        if isinstance(item, Token):
            return self._token(item.name)
        return self.eos() if item.role == "eos" else self._bos()

    def eos(self) -> int:
        """Return the token that ends an answer."""
        if self.template.replace_eos:
            return self._token(self.template.stop_words[0])
        if self.tokenizer.eod is None:
            raise self._error("needs a token that ends a text", "has none")
        return self.tokenizer.eod

    def _bos(self) -> int:
        if self.tokenizer.bos is None:
            raise self._error("needs a token that begins a text", "has none")
        return self.tokenizer.bos

    def _token(self, name: str) -> int:
        id_ = self.tokenizer.token_id(name)
        if id_ is None:
            raise self._error(f"needs {name}", "has no such token")
        return id_

    def _error(self, template: str, tokenizer: str) -> UsageError:
        return UsageError(
            f"template {self.template.name} {template}; tokenizer {self.tokenizer.path} {tokenizer}"
        )


def _items(template: Template) -> Iterator[Text | Token | Special]:
    for field in fields(template):
        value = getattr(template, field.name)
        if isinstance(value, tuple):
            yield from (item for item in value if isinstance(item, Text | Token | Special))


def _fixed_texts(template: Template) -> list[str]:
    """Return the texts that are the same in every conversation."""
    items = [item for item in _items(template) if isinstance(item, Text) and item.text]
    texts = [item.text for item in items if not item.placeholders]
    return texts + ([template.thinking.empty] if template.thinking else [])
