"""Scaled dot-product attention with grouped key and value heads.

Shapes: `Sq`, `Sk` query and key lengths, `B` batch, `N` query heads, `G` key/value groups,
`D` head dimension. Head `n` of the query attends to group `n // (N / G)`.
"""

from __future__ import annotations

import math

import torch

from ml_kernels.dispatch import Backend, implementation


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attend (Vaswani et al. 2017, arXiv:1706.03762; groups: Ainslie et al., arXiv:2305.13245).

    Args:
        query: `(Sq, B, N, D)`.
        key: `(Sk, B, G, D)`.
        value: `(Sk, B, G, D)`.
        causal: Query `i` sees keys `j <= i + Sk - Sq`: the last query sees every key, which is
            what decoding with a cache needs.
        scale: Multiplies the scores; `1 / sqrt(D)` when None.
        dropout_p: Probability of dropping an attention weight.
        backend: Force an implementation by name.

    Returns:
        `(Sq, B, N, D)` in the dtype of `query`.

    Raises:
        ValueError: The shapes do not fit together.
    """
    heads, groups = query.shape[2], key.shape[2]
    if key.shape != value.shape or heads % groups or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"dot_product_attention: query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} must be (S, B, heads, D) with heads a multiple of the groups"
        )
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    return implementation("attention", query, backend)(query, key, value, causal, scale, dropout_p)


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return `(queries, keys)` bool, True where attention is allowed, aligned at the last key."""
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return allowed.tril(diagonal=keys - queries)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """The formula, with softmax in float32 (float64 for float64 inputs)."""
    repeat = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeat, dim=2) for t in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    if causal:
        allowed = causal_mask(query.shape[0], key.shape[0], query.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = torch.dropout(weights, dropout_p, train=dropout_p > 0)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value)
