"""`ml-data merge`: datasets of parts of a corpus to the dataset of all of it.

ModelLink's `merge_datasets.py`: a directory of datasets, keys, a prefix. The result is byte for
byte what preparing everything in one go writes, if the names of the parts sort as the parts do; but
duplicates across parts, which `--deduplicate` would leave out, stay.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_data.atomic import FileSet, exit_on_sigterm, naming
from ml_data.description import to_json
from ml_data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path
from ml_data.instruction.sample_info import (
    SampleInfo,
    check_prefix,
    info_path,
    kind_of,
    read_sample_info,
)
from ml_data.merged_info import check_corpora, check_samples, merged_corpus, merged_samples
from ml_data.sidecar import read_sidecar, sidecar_path
from ml_models.flags import UsageError, parse

logger = logging.getLogger(__name__)

_BLOCK_TOKENS = 1 << 22
_SAMPLES = "packed_"
"""How the keys of instruction and preference data begin: their files go through in step."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Join datasets of parts of a corpus to one."""

    input: str
    """Directory of the datasets; the order is that of their names."""
    keys: tuple[str, ...] = ("text_document",)
    """Ends of their names, each of which gives a dataset: text_document joins *_text_document, but
    not those that their descriptions say are of another key, such as full_text."""
    output_prefix: str
    """The datasets are PREFIX_KEY.bin and .idx."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("--keys needs at least one value, such as text_document")
        for key in self.keys:
            if not key or "/" in key or self.keys.count(key) > 1:
                raise ValueError(f"--keys {key!r}: a key is given once, and is part of a file name")


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    with exit_on_sigterm():
        merge(parse(MergeConfig, argv, prog=prog))
    return 0


def merge(config: MergeConfig) -> None:
    """Write the joined datasets of all keys.

    Raises:
        UsageError: There is nothing to join for a key, a part is damaged, or parts do not fit
            together: other types of tokens, other tokenizers.
        OSError: The files cannot be written.
    """
    target = Path(config.output_prefix).expanduser()
    directory = Path(config.input).expanduser()
    parts = {key: _find(directory, key, config.keys, target) for key in config.keys}
    of_samples = {key: found for key, found in parts.items() if key.startswith(_SAMPLES)}
    for key in of_samples:
        check_prefix(target, kind_of(key.removeprefix(_SAMPLES)))
    samples = _samples(of_samples)
    with FileSet() as files:
        description = files.create(info_path(target)) if samples else None
        if of_samples and not samples:
            files.remove(info_path(target))
        writers = {key: _merge(found, f"{target}_{key}", files) for key, found in parts.items()}
        if description is not None:
            ours = {key: writers[key] for key in of_samples}
            description.write(to_json(merged_samples(samples, ours)).encode())
        files.publish()
    for key, found in parts.items():
        logger.info("%s_%s: %s", target, key, ", ".join(path.name for path in found))


def _find(directory: Path, key: str, keys: Sequence[str], target: Path) -> list[Path]:
    """Return the prefixes of the datasets of a key, in order; never the target of this run."""
    if not directory.is_dir():
        raise UsageError(f"--input {directory}: no such directory")
    datasets = sorted({path.with_suffix("") for path in _files(directory)})
    ours = target.parent.resolve() / f"{target.name}_{key}"
    named = [path for path in datasets if path.name.endswith(f"_{key}")]
    of = {path: _key(path, keys) for path in named if directory.resolve() / path.name != ours}
    found = [path for path, its_key in of.items() if its_key == key]
    if not found:
        present = ", ".join(path.name for path in datasets) or "no dataset"
        others = "".join(f"; {path.name} is of {its_key}" for path, its_key in of.items())
        raise UsageError(
            f"--keys {key}: --input {directory} has no *_{key}; it has {present}{others}"
        )
    if not key.startswith(_SAMPLES):
        _check_names(found, key)
    return found


def _key(path: Path, keys: Sequence[str]) -> str:
    """Return the key of a dataset: what its description says, or the longest that its name has."""
    info = read_sidecar(path)
    if info is not None:
        return f"{info.key}_{info.level}"
    return max((key for key in keys if path.name.endswith(f"_{key}")), key=len)


def _check_names(found: Sequence[Path], key: str) -> None:
    """Refuse names without a description that do not say where the key begins.

    Beside `a_text_document`, `a_full_text_document` may be the column `full_text` of the same part.
    Columns do not begin with a number, parts (`a_2_text_document`) do.
    """
    parts = {path.name.removesuffix(f"_{key}"): path for path in found}
    for name, path in parts.items():
        words = name.split("_")
        for count in range(1, len(words)):
            part, longer = "_".join(words[:count]), "_".join([*words[count:], key])
            if part in parts and not longer[0].isdigit() and read_sidecar(path) is None:
                raise UsageError(
                    f"--keys {key}: {path} may be of the key {longer}, as {parts[part].name} is "
                    "there too; give both keys, or rename it"
                )


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.iterdir():
        if path.suffix in (".bin", ".idx") and path.is_file() and not path.name.startswith("."):
            yield path


def _samples(parts: Mapping[str, Sequence[Path]]) -> list[SampleInfo]:
    """Return the descriptions of the parts of instruction or preference data, if all have one.

    Raises:
        UsageError: Not every part has all the keys.
    """
    prefixes = {
        key: [str(path).removesuffix(f"_{key}") for path in found] for key, found in parts.items()
    }
    first = next(iter(prefixes), "")
    for key, found in prefixes.items():
        for odd in sorted(set(found) ^ set(prefixes[first])):
            raise UsageError(f"--keys {first} {key}: of {odd} only one is there")
    of_all = prefixes.get(first, [])
    infos = {prefix: info for prefix in of_all if (info := read_sample_info(prefix)) is not None}
    if infos:
        check_samples(infos)
    return list(infos.values()) if len(infos) == len(of_all) else []


def _merge(parts: Sequence[Path], target: str, files: FileSet) -> IndexedDatasetWriter:
    """Join datasets, with a description if every part has one."""
    dtypes = [IndexedDataset(part).dtype for part in parts]  # one open at a time, here and below
    for part, dtype in zip(parts, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise UsageError(
                f"{part}: its tokens are {dtype.name}, those of {parts[0]} {dtypes[0].name}"
            )
    infos = {str(part): info for part in parts if (info := read_sidecar(part)) is not None}
    if infos:
        check_corpora(infos)
    described = list(infos.values()) if len(infos) == len(parts) else []
    counts = np.zeros(described[0].vocab_size if described else 0, np.int64)
    writer = IndexedDatasetWriter(target, dtypes[0], files)
    _copy(parts, writer, counts)
    path = sidecar_path(target)
    if not described:
        files.remove(path)  # it would be of other tokens
        writer.write_index()
        return writer
    with naming(path):
        description = files.create(path)  # before the index, which is published last
        writer.write_index()
        description.write(to_json(merged_corpus(described, writer, counts)).encode())
    return writer


def _copy(parts: Sequence[Path], writer: IndexedDatasetWriter, counts: NDArray[np.int64]) -> None:
    """Append all documents, and count their tokens if there are counts.

    Raises:
        UsageError: tokens of a part are not those that its description was made for.
    """
    for part in parts:
        info, digest = read_sidecar(part), hashlib.sha256()
        for tokens, lengths, sequences in _blocks(part):
            writer.add_documents(tokens, lengths, sequences)
            digest.update(tokens.view(np.uint8).data)
            if len(counts):
                _check_vocabulary(part, tokens, len(counts))
                counts += np.bincount(tokens, minlength=len(counts))
        if info and digest.hexdigest() != info.bin_sha256:
            raise UsageError(
                f"{bin_path(part)}: damaged: its tokens are not those that {sidecar_path(part)} "
                "describes (sha256)"
            )


def _check_vocabulary(part: Path, tokens: NDArray[Any], vocab_size: int) -> None:
    for token in (tokens.min(), tokens.max()) if len(tokens) else ():
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"{bin_path(part)}: damaged: it holds {token}, "
                f"{sidecar_path(part)} says a vocabulary of {vocab_size:,}"
            )


def _blocks(part: Path) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Yield (tokens, lengths, sequences) of some whole documents at a time.

    They are read, not mapped: the pages of a map would count as memory of this process.
    """
    dataset = IndexedDataset(part)
    firsts, lengths = dataset.document_indices, dataset.sequence_lengths
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[firsts]
    with bin_path(part).open("rb") as file:
        start = 0
        while start < len(dataset):
            goal = ends[start] + _BLOCK_TOKENS
            stop = max(start + 1, int(np.searchsorted(ends, goal, "right")) - 1)
            tokens = np.fromfile(file, dataset.dtype, int(ends[stop] - ends[start]))
            sequences = np.diff(firsts[start : stop + 1])
            yield tokens, lengths[firsts[start] : firsts[stop]], sequences
            start = stop
