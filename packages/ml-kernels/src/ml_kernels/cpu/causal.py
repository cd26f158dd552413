"""Causal attention in bfloat16, as a few large matrix products, forward and backward.

Torch's flash kernel works in small tiles and reaches a fifth of the matmul peak where the CPU
multiplies bfloat16 natively. Here a block of queries meets all its keys in one product, still
without the matrix of all scores in memory. Forward that is 1.3 times as fast and 1.8 with 512
positions; backward 1.5 times with grouped heads, 1.3 without. In float32 torch's kernel is as good
or better, and it is used.

The one idea: a bfloat16 score has 8 significant bits, too few when it is large, and torch's
products of bfloat16 have no other result. Forward, a second product gives what the first one
rounded off: `q . k - s` is rounded only after the float32 sum. That is not all that torch's kernel
has: the output has up to 1.3 times its error, the log-sum-exp one of 2**-17 of the largest score,
and gradients from them up to 1.2 times the error they have from torch's (scores as large as 100).

Backward needs the score less the log-sum-exp of its row, the logarithm of a weight. So that becomes
extra columns of the product, `[q, -c] . [k, 1] = q . k - c`, and is subtracted in the float32
accumulator, before rounding: weights that matter have small logarithms. The mean gradient of a row
is subtracted from the gradients of its scores alike.

Shapes: `S` sequence, `B` batch, `N` query heads, `G` groups, `R = N / G`, `D` head dimension,
`Q` the queries of a block, `K` the keys they see.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

_BLOCK = 128
"""Queries that are computed together: more waste half of the products on masked scores, fewer make
them too small to be fast."""

_FORWARD_BLOCK = 64
"""The same for grouped heads, forward: 18 ms, where 128 take 22 (1,024 positions, batch 2, 12 heads
in 4 groups of 64 channels). With a group for each head it is the other way: 12.4 ms, and 10.4."""

_EXTRA = 4
"""Extra columns: three bfloat16 numbers hold a float32, and an even number is faster."""


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has AVX-512 BF16 but not AMX, which torch's own kernel makes use of."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() and not cpu._is_amx_tile_supported())


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output `(S, B, N, D)` and its log-sum-exp `(S, B, N)` float32.

    Args:
        query: `(S, B, N, D)` bfloat16, each attends to its key and those before.
        key: `(S, B, G, D)`.
        value: `(S, B, G, D)`.
        scale: Positive.
    """
    groups = key.shape[2]
    heads = query.shape[2] // groups
    queries = _by_group(query, groups)
    keys, values = (_by_position(t).contiguous() for t in (key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty((*query.shape[:3], 1), dtype=torch.float32)
    size = _BLOCK if heads == 1 else _FORWARD_BLOCK
    for start in range(0, query.shape[0], size):
        rows, past = slice(start, start + size), slice(0, start + size)
        some, seen = queries[:, rows].flatten(1, 2), keys[:, past].mT
        rounded = torch.bmm(some, seen)  # (BG, QR, K)
        scores = rounded.float()
        rest = rounded.baddbmm_(some, seen, beta=-1)
        scores.add_(rest).mul_(scale)
        _fill_future(scores, start, heads, float("-inf"))
        highest = scores.amax(-1, keepdim=True)
        weights = torch.softmax(scores, -1, out=scores)
        # The largest weight is exp(highest - log-sum-exp).
        log = highest - weights.amax(-1, keepdim=True).log_()
        mixed = torch.bmm(rest.copy_(weights), values[:, past])
        for whole, part in ((out, mixed), (logsumexp, log)):
            _by_group(whole, groups)[:, rows] = part.view(len(keys), -1, heads, part.shape[-1])
    return out, logsumexp[..., 0]


def causal_gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value.

    Args:
        gradient: `(S, B, N, D)`, of the output.
        query: `(S, B, N, D)`, each attended to its key and those before.
        key: `(S, B, G, D)`.
        value: `(S, B, G, D)`.
        out: `(S, B, N, D)`, the output.
        logsumexp: `(S, B, N)` float32.
        scale: Positive.
    """
    groups, width = key.shape[2], key.shape[3]
    heads = query.shape[2] // groups
    queries, gradients = (_extended(_by_group(t, groups)) for t in (query, gradient))
    keys, values = (_extended(_by_position(t), 1.0) for t in (key, value))
    mean = (gradient.float() * out).sum(-1)  # (S, B, N)
    _subtract(queries, _by_group(logsumexp[..., None] / scale, groups))
    _subtract(gradients, _by_group(mean[..., None], groups))
    of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    of_key, of_value = (
        torch.zeros_like(t[..., :width], dtype=torch.float32) for t in (keys, values)
    )
    for start in range(0, query.shape[0], _BLOCK):
        rows, past = slice(start, start + _BLOCK), slice(0, start + _BLOCK)
        some, upstream = queries[:, rows].flatten(1, 2), gradients[:, rows].flatten(1, 2)
        weights = torch.bmm(some, keys[:, past].mT).mul_(scale).exp_()  # (BG, QR, K)
        _fill_future(weights, start, heads, 0.0)
        of_scores = torch.bmm(upstream, values[:, past].mT).mul_(weights)
        of_value[:, past] += torch.bmm(weights.mT, upstream[..., :width])
        of_key[:, past] += torch.bmm(of_scores.mT, some[..., :width])
        mixed = torch.bmm(of_scores, keys[:, past, :width])
        _by_group(of_query, groups)[:, rows] = mixed.view(len(keys), -1, heads, width) * scale
    return of_query, _as(key, of_key * scale), _as(value, of_value)


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View `(S, B, N, D)` as `(BG, S, R, D)`; a copy if its heads are not contiguous."""
    positions, batch, heads, width = x.shape
    return x.reshape(positions, batch * groups, heads // groups, width).transpose(0, 1)


def _by_position(x: torch.Tensor) -> torch.Tensor:
    """View `(S, B, G, D)` as `(BG, S, D)`."""
    return x.flatten(1, 2).transpose(0, 1)


def _extended(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    return F.pad(x, (0, _EXTRA), value=value)


def _as(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `(BG, S, D)` as `(S, B, G, D)` in the dtype of `like`."""
    return x.to(like.dtype).transpose(0, 1).reshape(like.shape)


def _subtract(x: torch.Tensor, constants: torch.Tensor) -> None:
    """Put `-constants`, `(..., 1)` float32, into the extra columns as a sum of bfloat16 numbers."""
    rest = -constants
    for column in range(_EXTRA - 1):
        part = rest.to(x.dtype)
        x[..., column - _EXTRA, None] = part
        rest = rest - part


def _fill_future(x: torch.Tensor, start: int, heads: int, value: float) -> None:
    """Write `value` where a key comes after its query; `x` is `(BG, QR, K)`."""
    size = x.shape[2] - start
    future = torch.ones(size, size, dtype=torch.bool).triu_(1)
    block = x.view(-1, size, heads, x.shape[2])[..., start:]
    block.masked_fill_(future[:, None], value)
