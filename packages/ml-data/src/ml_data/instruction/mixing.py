"""Several datasets to one: one after the other, or interleaved as Hugging Face `datasets` does it.

Interleaving repeats and leaves out records, so it works on what has been encoded: every dataset is
written to a temporary file, then read in the mixed order. A record that comes three times is
encoded once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.atomic import naming
from ml_data.instruction.ragged import Ragged, Samples, runs

MixStrategy = Literal["concat", "interleave_under", "interleave_over"]
"""One dataset after the other; interleaved until one has ended; until all have, beginning again
with those that have ended."""

_DRAWS = 1000
"""Draws at a time: the stream of random numbers is that of `datasets` only with this one."""


def interleaved(
    sizes: Sequence[int],
    strategy: MixStrategy,
    probabilities: Sequence[float] | None,
    seed: int,
) -> Iterator[NDArray[np.int64]]:
    """Yield the mixed order in pieces of shape (records, 2): dataset, record in it.

    Args:
        sizes: records of each dataset, none of them 0.
        strategy: when to end.
        probabilities: of each dataset to give the next record, none of them 0; None for one record
            of each in turn.
        seed: of the draws.
    """
    bound = min if strategy == "interleave_under" else max
    if probabilities is None:
        yield from _in_turn(sizes, bound(sizes))
        return
    rng = np.random.default_rng(seed)
    taken, ended = np.zeros(len(sizes), np.int64), [-1] * len(sizes)  # at which draw
    drawn = 0
    while True:
        datasets = rng.choice(len(sizes), size=_DRAWS, p=probabilities)
        piece = np.zeros((_DRAWS, 2), np.int64)
        piece[:, 0] = datasets
        for number, size in enumerate(sizes):
            places = np.flatnonzero(datasets == number)
            records = taken[number] + np.arange(len(places))
            piece[places, 1] = records % size
            last = size - 1 - taken[number]
            if 0 <= last < len(places):
                ended[number] = drawn + int(places[last])
            taken[number] += len(places)
        drawn += _DRAWS
        over = [end for end in ended if end >= 0]
        if over and (strategy == "interleave_under" or len(over) == len(sizes)):
            yield piece[: _DRAWS - (drawn - 1 - bound(over))]
            return
        yield piece


def _in_turn(sizes: Sequence[int], rounds: int) -> Iterator[NDArray[np.int64]]:
    for begin in range(0, rounds, _DRAWS):
        records = np.arange(begin, min(begin + _DRAWS, rounds))
        columns = [records % size for size in sizes]
        datasets = np.broadcast_to(np.arange(len(sizes)), (len(records), len(sizes)))
        yield np.stack([datasets.ravel(), np.stack(columns, 1).ravel()], 1)


class Spooled(NamedTuple):
    """The samples of a dataset."""

    samples: Samples
    counts: NDArray[np.int64]
    """(records,), samples of each record that gave any."""
    firsts: NDArray[np.int64]
    """(records,), number of its first sample."""


class Spool:
    """The samples of a dataset in temporary files without names, which `owner` closes."""

    def __init__(self, directory: Path, columns: Sequence[str], owner: ExitStack) -> None:
        self._directory = directory
        self._files = {
            name: tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - `owner` closes it
            for name in columns
        }
        for file in self._files.values():
            owner.callback(_discard, file)
        self._lengths: dict[str, list[NDArray[np.int64]]] = {name: [] for name in columns}
        self._counts: list[NDArray[np.int64]] = []

    def add(self, samples: Samples, counts: NDArray[np.int64]) -> None:
        """Append samples; `counts` says how many of them each record gave."""
        for name, column in samples.items():
            with naming(self._directory):
                self._files[name].write(column.tokens.tobytes())
            self._lengths[name].append(column.lengths)
        self._counts.append(counts[counts > 0])

    def finish(self) -> Spooled:
        """Return the samples, mapped from the files."""
        samples = {}
        for name, file in self._files.items():
            with naming(self._directory):
                file.flush()
            lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths[name]])
            size = int(lengths.sum())
            tokens = np.memmap(file, np.int32, mode="r", shape=size) if size else np.zeros(0, "<i4")
            samples[name] = Ragged(tokens, lengths)
        counts = np.concatenate([np.zeros(0, np.int64), *self._counts])
        return Spooled(samples, counts, np.cumsum(counts) - counts)


def _discard(file: IO[bytes]) -> None:
    with suppress(OSError):  # of a full disk: what was not flushed cannot be
        file.close()


def gather(spooled: Sequence[Spooled], order: NDArray[np.int64]) -> Samples:
    """Return the samples of the records in `order`, a piece of `interleaved`."""
    numbers: list[NDArray[np.int64]] = []  # of the samples of each dataset
    places: list[NDArray[np.int64]] = []  # where they belong in the result
    counts = np.zeros(len(order), np.int64)
    for dataset, whole in enumerate(spooled):
        mine = np.flatnonzero(order[:, 0] == dataset)
        counts[mine] = whole.counts[order[mine, 1]]
    begins = np.cumsum(counts) - counts
    for dataset, whole in enumerate(spooled):
        mine = np.flatnonzero(order[:, 0] == dataset)
        numbers.append(runs(whole.firsts[order[mine, 1]], counts[mine]))
        places.append(runs(begins[mine], counts[mine]))
    back = np.argsort(np.concatenate(places))
    return {
        name: Ragged.join(
            whole.samples[name].take(chosen) for whole, chosen in zip(spooled, numbers, strict=True)
        ).take(back)
        for name in spooled[0].samples
    }
