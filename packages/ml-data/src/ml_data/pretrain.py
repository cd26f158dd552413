"""`ml-data pretrain`: text files to token files.

This process cuts the files into chunks, worker processes encode them, and this process writes the
tokens in the order of the text: the files are the same for any number of workers, and appear all at
once when everything has worked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np

from ml_data.atomic import FileSet, naming
from ml_data.documents import Chunk, TextDocument, find_files, read_chunks
from ml_data.encoding import Encoding, Tokens, make_encoder
from ml_data.indexed import IndexedDatasetWriter, token_dtype
from ml_data.progress import Done, Progress, show_progress, silent
from ml_data.sidecar import CorpusInfo, sidecar_path, to_json, unigram_entropy
from ml_data.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from ml_data.workers import available_cpus, map_ordered
from ml_models.flags import UsageError, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Input."""

    input: tuple[str, ...]
    """Files (.jsonl, .json, .txt, .md, .rst, each also with .gz), directories, glob patterns."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON objects whose values are text; each gives its own dataset."""
    document: TextDocument = "per-file"
    """What one document is in a text file."""

    def __post_init__(self) -> None:
        for key in self.json_keys:
            if not key or os.sep in key or self.json_keys.count(key) > 1:
                raise ValueError(
                    f"--json-keys {key!r}: a key is given once, and is part of a file name"
                )
        if not self.json_keys or not self.input:
            raise ValueError("--input and --json-keys need at least one value each")


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """Tokenizer."""

    tokenizer_name_or_path: str = field(metadata={"aliases": ("--tokenizer-model",)})
    """Directory or file of a tokenizer: Hugging Face or sentencepiece."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default what is there decides."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-text token."""
    seq_length: int | None = None
    """Leave out, and count, documents of at least so many tokens."""

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 1:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Output."""

    output_prefix: str
    """The datasets are PREFIX_KEY_document.bin and .idx, with a description in .json."""
    workers: int | None = None
    """Processes that tokenize; by default one for each processor."""
    log_interval: int = 10_000
    """Without a terminal, documents between two lines of progress."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be at least 1")
        if self.log_interval < 1:
            raise ValueError(f"--log-interval {self.log_interval}: must be at least 1")
        if not Path(self.output_prefix).name or self.output_prefix.endswith(os.sep):
            raise ValueError(
                f"--output-prefix {self.output_prefix!r}: must end in a file name, not a directory"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Text files (JSON lines, JSON, plain text) to the token files that Megatron trains on."""

    source: Source
    tokenization: Tokenization
    output: Output

    @property
    def encoding(self) -> Encoding:
        """What the workers need to know."""
        return Encoding(
            tokenizer=self.tokenization.tokenizer_name_or_path,
            tokenizer_type=self.tokenization.tokenizer_type,
            keys=self.source.json_keys,
            append_eod=self.tokenization.append_eod,
            seq_length=self.tokenization.seq_length,
        )


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(PretrainConfig, argv, prog=prog)
    total = sum(path.stat().st_size for path in find_files(config.source.input))
    before = signal.signal(signal.SIGTERM, _exit)  # so that nothing is left behind
    try:
        with show_progress(total, config.output.log_interval) as progress:
            infos = preprocess(config, progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    for info in infos:
        logger.info("%s", summary(config, info))
    return 0


def preprocess(config: PretrainConfig, progress: Progress = silent) -> list[CorpusInfo]:
    """Write the datasets of all keys and return their descriptions.

    Raises:
        UsageError: an input or the tokenizer is missing or not as it should be, or there is no text
            at all.
        OSError: the files cannot be written, or a worker died.
    """
    tokenizer = load_tokenizer(config.encoding.tokenizer, config.encoding.tokenizer_type)
    if config.encoding.append_eod and tokenizer.eod is None:
        raise UsageError(
            f"--append-eod: tokenizer {tokenizer.path} has no end-of-text token "
            "(eos_token in tokenizer_config.json)"
        )
    chunks = _all_chunks(config.source)
    workers = config.output.workers or available_cpus()
    with FileSet() as files:
        datasets = [_Dataset(config, key, tokenizer, files) for key in config.source.json_keys]
        encoded = map_ordered(make_encoder, (config.encoding,), chunks, workers=workers)
        with contextlib.closing(encoded):
            for chunk in encoded:
                for dataset in datasets:
                    dataset.add(chunk.keys[dataset.key])
                sizes = [chunk.keys[dataset.key] for dataset in datasets]
                text_bytes = sum(tokens.text_bytes for tokens in sizes)
                progress(Done(chunk.consumed, len(sizes[0].lengths), text_bytes))
        infos = [dataset.finish() for dataset in datasets]
        files.publish()
    return infos


def summary(config: PretrainConfig, info: CorpusInfo) -> str:
    """Return a line for people about a dataset that was written."""
    left_out = f"; left out {info.empty_documents:,} without text" if info.empty_documents else ""
    if info.too_long_documents:
        left_out += f"; left out {info.too_long_documents:,} of {info.seq_length:,} tokens or more"
    return (
        f"{_prefix(config, info.key)}: {info.documents:,} documents, "
        f"{info.tokens:,} tokens ({info.dtype}), {info.text_bytes / 1e6:.2f} MB of text, "
        f"unigram entropy {info.unigram_entropy:.3f} nats a token{left_out}"
    )


class _Dataset:
    """The dataset of one key, while it is written."""

    def __init__(
        self, config: PretrainConfig, key: str, tokenizer: Tokenizer, files: FileSet
    ) -> None:
        self.key = key
        self._config = config
        self._tokenizer = tokenizer
        self._files = files
        dtype = token_dtype(tokenizer.vocab_size)
        self._writer = IndexedDatasetWriter(_prefix(config, key), dtype, files)
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._sums = dict.fromkeys(("documents", "empty", "too_long", "text_bytes"), 0)

    def add(self, tokens: Tokens) -> None:
        self._writer.add_documents(tokens.tokens, tokens.lengths)
        self._counts += np.bincount(tokens.tokens, minlength=len(self._counts))
        self._sums["documents"] += len(tokens.lengths)
        for name in ("empty", "too_long", "text_bytes"):
            self._sums[name] += getattr(tokens, name)

    def finish(self) -> CorpusInfo:
        """Write the description and the index."""
        info = self._info()
        path = sidecar_path(self._writer.prefix)
        with naming(path):
            self._files.create(path).write(to_json(info).encode())
        self._writer.write_index()
        return info

    def _info(self) -> CorpusInfo:
        sums, tokenizer, encoding = self._sums, self._tokenizer, self._config.encoding
        if not sums["documents"]:
            raise UsageError(
                f"--input: no document with text under --json-keys {self.key} "
                f"({sums['empty']} without text, {sums['too_long']} left out by --seq-length)"
            )
        return CorpusInfo(
            tokenizer=tokenizer.path,
            tokenizer_kind=tokenizer.kind,
            tokenizer_identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            eod=tokenizer.eod,
            pad=tokenizer.pad,
            append_eod=encoding.append_eod,
            key=self.key,
            documents=sums["documents"],
            empty_documents=sums["empty"],
            too_long_documents=sums["too_long"],
            seq_length=encoding.seq_length,
            tokens=int(self._counts.sum()),
            text_bytes=sums["text_bytes"],
            unigram_entropy=unigram_entropy(self._counts),
            dtype=self._writer.dtype.name,
            bin_bytes=self._writer.bin_bytes,
            bin_sha256=self._writer.bin_sha256,
            created_by=f"ml-data {version('ml-data')}",
        )


def _prefix(config: PretrainConfig, key: str) -> str:
    return f"{Path(config.output.output_prefix).expanduser()}_{key}_document"


def _all_chunks(source: Source) -> Iterator[Chunk]:
    for path in find_files(source.input):
        yield from read_chunks(path, source.document)


def _exit(signum: int, _: object) -> NoReturn:
    sys.exit(128 + signum)
