"""flash_attention on an NPU: the calls of torch_npu that it makes, and what comes of them."""

from __future__ import annotations

import math

import attention_semantics  # noqa: F401 - registers what the operators compute
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from npu_simulator import fake, fake_npu, mutated, recorded_calls, simulated, to_cpu

from ml_kernels import BackendUnavailableError, flash_attention, flash_attention_backward
from ml_kernels.npu import attention as npu

FORWARD, BACKWARD = "npu_fusion_attention", "npu_fusion_attention_grad"
LAYOUTS = ("SBND", "SBH", "BSH", "BSND", "BNSD")


def shaped(layout, batch, length, heads, width):
    sizes = {"B": batch, "S": length, "N": heads, "D": width, "H": heads * width, "T": length}
    return tuple(sizes[letter] for letter in layout)


def inputs(layout, *, batch=2, queries=9, keys=9, heads=4, groups=2, width=8, value_width=8):
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, heads, width), (keys, groups, width), (keys, groups, value_width)]
    sizes.append((queries, heads, value_width))  # the gradient of the output
    return [
        torch.randn(shaped(layout, batch, *size), generator=generator, dtype=torch.float32)
        for size in sizes
    ]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def moved(options):
    return {k: simulated(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def attend(tensors, gradient, options, sinks):
    """Return the output, the log-sum-exp if asked for, and the gradients."""
    leaves = [*tensors, sinks] if sinks is not None else list(tensors)
    options = options if sinks is None else {**options, "sinks": sinks}
    result = flash_attention(*tensors, **options)
    out, *lse = result if isinstance(result, tuple) else (result,)
    return out, *lse, *torch.autograd.grad(out, leaves, gradient)


def compare(layout, sizes=None, sinks=None, tolerance=2e-5, **options):
    """Assert that the simulated NPU gives the numbers and the gradients of the reference."""
    options = {"layout": layout, **options}
    if layout in ("SBH", "BSH"):
        options["num_heads"] = 4
    *tensors, gradient = inputs(layout, **(sizes or {}))
    on_cpu = [t.clone().requires_grad_() for t in tensors]
    cpu_sinks = None if sinks is None else sinks.clone().requires_grad_()
    expected = attend(on_cpu, gradient, {**options, "backend": "reference"}, cpu_sinks)
    on_npu = [simulated(t, requires_grad=True) for t in tensors]
    npu_sinks = None if sinks is None else simulated(sinks, requires_grad=True)
    found = attend(on_npu, simulated(gradient), moved(options), npu_sinks)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device.type == "npu"
        torch.testing.assert_close(to_cpu(mine), theirs.detach(), rtol=tolerance, atol=tolerance)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LENGTHS = {"square": {}, "more keys": {"queries": 4}, "more queries": {"keys": 4}}
SEEN = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "log-sum-exp": {"causal": True, "return_lse": True},
    "slopes": {"causal": True, "alibi_slopes": SLOPES},
    "slopes of rows": {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row"},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_the_reference_in_every_layout(layout, lengths, seen):
    compare(layout, LENGTHS[lengths], **SEEN[seen])


@pytest.mark.parametrize("form", ["row", "square"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_log_sum_exp_has_the_bias_of_its_form(causal, form):
    biased = {"alibi_slopes": SLOPES, "alibi_form": form, "return_lse": True}
    compare("BNSD", {"queries": 4}, causal=causal, **biased)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shape", [(9, 9), (1, 9), (2, 1, 1, 9), (4, 1, 1), (2, 4, 9, 9)])
def test_masks_of_every_shape_are_expanded_and_combined(shape, window):
    mask = random(*shape) < 0
    compare("BSND", mask=mask, causal=window is not None, window=window, return_lse=True)
    compare("SBH", mask=mask)


@pytest.mark.parametrize("widths", [{"value_width": 4}, {"value_width": 12}])
@pytest.mark.parametrize("layout", ["SBND", "BSND", "BNSD"])
def test_values_may_be_narrower_or_wider_than_keys(layout, widths):
    compare(layout, widths, causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinks_take_part_in_the_softmax(layout):
    compare(layout, sinks=random(4), causal=True)
    compare(layout, sinks=random(4), causal=True, alibi_slopes=SLOPES)


ENDS = {"cu_seqlens_q": (0, 2, 2, 9), "cu_seqlens_k": (0, 3, 5, 9)}


@pytest.mark.parametrize("seen", SEEN)
def test_packed_sequences_attend_to_themselves(seen):
    compare("TND", sinks=None, **ENDS, **SEEN[seen])
    compare("TND", {"value_width": 4}, **ENDS, **SEEN[seen])


def test_packed_sequences_take_sinks_and_a_log_sum_exp_for_queries_without_keys():
    compare("TND", sinks=random(4), causal=True, **ENDS)
    compare("TND", **ENDS, return_lse=True)
    blind = {"cu_seqlens_q": (0, 5, 9), "cu_seqlens_k": (0, 3, 9)}
    compare("TND", **blind, causal=True, return_lse=True)


def test_long_triangles_get_the_last_rows_of_their_biases():
    small = {"queries": 1100, "keys": 1100, "batch": 1, "width": 2, "value_width": 2}
    with recorded_calls() as calls:
        compare("BNSD", small, causal=True, alibi_slopes=SLOPES)
    assert calls[0][1]["pse"].shape == (1, 4, 1024, 1100)


def test_dropped_weights_are_dropped_in_the_gradients_too():
    query, key, _, _ = inputs("BNSD", queries=64, keys=64)
    value = torch.eye(64).expand(2, 2, 64, 64).contiguous()
    leaves = [simulated(t, requires_grad=True) for t in (query, key, value)]
    # With the values a unit matrix the output is the matrix of weights.
    weights = flash_attention(*leaves, layout="BNSD", dropout_p=0.25)
    plain = flash_attention(query, key, value, layout="BNSD", backend="reference")
    kept = to_cpu(weights) != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(to_cpu(weights)[kept], (plain / 0.75)[kept], rtol=1e-5, atol=1e-6)
    (of_value,) = torch.autograd.grad(weights, leaves[2], simulated(torch.ones(plain.shape)))
    expected = to_cpu(weights).sum(2).unflatten(1, (2, 2)).sum(2)  # of every key
    torch.testing.assert_close(to_cpu(of_value), expected[..., None].expand(-1, -1, -1, 64))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_lengths_and_any_window_agree_with_the_reference(data):
    lengths = st.integers(1, 12)
    sizes = {"queries": data.draw(lengths), "keys": data.draw(lengths), "width": 2}
    window = data.draw(st.none() | lengths)
    sizes["value_width"] = sizes["width"]
    compare(data.draw(st.sampled_from(LAYOUTS)), sizes, causal=True, window=window, return_lse=True)


# What is called, with which arguments.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"sparse_mode": 0, "atten_mask": None}),
        ({"causal": True}, {"sparse_mode": 3}),
        ({"causal": True, "window": 3}, {"sparse_mode": 4, "pre_tockens": 2, "next_tockens": 0}),
        ({"causal": True, "window": 9}, {"sparse_mode": 3}),
    ],
)
def test_each_kind_of_visibility_has_its_sparse_mode(options, expected):
    *tensors, _ = (simulated(t) for t in inputs("SBND"))
    with recorded_calls() as calls:
        flash_attention(*tensors, layout="SBND", **options)
        flash_attention(*tensors, layout="SBND", **options)
    (name, first), (_, second) = calls
    assert name == FORWARD
    assert {key: first[key] for key in expected} == expected
    assert (first["head_num"], first["input_layout"], first["scale"]) == (
        4,
        "SBH",
        1 / math.sqrt(8),
    )
    assert first["atten_mask"] is second["atten_mask"], "the compressed mask is made once"


def test_the_layout_of_the_caller_is_not_copied():
    query, key, value, _ = (simulated(t) for t in inputs("SBND"))
    with recorded_calls() as calls:
        flash_attention(query, key, value, layout="SBND")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        taken = to_cpu(calls[0][1][name])
        assert taken.data_ptr() == to_cpu(tensor).data_ptr()
        assert taken.shape == (9, 2, tensor.shape[2] * 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [*LAYOUTS, "TND"])
def test_the_real_schema_accepts_every_layout_and_dtype(layout, dtype):
    with fake_npu(), recorded_calls() as calls:
        q, k, v = (
            fake(*shaped(layout, 2, length, heads, 64), dtype=dtype, requires_grad=True)
            for length, heads in ((16, 8), (24, 2), (24, 2))
        )
        options = {"num_heads": 8} if layout in ("SBH", "BSH") else {}
        if layout == "TND":
            options = {"cu_seqlens_q": (0, 4, 16), "cu_seqlens_k": (0, 8, 24)}
        out, lse = flash_attention(q, k, v, layout=layout, causal=True, return_lse=True, **options)
        out.sum().backward()
    assert [name for name, _ in calls] == [FORWARD, BACKWARD]
    assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
    assert (lse.shape, lse.dtype) == ((16, 8) if layout == "TND" else (2, 8, 16), torch.float32)
    assert not lse.requires_grad
    for tensor in (q, k, v):
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)


def test_the_real_schema_accepts_masks_biases_sinks_and_dropout():
    with fake_npu(), recorded_calls() as calls:
        q, k, v = (
            fake(2, 8, 16, 64, dtype=torch.bfloat16, requires_grad=True),
            fake(2, 2, 16, 64, dtype=torch.bfloat16, requires_grad=True),
            fake(2, 2, 16, 48, dtype=torch.bfloat16, requires_grad=True),
        )
        sinks = fake(8, requires_grad=True)
        mask = torch.empty(2, 1, 1, 16, dtype=torch.bool, device="npu")
        slopes = fake(8)
        options = {"mask": mask, "alibi_slopes": slopes, "sinks": sinks, "dropout_p": 0.5}
        out = flash_attention(q, k, v, layout="BNSD", **options)
        out.sum().backward()
    assert [name for name, _ in calls] == [FORWARD, BACKWARD]
    arguments = calls[0][1]
    assert (arguments["atten_mask"].shape, arguments["sparse_mode"]) == ((2, 1, 16, 16), 1)
    assert (arguments["pse"].shape, arguments["pse"].dtype) == ((1, 8, 16, 16), torch.bfloat16)
    assert arguments["keep_prob"] == 0.5
    assert out.shape == (2, 8, 16, 48)
    assert (sinks.grad.shape, sinks.grad.dtype) == ((8,), torch.float32)


# Wrong calls, each of which torch_npu accepts, are noticed by the comparison.


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda a: {"pre_tockens": a["pre_tockens"] + 1}, {"causal": True, "window": 3}),
        (lambda a: {"next_tockens": 1}, {"causal": True, "window": 3}),
        (lambda a: {"sparse_mode": 3}, {"causal": True, "window": 3}),
        (lambda a: {"atten_mask": None}, {"causal": True}),
        (lambda a: {"atten_mask": None}, {"mask": random(9) < 0}),
        (lambda a: {"atten_mask": ~a["atten_mask"]}, {"mask": random(9) < 0}),
        (lambda a: {"atten_mask": a["atten_mask"][:512, :512]}, {"causal": True}),
        (lambda a: {"scale": 1.0}, {"causal": True}),
        (lambda a: {"sparse_mode": 2}, {"causal": True}),
        (lambda a: {"pse": a["pse"] * a["scale"]}, {"causal": True, "alibi_slopes": SLOPES}),
        (lambda a: {"pse": None}, {"causal": True, "alibi_slopes": SLOPES}),
        (lambda a: {"head_num": 2}, {"causal": True}),
    ],
)
@pytest.mark.parametrize("layout", ["SBH", "BNSD"])
def test_a_wrong_argument_fails_the_comparison(layout, change, options):
    sizes = {} if "mask" in options else {"queries": 4}
    compare(layout, sizes, **options)
    with mutated(FORWARD, change), pytest.raises(AssertionError):
        compare(layout, sizes, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"actual_seq_qlen": [0, *a["actual_seq_qlen"]]},
        lambda a: {"actual_seq_kvlen": [3, 4, 9]},
        lambda a: {"softmax_layout": ""},
    ],
)
def test_wrong_ends_of_sequences_fail_the_comparison(change):
    with mutated(FORWARD, change), pytest.raises(AssertionError):
        compare("TND", **ENDS, return_lse=True)


