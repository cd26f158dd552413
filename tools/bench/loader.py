"""How fast a run finds its data and reads them: start-up, and samples a second of one process.

For `tools/bench/data.py`, and on its own:

    python tools/bench/loader.py --tokens 1e8

The tokens are random: reading does not depend on what they say. Files are in the page cache, as
they are when a run is started again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_data.atomic import FileSet
from ml_data.indexed import IndexedDatasetWriter
from ml_data.instruction.turns import IGNORED

LENGTH = 1024
"""Tokens of a row of a batch."""
MICRO_BATCH = 4
STEPS = 500
RUN_SAMPLES = 100_000


class LoaderTimes(NamedTuple):
    """What one kind of data takes."""

    kind: str
    tokens: int
    first_start: float
    """Seconds from the flags to the first batch, when nothing is cached."""
    start: float
    """The same at the next start."""
    samples_per_second: float

    def row(self) -> str:
        """Return a row of `HEADER`."""
        return (
            f"| {self.kind} | {self.tokens:,} | {self.first_start:.2f} s | {self.start:.2f} s "
            f"| {self.samples_per_second:,.0f} |"
        )


HEADER = (
    f"| data | tokens | first start | next start | samples of {LENGTH} / s |\n"
    "| --- | ---: | ---: | ---: | ---: |"
)


def measure(folder: Path, tokens: int) -> Iterator[LoaderTimes]:
    """Make data of about so many tokens under `folder`, and measure one kind after the other."""
    from ml_parallel.testing import run_ranks

    write_corpus(folder / "corpus", tokens)
    write_instructions(folder / "alone", tokens, packed=False)
    write_instructions(folder / "packed", tokens, packed=True)
    for kind, name in (
        ("pre-training", "corpus"),
        ("instruction", "alone"),
        ("instruction, packed", "packed"),
    ):
        # Each start is a process of its own, as a run is.
        starts = [run_ranks(_start, 1, str(folder / name))[0] for _ in range(2)]
        yield LoaderTimes(kind, tokens, starts[0][0], starts[1][0], starts[1][1])


def write_corpus(prefix: Path, tokens: int) -> None:
    """Write documents of a few hundred tokens."""
    lengths = _lengths(tokens)
    with FileSet() as files:
        _write(prefix, _ids(lengths), lengths, None, files)
        files.publish()


def write_instructions(prefix: Path, tokens: int, *, packed: bool) -> None:
    """Write samples whose second half is the answer; packed: about as many as fit into a row."""
    lengths = _lengths(tokens)
    ids = _ids(lengths)
    ends = np.cumsum(lengths)
    places = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    labels = np.where(places < np.repeat(lengths // 2, lengths), np.int32(IGNORED), ids)
    sequences = _next_fit(lengths) if packed else None
    with FileSet() as files:
        for name, column in (("input_ids", ids), ("labels", labels)):
            _write(Path(f"{prefix}_packed_{name}_document"), column, lengths, sequences, files)
        files.publish()


def _next_fit(lengths: np.ndarray) -> np.ndarray:
    rows, room = [0], LENGTH
    for length in lengths.tolist():
        if length > room:
            rows.append(0)
            room = LENGTH
        rows[-1] += 1
        room -= length
    return np.array(rows)


def _lengths(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(50, 1000, max(8, tokens // 525))


def _ids(lengths: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 32_000, int(lengths.sum()), dtype=np.int32)


def _write(
    prefix: Path,
    ids: np.ndarray,
    lengths: np.ndarray,
    sequences: np.ndarray | None,
    files: FileSet,
) -> None:
    writer = IndexedDatasetWriter(prefix, np.int32, files)
    writer.add_documents(ids, lengths, sequences)
    writer.write_index()


def _start(prefix: str) -> tuple[float, float]:
    """Return the seconds to the first batch, and samples a second; on a rank."""
    batches = _batches(prefix)
    begun = time.perf_counter()
    step = batches()
    next(step)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in step:
        pass
    return first, STEPS * MICRO_BATCH / (time.perf_counter() - begun)


def _batches(prefix: str) -> Callable[[], Iterator[object]]:
    """Return what opens the data and gives the batches of a step, everything imported."""
    import torch

    from ml_train.batches import TokenBatches
    from ml_train.data import build_datasets
    from ml_train.instruction_samples import build_instructions
    from ml_train.settings import DataConfig

    is_instruction = Path(f"{prefix}_packed_labels_document.idx").exists()
    config = DataConfig(data_path=(prefix,), is_instruction_dataset=is_instruction)

    def begin() -> Iterator[object]:
        run = (RUN_SAMPLES, 0, 0)
        if is_instruction:
            datasets = build_instructions(
                config, seq_length=LENGTH, multiple=8, seed=1, samples=run
            )
        else:
            datasets = build_datasets(config, seq_length=LENGTH, seed=1, samples=run)
        batches = TokenBatches(
            datasets.train,
            micro_batch_size=MICRO_BATCH,
            data_parallel_rank=0,
            data_parallel_size=1,
            vocab_size=32_000,
            device=torch.device("cpu"),
        )
        return batches.step(0, STEPS + 1)

    return begin


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Start-up and speed of the loader.")
    parser.add_argument("--tokens", type=float, default=1e8, help="in each kind of data")
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(f"{HEADER}\n")
        for times in measure(Path(folder), int(parser.parse_args(argv).tokens)):
            sys.stdout.write(f"{times.row()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
