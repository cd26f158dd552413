"""A call of `flash_attention`: what its implementations are handed beside the tensors.

Shapes: `B` batch, `N` query heads, `G` key/value groups, `Sq`, `Sk` query and key lengths, `D` head
dimension, `Dv` that of the values, `T` the tokens of all sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from ml_kernels.alibi import AlibiForm
from ml_kernels.layouts import Layout

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""The output, or the output and the log-sum-exp."""


class AttentionCall(NamedTuple):
    """Checked arguments, and sizes. A tuple, because it is made in every call: it takes 1 us."""

    layout: Layout
    batch: int
    """`B`; the number of sequences for TND."""
    heads: int
    groups: int
    queries: int
    """`Sq`; all the `T` of the queries for TND."""
    keys: int
    causal: bool
    window: int | None
    """None if it is so wide that it hides nothing."""
    mask: torch.Tensor | None
    """`(B or 1, N or 1, Sq or 1, Sk or 1)` bool, True where hidden."""
    alibi_slopes: torch.Tensor | None
    alibi_form: AlibiForm
    cu_seqlens_q: tuple[int, ...] | None
    cu_seqlens_k: tuple[int, ...] | None
    scale: float
    dropout_p: float
    sinks: torch.Tensor | None
    return_lse: bool

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """Give the `(first query, end, first key, end)` of every sequence."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            yield 0, self.queries, 0, self.keys
            return
        ends = zip(pairwise(self.cu_seqlens_q), pairwise(self.cu_seqlens_k), strict=True)
        yield from ((*queries, *keys) for queries, keys in ends)

    def of_one(self, queries: int, keys: int) -> AttentionCall:
        """Return the call for one of the sequences, alone in a batch in layout BSND."""
        return self._replace(
            layout="BSND",
            batch=1,
            queries=queries,
            keys=keys,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )

    def blind_queries(self) -> Iterator[slice]:
        """Give the queries that see no key because they are more than those, or there is none."""
        for query, query_end, key, key_end in self.spans():
            keys = key_end - key
            end = query_end - keys if self.causal else query if keys else query_end
            if end > query:
                yield slice(query, end)


def hidden_keys(call: AttentionCall, device: torch.device) -> torch.Tensor | None:
    """Return where mask, causality or window hide a key: 4-D bool that broadcasts; None: nowhere.

    Not for TND, whose sequences have each their own.
    """
    if not call.causal or (call.queries == 1 and call.window is None):
        return call.mask
    query = torch.arange(call.keys - call.queries, call.keys, device=device)[:, None]
    key = torch.arange(call.keys, device=device)
    hidden = key > query  # (Sq, Sk)
    if call.window is not None:
        hidden = hidden | (key <= query - call.window)
    return hidden[None, None] if call.mask is None else hidden | call.mask