@pytest.mark.parametrize(
    ("change", "sinks"),
    [
        (lambda a: {"sink": a["sink"] + 1}, random(4)),
        (lambda a: {"keep_prob": 0.5}, None),
    ],
)
def test_a_wrong_sink_or_dropout_fails_the_comparison(change, sinks):
    with mutated(FORWARD, change), pytest.raises(AssertionError):
        compare("BNSD", sinks=sinks)


# Ring attention.


def compare_halves(layout, **options):
    """Assert that the gradients of the keys, in two halves, are those of all of them."""
    query, key, value, gradient = inputs(layout)
    axis = layout.index("S")
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    both = {"layout": layout, **({"num_heads": 4} if layout == "SBH" else {})}
    out, lse = flash_attention(*leaves, **both, **options, return_lse=True, backend="reference")
    mask = options.get("mask")
    halves = []
    for part in (slice(0, 5), slice(5, 9)):
        index = (slice(None),) * axis + (part,)
        some = {"mask": simulated(mask[..., part].contiguous())} if mask is not None else {}
        given = (gradient, query, key[index].contiguous(), value[index].contiguous(), out, lse)
        halves.append(flash_attention_backward(*map(simulated, given), **both, **some))
    queries, keys, values = ([to_cpu(t) for t in half] for half in zip(*halves, strict=True))
    found = (sum(queries), torch.cat(keys, axis), torch.cat(values, axis))
    expected = torch.autograd.grad(out, leaves, gradient)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["SBND", "SBH", "BNSD"])
