"""The activations against their formulas in float64 and torch's functions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, random, runs, with_gradients
from torch.nn import functional as F

import ml_kernels
from ml_kernels import activation as public
from ml_kernels.cpu import activation as cpu

DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def _fast_version_for_small_inputs(monkeypatch):
    monkeypatch.setattr(cpu, "_FEW", 1)


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x, approximate):
    if approximate == "tanh":
        return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def gated(function):
    """Return the formula of a gated activation: the gate is the first half."""

    def formula(x, bias=None):
        x = x if bias is None else x + bias
        half = x.shape[-1] // 2
        return function(x[..., :half]) * x[..., half:]

    return formula


def given_inputs(width, dtype, device, bias, *shape):
    biases = [random(width, dtype=dtype, seed=1, device=device)] if bias else []
    return [random(*shape, width, dtype=dtype, device=device), *biases]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("swiglu"))
def test_swiglu_takes_the_gate_from_the_first_half(device, backend, dtype, bias):
    assert_matches(
        lambda *given: ml_kernels.swiglu(*given, backend=backend),
        gated(silu),
        given_inputs(48, dtype, device, bias, 6, 2),
    )


@pytest.mark.parametrize(("device", "backend"), runs("swiglu"))
def test_a_bias_sums_more_rows_than_a_gpu_takes_at_a_time(device, backend):
    assert_matches(
        lambda *given: ml_kernels.swiglu(*given, backend=backend),
        gated(silu),
        given_inputs(48, torch.float32, device, True, 100000),
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("geglu"))
def test_geglu_takes_the_gate_from_the_first_half(device, backend, dtype, bias, approximate):
    assert_matches(
        lambda *given: ml_kernels.geglu(*given, approximate=approximate, backend=backend),
        gated(lambda x: gelu(x, approximate)),
        given_inputs(48, dtype, device, bias, 6, 2),
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("gelu"))
def test_gelu_matches_its_formula(device, backend, dtype, bias, approximate):
    assert_matches(
        lambda *given: ml_kernels.gelu(*given, approximate=approximate, backend=backend),
        lambda x, bias=0: gelu(x + bias, approximate),
        given_inputs(24, dtype, device, bias, 6, 2),
    )


def test_the_defaults_are_those_of_the_models_that_use_them():
    x = random(4, 16)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(ml_kernels.geglu(x), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(ml_kernels.gelu(x), F.gelu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_swiglu_rounds_as_hugging_face_does(backend, dtype):
    x = random(50, 128, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(ml_kernels.swiglu(x, backend=backend), F.silu(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        (ml_kernels.swiglu, {}),
        (ml_kernels.geglu, {"approximate": "tanh"}),
        (ml_kernels.geglu, {"approximate": "none"}),
        (ml_kernels.gelu, {"approximate": "tanh"}),
        (ml_kernels.gelu, {"approximate": "none"}),
    ],
)
def test_gradcheck_passes(function, options, backend, bias):
    assert torch.autograd.gradcheck(
        lambda *given: function(*given, **options, backend=backend),
        given_inputs(6, torch.float64, "cpu", bias, 2, 3),
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    width=st.integers(1, 40),
    step=st.integers(1, 2),
    chunk=st.integers(1, 200),
    bias=st.booleans(),
    function=st.sampled_from(["silu", "tanh", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_fast_versions_agree_for_every_shape_stride_and_chunk(
    shape, width, step, chunk, bias, function, dtype
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        x = random(2 * width * step, *shape, dtype=dtype).movedim(0, -1)[..., ::step]
        inputs = [x, random(2 * width, seed=1, dtype=dtype)] if bias else [x]
        options = () if function == "silu" else (function,)
        fast = cpu.geglu if options else cpu.swiglu
        slow = public.geglu_reference if options else public.swiglu_reference

        def call(version):
            return lambda x, bias=None: version(x, bias, *options)

        assert_near(with_gradients(call(fast), inputs), with_gradients(call(slow), inputs))


def test_the_gradient_of_a_bias_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 64)  # 16 rows
    x, bias = random(500, 16, dtype=torch.bfloat16), random(16, seed=1)
    ml_kernels.swiglu(x, bias, backend="cpu").sum().backward()
    torch.testing.assert_close(bias.grad.double(), x.grad.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_upstream_gradient_with_strides_is_accepted(backend):
    x = random(6, 4, 48)
    upstream = random(24, 4, 6, seed=2).detach().permute(2, 1, 0)
    (found,) = torch.autograd.grad(ml_kernels.swiglu(x, backend=backend), x, upstream)
    (expected,) = torch.autograd.grad(gated(silu)(x), x, upstream)
    assert_near([found], [expected])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_result_may_be_changed_in_place(backend):
    x = random(6, 48)
    out = ml_kernels.swiglu(x, backend=backend)
    (found,) = torch.autograd.grad(out.mul_(2).sum(), x)
    assert_near([found], torch.autograd.grad(2 * gated(silu)(x).sum(), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "backend"), runs("swiglu"))
def test_a_float32_bias_is_accepted_beside_half_precision(device, backend, dtype):
    x, bias = random(6, 48, dtype=dtype, device=device), random(48, seed=1, device=device)
    found = with_gradients(lambda *given: ml_kernels.swiglu(*given, backend=backend), [x, bias])
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, bias)]
    assert_near(found, with_gradients(gated(silu), wide), dtype)


@pytest.mark.parametrize("function", [ml_kernels.swiglu, ml_kernels.geglu, ml_kernels.gelu])
@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.ones(2, 8), torch.ones(4), ValueError, r"bias \(4,\): must be \(8,\)"),
        (torch.ones(2, 8), torch.ones(8).half(), TypeError, "bias is torch.float16: must be"),
        (torch.ones(2, 8), torch.ones(8).to("meta"), ValueError, "bias is on meta: must be on cpu"),
        (torch.ones(2, 8).long(), None, TypeError, "x is torch.int64: must be floating point"),
        ("x", None, TypeError, "x is a str: must be a tensor"),
    ],
)
def test_what_does_not_fit_is_refused(function, x, bias, error, message):
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(x, bias)


@pytest.mark.parametrize("function", [ml_kernels.swiglu, ml_kernels.geglu])
@pytest.mark.parametrize("shape", [(2, 7), ()])
def test_gate_and_up_must_be_equally_wide(function, shape):
    with pytest.raises(ValueError, match=r"x .*: the last dimension must be even, \[gate, up\]"):
        function(torch.ones(shape))


@pytest.mark.parametrize("function", [ml_kernels.geglu, ml_kernels.gelu])
def test_an_unknown_approximation_is_refused(function):
    with pytest.raises(ValueError, match="approximate 'erf': must be 'tanh' or 'none'"):
        function(torch.ones(2, 8), approximate="erf")
