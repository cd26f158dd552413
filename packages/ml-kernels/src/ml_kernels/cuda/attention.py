"""Attention on a GPU: torch's sdpa where that is enough, else flash-attn, else flex attention.

sdpa covers square causal and full attention; its kernels, called by themselves, give the
log-sum-exp too: cuDNN's on Hopper, else torch's. The package flash-attn, if installed, covers
windows, packed sequences and ALiBi in half precision. Flex attention, a kernel that torch compiles
around the functions below when it is first needed, covers all but dropout.

What no fused kernel covers runs the unfused formula of the reference, with the matrix of scores in
memory: float64; and the gradients of a part of the keys, except in half precision, full or square
causal, without a mask, a window or packed sequences, in one head dimension that is a multiple of 8
and 256 at most. Dropout together with a mask or a window takes a mask as large as the scores.

Shapes: `B` batch, `N` query heads, `Sq`, `Sk` query and key lengths, `D` head dimension, `T` the
tokens of all sequences; heads first inside.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from ml_kernels.alibi import alibi_bias
from ml_kernels.attention import attention_reference, by_sequence
from ml_kernels.attention_backward import Gradients, attention_backward_reference
from ml_kernels.attention_call import AttentionCall, Result, hidden_keys
from ml_kernels.autocast import without_autocast
from ml_kernels.cuda import graphs
from ml_kernels.dispatch import BackendUnavailableError, constant, has_triton
from ml_kernels.kept import kept
from ml_kernels.layouts import from_heads_first, heads_first, of_equal_width, rows_of_numbers

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
_NARROWEST_FLEX_HEAD = 16


Mod = Callable[..., torch.Tensor]
"""A function of indices of batch, head, query and key, as flex attention takes them."""


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Result:
    """See `ml_kernels.flash_attention`."""
    if query.dtype == torch.float64:
        return attention_reference(query, key, value, call)  # no fused kernel of torch has it
    heads = call.heads, call.groups, call.groups
    tensors = zip((query, key, value), heads, strict=True)
    q, k, v = (rows_of_numbers(heads_first(t, call.layout, n)) for t, n in tensors)
    if call.window is not None and _is_step(call):
        k, v = (t[:, :, call.keys - call.window :] for t in (k, v))
        call = call._replace(keys=call.window, window=None)
    attend = _kernel_for(q, v, call)
    if attend is _sdpa and call.layout == "TND":
        return by_sequence(flash_attention, query, key, value, call)
    width = v.shape[-1]
    with without_autocast(query):
        out, lse = attend(q, k, v, call)
    out = from_heads_first(out if out.shape[-1] == width else out[..., :width], call.layout)
    if not call.return_lse:
        return out
    assert lse is not None
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
    g, q, o = (heads_first(t, call.layout, call.heads) for t in (gradient, query, out))
    k, v = (heads_first(t, call.layout, call.groups) for t in (key, value))
    if not _torchs_flash_covers(q, v, call):
        return attention_backward_reference(gradient, query, key, value, out, lse, call)
    g, q, k, v, o = (rows_of_numbers(t.transpose(1, 2)) for t in (g, q, k, v, o))  # (B, S, N, D)
    # The random state of a dropout of 0: not looked at.
    state, unused = (query.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    found = _ATEN._flash_attention_backward(
        # It reads the log-sum-exp without looking at strides.
        *(g, q, k, v, o, lse.contiguous()),
        *(None, None, call.queries, call.keys, 0.0, _is_triangle(call)),
        *(state, unused),
        scale=call.scale,
    )
    of_query, of_key, of_value = (from_heads_first(t.transpose(1, 2), call.layout) for t in found)
    return of_query, of_key, of_value


def _is_step(call: AttentionCall) -> bool:
    """Say whether it is a step of decoding, which needs nothing of the keys before its window."""
    plain = call.mask is None and call.alibi_slopes is None and call.layout != "TND"
    return plain and call.queries == 1


def _is_triangle(call: AttentionCall) -> bool:
    """Say whether causality, aligned at the first key as torch's kernels do, hides a key."""
    return call.causal and call.queries > 1


