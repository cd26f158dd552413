"""The flags that name a tokenizer, the same for every command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ml_data.tokenizer.loading import FILES, TokenizerType, load_tokenizer
from ml_data.tokenizer.protocol import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"aliases": ("--tokenizer-model",)}
    )
    """Directory or file of a tokenizer: Hugging Face, sentencepiece or tiktoken."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default what is there decides."""
    vocab_file: Path | None = None
    """Vocabulary of GPT2BPETokenizer (.json) and of BertWordPiece... (.txt)."""
    merge_file: Path | None = None
    """Merges of GPT2BPETokenizer (.txt)."""
    tokenizer_not_use_fast: bool = False
    """Encode with sentencepiece itself where there is a sentencepiece model; the ids of other
    tokenizers do not depend on this."""

    def __post_init__(self) -> None:
        if self.tokenizer_name_or_path is None and self.vocab_file is None:
            raise ValueError("missing --tokenizer-name-or-path")
        for name in ("vocab_file", "merge_file"):
            file = getattr(self, name)
            if file is not None and name not in FILES.get(self.tokenizer_type, ()):
                types = " or ".join(str(one) for one, names in FILES.items() if name in names)
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {file}: is read with --tokenizer-type {types} only")

    def load(self) -> Tokenizer:
        """Load the tokenizer.

        Raises:
            UsageError: there is none, or not of the type.
        """
        return load_tokenizer(
            self.tokenizer_name_or_path,
            self.tokenizer_type,
            vocab_file=self.vocab_file,
            merge_file=self.merge_file,
            use_fast=not self.tokenizer_not_use_fast,
        )
