"""What the tests of several operators share: inputs, and the comparison with a float64 formula."""

from __future__ import annotations

import pytest
import torch

from ml_kernels.device import why_unavailable
from ml_kernels.dispatch import IMPLEMENTATIONS, why_not

ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""How far a result may be from the formula: a few roundings of each dtype."""


def runs(operator):
    """List the (device, backend) pairs that have an implementation; skipped where it cannot run."""
    pairs = [("cpu", "reference"), ("cpu", "cpu"), ("cuda", "reference"), ("cuda", "cuda")]
    return [
        pytest.param(
            device, backend, marks=_marks(operator, device, backend), id=f"{device}-{backend}"
        )
        for device, backend in pairs
        if (operator, backend) in IMPLEMENTATIONS
    ]


def _marks(operator, device, backend):
    """Skip on a GPU that is not here, or that lacks what this operator needs."""
    if device == "cpu":
        return ()
    missing = why_unavailable("cuda")
    reason = f"no CUDA: {missing}" if missing else why_not(operator, backend)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    """Return a leaf of normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype).requires_grad_()


def with_gradients(function, inputs):
    """Return the outputs of a function and the gradients of its inputs, for fixed upstream ones."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        random(*out.shape, seed=90 + i).detach().to(out.device, out.dtype)
        for i, out in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, inputs, upstream, materialize_grads=True)
    return [*outputs, *gradients]


def kept_by(function, *args, **kwargs):
    """Call a function and return the addresses of what autograd keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*args, **kwargs)
    return [t.data_ptr() for t in kept]


def assert_matches(function, formula, inputs):
    """Compare outputs and gradients with those of a formula, computed in float64 on the CPU."""
    found = with_gradients(function, inputs)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    assert_near(found, with_gradients(formula, wide))


def assert_near(found, expected, dtype=None):
    """Compare tensors up to a few roundings of their dtype, relative to the largest entry."""
    for one, other in zip(found, expected, strict=True):
        tolerance = ROUNDING[dtype or one.dtype]
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(
            one.detach().cpu().double() / scale,
            other.detach().cpu().double() / scale,
            rtol=tolerance,
            atol=tolerance,
        )
