"""The samples of instruction data, in the order of a run.

The order is computed from the seed and the length of the run (`ml_data.training.order`): no file
keeps it, and no rank waits for another one to write it. Rank 0 looks through the labels for samples
without any, and tells the others.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ml_data.training import LabelledDataset, Row, RunSamples, in_one_row, padded, padded_length
from ml_models.flags import UsageError
from ml_train.batches import Batch, Datasets
from ml_train.corpora import common_tokenizer
from ml_train.instructions import (
    Split,
    describe_instructions,
    find_unusable,
    open_instructions,
    split_documents,
)
from ml_train.settings import DataConfig
from ml_train.together import on_every_rank, on_rank_0


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How rows of any length become a batch."""

    seq_length: int
    """Tokens of a row."""
    multiple: int | None
    """With --variable-seq-lengths: rows are as long as the longest of a batch, and a multiple of
    this."""
    pad: int = 0
    """Token to fill up with."""
    in_one_row: bool = False
    """Whether all samples of a batch share a row."""


class InstructionSamples:
    """Samples cut and padded to batches."""

    def __init__(self, samples: RunSamples[Row], padding: Padding) -> None:
        self._samples, self._padding = samples, padding
        self.in_one_row = padding.in_one_row

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the samples at these positions of the run."""
        rows, padding = [self._samples[position] for position in positions], self._padding
        lengths, longest = [len(row.tokens) for row in rows], padding.seq_length
        if self.in_one_row:
            lengths, longest = [sum(lengths)], longest * len(rows)
        if padding.multiple is not None:
            longest = padded_length(lengths, multiple=padding.multiple, at_most=longest)
        fill = in_one_row if self.in_one_row else padded
        arrays = fill(rows, longest, pad=padding.pad)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def source(self, position: int) -> str:
        """Return where a sample is from."""
        return self._samples.source(position)


def build_instructions(
    config: DataConfig,
    *,
    seq_length: int,
    multiple: int,
    seed: int,
    samples: tuple[int, int, int],
) -> Datasets:
    """Open the data, and fix the order of their samples; every rank calls it together.

    Args:
        config: Which data.
        seq_length: Tokens of a row; longer samples are cut.
        multiple: What the length of a batch is a multiple of with --variable-seq-lengths.
        seed: Of the shuffling.
        samples: How many the run takes of training, validation and test over all its steps.

    Raises:
        UsageError: Data are missing, torn, empty, or not the same on all nodes; on every rank.
    """
    plan = on_rank_0(lambda: _plan(config, seq_length, samples))
    datasets: dict[str, LabelledDataset] = {}
    on_every_rank(lambda: datasets.update(_same_as(plan, open_instructions(config, seq_length))))
    splits = split_documents(config, datasets, plan.unusable, samples)
    used = {prefix for split in splits if split for prefix in split.blend.prefixes}
    padding = Padding(
        seq_length=seq_length,
        multiple=multiple if config.variable_seq_lengths else None,
        pad=plan.pad,
        in_one_row=any(datasets[prefix].packed for prefix in used),
    )
    train, valid, test = (
        InstructionSamples(_in_order(split, datasets, number, seed), padding) if split else None
        for split, number in zip(splits, samples, strict=True)
    )
    assert train is not None, "a run has training data"
    return Datasets(train, valid, test)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What rank 0 found out, for all ranks."""

    unusable: dict[str, NDArray[np.int64]]
    fingerprints: dict[str, str]
    pad: int


def _plan(config: DataConfig, seq_length: int, samples: tuple[int, int, int]) -> _Plan:
    datasets = open_instructions(config, seq_length)
    info = common_tokenizer(describe_instructions(config))
    unusable = find_unusable(datasets)
    split_documents(config, datasets, unusable, samples)  # says what is wrong
    ids = (info.pad, info.eod) if info else ()
    pad = next((token for token in ids if token is not None), 0)
    return _Plan(unusable, _fingerprints(datasets), pad)


def _fingerprints(datasets: dict[str, LabelledDataset]) -> dict[str, str]:
    return {prefix: dataset.fingerprint() for prefix, dataset in datasets.items()}


def _same_as(plan: _Plan, datasets: dict[str, LabelledDataset]) -> dict[str, LabelledDataset]:
    """Return the data of this rank, which must be those that rank 0 has."""
    found = _fingerprints(datasets)
    for prefix, fingerprint in plan.fingerprints.items():
        if found[prefix] != fingerprint:
            raise UsageError(
                f"{prefix}: on {socket.gethostname()} it is not what it is on the first node"
            )
    return datasets


def _in_order(
    split: Split, datasets: dict[str, LabelledDataset], samples: int, seed: int
) -> RunSamples[Row]:
    read = [datasets[prefix] for prefix in split.blend.prefixes]
    return RunSamples(read, split.documents, split.blend.weights, samples=samples, seed=seed)
