"""Attention on an Ascend NPU: `npu_fusion_attention`, in the caller's own layout.

What its documentation says and a caller must not miss: without a mask `sparse_mode` and the window
are ignored, and every key is seen; the scale is 1 unless given; `pre_tockens` (so spelled) counts
the keys before the query's own; the ends of sequences come without the leading 0.

Shapes: `B` batch, `N` query heads, `Sq`, `Sk` query and key lengths, `D` head dimension, `T` the
tokens of all sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch._guards import detect_fake_mode

from ml_kernels.alibi import alibi_bias
from ml_kernels.attention import by_sequence
from ml_kernels.attention_backward import Gradients
from ml_kernels.attention_call import AttentionCall, Result, hidden_keys
from ml_kernels.dispatch import BackendUnavailableError
from ml_kernels.layouts import Layout, from_heads_first, heads_first, widened

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_HEADS = 256
_WIDEST_HEAD = 768
_MOST_SEQUENCES = 1024
_MOST_TOKENS = 1 << 20
"""Of one sequence, or of all sequences together."""
_ALIBI_ROWS = 1024
"""Of the biases of a longer triangle the kernel takes the last rows only."""

_NO_WEIGHT = 1e30
"""As the log-sum-exp of a query: all its weights are 0."""


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Result:
    """See `ml_kernels.flash_attention`."""
    _check(query, value, call)
    if call.layout == "TND" and call.alibi_slopes is not None:
        # Together with sequences the kernel takes the biases of triangles only, and no empty one.
        return by_sequence(_attend, query, key, value, call)
    return _attend(query, key, value, call)


def _check(query: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> None:
    if query.dtype not in _DTYPES:
        raise _unavailable(f"query is {query.dtype}: the kernel has none but 16 and 32 bits")
    if call.heads > _MOST_HEADS:
        raise _unavailable(f"query has {call.heads} heads: the kernel takes {_MOST_HEADS} at most")
    widths = (
        heads_first(t, call.layout, n).shape[-1]
        for t, n in ((query, call.heads), (value, call.groups))
    )
    if max(widths) > _WIDEST_HEAD:
        raise _unavailable(f"head dimension: the kernel takes {_WIDEST_HEAD} at most")
    _check_lengths(call)
    if call.sinks is not None and call.alibi_slopes is not None and call.alibi_form == "row":
        raise _unavailable("alibi_form 'row': with sinks the kernel's biases are the square form")


def _check_lengths(call: AttentionCall) -> None:
    if max(call.queries, call.keys) > _MOST_TOKENS:
        raise _unavailable(f"{max(call.queries, call.keys)} tokens: the kernel takes 2**20 at most")
    if call.layout != "TND" or call.alibi_slopes is not None:  # with slopes one after the other
        return
    if call.batch > _MOST_SEQUENCES:
        problem = f"cu_seqlens_q has {call.batch} sequences"
        raise _unavailable(f"{problem}: the kernel takes {_MOST_SEQUENCES} at most")


def _unavailable(problem: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"flash_attention: {problem} on an NPU; use backend='reference'")


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Result:
    width = value.shape[-1]
    tensors = _as_kernel_takes(query, key, value, call)
    blind, options = _options(call, query.device)
    if call.alibi_slopes is not None:
        options["pse"] = _pse(call, call.alibi_slopes, query.dtype)
    if call.sinks is not None:
        options["sink"] = call.sinks.float()
    out, maximum, total, *_ = torch_npu.npu_fusion_attention(
        *tensors,
        call.heads,
        _kernel_layout(call.layout),
        scale=call.scale,
        keep_prob=1.0 - call.dropout_p,
        **options,
    )
    out = _as_caller_has(out, call.heads, width, call)
    if blind is not None:
        out = heads_first(out, call.layout, call.heads).masked_fill(blind[..., None], 0.0)
        out = from_heads_first(out, call.layout)
    return (out, _lse(maximum, total, blind, call)) if call.return_lse else out


def flash_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> Gradients:
    """See `ml_kernels.flash_attention_backward`.

    The kernel takes weights as `exp(score - max) / sum`: with the log-sum-exp as the maximum and 1
    as the sum they are those of attention to all keys.
    """
    _check(query, value, call)
    blind, options = _options(call, query.device)
    unseen = lse == float("-inf") if blind is None else (lse == float("-inf")) | _rows(blind, call)
    maximum = lse.masked_fill(unseen, _NO_WEIGHT)[..., None].expand(*lse.shape, 8).contiguous()
    gradient, out, _ = _as_kernel_takes(gradient, out, out, call, query.shape[-1])
    found = torch_npu.npu_fusion_attention_grad(
        *_as_kernel_takes(query, key, value, call),
        gradient,
        call.heads,
        _kernel_layout(call.layout),
        softmax_max=maximum,
        softmax_sum=torch.ones_like(maximum),
        attention_in=out,
        scale_value=call.scale,
        **options,
    )
    of_query = _as_caller_has(found[0], call.heads, query.shape[-1], call)
    of_key = _as_caller_has(found[1], call.groups, key.shape[-1], call)
    return of_query, of_key, _as_caller_has(found[2], call.groups, value.shape[-1], call)


def _kernel_layout(layout: Layout) -> str:
    return "SBH" if layout == "SBND" else layout


def _as_kernel_takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: AttentionCall,
    width: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three in the kernel's layout, as wide as the widest, or as `width`."""
    if call.layout in ("SBH", "BSH"):
        return query, key, value
    width = max(width, query.shape[-1], value.shape[-1])
    query, key, value = (widened(t, width) for t in (query, key, value))
    if call.layout == "SBND":
        return query.flatten(2), key.flatten(2), value.flatten(2)
    return query, key, value


