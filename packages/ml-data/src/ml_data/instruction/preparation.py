"""What `ml-data instruct` and `ml-data preference` have in common: records to files of samples.

As in pre-training, this process cuts the files into chunks, workers encode them, and this process
writes the samples in the order of the input: the files are the same for any number of workers, and
appear all at once when everything has worked.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml_data.account import Account, OnError, Problem
from ml_data.atomic import FileSet, exit_on_sigterm, naming
from ml_data.description import TokenizerInfo, to_json
from ml_data.handlers.dataset_info import Dataset
from ml_data.indexed import IndexedDatasetWriter
from ml_data.instruction.mixing import MixStrategy, Spool, gather, interleaved
from ml_data.instruction.packing import Packer
from ml_data.instruction.ragged import Samples
from ml_data.instruction.sample_encoding import EncodedChunk, SampleEncoding, make_sample_encoder
from ml_data.instruction.sample_info import (
    FileInfo,
    Kind,
    SampleInfo,
    check_prefix,
    info_path,
    kind_of,
)
from ml_data.instruction.turns import IGNORED
from ml_data.progress import Done, Progress, show_progress
from ml_data.reading import Chunk, read_chunks
from ml_data.tokenizer import Tokenizer
from ml_data.workers import map_ordered
from ml_models.flags import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that decides what is written."""

    encoding: SampleEncoding
    output_prefix: str
    pack: bool = False
    mix_strategy: MixStrategy = "concat"
    interleave_probs: tuple[float, ...] | None = None
    seed: int = 1234
    on_error: OnError = "stop"
    workers: int = 1

    @property
    def prefix(self) -> str:
        """`output_prefix` with ~ as the home directory."""
        return str(Path(self.output_prefix).expanduser())

    @property
    def kind(self) -> Kind:
        """What a sample is."""
        return kind_of(self.encoding.columns[0])


def run(preparation: Preparation, log_interval: int) -> int:
    """Prepare with progress and a summary on the log; return the exit code."""
    files = [path for dataset in preparation.encoding.datasets for path in dataset.input]
    total = sum(Path(path).stat().st_size for path in files)
    with exit_on_sigterm(), show_progress(total, log_interval) as progress:
        info, account = prepare(preparation, progress)
    for line in (*account.summary(), *_summary(preparation.prefix, info, account)):
        logger.info("%s", line)
    return 0


def prepare(preparation: Preparation, progress: Progress) -> tuple[SampleInfo, SampleAccount]:
    """Write the files and return their description, and what became of every record.

    Raises:
        UsageError: an input, the tokenizer or the template is missing or not as it should be, a
            record is not what its format says (with `on_error` stop), there is no sample at all, or
            data of the other kind lie at the prefix.
        OSError: the files cannot be written, or a worker died.
    """
    check_prefix(preparation.prefix, preparation.kind)
    encoding = preparation.encoding
    tokenizer = encoding.tokenizer.load()
    for dataset in encoding.datasets:
        encoding.format_of(dataset, tokenizer)  # says what is wrong before anything is read
    account = SampleAccount()
    with FileSet() as files:
        writer = _Writer(preparation, tokenizer, files)
        with contextlib.closing(_encoded(preparation, account, progress)) as encoded:
            for samples in _mixed(preparation, account, encoded):
                writer.add(samples)
        info = writer.finish(account)
        files.publish()
    return info, account


def _summary(prefix: str, info: SampleInfo, account: SampleAccount) -> Iterator[str]:
    for reason, number in account.partial.items():
        yield f"  {number:,} samples of records that gave others left out: {reason}"
    rows = f" in {info.rows:,} rows" if info.packed else ""
    if info.cut:
        yield f"  {info.cut:,} samples of them cut to {info.seq_length:,} tokens"
    yield (
        f"{prefix}_packed: {info.samples:,} samples{rows}, {info.tokens:,} tokens "
        f"({info.learned_tokens / info.tokens:.0%} learned), the longest has {info.longest:,}"
    )


