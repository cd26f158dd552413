"""The linear layer against its formula in float64 and torch's function."""

from __future__ import annotations

import pytest
import torch
from oracle import ROUNDING, assert_matches, assert_near, kept_by, random, runs, with_gradients
from torch.nn import functional as F

import ml_kernels
from ml_kernels.cpu import linear as cpu


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def _either_library(request, monkeypatch):
    """Every processor can run both; which is the faster one is a matter of its name."""
    monkeypatch.setattr(cpu, "_FEW", 1)
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: request.param)


@pytest.mark.usefixtures("_either_library")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("device", "backend"), runs("linear"))
def test_linear_matches_its_formula(device, backend, dtype, bias):
    inputs = [random(5, 2, 24, dtype=dtype, device=device)]
    inputs += [random(16, 24, dtype=dtype, seed=1, device=device)]
    inputs += [random(16, dtype=dtype, seed=2, device=device)] if bias else []
    assert_matches(
        lambda *given: ml_kernels.linear(*given, backend=backend),
        lambda x, weight, *more: torch.einsum("...i,oi->...o", x, weight) + sum(more),
        inputs,
    )


@pytest.mark.usefixtures("_either_library")
@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 24), (3, 0, 24), (7, 24)])
def test_any_number_of_tokens_is_right(shape):
    inputs = [random(*shape), random(16, 24, seed=1), random(16, seed=2)]
    assert_near(with_gradients(ml_kernels.linear, inputs), with_gradients(F.linear, inputs))


@pytest.mark.usefixtures("_either_library")
def test_strided_inputs_are_right():
    x, weight = random(24, 6, seed=1).detach().T, random(48, 32, seed=2).detach()[::3, 4:28]
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    assert_near(with_gradients(ml_kernels.linear, inputs), with_gradients(F.linear, inputs))


def test_a_frozen_weight_gets_no_gradient(monkeypatch):
    monkeypatch.setattr(cpu, "_FEW", 1)
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: True)
    products = []
    product = cpu._product
    monkeypatch.setattr(cpu, "_product", lambda a, b: products.append(1) or product(a, b))
    x, weight = random(4, 24), random(16, 24, seed=1).detach()
    ml_kernels.linear(x, weight).sum().backward()
    assert len(products) == 2  # forward, and the gradient of x
    assert_near([x.grad], [weight.sum(0).expand(4, 24)])


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_only_a_frozen_input_needs_is_not_kept(frozen, monkeypatch):
    monkeypatch.setattr(cpu, "_FEW", 1)
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: True)
    inputs = [random(4, 24), random(16, 24, seed=1)]
    inputs[frozen].requires_grad_(False)
    assert kept_by(ml_kernels.linear, *inputs) == [inputs[frozen].data_ptr()]


def test_autocast_is_followed_as_torch_does():
    inputs = [random(4, 24), random(16, 24, seed=1), random(16, seed=2)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ml_kernels.linear(*inputs), F.linear(*inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_near([found], [expected])


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # by switching it
def test_onednn_is_not_used_where_it_is_switched_off(monkeypatch):
    monkeypatch.setattr(cpu, "_FEW", 1)
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(cpu, "_product", lambda _a, _b: pytest.fail("switched off"))
    with torch.backends.mkldnn.flags(enabled=False):
        ml_kernels.linear(random(4, 24), random(16, 24))


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(cpu, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(cpu, "_product", lambda _a, _b: pytest.fail("too small for it"))
    ml_kernels.linear(random(4, 24), random(16, 24))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((random(4, 24), random(16, 23)), ValueError, r"weight \(16, 23\): must be \(outputs, in"),
        ((random(4, 24), random(24)), ValueError, r"weight \(24,\): must be \(outputs, inputs\)"),
        ((random(4, 24), random(16, 24), random(24)), ValueError, r"bias \(24,\): must be \(16,\)"),
        ((random(4, 24), random(16, 24).half()), TypeError, "weight is torch.float16: must be"),
        (
            (torch.ones(4, 24).int(), random(16, 24)),
            TypeError,
            "x is torch.int32: must be floating",
        ),
        ((random(4, 24), random(16, 24).to("meta")), ValueError, "weight is on meta: must be on"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"linear: {message}"):
        ml_kernels.linear(*arguments)
