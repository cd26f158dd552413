"""What a worker of `ml-data pretrain` does: a chunk of a file in, tokens as arrays out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.documents import Chunk, parse
from ml_data.indexed import token_dtype
from ml_data.tokenizer import TokenizerType, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How documents become tokens."""

    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default from what is there."""
    keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose values are tokenized, each into its own dataset."""
    append_eod: bool = False
    """End every document with the end-of-document token."""
    seq_length: int | None = None
    """Leave out documents of at least so many tokens."""


class Tokens(NamedTuple):
    """Documents of one key."""

    tokens: NDArray[Any]
    """(sum of lengths,), the documents back to back."""
    lengths: NDArray[np.int32]
    """(documents,)."""
    text_bytes: int
    """UTF-8 size of the documents' texts."""
    empty: int
    """Documents left out because they have no text."""
    too_long: int
    """Documents left out because of `seq_length`."""


class EncodedChunk(NamedTuple):
    """The tokens of a chunk, of each key."""

    keys: Mapping[str, Tokens]
    consumed: int
    """Bytes of the file that the chunk took."""


def make_encoder(encoding: Encoding) -> Callable[[Chunk], EncodedChunk]:
    """Load the tokenizer and return the function that encodes a chunk with it."""
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.tokenizer_type)
    ending = [tokenizer.eod] if encoding.append_eod and tokenizer.eod is not None else []
    dtype = token_dtype(tokenizer.vocab_size)
    limit = encoding.seq_length or np.inf

    def encode(texts: list[str]) -> Tokens:
        full = [text for text in texts if text]
        documents = [ids + ending for ids in tokenizer.encode_batch(full)] if full else []
        kept = [(text, ids) for text, ids in zip(full, documents, strict=True) if len(ids) < limit]
        lengths = np.fromiter((len(ids) for _, ids in kept), np.int32, len(kept))
        return Tokens(
            np.fromiter(chain.from_iterable(ids for _, ids in kept), dtype, int(lengths.sum())),
            lengths,
            text_bytes=sum(len(text.encode()) for text, _ in kept),
            empty=len(texts) - len(full),
            too_long=len(full) - len(kept),
        )

    def encode_chunk(chunk: Chunk) -> EncodedChunk:
        texts = parse(chunk, encoding.keys)
        return EncodedChunk({key: encode(texts[key]) for key in encoding.keys}, chunk.consumed)

    return encode_chunk
