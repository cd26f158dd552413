"""The samples of a run, in its order, from one or several datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ml_data.training.order import RunOrder

T_co = TypeVar("T_co", covariant=True)


class Dataset(Protocol[T_co]):
    """Samples on disk, in the order of the files."""

    @property
    def prefix(self) -> str:
        """Where it is."""
        ...

    def __getitem__(self, document: int) -> T_co:
        """Return a sample."""
        ...


class RunSamples(Generic[T_co]):
    """What a run reads: position 0 is the first sample of its first step.

    A function of the files, the seed and the length of the run, so a run that is resumed, with any
    number of ranks, goes on with the sample it would have had.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset[T_co]],
        documents: Sequence[NDArray[np.int64]],
        weights: Sequence[float] | None,
        *,
        samples: int,
        seed: int,
    ) -> None:
        """Fix the order.

        Args:
            datasets: What to read from.
            documents: Which documents of each; at least one.
            weights: Share of each in the samples, of any sum; None = by number of documents.
            samples: How many the run reads over all its steps.
            seed: Of the shuffling.
        """
        self.datasets, self.documents = datasets, documents
        sizes = [len(numbers) for numbers in documents]
        self.order = RunOrder(sizes, weights, samples=samples, seed=seed)

    def __len__(self) -> int:
        """Return the samples of the whole run."""
        return self.order.samples

    def __getitem__(self, position: int) -> T_co:
        """Return the sample at a position of the run."""
        dataset, sample = self.order[position]
        return self.datasets[dataset][int(self.documents[dataset][sample])]

    def source(self, position: int) -> str:
        """Return the prefix of the dataset that a sample is from."""
        return self.datasets[self.order[position].dataset].prefix
