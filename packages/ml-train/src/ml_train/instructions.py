"""Instruction data of a run, opened and checked before anything is built on it; no torch.

With `--is-instruction-dataset` a prefix of `--data-path` is what `ml-data instruct` was given as
`--output-prefix`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml_data.instruction.sample_info import read_sample_info
from ml_data.training import LabelledDataset, instruction_dataset
from ml_models.flags import UsageError
from ml_train.corpora import SPLITS, Description, absolute, split_bounds
from ml_train.settings import Blend, DataConfig

logger = logging.getLogger(__name__)

_FILES = "_packed_input_ids_document.idx"


def open_instructions(config: DataConfig, seq_length: int) -> dict[str, LabelledDataset]:
    """Open all data of a run, by absolute prefix.

    Raises:
        UsageError: A file is missing, torn, or not instruction data.
    """
    return {prefix: _opened(prefix, seq_length) for prefix in map(absolute, config.prefixes)}


def check_instructions(config: DataConfig, seq_length: int, samples: Sequence[int]) -> None:
    """Check what can be checked of the data of a run without reading all labels.

    Raises:
        UsageError: As `open_instructions` and `split_documents`.
    """
    datasets = open_instructions(config, seq_length)
    split_documents(config, datasets, dict.fromkeys(datasets, np.empty(0, np.int64)), samples)


def describe_instructions(config: DataConfig) -> tuple[Description, ...]:
    """Read what is known of the tokens of all data of a run.

    Raises:
        UsageError: A description is damaged.
    """
    prefixes = map(absolute, config.prefixes)
    return tuple(Description(prefix, read_sample_info(prefix)) for prefix in prefixes)


@dataclass(frozen=True, eq=False)
class Split:
    """What one split reads."""

    blend: Blend
    """Prefixes are absolute."""
    documents: tuple[NDArray[np.int64], ...]
    """Of each prefix."""


def find_unusable(datasets: dict[str, LabelledDataset]) -> dict[str, NDArray[np.int64]]:
    """Find the samples in which the loss would see nothing, and say how many there are.

    They are left out: a batch of nothing else would have the loss 0/0. All labels are read.
    """
    found = {prefix: dataset.without_label() for prefix, dataset in datasets.items()}
    for prefix, dataset in datasets.items():
        _say(dataset, len(found[prefix]), "have no label within it and are left out")
        _say(dataset, dataset.cut, "are longer and are cut")
    return found


def split_documents(
    config: DataConfig,
    datasets: dict[str, LabelledDataset],
    unusable: dict[str, NDArray[np.int64]],
    samples: Sequence[int],
) -> list[Split | None]:
    """Return what training, validation and test read; None where the run takes no samples.

    Args:
        config: Where the data are, and their splits.
        datasets: By prefix.
        unusable: Documents to leave out, by prefix.
        samples: How many the run takes of each split.

    Raises:
        UsageError: A split has nothing to read.
    """
    splits: list[Split | None] = []
    named = zip(SPLITS, config.blends, split_bounds(config), samples, strict=True)
    for name, blend, bounds, wanted in named:
        if not (blend and bounds and wanted):
            splits.append(None)
            continue
        prefixes = tuple(map(absolute, blend.prefixes))
        documents = tuple(
            _documents(name, datasets[prefix], unusable[prefix], bounds) for prefix in prefixes
        )
        splits.append(Split(Blend(prefixes, blend.weights), documents))
    return splits


def _say(dataset: LabelledDataset, number: int, what: str) -> None:
    if number:
        logger.warning(
            f"{dataset.prefix}: of {len(dataset):,} samples, with --seq-length "
            f"{dataset.seq_length}, {number:,} {what}"
        )


def _documents(
    name: str,
    dataset: LabelledDataset,
    unusable: NDArray[np.int64],
    bounds: tuple[float, float],
) -> NDArray[np.int64]:
    start, stop = (round(bound * len(dataset)) for bound in bounds)  # as for pre-training data
    usable = np.ones(len(dataset), bool)
    usable[unusable] = False
    found = np.flatnonzero(usable[start:stop]) + start
    if not len(found):
        raise UsageError(
            f"{dataset.prefix}: has {stop - start} samples for {name} (--split), and none with a "
            f"label within --seq-length {dataset.seq_length}: give more samples, another split, "
            "or a longer --seq-length"
        )
    return found


def _opened(prefix: str, seq_length: int) -> LabelledDataset:
    if not Path(prefix + _FILES).exists() and (hint := _hint(prefix)):
        raise UsageError(f"--is-instruction-dataset: {prefix} {hint}")
    dataset = instruction_dataset(prefix, seq_length=seq_length)
    if not len(dataset):
        raise UsageError(f"{prefix}: holds no samples")
    return dataset


def _hint(prefix: str) -> str | None:
    """Say what a prefix is that is not one of instruction data."""
    whole, packed, _ = prefix.rpartition("_packed")
    if packed and Path(whole + _FILES).exists():
        return f"names one of several files: give {whole}"
    if Path(f"{prefix}.idx").exists():
        return "is pre-training data: leave the flag out"
    if Path(f"{prefix}_packed_chosen_input_ids_document.idx").exists():
        return "is preference data, which ml-train pretrain does not train on"
    return None
