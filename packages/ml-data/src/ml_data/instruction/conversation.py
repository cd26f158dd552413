"""What instruction and preference data say, in one form: who said what, in turn.

Readers of formats (Alpaca, ShareGPT, OpenAI messages, ...) make it, templates turn it into tokens;
neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "observation", "assistant", "function"]
"""Who speaks. `user` and `observation` (what a tool answered) ask, `assistant` and `function` (the
model calls a tool) are the model's."""

ASKING: tuple[Role, ...] = ("user", "observation")
ANSWERING: tuple[Role, ...] = ("assistant", "function")


class RecordError(ValueError):
    """A record that is not what its format says; the message is the reason, without the place."""


@dataclass(frozen=True)
class Message:
    """One thing said."""

    role: Role
    content: str
    learned: bool = True
    """Whether the loss sees it; only of the model's messages."""
    answers: tuple[str, ...] = ()
    """What each of several tools answered, for an observation; `content` is a line of each."""

    @property
    def observed(self) -> tuple[str, ...]:
        """What was answered, of one tool or several."""
        return self.answers or (self.content,)


@dataclass(frozen=True)
class Conversation:
    """Messages that ask and answer in turn, beginning with one that asks.

    Raises:
        RecordError: They do not.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    """What the model is told before all else; None for the template's own text."""
    tools: str | None = None
    """Descriptions of the tools, JSON: a list of functions with name, description, parameters."""

    def __post_init__(self) -> None:
        for number, message in enumerate(self.messages):
            wanted = ANSWERING if number % 2 else ASKING
            if message.role not in wanted:
                after = " after the system text" if self.system else ""
                raise RecordError(
                    f"message {number + 1}{after} is of {message.role}, "
                    f"must be of {' or '.join(wanted)}"
                )
        if not self.messages:
            raise RecordError("no messages")

    @property
    def answered(self) -> bool:
        """Whether the last message is an answer."""
        return len(self.messages) % 2 == 0


@dataclass(frozen=True)
class Preference:
    """A question with a better and a worse answer (Rafailov et al. 2023, arXiv:2305.18290).

    Raises:
        RecordError: The question does not end with what an answer can follow.
    """

    question: Conversation
    chosen: Message
    rejected: Message

    def __post_init__(self) -> None:
        if self.question.answered:
            raise RecordError("the question ends with an answer")
        for name, message in (("chosen", self.chosen), ("rejected", self.rejected)):
            if message.role not in ANSWERING:
                raise RecordError(f"{name} is of {message.role}, must be of the model")


def pairs(messages: Sequence[Message]) -> list[tuple[Message, Message]]:
    """Return (question, answer) of every turn of an answered conversation."""
    return list(zip(messages[::2], messages[1::2], strict=True))
