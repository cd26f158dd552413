"""Megatron's token files: `PREFIX.bin` holds the tokens, `PREFIX.idx` where each sequence lies.

The `.idx`, little endian: `MMIDIDX` and two zero bytes, u64 version (1), u8 code of the token type,
u64 number of sequences, u64 number of entries of the document index, i32 length of each sequence,
i64 byte offset of each sequence, i64 document index: the first sequence of each document, then the
number of sequences. (Multimodal files append one byte a sequence; they are not read here.) Byte for
byte what megatron-core's `IndexedDatasetBuilder` writes.

Offsets follow from lengths, and the size of the `.bin` from both: whatever else an index says is an
error. Writing keeps 4 bytes a sequence in memory, reading none.
"""

from __future__ import annotations

import glob
import hashlib
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ml_data.atomic import FileSet, naming
from ml_models.flags import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
"""Token types of the format; the code is the position, from 1."""
_IDS: dict[int, np.dtype[Any]] = {
    _TYPES.index(dtype.name) + 1: dtype for dtype in map(np.dtype, ("u1", "<u2", "<i4", "<i8"))
}
"""Those of ids, by code. One of each size: a code that was altered contradicts the offsets."""
_BLOCK = 1 << 20
"""Entries of an index that are checked at a time."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the token type Megatron chooses for a vocabulary: uint16 while it fits, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the tokens of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of a dataset."""
    return Path(f"{prefix}.idx")


