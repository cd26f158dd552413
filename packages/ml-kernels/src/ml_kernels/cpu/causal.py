"""Causal attention in bfloat16, forward as a few large matrix products.

Torch's flash kernel works in small tiles and reaches a fifth of the matmul peak where the CPU
multiplies bfloat16 natively. Here a block of queries meets all its keys in one product, still
without the matrix of all scores in memory. Forward that is 1.3 times as fast and 1.8 with 512
positions. In float32 torch's kernel is as good or better, and it is used.

The one idea: a bfloat16 score has 8 significant bits, too few when it is large, and torch's
products of bfloat16 have no other result. Forward, a second product gives what the first one
rounded off: `q . k - s` is rounded only after the float32 sum. That is not all that torch's kernel
has: the output has up to 1.3 times its error, the log-sum-exp one of 2**-17 of the largest score,
and gradients from them up to 1.2 times the error they have from torch's (scores as large as 100).

Backward torch's kernel is used. Products of bfloat16 are as exact only with two of them for each of
the scores and their gradients, and then no faster: 55 ms, and 53 (one thread, 1,024 positions,
batch 2, 8 heads of 64 channels). With one, the logarithm of a weight is rounded: where attention is
spread out the weight is off by up to 1 in 64, and gradients have 2 to 3 times the error.

Shapes: `S` sequence, `B` batch, `N` query heads, `G` groups, `R = N / G`, `D` head dimension,
`Q` the queries of a block, `K` the keys they see.
"""

from __future__ import annotations

import functools

import torch

_BLOCK = 128
"""Queries that are computed together: more waste half of the products on masked scores, fewer make
them too small to be fast."""

_GROUPED_BLOCK = 64
"""The same for grouped heads: 18 ms, where 128 take 22 (1,024 positions, batch 2, 12 heads
in 4 groups of 64 channels). With a group for each head it is the other way: 12.4 ms, and 10.4."""


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
    size = _BLOCK if heads == 1 else _GROUPED_BLOCK
    for start in range(0, query.shape[0], size):
        rows, past = slice(start, start + size), slice(0, start + size)
        some, seen = queries[:, rows].flatten(1, 2), keys[:, past].mT
        rounded = torch.bmm(some, seen)  # (BG, QR, K)
        scores = rounded.float()
        rest = rounded.baddbmm_(some, seen, beta=-1)
        scores.add_(rest).mul_(scale)
        _hide_future(scores, start, heads)
        highest = scores.amax(-1, keepdim=True)
        weights = torch.softmax(scores, -1, out=scores)
        # The largest weight is exp(highest - log-sum-exp).
        log = highest - weights.amax(-1, keepdim=True).log_()
        mixed = torch.bmm(rest.copy_(weights), values[:, past])
        for whole, part in ((out, mixed), (logsumexp, log)):
            _by_group(whole, groups)[:, rows] = part.view(len(keys), -1, heads, part.shape[-1])
    return out, logsumexp[..., 0]


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View `(S, B, N, D)` as `(BG, S, R, D)`; a copy if its heads are not contiguous."""
    positions, batch, heads, width = x.shape
    return x.reshape(positions, batch * groups, heads // groups, width).transpose(0, 1)


def _by_position(x: torch.Tensor) -> torch.Tensor:
    """View `(S, B, G, D)` as `(BG, S, D)`."""
    return x.flatten(1, 2).transpose(0, 1)


def _hide_future(x: torch.Tensor, start: int, heads: int) -> None:
    """Write -inf where a key comes after its query; `x` is `(BG, QR, K)`."""
    size = x.shape[2] - start
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu_(1)
    block = x.view(-1, size, heads, x.shape[2])[..., start:]
    block.masked_fill_(future[:, None], float("-inf"))
