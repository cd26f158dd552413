"""The norms against their formulas in float64, torch and the modules of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, random, runs, with_gradients
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ml_kernels
from ml_kernels import norm as public
from ml_kernels.cpu import norm as cpu

EPS = 1e-5
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def _fast_version_for_small_inputs(monkeypatch):
    monkeypatch.setattr(cpu, "FEW", 1)


def rms_formula(unit_offset, eps=EPS):
    def formula(x, weight):
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * (weight + 1 if unit_offset else weight)

    return formula


def layer_formula(x, weight, bias=None):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    return scaled if bias is None else scaled + bias


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("rms_norm"))
def test_rms_norm_matches_its_formula(device, backend, dtype, unit_offset):
    inputs = [random(7, 2, 48, dtype=dtype, device=device)]
    inputs += [random(48, dtype=dtype, seed=1, device=device)]
    assert_matches(
        lambda x, w: ml_kernels.rms_norm(x, w, eps=EPS, unit_offset=unit_offset, backend=backend),
        rms_formula(unit_offset),
        inputs,
    )


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("add_rms_norm"))
def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum(device, backend, dtype, unit_offset):
    inputs = [random(7, 2, 48, dtype=dtype, seed=s, device=device) for s in (0, 1)]
    inputs += [random(48, dtype=dtype, seed=2, device=device)]

    def formula(x, residual, weight):
        # The sum is rounded to the dtype before it is normalised.
        total = x + residual
        total = total + (total.to(dtype).double() - total).detach()
        return rms_formula(unit_offset)(total, weight), total

    assert_matches(
        lambda *given: ml_kernels.add_rms_norm(
            *given, eps=EPS, unit_offset=unit_offset, backend=backend
        ),
        formula,
        inputs,
    )


@pytest.mark.parametrize(("device", "backend"), runs("add_rms_norm"))
def test_more_rows_than_a_gpu_takes_at_a_time(device, backend):
    inputs = [random(20000, 64, seed=s, device=device) for s in (0, 1)]
    inputs += [random(64, seed=2, device=device)]
    assert_matches(
        lambda *given: ml_kernels.add_rms_norm(*given, eps=EPS, backend=backend),
        lambda x, r, w: (rms_formula(False)(x + r, w), x + r),
        inputs,
    )


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_add_rms_norm_has_the_gradients_of_one_output_alone(backend, used):
    inputs = [random(5, 48), random(5, 48, seed=1), random(48, seed=2)]
    assert_matches(
        lambda *given: ml_kernels.add_rms_norm(*given, eps=EPS, backend=backend)[used],
        lambda x, r, w: (rms_formula(False)(x + r, w), x + r)[used],
        inputs,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), runs("layer_norm"))
def test_layer_norm_matches_its_formula(device, backend, dtype, bias):
    inputs = [random(5, 2, 48, dtype=dtype, device=device)]
    inputs += [random(48, dtype=dtype, seed=s, device=device) for s in (1, 2)[: 1 + bias]]
    assert_matches(
        lambda *given: ml_kernels.layer_norm(*given, eps=EPS, backend=backend),
        layer_formula,
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("module", "unit_offset"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)], ids=["llama", "gemma"]
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rms_norm_rounds_where_transformers_does(backend, module, unit_offset, dtype):
    hugging_face = module(64, eps=EPS).to(dtype)
    with torch.no_grad():
        hugging_face.weight.copy_(random(64, seed=1))
    x = random(200, 64, dtype=dtype)
    found = ml_kernels.rms_norm(
        x, hugging_face.weight, eps=EPS, unit_offset=unit_offset, backend=backend
    )
    expected = hugging_face(x)
    # The order of a float32 sum moves a number over a rounding edge now and then; a rounding in
    # another place would move half of them.
    different = (found != expected).float().mean()
    assert different <= (0.0 if backend == "reference" else 0.005 if dtype != torch.float32 else 1)
    assert_near(
        with_gradients(
            lambda x, w: ml_kernels.rms_norm(
                x, w, eps=EPS, unit_offset=unit_offset, backend=backend
            ),
            [x, hugging_face.weight],
        ),
        with_gradients(lambda x, _: hugging_face(x), [x, hugging_face.weight]),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_passes_gradcheck(backend, unit_offset):
    x, weight = random(3, 2, 6, dtype=torch.float64), random(6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, w: ml_kernels.rms_norm(x, w, eps=EPS, unit_offset=unit_offset, backend=backend),
        (x, weight),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_add_rms_norm_passes_gradcheck(backend, unit_offset):
    inputs = [random(3, 2, 6, dtype=torch.float64, seed=s) for s in (0, 1)]
    inputs += [random(6, dtype=torch.float64, seed=2)]
    assert torch.autograd.gradcheck(
        lambda *given: ml_kernels.add_rms_norm(
            *given, eps=EPS, unit_offset=unit_offset, backend=backend
        ),
        inputs,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layer_norm_passes_gradcheck(backend):
    inputs = [random(3, 2, 6, dtype=torch.float64)]
    inputs += [random(6, dtype=torch.float64, seed=s) for s in (1, 2)]
    assert torch.autograd.gradcheck(
        lambda *given: ml_kernels.layer_norm(*given, eps=EPS, backend=backend), inputs
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    width=st.integers(1, 70),
    step=st.integers(1, 2),
    chunk=st.integers(1, 300),
    unit_offset=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_fast_rms_norm_agrees_for_every_shape_stride_and_chunk(
    shape, width, step, chunk, unit_offset, dtype
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        x = random(*shape, width * step, dtype=dtype)[..., ::step]
        residual = random(width * step, *shape, dtype=dtype, seed=1).movedim(0, -1)[..., ::step]
        weight = random(width * step, dtype=dtype, seed=2)[::step]
        assert_near(
            with_gradients(lambda *a: cpu.rms_norm(*a, EPS, unit_offset), [x, weight]),
            with_gradients(lambda *a: public.rms_norm_reference(*a, EPS, unit_offset), [x, weight]),
        )
        assert_near(
            with_gradients(
                lambda *a: cpu.add_rms_norm(*a, EPS, unit_offset), [x, residual, weight]
            ),
            with_gradients(
                lambda *a: public.add_rms_norm_reference(*a, EPS, unit_offset),
                [x, residual, weight],
            ),
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_upstream_gradient_with_strides_is_accepted(backend):
    x, weight = random(6, 4, 48), random(48, seed=1)
    upstream = random(48, 4, 6, seed=2).detach().permute(2, 1, 0)
    out = ml_kernels.rms_norm(x, weight, eps=EPS, backend=backend)
    found = torch.autograd.grad(out, [x, weight], upstream)
    expected = torch.autograd.grad(rms_formula(False)(x, weight), [x, weight], upstream)
    assert_near(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_result_may_be_changed_in_place(backend):
    x, residual, weight = random(6, 48), random(6, 48, seed=1), random(48, seed=2)
    normed, _ = ml_kernels.add_rms_norm(x, residual, weight, eps=EPS, backend=backend)
    changed = [normed, ml_kernels.rms_norm(x, weight, eps=EPS, backend=backend)]
    (of_x,) = torch.autograd.grad([out.mul_(2).sum() for out in changed], x)
    once = rms_formula(False)(x, weight).sum() + rms_formula(False)(x + residual, weight).sum()
    assert_near([of_x], torch.autograd.grad(2 * once, x))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_sum_of_frozen_inputs_is_no_part_of_a_graph(backend):
    x, residual, weight = random(200, 128).detach(), random(200, 128).detach(), random(128)
    out, total = ml_kernels.add_rms_norm(x, residual, weight, eps=EPS, backend=backend)
    assert out.requires_grad
    assert not total.requires_grad
    out.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_frozen_inputs_get_no_gradient(backend):
    x, weight = random(6, 48), random(48, seed=1)
    out = ml_kernels.rms_norm(x.detach(), weight, eps=EPS, backend=backend)
    (of_weight,) = torch.autograd.grad(out.sum(), weight)
    out = ml_kernels.rms_norm(x, weight.detach(), eps=EPS, backend=backend)
    (of_x,) = torch.autograd.grad(out.sum(), x)
    both = torch.autograd.grad(rms_formula(False)(x, weight).sum(), [x, weight])
    assert_near([of_x, of_weight], both)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("device", "backend"), runs("rms_norm"))
def test_a_float32_weight_is_accepted_beside_half_precision(device, backend, dtype, unit_offset):
    x, weight = random(6, 48, dtype=dtype, device=device), random(48, seed=1, device=device)
    out, of_x, of_weight = with_gradients(
        lambda x, w: ml_kernels.rms_norm(x, w, eps=EPS, unit_offset=unit_offset, backend=backend),
        [x, weight],
    )
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (dtype, dtype, torch.float32)
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    expected = with_gradients(rms_formula(unit_offset), wide)
    assert_near([out, of_x, of_weight], expected, dtype)


@pytest.mark.parametrize(("device", "backend"), runs("layer_norm"))
def test_layer_norm_accepts_float32_weights_beside_half_precision(device, backend):
    x = random(6, 48, dtype=torch.bfloat16, device=device)
    vectors = [random(48, seed=s, device=device) for s in (1, 2)]
    found = with_gradients(
        lambda *given: ml_kernels.layer_norm(*given, eps=EPS, backend=backend), [x, *vectors]
    )
    assert [t.dtype for t in found[1:]] == [torch.bfloat16, torch.float32, torch.float32]
    wide = [t.detach().cpu().double().requires_grad_() for t in (x, *vectors)]
    assert_near(found, with_gradients(layer_formula, wide), torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layer_norm_is_torchs(backend):
    x, weight, bias = random(5, 48), random(48, seed=1), random(48, seed=2)
    torch.testing.assert_close(
        ml_kernels.layer_norm(x, weight, bias, eps=EPS, backend=backend),
        F.layer_norm(x, (48,), weight, bias, EPS),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_of_zeros_stays_zero_and_has_finite_gradients(backend):
    x, weight = torch.zeros(3, 48, requires_grad=True), torch.ones(48, requires_grad=True)
    out, of_x, of_weight = with_gradients(
        lambda x, w: ml_kernels.rms_norm(x, w, eps=EPS, backend=backend), [x, weight]
    )
    assert not out.any()
    assert of_x.isfinite().all()
    assert not of_weight.any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_squares_beyond_the_range_of_float16_are_no_trouble(backend):
    x = torch.full((2, 64), 6e4, dtype=torch.float16)
    out = ml_kernels.rms_norm(x, torch.ones(64, dtype=torch.float16), eps=EPS, backend=backend)
    assert (out == 1).all()


@pytest.mark.parametrize("function", [ml_kernels.rms_norm, ml_kernels.layer_norm])
@pytest.mark.parametrize(
    ("x", "weight", "eps", "error", "message"),
    [
        (torch.ones(2, 8), torch.ones(4), EPS, ValueError, r"weight \(4,\): must be \(8,\)"),
        (torch.ones(2, 8), torch.ones(1, 8), EPS, ValueError, r"weight \(1, 8\): must be \(8,\)"),
        (torch.ones(()), torch.ones(1), EPS, ValueError, r"x \(\): must have at least one"),
        (torch.ones(2, 8), torch.ones(8), -1.0, ValueError, r"eps -1.0: must be at least 0"),
        (torch.ones(2, 8).int(), torch.ones(8), EPS, TypeError, "x is torch.int32: must be float"),
        ([1.0], torch.ones(8), EPS, TypeError, "x is a list: must be a tensor"),
        (torch.ones(2, 8), None, EPS, TypeError, "weight is a NoneType: must be a tensor"),
        (
            torch.ones(2, 8),
            torch.ones(8).half(),
            EPS,
            TypeError,
            "weight is torch.float16: must be torch.float32",
        ),
        (torch.ones(2, 8), torch.ones(8).to("meta"), EPS, ValueError, "weight is on meta: must be"),
    ],
)
def test_what_does_not_fit_is_refused(function, x, weight, eps, error, message):
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(x, weight, eps=eps)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.ones(8), ValueError, r"residual \(8,\): must have the shape of x \(2, 8\)"),
        (torch.ones(2, 8).half(), TypeError, "residual is torch.float16: must be torch.float32"),
        (torch.ones(2, 8).to("meta"), ValueError, "residual is on meta: must be on cpu"),
    ],
)
def test_add_rms_norm_refuses_a_residual_unlike_x(residual, error, message):
    with pytest.raises(error, match=f"add_rms_norm: {message}"):
        ml_kernels.add_rms_norm(torch.ones(2, 8), residual, torch.ones(8), eps=EPS)


def test_layer_norm_refuses_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"layer_norm: bias \(4,\): must be \(8,\)"):
        ml_kernels.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(4), eps=EPS)
