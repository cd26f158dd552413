"""The linear layer in float32, through oneDNN where torch would use a slower library.

Torch multiplies float32 matrices on a CPU with MKL, which on AMD processors does not use AVX-512:
it reaches half of what oneDNN does there, with the same float32 arithmetic. Torch carries both, and
offers oneDNN as an operator of its compiler.

Shapes: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ml_kernels.derivatives import once_differentiable

_FEW = 1 << 22
"""Multiplications below which the two differ by less than a Python function costs."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `ml_kernels.linear`."""
    if x.dtype != torch.float32 or x.numel() * weight.shape[0] < _FEW or not _is_onednn_better():
        return F.linear(x, weight, bias)
    out: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight, bias
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def _is_onednn_better() -> bool:
    compiling = torch.compiler.is_compiling()  # whose inductor chooses by itself
    return not compiling and bool(torch.backends.mkldnn.enabled) and _prefers_onednn()


@functools.cache
def _prefers_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512: by its name, the same in every run."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C.has_mkl:
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a @ b.T` of two matrices."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `(T, O)` from x `(T, I)`."""
        # Each for the gradient of the other: no activations for a frozen weight.
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        out = _product(x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.T) if of_x else None,
            _product(gradient.T, x.T) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )
