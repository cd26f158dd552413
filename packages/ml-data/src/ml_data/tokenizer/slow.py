"""Hugging Face directories that only `transformers` reads; a tokenizer's own code never runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_data.tokenizer.protocol import Loaded, Tokenizer
from ml_models.flags import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlowTokenizer(Loaded):
    """A tokenizer class of transformers."""

    backend: Any
    vocabulary: Mapping[str, int] = dataclasses.field(repr=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token."""
        return self.vocabulary.get(token)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        options = {"return_attention_mask": False, "verbose": False}
        encoded = self.backend(texts, add_special_tokens=add_special_tokens, **options)
        return list(encoded["input_ids"])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def load(path: Path) -> Tokenizer:
    """Load the tokenizer in a directory.

    Raises:
        UsageError: transformers cannot.
    """
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # every tokenizer class raises its own
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"tokenizer {path}: transformers cannot load it ({reason})") from error
    # Without its vocabulary, transformers makes a tokenizer that knows no word, and is silent.
    files = sorted(backend.vocab_files_names.values())
    if files and not any((path / name).exists() for name in files):
        raise UsageError(
            f"tokenizer {path}: {type(backend).__name__} needs one of {', '.join(files)} there"
        )
    vocabulary = backend.get_vocab()
    probe = json.dumps([sorted(vocabulary.items()), backend(["a"])["input_ids"]])
    added = backend.added_tokens_decoder.items()
    return SlowTokenizer(
        path=str(path),
        kind="transformers",
        identity=f"transformers-{hashlib.sha256(probe.encode()).hexdigest()}",
        vocab_size=max(vocabulary.values()) + 1,
        bos=backend.bos_token_id,
        eod=backend.eos_token_id,
        pad=backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id,
        special_tokens={token.content: id_ for id_, token in added if token.special},
        backend=backend,
        vocabulary=vocabulary,
    )
