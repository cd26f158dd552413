"""RMS norms through torch_npu's operators."""

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
    vjp,
)

import ml_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-2  # large beside a mean square of 1, so that a lost one shows


@semantics("npu_rms_norm")
def rms_norm(input, gamma, epsilon):
    assert gamma.dtype in (input.dtype, torch.float32)
    inverse = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * inverse * gamma.float()).to(input.dtype), inverse


@semantics("npu_rms_norm_backward")
def rms_norm_backward(dy, input, gamma, rstd):
    """As CANN documents aclnnRmsNormGrad."""
    assert dy.dtype == input.dtype
    assert gamma.dtype in (input.dtype, torch.float32)
    normalised = input.float() * rstd
    scaled = dy.float() * gamma.float()
    of_input = (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)) * rstd
    of_gamma = (dy.float() * normalised).flatten(0, -2).sum(0)
    return of_input.to(input.dtype), of_gamma


@semantics("npu_add_rms_norm")
def add_rms_norm(x1, x2, gamma, epsilon):
    assert gamma.dtype == x1.dtype == x2.dtype
    total = x1 + x2
    normed, inverse = rms_norm(total, gamma, epsilon)
    return normed, inverse, total


def inputs(count, *shape, dtype=torch.float32, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]
    weight = torch.randn(shape[-1], generator=generator) / 2 + 1
    return [*made, weight.to(weight_dtype or dtype)]


def norm(unit_offset):
    def call(x, weight, backend):
        return ml_kernels.rms_norm(x, weight, eps=EPS, unit_offset=unit_offset, backend=backend)

    return call


def add_norm(unit_offset):
    def call(x, residual, weight, backend):
        return ml_kernels.add_rms_norm(
            x, residual, weight, eps=EPS, unit_offset=unit_offset, backend=backend
        )

    return call


def test_the_simulated_backward_kernel_is_the_derivative():
    x, weight = inputs(1, 5, 16)
    upstream = torch.randn(5, 16)
    expected = vjp(lambda x, w: rms_norm(x, w, EPS)[0], [x, weight], [upstream])
    found = rms_norm_backward(upstream, x, weight, rms_norm(x, weight, EPS)[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_add_rms_norm_agree_with_the_reference(dtype, weight_dtype, unit_offset):
    closeness = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    dtypes = {"dtype": dtype, "weight_dtype": weight_dtype}
    assert_like_reference(norm(unit_offset), *inputs(1, 3, 2, 32, **dtypes), **closeness)
    assert_like_reference(add_norm(unit_offset), *inputs(2, 3, 2, 32, **dtypes), **closeness)


def test_the_unit_offset_is_added_in_float32():
    # In bfloat16 1 + 2^-9 is 1; Gemma's product has it.
    x, _ = inputs(1, 4, 64, dtype=torch.bfloat16)
    weight = torch.full((64,), 2.0**-9, dtype=torch.bfloat16)
    out = ml_kernels.rms_norm(simulated(x), simulated(weight), eps=EPS, unit_offset=True)
    expected = ml_kernels.rms_norm(x, weight, eps=EPS, unit_offset=True, backend="reference")
    assert torch.equal(out.cpu(), expected)
    rounded = ml_kernels.rms_norm(x, 1 + weight, eps=EPS, backend="reference")
    assert not torch.equal(out.cpu(), rounded)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 2, 2, 16)])
def test_any_number_of_dimensions_and_no_rows_are_accepted(shape):
    with recorded_calls() as calls:
        assert_like_reference(norm(False), *inputs(1, *shape))
        assert_like_reference(add_norm(False), *inputs(2, *shape))
    assert bool(calls) == (0 not in shape)  # the documents say that kernels take no empty tensor


def test_a_transposed_input_is_accepted():
    x, residual, weight = inputs(2, 3, 4, 16)
    assert_like_reference(norm(False), x.transpose(0, 1), weight)
    assert_like_reference(add_norm(True), x.transpose(0, 1), residual.transpose(0, 1), weight)


