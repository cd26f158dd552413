"""Attention whose scores are squashed to `c * tanh(score / c)` (Gemma 2, Grok-1).

No kernel of `ml_kernels.flash_attention` squashes scores, so this is plain torch. Queries are taken
a block at a time, with only the keys they see, and a block is computed again for its gradients:
the scores of one block are all that is ever in memory.

Shapes: `Sq`, `Sk` query and key lengths, `B` batch, `N` heads, `G` groups that divide them, `D`
head size, `T` tokens of sequences that share a row. The last query stands at the last key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

_BLOCK = 256
"""Queries of a block."""


def soft_capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cap: float,
    scale: float | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attend causally.

    Args:
        query: `(Sq, B, N, D)`; with `ends`, `(T, N, D)`.
        key: `(Sk, B, G, D)`; with `ends`, `(T, G, D)`.
        value: As `key`.
        cap: `c`.
        scale: Multiplies the scores before they are squashed; `1 / sqrt(D)` when None.
        window: A query sees this many keys, its own included; None = all before it.
        dropout_p: Probability of dropping an attention weight.
        ends: 0, then where each of the sequences ends that share the row; None = there is one.

    Returns:
        As `query`.
    """
    if ends is not None:
        attend_alone = partial(
            soft_capped_attention, cap=cap, scale=scale, window=window, dropout_p=dropout_p
        )
        parts = ((x[start:end, None] for x in (query, key, value)) for start, end in pairwise(ends))
        return torch.cat([attend_alone(*part)[:, 0] for part in parts])
    queries, keys = query.shape[0], key.shape[0]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    attend = partial(_attend, cap=cap, scale=scale, window=window, dropout_p=dropout_p)
    blocks = []
    for start in range(0, queries, _BLOCK):
        end = min(start + _BLOCK, queries)
        last = keys - queries + end
        first = 0 if window is None else max(0, last - (end - start) - window + 1)
        part = query[start:end], key[first:last], value[first:last]
        if torch.is_grad_enabled():
            blocks.append(checkpoint(attend, *part, use_reentrant=False))
        else:
            blocks.append(attend(*part))
    return torch.cat(blocks)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cap: float,
    scale: float,
    window: int | None,
    dropout_p: float,
) -> torch.Tensor:
    """Compute one block, in float32 or float64."""
    wide = torch.promote_types(query.dtype, torch.float32)
    length, batch, _, size = query.shape
    grouped = query.reshape(length, batch, key.shape[2], -1, size).to(wide)  # (q, B, G, N/G, D)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", grouped, key.to(wide)) * scale
    scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(_hidden(query, key, window), float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, train=True)
    context = torch.einsum("bgrqk,kbgd->qbgrd", weights, value.to(wide))
    return context.flatten(2, 3).to(query.dtype)


def _hidden(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return `(q, k)` bool, True where a key comes after the query or before its window."""
    length, device = key.shape[0], query.device
    of_query = torch.arange(length - query.shape[0], length, device=device)[:, None]
    of_key = torch.arange(length, device=device)
    hidden = of_key > of_query
    return hidden if window is None else hidden | (of_key <= of_query - window)
