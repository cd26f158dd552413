"""The `.json` beside a dataset: which tokenizer made it, its size, how hard it is to predict.

`.bin` and `.idx` say nothing about where the tokens came from. With it a training run can refuse a
model whose vocabulary is too small, find the ids of the special tokens, and compare its loss with
the entropy of the tokens' frequencies.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml_data.typed import check_types
from ml_models.flags import UsageError

Level = Literal["document", "sentence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """A dataset of token files."""

    tokenizer: str
    """Path of the tokenizer."""
    tokenizer_kind: str
    """Library whose ids these are: `tokenizers`, `sentencepiece`, `tiktoken` or `transformers`."""
    tokenizer_identity: str
    """Equal for tokenizers that give the same ids."""
    vocab_size: int
    """One more than the largest id the tokenizer can give."""
    bos: int | None
    """Id of the token that begins a text."""
    eod: int | None
    """Id of the token that ends a document."""
    pad: int | None
    """Id of the padding token."""
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


def to_json(info: CorpusInfo) -> str:
    """Return the content of a sidecar."""
    return json.dumps(dataclasses.asdict(info), indent=2) + "\n"


def read_sidecar(prefix: str | Path) -> CorpusInfo | None:
    """Return what is known of the dataset at `prefix`, or None if nothing lies beside it.

    Raises:
        UsageError: the file is damaged, or of another dataset than the `.bin` beside it.
    """
    path = sidecar_path(prefix)
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(CorpusInfo)}
        info = CorpusInfo(**{name: value for name, value in values.items() if name in names})
        check_types(info)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not the description of a dataset ({error})") from error
    tokens = Path(f"{prefix}.bin")
    if tokens.exists() and tokens.stat().st_size != info.bin_bytes:
        raise UsageError(
            f"{path}: not of the same run as {tokens}: "
            f"describes {info.bin_bytes} bytes, not {tokens.stat().st_size}"
        )
    return info


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of tokens that occur `counts` times."""
    present = counts[counts > 0]
    frequencies = present / present.sum()
    return float(0.0 - (frequencies * np.log(frequencies)).sum())  # of one token 0, not -0
