"""`ml-data pretrain`: text files to token files.

This process cuts the files into chunks, worker processes encode them, and this process writes the
tokens in the order of the text: the files are the same for any number of workers, and appear all at
once when everything has worked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ml_data.account import OnError
from ml_data.atomic import FileSet, exit_on_sigterm
from ml_data.destination import Destination
from ml_data.pretraining.corpus import Corpus, CorpusWriter
from ml_data.pretraining.encoding import Encoding, TokenDtype, make_encoder, sample_texts
from ml_data.pretraining.fast import Backend, FastBackendError
from ml_data.pretraining.pretrain_text import MADE, PretrainHandler
from ml_data.progress import Done, Progress, show_progress, silent
from ml_data.reading import TextDocument, find_files, read_chunks
from ml_data.tokenizer import TokenizerConfig
from ml_data.workers import map_ordered
from ml_models.flags import UsageError, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Input."""

    input: tuple[str, ...]
    """Files (.jsonl, .json, .txt, .md, .rst, .csv, .parquet, .arrow; texts also with .gz or .zst),
    directories, glob patterns."""
    json_keys: tuple[str, ...] = (MADE,)
    """Columns that hold text; each gives its own dataset."""
    handler_name: PretrainHandler = "GeneralPretrainHandler"
    """Take the columns as they are, or make one text of an Alpaca or Stack Overflow record."""
    document: TextDocument = "per-file"
    """What one document is in a text file."""
    on_error: OnError = "stop"
    """What a record that cannot be used does: end the run, or be counted and left out."""
    deduplicate: bool = False
    """Leave out, and count, documents whose text was there before (16 bytes of memory for each)."""

    def __post_init__(self) -> None:
        for key in self.json_keys:
            if not key or os.sep in key or self.json_keys.count(key) > 1:
                raise ValueError(
                    f"--json-keys {key!r}: a key is given once, and is part of a file name"
                )
        if not self.json_keys or not self.input:
            raise ValueError("--input and --json-keys need at least one value each")
        if self.handler_name != "GeneralPretrainHandler" and self.json_keys != (MADE,):
            raise ValueError(
                f"--json-keys: --handler-name {self.handler_name} makes the key {MADE!r} itself"
            )


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """Tokens."""

    tokenizer_backend: Backend = "auto"
    """What encodes; auto: gigatoken where it is installed and gives the tokenizer's ids."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-text token."""
    seq_length: int | None = None
    """Leave out, and count, documents of at least so many tokens."""
    split_sentences: bool = False
    """Make every sentence a sequence of its document (for BERT); by a rule, not by NLTK."""
    keep_newlines: bool = False
    """Leave the white space between sentences at the end of the one before."""
    token_dtype: TokenDtype = "auto"
    """Type of a token on disk; auto: Megatron's choice, uint16 for a vocabulary below 65,500."""

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 1:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 1")
        if self.keep_newlines and not self.split_sentences:
            raise ValueError("--keep-newlines: is of --split-sentences, which is not given")


@dataclass(frozen=True, kw_only=True)
class Output(Destination):
    """Output."""

    output_prefix: str
    """The datasets are PREFIX_KEY_document.bin and .idx (PREFIX_KEY_sentence with
    --split-sentences), with a description in .json."""
    histogram: bool = False
    """Show how long the documents are."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Text files (JSON lines, plain text, tables) to the token files that Megatron trains on."""

    source: Source
    tokenizer: TokenizerConfig
    tokenization: Tokenization
    output: Output

    @property
    def encoding(self) -> Encoding:
        """What the workers need to know."""
        source, tokenization = self.source, self.tokenization
        return Encoding(
            tokenizer=self.tokenizer,
            backend=tokenization.tokenizer_backend,
            handler=source.handler_name,
            keys=source.json_keys,
            on_error=source.on_error,
            split_sentences=tokenization.split_sentences,
            keep_newlines=tokenization.keep_newlines,
            append_eod=tokenization.append_eod,
            seq_length=tokenization.seq_length,
            dtype=tokenization.token_dtype,
            deduplicate=source.deduplicate,
        )


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(PretrainConfig, argv, prog=prog)
    files = find_files(config.source.input)
    total = sum(path.stat().st_size for path in files)
    with exit_on_sigterm(), show_progress(total, config.output.log_interval) as progress:
        corpora = _preprocess(config, files, progress)
    for corpus in corpora:
        for line in corpus.summary(histogram=config.output.histogram):
            logger.info("%s", line)
    return 0


def preprocess(config: PretrainConfig, progress: Progress = silent) -> list[Corpus]:
    """Write the datasets of all keys and return what they are.

    Raises:
        UsageError: an input or the tokenizer is missing or not as it should be, or there is no text
            at all.
        OSError: the files cannot be written, or a worker died.
    """
    return _preprocess(config, find_files(config.source.input), progress)


def _preprocess(config: PretrainConfig, files: Sequence[Path], progress: Progress) -> list[Corpus]:
    encoding = config.encoding
    try:
        return _write(config, encoding, files, progress)
    except FastBackendError as error:
        if encoding.backend == "gigatoken":
            raise UsageError(f"--tokenizer-backend gigatoken: {error}") from error
        logger.warning("%s: beginning again with the tokenizer's own library", error)
        patient = dataclasses.replace(encoding, backend="tokenizers")
        return _write(config, patient, files, progress)


def _write(
    config: PretrainConfig, encoding: Encoding, inputs: Sequence[Path], progress: Progress
) -> list[Corpus]:
    chunks = chain.from_iterable(read_chunks(path, config.source.document) for path in inputs)
    first = next(chunks, None)
    if first is None:
        keys = " ".join(encoding.keys)
        raise UsageError(f"--input: no document with text under --json-keys {keys}: no records")
    task = (encoding, sample_texts(first, encoding))
    encoded = map_ordered(
        make_encoder, task, chain([first], chunks), workers=config.output.processes
    )
    prefix = Path(config.output.output_prefix).expanduser()
    with FileSet() as files, contextlib.closing(encoded):
        writers: list[CorpusWriter] = []
        for chunk in encoded:
            if not writers:
                if chunk.tokenizer.choice:
                    logger.info("%s", chunk.tokenizer.choice)
                writers = [CorpusWriter(prefix, key, encoding, chunk.tokenizer, files)
                           for key in encoding.keys]  # fmt: skip
            for writer in writers:
                writer.add(chunk.keys[writer.key])
            first_key = chunk.keys[encoding.keys[0]]
            text_bytes = sum(int(tokens.text_bytes.sum()) for tokens in chunk.keys.values())
            progress(Done(chunk.consumed, len(first_key.text_bytes), text_bytes))
        corpora = [writer.finish() for writer in writers]
        files.publish()
    return corpora
