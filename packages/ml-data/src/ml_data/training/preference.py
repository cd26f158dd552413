"""Pairs of a better and a worse answer, as DPO reads them (Rafailov et al. 2023, arXiv:2305.18290).

`PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document`, one document a pair in each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_data.training.labelled import LabelledDataset
from ml_data.training.rows import Row
from ml_models.flags import UsageError


class Pair(NamedTuple):
    """The same question with both answers."""

    chosen: Row
    rejected: Row


def chosen_then_rejected(pairs: Sequence[Pair]) -> list[Row]:
    """Return the rows of a batch of pairs: of all the chosen answers, then of the rejected ones."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


class PreferenceDataset:
    """Pairs on disk, mapped into memory."""

    packed = False

    def __init__(self, prefix: str, *, seq_length: int) -> None:
        """Open what `ml-data preference --output-prefix PREFIX` wrote.

        Args:
            prefix: Of the files.
            seq_length: Longer answers are cut.

        Raises:
            UsageError: A file is missing, torn, or does not belong to the others.
        """
        self.prefix = prefix
        self._chosen, self._rejected = (
            LabelledDataset(prefix, f"{name}_input_ids", f"{name}_labels", seq_length=seq_length)
            for name in ("chosen", "rejected")
        )
        if len(self._chosen) != len(self._rejected):
            raise UsageError(
                f"{prefix}: has {len(self._chosen)} chosen and {len(self._rejected)} rejected "
                "answers: they are not of the same run"
            )
        self.longest = max(self._chosen.longest, self._rejected.longest)
        self.cut = self._chosen.cut + self._rejected.cut

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._chosen)

    def __getitem__(self, document: int) -> Pair:
        """Return a pair."""
        return Pair(self._chosen[document], self._rejected[document])

    def without_label(self) -> NDArray[np.int64]:
        """Return the pairs of which the loss would see nothing of an answer."""
        found = (self._chosen.without_label(), self._rejected.without_label())
        return np.array(sorted({*found[0].tolist(), *found[1].tolist()}), np.int64)

    def fingerprint(self) -> str:
        """Return what changes with the number and lengths of the answers."""
        both = self._chosen.fingerprint() + self._rejected.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()
