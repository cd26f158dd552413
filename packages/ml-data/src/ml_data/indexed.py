"""Megatron's token files: `PREFIX.bin` holds the tokens, `PREFIX.idx` where each sequence lies.

The `.idx`, little endian: `MMIDIDX` and two zero bytes, u64 version (1), u8 code of the token type,
u64 number of sequences, u64 number of entries of the document index, i32 length of each sequence,
i64 byte offset of each sequence, i64 document index: the first sequence of each document, then the
number of sequences. (Multimodal files append one byte a sequence; they are not read here.) Byte for
byte what megatron-core's `IndexedDatasetBuilder` writes.
"""

from __future__ import annotations

import hashlib
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ml_data.atomic import FileSet, naming
from ml_models.flags import UsageError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(["u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"], start=1)
}


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
    """Writes a dataset into `files`, which publish it; every document is one sequence."""

    def __init__(self, prefix: str | Path, dtype: DTypeLike, files: FileSet) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.bin_bytes = 0
        self._lengths: list[NDArray[np.int32]] = []
        self._sha256 = hashlib.sha256()
        self._files = files
        self._bin = files.create(bin_path(prefix))

    @property
    def bin_sha256(self) -> str:
        """Hash of the tokens written so far."""
        return self._sha256.hexdigest()

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append documents.

        Args:
            tokens: (sum of `lengths`,), the documents' tokens back to back.
            lengths: (documents,), tokens of each.
        """
        content = np.ascontiguousarray(tokens, dtype=self.dtype).view(np.uint8).data
        with naming(bin_path(self.prefix)):
            self._bin.write(content)
        self._sha256.update(content)
        self.bin_bytes += content.nbytes
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def write_index(self) -> None:
        """Write the index: the last file to create of a dataset."""
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        path = idx_path(self.prefix)
        with naming(path):
            idx = self._files.create(path)
            idx.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes())
            idx.write(starts.tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class IndexedDataset:
    """A dataset on disk, mapped into memory and checked to be whole.

    Raises:
        UsageError: a file is missing, of another format, or torn.
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
        self._check_presence(idx, tokens)
        self._read_index(idx)
        self._starts = np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])
        expected = int(self._starts[-1]) * self.dtype.itemsize
        if tokens.stat().st_size != expected:
            raise UsageError(
                f"{tokens}: torn, or of another dataset: "
                f"{tokens.stat().st_size} bytes, {idx} describes {expected}"
            )
        self.tokens = (
            np.memmap(tokens, self.dtype, mode="r") if expected else np.zeros(0, self.dtype)
        )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.document_indices) - 1

    def __getitem__(self, document: int) -> NDArray[Any]:
        """Return the tokens of a document."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        first, last = self.document_indices[document : document + 2]
        return self.tokens[self._starts[first] : self._starts[last]]

    def _check_presence(self, idx: Path, tokens: Path) -> None:
        if not idx.exists() and not tokens.exists():
            near = sorted(idx.parent.glob(f"{idx.stem}*.idx")) if idx.parent.is_dir() else []
            hint = f"; did you mean {near[0].with_suffix('')}?" if near else ""
            raise UsageError(f"no dataset {self.prefix}: {idx} does not exist{hint}")
        for path in (idx, tokens):
            if not path.exists():
                raise UsageError(f"dataset {self.prefix} is incomplete: {path} does not exist")

    def _read_index(self, path: Path) -> None:
        content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, "u1")
        header = bytes(content[: _HEADER.size])
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UsageError(f"{path}: not a Megatron index (it does not begin with MMIDIDX)")
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise UsageError(f"{path}: version {version} or token type {code} is unknown")
        expected = _HEADER.size + 12 * sequences + 8 * entries
        if len(content) != expected:
            raise UsageError(f"{path}: torn: {len(content)} bytes, its header describes {expected}")
        self.dtype = _DTYPES[code]
        offsets = _HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * entries])
        parts = [content[start:stop] for start, stop in pairwise(offsets)]
        self.sequence_lengths, starts = parts[0].view("<i4"), parts[1].view("<i8")
        self.document_indices = parts[2].view("<i8")
        lengths = self.sequence_lengths.astype(np.int64)
        ends = np.cumsum(lengths) * self.dtype.itemsize
        consistent = np.array_equal(starts, ends - lengths * self.dtype.itemsize)
        if not consistent or not entries or self.document_indices[-1] != sequences:
            raise UsageError(f"{path}: damaged: its offsets do not follow from its lengths")
