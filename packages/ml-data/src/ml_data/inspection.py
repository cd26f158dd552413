"""`ml-data inspect`: what is in a dataset, checked to be whole."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ml_data.indexed import IndexedDataset
from ml_data.sidecar import CorpusInfo, read_sidecar
from ml_data.tokenizer import load_tokenizer
from ml_models.flags import UsageError, parse

_SHOWN_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a dataset holds, and that its files are whole."""

    data_path: str
    """The dataset: path of its .bin without the suffix."""
    tokenizer_name_or_path: str | None = None
    """Show the beginning of the first document as text, with this tokenizer."""


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(InspectConfig, argv, prog=prog)
    sys.stdout.write("".join(f"{name:22}{value}\n" for name, value in describe(config)))
    return 0


def describe(config: InspectConfig) -> Iterator[tuple[str, object]]:
    """Yield what is known of a dataset, name and value.

    Raises:
        UsageError: a file of it is missing, torn or damaged, or the tokenizer is not the one that
            made it.
    """
    dataset = IndexedDataset(config.data_path)
    info = read_sidecar(config.data_path)
    yield "documents", f"{len(dataset):,}"
    yield "tokens", f"{len(dataset.tokens):,}"
    yield "dtype", dataset.dtype.name
    if info is None:
        yield "description", "none (not written by ml-data)"
    else:
        known = dataclasses.asdict(info)
        yield from (
            (name, value)
            for name, value in known.items()
            if name not in ("documents", "tokens", "dtype")
        )
    if config.tokenizer_name_or_path is not None and len(dataset):
        yield "first document", repr(_first_text(dataset, info, config.tokenizer_name_or_path))


def _first_text(dataset: IndexedDataset, info: CorpusInfo | None, path: str) -> str:
    tokenizer = load_tokenizer(path)
    if info is not None and info.tokenizer_identity.split("-")[1] not in tokenizer.identity:
        raise UsageError(
            f"--tokenizer-name-or-path {path}: the dataset is of another one: {info.tokenizer}"
        )
    if max(ids := dataset[0][:_SHOWN_TOKENS].tolist(), default=0) >= tokenizer.vocab_size:
        raise UsageError(f"--tokenizer-name-or-path {path}: has no token {max(ids)}")
    return tokenizer.decode(ids)