class SampleAccount(Account):
    """Of records, and of samples where a record gives several."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 0
        self.partial: Counter[str] = Counter()

    def count(self, chunk: EncodedChunk, on_error: OnError) -> None:
        """Count the records of a chunk.

        Raises:
            UsageError: one of them cannot be used, and `on_error` says to stop.
        """
        for reason in chunk.reasons.values():
            if not isinstance(reason, Problem):
                self.skipped[reason] += 1
            elif on_error == "stop":
                raise UsageError(f"{reason} (--on-error skip leaves such records out)")
            else:
                self.fail(reason)
        self.written += int(np.count_nonzero(chunk.counts))
        self.cut += int(np.count_nonzero(chunk.cut))
        self.partial.update(reason for _, reason in chunk.partial)

    def leave_out(self, records: int) -> None:
        """Count records that have been encoded, but are not wanted."""
        self.written -= records
        if records:
            self.skipped["after the end of --mix-strategy interleave_under"] += records


# From files to samples in their final order.


def _encoded(
    preparation: Preparation, account: SampleAccount, progress: Progress
) -> Generator[EncodedChunk, None, None]:
    """Yield encoded chunks, dataset by dataset, up to the records that each may give."""
    datasets = preparation.encoding.datasets
    left = [dataset.max_samples or sys.maxsize for dataset in datasets]
    missing = [dataset.columns.named for dataset in datasets]
    arguments = (preparation.encoding,)
    encoded = map_ordered(
        make_sample_encoder, arguments, _chunks(preparation, left), workers=preparation.workers
    )
    with contextlib.closing(encoded):
        for whole in encoded:
            chunk = whole.head(left[whole.dataset])
            left[chunk.dataset] -= len(chunk.counts)
            missing[chunk.dataset] &= chunk.missing
            account.count(chunk, preparation.on_error)
            progress(Done(chunk.consumed, len(chunk.counts), chunk.text_bytes))
            yield chunk
    for dataset, columns in zip(datasets, missing, strict=True):
        _check_columns(dataset, columns)


def _check_columns(dataset: Dataset, missing: frozenset[str]) -> None:
    """Refuse a column that was named and is in no record: a slip of the pen, most likely."""
    if missing:
        names = ", ".join(map(repr, sorted(missing)))
        raise UsageError(
            f"{dataset.columns.named_by}: no record of {' '.join(dataset.input)} has a column "
            f"{names}"
        )


def _chunks(preparation: Preparation, left: list[int]) -> Iterator[tuple[int, Chunk]]:
    for number, dataset in enumerate(preparation.encoding.datasets):
        for chunk in _chunks_of(dataset):
            if not left[number]:
                break
            yield number, chunk


def _chunks_of(dataset: Dataset) -> Iterator[Chunk]:
    for path in dataset.input:
        yield from read_chunks(Path(path))


def _mixed(
    preparation: Preparation, account: SampleAccount, encoded: Iterator[EncodedChunk]
) -> Iterator[Samples]:
    """Yield the samples of all datasets in their final order."""
    if preparation.mix_strategy == "concat":
        yield from (chunk.samples for chunk in encoded)
        return
    with contextlib.ExitStack() as stack:
        yield from _interleaved(preparation, account, encoded, stack)


def _interleaved(
    preparation: Preparation,
    account: SampleAccount,
    encoded: Iterator[EncodedChunk],
    stack: contextlib.ExitStack,
) -> Iterator[Samples]:
    datasets, columns = preparation.encoding.datasets, preparation.encoding.columns
    directory = Path(preparation.prefix).parent
    spools = [Spool(directory, columns, stack) for _ in datasets]
    for chunk in encoded:
        spools[chunk.dataset].add(chunk.samples, chunk.counts)
    spooled = [spool.finish() for spool in spools]
    sizes = [len(dataset.counts) for dataset in spooled]
    for dataset, size in zip(datasets, sizes, strict=True):
        if not size:
            raise UsageError(f"--input {' '.join(dataset.input)}: no sample to interleave")
    order = interleaved(
        sizes, preparation.mix_strategy, preparation.interleave_probs, preparation.seed
    )
    drawn = np.zeros(len(sizes), np.int64)
    for piece in order:
        drawn += np.bincount(piece[:, 0], minlength=len(sizes))
        yield gather(spooled, piece)
    account.leave_out(int(np.maximum(sizes - drawn, 0).sum()))


# From samples to files.


class _Writer:
    """The datasets of all columns, while they are written."""

    def __init__(self, preparation: Preparation, tokenizer: Tokenizer, files: FileSet) -> None:
        self._preparation, self._tokenizer, self._files = preparation, tokenizer, files
        self._columns = preparation.encoding.columns
        self._writers = {
            name: IndexedDatasetWriter(
                f"{preparation.prefix}_packed_{name}_document", np.int32, files
            )
            for name in _files_of(self._columns)
        }
        seq_length = preparation.encoding.limits.seq_length
        self._packer = Packer(seq_length) if preparation.pack and seq_length else None
        self._sums: Counter[str] = Counter()
        self._longest = 0

    def add(self, samples: Samples) -> None:
        """Append samples."""
        if self._packer is None:
            self._write(samples)
            return
        for packed, rows in self._packer.add(samples):
            self._write(packed, rows)

    def finish(self, account: SampleAccount) -> SampleInfo:
        """Write what is left, the indices, and the description."""
        for packed, rows in self._packer.rest() if self._packer else ():
            self._write(packed, rows)
        if not self._sums["samples"]:
            lines = "; ".join(line.strip() for line in account.summary())
            raise UsageError(f"--input: not one sample: {lines}")
        path = info_path(self._preparation.prefix)
        with naming(path):
            description = self._files.create(path)
            for writer in self._writers.values():
                writer.write_index()
            info = self._info(account)
            description.write(to_json(info).encode())
        return info

    def _write(self, samples: Samples, rows: NDArray[np.int64] | None = None) -> None:
        """Write samples, each a document or `rows` of them one."""
        for name, column in samples.items():
            self._writers[name].add_documents(column.tokens, column.lengths, rows)
            if name.endswith("input_ids"):
                self._sums["tokens"] += len(column.tokens)
                self._longest = max(self._longest, int(column.lengths.max(initial=0)))
            else:
                self._sums["learned"] += int(np.count_nonzero(column.tokens != IGNORED))
        first = samples[self._columns[0]]
        if "attention_mask" in self._writers:
            ones = np.ones(len(first.tokens), np.int32)
            self._writers["attention_mask"].add_documents(ones, first.lengths, rows)
        self._sums["samples"] += len(first)
        self._sums["rows"] += len(first) if rows is None else len(rows)

    def _info(self, account: SampleAccount) -> SampleInfo:
        encoding = self._preparation.encoding
        return SampleInfo(
            kind=self._preparation.kind,
            **vars(TokenizerInfo.of(self._tokenizer)),
            template=encoding.template_name,
            handlers=tuple(dataset.handler for dataset in encoding.datasets),
            append_eod=encoding.append_eod,
            seq_length=encoding.limits.seq_length,
            packed=self._packer is not None,
            samples=self._sums["samples"],
            rows=self._sums["rows"],
            cut=account.cut,
            tokens=self._sums["tokens"],
            learned_tokens=self._sums["learned"],
            longest=self._longest,
            records=account.read,
            skipped=dict(account.skipped),
            failed=account.failed,
            files={
                name: FileInfo(
                    bin_bytes=writer.bin_bytes,
                    bin_sha256=writer.bin_sha256,
                    idx_sha256=writer.idx_sha256,
                )
                for name, writer in self._writers.items()
            },
            created_by=f"ml-data {version('ml-data')}",
        )


def _files_of(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the files: those of ModelLink, which has an attention mask of ones."""
    return (columns[0], "attention_mask", *columns[1:]) if columns[0] == "input_ids" else columns
