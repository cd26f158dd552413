"""Which part of a rendered conversation the model writes.

A template that marks it says so itself. Of any other, each answer begins where the rendering of
what was asked so far ends, and ends where its own rendering ends; both must be beginnings of the
whole. Two things that published templates do are known: they end the last answer with one more EOS,
and they leave out the thoughts of earlier answers (there, another answer in its place tells what
follows it). Whatever else changes earlier text is an error: a mask that does not fit
must not train anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ml_data.instruction.conversation import RecordError
from ml_data.templates.chat_template import ChatTemplate, Json

_ANSWER = "qzanswerzq"
_NOT_FOUND = (
    "the chat template writes earlier messages differently when more follow, so that answers "
    "cannot be told from questions; give it {% generation %} tags, or choose a --prompt-type"
)


class Span(NamedTuple):
    """Part of a text, by its characters."""

    start: int
    end: int


def find_answers(
    template: ChatTemplate, messages: Sequence[Json], tools: Sequence[Json] | None
) -> tuple[str, list[Span]]:
    """Return a conversation as text, and where each of its answers is.

    Raises:
        RecordError: They cannot be found.
    """
    whole = template.render(messages, tools)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [Span(*span) for span in whole.generated if span[0] < span[1]]
    if whole.generated:
        if len(marked) != len(answers):
            counts = f"{len(marked)} texts as generated, of {len(answers)} answers"
            raise RecordError(f"the chat template marks {counts}")
        return whole.text, marked
    search = _Search(template, messages, tools, whole.text)
    spans = [search.span(number) for number in answers]
    if any(after.start < before.end for before, after in itertools.pairwise(spans)):
        raise RecordError(_NOT_FOUND)
    return whole.text, spans


@dataclass(frozen=True)
class _Search:
    template: ChatTemplate
    messages: Sequence[Json]
    tools: Sequence[Json] | None
    whole: str

    def span(self, number: int) -> Span:
        """Return where the answer with this number is."""
        start = self._start(number)
        end = self._end(number)
        if not start < end <= len(self.whole):
            raise RecordError(_NOT_FOUND)
        return Span(start, end)

    def _start(self, number: int) -> int:
        question = self._render(self.messages[:number], ask=True)
        if self.whole.startswith(question):
            return len(question)
        # What asks begins the answer (`<think>`), which the template leaves out of it later on.
        before, _ = self._around(number, self.messages)
        if not self.whole.startswith(before):
            raise RecordError(_NOT_FOUND)
        return len(before)

    def _end(self, number: int) -> int:
        answered = self._render(self.messages[: number + 1])
        eos = self.template.special_tokens.get("eos_token", "")
        for beginning in (answered, answered.removesuffix(eos)):
            if self.whole.startswith(beginning):
                return len(beginning)
        _, ending = self._around(number, self.messages[: number + 1])
        _, after = self._around(number, self.messages)
        if not (ending.strip() and after.startswith(ending) and self.whole.endswith(after)):
            raise RecordError(_NOT_FOUND)
        return len(self.whole) - len(after) + len(ending)

    def _around(self, number: int, messages: Sequence[Json]) -> tuple[str, str]:
        """Return what is written before and after another answer in the place of this one."""
        replaced = [*messages]
        replaced[number] = {"role": "assistant", "content": _ANSWER}
        before, _, after = self._render(replaced).partition(_ANSWER)
        return before, after

    def _render(self, messages: Sequence[Json], *, ask: bool = False) -> str:
        return self.template.render(messages, self.tools, ask=ask).text