def _torchs_flash_covers(query: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> bool:
    """Say whether torch's flash kernel, called by itself, takes these; heads first."""
    if call.layout == "TND" or _needs_mask(call) or value.shape[-1] != query.shape[-1]:
        return False
    return query.shape[-1] % 8 == 0 and _has_torchs_flash(query)


def _has_torchs_flash(query: torch.Tensor) -> bool:
    """Say whether torch's flash kernel is for this dtype, head dimension and GPU."""
    fits = query.dtype in _HALF and query.shape[-1] <= _WIDEST_FLASH_HEAD
    return fits and _is_ampere(query.device)


@constant
def _is_ampere(device: torch.device) -> bool:
    """Say whether a GPU is of the generation of the A100 or newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _kernel_for(
    query: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    if call.dropout_p and call.sinks is not None:
        raise BackendUnavailableError(
            "flash_attention: dropout_p: no kernel of torch has it together with sinks on CUDA; "
            "use backend='reference'"
        )
    special = call.layout == "TND" or call.return_lse or call.sinks is not None
    if not special and call.alibi_slopes is None and not _needs_mask(call):
        return _sdpa
    if _flash_attn_covers(query, value, call):
        return _flash_attn
    biased = call.alibi_slopes is not None or call.sinks is not None or call.dropout_p > 0
    if not biased and _torchs_flash_covers(query, value, call):
        return _torchs_flash
    return _sdpa if call.dropout_p else _flex


def _needs_mask(call: AttentionCall) -> bool:
    """Say whether anything but causality as sdpa has it, aligned at the first key, hides a key."""
    if call.mask is not None or call.window is not None:
        return True
    return call.causal and call.queries not in (1, call.keys)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, None]:
    query, key, value = of_equal_width(query, key, value)
    grouped = call.heads != call.groups
    masked = _needs_mask(call) or call.alibi_slopes is not None
    if grouped and (masked or not _has_torchs_flash(query)):
        # Of the fused kernels only flash has grouped heads, and that takes no mask.
        key, value = (t.repeat_interleave(call.heads // call.groups, dim=1) for t in (key, value))
        grouped = False
    bias, blind = _bias(query, call) if masked else (None, None)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=not masked and _is_triangle(call),
        dropout_p=call.dropout_p,
        scale=call.scale,
        enable_gqa=grouped,
    )
    return out if blind is None else out.masked_fill(blind[..., None], 0.0), None


def _torchs_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what sdpa does not: the log-sum-exp."""
    if _cudnn_covers(query, key, value, call):
        out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
            *(query, key, value, None, True, 0.0, _is_triangle(call), False), scale=call.scale
        )
        return out, lse.reshape(out.shape[:-1])
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(
        query, key, value, 0.0, _is_triangle(call), scale=call.scale
    )
    return out, lse


