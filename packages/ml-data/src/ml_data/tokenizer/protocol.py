"""What this repository asks of a tokenizer, whatever library encodes.

Which token ends or pads a text is one rule for all of them: what the files beside the vocabulary
name (`special_tokens.py`), else what the vocabulary itself says, and a tokenizer without a padding
token pads with the one that ends a document.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ml_models.flags import UsageError


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def path(self) -> str:
        """Where it was loaded from."""

    @property
    def kind(self) -> str:
        """The library whose ids these are."""

    @property
    def identity(self) -> str:
        """Equal only for tokenizers that give the same ids: a hash."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text."""

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document: the tokenizer's EOS."""

    @property
    def pad(self) -> int | None:
        """Id of the padding token, or of EOS in a tokenizer without one."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Tokens that mark something and are left out of decoded text."""

    def token_id(self, token: str) -> int | None:
        """Return the id of exactly this token, special or not; None without such a token."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text, by default within the tokenizer's own BOS or EOS.

        Surrogates, which no text in UTF-8 has, become U+FFFD, as in tiktoken.
        """

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, by default without special tokens."""


def required_eod(tokenizer: Tokenizer, flag: str) -> int:
    """Return the id of the token that ends a document.

    Raises:
        UsageError: there is none; `flag` is what asks for it.
    """
    if tokenizer.eod is None:
        raise UsageError(
            f"{flag}: tokenizer {tokenizer.path} has no end-of-text token; name one of its tokens "
            "as eos_token in the tokenizer_config.json beside it"
        )
    return tokenizer.eod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded(abc.ABC):
    """The members of `Tokenizer` that do not depend on the library."""

    path: str
    kind: str
    identity: str
    vocab_size: int
    bos: int | None
    eod: int | None
    pad: int | None
    special_tokens: Mapping[str, int] = dataclasses.field(repr=False)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text."""
        batch = list(texts)
        try:
            return self._encode(batch, add_special_tokens)
        except TypeError:  # what the libraries say to text with surrogates
            valid = [_without_surrogates(text) for text in batch]
            if valid == batch:
                raise
            return self._encode(valid, add_special_tokens)

    @abc.abstractmethod
    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Encode texts that are valid Unicode."""


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