def test_a_gradient_of_one_result_only_reaches_both_inputs():
    def first_only(*given, backend):
        return add_norm(False)(*given, backend=backend)[0]

    assert_like_reference(first_only, *inputs(2, 3, 16))
    x, residual, weight = (simulated(t, requires_grad=True) for t in inputs(2, 3, 16))
    total = ml_kernels.add_rms_norm(x, residual, weight, eps=EPS)[1]
    total.sum().backward()
    assert x.grad.cpu().eq(1).all()
    assert residual.grad.cpu().eq(1).all()
    assert weight.grad is None


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_rms_norm", lambda call: {"epsilon": 1e-6}),
        ("npu_rms_norm", lambda call: {"gamma": call["gamma"] + 1}),
        ("npu_rms_norm_backward", lambda call: {"rstd": call["rstd"] ** 2}),
        ("npu_rms_norm_backward", lambda call: {"gamma": torch.ones_like(call["gamma"])}),
    ],
)
def test_a_wrong_call_of_rms_norm_is_noticed(operator, change):
    with mutated(operator, change), pytest.raises(AssertionError):
        assert_like_reference(norm(False), *inputs(1, 3, 16))


@pytest.mark.parametrize(
    ("operator", "change"),
    [
        ("npu_add_rms_norm", lambda call: {"epsilon": 1e-6}),
        ("npu_add_rms_norm", lambda call: {"x2": torch.zeros_like(call["x2"])}),
        ("npu_rms_norm_backward", lambda call: {"input": call["dy"]}),
        ("npu_rms_norm_backward", lambda call: {"rstd": torch.ones_like(call["rstd"])}),
    ],
)
def test_a_wrong_call_of_add_rms_norm_is_noticed(operator, change):
    with mutated(operator, change), pytest.raises(AssertionError):
        assert_like_reference(add_norm(False), *inputs(2, 3, 16))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_real_schemas_and_derivatives_accept_the_calls(unit_offset, weight_dtype):
    with fake_npu(), recorded_calls() as calls:
        x, residual = (fake(5, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = fake(64, dtype=weight_dtype, requires_grad=True)
        normed, total = ml_kernels.add_rms_norm(
            x, residual, weight, eps=EPS, unit_offset=unit_offset
        )
        out = ml_kernels.rms_norm(normed + total, weight, eps=EPS, unit_offset=unit_offset)
        out.sum().backward()
    for result in (normed, total, out, x.grad, residual.grad):
        assert (result.shape, result.dtype) == ((5, 2, 64), torch.bfloat16)
        assert result.device.type == "npu"
    assert (weight.grad.shape, weight.grad.dtype) == ((64,), weight_dtype)
    fused = weight_dtype == torch.bfloat16 and not unit_offset
    assert calls[0][0] == ("npu_add_rms_norm" if fused else "npu_rms_norm")
    assert calls[0][1]["epsilon"] == EPS


def test_float64_is_refused():
    x, weight = (simulated(t.double()) for t in inputs(1, 3, 16))
    with pytest.raises(ml_kernels.BackendUnavailableError, match=r"rms_norm: x torch\.float64"):
        ml_kernels.rms_norm(x, weight, eps=EPS)
    with pytest.raises(ml_kernels.BackendUnavailableError, match="use backend='reference'"):
        ml_kernels.add_rms_norm(x, x, weight, eps=EPS)


@pytest.mark.parametrize("operator", ["native_layer_norm", "native_layer_norm_backward"])
def test_torch_npu_implements_torchs_layer_norm(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "PrivateUse1")


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layer_norm_agrees_with_the_reference(dtype, weight_dtype):
    def call(x, weight, *bias, backend):
        return ml_kernels.layer_norm(x, weight, *bias, eps=EPS, backend=backend)

    closeness = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    x, weight = inputs(1, 3, 2, 32, dtype=dtype, weight_dtype=weight_dtype)
    assert_like_reference(call, x, weight, **closeness)
    assert_like_reference(call, x, weight, weight.flip(0), **closeness)
    assert_like_reference(call, x.transpose(0, 1), weight, **closeness)
    change = {"eps": 1e-6}
    with mutated("aten::native_layer_norm", lambda _: change), pytest.raises(AssertionError):
        assert_like_reference(call, x / 10, weight, **closeness)
