"""What the CUDA version hands to torch's kernels and to flash-attn, on a machine without a GPU.

Flex attention runs unfused on a CPU, without gradients; for those, and in place of flash-attn, are
functions written from their documentation.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_formula import (
    COMPILES_FLEX,
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

COMPILED = cuda.compiled  # not the stand-in of the tests below

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, *, scale):
    """What torch's kernel computes, and what it takes for granted."""
    check_flash(query, key, value)
    assert dropout_p == 0.0
    assert not is_causal or query.shape[2] == key.shape[2]
    options = {"layout": "BNSD", "causal": is_causal, "scale": scale}
    return *flash_attention(query, key, value, **options, return_lse=True, backend="reference"), 0


def flash_attention_backward_of_torch(
    gradient, query, key, value, out, lse, ends_q, ends_k, queries, keys, dropout_p, is_causal,
    state, unused, *, scale,
):  # fmt: skip
    check_flash(*(t.transpose(1, 2) for t in (query, key, value, gradient, out)))
    assert (ends_q, ends_k, dropout_p, state.shape, unused.shape) == (None, None, 0.0, (2,), ())
    assert (queries, keys) == (query.shape[1], key.shape[1])
    assert lse.dtype == torch.float32
    flat = torch.as_strided(lse, lse.shape, torch.empty(lse.shape).stride())  # strides unseen
    known = (gradient, query, key, value, out, flat)
    options = {"layout": "BSND", "causal": is_causal, "scale": scale}
    return flash_attention_backward(*known, **options, backend="reference")


def check_flash(query, *others):
    for x in (query, *others):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.stride(-1) == 1
        assert x.shape[-1] == query.shape[-1] <= 256
        assert x.shape[-1] % 8 == 0


TORCHS_FLASH = {
    "_scaled_dot_product_flash_attention": scaled_dot_product_flash_attention,
    "_flash_attention_backward": flash_attention_backward_of_torch,
}


@pytest.fixture(autouse=True)
def _the_cuda_version_for_tensors_on_the_cpu(monkeypatch):
    for operator in ("flash_attention", "flash_attention_backward"):
        monkeypatch.setitem(IMPLEMENTATIONS, (operator, "cpu"), IMPLEMENTATIONS[operator, "cuda"])
    monkeypatch.setattr(cuda, "compiled", lambda function: function)
    monkeypatch.setattr(cuda, "_has_flash_attn", lambda: False)
    monkeypatch.setattr(cuda, "_is_ampere", lambda _: True)
    monkeypatch.setattr(cuda, "_ATEN", SimpleNamespace(**TORCHS_FLASH))


