"""Activations on an NPU: gated ones by torch_npu's operators, the plain one by torch's."""

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
from torch.nn import functional as F

import ml_kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@semantics("npu_swiglu")
def swiglu(input, dim):
    first, second = input.float().chunk(2, dim)
    return (first * torch.sigmoid(first) * second).to(input.dtype)


@semantics("npu_swiglu_backward")
def swiglu_backward(grad_output, input, dim):
    return vjp(lambda x: swiglu(x, dim), [input], [grad_output])[0]


@semantics("npu_geglu")
def geglu(input, dim, approximate, activate_left):
    """As CANN documents aclnnGeGluV3: the right half is activated unless `activate_left`."""
    first, second = input.float().chunk(2, dim)
    activated, other = (first, second) if activate_left else (second, first)
    activated = F.gelu(activated, approximate=("none", "tanh")[approximate])
    return (activated * other).to(input.dtype), activated.to(input.dtype)


@semantics("npu_geglu_grad")
def geglu_grad(grad_output, input, gelu, dim, approximate, activate_left):
    activated = geglu(input, dim, approximate, activate_left)[1]
    torch.testing.assert_close(gelu, activated, rtol=0, atol=0)
    return vjp(lambda x: geglu(x, dim, approximate, activate_left)[0], [input], [grad_output])[0]


def inputs(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*s, generator=generator).to(dtype) for s in (shape, shape[-1:]))
    return x, bias


def calls():
    """Return the operators by name, each called as `f(x, bias, backend=...)`."""
    return {
        "swiglu": ml_kernels.swiglu,
        "geglu tanh": lambda *given, backend: ml_kernels.geglu(*given, backend=backend),
        "geglu none": lambda *given, backend: ml_kernels.geglu(
            *given, approximate="none", backend=backend
        ),
        "gelu": ml_kernels.gelu,
        "gelu tanh": lambda *given, backend: ml_kernels.gelu(
            *given, approximate="tanh", backend=backend
        ),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", calls())
def test_activations_agree_with_the_reference(name, dtype):
    closeness = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    x, bias = inputs(3, 2, 32, dtype=dtype)
    assert_like_reference(calls()[name], x, **closeness)
    assert_like_reference(calls()[name], x, bias, **closeness)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("name", calls())
def test_one_dimension_and_no_rows_are_accepted(name, shape):
    assert_like_reference(calls()[name], *inputs(*shape))


@pytest.mark.parametrize("name", calls())
def test_a_transposed_input_is_accepted(name):
    assert_like_reference(calls()[name], inputs(3, 4, 8)[0].transpose(0, 1))


def swapped(call):
    return {"input": torch.cat(call["input"].chunk(2, call["dim"])[::-1], call["dim"])}


@pytest.mark.parametrize(
    ("name", "operator", "change"),
    [
        ("swiglu", "npu_swiglu", swapped),
        ("swiglu", "npu_swiglu", lambda call: {"input": -call["input"]}),
        ("swiglu", "npu_swiglu_backward", swapped),
        ("geglu tanh", "npu_geglu", swapped),
        ("geglu tanh", "npu_geglu", lambda call: {"activate_left": False}),
        ("geglu tanh", "npu_geglu", lambda call: {"approximate": 0}),
        ("geglu none", "npu_geglu", lambda call: {"approximate": 1}),
        ("geglu tanh", "npu_geglu_grad", lambda call: {"activate_left": False}),
        ("geglu tanh", "npu_geglu_grad", lambda call: {"gelu": call["gelu"] + 1}),
        ("gelu", "aten::gelu", lambda call: {"approximate": "tanh"}),
    ],
)
def test_a_wrong_call_is_noticed(name, operator, change):
    x, _ = inputs(6, 4, 8)
    with mutated(operator, change), pytest.raises(AssertionError):
        assert_like_reference(calls()[name], 3 * x, rtol=0, atol=1e-5)


def test_the_real_schema_and_derivative_of_swiglu_accept_the_call():
    with fake_npu(), recorded_calls() as made:
        x = fake(3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        bias = fake(64, dtype=torch.bfloat16, requires_grad=True)
        out = ml_kernels.swiglu(x, bias)
        out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == ((3, 2, 32), torch.bfloat16, "npu")
    assert (x.grad.shape, bias.grad.shape) == (x.shape, bias.shape)
    assert [operator for operator, _ in made] == ["npu_swiglu", "npu_swiglu_backward"]


def test_the_real_schema_of_geglu_accepts_the_call():
    with fake_npu():
        x = fake(3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        out = ml_kernels.geglu(x)
        assert (out.shape, out.dtype, out.device.type) == ((3, 2, 32), torch.bfloat16, "npu")
        # The derivative itself is run by the comparison above. When this no longer raises,
        # torch_npu's description of it is mended, and the note in ml_kernels.npu.geglu can go.
        with pytest.raises(RuntimeError, match="Unable to cast"):
            out.sum().backward()


@pytest.mark.parametrize("operator", ["gelu.out", "gelu_backward"])
def test_torch_npu_implements_torchs_gelu(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "PrivateUse1")


def test_float64_is_refused():
    x = simulated(torch.ones(2, 4).double())
    for operator in (ml_kernels.swiglu, ml_kernels.geglu):
        with pytest.raises(
            ml_kernels.BackendUnavailableError, match=r"x torch\.float64: on an NPU"
        ):
            operator(x)
