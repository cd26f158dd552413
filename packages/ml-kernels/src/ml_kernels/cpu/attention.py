"""Attention on a CPU: the tiles in which torch's flash kernel computes a call.

Shapes: `B` batch, `N` query heads, `Sq`, `Sk` query and key lengths; in a tile `n` queries and `m`
keys, the last query at the last key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ml_kernels.attention import attention_reference
from ml_kernels.attention_backward import Gradients, attention_backward_reference
from ml_kernels.attention_call import AttentionCall, Result, hidden_keys
from ml_kernels.cpu import flash
from ml_kernels.layouts import from_heads_first, heads_first, of_equal_width, widened

_BLOCK = 256
"""Queries that share a window: fewer compute fewer hidden scores, more need fewer calls. Of 4,096
with a window of 512 this takes a fifth of the time of one tile."""


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Result:
    """See `ml_kernels.flash_attention`."""
    if call.dropout_p or query.dtype == torch.float64:
        # Torch's flash kernel has neither; its unfused version has no advantage over ours.
        return attention_reference(query, key, value, call)
    query = heads_first(query, call.layout, call.heads)
    key, value = (heads_first(t, call.layout, call.groups) for t in (key, value))
    width = value.shape[-1]
    tiles = _tiles(call)
    given = of_equal_width(query, key, value)
    out, lse = flash.attend(*given, call.scale, call.sinks, tiles)
    out = from_heads_first(out if out.shape[-1] == width else out[..., :width], call.layout)
    if not call.return_lse:
        return out
    lse = flash.exact_lse(lse, tiles)
    return out, lse[0].transpose(0, 1) if call.layout == "TND" else lse


def flash_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> Gradients:
    """See `ml_kernels.flash_attention_backward`."""
    if query.dtype == torch.float64:
        return attention_backward_reference(gradient, query, key, value, out, lse, call)
    layout, heads, groups = call.layout, call.heads, call.groups
    gradient, query, out = (heads_first(t, layout, heads) for t in (gradient, query, out))
    key, value = (heads_first(t, layout, groups) for t in (key, value))
    lse = lse.mT[None] if layout == "TND" else lse
    # To the kernel, the log-sum-exp of a query that sees no key is 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    widths = (query.shape[-1], query.shape[-1], value.shape[-1])
    query, key, value = of_equal_width(query, key, value)
    gradient, out = (widened(t, query.shape[-1]) for t in (gradient, out))
    given = gradient, query, key, value, out, lse
    found = flash.gradients(*given, call.scale, _tiles(call))
    q, k, v = (from_heads_first(t[..., :w], layout) for t, w in zip(found, widths, strict=True))
    return q, k, v


def _tiles(call: AttentionCall) -> list[flash.Tile]:
    """Cut a call into tiles, leaving out queries that see no key."""
    if call.mask is not None:
        return [_masked_tile(call, call.mask)]
    blocks = []
    for query, query_end, key, key_end in call.spans():
        first = max(query, query_end - (key_end - key)) if call.causal else query
        if first < query_end and key < key_end:
            parts = _blocks(call, slice(first, query_end), slice(key, key_end))
            blocks += [(rows, keys, key) for rows, keys in parts]
    sizes = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys, _ in blocks]
    biases = _biases(call, sizes)
    return [
        flash.Tile(
            rows, keys, _is_triangle(call, *size), bias, _offset(call, size[0], keys.stop - 1 - key)
        )
        for (rows, keys, key), size, bias in zip(blocks, sizes, biases, strict=True)
    ]


def _blocks(call: AttentionCall, rows: slice, keys: slice) -> Iterator[tuple[slice, slice]]:
    """Cut the queries of a sequence into blocks, each with the keys that they see."""
    length = keys.stop - keys.start
    if not call.causal or _is_triangle(call, rows.stop - rows.start, length):
        yield rows, keys
        return
    window = length if call.window is None else call.window
    for start in range(rows.start, rows.stop, _BLOCK):
        end = min(start + _BLOCK, rows.stop)
        last = keys.stop - (rows.stop - end)
        first = last - (end - start) - window + 1
        yield slice(start, end), slice(max(keys.start, first), last)


def _masked_tile(call: AttentionCall, mask: torch.Tensor) -> flash.Tile:
    """Return the tile of everything, with the mask in its bias."""
    triangle = _is_triangle(call, call.queries, call.keys)
    hidden = hidden_keys(call, mask.device)
    assert hidden is not None
    bias = _hiding(mask if triangle else hidden)
    if call.alibi_slopes is not None:
        bias = bias + _slope(call.alibi_slopes, call.keys)
    return flash.Tile(
        slice(0, call.queries),
        slice(0, call.keys),
        triangle,
        bias.expand(-1, -1, call.queries, call.keys),
        _offset(call, call.queries, call.keys - 1),
        hidden.all(-1) if call.return_lse else None,
    )


def _is_triangle(call: AttentionCall, queries: int, keys: int) -> bool:
    """Say whether the kernel's own causality, aligned at the first key, is all that hides one."""
    return call.causal and queries == keys > 1 and (call.window is None or call.window >= keys)


def _biases(call: AttentionCall, sizes: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor | None]:
    """Give what is added to the scores of tiles of causality, window and ALiBi.

    All are aligned at the last query and the last key, so that small ones are corners of the
    largest.
    """
    slope = both = None
    if call.alibi_slopes is not None:
        slope = _slope(call.alibi_slopes, max([0, *(keys for _, keys in sizes)]))
    cut = [size for size in sizes if _hides(call, *size)]
    if cut:
        queries, keys = (max(lengths) for lengths in zip(*cut, strict=True))
        hidden = hidden_keys(call._replace(queries=queries, keys=keys), torch.device("cpu"))
        assert hidden is not None
        both = _hiding(hidden)
        both = both if slope is None else both + slope[..., -keys:]
    for queries, keys in sizes:
        bias = both if _hides(call, queries, keys) else slope
        corner = None if bias is None else bias[..., -queries:, -keys:]
        yield None if corner is None else corner.expand(-1, -1, queries, keys)


def _hides(call: AttentionCall, queries: int, keys: int) -> bool:
    """Say whether some key of a tile is hidden, other than by the kernel's own causality."""
    return call.causal and queries > 1 and not _is_triangle(call, queries, keys)


def _hiding(hidden: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    return bias.masked_fill_(hidden, float("-inf"))


def _slope(slopes: torch.Tensor, keys: int) -> torch.Tensor:
    """Return ALiBi's bias `(1, N, 1, m)`, 0 at the last key: one row serves all queries."""
    distance = torch.arange(1 - keys, 1, dtype=slopes.dtype, device=slopes.device)
    return (slopes[:, None] * distance)[None, :, None]


def _offset(call: AttentionCall, queries: int, last: int) -> torch.Tensor | None:
    """Return what ALiBi adds to the rows of a tile whose last key is at position `last`.

    It changes no weight, so it is made only for those who look at the log-sum-exp.
    """
    if call.alibi_slopes is None or not (call.return_lse or call.sinks is not None):
        return None
    if call.alibi_form == "row":
        return call.alibi_slopes[:, None] * last
    slopes = call.alibi_slopes
    return slopes[:, None] * torch.arange(
        queries - 1, -1, -1, dtype=slopes.dtype, device=slopes.device
    )