def documented_flex_attention(
    query, key, value, score_mod, block_mask, scale, enable_gqa, return_aux=None
):
    """What flex attention's documentation says, with gradients."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    if query.requires_grad:
        assert not any(x.is_inference() for x in saved_for_backward(score_mod, block_mask))
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


def saved_for_backward(score_mod, block_mask):
    """Give what flex attention saves besides its inputs, which must not be inference tensors."""
    if score_mod is not None:
        yield from (cell.cell_contents for cell in score_mod.__closure__)
    if block_mask is not None:
        yield from (block_mask.kv_num_blocks, block_mask.kv_indices)


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
def test_what_may_be_skipped_is_computed_once(monkeypatch):
    inputs = [t.detach() for t in tensors(23, 23)]  # sizes of no other test
    create, made = flex.create_block_mask, []

    def counted(*arguments, **options):
        made.append(create(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(flex, "create_block_mask", counted)
    for _ in range(2):
        flash_attention(*inputs, layout="BNSD", causal=True, window=2)
        flash_attention(*inputs, layout="BNSD", causal=True, window=2, alibi_slopes=SLOPES)
    assert len(made) == 1


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


@COMPILES_FLEX
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("SBND", {"causal": True}),
        ("BNSD", {"causal": True, "window": 2, "alibi_slopes": SLOPES}),
        ("BNSD", {"mask": random(2, 4, 5, 5).detach() < 0.2}),
        ("TND", {"causal": True, **PACKED}),
    ],
)
def test_it_is_a_part_of_the_graph_of_a_model_that_is_compiled(monkeypatch, layout, options):
    monkeypatch.setattr(cuda, "compiled", COMPILED)
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    inputs = [to_layout(t, layout) for t in tensors(batch=1 if layout == "TND" else 2)]
    inputs = [t.detach() for t in inputs]

    def model(query, key, value):
        return flash_attention(query * 2, key, value, layout=layout, **options)

    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
    doubled = (inputs[0] * 2, *inputs[1:])
    assert_near([found], [flash_attention(*doubled, layout=layout, **options, backend="reference")])


def test_dropout_with_sinks_is_refused():
    with pytest.raises(BackendUnavailableError, match="flash_attention: dropout_p: no kernel"):
        flash_attention(*tensors(), layout="BNSD", dropout_p=0.5, sinks=torch.ones(4))


def test_without_triton_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "has_triton", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs the package triton on CUDA"):
        cuda.compiled(flex.flex_attention)


# What is kept from call to call.


@pytest.mark.usefixtures("_flex_attention_with_gradients")
@pytest.mark.parametrize("first", [torch.inference_mode, FakeTensorMode])
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_training_works_after_inference_and_after_fake_tensors(layout, first):
    size = 31 if first is FakeTensorMode else 29  # sizes of no other test
    inputs = [to_layout(t, layout) for t in tensors(size, size, batch=1)]
    options = {"layout": layout, "causal": True, "window": 2, "alibi_slopes": SLOPES}
    if layout == "TND":
        options |= {"cu_seqlens_q": (0, 9, size), "cu_seqlens_k": (0, 9, size)}
    *shown, slopes = (t.detach() for t in (*inputs, SLOPES))
    with first() as mode:
        if mode is not None:
            *shown, slopes = (mode.from_tensor(t) for t in (*shown, slopes))
        flash_attention(*shown, **{**options, "alibi_slopes": slopes})

    def outputs(backend):
        return with_gradients(
            lambda *qkv: flash_attention(*qkv, **options, backend=backend), inputs
        )

    assert_near(outputs(None), outputs("reference"))


def test_where_tokens_stand_does_not_depend_on_the_default_device():
    pattern = cuda.Pattern(5, 5, True, None, (0, 2, 5), (0, 1, 5), torch.device("cpu"))
    with torch.device("meta"):
        query, key, *sequences = cuda.places_of(pattern)
    assert query.tolist() == [-1, 0, 1, 2, 3]
    assert key.tolist() == [0, 0, 1, 2, 3]
    assert [of.tolist() for of in sequences] == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]


# Torch's own flash kernel.


def refuse(*_):
    raise AssertionError("a fused kernel has this")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.2}, {"keys": 1}])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_gives_the_log_sum_exp_of_what_it_covers(monkeypatch, options, transposed):
    monkeypatch.setattr(cuda, "_flex", refuse)
    keys = options.get("keys", 5)
    options = {key: value for key, value in options.items() if key != "keys"}
    sizes = {"keys": keys, "width": 8, "value_width": 8, "dtype": torch.bfloat16}
    inputs = tensors(**sizes)
    if transposed:
        inputs = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    options = {**options, "layout": "BNSD", "return_lse": True}

    def outputs(backend):
        def attend(*qkv):
            return flash_attention(*qkv, **options, backend=backend)[0]

        return with_gradients(attend, inputs)

    assert_near(outputs(None), outputs("reference"))
    _, lse = flash_attention(*inputs, **options)
    torch.testing.assert_close(lse, flash_attention(*inputs, **options, backend="reference")[1])


@pytest.mark.parametrize("hopper", [False, True])
def test_torch_takes_the_call_for_the_log_sum_exp_and_has_its_gradient(monkeypatch, hopper):
    monkeypatch.setattr(cuda, "_ATEN", torch.ops.aten)
    monkeypatch.setattr(cuda, "_is_hopper", lambda _: hopper)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda _: True)
    on_cuda = IMPLEMENTATIONS["flash_attention", "cuda"]
    monkeypatch.setitem(IMPLEMENTATIONS, ("flash_attention", "meta"), on_cuda)
    size = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    query = torch.empty(16, 2, 8, 64, **size)
    key, value = (torch.empty(16, 2, 2, 64, **size) for _ in range(2))
    options = {"layout": "SBND", "causal": True, "return_lse": True}
    out, lse = flash_attention(query, key, value, **options)
    found = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert out.shape == query.shape
    assert (lse.shape, lse.dtype, lse.requires_grad) == ((2, 8, 16), torch.float32, False)
    assert [t.shape for t in found] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize(
    ("dtype", "width", "grouped"),
    [(torch.float32, 8, False), (torch.float16, 8, True), (torch.bfloat16, 264, False)],
)
def test_keys_are_repeated_where_no_fused_kernel_has_groups(monkeypatch, dtype, width, grouped):
    attend, given = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query, key, value, **options):
        given.append((key.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(cuda.F, "scaled_dot_product_attention", seen)
    inputs = tensors(dtype=dtype, width=width, value_width=width)
    found = flash_attention(*inputs, layout="BNSD", causal=True)
    assert_near(
        [found], [flash_attention(*inputs, layout="BNSD", causal=True, backend="reference")]
    )
    assert given == [(2, True) if grouped else (4, False)]


@pytest.mark.parametrize("layout", ["BNSD", "SBH"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_step_of_decoding_looks_at_its_window_only(monkeypatch, layout, return_lse):
    monkeypatch.setattr(cuda, "_flex", refuse)
    sizes = {"width": 8, "value_width": 8, "dtype": torch.float16}
    inputs = [to_layout(t, layout) for t in tensors(1, 9, **sizes)]
    options = {"layout": layout, "causal": True, "window": 3, "return_lse": return_lse}
    options |= {"num_heads": 4} if layout == "SBH" else {}
    found = flash_attention(*inputs, **options)
    expected = flash_attention(*inputs, **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)


# flash-attn.


def test_a_broken_flash_attn_is_reported_and_not_used(monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: at')\n")
    monkeypatch.syspath_prepend(tmp_path)
    cuda._flash_attn_works.cache_clear()
    with pytest.warns(UserWarning, match="flash_attn is installed, and broken: undefined symbol"):
        assert not cuda._has_flash_attn()
    assert not cuda._has_flash_attn()  # tried once
    cuda._flash_attn_works.cache_clear()


def test_without_flash_attn_nothing_is_reported(monkeypatch):
    if find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is here")
    monkeypatch.undo()
    cuda._flash_attn_works.cache_clear()
    assert not cuda._has_flash_attn()


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


# The log-sum-exp on Hopper.


def scaled_dot_product_cudnn_attention(
    query, key, value, bias, compute_lse, dropout_p, is_causal, return_debug_mask, *, scale
):
    assert (bias, compute_lse, dropout_p, return_debug_mask) == (None, True, 0.0, False)
    options = {"layout": "BNSD", "causal": is_causal, "scale": scale, "return_lse": True}
    out, lse = flash_attention(query, key, value, **options, backend="reference")
    return out, lse[..., None], None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("layout", "groups"), [("BNSD", 4), ("BSND", 2)])
@pytest.mark.parametrize("covered", [True, False])
def test_on_hopper_cudnn_gives_the_log_sum_exp_where_it_can(
    monkeypatch, causal, layout, groups, covered
):
    asked, called = [], []

    def cudnn(*args, **options):
        called.append(options)
        return scaled_dot_product_cudnn_attention(*args, **options)

    monkeypatch.setattr(cuda._ATEN, "_scaled_dot_product_cudnn_attention", cudnn, raising=False)
    monkeypatch.setattr(cuda, "_is_hopper", lambda _: True)
    monkeypatch.setattr(
        torch.backends.cuda, "can_use_cudnn_attention", lambda p: asked.append(p) or covered
    )
    size = {"width": 8, "value_width": 8, "dtype": torch.bfloat16, "groups": groups}
    inputs = [to_layout(t, layout) for t in tensors(**size)]
    options = {"layout": layout, "causal": causal, "scale": 0.3, "return_lse": True}
    found = flash_attention(*inputs, **options)
    assert_near(found, flash_attention(*inputs, **options, backend="reference"))
    assert len(called) == covered
    (params,) = asked
    assert (params.is_causal, params.enable_gqa, params.dropout) == (causal, groups != 4, 0.0)


# The gradients of a part of the keys.


def test_torchs_flash_kernel_takes_the_backward_call(monkeypatch):
    monkeypatch.setattr(cuda, "_ATEN", torch.ops.aten)
    with FakeTensorMode():
        size = {"dtype": torch.bfloat16, "device": "cuda"}
        query, out, gradient = (torch.empty(16, 2, 8, 64, **size) for _ in range(3))
        key, value = (torch.empty(16, 2, 2, 64, **size) for _ in range(2))
        lse = torch.empty(2, 8, 16, device="cuda")
        given = (gradient, query, key, value, out, lse)
        found = flash_attention_backward(*given, layout="SBND", causal=True)
    assert [t.shape for t in found] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_flash_kernel_is_given_rows_that_it_can_read(causal):
    size = {"width": 8, "value_width": 8, "dtype": torch.bfloat16}
    inputs = [t.detach().mT.contiguous().mT for t in tensors(**size)]
    options = {"layout": "BNSD", "causal": causal}
    reference = {**options, "backend": "reference"}
    out, lse = flash_attention(*inputs, **reference, return_lse=True)
    gradient = random(*out.shape, seed=9, dtype=torch.bfloat16).detach()
    expected = flash_attention_backward(gradient, *inputs, out, lse, **reference)
    sliced = torch.stack((lse, lse + 1), dim=-1)[..., 0]
    found = flash_attention_backward(gradient, *inputs, out, sliced, **options)
    assert_near(found, expected)


@pytest.mark.parametrize("layout", ["BNSD", "SBH"])
def test_other_gradients_are_those_of_the_formula(layout):
    inputs = [to_layout(t, layout).detach().requires_grad_() for t in tensors()]
    options = {"layout": layout, "causal": True}
    options |= {"num_heads": 4} if layout == "SBH" else {}
    out, lse = flash_attention(*inputs, **options, return_lse=True, backend="reference")
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out))
    known = (t.detach() for t in (*inputs, out, lse))
    assert_near(flash_attention_backward(torch.ones_like(out), *known, **options), expected)


@pytest.mark.parametrize("options", [{}, {"mask": torch.eye(5).bool()}, {"dropout_p": 0.1}])
def test_sdpa_keeps_float32_under_autocast(options):
    inputs = [t.detach() for t in tensors()]

    def attend():
        torch.manual_seed(0)
        return flash_attention(*inputs, layout="BNSD", **options)

    expected = attend()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
