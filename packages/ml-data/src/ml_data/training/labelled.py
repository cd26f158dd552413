"""Tokens with labels on disk: two datasets side by side, one document a sample.

`PREFIX_packed_input_ids_document` and `PREFIX_packed_labels_document` for instructions. A document
of several sequences is a packed row: samples that share it and do not see each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ml_data.indexed import IndexedDataset
from ml_data.instruction.turns import IGNORED
from ml_data.training.rows import Row, shifted
from ml_models.flags import UsageError

_BLOCK = 1 << 22
"""Labels that are looked through together."""


def instruction_dataset(prefix: str, *, seq_length: int) -> LabelledDataset:
    """Open instruction data.

    Args:
        prefix: As given to `ml-data instruct --output-prefix`.
        seq_length: Longer samples are cut.

    Raises:
        UsageError: A file is missing, torn, or does not belong to the other.
    """
    return LabelledDataset(prefix, "input_ids", "labels", seq_length=seq_length)


class LabelledDataset:
    """Samples of ids and labels, mapped into memory."""

    packed: bool
    """Whether a document can hold several sequences."""
    longest: int
    """Most tokens that a model could read of a document."""
    cut: int
    """Documents that are cut to `seq_length`."""

    def __init__(self, prefix: str, ids: str, labels: str, *, seq_length: int) -> None:
        """Open it.

        Args:
            prefix: Without `_packed_...`.
            ids: Name of the dataset of tokens.
            labels: Name of the dataset of labels.
            seq_length: Longer documents are cut.

        Raises:
            UsageError: A file is missing, torn, or does not belong to the other; or packed rows
                are longer than `seq_length`.
        """
        self.prefix, self.seq_length = prefix, seq_length
        self._ids, self._labels = (_open(prefix, name) for name in (ids, labels))
        self._check_pair()
        firsts, lengths = self._ids.document_indices, self._ids.sequence_lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        sequences = np.diff(firsts)
        self.packed = bool((sequences > 1).any())
        self._ends = self._starts[firsts]
        sizes = np.diff(self._ends) - sequences
        self.longest = int(sizes.max(initial=0))
        self.cut = int((sizes > seq_length).sum())
        if self.packed and self.cut:
            raise UsageError(
                f"--seq-length {seq_length}: {prefix} has packed rows of up to {self.longest} "
                f"tokens, which cannot be cut: give at least {self.longest}, or prepare the data "
                f"with --seq-length {seq_length}"
            )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._ids)

    def __getitem__(self, document: int) -> Row:
        """Return a sample, or a packed row of several."""
        lengths = self._ids.lengths(document)
        return shifted(self._ids[document], self._labels[document], lengths, self.seq_length)

    def without_label(self) -> NDArray[np.int64]:
        """Return the documents of which the loss would see nothing within `seq_length`."""
        seen = [self._labelled(first, last) for first, last in self._blocks()]
        return np.flatnonzero(~np.concatenate([np.zeros(0, bool), *seen]))

    def fingerprint(self) -> str:
        """Return what changes with the number and lengths of the sequences."""
        digest = hashlib.sha256(np.ascontiguousarray(self._ids.document_indices).data)
        digest.update(np.ascontiguousarray(self._ids.sequence_lengths).data)
        return digest.hexdigest()

    def _check_pair(self) -> None:
        ids, labels = self._ids, self._labels
        alike = np.array_equal(ids.sequence_lengths, labels.sequence_lengths) and np.array_equal(
            ids.document_indices, labels.document_indices
        )
        if not alike:
            raise UsageError(
                f"{labels.prefix}.idx: not of the same run as {ids.prefix}.idx: its documents "
                "have other lengths"
            )

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of documents, first and end, of about as many labels."""
        first = 0
        while first < len(self):
            end = int(np.searchsorted(self._ends, self._ends[first] + _BLOCK))
            last = min(max(end, first + 1), len(self))
            yield first, last
            first = last

    def _labelled(self, first: int, last: int) -> NDArray[np.bool_]:
        """Return which documents of a range have a label that is seen."""
        start, stop = self._ends[first], self._ends[last]
        seen = self._labels.tokens[start:stop] != IGNORED
        # The first token of a sequence is predicted from nothing.
        sequences = slice(*self._ids.document_indices[[first, last]])
        begins = self._starts[sequences] - start
        seen[begins[begins < len(seen)]] = False
        places = np.append(np.flatnonzero(seen) + start, np.iinfo(np.int64).max)
        begins, ends = self._ends[first:last], self._ends[first + 1 : last + 1]
        if not self.packed:
            ends = np.minimum(ends, begins + self.seq_length + 1)
        found: NDArray[np.bool_] = places[np.searchsorted(places, begins)] < ends
        return found


def _open(prefix: str, name: str) -> IndexedDataset:
    return IndexedDataset(f"{prefix}_packed_{name}_document")