def test_the_gradients_of_parts_of_the_keys_are_those_of_all(layout, masked):
    mask = random(9, 9) < 0
    mask[3, :5] = mask[4, 5:] = mask[5] = True  # rows without a key in one half, or in both
    compare_halves(layout, **({"mask": mask} if masked else {}))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"softmax_max": a["softmax_max"] + 0.1},
        lambda a: {"softmax_sum": 2 * a["softmax_sum"]},
        lambda a: {"attention_in": torch.zeros_like(a["attention_in"])},
        lambda a: {"scale_value": 1.0},
    ],
)
def test_wrong_statistics_fail_the_comparison_of_parts(change):
    with mutated(BACKWARD, change), pytest.raises(AssertionError):
        compare_halves("BNSD")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("layout", ["SBND", "BSH", "TND"])
def test_one_part_may_be_causal_and_packed(layout, lengths):
    sizes = LENGTHS[lengths]
    query, key, value, gradient = inputs(layout, **sizes)
    options = {"layout": layout, "causal": True, **({"num_heads": 4} if layout == "BSH" else {})}
    if layout == "TND":
        ends = {"cu_seqlens_q": (0, 2, query.shape[0]), "cu_seqlens_k": (0, 3, key.shape[0])}
        options |= ends
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = flash_attention(*leaves, **options, return_lse=True, backend="reference")
    expected = torch.autograd.grad(out, leaves, gradient)
    given = map(simulated, (gradient, query, key, value, out, lse))
    found = flash_attention_backward(*given, **options)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(to_cpu(mine), theirs, rtol=2e-5, atol=2e-5)


