"""The gradients of attention to some of the keys, when its output is of these and others.

That is what the backward pass of ring attention needs: each step brings another part of the keys,
and the weights of that part are `exp(score - lse)`, with the log-sum-exp over all keys. Merging the
outputs of the parts is plain arithmetic: of `(out_1, lse_1)` and `(out_2, lse_2)` it is
`lse = logaddexp(lse_1, lse_2)`, `out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2`.

Shapes: see `ml_kernels.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ml_kernels.attention import masked_scores, wide_heads
from ml_kernels.attention_call import AttentionCall
from ml_kernels.attention_checks import check_known, checked_call
from ml_kernels.autocast import without_autocast
from ml_kernels.dispatch import Backend, implementation
from ml_kernels.layouts import Layout, from_heads_first, heads_first

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def flash_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    layout: Layout,
    num_heads: int | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | Sequence[int] | None = None,
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Gradients:
    """Return the gradients of query, key and value, as far as these keys go.

    The gradient of the query is the sum over all parts of the keys.

    Args:
        gradient: Of `out`.
        query: As in `flash_attention`.
        key: A part of the keys.
        value: The same part of the values.
        out: Attention to all keys, merged.
        lse: Its log-sum-exp, merged, `(B, N, Sq)` float32, `(T, N)` for TND.
        layout: As in `flash_attention`.
        num_heads: As in `flash_attention`.
        causal: As in `flash_attention` for this part.
        window: As in `flash_attention` for this part.
        mask: As in `flash_attention` for this part.
        cu_seqlens_q: As in `flash_attention`.
        cu_seqlens_k: As in `flash_attention`.
        scale: As in `flash_attention`.
        backend: Force an implementation by name.

    Raises:
        ValueError: A shape, a device or a value breaks a rule.
        TypeError: A dtype does.
        BackendUnavailableError: The implementation cannot run here, or has no kernel for this.
    """
    try:
        call = checked_call(
            query, key, value,
            layout=layout, num_heads=num_heads, causal=causal, window=window, mask=mask,
            alibi_slopes=None, alibi_form="square",
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            scale=scale, dropout_p=0.0, sinks=None, return_lse=True,
        )  # fmt: skip
        check_known(gradient, query, value, out, lse, call)
    except (ValueError, TypeError) as error:
        # The checks are those of the forward pass, and name it.
        problem = str(error).removeprefix("flash_attention: ")
        raise type(error)(f"flash_attention_backward: {problem}") from None
    backward = implementation("flash_attention_backward", query, backend)
    if not (query.numel() and key.numel() and value.numel()):
        backward = attention_backward_reference  # kernels need something to compute
    return backward(gradient, query, key, value, out, lse, call)


def attention_backward_reference(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> Gradients:
    """The formula, in float32 (float64 for float64 inputs)."""
    if call.layout == "TND":
        return _by_sequence(gradient, query, key, value, out, lse, call)
    q, k, v = wide_heads(query, key, value, call)
    g, o = (heads_first(t, call.layout, call.heads).to(q.dtype) for t in (gradient, out))
    mean = (g * o).sum(-1, keepdim=True)
    with without_autocast(query):
        weights = (masked_scores(q, k, call) - lse[..., None]).exp()
        weights = weights.masked_fill((lse == float("-inf"))[..., None], 0.0)
        of_scores = weights * (g @ v.mT - mean) * call.scale  # (B, N, Sq, Sk)
        of_query, of_key, of_value = of_scores @ k, of_scores.mT @ q, weights.mT @ g
    of_key, of_value = (_summed(t, call.groups) for t in (of_key, of_value))
    found = (of_query, of_key, of_value)
    q, k, v = (from_heads_first(t.to(query.dtype), call.layout) for t in found)
    return q, k, v


def _summed(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return `(B, G, S, D)` from `(B, N, S, D)`."""
    batch, heads, length, width = x.shape
    return x.view(batch, groups, heads // groups, length, width).sum(2)


def _by_sequence(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> Gradients:
    found = []
    for q, q_end, k, k_end in call.spans():
        g, o, some = gradient[None, q:q_end], out[None, q:q_end], query[None, q:q_end]
        part, log = (key[None, k:k_end], value[None, k:k_end]), lse[q:q_end].mT[None]
        one = call.of_one(q_end - q, k_end - k)
        found.append(attention_backward_reference(g, some, *part, o, log, one))
    of_query, of_key, of_value = (
        torch.cat([t[0] for t in parts]) for parts in zip(*found, strict=True)
    )
    return of_query, of_key, of_value
