"""Versions of operators through torch's own fused ones, for every device that has them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ml_kernels.attention import causal_mask


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ml_kernels.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> torch.Tensor:
    """See `ml_kernels.dot_product_attention`.

    torch picks a flash kernel: on a CPU about four times the reference, with native groups and no
    score matrix in memory. With dropout a CPU falls back to torch's unfused version.
    """
    queries, keys = query.shape[0], key.shape[0]
    # torch aligns `is_causal` at the first key; only the square case agrees with ours.
    square, single = queries == keys, queries == 1
    mask = causal_mask(queries, keys, query.device) if causal and not (square or single) else None
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (B, N, S, D)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and square and not single,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.permute(2, 0, 1, 3)  # (S, B, N, D)
