"""Instruction and preference data on disk, as ml-data writes them, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_data.atomic import FileSet
from ml_data.indexed import IndexedDatasetWriter

Sample = tuple[list[int], list[int]]
"""Ids and labels."""


def write_column(prefix: Path | str, name: str, rows: Sequence[Sequence[Sequence[int]]]) -> None:
    """Write one dataset: documents of sequences of tokens."""
    with FileSet() as files:
        writer = IndexedDatasetWriter(f"{prefix}_packed_{name}_document", np.int32, files)
        for row in rows:
            lengths = np.array([len(sequence) for sequence in row], np.int64)
            tokens = np.array([token for sequence in row for token in sequence], np.int32)
            writer.add_documents(tokens, lengths, np.array([len(row)]))
        writer.write_index()
        files.publish()


def write_rows(prefix: Path | str, rows: Sequence[Sequence[Sample]], side: str = "") -> str:
    """Write rows of samples; a row of one is a sample that is not packed."""
    write_column(prefix, f"{side}input_ids", [[ids for ids, _ in row] for row in rows])
    write_column(prefix, f"{side}labels", [[labels for _, labels in row] for row in rows])
    return str(prefix)


def made_up(lengths: Sequence[int], *, first: int = 0, asked: int = 2) -> list[Sample]:
    """Return samples whose ids count up through all of them; the first ones are not learned."""
    samples = []
    for length in lengths:
        ids = list(range(first, first + length))
        samples.append((ids, [-100 if i < asked else id_ for i, id_ in enumerate(ids)]))
        first += length
    return samples
