"""The `.json` beside a dataset: which tokenizer made it, its size, how hard it is to predict.

`.bin` and `.idx` say nothing about where the tokens came from. With it a training run can refuse a
model whose vocabulary is too small, find the ids of the special tokens, and compare its loss with
the entropy of the tokens' frequencies.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ml_data.description import TokenizerInfo, check_size, known, read_description

Level = Literal["document", "sentence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusInfo(TokenizerInfo):
    """A dataset of token files."""

    append_eod: bool
    """Whether `eod` ends every document."""
    key: str
    """Key of the JSON objects that held the text."""
    documents: int
    """Documents written."""
    empty_documents: int
    """Documents left out because they have no text."""
    too_long_documents: int
    """Documents left out because of `seq_length`."""
    seq_length: int | None
    """Documents of at least so many tokens were left out."""
    tokens: int
    """Tokens written."""
    text_bytes: int
    """UTF-8 size of the text of the documents written."""
    unigram_entropy: float
    """Entropy of the token frequencies in nats: the loss of the best model that ignores the
    context."""
    dtype: str
    """Type of a token in the `.bin`."""
    bin_bytes: int
    """Size of the `.bin`."""
    bin_sha256: str
    """Hash of the `.bin`."""
    created_by: str
    """Program and version."""
    idx_sha256: str = ""
    """Hash of the `.idx`."""
    level: Level = "document"
    """What a sequence is: a document, or a sentence of one."""
    sequences: int = 0
    """Sequences written."""
    duplicate_documents: int = 0
    """Documents left out because their text was there before."""
    failed_records: int = 0
    """Records that could not be used."""


def sidecar_path(prefix: str | Path) -> Path:
    """Return the path of the description of a dataset."""
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str | Path) -> CorpusInfo | None:
    """Return what is known of the dataset at `prefix`, or None if nothing lies beside it.

    Raises:
        UsageError: the file is damaged, or of another dataset than the `.bin` beside it.
    """
    path = sidecar_path(prefix)
    info = read_description(
        path, lambda values: CorpusInfo(**known(CorpusInfo, values)), "a dataset"
    )
    if info is not None:
        check_size(path, Path(f"{prefix}.bin"), info.bin_bytes)
    return info


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of tokens that occur `counts` times."""
    present = counts[counts > 0]
    frequencies = present / present.sum()
    return float(0.0 - (frequencies * np.log(frequencies)).sum())  # of one token 0, not -0
