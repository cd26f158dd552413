"""The description of a dataset that was joined from parts: what they share, and sums."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_data.indexed import IndexedDatasetWriter
from ml_data.instruction.sample_info import FileInfo, SampleInfo
from ml_data.sidecar import CorpusInfo, unigram_entropy
from ml_models.flags import UsageError

_CORPUS_SAME = (
    *("tokenizer_identity", "vocab_size", "eod", "append_eod", "seq_length", "key"),
    "level",
)
_CORPUS_SUMS = (
    *("documents", "empty_documents", "too_long_documents", "duplicate_documents"),
    *("failed_records", "sequences", "tokens", "text_bytes"),
)
_SAMPLE_SAME = (
    *("kind", "tokenizer_identity", "vocab_size", "eod", "template", "append_eod"),
    *("seq_length", "packed"),
)
_SAMPLE_SUMS = ("samples", "rows", "cut", "tokens", "learned_tokens", "records", "failed")


def check_corpora(infos: Mapping[str, CorpusInfo]) -> None:
    """Check that datasets, by prefix, can become one.

    Raises:
        UsageError: They cannot.
    """
    _check_same(infos, _CORPUS_SAME)


def check_samples(infos: Mapping[str, SampleInfo]) -> None:
    """Check that instruction or preference data, by prefix, can become one.

    Raises:
        UsageError: They cannot.
    """
    _check_same(infos, _SAMPLE_SAME)


def merged_corpus(
    infos: Sequence[CorpusInfo], writer: IndexedDatasetWriter, counts: NDArray[np.int64]
) -> CorpusInfo:
    """Return the description of corpora together.

    Args:
        infos: Their descriptions.
        writer: Wrote the files.
        counts: (vocabulary,), how often each token occurs.
    """
    return dataclasses.replace(
        infos[0],
        **_sums(infos, _CORPUS_SUMS),
        unigram_entropy=unigram_entropy(counts),
        bin_bytes=writer.bin_bytes,
        bin_sha256=writer.bin_sha256,
        idx_sha256=writer.idx_sha256,
        created_by=f"ml-data {version('ml-data')}",
    )


def merged_samples(
    infos: Sequence[SampleInfo], writers: Mapping[str, IndexedDatasetWriter]
) -> SampleInfo:
    """Return the description of instruction or preference data together.

    Args:
        infos: Their descriptions.
        writers: Wrote the files, by key (`packed_labels_document`).
    """
    skipped: Counter[str] = Counter()
    for info in infos:
        skipped.update(info.skipped)
    files = {
        key.removeprefix("packed_").removesuffix("_document"): FileInfo(
            bin_bytes=writer.bin_bytes, bin_sha256=writer.bin_sha256, idx_sha256=writer.idx_sha256
        )
        for key, writer in writers.items()
    }
    return dataclasses.replace(
        infos[0],
        **_sums(infos, _SAMPLE_SUMS),
        longest=max(info.longest for info in infos),
        handlers=tuple(dict.fromkeys(name for info in infos for name in info.handlers)),
        skipped=dict(skipped),
        files=files,
        created_by=f"ml-data {version('ml-data')}",
    )


def _sums(infos: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: sum(getattr(info, name) for info in infos) for name in names}


def _check_same(infos: Mapping[str, Any], names: Sequence[str]) -> None:
    first, *others = infos
    for name in names:
        expected = getattr(infos[first], name)
        for other in others:
            if (found := getattr(infos[other], name)) != expected:
                raise UsageError(f"{other}: {name} is {found}, that of {first} is {expected}")