def _cudnn_covers(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> bool:
    """Say whether cuDNN's kernel takes these, which on Hopper is about twice as fast as torch's.

    While torch compiles the caller, torch's runs: the question is no part of a graph.
    """
    if torch.compiler.is_compiling() or not _is_hopper(query.device):
        return False
    grouped = call.heads != call.groups
    params = torch.backends.cuda.SDPAParams(
        query, key, value, None, 0.0, _is_triangle(call), grouped
    )
    return torch.backends.cuda.can_use_cudnn_attention(params)


@constant
def _is_hopper(device: torch.device) -> bool:
    """Say whether a GPU is of the generation of the H100 or newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def _bias(query: torch.Tensor, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is added to the scores, and the queries that see no key: those see all here."""
    bias = query.new_zeros(1, 1, call.queries, call.keys)
    if call.alibi_slopes is not None:
        bias = alibi_bias(call.alibi_slopes, call.queries, call.keys, form="square")[None]
    hidden = hidden_keys(call, query.device)
    if hidden is None:
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    blind = hidden.all(-1)
    bias = bias.masked_fill(hidden & ~blind[..., None], float("-inf"))
    return bias.to(query.dtype).expand(call.batch, call.heads, -1, -1), blind


@constant
def _has_flash_attn() -> bool:
    return _flash_attn_works()


@cache
def _flash_attn_works() -> bool:
    """Say whether flash-attn can be imported: built for another torch, it is there and cannot."""
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "flash_attn":
            problem = f"flash_attn is installed, and broken: {error}"
            warnings.warn(f"{problem}; torch's flex attention runs instead", stacklevel=2)
        return False
    return True


def _flash_attn_covers(query: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> bool:
    if query.dtype not in _HALF or call.mask is not None or call.sinks is not None:
        return False
    if call.alibi_slopes is not None and (
        not call.causal or (call.return_lse and call.alibi_form == "row")
    ):
        return False  # its bias is the square form with the distance, ahead or behind
    if call.layout == "TND" and call.return_lse:
        return False  # the shape of its log-sum-exp depends on its version
    if next(call.blind_queries(), None) is not None:
        return False  # their log-sum-exp is +inf there
    width = max(query.shape[-1], value.shape[-1])
    return width <= _WIDEST_FLASH_HEAD and _has_flash_attn()


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    flash_attn = importlib.import_module("flash_attn")
    tensors = [t.transpose(1, 2) for t in of_equal_width(query, key, value)]  # (B, S, N, D)
    options: dict[str, Any] = {
        "dropout_p": call.dropout_p,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size": (-1, -1) if call.window is None else (call.window - 1, 0),
        "alibi_slopes": call.alibi_slopes,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        ends = (call.cu_seqlens_q, call.cu_seqlens_k)
        out = flash_attn.flash_attn_varlen_func(
            *(t[0] for t in tensors),
            *(_on_device(e, query.device) for e in ends),
            *(max(end - start for start, end in pairwise(e)) for e in ends),
            **options,
        )
        return out.transpose(0, 1)[None], None
    if call.return_lse:
        out, lse, _ = flash_attn.flash_attn_func(*tensors, **options, return_attn_probs=True)
        return out.transpose(1, 2), lse
    return flash_attn.flash_attn_func(*tensors, **options).transpose(1, 2), None


@kept(8)
def _on_device(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return cumulative lengths as flash-attn takes them: one copy for all layers of a model."""
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    narrow = _NARROWEST_FLEX_HEAD - min(query.shape[-1], value.shape[-1])
    if narrow > 0:
        query, key, value = (F.pad(t, (0, narrow)) for t in (query, key, value))
    pattern = pattern_of(call, query.device)
    options: dict[str, Any] = {
        "score_mod": score_mod(call, places_of(pattern)),
        "block_mask": _block_mask(pattern, call),
        "scale": call.scale,
        "enable_gqa": call.heads != call.groups,
    }
    attend = compiled(flex.flex_attention)
    if not call.return_lse and call.sinks is None:
        return attend(query, key, value, **options), None
    if hasattr(flex, "AuxRequest"):
        out, more = attend(query, key, value, **options, return_aux=flex.AuxRequest(lse=True))
        lse = more.lse
    else:  # torch before 2.9
        out, lse = attend(query, key, value, **options, return_lse=True)
    if call.sinks is None:
        return out, lse.detach()
    # The share that the sink leaves to the keys; flex attention's log-sum-exp has a gradient.
    return (out * torch.sigmoid(lse - call.sinks[:, None])[..., None]).to(out.dtype), None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of torch's flex attention, once in this process, when it is needed.

    It must not run uncompiled, where it holds the matrix of scores.

    Raises:
        BackendUnavailableError: There is no Triton, to which torch compiles it.
    """
    if not has_triton():
        raise BackendUnavailableError(
            "flash_attention: this combination needs torch's flex attention, which needs the "
            "package triton on CUDA; use backend='reference'"
        )
    return graphs.compiled(function)


class Pattern(NamedTuple):
    """Which keys are hidden by anything but a mask; what belongs to it is computed once."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    ends_q: tuple[int, ...] | None
    ends_k: tuple[int, ...] | None
    device: torch.device


class Places(NamedTuple):
    """Where queries and keys stand: as tensors, since numbers would be compiled into the kernel."""

    query: torch.Tensor
    """`(Sq,)` or `(T,)`: in its sequence."""
    key: torch.Tensor
    query_sequence: torch.Tensor | None = None
    """`(T,)`: the sequence it belongs to; None if there is one only."""
    key_sequence: torch.Tensor | None = None


def pattern_of(call: AttentionCall, device: torch.device) -> Pattern:
    """Return the pattern of a call."""
    ends = call.cu_seqlens_q, call.cu_seqlens_k
    return Pattern(call.queries, call.keys, call.causal, call.window, *ends, device)


@kept(8)
def places_of(pattern: Pattern) -> Places:
    """Return where the queries and keys of a pattern stand."""
    queries, keys, device = pattern.queries, pattern.keys, pattern.device
    if pattern.ends_q is None or pattern.ends_k is None:
        query = torch.arange(keys - queries, keys, device=device)
        return Places(query, torch.arange(keys, device=device))
    # On the CPU, whatever the default device: they are small, and their sums sizes.
    ends_q, ends_k = (torch.tensor(e, device="cpu") for e in (pattern.ends_q, pattern.ends_k))
    of_query = torch.repeat_interleave(ends_q.diff(), output_size=queries)
    of_key = torch.repeat_interleave(ends_k.diff(), output_size=keys)
    # The last query of a sequence stands at its last key.
    query = torch.arange(queries, device="cpu") + (ends_k.diff() - ends_q[1:])[of_query]
    key = torch.arange(keys, device="cpu") - ends_k[of_key]
    return Places(*(t.to(device) for t in (query, key, of_query, of_key)))


def mask_mod(pattern: Pattern, mask: torch.Tensor | None) -> Mod | None:
    """Return the function that says whether a query sees a key, None if it always does.

    Args:
        pattern: Of the call.
        mask: `(B, N, Sq, Sk)` bool, True where hidden, or None.
    """
    query, key, of_query, of_key = places_of(pattern)
    window = pattern.window
    mods: list[Mod] = []
    if of_query is not None and of_key is not None:
        mods.append(lambda _b, _h, q, k: of_query[q] == of_key[k])
    if pattern.causal:
        mods.append(lambda _b, _h, q, k: key[k] <= query[q])
    if window is not None:
        mods.append(lambda _b, _h, q, k: key[k] > query[q] - window)
    if mask is not None:
        mods.append(lambda b, h, q, k: ~mask[b, h, q, k])
    return flex.and_masks(*mods) if mods else None


def score_mod(call: AttentionCall, places: Places) -> Mod | None:
    """Return the function that adds ALiBi's bias to a score, None without ALiBi."""
    slopes, (query, key, *_) = call.alibi_slopes, places
    if slopes is None:
        return None
    if call.alibi_form == "row":
        return lambda score, _b, h, _q, k: score + slopes[h] * key[k]
    return lambda score, _b, h, q, k: score + slopes[h] * (key[k] - query[q])


def _block_mask(pattern: Pattern, call: AttentionCall) -> flex.BlockMask | None:
    """Return which blocks of scores the kernel may skip."""
    if call.mask is None:
        return _cached_block_mask(pattern)
    batch, heads = call.mask.shape[:2]
    full = call.mask.expand(call.batch, call.heads, call.queries, call.keys)
    mod = mask_mod(pattern, full)
    sizes = (
        call.batch if batch > 1 else None,
        call.heads if heads > 1 else None,
        call.queries,
        call.keys,
    )
    return compiled(flex.create_block_mask)(mod, *sizes, device=pattern.device)


@kept(8)
def _cached_block_mask(pattern: Pattern) -> flex.BlockMask | None:
    mod = mask_mod(pattern, None)
    if mod is None:
        return None
    sizes = (None, None, pattern.queries, pattern.keys)
    return compiled(flex.create_block_mask)(mod, *sizes, device=pattern.device)
