"""RMS norms of torch_npu. Shapes: `x` `(..., H)`, weight `(H,)`; the statistics are float32.

The kernels multiply by the weight in float32 and round once; Hugging Face's Llama rounds before it
multiplies too, which is the reference.

`npu_rms_norm` takes a float32 weight beside half-precision `x`, `npu_add_rms_norm` does not. The
text in torch_npu 2.13 wants one dtype in both. More exact are the tables of op-plugin, from which
torch_npu is built, and of CANN, both of August 2026; for Atlas A2 and A3 they have the rows

    torch_npu-npu_rms_norm      self bfloat16, gamma float32; self float16, gamma float32
    aclnnRmsNorm                x BFLOAT16, gamma FLOAT32, yOut BFLOAT16, rstdOut FLOAT32
    aclnnRmsNormGrad            dy, x, dxOut BFLOAT16; rstd, gamma, dgammaOut FLOAT32
    torch_npu-npu_add_rms_norm  gamma as x1; no tensor may be empty
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from ml_kernels.derivatives import once_differentiable
from ml_kernels.norm import add_rms_norm_reference, rms_norm_reference
from ml_kernels.npu.limits import check_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """See `ml_kernels.rms_norm`; the derivative is torch_npu's.

    Raises:
        BackendUnavailableError: `x` is float64.
    """
    check_dtype("rms_norm", "x", x)
    if not x.numel():
        return rms_norm_reference(x, weight, eps, unit_offset)
    rows = x.reshape(-1, x.shape[-1])  # the kernels take 2 to 8 dimensions
    normed = torch_npu.npu_rms_norm(rows, _gamma(weight, unit_offset), epsilon=eps)[0]
    return normed.view(x.shape)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ml_kernels.add_rms_norm`.

    With a float32 weight beside half-precision `x`, which `unit_offset` makes, the sum is torch's.

    Raises:
        BackendUnavailableError: `x` is float64.
    """
    check_dtype("add_rms_norm", "x", x)
    if not x.numel():
        return add_rms_norm_reference(x, residual, weight, eps, unit_offset)
    gamma = _gamma(weight, unit_offset)
    if gamma.dtype != x.dtype:
        total = x + residual
        return rms_norm(total, weight, eps, unit_offset), total
    rows = (t.reshape(-1, x.shape[-1]) for t in (x, residual))
    normed, total = _AddRMSNorm.apply(*rows, gamma, eps)  # type: ignore[no-untyped-call]
    return normed.view(x.shape), total.view(x.shape)


def _gamma(weight: torch.Tensor, unit_offset: bool) -> torch.Tensor:
    return 1.0 + weight.float() if unit_offset else weight


class _AddRMSNorm(torch.autograd.Function):
    """`npu_add_rms_norm`, whose derivative torch_npu lacks, by that of `npu_rms_norm`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, inverse, total = torch_npu.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
        ctx.save_for_backward(total, gamma, inverse)
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_normed: torch.Tensor | None, of_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if of_normed is None:
            return of_total, of_total, None, None
        total, gamma, inverse = ctx.saved_tensors
        of_sum, of_gamma = torch_npu.npu_rms_norm_backward(of_normed, total, gamma, inverse)
        if of_total is not None:
            of_sum = of_sum + of_total
        return of_sum, of_sum, of_gamma.to(gamma.dtype), None
