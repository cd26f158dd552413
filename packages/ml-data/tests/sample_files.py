"""What `ml-data instruct` takes and writes, for its tests: records in, sequences of tokens out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ml_data.indexed import IndexedDataset
from ml_data.instruct import main

ALPACA = "AlpacaStyleInstructionHandler"


def runner(bpe: Path, folder: Path) -> Callable[..., Path]:
    """Return a function that runs the command, and returns the prefix of what it wrote."""

    def run(
        given: Path | Sequence[Any],
        *flags: str,
        handler: str = ALPACA,
        prompt: str | None = "default",
        name: str = "out",
    ) -> Path:
        """Run on a file, on files, or on records."""
        paths = [given] if isinstance(given, Path) else list(given)
        if not isinstance(paths[0], Path):
            paths = [write(folder / "records.jsonl", paths)]
        argv = ["--input", *map(str, paths), "--output-prefix", str(folder / name)]
        argv += ["--handler-name", handler, "--tokenizer-name-or-path", str(bpe)]
        argv += ["--prompt-type", prompt] if prompt else []
        argv += [] if "--workers" in flags else ["--workers", "1"]
        assert main([*argv, *flags], "ml-data instruct") == 0
        return folder / name

    return run


def write(path: Path, records: Sequence[Any]) -> Path:
    """Write records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def column(prefix: Path, name: str) -> list[list[list[int]]]:
    """Return the sequences of each document."""
    dataset = IndexedDataset(f"{prefix}_packed_{name}_document")
    assert dataset.dtype == np.int32
    ends = np.cumsum(dataset.sequence_lengths)[:-1]
    sequences = [part.tolist() for part in np.split(np.asarray(dataset.tokens), ends)]
    return [sequences[begin:end] for begin, end in pairwise(dataset.document_indices)]


def samples(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Return (input ids, labels) of each sample of files that are not packed."""
    columns = [column(prefix, name) for name in ("input_ids", "labels")]
    assert all(len(document) == 1 for both in columns for document in both)
    return [(ids, labels) for (ids,), (labels,) in zip(*columns, strict=True)]
