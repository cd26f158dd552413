"""What a model reads of one sample, and what it shall answer: tokens, and the token after each.

In the files a label stands at the place of its own token; here at that of the token before, which
is where a model predicts it. The last token of a sequence predicts nothing and is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Row(NamedTuple):
    """Sequences one after the other: one, or several packed into a row."""

    tokens: NDArray[Any]
    """(tokens,)."""
    labels: NDArray[Any]
    """(tokens,), what comes next; `IGNORED` where the loss does not look."""
    lengths: NDArray[np.int64]
    """(sequences,), tokens of each, at least 1."""


def shifted(ids: NDArray[Any], labels: NDArray[Any], lengths: NDArray[Any], seq_length: int) -> Row:
    """Return a row of at most `seq_length` tokens.

    Args:
        ids: (tokens,), the sequences back to back.
        labels: (tokens,), in place.
        lengths: (sequences,), tokens of each.
        seq_length: What is beyond is cut off.
    """
    if len(lengths) == 1:
        length = max(0, min(len(ids) - 1, seq_length))
        kept = np.array([length] if length else [], np.int64)
        return Row(ids[:length], labels[1 : 1 + length], kept)
    lengths = lengths[lengths > 0].astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = np.delete(ids, ends - 1)[:seq_length]
    labels = np.delete(labels, ends - lengths)[:seq_length]
    ends = np.minimum(np.cumsum(lengths - 1), seq_length)
    lengths = np.diff(ends, prepend=0)
    return Row(tokens, labels, lengths[lengths > 0])


def positions(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each token in its sequence, (sum of `lengths`,)."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
