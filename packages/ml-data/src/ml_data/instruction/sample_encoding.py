"""What a worker of `ml-data instruct` and `preference` does: a chunk of a file in, samples out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.account import Problem
from ml_data.handlers import HANDLERS
from ml_data.handlers.dataset_info import Dataset
from ml_data.instruction.conversation import Conversation, Preference, RecordError
from ml_data.instruction.ragged import Ragged, Samples
from ml_data.instruction.samples import (
    LeftOutError,
    Limits,
    Sample,
    instruction_sample,
    preference_pair,
)
from ml_data.instruction.turns import ChatFormat
from ml_data.reading import Chunk, Record, records
from ml_data.tokenizer import Tokenizer, TokenizerConfig, required_eod

INSTRUCTION = ("input_ids", "labels")
PREFERENCE = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleEncoding:
    """How records become samples."""

    tokenizer: TokenizerConfig
    """Which tokenizer."""
    template: str | None
    """Name or file of the template; None for the tokenizer's own chat template."""
    datasets: tuple[Dataset, ...]
    """Where the records come from, and what they look like."""
    limits: Limits
    """What samples are made of conversations; the token of `append_eod` comes into it later."""
    append_eod: bool
    """Whether the token that ends a text (an answer, where a template has its own) ends samples."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what a sample has."""
        pairwise = any(HANDLERS[dataset.handler].pairwise for dataset in self.datasets)
        return PREFERENCE if pairwise else INSTRUCTION

    @property
    def template_name(self) -> str:
        """What writes the conversations, for the description."""
        own = [d.handler for d in self.datasets if HANDLERS[d.handler].chat_format is not None]
        return own[0] if own else self.template or "hf-chat-template"

    def format_of(self, dataset: Dataset, tokenizer: Tokenizer) -> ChatFormat:
        """Return how the conversations of a dataset are written.

        Raises:
            UsageError: there is no such template, or the tokenizer lacks a token it needs.
        """
        chat_format = self._format_of(dataset, tokenizer)
        if self.append_eod and chat_format.eos is None:
            required_eod(tokenizer, "--append-eod")
        return chat_format

    def _format_of(self, dataset: Dataset, tokenizer: Tokenizer) -> ChatFormat:
        own = HANDLERS[dataset.handler].chat_format
        if own is not None:
            return own(tokenizer)
        if self.template is not None:
            from ml_data.templates import load_template

            return load_template(self.template).format(tokenizer)
        from ml_data.templates.hugging_face import chat_template_format

        return chat_template_format(tokenizer)


class EncodedChunk(NamedTuple):
    """The samples of a chunk."""

    dataset: int
    """Number of the dataset that it is of."""
    samples: Samples
    """All samples, in the order of the records."""
    counts: NDArray[np.int64]
    """(records,), samples of each."""
    reasons: dict[int, str | Problem]
    """Why a record has none, by its number in the chunk."""
    partial: list[tuple[int, str]]
    """Numbers of records that have samples, and why they have not more."""
    cut: NDArray[np.bool_]
    """(samples,), whether something is missing of it."""
    text_bytes: int
    """UTF-8 size of what is said in the samples."""
    consumed: int
    """Bytes of the file that the chunk took."""
    missing: frozenset[str]
    """Columns that the user named, and that the worker has not seen in any record so far."""

    def head(self, count: int) -> EncodedChunk:
        """Return the first `count` records."""
        counts = self.counts[:count]
        samples = int(counts.sum())
        return self._replace(
            samples={name: column.head(samples) for name, column in self.samples.items()},
            counts=counts,
            reasons={number: why for number, why in self.reasons.items() if number < count},
            partial=[(number, why) for number, why in self.partial if number < count],
            cut=self.cut[:samples],
        )