class IndexedDatasetWriter:
    """Writes a dataset into `files`, which publish it."""

    def __init__(self, prefix: str | Path, dtype: DTypeLike, files: FileSet) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.bin_bytes = 0
        self._code = next(code for code, known in _IDS.items() if known == self.dtype)
        self._lengths: list[NDArray[np.int32]] = []
        self._sequences: list[NDArray[np.int32]] = []
        self._bin_sha256, self._idx_sha256 = hashlib.sha256(), hashlib.sha256()
        self._files = files
        self._bin = files.create(bin_path(prefix))

    @property
    def bin_sha256(self) -> str:
        """Hash of the tokens written so far."""
        return self._bin_sha256.hexdigest()

    @property
    def idx_sha256(self) -> str:
        """Hash of the index, after `write_index`."""
        return self._idx_sha256.hexdigest()

    def add_documents(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[Any],
        sequences: NDArray[Any] | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: (sum of `lengths`,), the documents' tokens back to back.
            lengths: (sequences,), tokens of each.
            sequences: (documents,), sequences of each document; None if each has one.

        Raises:
            ValueError: The shapes contradict each other, or a token does not fit the type.
        """
        if sequences is None:
            sequences = np.broadcast_to(np.int32(1), len(lengths))  # takes no memory
        self._check(tokens, lengths, sequences)
        content = np.ascontiguousarray(tokens, dtype=self.dtype).view(np.uint8).data
        with naming(bin_path(self.prefix)):
            self._bin.write(content)
        self._bin_sha256.update(content)
        self.bin_bytes += content.nbytes
        self._lengths.append(np.array(lengths, dtype="<i4"))
        self._sequences.append(np.asarray(sequences, dtype="<i4"))

    def write_index(self) -> None:
        """Write the index: the last file to create of a dataset."""
        path = idx_path(self.prefix)
        with naming(path):
            idx = self._files.create(path)
            for part in self._index():
                idx.write(part)
                self._idx_sha256.update(part)

    def _check(self, tokens: NDArray[Any], lengths: NDArray[Any], sequences: NDArray[Any]) -> None:
        if np.sum(lengths, dtype=np.int64) != len(tokens) or np.sum(sequences) != len(lengths):
            raise ValueError(
                f"{len(tokens)} tokens, {len(lengths)} lengths and {len(sequences)} documents "
                "contradict each other"
            )
        if len(tokens) and not np.can_cast(tokens.dtype, self.dtype):
            bounds = np.iinfo(self.dtype)
            for token in (tokens.min(), tokens.max()):
                if not bounds.min <= token <= bounds.max:
                    raise ValueError(f"token {token} does not fit {self.dtype.name}")

    def _index(self) -> Iterator[bytes]:
        sequences, documents = (sum(map(len, part)) for part in (self._lengths, self._sequences))
        yield _HEADER.pack(_MAGIC, 1, self._code, sequences, documents + 1)
        yield from (lengths.tobytes() for lengths in self._lengths)
        start = 0
        for lengths in self._lengths:
            ends = start + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            yield np.append(start, ends)[:-1].tobytes()
            start = int(ends[-1]) if len(ends) else start
        first = 0
        yield np.zeros(1, "<i8").tobytes()
        for numbers in self._sequences:
            firsts = first + np.cumsum(numbers, dtype="<i8")
            yield firsts.tobytes()
            first = int(firsts[-1]) if len(firsts) else first


class IndexedDataset:
    """A dataset on disk, mapped into memory and checked to be whole.

    Raises:
        UsageError: a file is missing, of another format, torn or altered.
    """

    dtype: np.dtype[Any]
    """Type of the tokens."""
    sequence_lengths: NDArray[np.int32]
    """(sequences,), tokens of each."""
    document_indices: NDArray[np.int64]
    """(documents + 1,), first sequence of each document, then the number of sequences."""
    tokens: NDArray[Any]
    """(tokens,), all of them."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        idx, tokens = idx_path(prefix), bin_path(prefix)
        _check_presence(self.prefix)
        self._read_index(idx)
        expected, size = self._check_sequences(idx), tokens.stat().st_size
        self._check_documents(idx)
        if size != expected:
            raise UsageError(
                f"{tokens}: torn, or of another dataset: {size} bytes, {idx} describes {expected}"
            )
        self.tokens = _mapped(tokens).view(self.dtype)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.document_indices) - 1

    def __getitem__(self, document: int) -> NDArray[Any]:
        """Return the tokens of a document."""
        first, last = self._sequences(document)
        return self.tokens[self._start(first) : self._start(last)]

    def lengths(self, document: int) -> NDArray[np.int32]:
        """Return the lengths of the sequences of a document, in its order."""
        first, last = self._sequences(document)
        return self.sequence_lengths[first:last]

    def _sequences(self, document: int) -> tuple[int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        first, last = self.document_indices[document : document + 2].tolist()
        return first, last

    def _start(self, sequence: int) -> int:
        """Return the position of the first token of a sequence, or the number of tokens."""
        if sequence == len(self.sequence_lengths):
            return len(self.tokens)
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def _read_index(self, path: Path) -> None:
        content = _mapped(path)
        header = content[: _HEADER.size].tobytes()
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UsageError(f"{path}: not a Megatron index (it does not begin with MMIDIDX)")
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != 1 or not 1 <= code <= len(_TYPES):
            raise UsageError(f"{path}: version {version} or token type {code} is unknown")
        if code not in _IDS:
            raise UsageError(f"{path}: holds {_TYPES[code - 1]}, which are no ids of tokens")
        expected = _HEADER.size + 12 * sequences + 8 * entries
        if len(content) == expected + sequences and sequences:
            raise UsageError(f"{path}: of a multimodal dataset, which ml-data cannot read")
        if len(content) != expected:
            raise UsageError(f"{path}: torn: {len(content)} bytes, its header describes {expected}")
        self.dtype = _IDS[code]
        ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * entries])
        lengths, offsets, documents = (content[start:end] for start, end in pairwise(ends))
        self.sequence_lengths = lengths.view("<i4")
        self._offsets: NDArray[np.int64] = offsets.view("<i8")
        self.document_indices = documents.view("<i8")

    def _check_sequences(self, path: Path) -> int:
        """Check that the offsets follow from the lengths; return the bytes of all sequences."""
        end = 0
        for start in range(0, len(self.sequence_lengths), _BLOCK):
            block = slice(start, start + _BLOCK)
            sizes = self.sequence_lengths[block].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            if sizes.min() < 0 or not np.array_equal(self._offsets[block], ends - sizes):
                raise UsageError(f"{path}: damaged: its offsets do not follow from its lengths")
            end = int(ends[-1])
        return end

    def _check_documents(self, path: Path) -> None:
        """Check that every sequence is of one document."""
        firsts = self.document_indices
        whole = len(firsts) > 0 and firsts[0] == 0 and firsts[-1] == len(self.sequence_lengths)
        blocks = (firsts[start : start + _BLOCK + 1] for start in range(0, len(firsts), _BLOCK))
        if not whole or any(np.any(block[1:] < block[:-1]) for block in blocks):
            raise UsageError(f"{path}: damaged: its documents are not all of its sequences in turn")


def _check_presence(prefix: str) -> None:
    idx, tokens = idx_path(prefix), bin_path(prefix)
    if not idx.exists() and not tokens.exists():
        hint = f"; did you mean {near}?" if (near := _nearest(prefix)) else ""
        raise UsageError(f"no dataset {prefix}: {idx} does not exist{hint}")
    for path in (idx, tokens):
        if not path.exists():
            raise UsageError(f"dataset {prefix} is incomplete: {path} does not exist")


def _nearest(prefix: str) -> Path | None:
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.is_file():
        return path.with_suffix("")
    near = sorted(path.parent.glob(f"{glob.escape(path.name)}*.idx"))
    return near[0].with_suffix("") if near else None


def _mapped(path: Path) -> NDArray[np.uint8]:
    """Return the content of a file, read where it is looked at."""
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, mode="r"))  # slices of a memmap itself are slow
