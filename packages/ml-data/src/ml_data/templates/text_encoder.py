"""Text that spells special tokens, for tokenizers that read such spellings as text like any other.

A sentencepiece model does: `</s>` in a text is three letters in brackets. Templates mean the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Tokens of texts, without a BOS or EOS of the tokenizer's own."""

    tokenizer: Tokenizer
    unseen: dict[str, int]
    """Tokens that the tokenizer does not see in text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        if not self.unseen:
            return self._plain(texts)
        spellings = sorted(self.unseen, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, spellings))})")
        parts = [[part for part in pattern.split(text) if part] for text in texts]
        plain = [part for split in parts for part in split if part not in self.unseen]
        ids = dict(zip(plain, self._plain(plain), strict=True))
        ids.update((spelling, [id_]) for spelling, id_ in self.unseen.items())
        return [[id_ for part in split for id_ in ids[part]] for split in parts]

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts, add_special_tokens=False) if texts else []


def text_encoder(tokenizer: Tokenizer, spellings: Iterable[str]) -> TextEncoder:
    """Return an encoder that sees each of `spellings` that is in the vocabulary."""
    ids = {text: id_ for text in spellings if (id_ := tokenizer.token_id(text)) is not None}
    batch = TextEncoder(tokenizer, {}).encode([f"a{text}a" for text in ids])
    unseen = {
        text: id_ for (text, id_), seen in zip(ids.items(), batch, strict=True) if id_ not in seen
    }
    return TextEncoder(tokenizer, unseen)
