"""What the CUDA version hands to torch's kernels and to flash-attn, on a machine without a GPU.

Flex attention runs unfused on a CPU, without gradients; for those, and in place of flash-attn, are
functions written from their documentation.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_formula import (
    LENGTHS,
    SEEN,
    SLOPES,
    formula,
    output_of,
    sized,
    tensors,
    to_layout,
)
from oracle import assert_matches, assert_near, random, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex

from ml_kernels import BackendUnavailableError, flash_attention, flash_attention_backward
from ml_kernels.cuda import attention as cuda
from ml_kernels.dispatch import IMPLEMENTATIONS

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _the_cuda_version_for_tensors_on_the_cpu(monkeypatch):
    for operator in ("flash_attention", "flash_attention_backward"):
        monkeypatch.setitem(IMPLEMENTATIONS, (operator, "cpu"), IMPLEMENTATIONS[operator, "cuda"])
    monkeypatch.setattr(cuda, "compiled", lambda function: function)
    monkeypatch.setattr(cuda, "_has_flash_attn", lambda: False)
    cuda._cached_block_mask.cache_clear()


def documented_flex_attention(
    query, key, value, score_mod, block_mask, scale, enable_gqa, return_aux=None
):
    """What flex attention's documentation says, with gradients."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * scale
    axes = (torch.arange(n) for n in scores.shape)
    grid = torch.meshgrid(*axes, indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *grid)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*grid), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = (weights @ value).to(dtype)
    return out if return_aux is None else (out, SimpleNamespace(lse=lse))


@pytest.fixture
def _flex_attention_with_gradients(monkeypatch):
    monkeypatch.setattr(flex, "flex_attention", documented_flex_attention)


