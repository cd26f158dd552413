"""Scaled masked softmax through torch_npu's operator."""

from __future__ import annotations

import pytest
import torch
from npu_simulator import (
    assert_like_reference,
    fake,
    fake_npu,
    mutated,
    recorded_calls,
    semantics,
    simulated,
)

import ml_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@semantics("npu_scaled_masked_softmax")
def scaled_masked_softmax(x, mask, scale, fixed_triu_mask):
    """As the kernel of CANN does it: hidden scores become -10000."""
    assert not fixed_triu_mask
    assert mask.dtype == torch.bool
    assert mask.shape[-2:] == x.shape[-2:]
    assert all(32 <= size <= 4096 and size % 32 == 0 for size in x.shape[-2:])
    assert all(m in (1, size) for m, size in zip(mask.shape[:2], x.shape, strict=False))
    return (x.float() * scale).masked_fill(mask, -10000.0).softmax(-1).to(x.dtype)


@semantics("npu_scaled_masked_softmax_backward")
def scaled_masked_softmax_backward(y_grad, y, mask, scale, fixed_triu_mask):
    """As CANN documents aclnnScaledMaskedSoftmaxBackward."""
    assert not fixed_triu_mask
    product = y_grad.float() * y.float()
    of_x = (product - product.sum(-1, keepdim=True) * y.float()) * scale
    return of_x.masked_fill(mask, 0).to(y.dtype)


def scores(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def compare(x, mask, scale=0.5, **closeness):
    def call(x, *mask, backend):
        return ml_kernels.scaled_masked_softmax(x, *mask or (None,), scale=scale, backend=backend)

    assert_like_reference(call, x, *(() if mask is None else (mask,)), **closeness)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_agrees_with_the_reference(dtype):
    closeness = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    x = scores(2, 3, 32, 64, dtype=dtype)
    compare(x, None, **closeness)
    compare(x, causal(32, 64), **closeness)


@pytest.mark.parametrize(
    "shape", [(), (1, 64), (64,), (32, 1), (2, 1, 1, 64), (3, 32, 64), (2, 3, 32, 64)]
)
def test_masks_of_any_broadcastable_shape_agree_with_the_reference(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    compare(scores(2, 3, 32, 64), mask)


def test_rows_whose_keys_are_all_hidden_are_zero():
    mask = causal(64, 32)  # the first 32 queries see no key
    compare(scores(1, 2, 64, 32), mask)
    out = ml_kernels.scaled_masked_softmax(simulated(scores(1, 2, 64, 32)), simulated(mask)).cpu()
    assert not out[:, :, :32].any()
    assert out[:, :, 32:].sum(-1).allclose(torch.ones(1))


def test_empty_and_transposed_inputs_are_accepted():
    compare(scores(0, 3, 32, 32), causal(32, 32))
    compare(scores(2, 32, 3, 32).transpose(1, 2), causal(32, 32))


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_scaled_masked_softmax", lambda call: {"scale": 1.0}),
        ("npu_scaled_masked_softmax", lambda call: {"mask": torch.zeros_like(call["mask"])}),
        ("npu_scaled_masked_softmax", lambda call: {"mask": ~call["mask"]}),
        ("npu_scaled_masked_softmax_backward", lambda call: {"scale": 1.0}),
        ("npu_scaled_masked_softmax_backward", lambda call: {"y": call["y_grad"]}),
    ],
)
def test_a_wrong_call_is_noticed(operator, change):
    with mutated(operator, change), pytest.raises(AssertionError):
        compare(scores(1, 2, 32, 32), causal(32, 32))


def test_the_real_schema_and_derivative_accept_the_call():
    with fake_npu(), recorded_calls() as calls:
        x = fake(2, 3, 32, 64, dtype=torch.float16, requires_grad=True)
        mask = torch.zeros(2, 1, 1, 64, dtype=torch.bool, device="npu")
        out = ml_kernels.scaled_masked_softmax(x, mask, scale=0.25)
        out.sum().backward()
    for result in (out, x.grad):
        assert (result.shape, result.dtype) == (x.shape, torch.float16)
        assert result.device.type == "npu"
    assert calls[0][1]["mask"].shape == (2, 1, 32, 64)
    assert calls[0][1]["scale"] == calls[1][1]["scale"] == 0.25


@pytest.mark.parametrize("shape", [(1, 1, 31, 32), (1, 1, 32, 48), (1, 1, 32, 4128)])
def test_lengths_outside_the_documented_limits_are_refused(shape):
    with pytest.raises(ml_kernels.BackendUnavailableError, match="multiples of 32 up to 4096"):
        compare(scores(*shape), None)


def test_lengths_outside_them_go_through_torch_where_no_backend_is_named():
    mask = causal(5, 7)

    def call(x, backend):
        on_npu = backend == "npu"
        return ml_kernels.scaled_masked_softmax(
            x, simulated(mask) if on_npu else mask, scale=0.5, backend=None if on_npu else backend
        )

    with recorded_calls() as calls:
        assert_like_reference(call, scores(2, 3, 5, 7))
    assert calls == []


def test_float64_is_refused():
    with pytest.raises(ml_kernels.BackendUnavailableError, match=r"x torch\.float64"):
        compare(scores(1, 1, 32, 32).double(), None)
