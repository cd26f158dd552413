"""What a worker of `ml-data pretrain` does: a chunk of a file in, tokens as arrays out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.account import Account, OnError, Problem
from ml_data.description import TokenizerInfo
from ml_data.indexed import token_dtype
from ml_data.instruction.conversation import RecordError
from ml_data.pretraining.duplicates import digests
from ml_data.pretraining.fast import Backend, Encoder, beginning, make_encoder_for
from ml_data.pretraining.pretrain_text import PretrainHandler, made_text
from ml_data.pretraining.sentences import split_sentences
from ml_data.reading import Chunk, records, text_of
from ml_data.tokenizer import Tokenizer, TokenizerConfig, required_eod
from ml_models.flags import UsageError

TokenDtype = Literal["auto", "uint16", "int32"]
"""Type of a token on disk; `auto` is Megatron's choice: uint16 for a vocabulary that fits."""

NO_TEXT = "no text"


def too_long(seq_length: int | None) -> str:
    """Return why a document of `seq_length` tokens or more is left out."""
    return f"{seq_length or 0:,} tokens or more"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become tokens."""

    tokenizer: TokenizerConfig
    """Where the tokenizer is."""
    backend: Backend = "auto"
    """What encodes."""
    handler: PretrainHandler = "GeneralPretrainHandler"
    """What makes the texts of a record."""
    keys: tuple[str, ...] = ("text",)
    """Columns whose texts are tokenized, each into its own dataset."""
    on_error: OnError = "stop"
    """What becomes of a record that cannot be used."""
    split_sentences: bool = False
    """Make every sentence of a document a sequence."""
    keep_newlines: bool = False
    """Leave the white space between sentences where it is."""
    append_eod: bool = False
    """End every document with the end-of-document token."""
    seq_length: int | None = None
    """Leave out documents of at least so many tokens."""
    dtype: TokenDtype = "auto"
    """Type of the tokens."""
    deduplicate: bool = False
    """Whether anybody asks for digests of the texts."""


class TokenizerFacts(NamedTuple):
    """What the process that writes must know of the tokenizer, which it does not load."""

    info: TokenizerInfo
    dtype: str
    """Type of its tokens on disk."""
    choice: str | None
    """What encodes, and why, if nobody said it."""


class Tokens(NamedTuple):
    """Documents of one key."""

    tokens: NDArray[Any]
    """(tokens,), the documents back to back."""
    lengths: NDArray[np.int64]
    """(sequences,), tokens of each."""
    sequences: NDArray[np.int64] | None
    """(documents,), sequences of each; None if each has one."""
    text_bytes: NDArray[np.int64]
    """(documents,), UTF-8 size of each text."""
    digests: NDArray[Any] | None
    """(documents,), of each text, if they were asked for."""
    account: Account
    """What became of the records of the chunk."""

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """(documents,), tokens of each."""
        return self.lengths if self.sequences is None else _sums(self.lengths, self.sequences)


class EncodedChunk(NamedTuple):
    """The tokens of a chunk, of each key."""

    keys: Mapping[str, Tokens]
    consumed: int
    """Bytes of the file that the chunk took."""
    tokenizer: TokenizerFacts


def sample_texts(chunk: Chunk, encoding: Encoding) -> list[str]:
    """Return texts of a chunk, whatever else is in it."""
    columns = _read(chunk, dataclasses.replace(encoding, on_error="skip"))
    return beginning(text for column in columns.values() for text in column.texts)


def make_encoder(encoding: Encoding, sample: Sequence[str]) -> Callable[[Chunk], EncodedChunk]:
    """Load the tokenizer and return the function that encodes a chunk with it.

    Args:
        encoding: How to encode.
        sample: Texts of the input, to find out whether a fast encoder gives the right ids.

    Raises:
        UsageError: There is no such tokenizer, or it cannot do what is asked for.
    """
    tokenizer = encoding.tokenizer.load()
    dtype = _dtype(encoding.dtype, tokenizer)
    if encoding.append_eod:
        required_eod(tokenizer, "--append-eod")
    encoder = make_encoder_for(tokenizer, encoding.backend, sample)
    facts = _facts(tokenizer, encoder, dtype)

    def encode_chunk(chunk: Chunk) -> EncodedChunk:
        columns = _read(chunk, encoding)
        encoded = {
            key: _encode(column, encoding, encoder, dtype) for key, column in columns.items()
        }
        return EncodedChunk(encoded, chunk.consumed, facts)

    return encode_chunk


def keep_documents(tokens: Tokens, keep: NDArray[np.bool_]) -> Tokens:
    """Return some of the documents; the account is that of all."""
    if keep.all():
        return tokens
    sequences = tokens.sequences
    keep_sequences = keep if sequences is None else np.repeat(keep, sequences)
    return tokens._replace(
        tokens=tokens.tokens[np.repeat(keep_sequences, tokens.lengths)],
        lengths=tokens.lengths[keep_sequences],
        sequences=None if sequences is None else sequences[keep],
        text_bytes=tokens.text_bytes[keep],
        digests=None if tokens.digests is None else tokens.digests[keep],
    )


@dataclasses.dataclass
class _Column:
    """The texts of one key in a chunk."""

    texts: list[str] = dataclasses.field(default_factory=list)
    account: Account = dataclasses.field(default_factory=Account)

    def take(self, key: str, record: dict[str, Any], place: str, on_error: OnError) -> None:
        """Take the text of a record; null, which tables have where there is nothing, is none."""
        try:
            text = "" if record.get(key, "") is None else text_of(record, key)
        except RecordError as error:
            hint = "" if key in record else "; choose with --json-keys"
            self.fail(Problem(place, f"{error}{hint}"), on_error)
            return
        if text:
            self.texts.append(text)
        else:
            self.account.skipped[NO_TEXT] += 1

    def fail(self, problem: Problem, on_error: OnError) -> None:
        if on_error == "stop":
            raise UsageError(f"{problem} (--on-error skip leaves such records out)")
        self.account.fail(problem)


def _read(chunk: Chunk, encoding: Encoding) -> dict[str, _Column]:
    columns = {key: _Column() for key in encoding.keys}
    make = made_text(encoding.handler)
    for record in records(chunk):
        if isinstance(record, Problem):
            _fail(columns, record, encoding.on_error)
            continue
        place, value = record
        if make is not None:
            try:
                value = make(value)
            except RecordError as error:
                _fail(columns, Problem(place, str(error)), encoding.on_error)
                continue
        for key, column in columns.items():
            column.take(key, value, place, encoding.on_error)
    return columns


def _fail(columns: Mapping[str, _Column], problem: Problem, on_error: OnError) -> None:
    for column in columns.values():
        column.fail(problem, on_error)


def _encode(column: _Column, encoding: Encoding, encoder: Encoder, dtype: np.dtype[Any]) -> Tokens:
    texts, sequences = column.texts, None
    if encoding.split_sentences:
        split = [split_sentences(t, keep_newlines=encoding.keep_newlines) for t in texts]
        sequences = np.fromiter(map(len, split), np.int64, len(split))
        ids, lengths = encoder.encode([sentence for document in split for sentence in document])
    else:
        ids, lengths = encoder.encode(texts)
    tokens = Tokens(
        ids,
        lengths,
        sequences,
        text_bytes=np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts)),
        digests=digests(texts) if encoding.deduplicate else None,
        account=column.account,
    )
    tokens = _without_empty(tokens)
    if encoding.append_eod and encoder.tokenizer.eod is not None:
        tokens = _with_eod(tokens, encoder.tokenizer.eod)
    if encoding.seq_length is not None:
        reason = too_long(encoding.seq_length)
        tokens = _keep(tokens, tokens.document_lengths < encoding.seq_length, reason)
    tokens.account.written = len(tokens.text_bytes)
    return tokens._replace(tokens=tokens.tokens.astype(dtype, copy=False))


def _without_empty(tokens: Tokens) -> Tokens:
    """Leave out documents and sequences that gave no token."""
    tokens = _keep(tokens, tokens.document_lengths > 0, NO_TEXT)
    if tokens.sequences is None or tokens.lengths.all():
        return tokens
    full = _sums((tokens.lengths > 0).astype(np.int64), tokens.sequences)
    return tokens._replace(lengths=tokens.lengths[tokens.lengths > 0], sequences=full)


def _with_eod(tokens: Tokens, eod: int) -> Tokens:
    """End every document with `eod`."""
    ends = np.cumsum(tokens.document_lengths)
    lengths = tokens.lengths.copy()
    sequences = np.ones_like(ends) if tokens.sequences is None else tokens.sequences
    lengths[np.cumsum(sequences) - 1] += 1
    return tokens._replace(tokens=np.insert(tokens.tokens, ends, eod), lengths=lengths)


def _keep(tokens: Tokens, keep: NDArray[np.bool_], otherwise: str) -> Tokens:
    """Keep some of the documents and count the others."""
    if not keep.all():
        tokens.account.skipped[otherwise] += int((~keep).sum())
    return keep_documents(tokens, keep)


def _sums(values: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of consecutive groups of values, each of so many."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
    ends = np.cumsum(numbers)
    return before[ends] - before[ends - numbers]


def _dtype(wanted: TokenDtype, tokenizer: Tokenizer) -> np.dtype[Any]:
    if wanted == "auto":
        return token_dtype(tokenizer.vocab_size)
    if wanted == "uint16" and tokenizer.vocab_size > 1 << 16:
        raise UsageError(
            f"--token-dtype uint16: holds ids below {1 << 16:,}, "
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size:,}"
        )
    return np.dtype("<u2" if wanted == "uint16" else "<i4")


def _facts(tokenizer: Tokenizer, encoder: Encoder, dtype: np.dtype[Any]) -> TokenizerFacts:
    name = "gigatoken" if encoder.fast else tokenizer.kind
    choice = f"encoding with {name}: {encoder.reason}" if encoder.reason else None
    return TokenizerFacts(TokenizerInfo.of(tokenizer), dtype.name, choice)