@pytest.mark.usefixtures("_flex_attention_with_gradients")
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flex_attention_is_given_the_right_functions(lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    inputs = tensors(*LENGTHS[lengths])
    attend = {"layout": "BNSD", "return_lse": True, **options}
    assert_matches(lambda *qkv: flash_attention(*qkv, **attend)[0], output_of(options), inputs)
    _, lse = flash_attention(*inputs, **attend)
    _, expected = formula(options)(*(t.detach() for t in inputs))
    assert not lse.requires_grad
    torch.testing.assert_close(lse, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("_flex_attention_with_gradients")
@pytest.mark.parametrize("seen", ["causal", "window", "masked", "row slopes"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sinks_and_their_gradients_come_through_its_log_sum_exp(lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    assert_matches(
        lambda q, k, v, sinks: flash_attention(q, k, v, layout="BNSD", sinks=sinks, **options),
        output_of(options),
        [*tensors(*LENGTHS[lengths]), random(4, seed=3)],
    )


PACKED = {"cu_seqlens_q": (0, 2, 2, 5), "cu_seqlens_k": (0, 3, 4, 5)}


@pytest.mark.usefixtures("_flex_attention_with_gradients")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 2},
        {"alibi_slopes": SLOPES},
        {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row"},
    ],
)
def test_packed_sequences_are_told_apart(options):
    inputs = [to_layout(t, "TND") for t in tensors(batch=1)]
    options = {**options, **PACKED, "layout": "TND", "return_lse": True}
    out, lse = flash_attention(*inputs, **options)
    expected, expected_lse = flash_attention(*inputs, **options, backend="reference")
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)
    upstream = random(*out.shape).detach()
    gradients = [torch.autograd.grad(x, inputs, upstream) for x in (out, expected)]
    assert_near([out, *gradients[0]], [expected, *gradients[1]])


@pytest.mark.parametrize(
    ("layout", "keys", "options"),
    [
        ("BNSD", 5, {"causal": True, "window": 3, "mask": random(2, 4, 5, 5) < 0.2}),
        ("BNSD", 3, {"causal": True, "alibi_slopes": SLOPES}),
        ("TND", 5, {"causal": True, "window": 2, **PACKED}),
    ],
)
def test_torchs_own_flex_attention_takes_the_call(layout, keys, options):
    options = {**options, "layout": layout, "return_lse": True}
    inputs = tensors(keys=keys, batch=1 if layout == "TND" else 2)
    inputs = [to_layout(t, layout).detach() for t in inputs]
    found = flash_attention(*inputs, **options)
    expected = flash_attention(*inputs, **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("_flex_attention_with_gradients")
def test_what_may_be_skipped_is_computed_once():
    inputs = [t.detach() for t in tensors()]
    for _ in range(2):
        flash_attention(*inputs, layout="BNSD", causal=True, window=2)
        flash_attention(*inputs, layout="BNSD", causal=True, window=2, alibi_slopes=SLOPES)
    assert cuda._cached_block_mask.cache_info().misses == 1


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_is_given_the_right_mask_where_weights_are_dropped(monkeypatch, lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    monkeypatch.setattr(cuda, "_kernel_for", lambda *_: cuda._sdpa)
    assert_matches(
        lambda q, k, v: flash_attention(q, k, v, layout="BNSD", **options),
        output_of(options),
        tensors(*LENGTHS[lengths], value_width=6),
    )


def test_packed_sequences_may_drop_weights():
    torch.manual_seed(0)
    inputs = [to_layout(t, "TND") for t in tensors(batch=1)]
    out = flash_attention(*inputs, layout="TND", **PACKED, dropout_p=0.5)
    plain = flash_attention(*inputs, layout="TND", **PACKED, backend="reference")
    assert out.shape == plain.shape
    assert not torch.equal(out, plain)
    torch.autograd.grad(out.sum(), inputs)


def test_dropout_with_sinks_is_refused():
    with pytest.raises(BackendUnavailableError, match="flash_attention: dropout_p: no kernel"):
        flash_attention(*tensors(), layout="BNSD", dropout_p=0.5, sinks=torch.ones(4))


def test_without_triton_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda _: None)
    cuda.compiled.cache_clear()
    with pytest.raises(BackendUnavailableError, match="needs the package triton on CUDA"):
        cuda.compiled(flex.flex_attention)


# flash-attn.


def visible(queries, keys, causal, window_size):
    """The alignment and the window of flash-attn's documentation."""
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        seen &= key >= position - left
    if right >= 0 or causal:
        seen &= key <= position + (0 if causal else right)
    return seen


def flash_attn_func(
    q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic,
    return_attn_probs=False,
):  # fmt: skip
    assert deterministic is False
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    queries, keys = q.shape[1], k.shape[1]
    query, key, value = (t.transpose(1, 2).float() for t in (q, k, v))
    key, value = (t.repeat_interleave(q.shape[2] // k.shape[2], 1) for t in (key, value))
    scores = query @ key.mT * softmax_scale
    if alibi_slopes is not None:
        position = torch.arange(keys - queries, keys)[:, None]
        scores = scores - alibi_slopes[:, None, None] * (position - torch.arange(keys)).abs()
    scores = scores.masked_fill(~visible(queries, keys, causal, window_size), float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.dropout(scores.softmax(-1), dropout_p, train=True)
    out = (weights @ value).transpose(1, 2).to(q.dtype)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    parts, (q_start, k_start) = [], next(ends)
    for q_end, k_end in ends:
        some = q[None, q_start:q_end], k[None, k_start:k_end], v[None, k_start:k_end]
        if q_end > q_start:
            parts.append(flash_attn_func(*some, **options)[0])
        q_start, k_start = q_end, k_end
    return torch.cat(parts)


@pytest.fixture
def flash_attn(monkeypatch):
    """Put the functions above in place of the package, and count their calls."""
    module, calls = ModuleType("flash_attn"), []
    for function in (flash_attn_func, flash_attn_varlen_func):

        def counted(*args, _function=function, **options):
            calls.append(_function.__name__)
            return _function(*args, **options)

        setattr(module, function.__name__, counted)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(cuda, "_has_flash_attn", lambda: True)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 3},
        {"causal": True, "return_lse": True},
        {"causal": True, "alibi_slopes": SLOPES},
        {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row"},
        {"return_lse": True, "scale": 0.2},
    ],
)
@pytest.mark.parametrize("lengths", ["square", "more keys"])
def test_flash_attn_is_used_for_what_it_covers(flash_attn, options, lengths):
    inputs = tensors(*LENGTHS[lengths], dtype=torch.bfloat16, value_width=3)

    def outputs(backend):
        def attend(*qkv):
            found = flash_attention(*qkv, layout="BNSD", backend=backend, **options)
            return found[0] if isinstance(found, tuple) else found

        return with_gradients(attend, inputs)

    assert_near(outputs(None), outputs("reference"))
    assert flash_attn == ["flash_attn_func"]
    if "return_lse" in options:
        _, lse = flash_attention(*inputs, layout="BNSD", **options)
        _, expected = flash_attention(*inputs, layout="BNSD", **options, backend="reference")
        torch.testing.assert_close(lse, expected)


def test_flash_attn_takes_megatrons_layout(flash_attn):
    inputs = [to_layout(t, "SBH") for t in tensors(dtype=torch.bfloat16)]
    options = {"layout": "SBH", "num_heads": 4, "causal": True, "window": 2}
    found = flash_attention(*inputs, **options)
    assert_near([found], [flash_attention(*inputs, **options, backend="reference")])
    assert flash_attn == ["flash_attn_func"]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 2}])
def test_flash_attn_takes_packed_sequences(flash_attn, options):
    ends = {"cu_seqlens_q": (0, 2, 2, 5), "cu_seqlens_k": (0, 2, 2, 5)}
    inputs = [to_layout(t, "TND") for t in tensors(batch=1, dtype=torch.float16)]
    options = {**options, **ends, "layout": "TND"}
    found = flash_attention(*inputs, **options)
    assert_near([found], [flash_attention(*inputs, **options, backend="reference")])
    assert flash_attn == ["flash_attn_varlen_func"]


@pytest.mark.usefixtures("_flex_attention_with_gradients")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({}, {"causal": True}),
        ({"dtype": torch.float32}, {"causal": True, "window": 2}),
        ({}, {"mask": torch.ones(5, 5).triu(1).bool()}),
        ({}, {"sinks": torch.ones(4)}),
        ({}, {"alibi_slopes": SLOPES}),
        ({}, {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row", "return_lse": True}),
        ({"keys": 3}, {"causal": True, "return_lse": True}),
        ({"width": 264}, {"causal": True, "window": 2}),
        ({"value_width": 264}, {"causal": True, "window": 2}),
    ],
)
def test_flash_attn_is_not_used_for_what_it_does_not_cover(flash_attn, sizes, options):
    inputs = [t.detach() for t in tensors(**{"dtype": torch.bfloat16, **sizes})]
    found = flash_attention(*inputs, layout="BNSD", **options)
    expected = flash_attention(*inputs, layout="BNSD", **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert not flash_attn


# The gradients of a part of the keys.


def test_torchs_flash_kernel_takes_the_backward_call():
    with FakeTensorMode():
        size = {"dtype": torch.bfloat16, "device": "cuda"}
        query, out, gradient = (torch.empty(16, 2, 8, 64, **size) for _ in range(3))
        key, value = (torch.empty(16, 2, 2, 64, **size) for _ in range(2))
        lse = torch.empty(2, 8, 16, device="cuda")
        given = (gradient, query, key, value, out, lse)
        found = flash_attention_backward(*given, layout="SBND", causal=True)
    assert [t.shape for t in found] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("layout", ["BNSD", "SBH"])
def test_other_gradients_are_those_of_the_formula(layout):
    inputs = [to_layout(t, layout).detach().requires_grad_() for t in tensors()]
    options = {"layout": layout, "causal": True}
    options |= {"num_heads": 4} if layout == "SBH" else {}
    out, lse = flash_attention(*inputs, **options, return_lse=True, backend="reference")
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out))
    known = (t.detach() for t in (*inputs, out, lse))
    assert_near(flash_attention_backward(torch.ones_like(out), *known, **options), expected)
