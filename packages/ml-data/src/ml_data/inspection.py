"""`ml-data inspect`: what is in a dataset, checked to be whole.

A dataset is one pair of files (texts for pre-training) or several that belong together (input ids
and labels of instructions or preferences); which one is seen from the files that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_data.histogram import Histogram
from ml_data.indexed import IndexedDataset, bin_path, idx_path
from ml_data.instruction.sample_info import SampleInfo, info_path, read_sample_info
from ml_data.instruction.turns import IGNORED
from ml_data.preview import preview
from ml_data.sidecar import CorpusInfo, read_sidecar
from ml_data.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from ml_models.flags import UsageError, parse

_BLOCK = 1 << 20
"""Tokens that are looked at together."""

Info = CorpusInfo | SampleInfo


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a dataset holds, and that its files are whole."""

    data_path: str
    """The dataset: the prefix of its files, as for training."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer to show text with; by default the one that made the dataset, if it is there."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default what is there decides."""
    samples: int = 1
    """Documents to show as text, spread evenly from the first to the last."""
    verify: bool = False
    """Read every token: compare the hashes of the files, and the ids with the vocabulary."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"--samples {self.samples}: must not be negative")


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    from rich.console import Console

    config = parse(InspectConfig, argv, prog=prog)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have all that data has
        sys.stdout.reconfigure(errors="backslashreplace")
    dataset = open_dataset(str(Path(config.data_path).expanduser()))
    console = Console(highlight=False, soft_wrap=True)
    for name, value in [*describe(dataset), *check(dataset, verify=config.verify)]:
        console.out(f"{name:22}{value}", highlight=False)
    for line in histogram(dataset):
        console.out(line, highlight=False)
    if config.samples and len(dataset):
        tokenizer = _tokenizer(config, dataset.info)
        if isinstance(tokenizer, str):
            console.out(f"{'text':22}not shown: {tokenizer}", highlight=False)
        else:
            _check_vocabulary(dataset, tokenizer)
            for text in preview(dataset.columns, tokenizer, config.samples):
                console.print(text)
    sys.stdout.flush()
    return 0


# What there is


@dataclass(frozen=True)
class Dataset:
    """Files of tokens that belong together."""

    kind: str
    """What its documents are."""
    columns: Mapping[str, IndexedDataset]
    """By name; all have as many documents."""
    info: Info | None
    """The description beside them."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.main)

    @property
    def main(self) -> IndexedDataset:
        """The column that speaks for all."""
        return next(iter(self.columns.values()))


_KINDS = {
    "instructions": ("input_ids", "labels", "attention_mask"),
    "preferences": ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"),
}
_COLUMN = re.compile(rf"(.*)_packed_({'|'.join(sum(_KINDS.values(), ()))})_document")
"""Prefix of one column: all of them are looked at."""
_OPTIONAL = ("attention_mask",)
"""ml-train does not read it."""


def open_dataset(prefix: str) -> Dataset:
    """Open the dataset at `prefix`, of whatever kind.

    Raises:
        UsageError: a file of it is missing, torn, damaged or of another dataset than the others.
    """
    if match := _COLUMN.fullmatch(prefix):
        prefix = match[1]
    for kind, names in _KINDS.items():
        paths = {name: f"{prefix}_packed_{name}_document" for name in names}
        if idx_path(paths[names[0]]).exists():
            columns = {
                name: IndexedDataset(path)
                for name, path in paths.items()
                if name not in _OPTIONAL or idx_path(path).exists()
            }
            _check_alignment(columns)
            return Dataset(kind, columns, _sample_info(prefix, kind))
    return Dataset("texts", {"tokens": IndexedDataset(prefix)}, read_sidecar(prefix))


def _sample_info(prefix: str, kind: str) -> SampleInfo | None:
    """Return the description of samples of a kind, if there is one."""
    info = read_sample_info(prefix)
    if info is not None and f"{info.kind}s" != kind:
        raise UsageError(f"{info_path(prefix)}: describes {info.kind}s, but beside it are {kind}")
    return info


