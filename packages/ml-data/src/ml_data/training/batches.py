"""Rows of any length to arrays that a model takes: padded beside each other, or in one row.

Shapes: `B` rows, `S` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_data.instruction.turns import IGNORED
from ml_data.training.rows import Row, positions

Batch = dict[str, NDArray[Any]]

_PADDING = 256
"""Padding in one row is cut into sequences of at most so many tokens, or they would cost attention
as much as a sequence of all of them."""


def padded_length(lengths: Iterable[int], *, multiple: int, at_most: int) -> int:
    """Return the least multiple that no length exceeds, or `at_most` if that is less."""
    longest = max(lengths)
    return min(at_most, -(-longest // multiple) * multiple)


def padded(rows: Sequence[Row], length: int, *, pad: int) -> Batch:
    """Put rows of one sequence each beside each other, filled up at their ends.

    Those of preferences: see `chosen_then_rejected`.

    Args:
        rows: Of at most `length` tokens.
        length: `S`.
        pad: Token to fill up with; the loss does not see it, and no token before it does.

    Returns:
        `tokens`, `labels`, `position_ids`, (B, S) int64, and `loss_mask`, (B, S) float32.
    """
    tokens = np.full((len(rows), length), pad, np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        labels[number, : len(row.labels)] = row.labels
    places = np.tile(np.arange(length), (len(rows), 1))
    return _batch(tokens, labels, places)


def in_one_row(rows: Sequence[Row], length: int, *, pad: int) -> Batch:
    """Put the sequences of all rows one after the other.

    Args:
        rows: Of at most `length` tokens together.
        length: `S`.
        pad: Token to fill up with, in sequences of its own; none is longer than those of the rows,
            so that the model needs no position for padding alone.

    Returns:
        What `padded` does, (1, S), the positions counted from 0 in every sequence; and
        `sequence_ends`, (sequences + 1,) int64: 0, then where each sequence ends, at last `S`.
    """
    filled = sum(len(row.tokens) for row in rows)
    tokens = np.full((1, length), pad, np.int64)
    labels = np.full((1, length), IGNORED, np.int64)
    tokens[0, :filled] = np.concatenate([row.tokens for row in rows])
    labels[0, :filled] = np.concatenate([row.labels for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    rest, step = length - filled, min(_PADDING, int(lengths.max(initial=1)))
    padding = np.diff([*range(0, rest, step), rest])
    lengths = np.concatenate([lengths, padding]).astype(np.int64)
    batch = _batch(tokens, labels, positions(lengths)[None])
    return {**batch, "sequence_ends": np.concatenate([[0], np.cumsum(lengths)])}


def _batch(tokens: NDArray[Any], labels: NDArray[Any], places: NDArray[Any]) -> Batch:
    mask = (labels != IGNORED).astype(np.float32)
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": places}
