"""How long documents are, in powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BAR = 40


class Histogram:
    """Numbers of documents by their length in tokens: 0, 1, 2-3, 4-7, 8-15, ..."""

    def __init__(self) -> None:
        self.counts = np.zeros(65, np.int64)
        """(65,), documents of 0 tokens, then of at least 2**(n - 1) and less than 2**n."""

    def add(self, lengths: NDArray[Any]) -> None:
        """Count documents of these lengths."""
        bits = np.frexp(np.asarray(lengths, np.float64))[1]  # exact below 2**53
        self.counts += np.bincount(bits, minlength=len(self.counts))

    def lines(self) -> Iterator[str]:
        """Yield a line a power of two: its range, the documents, their share, a bar."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return
        rows = range(used[0], used[-1] + 1)
        ranges = [_range(bits) for bits in rows]
        width, digits = max(map(len, ranges)), len(f"{self.counts.max():,}")
        for name, count in zip(ranges, self.counts[rows.start : rows.stop], strict=True):
            bar = "#" * int(np.ceil(_BAR * count / self.counts.max()))
            share = f"{count / self.counts.sum():.1%}"
            yield f"{name:>{width}} tokens {count:>{digits},} {share:>6} {bar}".rstrip()


def _range(bits: int) -> str:
    if bits < 2:
        return f"{bits:,}"
    return f"{2 ** (bits - 1):,}-{2**bits - 1:,}"
