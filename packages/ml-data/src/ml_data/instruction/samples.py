"""A conversation in turns to what a model is trained on: token ids and labels.

A label is the token itself where the loss sees it and `IGNORED` elsewhere; labels are not shifted,
whoever trains shifts them. The one promise: a sample has a label that survives the shift, or it is
left out with a reason, never written with nothing to learn (its loss would be 0/0).

What is longer than `seq_length` is cut at whole turns, and what is left is written like any other
conversation, with the system text and the tools wherever its template puts them:

| loss on | what is kept |
|---|---|
| every answer | the first turns: no answer loses the context it was given in |
| the last answer (`last_answer_only`; preferences) | the last turns, and the system text |

If not one turn fits, its answer is cut, and then nothing says that it ended there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from ml_data.instruction.conversation import Conversation, Message, Preference
from ml_data.instruction.turns import IGNORED, ChatFormat, Turn, Turns

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

    @property
    def differ_too_late(self) -> str:
        """The reason to leave a preference out whose answers are cut to the same tokens."""
        return f"answers that differ only after {self.seq_length:,} tokens"


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
    (sample,) = _samples([conversation], chat_format, limits)
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
    chosen, rejected = _samples(both, chat_format, replace(limits, last_answer_only=True))
    if chosen.input_ids == rejected.input_ids:
        cut = chosen.cut or rejected.cut
        raise LeftOutError(limits.differ_too_late if cut else SAME_ANSWERS)
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


def _samples(
    conversations: list[Conversation], chat_format: ChatFormat, limits: Limits
) -> list[Sample]:
    """Return samples of conversations that differ in their last answer, the same turns of each."""
    parts = _parts(conversations[0].messages, limits)

    @cache
    def encode(part: int) -> list[Turns]:
        return [
            chat_format.encode(replace(whole, messages=whole.messages[parts[part]]))
            for whole in conversations
        ]

    def fits(part: int) -> bool:
        return all(limits.fits(_length(turns, limits)) for turns in encode(part))

    part = 0
    if not fits(part):
        if limits.on_too_long == "skip":
            raise LeftOutError(limits.too_long)
        part = _largest(len(parts), fits)
    return [_sample_of(turns, limits, cut=part > 0) for turns in encode(part)]


def _largest(count: int, fits: Callable[[int], bool]) -> int:
    """Return the number of the first part but the whole that fits; if none does, of the last."""
    # Not one after the other: of a conversation of many turns that takes many times as long.
    part = min(bisect_left(range(count), True, lo=1, key=fits), count - 1)
    if fits(part):
        return part
    # Fewer turns may be more tokens: an answer may keep its thoughts only where it is the last.
    return next(filter(fits, range(1, count)), part)


def _parts(messages: tuple[Message, ...], limits: Limits) -> list[slice]:
    """Return what may be left of a conversation, the longest first."""
    if not limits.last_answer_only:
        return [slice(end) for end in range(len(messages), 0, -2)]
    # It can begin at what the user says, not at what a tool answers.
    later = (at for at in range(2, len(messages), 2) if messages[at].role == "user")
    return [slice(begin, None) for begin in (0, *later)]


def _sample_of(encoded: Turns, limits: Limits, *, cut: bool) -> Sample:
    turns = _last_learned(encoded.turns) if limits.last_answer_only else encoded.turns
    if limits.fits(_length(encoded, limits)):
        return _sample(turns, _end(encoded, limits), cut=cut)
    return _cut_answer(turns, limits)


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