def _check_alignment(columns: Mapping[str, IndexedDataset]) -> None:
    """Check that labels and masks have the shape of their ids, and pairs are of two."""
    first = next(iter(columns.values()))
    for name, column in columns.items():
        if len(column) != len(first):
            raise UsageError(
                f"{idx_path(column.prefix)}: has {len(column):,} documents, "
                f"{idx_path(first.prefix)} has {len(first):,}: not of the same run"
            )
        ids = columns[name.replace("labels", "input_ids").replace("attention_mask", "input_ids")]
        for part in ("sequence_lengths", "document_indices"):
            if not np.array_equal(getattr(column, part), getattr(ids, part)):
                raise UsageError(
                    f"{idx_path(column.prefix)}: its samples have other lengths than those of "
                    f"{idx_path(ids.prefix)}"
                )


def describe(dataset: Dataset) -> Iterator[tuple[str, object]]:
    """Yield what is known of a dataset without reading its tokens, name and value."""
    main, info = dataset.main, dataset.info
    packed = len(main.sequence_lengths) != len(main)
    yield "kind", dataset.kind
    yield "documents", f"{len(dataset):,}"
    if packed:
        yield "sequences", f"{len(main.sequence_lengths):,}"
    for name, column in dataset.columns.items():
        if name.endswith(("input_ids", "tokens")):
            yield name, f"{len(column.tokens):,} tokens"
    yield "dtype", main.dtype.name
    if info is None:
        yield "description", "none (not written by ml-data)"
        return
    for field in dataclasses.fields(info):
        if field.name not in ("kind", "documents", "tokens", "dtype", "files"):
            yield field.name, _shown(getattr(info, field.name))


def _shown(value: object) -> object:
    match value:
        case tuple():
            return ", ".join(dict.fromkeys(map(str, value)))
        case dict():
            return "; ".join(f"{number:,} {reason}" for reason, number in value.items()) or "none"
        case int() if value > 999:
            return f"{value:,}"
        case float():
            return f"{value:.4f}"
    return value


def histogram(dataset: Dataset) -> Iterator[str]:
    """Yield lines about the lengths of the sequences."""
    for name, column in dataset.columns.items():
        if name.endswith(("input_ids", "tokens")) and len(column.sequence_lengths):
            lengths = Histogram()
            for start in range(0, len(column.sequence_lengths), _BLOCK):
                lengths.add(column.sequence_lengths[start : start + _BLOCK])
            yield "lengths" if len(dataset.columns) < 4 else f"lengths of {name}"
            yield from (f"  {line}" for line in lengths.lines())


# Whether it is right


def check(dataset: Dataset, *, verify: bool) -> Iterator[tuple[str, object]]:
    """Yield what was checked, name and result.

    Args:
        dataset: What to look at. Its labels are read, its texts only to verify.
        verify: Read all tokens.

    Raises:
        UsageError: a file is not what its description says.
    """
    for name, column in dataset.columns.items():
        if name.endswith("labels"):
            yield from _labels(name.removesuffix("labels"), column)
    checked = ["lengths, offsets and sizes"]
    for suffix in ("idx", "bin") if verify else ("idx",):  # that of the tokens takes time
        recorded = [
            (f"{column.prefix}.{suffix}", expected)
            for name, column in dataset.columns.items()
            if (expected := _recorded(dataset.info, name, suffix))
        ]
        for path, expected in recorded:
            _check_hash(Path(path), expected)
        checked += [f"hash of .{suffix}"] if recorded else []
    if dataset.info is not None and verify:
        _check_ids(dataset, dataset.info.vocab_size)
        checked.append("ids")
    yield "checked", ", ".join(checked)


