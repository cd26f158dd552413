"""Which sample a run reads at which position: computed from the position, kept nowhere.

One shuffle goes over the whole run, not over one epoch after the other: with those every sample is
read a k-th time before any is read once more, and the loss falls in steps at their ends. Here it
falls as it would with samples drawn at random, yet each sample of a dataset is read equally often,
give or take one.

The order follows from the seed and the sizes by integer arithmetic of our own, so it is the same on
every rank, after every start, and with every version of numpy; there is no file that ranks could
wait for or that could be out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_SMALL = 1024
"""Sizes up to this are shuffled by sorting hashes: over so few numbers a network is not fair."""
_BLOCK = 4096
"""Positions that are computed together."""


class Permutation:
    """A shuffle of `range(size)` that a key chooses; it takes next to no memory.

    A Feistel network over the numbers of two digits, `left` and `right`, of almost equal radix
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): each round adds to one digit
    a hash of the other. The few numbers of two digits that are not below `size` are put through it
    again until they are.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._radix = np.uint64(max(1, -int(-(size**0.5) // 1)))
        self._other = np.uint64(max(1, -(-size // int(self._radix))))
        digest = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")
        self._table: NDArray[np.int64] | None = None
        if size <= _SMALL:
            hashes = _hash(np.arange(size, dtype=np.uint64) + self._keys[0])
            self._table = np.argsort(_hash(hashes + self._keys[1]))

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where each of `numbers`, from 0 to below `size`, goes."""
        if self._table is not None:
            return self._table[numbers]
        found = self._once(numbers.astype(np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers // self._other, numbers % self._other
        for first, second in self._keys.reshape(-1, 2):
            left = (left + _hash(right + first) % self._radix) % self._radix
            right = (right + _hash(left + second) % self._other) % self._other
        return left * self._other + right


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter numbers over 64 bits (the finalizer of Steele's SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Place(NamedTuple):
    """Where a sample is."""

    dataset: int
    sample: int


class RunOrder:
    """The order in which a run reads the samples of its datasets."""

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, *, samples: int, seed: int
    ) -> None:
        """Fix the order.

        Args:
            sizes: Number of samples of each dataset, at least 1.
            weights: Share of each dataset in the samples of the run, of any sum; None = by size.
            samples: How many the run reads from its first to its last step.
            seed: Of the shuffling.
        """
        self.sizes, self.samples, self.seed = tuple(sizes), samples, seed
        self.counts = shares(sizes if weights is None else weights, samples)
        """How many samples the run reads of each dataset."""
        self._starts = np.cumsum([0, *self.counts])
        self._shuffle = Permutation(samples, f"{seed} run")
        self._number, self._block = -1, np.zeros((2, 0), np.int64)

    def __getitem__(self, position: int) -> Place:
        """Return what is read at a position of the run, from 0.

        Raises:
            IndexError: The run has no such position.
        """
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} of a run of {self.samples} samples")
        number, offset = divmod(position, _BLOCK)
        if number != self._number:
            positions = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.samples))
            self._number, self._block = number, self._places(positions)
        dataset, sample = self._block[:, offset].tolist()
        return Place(dataset, sample)

    def _places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return datasets and samples, (2, positions)."""
        slots = self._shuffle(positions)
        datasets = np.searchsorted(self._starts, slots, side="right") - 1
        epochs, samples = np.divmod(slots - self._starts[datasets], np.array(self.sizes)[datasets])
        # The last epoch is seldom whole: each has an order of its own, so that chance decides
        # which samples it has.
        for dataset, epoch in {*zip(datasets.tolist(), epochs.tolist(), strict=True)}:
            here = (datasets == dataset) & (epochs == epoch)
            shuffle = Permutation(self.sizes[dataset], f"{self.seed} {dataset} {epoch}")
            samples[here] = shuffle(samples[here])
        return np.stack((datasets, samples))


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Divide `total` by weight into whole numbers: those cut off most get the rest."""
    exact = np.array(weights, np.float64) / np.sum(weights, dtype=np.float64) * total
    counts = np.floor(exact).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return tuple(counts.tolist())
