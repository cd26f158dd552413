"""Derivatives written by hand refuse to be differentiated: never a silent zero."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from operator_calls import calls
from oracle import random

import ml_kernels

TWICE = {
    "layer_norm",
    "gelu",
    "scaled_masked_softmax",
    "topk_gating",
}
"""What is plain torch on a CPU, and so differentiable as often as asked."""


def penalty(call, inputs):
    """Return the square of the gradients of the sum of the first output."""
    out = call(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    gradients = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)


@pytest.mark.parametrize("name", [name for name in calls() if name not in TWICE])
def test_a_second_derivative_is_refused_and_never_zero(name):
    inputs, call = calls()[name]
    refused = r"differentiable once|derivative for .* is not implemented"
    with pytest.raises(RuntimeError, match=refused):
        penalty(call, inputs).backward()


def test_a_hessian_is_refused_and_not_zero():
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(
            lambda x: ml_kernels.cross_entropy(x[None], torch.tensor([0]))[0], torch.zeros(2)
        )


def test_the_reference_has_second_derivatives():
    x, target = random(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2])
    loss = partial(ml_kernels.cross_entropy, target=target, backend="reference")
    assert torch.autograd.gradgradcheck(loss, [x])


def test_the_reference_takes_the_transforms_of_torch_func():
    x, weight = random(3, 64, 512).detach(), random(512, seed=1).detach()
    norm = partial(ml_kernels.rms_norm, weight=weight, eps=1e-5, backend="reference")
    torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x))
    (expected,) = torch.autograd.grad(norm(x.requires_grad_()).sum(), x)
    found = torch.func.grad(lambda x: norm(x).sum())(x.detach())
    torch.testing.assert_close(found, expected)