def _as_caller_has(x: torch.Tensor, heads: int, width: int, call: AttentionCall) -> torch.Tensor:
    """Undo `_as_kernel_takes`."""
    if call.layout in ("SBH", "BSH"):
        return x
    if call.layout == "SBND":
        x = x.view(*x.shape[:2], heads, x.shape[2] // heads)
    return x if x.shape[-1] == width else x[..., :width]


def _options(
    call: AttentionCall, device: torch.device
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return which queries see no key, 3-D bool that broadcasts to `(B, N, Sq)`, and arguments."""
    options: dict[str, Any] = {}
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        options["actual_seq_qlen"] = list(call.cu_seqlens_q[1:])
        options["actual_seq_kvlen"] = list(call.cu_seqlens_k[1:])
        options["softmax_layout"] = "TND"
    if call.mask is not None:
        hidden = hidden_keys(call, device)
        assert hidden is not None
        blind = hidden.all(-1)
        # What the kernel makes of a row without keys is not documented: let it see them all.
        hidden = _full(hidden & ~blind[..., None], call)
        return blind, options | {"atten_mask": hidden, "sparse_mode": 1}
    if call.window is not None:
        options |= {"sparse_mode": 4, "pre_tockens": call.window - 1, "next_tockens": 0}
        options["atten_mask"] = _triangle(device)
    elif call.causal:
        options |= {"sparse_mode": 3, "atten_mask": _triangle(device)}
    return _blind(call, device), options


def _blind(call: AttentionCall, device: torch.device) -> torch.Tensor | None:
    """Return the queries that lengths and causality leave without a key, None if there are none.

    The kernel takes them, by its documentation of sparse mode 3, and computes something.
    """
    rows = list(call.blind_queries())
    if not rows:
        return None
    blind = torch.zeros(1, 1, call.queries, dtype=torch.bool, device=device)
    for some in rows:
        blind[:, :, some] = True
    return blind


def _rows(blind: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Return `blind` as it fits the log-sum-exp: `(T, 1)` for TND."""
    return blind[0].mT if call.layout == "TND" else blind


def _full(hidden: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Return a mask in one of the shapes the kernel has: BNSS, B1SS or 11SS."""
    batch, heads = hidden.shape[:2]
    shape = (call.batch if heads > 1 else batch, heads, call.queries, call.keys)
    return hidden.expand(shape).contiguous()


_triangles: dict[torch.device, torch.Tensor] = {}


def _triangle(device: torch.device) -> torch.Tensor:
    """Return the mask of sparse modes 2, 3 and 4: of this size, whatever the lengths.

    It is kept, so it must serve any later call: no tensor of inference mode, which autograd refuses
    to save, and none without numbers, which shape propagation makes.
    """
    fake = detect_fake_mode() is not None
    if device in _triangles and not fake:
        return _triangles[device]
    with torch.inference_mode(False):
        triangle = torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)
    if not fake:
        _triangles[device] = triangle
    return triangle


def _pse(call: AttentionCall, slopes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ALiBi's biases, `(1, N, Sq, Sk)` or the last rows of it.

    The kernel computes `scale * (pse + q k)` (its documentation, and ModelLink's division by the
    scale; an example in the former adds it after scaling, and is wrong). The row form would need
    less memory, and loses the neighbours' differences to the rounding of large numbers.
    """
    triangle = call.causal and call.mask is None and call.window is None
    if triangle and call.queries == call.keys > _ALIBI_ROWS:
        bias = alibi_bias(slopes, _ALIBI_ROWS, call.keys, form="square")
    else:
        bias = alibi_bias(slopes, call.queries, call.keys, form="square")
    if call.causal:
        bias.clamp_(max=0.0)  # hidden keys: keep what is added there from growing
    return bias.div_(call.scale)[None].to(dtype)


def _lse(
    maximum: torch.Tensor, total: torch.Tensor, blind: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """Return the log-sum-exp of the kernel's statistics, which have 8 equal columns."""
    lse = (maximum[..., 0] + total[..., 0].log()).detach()  # (B, N, Sq), (T, N) for TND
    if call.alibi_slopes is not None and call.alibi_form == "row":
        position = torch.arange(call.keys - call.queries, call.keys, device=lse.device)
        lse = lse + call.alibi_slopes[:, None] * position
    if blind is None:
        return lse
    return lse.masked_fill(_rows(blind, call), float("-inf"))
