"""Token files to test with, as ml-data writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_data.atomic import FileSet
from ml_data.description import to_json
from ml_data.indexed import IndexedDatasetWriter
from ml_data.sidecar import CorpusInfo, sidecar_path

INFO = CorpusInfo(
    tokenizer="tokenizers/a",
    tokenizer_kind="tokenizers",
    tokenizer_identity="a",
    vocab_size=100_000,
    bos=None,
    eod=7,
    pad=7,
    append_eod=True,
    key="text",
    documents=0,
    empty_documents=0,
    too_long_documents=0,
    seq_length=None,
    tokens=0,
    text_bytes=0,
    unigram_entropy=1.0,
    dtype="int32",
    bin_bytes=0,
    bin_sha256="",
    created_by="test",
)


Sample = tuple[list[int], list[int]]
"""Ids and labels."""


def write_corpus(prefix: Path, lengths: Sequence[int], *, first: int = 0) -> str:
    """Write documents of these lengths; the tokens count up from `first` through all of them."""
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, np.int32, files)
        writer.add_documents(np.arange(first, first + sum(lengths)), np.array(lengths))
        writer.write_index()
        files.publish()
    return str(prefix)


def describe(prefix: str, **changes: object) -> str:
    """Put a description beside a corpus."""
    size = Path(f"{prefix}.bin").stat().st_size
    info = dataclasses.replace(INFO, bin_bytes=size, **changes)
    sidecar_path(prefix).write_text(to_json(info))
    return prefix


def write_rows(prefix: Path, rows: Sequence[Sequence[Sample]], side: str = "") -> str:
    """Write instruction data, or a side of preferences; a row of several samples is packed."""
    lengths = np.array([len(ids) for row in rows for ids, _ in row], np.int64)
    sequences = np.array([len(row) for row in rows])
    with FileSet() as files:
        for number, name in enumerate(("input_ids", "labels")):
            tokens = [token for row in rows for sample in row for token in sample[number]]
            path = f"{prefix}_packed_{side}{name}_document"
            writer = IndexedDatasetWriter(path, np.int32, files)
            writer.add_documents(np.array(tokens, np.int32), lengths, sequences)
            writer.write_index()
        files.publish()
    return str(prefix)


def made_up(lengths: Sequence[int], *, first: int = 0) -> list[Sample]:
    """Return samples whose ids count up through all of them; two of each are not learned."""
    samples = []
    for length in lengths:
        ids = list(range(first, first + length))
        samples.append((ids, [-100, -100, *ids[2:]][:length]))
        first += length
    return samples
