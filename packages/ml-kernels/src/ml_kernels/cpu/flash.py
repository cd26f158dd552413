"""Torch's flash kernel on a CPU, over tiles of scores, with its gradients.

A tile is some queries with the keys they see: all of them, one sequence of several, or a block of
queries with the window behind it. What no tile covers is not computed.

The one idea: the backward kernel takes weights as `exp(score - lse)` and their mean gradient from
the output, whatever these two are. An attention sink only adds to the log-sum-exp of a row, so the
forward kernel's output and log-sum-exp are corrected by it, and with the corrected ones the
backward kernel is exact. The merge of ring attention uses the same.

Shapes: `B` batch, `N` query heads, `G` groups, `S` sequence, `D` head dimension, heads first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ml_kernels.autocast import without_autocast
from ml_kernels.cpu import causal
from ml_kernels.derivatives import once_differentiable
from ml_kernels.layouts import rows_of_numbers

_ATEN = torch.ops.aten
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_MANY = 256
"""Queries from which the forward pass of `causal` is the faster: 512 take 2.8 ms, 4.8 in torch's
kernel; 128 take 0.43 ms, and 0.38 (12 heads in 4 groups of 64 channels)."""


class Tile(NamedTuple):
    """Some queries, and the keys they see."""

    queries: slice
    keys: slice
    causal: bool
    """As many queries as keys, each sees its own and those before."""
    bias: torch.Tensor | None
    """Float32, added to the scores, -inf where hidden; `(B or 1, N or 1, Sq, Sk)`, expanded."""
    offset: torch.Tensor | None
    """`(N, Sq or 1)` float32, what ALiBi adds to a row beside `bias`."""
    blind: torch.Tensor | None = None
    """`(B or 1, N or 1, Sq)` bool, the queries that `bias` leaves without any key."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    tiles: Sequence[Tile],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in every tile.

    Args:
        query: `(B, N, Sq, D)`.
        key: `(B, G, Sk, D)`.
        value: `(B, G, Sk, D)`.
        scale: Positive.
        sinks: `(N,)` float32 or None.
        tiles: Each query in one at most.

    Returns:
        The output, and the log-sum-exp `(B, N, Sq)` float32 of what the kernel saw: without the
        offsets of the tiles, and 0 for blind queries.
    """
    query, key, value = (rows_of_numbers(t) for t in (query, key, value))
    plain = sinks is None and _is_whole(tiles, query, key)
    if plain and not (torch.is_grad_enabled() and _is_faster_in_products(query, tiles[0])):
        return _forward(query, key, value, None, scale, tiles[0])  # torch has the derivative
    result: tuple[torch.Tensor, torch.Tensor] = _Flash.apply(  # type: ignore[no-untyped-call]
        query, key, value, sinks, scale, tiles
    )
    return result


def exact_lse(lse: torch.Tensor, tiles: Sequence[Tile]) -> torch.Tensor:
    """Return the log-sum-exp with the offsets of the tiles, and -inf for blind queries."""
    exact = torch.full_like(lse, float("-inf"))
    for tile in tiles:
        part = lse[:, :, tile.queries]
        part = part if tile.offset is None else part + tile.offset
        part = part if tile.blind is None else part.masked_fill(tile.blind, float("-inf"))
        exact[:, :, tile.queries] = part
    return exact


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
        tiles: Sequence[Tile],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _is_whole(tiles, query, key):
            out, lse = _forward(query, key, value, sinks, scale, tiles[0])
        else:
            batch, heads, length, width = query.shape
            out = query.new_zeros(batch, length, heads, width).transpose(1, 2)
            lse = query.new_zeros(batch, heads, length, dtype=torch.float32)
            for tile in tiles:
                rows, keys = tile.queries, tile.keys
                some = query[:, :, rows], key[:, :, keys], value[:, :, keys]
                out[:, :, rows], lse[:, :, rows] = _forward(*some, sinks, scale, tile)
        biases, offsets = (tile.bias for tile in tiles), (tile.offset for tile in tiles)
        ctx.save_for_backward(query, key, value, out, lse, sinks, *biases, *offsets)
        ctx.scale = scale
        ctx.tiles = [tile._replace(bias=None, offset=None, blind=None) for tile in tiles]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, sinks, *kept = ctx.saved_tensors
        count = len(ctx.tiles)
        tiles = [
            tile._replace(bias=bias, offset=offset)
            for tile, bias, offset in zip(ctx.tiles, kept[:count], kept[count:], strict=True)
        ]
        found = gradients(gradient, query, key, value, out, lse, ctx.scale, tiles)
        of_sinks = None
        if sinks is not None:
            of_sinks = _of_sinks(gradient, out, lse, sinks, tiles)
        return *found, of_sinks, None, None


def gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    tiles: Sequence[Tile],
) -> _Three:
    """Return the gradients of query, key and value.

    Args:
        gradient: `(B, N, Sq, D)`, of the output.
        query: As in `attend`.
        key: As in `attend`.
        value: As in `attend`.
        out: The output: of these keys, or of more, merged.
        lse: The log-sum-exp that belongs to `out`, as `attend` returns it.
        scale: As in `attend`.
        tiles: As in `attend`.
    """
    gradient, query, key, value, out = (
        rows_of_numbers(t) for t in (gradient, query, key, value, out)
    )
    if _is_whole(tiles, query, key):
        return _backward(gradient, query, key, value, out, lse, scale, tiles[0])
    of_query = torch.zeros_like(query)
    of_key, of_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
    for tile in tiles:
        rows, keys = tile.queries, tile.keys
        some = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        known = out[:, :, rows], lse[:, :, rows]
        found = _backward(gradient[:, :, rows], *some, *known, scale, tile)
        of_query[:, :, rows] = found[0]
        of_key[:, :, keys] += found[1]
        of_value[:, :, keys] += found[2]
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _is_whole(tiles: Sequence[Tile], query: torch.Tensor, key: torch.Tensor) -> bool:
    if len(tiles) != 1:
        return False
    rows, keys = tiles[0].queries, tiles[0].keys
    return rows == slice(0, query.shape[2]) and keys == slice(0, key.shape[2])


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_faster_in_products(query, tile):
        q, k, v = (t.permute(2, 0, 1, 3) for t in (query, key, value))
        with without_autocast(query):
            out, lse = causal.causal_attention(q, k, v, scale)
        out, lse = out.permute(1, 2, 0, 3), lse.permute(1, 2, 0)
    else:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, tile.causal, attn_mask=tile.bias, scale=scale
        )
    if sinks is None:
        return out, lse
    # Of blind queries, whose output is 0 whatever the sinks, the kernel says that it is 0.
    total = torch.logaddexp(lse, _as_kernel_sees(sinks, tile))
    return out.mul_((lse - total).exp_()[..., None]), total


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    tile: Tile,
) -> _Three:
    found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, lse, 0.0, tile.causal, attn_mask=tile.bias, scale=scale
    )
    return found[0], found[1], found[2]


def _is_faster_in_products(query: torch.Tensor, tile: Tile) -> bool:
    plain = tile.causal and tile.bias is None and query.dtype == torch.bfloat16
    large = plain and query.shape[2] >= _MANY
    return large and not torch.compiler.is_compiling() and causal.multiplies_bfloat16()


def _of_sinks(
    gradient: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
    tiles: Sequence[Tile],
) -> torch.Tensor:
    """Return the gradient of the sinks: what their weights took from every row."""
    total = torch.zeros_like(sinks)
    for tile in tiles:
        rows = tile.queries
        weight = torch.exp(_as_kernel_sees(sinks, tile) - lse[:, :, rows])  # (B, N, Sq)
        mean = (gradient[:, :, rows].float() * out[:, :, rows]).sum(-1)
        total -= (weight * mean).sum((0, 2))
    return total


def _as_kernel_sees(sinks: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Return the sinks `(N, Sq or 1)` less what the tile's bias leaves out."""
    return sinks[:, None] if tile.offset is None else sinks[:, None] - tile.offset
