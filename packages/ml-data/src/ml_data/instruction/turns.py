"""A conversation in tokens: what is asked and what is answered, turn by turn.

Between templates, which make it, and what cuts long samples, masks labels and writes files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ml_data.instruction.conversation import Conversation

IGNORED = -100
"""Label of a token that is no part of the loss, as torch's cross entropy has it."""


class Turn(NamedTuple):
    """One question with its answer."""

    source: list[int]
    """What the model reads: separator, prefix and system text of the first turn, the question."""
    target: list[int]
    """What it answers, with the token that ends an answer where the template has one."""
    learned: bool
    """Whether the loss sees the target."""
    source_label: int = IGNORED
    """Label of the first token of `source`: that of the end of text, where a template has no token
    of its own to end an answer (`efficient_eos`) and this is not the first turn."""


@dataclass(frozen=True)
class Turns:
    """A whole conversation."""

    turns: tuple[Turn, ...]
    end: tuple[int, ...] = ()
    """Tokens after the last answer; the loss sees them if it sees that answer."""


class ChatFormat(Protocol):
    """How conversations become tokens."""

    @property
    def eos(self) -> int | None:
        """Id of the token that ends a text: the tokenizer's, or that of a template instead."""
        ...

    def encode(self, conversation: Conversation) -> Turns:
        """Return the tokens of an answered conversation.

        Raises:
            RecordError: The format has no form for what is in it.
        """
        ...
