"""One dataset of `ml-data pretrain` while it is written, and what it has become."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_data.account import Account
from ml_data.atomic import FileSet, naming
from ml_data.description import to_json
from ml_data.histogram import Histogram
from ml_data.indexed import IndexedDatasetWriter
from ml_data.pretraining.duplicates import SeenTexts
from ml_data.pretraining.encoding import (
    NO_TEXT,
    Encoding,
    TokenizerFacts,
    Tokens,
    keep_documents,
    too_long,
)
from ml_data.sidecar import CorpusInfo, Level, sidecar_path, unigram_entropy
from ml_models.flags import UsageError

DUPLICATE = "text was there before"


class Corpus(NamedTuple):
    """A dataset that was written."""

    prefix: str
    info: CorpusInfo
    account: Account
    lengths: Histogram

    def summary(self, *, histogram: bool) -> Iterator[str]:
        """Yield lines for people: what was written, and what became of every record."""
        info = self.info
        sentences = f", {info.sequences:,} sentences" if info.level == "sentence" else ""
        yield (
            f"{self.prefix}: {info.documents:,} documents{sentences}, {info.tokens:,} tokens "
            f"({info.dtype}), {info.text_bytes / 1e6:.2f} MB of text, "
            f"unigram entropy {info.unigram_entropy:.3f} nats a token"
        )
        yield from self.account.summary()
        if histogram:
            yield from self.lengths.lines()


class CorpusWriter:
    """Writes the dataset of one key into `files`, which publish it."""

    def __init__(
        self, prefix: Path, key: str, encoding: Encoding, tokenizer: TokenizerFacts, files: FileSet
    ) -> None:
        self.key = key
        self._encoding = encoding
        self._tokenizer = tokenizer.info
        self._files = files
        self._level: Level = "sentence" if encoding.split_sentences else "document"
        self._writer = IndexedDatasetWriter(
            f"{prefix}_{key}_{self._level}", tokenizer.dtype, self._files
        )
        self._counts = np.zeros(tokenizer.info.vocab_size, np.int64)
        self._account = Account()
        self._lengths = Histogram()
        self._seen = SeenTexts() if encoding.deduplicate else None
        self._sequences = self._text_bytes = 0

    def add(self, tokens: Tokens) -> None:
        """Append the documents of a chunk."""
        self._account.add(tokens.account)
        if self._seen is not None and tokens.digests is not None:
            new = self._seen.add(tokens.digests)
            if duplicates := int((~new).sum()):
                self._account.written -= duplicates
                self._account.skipped[DUPLICATE] += duplicates
            tokens = keep_documents(tokens, new)
        self._writer.add_documents(tokens.tokens, tokens.lengths, tokens.sequences)
        self._counts += np.bincount(tokens.tokens, minlength=len(self._counts))
        self._lengths.add(tokens.document_lengths)
        self._sequences += len(tokens.lengths)
        self._text_bytes += int(tokens.text_bytes.sum())

    def finish(self) -> Corpus:
        """Write the index and the description.

        Raises:
            UsageError: There is no document.
        """
        if not self._account.written:
            raise UsageError(
                f"--input: no document with text under --json-keys {self.key}: "
                + next(self._account.summary())
            )
        path = sidecar_path(self._writer.prefix)
        with naming(path):
            description = self._files.create(path)  # before the index, which is published last
            self._writer.write_index()
            info = self._info()
            description.write(to_json(info).encode())
        return Corpus(self._writer.prefix, info, self._account, self._lengths)

    def _info(self) -> CorpusInfo:
        encoding, account = self._encoding, self._account
        return CorpusInfo(
            **vars(self._tokenizer),
            append_eod=encoding.append_eod,
            key=self.key,
            documents=account.written,
            empty_documents=account.skipped[NO_TEXT],
            too_long_documents=account.skipped[too_long(encoding.seq_length)],
            seq_length=encoding.seq_length,
            tokens=int(self._counts.sum()),
            text_bytes=self._text_bytes,
            unigram_entropy=unigram_entropy(self._counts),
            dtype=self._writer.dtype.name,
            bin_bytes=self._writer.bin_bytes,
            bin_sha256=self._writer.bin_sha256,
            created_by=f"ml-data {version('ml-data')}",
            idx_sha256=self._writer.idx_sha256,
            level=self._level,
            sequences=self._sequences,
            duplicate_documents=account.skipped[DUPLICATE],
            failed_records=account.failed,
        )
