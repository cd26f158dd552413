"""The micro-batches of one rank: which samples of a run it takes, as tensors on its device.

Shapes: B samples of a micro-batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from ml_models.flags import UsageError

Batch = dict[str, torch.Tensor]
"""`tokens`, `labels` and `position_ids`, (B, S) int64, and `loss_mask`, (B, S) float32. Labels the
mask hides need be no tokens.

With `sequence_ends`, (sequences + 1,) int64 on the host, B is 1, and these sequences share the row
without seeing each other: 0, then where each ends."""


class Samples(Protocol):
    """The samples of a run, in its order."""

    @property
    def in_one_row(self) -> bool:
        """Whether the samples of a batch share a row."""
        ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the samples at these positions of the run, on the host."""
        ...

    def source(self, position: int) -> str:
        """Return where a sample is from."""
        ...


class Datasets(NamedTuple):
    """The samples of each split; None for one that the run takes none of."""

    train: Samples
    valid: Samples | None
    test: Samples | None


class TokenBatches:
    """The micro-batches of one data-parallel rank.

    Sample i of the data belongs to the same global batch for every micro-batch size and number of
    ranks: of the samples after those consumed, each micro-batch takes `micro_batch_size` for every
    rank in turn, as Megatron's sequential sampler does.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.vocab_size = vocab_size
        self.device = device

    def step(self, consumed_samples: int, num_microbatches: int) -> Iterator[Batch]:
        """Yield the micro-batches of one step.

        Args:
            consumed_samples: Samples that all ranks together took before.
            num_microbatches: How many to yield.

        Raises:
            UsageError: A token is not in the vocabulary.
        """
        for number in range(num_microbatches):
            turn = number * self.data_parallel_size + self.data_parallel_rank
            first = consumed_samples + turn * self.micro_batch_size
            positions = range(first, first + self.micro_batch_size)
            batch = self.samples.batch(positions)
            self._check_vocabulary(batch, positions)
            yield {
                name: tensor
                if name == "sequence_ends"
                else tensor.to(self.device, non_blocking=True)
                for name, tensor in batch.items()
            }

    def _check_vocabulary(self, batch: Batch, positions: Sequence[int]) -> None:
        labels = batch["labels"].where(batch["loss_mask"] != 0, 0)
        for tokens in (batch["tokens"], labels):
            outside = (tokens < 0) | (tokens >= self.vocab_size)
            if outside.any():
                row, column = outside.nonzero()[0].tolist()
                raise UsageError(
                    f"{self._sources(positions, row, len(tokens))}: holds token "
                    f"{int(tokens[row, column])}, which is not in a vocabulary of "
                    f"{self.vocab_size}: the data was made with another tokenizer, or "
                    "--vocab-size is wrong"
                )

    def _sources(self, positions: Sequence[int], row: int, rows: int) -> str:
        """Return where a row is from: one of several corpora, if samples share it."""
        several = positions if rows < len(positions) else positions[row : row + 1]
        return " or ".join(dict.fromkeys(self.samples.source(position) for position in several))
