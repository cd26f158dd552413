"""The corpora of a run, read and checked before anything is built on them; torch is not needed.

A corpus is PREFIX.bin and PREFIX.idx, with PREFIX.json beside them if `ml-data` made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.indexed import IndexedDataset
from ml_data.instruction.sample_info import SampleInfo
from ml_data.sidecar import CorpusInfo, read_sidecar
from ml_models.flags import UsageError
from ml_train.settings import DataConfig

TokensInfo = CorpusInfo | SampleInfo
"""What `ml-data` notes of the tokens it writes."""

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A corpus on disk that is whole."""

    prefix: str
    """Absolute."""
    lengths: NDArray[np.int32]
    """(documents,), tokens of each."""
    info: CorpusInfo | None
    """What is known of the tokens."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    def fingerprint(self) -> str:
        """Return what changes when samples would be cut elsewhere."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths).data).hexdigest()


class Description(NamedTuple):
    """What is known of a corpus that was not read."""

    prefix: str
    """Absolute."""
    info: TokensInfo | None
    """What is known of the tokens."""


def absolute(prefix: str) -> str:
    """Return the prefix as it is from every directory."""
    return str(Path(prefix).expanduser().absolute())


def read_corpora(config: DataConfig) -> tuple[Corpus, ...]:
    """Open every corpus of a run.

    Raises:
        UsageError: A file is missing, torn or empty.
    """
    return tuple(map(_read, map(absolute, config.prefixes)))


def read_descriptions(config: DataConfig) -> tuple[Description, ...]:
    """Read what is known of the corpora of a run, where another process reads the corpora.

    Raises:
        UsageError: A corpus is missing, or its description damaged.
    """
    return tuple(map(_describe, map(absolute, config.prefixes)))


def common_tokenizer(corpora: Iterable[Corpus | Description]) -> TokensInfo | None:
    """Return the description of a corpus, for its tokenizer, which all corpora must share.

    Corpora without a description are taken to agree; None if there is no other.

    Raises:
        UsageError: Two corpora were made with different tokenizers.
    """
    known = [(corpus.prefix, corpus.info) for corpus in corpora if corpus.info]
    for (prefix, info), (other_prefix, other) in pairwise(known):
        if info.tokenizer_identity != other.tokenizer_identity:
            raise UsageError(
                f"the data was made with different tokenizers: {prefix} with {info.tokenizer}, "
                f"{other_prefix} with {other.tokenizer}"
            )
    return known[0][1] if known else None


def split_bounds(config: DataConfig) -> list[tuple[float, float] | None]:
    """Return which part of the documents, from and to, each split takes; None where none."""
    if not config.data_path:
        return [(0.0, 1.0) if blend else None for blend in config.blends]
    bounds = pairwise(accumulate(config.shares, initial=0.0))
    return [part if share else None for part, share in zip(bounds, config.shares, strict=True)]


def check_splits(
    config: DataConfig, corpora: Sequence[Corpus], *, seq_length: int, samples: Sequence[int]
) -> None:
    """Check that each corpus can give a sample to each split that uses it.

    Megatron would search for the first sample of an empty split for ever.

    Args:
        config: Where the corpora are, and their splits.
        corpora: Those of `config`.
        seq_length: Tokens in a sample.
        samples: How many the run takes of each split; a split of which it takes none may be empty.

    Raises:
        UsageError: A split is shorter than one sample.
    """
    by_prefix = {corpus.prefix: corpus for corpus in corpora}
    splits = zip(SPLITS, config.blends, split_bounds(config), samples, strict=True)
    for name, blend, bounds, wanted in splits:
        if blend and bounds and wanted:
            for prefix in blend.prefixes:
                _check_split(config, by_prefix[absolute(prefix)], name, bounds, seq_length)


def _describe(prefix: str) -> Description:
    if not _exists(prefix):
        _read(prefix)  # says what is wrong
    return Description(prefix, read_sidecar(prefix))


def _read(prefix: str) -> Corpus:
    if Path(f"{prefix}_packed_input_ids_document.idx").exists() and not _exists(prefix):
        raise UsageError(f"{prefix}: is instruction data: give --is-instruction-dataset")
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and not _exists(prefix):
            raise UsageError(f"{prefix}: give the path of a corpus without its {suffix}")
    tokens = IndexedDataset(prefix)
    if not len(tokens.tokens):
        raise UsageError(f"{prefix}.bin: holds no tokens")
    return Corpus(prefix=prefix, lengths=tokens.sequence_lengths, info=read_sidecar(prefix))


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.idx").exists()


def _check_split(
    config: DataConfig, corpus: Corpus, name: str, bounds: tuple[float, float], seq_length: int
) -> None:
    # Rounded as megatron-core does.
    start, stop = (round(bound * len(corpus.lengths)) for bound in bounds)
    tokens = int(corpus.lengths[start:stop].sum(dtype=np.int64))
    if tokens > seq_length:
        return
    where = f"{corpus.prefix} has {tokens} tokens in {stop - start} documents for {name}"
    if config.data_path:
        split = ",".join(f"{share:g}" for share in config.split)
        where += f" (--split {split} of its {len(corpus.lengths)} documents)"
    raise UsageError(
        f"{where}; a sample takes {seq_length + 1}: --seq-length {seq_length} and the token after "
        "it. Give more or shorter documents, or another split"
        + ("" if name == "training" else f", or do without {name}")
    )
