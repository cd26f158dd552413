"""Tokenizers that the library `tokenizers` encodes, from a `tokenizer.json` or built here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ml_data.tokenizer import slow
from ml_data.tokenizer.protocol import Loaded, Tokenizer
from ml_data.tokenizer.special_tokens import SpecialIds, SpecialTokens
from ml_models.flags import UsageError

if TYPE_CHECKING:
    import tokenizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastTokenizer(Loaded):
    """A `tokenizers.Tokenizer`, complete with what it puts around a text."""

    backend: tokenizers.Tokenizer

    def token_id(self, token: str) -> int | None:
        """Return the id of a token."""
        return self.backend.token_to_id(token)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encode = self.backend.encode_batch_fast
        return [e.ids for e in encode(texts, add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        if skip_special_tokens:
            special = frozenset(self.special_tokens.values())
            ids = (id_ for id_ in ids if id_ not in special)
        return self.backend.decode([int(id_) for id_ in ids], skip_special_tokens=False)


def load(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        UsageError: it is not one.
    """
    import tokenizers

    content = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    special = SpecialTokens.read(path.parent)
    if not vocabulary.keys() >= {*special.roles.values(), *special.added}:
        # Tokens that only the other files name get their ids when transformers adds them.
        return slow.load(path.parent)
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder().items()
    ids = special.ids(vocabulary)
    roles = {token: vocabulary[token] for token in special.roles.values()}
    return FastTokenizer(
        path=str(path),
        kind="tokenizers",
        identity=f"tokenizers-{hashlib.sha256(content).hexdigest()}",
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        **ids._asdict(),
        special_tokens={token.content: id_ for id_, token in added if token.special} | roles,
        backend=backend,
    )


def put_around(backend: tokenizers.Tokenizer, ids: SpecialIds, special: SpecialTokens) -> str:
    """Let texts begin and end as `special` says; return a description for the identity."""
    import tokenizers

    before = ids.bos if special.add_bos else None
    after = ids.eod if special.add_eos else None
    if before is not None or after is not None:
        names = {"<before>": before, "<after>": after}
        known = [(name, id_) for name, id_ in names.items() if id_ is not None]
        pieces = ["<before>"] * (before is not None) + ["$A"] + ["<after>"] * (after is not None)
        backend.post_processor = tokenizers.processors.TemplateProcessing(pieces, None, known)
    return f"{before}-{after}"
