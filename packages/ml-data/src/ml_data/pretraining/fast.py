"""Texts to arrays of ids, by `tokenizers` or, where it gives the same ids, by `gigatoken`.

gigatoken encodes byte-level and sentencepiece BPE some fifty times as fast, but it is young and
knows only some tokenizers. So it is used after it has given the ids of `tokenizers` for a sample of
the input and for texts that are hard to encode; and as long as it gives them for a piece of every
chunk of the input. The first difference ends its use. Texts with characters that are newer than
Python's Unicode are left to the tokenizer: only one of the two may know them as letters.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from ml_data.tokenizer import Tokenizer
from ml_models.flags import UsageError

Backend = Literal["auto", "tokenizers", "gigatoken"]
"""Which library encodes; `tokenizers` stands for the one that the tokenizer's format asks for."""

_SAMPLE_CHARACTERS = 1 << 17
_PIECE_CHARACTERS = 1 << 12
_LETTERS = 0x34000
"""Below are all letters; above only marks, which are rare, and what Unicode has not given out."""


class FastBackendError(UsageError):
    """gigatoken cannot be used for this tokenizer and this text; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What encodes the texts of a job."""

    tokenizer: Tokenizer
    fast: FastEncoder | None
    """gigatoken, where it is used."""
    reason: str
    """Why this one, where that was not given."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the ids of all texts, back to back, and the number of ids of each.

        Raises:
            FastBackendError: gigatoken gave other ids than `tokenizers` for a piece of these texts.
        """
        if self.fast is None:
            return _flat(self.tokenizer.encode_batch(texts))
        if texts:
            self.fast.check([max(texts[:100], key=len)[:_PIECE_CHARACTERS]])
        return self.fast.encode(texts)


def beginning(texts: Iterable[str]) -> list[str]:
    """Return a sample of texts, in which none takes more than a quarter."""
    sample: list[str] = []
    left = _SAMPLE_CHARACTERS
    for text in texts:
        if left <= 0:
            break
        sample.append(text[: _SAMPLE_CHARACTERS // 4])
        left -= len(sample[-1])
    return sample


def make_encoder_for(tokenizer: Tokenizer, backend: Backend, sample: Sequence[str]) -> Encoder:
    """Return the fastest encoder that `backend` allows and that is right for a sample of the texts.

    Raises:
        FastBackendError: gigatoken was asked for and cannot be used.
    """
    if backend == "tokenizers":
        return Encoder(tokenizer=tokenizer, fast=None, reason="")
    try:
        fast = FastEncoder(tokenizer)
        fast.check([*_hard_texts(tokenizer), *sample])
    except FastBackendError as error:
        if backend == "gigatoken":
            raise
        return Encoder(tokenizer=tokenizer, fast=None, reason=str(error))
    reason = "it gives the tokenizer's ids for a sample of the input"
    return Encoder(tokenizer=tokenizer, fast=fast, reason=reason)


class FastEncoder:
    """gigatoken, with the tokens that the tokenizer puts around a text.

    Raises:
        FastBackendError: It is not installed, or does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError:
            raise FastBackendError(
                "gigatoken is not installed (pip install 'ml-data[fast]')"
            ) from None
        description = getattr(getattr(tokenizer, "backend", None), "to_str", None)
        if description is None:
            raise FastBackendError(f"gigatoken does not read tokenizers of {tokenizer.kind}")
        self._tokenizer = tokenizer
        try:
            self._fast = load_hf_json(description())
        except BaseException as error:
            _refuse("gigatoken cannot load the tokenizer", error)
        self._before, self._after = _around(tokenizer)
        self._known = np.zeros(0x110000, np.bool_)
        self._known[:_LETTERS] = [_is_known(chr(code)) for code in range(_LETTERS)]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the ids of all texts, back to back, and the number of ids of each."""
        try:
            parts = [self._encode(text) for text in texts]
        except BaseException as error:
            _refuse("gigatoken failed", error)
        around = len(self._before) + len(self._after)
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)) + around
        if around:
            parts = [part for ids in parts for part in (self._before, ids, self._after)]
        return np.concatenate([np.zeros(0, np.uint32), *parts]), lengths

    def _encode(self, text: str) -> NDArray[Any]:
        if text.isascii() or self._known[np.frombuffer(text.encode("utf-32-le"), "<u4")].all():
            ids: NDArray[Any] = self._fast.encode(text)
            return ids
        return np.array(self._tokenizer.encode_batch([text], add_special_tokens=False)[0], "u4")

    def check(self, texts: Sequence[str]) -> None:
        """Compare with the tokenizer.

        Raises:
            FastBackendError: The ids of one of the texts differ.
        """
        ids, lengths = self.encode(texts)
        theirs = self._tokenizer.encode_batch(texts)
        for text, ours, right in zip(
            texts, np.split(ids, np.cumsum(lengths)), theirs, strict=False
        ):
            if ours.tolist() != right:
                shown = text if len(text) < 50 else f"{text[:50]}..."
                raise FastBackendError(
                    f"gigatoken gives other ids than the tokenizer for {shown!r}"
                )


def _is_known(character: str) -> bool:
    """Whether this Python's Unicode has the character."""
    return unicodedata.category(character) != "Cn"


def _flat(batch: Sequence[Sequence[int]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    return np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum())), lengths


def _around(tokenizer: Tokenizer) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the ids that the tokenizer puts before and after every text."""
    (bare,) = tokenizer.encode_batch(["a"], add_special_tokens=False)
    (full,) = tokenizer.encode_batch(["a"])
    starts = range(len(full) - len(bare) + 1)
    start = next((n for n in starts if full[n : n + len(bare)] == bare), None)
    if start is None:
        raise FastBackendError("gigatoken does not know what the tokenizer puts around a text")
    before, after = full[:start], full[start + len(bare) :]
    return np.array(before, np.uint32), np.array(after, np.uint32)


def _refuse(what: str, error: BaseException) -> NoReturn:
    """Raise FastBackendError; what gigatoken raises in a panic is not even an Exception."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    raise FastBackendError(f"{what} ({reason})") from None


def _hard_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts that bring out differences of rules, Unicode versions, special tokens."""
    yield from (
        "",
        " ",
        "\n\n \t\r\n",
        "a  b   c    \n  d",
        "I'LL they're don'T 'S",
        "١٢٣ 1234567 ½²",
    )
    yield from (
        "e\u0301 é ﬁ Ⅷ \uff46\uff55",
        "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
        "\u3000\u2028\x85\xa0\u200b\ufeff",
        "中文。日本語\uff01 한국어",
    )
    yield "".join(map(chr, range(128)))
    added = getattr(tokenizer, "backend").get_added_tokens_decoder().values()  # noqa: B009
    yield " ".join(token.content for token in added)
    yield "x".join(f"{token.content} \n{token.content}" for token in added)
    chosen = random.Random(0)
    planes = ((0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0, 0x250))
    for low, high in planes * 8:
        characters = filter(_is_known, (chr(chosen.randrange(low, high)) for _ in range(64)))
        between = chosen.choices(("", "", " ", "a", "1", "\n"), k=64)
        yield "".join(map("".join, zip(characters, between, strict=False)))
