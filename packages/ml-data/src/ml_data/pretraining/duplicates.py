"""Texts that were there before: exact duplicates, known by a digest of 128 bits.

The digests lie in a few sorted runs, each at least twice as long as the next: a new one is looked
up in all of them by bisection, and runs of similar length are merged. That takes 16 bytes a text,
and as much again for a moment when the longest runs are merged. Two different texts share a digest
with a probability of 1e-20 in a corpus of a billion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTES = 16
_DIGEST = np.dtype(f"S{_BYTES}")


def digests(texts: Sequence[str]) -> NDArray[Any]:
    """Return a digest of each text."""
    found = (hashlib.blake2b(text.encode(), digest_size=_BYTES).digest() for text in texts)
    return np.frombuffer(b"".join(found), _DIGEST)


class SeenTexts:
    """The digests of all texts so far."""

    def __init__(self) -> None:
        self._runs: list[NDArray[Any]] = []

    def add(self, digests: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which of these are here for the first time, and remember them."""
        unique, positions = np.unique(digests, return_index=True)  # of equal ones, the first
        new = np.ones(len(unique), np.bool_)
        for run in self._runs:
            near = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            new &= run[near] != unique
        self._remember(unique[new])
        first = np.zeros(len(digests), np.bool_)
        first[positions[new]] = True
        return first

    def _remember(self, run: NDArray[Any]) -> None:
        if not len(run):
            return
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # which merges runs that are sorted already
            self._runs.append(merged)
