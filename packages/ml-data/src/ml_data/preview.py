"""Tokens as text that shows which of them the loss sees.

Each run of tokens that are treated alike is a line: `masked`, `learned`, or `replaced` where the
model is to say something else than what follows. On a terminal they have colours; the words say the
same without. Text is quoted, so that no control character of the data reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from ml_data.indexed import IndexedDataset
from ml_data.instruction.turns import IGNORED
from ml_data.tokenizer import Tokenizer

_SHOWN_TOKENS = 512
_STYLES = {"masked": "dim", "learned": "bold green", "replaced": "bold magenta"}

Treatment = Literal["masked", "learned", "replaced"]
_TREATMENTS: tuple[Treatment, ...] = ("masked", "learned", "replaced")


class Run(NamedTuple):
    """Tokens in a row that are treated alike."""

    treatment: Treatment
    ids: list[int]
    labels: list[int]


def runs(ids: NDArray[Any], labels: NDArray[Any]) -> Iterator[Run]:
    """Yield the runs of a sample; `labels` (not shifted) are as long as `ids`."""
    kinds = np.where(labels == IGNORED, 0, np.where(labels == ids, 1, 2))
    ends = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)] if len(ids) else []
    for start, end in pairwise(ends):
        treatment = _TREATMENTS[kinds[start]]
        yield Run(treatment, ids[start:end].tolist(), labels[start:end].tolist())


def preview(
    columns: Mapping[str, IndexedDataset], tokenizer: Tokenizer, documents: int
) -> Iterator[Text]:
    """Yield lines about `documents` documents, spread evenly from the first to the last.

    Args:
        columns: Datasets of the same documents by name: `input_ids` with their `labels`,
            `chosen_input_ids` with `chosen_labels`, or any one without labels.
        tokenizer: What made them.
        documents: How many to show, if there are so many.
    """
    count = len(next(iter(columns.values())))
    for number in np.linspace(0, count - 1, min(documents, count)).astype(int).tolist():
        for name, dataset in columns.items():
            if name.endswith(("labels", "attention_mask")):
                continue
            labels = columns.get(name.removesuffix("input_ids") + "labels")
            side = name.removesuffix("_input_ids") if name.endswith("_input_ids") else ""
            title = f"document {number}{', ' if side else ''}{side}: {_size(dataset, number)}"
            yield Text(title, "bold")
            yield from _document(dataset, labels, tokenizer, number)


def _size(dataset: IndexedDataset, document: int) -> str:
    lengths = dataset.lengths(document)
    several = f" in {len(lengths):,} sequences" if len(lengths) != 1 else ""
    return f"{lengths.sum():,} tokens{several}"


def _document(
    dataset: IndexedDataset, labels: IndexedDataset | None, tokenizer: Tokenizer, number: int
) -> Iterator[Text]:
    """Yield the lines of a document, as far as there is room."""
    tokens, lengths = dataset[number], dataset.lengths(number)
    answers = labels[number] if labels is not None else None
    ends = [0, *np.cumsum(lengths[:-1]).tolist(), min(len(tokens), _SHOWN_TOKENS)]
    for sequence, (start, stop) in enumerate(pairwise(ends)):
        end = min(stop, _SHOWN_TOKENS)
        if start >= _SHOWN_TOKENS:
            break
        if len(lengths) > 1:
            yield Text(f"  sequence {sequence}: {lengths[sequence]:,} tokens")
        if answers is None:
            yield Text(f"  {_quoted(tokenizer, tokens[start:end].tolist())}")
        else:
            yield from _lines(tokens[start:end], answers[start:end], tokenizer)
    if len(tokens) > _SHOWN_TOKENS:
        yield Text(f"  ... {len(tokens) - _SHOWN_TOKENS:,} more tokens", "dim")


def _lines(ids: NDArray[Any], labels: NDArray[Any], tokenizer: Tokenizer) -> Iterator[Text]:
    for run in runs(ids, labels):
        text = _quoted(tokenizer, run.ids)
        if run.treatment == "replaced":
            text += f" by {_quoted(tokenizer, run.labels)}"
        yield Text(f"  {run.treatment:8} ") + Text(text, _STYLES[run.treatment])


def _quoted(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(tokenizer.decode(ids, skip_special_tokens=False))