def _labels(prefix: str, labels: IndexedDataset) -> Iterator[tuple[str, object]]:
    """Yield how much of the samples the loss sees."""
    learned = without = 0
    for sequences, tokens in _blocks(labels.sequence_lengths):
        seen = labels.tokens[tokens] != IGNORED
        learned += int(seen.sum())
        lengths = labels.sequence_lengths[sequences].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        seen[starts[lengths > 0]] = False  # nothing precedes it, nothing predicts it
        before = np.append(0, np.cumsum(seen))
        without += int((before[starts + lengths] == before[starts]).sum())
    total = len(labels.tokens)
    yield f"{prefix}learned", f"{learned:,} tokens ({learned / max(total, 1):.1%})"
    if without:
        yield f"{prefix}without label", f"{without:,} samples: nothing to learn, their loss is 0/0"


def _blocks(lengths: NDArray[np.int32]) -> Iterator[tuple[slice, slice]]:
    """Yield runs of sequences of about `_BLOCK` tokens, and where these tokens lie."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = start = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, start + _BLOCK, side="right")))
        stop = int(ends[last - 1])
        yield slice(first, last), slice(start, stop)
        first, start = last, stop


def _recorded(info: Info | None, name: str, suffix: str) -> str | None:
    """Return the hash that a description has of a file of a column."""
    if info is None:
        return None
    file = info.files.get(name) if isinstance(info, SampleInfo) else info
    return None if file is None else str(getattr(file, f"{suffix}_sha256"))


def _check_hash(path: Path, expected: str) -> None:
    hash_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hash_.update(block)
    if hash_.hexdigest() != expected:
        raise UsageError(f"{path}: altered: its sha256 is not the one its description has")


def _check_ids(dataset: Dataset, vocab_size: int) -> None:
    """Check that all tokens are of the vocabulary; labels may also be `IGNORED`."""
    for name, column in dataset.columns.items():
        if name == "attention_mask":
            continue
        for start in range(0, len(column.tokens), _BLOCK):
            _check_bounds(column, column.tokens[start : start + _BLOCK], vocab_size)


def _check_bounds(column: IndexedDataset, tokens: NDArray[Any], vocab_size: int) -> None:
    wrong = (tokens >= vocab_size) | (tokens < 0)
    if column.prefix.endswith("labels_document"):
        wrong &= tokens != IGNORED
    if wrong.any():
        raise UsageError(
            f"{bin_path(column.prefix)}: token {tokens[wrong][0]} is not in the vocabulary "
            f"of {vocab_size:,}"
        )


# With which tokenizer

_CHOOSE = "choose it with --tokenizer-name-or-path and --tokenizer-type"


def _tokenizer(config: InspectConfig, info: Info | None) -> Tokenizer | str:
    """Return the tokenizer to show text with, or why there is none.

    Raises:
        UsageError: the one that was given is not there, or not the one that made the dataset.
    """
    given = config.tokenizer_name_or_path
    if given is not None:
        tokenizer = load_tokenizer(given, config.tokenizer_type)
        if info is not None and not _same(tokenizer, info):
            raise UsageError(
                f"--tokenizer-name-or-path {given}: the dataset is of another one: {info.tokenizer}"
            )
        return tokenizer
    if info is None:
        return f"no tokenizer is known; {_CHOOSE}"
    try:
        tokenizer = load_tokenizer(info.tokenizer)
    except UsageError as error:
        return f"{error}; {_CHOOSE}"
    return tokenizer if _same(tokenizer, info) else f"{info.tokenizer} is another one by now"


def _same(tokenizer: Tokenizer, info: Info) -> bool:
    """Return whether a tokenizer is the one that made a dataset, whatever it puts around a text."""
    return _vocabulary(tokenizer.identity) == _vocabulary(info.tokenizer_identity)


def _vocabulary(identity: str) -> str:
    """Return an identity as far as the hash of the tokens in it."""
    found = re.match(r".*?[0-9a-f]{64}", identity)
    return identity if found is None else found[0]


def _check_vocabulary(dataset: Dataset, tokenizer: Tokenizer) -> None:
    ids = dataset.main[0]
    if len(ids) and (largest := int(ids.max())) >= tokenizer.vocab_size:
        raise UsageError(f"--tokenizer-name-or-path {tokenizer.path}: has no token {largest}")
