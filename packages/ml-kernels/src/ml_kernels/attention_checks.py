"""What `flash_attention` checks of its arguments, and the sizes that it reads from them.

An NPU takes most of these mistakes and computes something else. Shapes: see `attention_call`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from ml_kernels.alibi import AlibiForm
from ml_kernels.attention_call import AttentionCall
from ml_kernels.checks import (
    check_floating,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from ml_kernels.layouts import LAYOUTS, Layout

_OPERATOR = "flash_attention"

Cumulative = torch.Tensor | Sequence[int] | None
"""Ends of sequences, each counted from 0, which comes first."""


def checked_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    num_heads: int | None,
    causal: bool,
    window: int | None,
    mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    alibi_form: AlibiForm,
    cu_seqlens_q: Cumulative,
    cu_seqlens_k: Cumulative,
    scale: float | None,
    dropout_p: float,
    sinks: torch.Tensor | None,
    return_lse: bool,
) -> AttentionCall:
    """Check all arguments of `flash_attention`.

    Raises:
        ValueError: A shape, a device or a value breaks a rule.
        TypeError: A dtype or a type does.
    """
    _check_kinds(query, key, value, layout, num_heads)
    batch, heads, groups, queries, keys, width = _sizes(
        query.shape, key.shape, value.shape, layout, num_heads or 0
    )
    ends_q = ends_k = None
    if layout == "TND":
        ends_q = _ends("cu_seqlens_q", cu_seqlens_q, queries)
        ends_k = _ends("cu_seqlens_k", cu_seqlens_k, keys)
        batch = _check_same_number(ends_q, ends_k)
    elif cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise _wrong("cu_seqlens", "given", f"only layout TND has sequences, {layout} does not")
    if window is not None:
        longest = keys if ends_k is None else max(end - start for start, end in pairwise(ends_k))
        window = _checked_window(window, causal, longest)
    if mask is not None:
        mask = _checked_mask(mask, layout, (batch, heads, queries, keys), query)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, heads, query)
    if alibi_form not in ("row", "square"):
        raise _wrong("alibi_form", repr(alibi_form), "must be 'row' or 'square'")
    if sinks is not None:
        _check_per_head("sinks", sinks, heads, query)
    _check_numbers(scale, dropout_p, return_lse, sinks)
    return AttentionCall(
        layout, batch, heads, groups, queries, keys, causal, window, mask,
        alibi_slopes, alibi_form, ends_q, ends_k,
        1.0 / math.sqrt(width or 1) if scale is None else scale, dropout_p, sinks, return_lse,
    )  # fmt: skip


def check_known(
    gradient: torch.Tensor,
    query: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> None:
    """Check what `flash_attention_backward` takes besides the tensors of `flash_attention`.

    Raises:
        ValueError: A shape or a device breaks a rule.
        TypeError: A dtype does.
    """
    shape = tuple(query.shape)
    if call.layout not in ("SBH", "BSH"):
        shape = (*shape[:-1], value.shape[-1])
    for name, tensor in (("gradient", gradient), ("out", out)):
        check_same_dtype(_OPERATOR, name, tensor, query)
        check_same_device(_OPERATOR, name, tensor, query)
        if tensor.shape != shape:
            raise _wrong(name, tuple(tensor.shape), f"must be {shape}, the shape of the output")
    check_tensor(_OPERATOR, "lse", lse)
    rows: tuple[int, ...] = (call.batch, call.heads, call.queries)
    if call.layout == "TND":
        rows = (call.queries, call.heads)
    if lse.shape != rows:
        raise _wrong("lse", tuple(lse.shape), f"must be {rows}, one for each query and head")
    if lse.dtype != torch.promote_types(query.dtype, torch.float32):
        raise TypeError(f"{_OPERATOR}: lse is {lse.dtype}: must be float32")
    check_same_device(_OPERATOR, "lse", lse, query)


def _wrong(argument: str, value: object, rule: str) -> ValueError:
    return ValueError(f"{_OPERATOR}: {argument} {value}: {rule}")


def _check_kinds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    num_heads: int | None,
) -> None:
    """Check layout, dtypes, devices and numbers of dimensions."""
    if layout not in LAYOUTS:
        raise _wrong("layout", repr(layout), f"must be one of {', '.join(LAYOUTS)}")
    if not _are_alike(query, key, value, len(layout)):
        _check_each(query, key, value, layout)
    if layout not in ("SBH", "BSH"):
        if num_heads is not None:
            raise _wrong("num_heads", num_heads, f"layout {layout} says it: leave it out")
        return
    if num_heads is not None:
        check_integer(_OPERATOR, "num_heads", num_heads)
    if num_heads is None or num_heads < 1:
        raise _wrong("num_heads", num_heads, f"layout {layout} needs the number of query heads")


def _are_alike(query: object, key: object, value: object, dimensions: int) -> bool:
    """Say whether all is well: a third of the time of looking for what is not."""
    tensor = torch.Tensor
    if not (isinstance(query, tensor) and isinstance(key, tensor) and isinstance(value, tensor)):
        return False
    dtype, device = query.dtype, query.device
    return (
        dtype.is_floating_point
        and dtype == key.dtype == value.dtype
        and device == key.device == value.device
        and query.dim() == key.dim() == value.dim() == dimensions
    )


def _check_each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout
) -> None:
    named = (("query", query), ("key", key), ("value", value))
    for name, tensor in named:
        check_floating(_OPERATOR, name, tensor)
        if tensor.dim() != len(layout):
            raise _wrong(name, tuple(tensor.shape), f"must have the dimensions {layout}")
    for name, tensor in named[1:]:
        check_same_dtype(_OPERATOR, name, tensor, query)
        check_same_device(_OPERATOR, name, tensor, query)


def _sizes(
    query: torch.Size, key: torch.Size, value: torch.Size, layout: Layout, num_heads: int
) -> tuple[int, int, int, int, int, int]:
    """Check that three shapes fit together; return `B, N, G, Sq, Sk, D`."""
    batch, queries, heads, width = _measured("query", query, layout, num_heads, 0)
    of_key = _measured("key", key, layout, 0, width)
    # Comparing shapes takes a fifth of measuring one, and mostly these two are equal.
    of_value = of_key if value == key else _measured("value", value, layout, 0, width)
    key_batch, keys, groups, key_width = of_key
    if key_batch != batch:
        raise _wrong("key", tuple(key), f"must have the batch of the query, {batch}")
    if key_width != width:
        raise _wrong("key", tuple(key), f"must have the head dimension of the query, {width}")
    if of_value is not of_key and of_value[:3] != of_key[:3]:
        rule = f"must have the batch, length and heads of the key {tuple(key)}"
        raise _wrong("value", tuple(value), rule)
    if groups < 1 or heads % groups:
        rule = f"its {groups} heads must divide the {heads} of the query"
        raise _wrong("key", tuple(key), rule)
    return batch, heads, groups, queries, keys, width


def _measured(
    name: str, shape: torch.Size, layout: Layout, heads: int, width: int
) -> tuple[int, int, int, int]:
    """Read batch, length, heads and head dimension; in a last dimension of both, one is given."""
    if layout == "SBND":
        length, batch, count, channels = shape
        return batch, length, count, channels
    if layout == "BSND":
        batch, length, count, channels = shape
        return batch, length, count, channels
    if layout == "BNSD":
        batch, count, length, channels = shape
        return batch, length, count, channels
    if layout == "TND":
        return 1, shape[0], shape[1], shape[2]
    first, second, both = shape
    batch, length = (second, first) if layout == "SBH" else (first, second)
    given = heads or width
    if not given or both % given:
        rule = f"{both} channels must be a multiple of the {'heads' if heads else 'head dimension'}"
        raise _wrong(name, tuple(shape), f"{rule}, {given}")
    return (batch, length, heads, both // heads) if heads else (batch, length, both // width, width)


def _ends(argument: str, given: Cumulative, tokens: int) -> tuple[int, ...]:
    """Check cumulative lengths; a tensor on an accelerator is copied, which waits for it."""
    if given is None:
        raise _wrong(argument, None, "layout TND needs the ends of its sequences")
    ends = tuple(given.tolist()) if isinstance(given, torch.Tensor) else tuple(given)
    if not all(isinstance(end, int) for end in ends):
        raise TypeError(f"{_OPERATOR}: {argument} {ends}: must be one row of integers")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens:
        raise _wrong(argument, ends, f"must start with 0 and end with all {tokens} tokens")
    if any(end < start for start, end in pairwise(ends)):
        raise _wrong(argument, ends, "must not decrease")
    return ends


def _check_same_number(ends_q: tuple[int, ...], ends_k: tuple[int, ...]) -> int:
    if len(ends_q) != len(ends_k):
        rule = f"must hold as many sequences as cu_seqlens_q {ends_q}"
        raise _wrong("cu_seqlens_k", ends_k, rule)
    return len(ends_q) - 1


def _checked_window(window: int, causal: bool, longest: int) -> int | None:
    check_integer(_OPERATOR, "window", window)
    if window < 1:
        raise _wrong("window", window, "must be at least 1, the query's own position")
    if not causal:
        raise _wrong("window", window, "looks back from the query, so it needs causal=True")
    return None if window >= longest else window


def _checked_mask(
    mask: torch.Tensor, layout: Layout, full: tuple[int, int, int, int], query: torch.Tensor
) -> torch.Tensor:
    """Return the mask as four dimensions, each 1 or the full one."""
    check_tensor(_OPERATOR, "mask", mask)
    if layout == "TND":
        raise _wrong("mask", tuple(mask.shape), "layout TND has no batch for it: use cu_seqlens")
    if mask.dtype != torch.bool:
        raise TypeError(f"{_OPERATOR}: mask is {mask.dtype}: must be bool, True where hidden")
    check_same_device(_OPERATOR, "mask", mask, query)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape, full, strict=False)):
        raise _wrong("mask", tuple(mask.shape), f"must broadcast to (B, N, Sq, Sk) = {full}")
    return mask.view(shape) if mask.dim() < 4 else mask


def _check_per_head(argument: str, x: torch.Tensor, heads: int, query: torch.Tensor) -> None:
    check_tensor(_OPERATOR, argument, x)
    if tuple(x.shape) != (heads,):
        raise _wrong(argument, tuple(x.shape), f"must be ({heads},), one for each query head")
    if x.dtype not in (torch.float32, torch.promote_types(query.dtype, torch.float32)):
        raise TypeError(f"{_OPERATOR}: {argument} is {x.dtype}: must be float32")
    check_same_device(_OPERATOR, argument, x, query)


def _check_slopes(slopes: torch.Tensor, heads: int, query: torch.Tensor) -> None:
    _check_per_head("alibi_slopes", slopes, heads, query)
    if slopes.requires_grad:
        raise _wrong("alibi_slopes", "requires grad", "slopes are constants: detach them")


def _check_numbers(
    scale: float | None, dropout_p: float, return_lse: bool, sinks: torch.Tensor | None
) -> None:
    if scale is not None and not 0.0 < scale < math.inf:
        raise _wrong("scale", scale, "must be positive and finite")
    if not 0.0 <= dropout_p < 1.0:
        raise _wrong("dropout_p", dropout_p, "must be in [0, 1)")
    if return_lse and (sinks is not None or dropout_p):
        raise _wrong("return_lse", True, "cannot be combined with sinks or dropout")
