"""Attention: every variant that a model of the tables needs, under one name.

Shapes: `B` batch, `N` query heads, `G` key/value groups, `Sq`, `Sk` query and key lengths, `D` head
dimension, `Dv` that of the values, `H = N D`, `T` the tokens of all sequences of a batch. Head `n`
of the query attends to group `n // (N / G)`. Query `i` stands at the position of key `i + Sk - Sq`:
the last query at the last key, as decoding with a cache needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch

from ml_kernels.alibi import AlibiForm, alibi_bias
from ml_kernels.attention_call import AttentionCall, Result, hidden_keys
from ml_kernels.attention_checks import checked_call
from ml_kernels.autocast import without_autocast
from ml_kernels.dispatch import Backend, implementation
from ml_kernels.layouts import Layout, from_heads_first, heads_first


@overload
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: Layout,
    num_heads: int | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    mask: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    alibi_form: AlibiForm = ...,
    cu_seqlens_q: torch.Tensor | Sequence[int] | None = ...,
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend | None = ...,
) -> torch.Tensor: ...


@overload
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: Layout,
    num_heads: int | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    mask: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    alibi_form: AlibiForm = ...,
    cu_seqlens_q: torch.Tensor | Sequence[int] | None = ...,
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backend | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: Layout,
    num_heads: int | None = None,
    causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_form: AlibiForm = "square",
    cu_seqlens_q: torch.Tensor | Sequence[int] | None = None,
    cu_seqlens_k: torch.Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Result:
    """Attend (Vaswani et al. 2017, arXiv:1706.03762) without the matrix of scores in memory.

    Args:
        query: In the order of dimensions that `layout` names, any floating dtype.
        key: As `query`, with `G` heads that divide `N` (Ainslie et al. 2023, arXiv:2305.13245).
        value: As `key`; `Dv` may differ from `D` in layouts that end with D.
        layout: "SBND", "SBH" (Megatron's), "BSH", "BSND" or "BNSD" (torch's); or "TND": sequences
            one after the other, each attending to itself only.
        num_heads: `N`, for SBH and BSH only.
        causal: Hide the keys after the query.
        window: Hide all but the query's own key and the `window - 1` before it, as Hugging Face's
            `sliding_window` does; with `causal` only.
        mask: Bool, True where hidden (as in Megatron, not as in torch's sdpa), any shape that
            broadcasts to `(B, N, Sq, Sk)`; together with `causal` and `window` if those are given.
        alibi_slopes: `(N,)` float32, see `alibi_slopes()`.
        alibi_form: What is added to a score, see `alibi_bias()`; only the log-sum-exp differs.
        cu_seqlens_q: For TND: the ends of the sequences in the queries, 0 first, as in flash-attn:
            `(0, 3, 7)` are two, of 3 and 4 tokens. A tensor on an accelerator is copied to the
            host in every call, which waits for the device; a tuple is not.
        cu_seqlens_k: The same of keys and values.
        scale: Multiplies the scores; `1 / sqrt(D)` when None.
        dropout_p: Probability of dropping an attention weight.
        sinks: `(N,)` float32: a logit for each head that takes its share of the softmax and has
            no value, as in gpt-oss.
        return_lse: Return the natural logarithm of the sum of the exponentials of the scores too:
            by it, halves of the keys are merged to the whole (ring attention). It has no gradient.
        backend: Force an implementation by name.

    Returns:
        The output, as `query` but with `Dv`; 0 where every key is hidden. With `return_lse`
        also `(B, N, Sq)` float32, `(T, N)` for TND; -inf where every key is hidden.

    Raises:
        ValueError: A shape, a device or a value breaks a rule.
        TypeError: A dtype does.
        BackendUnavailableError: The implementation cannot run here, or has no kernel for this.
    """
    # By place, not by name, which takes longer: all that comes before the kernel takes 3 us.
    call = checked_call(
        query, key, value, layout, num_heads, causal, window, mask, alibi_slopes, alibi_form,
        cu_seqlens_q, cu_seqlens_k, scale, dropout_p, sinks, return_lse,
    )  # fmt: skip
    attend = implementation("flash_attention", query, backend)
    if not (query.numel() and value.numel()):  # the key has dimensions of these two
        attend = attention_reference  # kernels need something to compute
    return attend(query, key, value, call)


def attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Result:
    """The formula, in float32 (float64 for float64 inputs)."""
    if call.layout == "TND":
        return by_sequence(attention_reference, query, key, value, call)
    q, k, v = wide_heads(query, key, value, call)
    with without_autocast(query):
        weights, lse = _softmax(masked_scores(q, k, call), call.sinks)
        if call.dropout_p:
            weights = torch.dropout(weights, call.dropout_p, train=True)
        out = torch.einsum("bnqk,bnkd->bnqd", weights, v).to(query.dtype)
    out = from_heads_first(out, call.layout)
    return (out, lse) if call.return_lse else out


def wide_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three as `(B, N, S, D)` in float32 or float64, groups repeated for their heads."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q = heads_first(query, call.layout, call.heads).to(wide)
    k, v = (heads_first(t, call.layout, call.groups).to(wide) for t in (key, value))
    of_heads = (-1, -1, call.heads // call.groups, -1, -1)
    k, v = (t[:, :, None].expand(of_heads).flatten(1, 2) for t in (k, v))
    return q, k, v


def masked_scores(query: torch.Tensor, key: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Return the scores `(B, N, Sq, Sk)` of what `wide_heads` returns, -inf where hidden."""
    scores = torch.einsum("bnqd,bnkd->bnqk", query, key) * call.scale
    slopes, hidden = call.alibi_slopes, hidden_keys(call, query.device)
    if slopes is not None:
        scores = scores + alibi_bias(slopes, call.queries, call.keys, form=call.alibi_form)
    return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))


def by_sequence(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall], Result],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: AttentionCall,
) -> Result:
    """Call `attend` for each sequence of TND tensors, as a batch of one in layout BSND."""
    results = []
    for q, q_end, k, k_end in call.spans():
        one = call.of_one(q_end - q, k_end - k)
        kernel = attend if one.queries and one.keys else attention_reference
        part = query[None, q:q_end], key[None, k:k_end], value[None, k:k_end]
        results.append(kernel(*part, one))
    if not call.return_lse:
        return torch.cat([out[0] for out in results])
    outs, logs = zip(*results, strict=True)
    return torch.cat([out[0] for out in outs]), torch.cat([lse[0].mT for lse in logs])


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights, 0 in rows of nothing but -inf, and the log-sum-exp of the rows."""
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(scores.detach(), dim=-1)
    blind = (lse == float("-inf"))[..., None]
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (weights if sinks is None else weights[..., :-1]), lse
