"""Sequences of different lengths as two arrays: cheap to send, to write, to put into an order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequences of tokens."""

    tokens: NDArray[np.int32]
    """(sum of lengths,), all of them back to back."""
    lengths: NDArray[np.int64]
    """(sequences,)."""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        """Return `sequences` as arrays."""
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        flat = chain.from_iterable(sequences)
        return cls(np.fromiter(flat, np.int32, int(lengths.sum())), lengths)

    @classmethod
    def join(cls, parts: Iterable[Ragged]) -> Ragged:
        """Return the sequences of all `parts`."""
        parts = [cls.of([]), *parts]
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
        )

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(sequences,), where each begins."""
        return np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        """Return how many sequences there are."""
        return len(self.lengths)

    def head(self, count: int) -> Ragged:
        """Return the first `count` sequences."""
        lengths = self.lengths[:count]
        return Ragged(self.tokens[: lengths.sum()], lengths)

    def take(self, order: NDArray[np.int64]) -> Ragged:
        """Return the sequences with the numbers in `order`, each as often as it is there."""
        lengths = self.lengths[order]
        return Ragged(self.tokens[runs(self.starts[order], lengths)], lengths)


def runs(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return begin, begin + 1, ... of each run, one run after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(begins - (ends - lengths), lengths)


Samples = dict[str, Ragged]
"""Samples: of each the sequence of every column, at the same place in all columns."""
