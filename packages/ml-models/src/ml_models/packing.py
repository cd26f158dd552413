"""Sequences that share a row of a batch, without seeing each other.

megatron-core hands what it calls `packed_seq_params` through the model to every attention; this is
what attention here reads of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the sequences of a batch of one row end."""

    ends: tuple[int, ...]
    """0, then the end of each sequence, at last that of the row. A tuple: kernels need it on the
    host, and would wait for a device to bring it there."""
    positions: torch.Tensor
    """Position of each token in its sequence, (S,) int64."""
    qkv_format: str = "thd"
    """What megatron-core calls tokens of several sequences without a dimension of the batch."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(end - start for start, end in pairwise(self.ends))

    @property
    def pairs(self) -> int:
        """Pairs of tokens of the same sequence, in both orders, each token with itself as well."""
        return sum((end - start) ** 2 for start, end in pairwise(self.ends))


def packed_sequences(lengths: Sequence[int], device: torch.device | str) -> PackedSequences:
    """Describe a row of sequences of these lengths."""
    of_each = torch.tensor(lengths)
    ends = of_each.cumsum(0)
    starts = torch.repeat_interleave(ends - of_each, of_each)
    positions = torch.arange(sum(lengths)) - starts
    return PackedSequences((0, *ends.tolist()), positions.to(device))