def make_sample_encoder(
    encoding: SampleEncoding,
) -> Callable[[tuple[int, Chunk]], EncodedChunk]:
    """Load tokenizer and templates; return the function that encodes a chunk of a dataset."""
    tokenizer = encoding.tokenizer.load()
    encoders = [_RecordEncoder(encoding, dataset, tokenizer) for dataset in encoding.datasets]

    def encode_chunk(item: tuple[int, Chunk]) -> EncodedChunk:
        dataset, chunk = item
        collected = _Collected()
        for record in records(chunk):
            collected.add(record, encoders[dataset])
        missing = encoders[dataset].missing
        return collected.finish(dataset, encoding.columns, chunk.consumed, missing)

    return encode_chunk


class _Encoded(NamedTuple):
    """What a record gives."""

    samples: list[tuple[Sample, ...]]
    """Each sample, or both of a preference."""
    left_out: list[str]
    """Why others are none."""
    text_bytes: int


class _RecordEncoder:
    """Records of one dataset to samples."""

    def __init__(self, encoding: SampleEncoding, dataset: Dataset, tokenizer: Tokenizer) -> None:
        handler = HANDLERS[dataset.handler]
        last_only = handler.last_answer_only or encoding.limits.last_answer_only
        self._chat_format = encoding.format_of(dataset, tokenizer)
        self._limits = dataclasses.replace(
            encoding.limits,
            last_answer_only=last_only,
            eod=self._chat_format.eos if encoding.append_eod else None,
        )
        self._convert = handler.convert
        self._columns = dataset.columns
        self.missing = dataset.columns.named

    def __call__(self, value: dict[str, Any]) -> _Encoded:
        if self.missing:
            self.missing -= value.keys()
        samples: list[tuple[Sample, ...]] = []
        left_out: list[str] = []
        text_bytes = 0
        for said in self._convert(value, self._columns):
            try:
                samples.append(self._samples(said))
            except LeftOutError as reason:
                left_out.append(str(reason))
            else:
                text_bytes += _text_bytes(said)
        return _Encoded(samples, left_out, text_bytes)

    def _samples(self, said: Conversation | Preference) -> tuple[Sample, ...]:
        if isinstance(said, Preference):
            return preference_pair(said, self._chat_format, self._limits)
        return (instruction_sample(said, self._chat_format, self._limits),)


def _text_bytes(said: Conversation | Preference) -> int:
    messages = (
        (*said.question.messages, said.chosen, said.rejected)
        if isinstance(said, Preference)
        else said.messages
    )
    return sum(len(message.content.encode()) for message in messages)


class _Collected:
    """What has become of the records so far."""

    def __init__(self) -> None:
        self._samples: list[tuple[Sample, ...]] = []
        self._counts: list[int] = []
        self._reasons: dict[int, str | Problem] = {}
        self._partial: list[tuple[int, str]] = []
        self._text_bytes = 0

    def add(self, record: Record | Problem, encode: _RecordEncoder) -> None:
        number, encoded = len(self._counts), _Encoded([], [], 0)
        if isinstance(record, Problem):
            self._reasons[number] = record
        else:
            try:
                encoded = encode(record.value)
            except RecordError as reason:
                self._reasons[number] = Problem(record.place, str(reason))
        if encoded.samples:
            self._partial += [(number, reason) for reason in encoded.left_out]
        elif encoded.left_out:
            self._reasons[number] = encoded.left_out[0]
        self._counts.append(len(encoded.samples))
        self._samples += encoded.samples
        self._text_bytes += encoded.text_bytes

    def finish(
        self, dataset: int, names: tuple[str, ...], consumed: int, missing: frozenset[str]
    ) -> EncodedChunk:
        sides = list(zip(*self._samples, strict=True)) or [()] * (len(names) // 2)
        lists = [
            [getattr(sample, field) for sample in side]
            for side in sides
            for field in ("input_ids", "labels")
        ]
        return EncodedChunk(
            dataset=dataset,
            samples=dict(zip(names, map(Ragged.of, lists), strict=True)),
            counts=np.array(self._counts, np.int64),
            reasons=self._reasons,
            partial=self._partial,
            cut=np.array([any(s.cut for s in samples) for samples in self._samples], np.bool_),
            text_bytes=self._text_bytes,
            consumed=consumed,
            missing=missing,
        )