def test_the_real_schema_accepts_the_backward_call():
    with fake_npu(), recorded_calls() as calls:
        q, out, gradient = (fake(16, 2, 8, 64, dtype=torch.bfloat16) for _ in range(3))
        k, v = (fake(16, 2, 2, 64, dtype=torch.bfloat16) for _ in range(2))
        given = (gradient, q, k, v, out, fake(2, 8, 16))
        found = flash_attention_backward(*given, layout="SBND", causal=True)
    assert [name for name, _ in calls] == [BACKWARD]
    assert [t.shape for t in found] == [q.shape, k.shape, v.shape]
    assert {t.dtype for t in found} == {torch.bfloat16}


# What the kernel does not do.


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"heads": 512}, {}, "query has 512 heads: the kernel takes 256 at most on an NPU"),
        ({"width": 776, "value_width": 776}, {}, "the kernel takes 768 at most"),
        (
            {},
            {"sinks": random(4), "alibi_slopes": SLOPES, "alibi_form": "row"},
            "alibi_form 'row'",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_said(sizes, options, message):
    *tensors, _ = (simulated(t) for t in inputs("BNSD", queries=2, keys=2, **sizes))
    with pytest.raises(BackendUnavailableError, match=message):
        flash_attention(*tensors, layout="BNSD", **moved(options))


def test_more_sequences_than_the_kernel_takes_are_refused():
    tensors = [simulated(torch.zeros(1025, 2, 8)) for _ in range(3)]
    ends = {"cu_seqlens_q": tuple(range(1026)), "cu_seqlens_k": tuple(range(1026))}
    with pytest.raises(BackendUnavailableError, match=r"q has 1025 sequences: .* 1024 at"):
        flash_attention(*tensors, layout="TND", **ends)


def test_more_tokens_than_the_kernel_takes_are_refused():
    query = simulated(torch.zeros(1, 1, 1, 8))
    key = simulated(torch.zeros(1, (1 << 20) + 1, 1, 8))
    with pytest.raises(BackendUnavailableError, match="1048577 tokens: the kernel takes 2"):
        flash_attention(query, key, key, layout="BSND")


def test_float64_is_refused():
    tensors = [simulated(t.double()) for t in inputs("BNSD")[:3]]
    with pytest.raises(BackendUnavailableError, match=r"query is torch.float64"):
        flash_attention(*tensors, layout="BNSD")


def test_nothing_to_attend_to_needs_no_kernel():
    query, key, value, _ = (simulated(t, requires_grad=True) for t in inputs("BNSD", batch=0))
    with recorded_calls() as calls:
        out = flash_attention(query, key, value, layout="BNSD")
        out.sum().backward()
    assert not calls
    assert out.shape == query.grad.shape == (0, 4, 9, 8)


def test_the_mask_of_one_call_serves_any_later_one(monkeypatch):
    monkeypatch.setattr(npu, "_triangles", {})

    def train(*tensors):
        leaves = [t.requires_grad_() for t in tensors]
        out = flash_attention(*leaves, layout="BNSD", causal=True)
        out.sum().backward()
        return out

    shapes = [(1, 2, 9, 8)] * 3
    with fake_npu():
        train(*(fake(*shape) for shape in shapes))
    with torch.inference_mode():
        flash_attention(*(simulated(random(*s)) for s in shapes), layout="BNSD", causal=True)
    out = train(*(simulated(random(*shape)) for shape in shapes))
    assert to_cpu(out).isfinite().all()
    kept = npu._triangles[out.device]
    with fake_npu():
        train(*(fake(*shape) for shape in shapes))
    assert npu._triangles == {out.device: kept}
