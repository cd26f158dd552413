"""Samples into rows of `seq_length` tokens, so that training computes on few padding tokens.

First-fit-decreasing: the longest sample first, each into the first row with room for it. At most
22 % more rows than the best packing needs, in practice almost none. A corpus is packed a window at
a time, so memory does not grow with it. Rows are shuffled within their window, always alike: they
follow from the order of the samples alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ml_data.instruction.ragged import Ragged, Samples
from ml_data.training import Permutation

WINDOW_TOKENS = 1 << 22
"""About how many tokens are packed at a time."""
_WINDOW_ROWS = 64
"""At least so many rows, however long they are."""


class Packer:
    """Collects samples and gives them back in rows."""

    def __init__(self, seq_length: int, window_tokens: int = WINDOW_TOKENS) -> None:
        self._seq_length = seq_length
        self._window = max(window_tokens, _WINDOW_ROWS * seq_length)
        self._waiting: list[Samples] = []
        self._tokens = 0

    def add(self, samples: Samples) -> Iterator[tuple[Samples, NDArray[np.int64]]]:
        """Take samples, none longer than `seq_length`; yield rows once a window is full."""
        self._waiting.append(samples)
        self._tokens += len(_any(samples).tokens)
        if self._tokens >= self._window:
            yield self._pack()

    def rest(self) -> Iterator[tuple[Samples, NDArray[np.int64]]]:
        """Yield the rows of the samples that are left."""
        if self._tokens:
            yield self._pack()

    def _pack(self) -> tuple[Samples, NDArray[np.int64]]:
        """Return the samples in the order of their rows, and how many samples each row has."""
        names = list(self._waiting[0])
        samples = {name: Ragged.join(part[name] for part in self._waiting) for name in names}
        self._waiting, self._tokens = [], 0
        found = first_fit_decreasing(_any(samples).lengths, self._seq_length)
        # Rows of few, long samples come last, and a trainer takes the last ones for validation.
        shuffle = Permutation(len(found), "rows")(np.arange(len(found)))
        rows = [found[number] for number in shuffle.tolist()]
        order = np.concatenate([np.asarray(row, np.int64) for row in rows])
        ordered = {name: column.take(order) for name, column in samples.items()}
        return ordered, np.array([len(row) for row in rows], np.int64)


def first_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return the numbers of the samples of each row; rows in the order of their first samples."""
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    # A tree over the rows: the most room in any row below a node. Its leaves are the rows.
    room = [capacity] * (2 * size)
    rows: dict[int, list[int]] = {}
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        node = 1
        while node < size:
            node *= 2
            node += room[node] < length
        rows.setdefault(node, []).append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted(sorted(row) for row in rows.values())


def _any(samples: Samples) -> Ragged:
    return next(iter(samples.values()))
