"""A conversation in turns to what a model is trained on: token ids and labels.

A label is the token itself where the loss sees it and `IGNORED` elsewhere; labels are not shifted,
whoever trains shifts them. The one promise: a sample has a label that survives the shift, or it is
left out with a reason, never written with nothing to learn (its loss would be 0/0).

What is longer than `seq_length` is cut at whole turns, so that what is left is a conversation:

| loss on | what is kept |
|---|---|
| every answer | the first turns: no answer loses the context it was given in |
| the last answer (`last_answer_only`; preferences) | the last turns, and the system text |

If not one turn fits, its answer is cut, and then nothing says that it ended there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ml_data.conversation import Conversation, Message, Preference
from ml_data.turns import IGNORED, ChatFormat, Turn, Turns

OnTooLong = Literal["cut", "skip"]
"""What to do with a sample of more than `seq_length` tokens."""

NO_ANSWER = "no answer to learn"
SAME_ANSWERS = "the chosen answer is the rejected one"


class LeftOutError(ValueError):
    """A record that is right but gives no sample; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What samples are made of turns."""

    seq_length: int | None = None
    """The most tokens of a sample."""
    on_too_long: OnTooLong = "cut"
    """What to do with a longer one."""
    last_answer_only: bool = False
    """The loss sees the last answer only."""
    eod: int | None = None
    """Token that ends every sample, if any."""

    def fits(self, length: int) -> bool:
        """Return whether a sample of `length` tokens may be written."""
        return self.seq_length is None or length <= self.seq_length

    @property
    def too_long(self) -> str:
        """The reason to leave a sample out."""
        return f"more than {self.seq_length:,} tokens"

    @property
    def question_too_long(self) -> str:
        """The reason to leave a sample out that was to be cut."""
        return f"a question that leaves no room for an answer in {self.seq_length:,} tokens"


class Sample(NamedTuple):
    """One sample."""

    input_ids: list[int]
    labels: list[int]
    cut: bool
    """Whether something of the conversation is missing."""


class Pair(NamedTuple):
    """A better and a worse answer to one question."""

    chosen: Sample
    rejected: Sample


def instruction_sample(
    conversation: Conversation, chat_format: ChatFormat, limits: Limits
) -> Sample:
    """Return the sample that a conversation becomes.

    Raises:
        LeftOutError: it is too long, or has nothing to learn.
        RecordError: the format has no form for what is in it.
    """
    _check_text(conversation.messages)
    if not limits.last_answer_only:
        sample = _from_first_turns(chat_format.encode(conversation), limits)
    else:
        (sample,) = _from_last_turns([conversation], chat_format, limits)
    _check_labels(sample)
    return sample


def preference_pair(preference: Preference, chat_format: ChatFormat, limits: Limits) -> Pair:
    """Return the two samples that a preference becomes; the loss sees the two answers only.

    Raises:
        LeftOutError: it is too long, or its answers do not differ.
        RecordError: the format has no form for what is in it.
    """
    question = preference.question
    ends = [replace(preference.chosen, learned=True), replace(preference.rejected, learned=True)]
    both = [replace(question, messages=(*question.messages, end)) for end in ends]
    for conversation in both:
        _check_text(conversation.messages)
    if ends[0] == ends[1]:
        raise LeftOutError(SAME_ANSWERS)
    chosen, rejected = _from_last_turns(both, chat_format, limits)
    if chosen.input_ids == rejected.input_ids:
        raise LeftOutError(f"answers that differ only after {limits.seq_length:,} tokens")
    _check_labels(chosen)
    _check_labels(rejected)
    return Pair(chosen, rejected)


def _check_text(messages: tuple[Message, ...]) -> None:
    for message in messages:
        if message.content.strip() or message.role == "observation":  # a tool may answer nothing
            continue
        raise LeftOutError("an empty question" if message.role == "user" else "an empty answer")


def _check_labels(sample: Sample) -> None:
    if all(label == IGNORED for label in sample.labels[1:]):
        raise LeftOutError(NO_ANSWER)


def _from_first_turns(encoded: Turns, limits: Limits) -> Sample:
    turns, end = encoded.turns, _end(encoded, limits)
    kept, length = 0, len(end)
    for turn in turns:
        length += len(turn.source) + len(turn.target)
        if not limits.fits(length):
            break
        kept += 1
    if kept < len(turns) and limits.on_too_long == "skip":
        raise LeftOutError(limits.too_long)
    if not kept:
        return _cut_answer(turns[:1], limits)
    return _sample(turns[:kept], end, cut=kept < len(turns))


def _from_last_turns(
    conversations: list[Conversation], chat_format: ChatFormat, limits: Limits
) -> list[Sample]:
    """Return samples of conversations that differ in their last answer, the same turns of each."""
    encoded: list[Turns] = []
    for begin in _beginnings(conversations[0]):
        encoded = [
            chat_format.encode(replace(conversation, messages=conversation.messages[begin:]))
            for conversation in conversations
        ]
        if all(limits.fits(_length(turns, limits)) for turns in encoded):
            return [
                _sample(_last_learned(turns.turns), _end(turns, limits), cut=begin > 0)
                for turns in encoded
            ]
        if limits.on_too_long == "skip":
            raise LeftOutError(limits.too_long)
    return [
        _sample(_last_learned(turns.turns), _end(turns, limits), cut=True)
        if limits.fits(_length(turns, limits))
        else _cut_answer(_last_learned(turns.turns), limits)
        for turns in encoded
    ]


def _beginnings(conversation: Conversation) -> Iterator[int]:
    """Yield where a conversation can begin: at what the user says, not at what a tool answers."""
    messages = conversation.messages
    yield 0
    yield from (at for at in range(2, len(messages), 2) if messages[at].role == "user")


def _last_learned(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return (*(turn._replace(learned=False) for turn in turns[:-1]), turns[-1])


def _end(turns: Turns, limits: Limits) -> list[int]:
    return [*turns.end, *([] if limits.eod is None else [limits.eod])]


def _length(turns: Turns, limits: Limits) -> int:
    length = sum(len(turn.source) + len(turn.target) for turn in turns.turns)
    return length + len(_end(turns, limits))


def _cut_answer(turns: tuple[Turn, ...], limits: Limits) -> Sample:
    """Return a sample that ends within the last answer."""
    last, seq_length = turns[-1], limits.seq_length or 0
    asked = sum(len(turn.source) + len(turn.target) for turn in turns) - len(last.target)
    if asked >= seq_length:
        raise LeftOutError(limits.question_too_long)
    target = last.target[: seq_length - asked]
    return _sample((*turns[:-1], last._replace(target=target)), [], cut=True)


def _sample(turns: tuple[Turn, ...], end: list[int], *, cut: bool) -> Sample:
    input_ids: list[int] = []
    labels: list[int] = []
    learned = False  # whether the answer before is
    for turn in turns:
        input_ids += turn.source
        labels += [turn.source_label if learned else IGNORED, *[IGNORED] * len(turn.source)][
            : len(turn.source)
        ]
        learned = turn.learned
        input_ids += turn.target
        labels += turn.target if learned else [IGNORED] * len(turn.target)
    input_ids += end
    labels += end if learned else [IGNORED] * len(end)
    return Sample(input_ids, labels, cut)
